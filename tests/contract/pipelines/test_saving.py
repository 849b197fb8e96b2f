"""Folders that the pipeline saves and loads."""

import json
import logging

import diffusers
import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler, DiffusionPipeline, PNDMPipeline, PNDMScheduler
from loopback_hub import LoopbackHub
from safetensors.torch import load_file, save_file

from ddim_plugin import (
    GeneralizedDDIMPipeline,
    GeneralizedDDIMScheduler,
    InverseDDIMScheduler,
    InverseMultistepDDIMScheduler,
    MultistepDDIMScheduler,
)

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def logged(caplog):
    """What the package logs."""
    caplog.set_level(logging.WARNING, logger="ddim_plugin")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "ddim_plugin"]


def index_of(folder):
    return json.loads((folder / "model_index.json").read_text())


def settings(scheduler):
    return {key: value for key, value in scheduler.config.items() if not key.startswith("_")}


OURS = [
    GeneralizedDDIMScheduler(eta=0.3, timestep_spacing="quadratic", beta_schedule="sigmoid"),
    MultistepDDIMScheduler(solver_order=2, fitted_solvers={"2": {"timesteps": [700, 30]}}),
    InverseDDIMScheduler(timestep_spacing="leading"),
    InverseMultistepDDIMScheduler(),
]


@pytest.mark.parametrize("scheduler", OURS, ids=lambda each: type(each).__name__)
def test_stock_pipelines_load_ours(make_pipe, tmp_path, scheduler, quiet_diffusers):
    make_pipe(scheduler).save_pretrained(tmp_path)
    index = index_of(tmp_path)
    assert index["_class_name"] == "DDIMPipeline"
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    assert index["unet"] == ["diffusers", "UNet2DModel"]
    for cls in (DDIMPipeline, DiffusionPipeline):
        stock = cls.from_pretrained(tmp_path)
        assert type(stock) is DDIMPipeline
        assert type(stock.scheduler) is diffusers.DDIMScheduler
    assert quiet_diffusers == []
    stock.save_pretrained(tmp_path / "again")
    for folder in (tmp_path, tmp_path / "again"):
        ours = GeneralizedDDIMPipeline.from_pretrained(folder)
        assert type(ours) is GeneralizedDDIMPipeline
        assert type(ours.scheduler) is type(scheduler)
        assert settings(ours.scheduler) == settings(scheduler)
    restored = GeneralizedDDIMPipeline(stock.unet, stock.scheduler)
    assert type(restored.scheduler) is type(scheduler)


def test_the_path_is_known_but_not_saved(make_pipe, tmp_path):
    make_pipe().save_pretrained(tmp_path)
    pipe = GeneralizedDDIMPipeline.from_pretrained(tmp_path)
    assert str(pipe.name_or_path) == str(tmp_path)
    pipe.save_pretrained(tmp_path)
    assert "_name_or_path" not in index_of(tmp_path)


@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "DDIMScheduler", "PNDMScheduler"])
def test_a_stock_scheduler_that_was_chosen_stays(make_pipe, tmp_path, logged, name):
    scheduler = getattr(diffusers, name)()
    assert make_pipe(scheduler).scheduler is scheduler
    make_pipe(scheduler).save_pretrained(tmp_path)
    assert type(GeneralizedDDIMPipeline.from_pretrained(tmp_path).scheduler) is type(scheduler)
    assert logged() == []


def test_ours_made_stock_stays_stock(make_pipe, tmp_path):
    stock = diffusers.DDIMScheduler.from_config(GeneralizedDDIMScheduler(eta=0.3).config)
    make_pipe(stock).save_pretrained(tmp_path)
    assert type(GeneralizedDDIMPipeline.from_pretrained(tmp_path).scheduler) is diffusers.DDIMScheduler


def test_a_scheduler_that_is_passed_is_used(make_pipe, make_unet, tmp_path, logged):
    DDPMPipeline(make_unet(), DDPMScheduler()).save_pretrained(tmp_path)
    for scheduler in (GeneralizedDDIMScheduler(eta=0.1), PNDMScheduler()):
        assert GeneralizedDDIMPipeline.from_pretrained(tmp_path, scheduler=scheduler).scheduler is scheduler
    assert logged() == []


@pytest.mark.parametrize(
    ("pipeline", "scheduler"),
    [
        (DDPMPipeline, DDPMScheduler(variance_type="fixed_large", beta_end=0.012)),
        (DDIMPipeline, diffusers.DDIMScheduler(clip_sample=False)),
        (PNDMPipeline, PNDMScheduler(prediction_type="v_prediction")),
    ],
)
def test_the_scheduler_of_a_stock_pipeline_becomes_ours(make_unet, tmp_path, logged, pipeline, scheduler):
    pipeline(make_unet(), scheduler).save_pretrained(tmp_path)
    pipe = GeneralizedDDIMPipeline.from_pretrained(tmp_path)
    assert type(pipe.scheduler) is GeneralizedDDIMScheduler
    config = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())  # all settings are in there
    assert settings(pipe.scheduler) == settings(GeneralizedDDIMScheduler.from_config(config))
    assert len(logged()) == 1
    assert f"The {type(scheduler).__name__} of this {pipeline.__name__} became a GeneralizedDDIM" in logged()[0]


def test_a_scheduler_of_another_family(make_unet, tmp_path):
    unet = make_unet()
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    diffusers.CMStochasticIterativeScheduler().save_pretrained(tmp_path / "scheduler")
    index = index_of(tmp_path) | {"scheduler": ["diffusers", "CMStochasticIterativeScheduler"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(
        ValueError, match=r"CMStochasticIterativeScheduler belongs to another family .*such as DDIMScheduler"
    ):
        GeneralizedDDIMPipeline.from_pretrained(tmp_path)


def test_a_subclass_is_named_in_the_index(make_unet, tmp_path):
    class Mine(GeneralizedDDIMPipeline):
        def __init__(self, unet, scheduler, flag=False):
            super().__init__(unet, scheduler)
            self.register_to_config(flag=flag)

    Mine(make_unet(), MultistepDDIMScheduler(), flag=True).save_pretrained(tmp_path)
    assert index_of(tmp_path)["_class_name"] == "Mine"
    pipe = Mine.from_pretrained(tmp_path)
    assert type(pipe) is Mine
    assert pipe.config.flag is True
    assert type(pipe.scheduler) is MultistepDDIMScheduler


@pytest.mark.parametrize("name", ["InverseDDIMScheduler", "MultistepDDIMScheduler", "PNDMScheduler"])
def test_folders_of_version_0_1(make_unet, tmp_path, name):
    """Their index names code files and our class, and their config has no class."""
    ours = "PNDM" not in name
    scheduler = {type(each).__name__: each for each in (*OURS, PNDMScheduler())}[name]
    GeneralizedDDIMPipeline(make_unet(), scheduler).save_pretrained(tmp_path)
    file = tmp_path / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text()) | {"_class_name": name}
    if ours:
        config["_ddim_plugin"].pop("class")
        if "timestep_spacing" in config["_ddim_plugin"]:
            config.pop("timestep_spacing")
    file.write_text(json.dumps(config))
    for pipeline, module in (
        (["ddim_plugin_0_1_0_b8ff2ddd_pipeline", "GeneralizedDDIMPipeline"], "ddim_plugin_0_1_0_b8ff2ddd_scheduler"),
        ("GeneralizedDDIMPipeline", "ddim_plugin"),
    ):
        index = index_of(tmp_path) | {"_class_name": pipeline, "scheduler": [module if ours else "diffusers", name]}
        index.pop("_ddim_plugin", None)
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        pipe = GeneralizedDDIMPipeline.from_pretrained(tmp_path)
        assert type(pipe.scheduler) is type(scheduler)
        assert settings(pipe.scheduler) == settings(scheduler)
        pipe.save_pretrained(tmp_path / "now")
        assert index_of(tmp_path / "now")["_class_name"] == "DDIMPipeline"


def test_from_the_hub(make_pipe, make_unet, tmp_path, logged):
    """The index is read again from the cache, without a request."""
    make_pipe(MultistepDDIMScheduler()).save_pretrained(tmp_path / "ours")
    DDPMPipeline(make_unet(), DDPMScheduler()).save_pretrained(tmp_path / "stock")
    with LoopbackHub() as hub:
        hub.add_user("ada", "hf_ada")
        for name in ("ours", "stock"):
            files = {file.relative_to(tmp_path / name).as_posix(): file for file in (tmp_path / name).rglob("*.*")}
            hub.add_repo(f"ada/{name}", {path: file.read_bytes() for path, file in files.items() if file.is_file()})
        with hub.in_process(tmp_path / "home"):
            requests = []
            for load in (DDIMPipeline.from_pretrained, GeneralizedDDIMPipeline.from_pretrained):
                before = len(hub.asked("HEAD")) + len(hub.asked("GET"))
                pipe = load("ada/ours", cache_dir=tmp_path / load.__self__.__name__)
                requests.append(len(hub.asked("HEAD")) + len(hub.asked("GET")) - before)
            assert requests[0] == requests[1]
            assert type(pipe.scheduler) is MultistepDDIMScheduler
            assert pipe.name_or_path == "ada/ours"
            assert logged() == []
            for settings in ({}, {"revision": "main"}, {"local_files_only": True}):
                pipe = GeneralizedDDIMPipeline.from_pretrained("ada/stock", **settings)
                assert type(pipe.scheduler) is GeneralizedDDIMScheduler
            assert len(logged()) == 3


# ---- weights ---------------------------------------------------------------------------------------------------


def test_missing_weights_are_refused(make_pipe, tmp_path):
    make_pipe().save_pretrained(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    save_file({name: value for name, value in weights.items() if "conv_out" not in name}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"2 weights of the network are missing, such as conv_out\.weight"):
        GeneralizedDDIMPipeline.from_pretrained(tmp_path)


def test_offloaded_weights_are_not_missing(make_unet):
    from accelerate import cpu_offload

    unet = cpu_offload(make_unet(), execution_device="cpu")
    assert next(unet.parameters()).is_meta
    pipe = GeneralizedDDIMPipeline(unet, GeneralizedDDIMScheduler())
    assert pipe.unet is unet


def test_a_save_that_fails_keeps_the_weights(make_pipe, tmp_path, monkeypatch):
    make_pipe(seed=1).save_pretrained(tmp_path)

    def fail(*args, **kwargs):
        raise OSError("no space left on the device")

    monkeypatch.setattr(diffusers.UNet2DModel, "save_pretrained", fail)
    with pytest.raises(OSError, match="no space"):
        make_pipe(seed=2).save_pretrained(tmp_path, safe_serialization=False)
    kept = GeneralizedDDIMPipeline.from_pretrained(tmp_path).unet.conv_in.weight
    assert torch.equal(kept, make_pipe(seed=1).unet.conv_in.weight)


def test_unknown_keywords_are_refused(make_unet, tmp_path):
    pipe = GeneralizedDDIMPipeline(make_unet(), GeneralizedDDIMScheduler())
    with pytest.raises(TypeError, match="unexpected keyword argument 'varient'"):
        pipe.save_pretrained(tmp_path / "model", varient="fp16")
    assert not (tmp_path / "model").exists()


def test_a_stock_scheduler_that_is_passed_to_the_loader_stays(make_unet, tmp_path):
    GeneralizedDDIMPipeline(make_unet(), GeneralizedDDIMScheduler(eta=0.3)).save_pretrained(tmp_path)
    stock = diffusers.DDIMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert GeneralizedDDIMPipeline.from_pretrained(tmp_path, scheduler=stock).scheduler is stock
    assert GeneralizedDDIMPipeline.from_pretrained(tmp_path).scheduler.config.eta == 0.3
