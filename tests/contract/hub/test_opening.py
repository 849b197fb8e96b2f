"""Loading folders: models of other pipelines, old layouts, and files that are damaged or unknown."""

import json
import logging
import shutil

import diffusers
import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    PNDMPipeline,
    PNDMScheduler,
    UNet2DModel,
)
from safetensors.torch import load_file, save_file

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler, InverseDDIMScheduler

OPEN = GeneralizedDDIMPipeline.from_pretrained
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def told(caplog):
    """What the package logs, as one text."""
    caplog.set_level(logging.WARNING, logger="ddim_plugin")
    return lambda: "\n".join(record.getMessage() for record in caplog.records if record.name == "ddim_plugin")


@pytest.fixture
def saved(make_unet, tmp_path):
    folder = tmp_path / "model"
    GeneralizedDDIMPipeline(make_unet(), GeneralizedDDIMScheduler(eta=0.2)).save_pretrained(folder)
    return folder


def images(pipe, steps=5):
    pipe.set_progress_bar_config(disable=True)
    return pipe(2, steps, generator=[torch.Generator().manual_seed(i) for i in range(2)], output_type="latent").images


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


# ---- models of others ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pipeline", "scheduler", "clips"),
    [
        (DDPMPipeline, DDPMScheduler(variance_type="fixed_large"), True),
        (DDIMPipeline, DDIMScheduler(), True),
        (DDIMPipeline, DDIMScheduler(clip_sample=False, beta_schedule="squaredcos_cap_v2"), False),
        (PNDMPipeline, PNDMScheduler(beta_end=0.012), False),
        (DDPMPipeline, DDPMScheduler(prediction_type="v_prediction", num_train_timesteps=50, beta_end=0.4), True),
    ],
)
def test_a_stock_pipeline_opens(pipeline, scheduler, clips, make_unet, tmp_path, told, quiet_diffusers):
    unet = make_unet()
    pipeline(unet, scheduler).save_pretrained(tmp_path)
    pipe = OPEN(tmp_path)
    config = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())  # where all is said outright
    expected = GeneralizedDDIMScheduler.from_config(config)
    assert isinstance(pipe.scheduler, GeneralizedDDIMScheduler)
    for key in ("beta_schedule", "beta_end", "num_train_timesteps", "prediction_type", "clip_sample", "eta"):
        assert pipe.scheduler.config[key] == expected.config[key]
    assert torch.equal(images(pipe), images(GeneralizedDDIMPipeline(unet, expected)))
    assert pipe.scheduler.config.clip_sample == clips
    became = (
        f"The {type(scheduler).__name__} of this {pipeline.__name__} became a GeneralizedDDIMScheduler with eta=0.0"
    )
    assert told().startswith(became)
    assert f"clip_sample={clips}" in told()
    assert quiet_diffusers == []


def test_the_settings_that_an_old_config_leaves_out_are_logged(make_unet, tmp_path, told):
    """An old config is silent of clipping, which its class did by default."""
    DDPMPipeline(make_unet(), DDPMScheduler(variance_type="fixed_large")).save_pretrained(tmp_path)
    file = tmp_path / "scheduler" / "scheduler_config.json"
    old = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "num_train_timesteps": 1000}
    old |= {"_class_name": "DDPMScheduler", "_diffusers_version": "0.1.1", "variance_type": "fixed_large"}
    file.write_text(json.dumps(old | {"timestep_values": None, "tensor_format": "pt"}))
    pipe = OPEN(tmp_path)
    assert pipe.scheduler.config.clip_sample is False
    for setting in ("clip_sample=False", "variance_type='fixed_small'", "timestep_spacing='linear'"):
        assert setting in told()


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_the_oldest_layout_opens(kind, make_unet, tmp_path, told, quiet_diffusers):
    """All files in one folder, as `google/ddpm-cifar10-32` has them; or pickled weights, of tensors only."""
    unet = make_unet(channels=3)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path, safe_serialization=kind == "safetensors")
    for file in (*tmp_path.glob("unet/*"), *tmp_path.glob("scheduler/*")):
        file.rename(tmp_path / file.name)
    shutil.rmtree(tmp_path / "unet")
    shutil.rmtree(tmp_path / "scheduler")
    assert (tmp_path / f"diffusion_pytorch_model.{kind}").is_file()
    pipe = OPEN(tmp_path)
    assert pipe.scheduler.config.clip_sample is True
    assert torch.equal(images(pipe), images(GeneralizedDDIMPipeline(unet, pipe.scheduler)))
    assert "became a GeneralizedDDIMScheduler" in told()
    assert kind == "bin" or quiet_diffusers == []  # diffusers warns of pickles


def test_a_scheduler_of_another_family_is_refused(make_unet, tmp_path):
    pipe = DDPMPipeline(make_unet(), DDPMScheduler())
    pipe.scheduler = CMStochasticIterativeScheduler()
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="CMStochasticIterativeScheduler belongs to another family of models"):
        OPEN(tmp_path)
    assert OPEN(tmp_path, scheduler=GeneralizedDDIMScheduler(eta=0.4)).scheduler.config.eta == 0.4


def test_a_scheduler_of_ones_own_is_taken(make_unet, tmp_path, told):
    DDPMPipeline(make_unet(), DDPMScheduler()).save_pretrained(tmp_path)
    scheduler, unet = GeneralizedDDIMScheduler(eta=0.7), make_unet(seed=5)
    pipe = OPEN(tmp_path, scheduler=scheduler, unet=unet)
    assert pipe.scheduler is scheduler
    assert pipe.unet is unet
    assert told() == ""


def test_schedulers_of_ours_stay_as_saved(make_unet, tmp_path, told):
    """Also a stock one in our pipeline: it was chosen."""
    for scheduler in (InverseDDIMScheduler(timestep_spacing="quadratic"), PNDMScheduler(), DDPMScheduler()):
        folder = tmp_path / type(scheduler).__name__
        GeneralizedDDIMPipeline(make_unet(), scheduler).save_pretrained(folder)
        again = OPEN(folder).scheduler
        assert type(again) is type(scheduler)
        assert {k: v for k, v in again.config.items() if k[0] != "_"} == {
            k: v for k, v in scheduler.config.items() if k[0] != "_"
        }
    assert told() == ""


@pytest.mark.parametrize("module", ["ddim_plugin", "ddim_plugin_0_1_0_b8ff2ddd_scheduler"])
def test_a_folder_of_an_earlier_format_opens(saved, module):
    """With plain names, and as 0.1.0 saved it: with the names of its code files."""
    pipeline = "GeneralizedDDIMPipeline"
    file = saved / "model_index.json"
    index = json.loads(file.read_text()) | {"scheduler": [module, "GeneralizedDDIMScheduler"]}
    del index["_ddim_plugin"]
    file.write_text(json.dumps(index | {"_class_name": pipeline if module == "ddim_plugin" else [module, pipeline]}))
    pipe = OPEN(saved)
    assert type(pipe.scheduler) is GeneralizedDDIMScheduler
    assert pipe.scheduler.config.eta == 0.2
    pipe.save_pretrained(saved)
    assert json.loads(file.read_text())["scheduler"] == ["diffusers", "DDIMScheduler"]
    assert OPEN(saved).scheduler.config.eta == 0.2


# ---- settings ------------------------------------------------------------------------------------------------------


def test_weights_by_variant_and_type(saved, make_unet):
    half = make_unet(seed=3).half()
    GeneralizedDDIMPipeline(half, GeneralizedDDIMScheduler()).save_pretrained(saved, variant="fp16")
    assert OPEN(saved).unet.dtype == torch.float32
    pipe = OPEN(saved, variant="fp16", torch_dtype=torch.float16)
    assert pipe.unet.dtype == torch.float16
    assert torch.equal(pipe.unet.conv_in.weight, half.conv_in.weight)
    assert OPEN(saved, torch_dtype={"unet": torch.bfloat16, "default": torch.float64}).unet.dtype == torch.bfloat16
    assert OPEN(saved, torch_dtype={"default": torch.float64}).unet.dtype == torch.float64
    with pytest.raises(ValueError, match="`variant=ema`, but no such modeling files are available"):
        OPEN(saved, variant="ema")


def test_where_it_came_from_is_known(saved):
    assert str(OPEN(saved).name_or_path) == str(saved)
    assert "_name_or_path" not in json.loads((saved / "model_index.json").read_text())
    config = GeneralizedDDIMPipeline.load_config(saved)
    assert config["_class_name"] == "GeneralizedDDIMPipeline"
    assert config["scheduler"] == ["diffusers", "DDIMScheduler"]


def test_a_subclass_saves_no_code_of_ours(make_unet, tmp_path):
    class Mine(GeneralizedDDIMPipeline):
        pass

    Mine(make_unet(), GeneralizedDDIMScheduler(eta=0.3)).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "Mine"
    assert not list(tmp_path.glob("*.py"))
    pipe = Mine.from_pretrained(tmp_path)
    assert type(pipe) is Mine
    assert pipe.scheduler.config.eta == 0.3
    with pytest.raises(ValueError, match="is a Mine: load it with GeneralizedDDIMPipeline"):
        pipe.push_to_hub("ada/mine")


def test_saving_over_a_model_keeps_other_files(saved, make_unet):
    (saved / "notes.txt").write_text("mine")
    GeneralizedDDIMPipeline(make_unet(), DDIMScheduler()).save_pretrained(saved)
    assert not list(saved.rglob("*.py"))
    assert (saved / "notes.txt").read_text() == "mine"
    assert type(OPEN(saved).scheduler) is DDIMScheduler


# ---- damage --------------------------------------------------------------------------------------------------------


def test_truncated_weights(saved):
    content = (saved / WEIGHTS).read_bytes()
    for length in (len(content) - 100, 50, 3, 0):
        (saved / WEIGHTS).write_bytes(content[:length])
        with pytest.raises(OSError, match="Unable to load weights"):
            OPEN(saved)


def test_weights_that_do_not_fit(saved, quiet_diffusers):
    weights = load_file(saved / WEIGHTS)
    save_file({k: v for k, v in weights.items() if "conv_out" not in k}, saved / WEIGHTS)
    with pytest.raises(ValueError, match="2 weights of the network are missing, such as conv_out"):
        OPEN(saved)
    assert len(quiet_diffusers) == 1
    save_file(weights | {"more": torch.zeros(3)}, saved / WEIGHTS)
    assert OPEN(saved).unet is not None
    assert "['more']" in quiet_diffusers[-1]  # diffusers warns of weights that the network does not have
    save_file(weights, saved / WEIGHTS)
    change(saved / "unet" / "config.json", block_out_channels=[8, 32])
    with pytest.raises((OSError, ValueError), match="shape"):
        OPEN(saved)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ({"unet": ["os", "system"]}, "cannot be loaded"),
        ({"unet": ["subprocess", "Popen"]}, "cannot be loaded"),
        ({"unet": ["somewhere", "Net"]}, "somewhere is not one of the libraries"),
        ({"unet": ["diffusers", "Net"]}, "has no class `Net`"),
        ({"scheduler": ["their_scheduler", "TheirScheduler"]}, "their_scheduler is not one of the libraries"),
        ({"unet": [None, None]}, "only {'scheduler'} were passed"),
    ],
)
def test_an_index_with_unknown_classes(saved, index, said):
    change(saved / "model_index.json", **index)
    with pytest.raises(ValueError, match=said):
        OPEN(saved)


def test_what_is_no_model(saved, tmp_path):
    with pytest.raises(OSError, match=r"no file named model_index\.json found"):
        OPEN(tmp_path)
    with pytest.raises(ValueError, match="neither a valid local path nor a valid repo id"):
        OPEN(str(tmp_path / "gone"))
    (saved / "model_index.json").write_text("{")
    with pytest.raises(OSError, match=r"model_index\.json' is not a valid JSON file"):
        OPEN(saved)


def test_parts_that_are_missing(saved):
    (saved / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(OSError, match=r"no file named scheduler_config\.json found"):
        OPEN(saved)
    (saved / WEIGHTS).unlink()
    with pytest.raises(OSError, match="no file named diffusion_pytorch_model"):
        OPEN(saved, scheduler=GeneralizedDDIMScheduler())


@pytest.mark.parametrize(
    "given", [{}, {"device_map": "cpu"}, {"unet": True}, {"scheduler": True}, {"max_memory": {0: "1GB"}}]
)
@pytest.mark.parametrize("component", ["unet", "scheduler"])
def test_modules_that_a_folder_names_are_not_imported(saved, component, given, make_unet, tmp_path, monkeypatch):
    """Whatever else is asked for, and though the working folder is on the path."""
    ran = tmp_path / "ran"
    for name in ("evil.py", "pipeline.py", "diffusers.py"):
        (saved / name).write_text(f"open({str(ran)!r}, 'w').close()\n")
    change(saved / "model_index.json", **{component: ["evil", "X"]})
    monkeypatch.chdir(saved)
    monkeypatch.syspath_prepend(str(saved))
    made = {"unet": make_unet(), "scheduler": GeneralizedDDIMScheduler()}
    given = {key: made.get(key, value) for key, value in given.items()}
    with pytest.raises(ValueError, match="evil is not one of the libraries"):
        OPEN(".", **given)
    assert not ran.exists()


def test_placing_the_network_needs_its_weights_too(saved):
    assert OPEN(saved, device_map="cpu").unet.device == torch.device("cpu")
    weights = load_file(saved / WEIGHTS)
    save_file({k: v for k, v in weights.items() if "conv_out" not in k}, saved / WEIGHTS)
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        OPEN(saved, device_map="cpu")


def test_settings_of_a_scheduler_are_checked(saved):
    for changed, said in [
        ({"timestep_spacing": []}, "timestep_spacing"),
        ({"prediction_type": "noise"}, "prediction_type"),
    ]:
        before = (saved / "scheduler" / "scheduler_config.json").read_text()
        change(saved / "scheduler" / "scheduler_config.json", **changed)
        with pytest.raises(ValueError, match=said):
            OPEN(saved)
        (saved / "scheduler" / "scheduler_config.json").write_text(before)


def test_other_files_beside_the_weights_stay(saved, make_unet):
    """What only begins like a file of weights is none."""
    names = [f"diffusion_pytorch_model{end}" for end in (".safetensors.bak", "_old.safetensors", ".onnx", ".gguf")]
    for name in names:
        (saved / "unet" / name).write_bytes(b"mine")
    other = make_unet(seed=7)
    GeneralizedDDIMPipeline(other, GeneralizedDDIMScheduler()).save_pretrained(saved, variant="non_ema")
    GeneralizedDDIMPipeline(make_unet(seed=8), GeneralizedDDIMScheduler()).save_pretrained(saved)
    for name in names:
        assert (saved / "unet" / name).read_bytes() == b"mine"
    assert torch.equal(OPEN(saved, variant="non_ema").unet.conv_in.weight, other.conv_in.weight)


def test_a_save_that_fails_keeps_the_weights(saved, make_unet, monkeypatch):
    before = OPEN(saved).unet.conv_in.weight.clone()

    def fail(*args, **kwargs):
        raise OSError("no space left on the device")

    monkeypatch.setattr(diffusers.UNet2DModel, "save_pretrained", fail)
    with pytest.raises(OSError, match="no space"):
        GeneralizedDDIMPipeline(make_unet(seed=8), GeneralizedDDIMScheduler()).save_pretrained(saved)
    assert torch.equal(OPEN(saved).unet.conv_in.weight, before)


def test_the_type_of_the_weights_may_be_given(saved):
    default = torch.get_default_dtype()
    assert OPEN(saved, dtype=torch.bfloat16).unet.dtype == torch.bfloat16
    assert torch.get_default_dtype() == default


def test_a_subclass_keeps_its_settings(make_unet, tmp_path):
    class Mine(GeneralizedDDIMPipeline):
        _optional_components = ["head"]  # noqa: RUF012

        def __init__(self, unet, scheduler, flag=False, head=None):
            super().__init__(unet, scheduler)
            self.register_to_config(flag=flag)
            self.register_modules(head=head)

    Mine(make_unet(), GeneralizedDDIMScheduler(), flag=True).save_pretrained(tmp_path / "one")
    assert Mine.from_pretrained(tmp_path / "one").config.flag is True
    Mine(make_unet(), GeneralizedDDIMScheduler(), head=make_unet(seed=3)).save_pretrained(tmp_path / "two")
    assert torch.equal(Mine.from_pretrained(tmp_path / "two").head.conv_in.weight, make_unet(seed=3).conv_in.weight)


def test_pickles_hold_tensors_only(saved, make_unet, tmp_path):
    """A .bin that would run code when it is read is refused, and does not."""
    ran = tmp_path / "ran"

    class Trap:
        def __reduce__(self):
            return open, (str(ran), "w")

    (saved / WEIGHTS).unlink()
    torch.save({"conv_in.weight": Trap()}, saved / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(OSError, match="Unable to load weights"):
        OPEN(saved)
    assert not ran.exists()


def test_a_network_of_ones_own_module(make_unet, tmp_path, monkeypatch):
    """Known because it was imported, not because the folder names it."""
    import sys
    import types

    module = types.ModuleType("my_networks")
    module.MyNet = type("MyNet", (UNet2DModel,), {"__module__": "my_networks"})
    module.ModelMixin = diffusers.ModelMixin
    monkeypatch.setitem(sys.modules, "my_networks", module)
    network = module.MyNet(**{k: v for k, v in make_unet().config.items() if not k.startswith("_")})
    GeneralizedDDIMPipeline(network, GeneralizedDDIMScheduler()).save_pretrained(tmp_path)
    assert type(OPEN(tmp_path).unet) is module.MyNet
    monkeypatch.delitem(sys.modules, "my_networks")
    with pytest.raises(ValueError, match="my_networks is not one of the libraries"):
        OPEN(tmp_path)
