"""What a run is built from: bad settings, the optimiser, presets, held-out pictures."""

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image
from safetensors.torch import load_file
from trainer.config import OPTIMIZERS, TrainConfig, check
from trainer.settings import build, read_toml
from trainer.setup import build_run
from training_runs import SMALL, UNET, WEIGHTS, fit
from trials import ROOT

from ddim_plugin import GeneralizedDDIMScheduler


def test_the_optimiser_is_as_the_settings_say(tmp_path):
    settings = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-7, "weight_decay": 0.02}
    for name, kind in zip(OPTIMIZERS, (torch.optim.Adam, torch.optim.AdamW), strict=True):
        run = build_run(build(TrainConfig, SMALL | {"output": str(tmp_path / "x"), "optimizer": name} | settings))
        group = run.optimizer.param_groups[0]
        assert type(run.optimizer.optimizer) is kind
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.95), 1e-7, 0.02)


@pytest.mark.parametrize(
    ("name", "channels", "parameters"),
    [
        ("digits", 1, None),
        ("mnist", 1, 1_324_721),
        ("mnist_small", 1, 156_057),
        ("mnist_flow", 1, 332_761),
        ("mnist_ve", 1, 333_025),
        ("mnist_edm", 1, 332_761),
        ("cifar10_small", 3, 1_325_299),
        ("cifar10", 3, 35_746_307),
        ("celeba64", 3, 78_700_803),
        ("lsun_bedroom256", 3, 113_673_219),
        ("lsun_church256", 3, 113_673_219),
    ],
)
def test_presets(name, channels, parameters):
    table = read_toml(ROOT / "training" / "configs" / f"{name}.toml")
    config = build(TrainConfig, table | {"output": "x"})
    check(config, 1)
    settings = {key: None if value == "none" else value for key, value in config.unet.items()}
    with torch.device("meta"):
        unet = UNet2DModel(in_channels=channels, out_channels=channels, **settings)
    assert parameters in (None, unet.num_parameters())
    assert GeneralizedDDIMScheduler(**config.scheduler).config.prediction_type
    heads = {block.heads for block in unet.modules() if type(block).__name__ == "Attention"}
    if name not in ("digits", "mnist", "mnist_small", "mnist_flow", "mnist_ve", "mnist_edm", "cifar10_small"):
        assert heads == {1}
    text = (ROOT / "training" / "configs" / f"{name}.toml").read_text()
    assert "not measured" in text or "minutes" in text or "hours" in text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"resolution": 9}, "cannot be halved 1 times"),
        ({"mixed_precision": "fp16"}, "fp16 needs an accelerator, and the device is the CPU: use bf16 or no"),
        ({"mixed_precision": "fp8"}, "unknown mixed_precision 'fp8'"),
        ({"trackers": ["tensorbored"]}, "unknown tracker 'tensorbored'"),
        ({"trackers": ["wandb"]}, "'wandb' is not installed: pip install wandb"),
        ({"gradient_accumulation_steps": 3}, "batch_size=8 cannot be shared by 1 processes and"),
        ({"crop": "middle"}, "unknown crop 'middle'"),
        ({"channels": 2}, "channels=2: pictures have 1 or 3"),
        ({"resize": 6, "resolution": 8}, "resize=6 leaves no room"),
        ({"memory_gb": 0}, "pass --resolution"),
        ({"resume": "latest", "overwrite": True}, "choose one"),
        ({"resume": "nowhere"}, "cannot resume from nowhere"),
        ({"preview_steps": 0}, "preview_steps must be positive"),
        ({"eval_images": 0}, "eval_images must be positive"),
        ({"resolution": 0}, "resolution must be positive"),
        ({"unet": UNET | {"sample_size": [8]}}, r"sample_size in \[unet\] must be a side, or"),
        ({"scheduler": {"variance_type": "optimal"}}, "is measured on a trained network"),
        ({"label_column": "kind"}, "add --class_conditional"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"workers": -1}, "workers must not be negative"),
        ({"times": "often"}, "unknown times 'often'"),
        ({"optimizer": "sgd"}, "unknown optimizer 'sgd'"),
        ({"label_dropout": 1.0}, "label_dropout must be in"),
        ({"loss": "min_snr", "snr_gamma": -1.0}, "must be positive"),
        ({"unet": UNET | {"num_class_embeds": 10}}, "num_class_embeds = 10; this training needs None"),
        ({"streaming": True}, "is read by number"),
        ({"eval_every": 1, "eval_split": "late"}, "has no split 'late': it has train, test"),
    ],
)
def test_bad_settings(tmp_path, values, message):
    output = tmp_path / "run"
    with pytest.raises(ValueError, match=message):
        fit(output, **values)
    assert not output.exists()


def test_held_out_pictures_are_others(tmp_path):
    for folder, classes in (("train", "abc"), ("test", "bc"), ("odd", "bd")):
        for kind in classes:
            (tmp_path / folder / kind).mkdir(parents=True)
            Image.fromarray(np.full((8, 8), ord(kind), dtype=np.uint8)).save(tmp_path / folder / kind / "1.png")
    settings = {"data": str(tmp_path / "train"), "class_conditional": True, "eval_every": 6, "batch_size": 2}
    with pytest.raises(ValueError, match="has no split 'test': it has train"):
        fit(tmp_path / "run", **settings)
    with pytest.raises(ValueError, match="has classes that are not trained: d"):
        fit(tmp_path / "run", **settings, eval_data=str(tmp_path / "odd"))
    run = build_run(build(TrainConfig, SMALL | settings | {"output": "x", "eval_data": str(tmp_path / "test")}))
    images, labels = run.eval_set
    assert labels.tolist() == [1, 2]  # as in training
    assert images[:, 0, 0, 0].tolist() == [ord("b"), ord("c")]


def test_a_run_starts_from_the_weights_of_another(tmp_path):
    """Of a pipeline and of a checkpoint: its averaged weights alone."""
    fit(tmp_path / "run", class_conditional=True, steps=3)
    checkpoint, still = tmp_path / "run" / "checkpoints" / "step-00000003", {"learning_rate": 1e-30, "steps": 1}
    first = load_file(tmp_path / "run" / WEIGHTS[0])
    for i, name in enumerate((tmp_path / "run", checkpoint)):
        result = fit(tmp_path / str(i), init_from=str(name), class_conditional=True, loss="min_snr", **still)
        assert (result["step"], result["pictures_seen"]) == (1, 8)
        for kind in WEIGHTS:
            again = load_file(tmp_path / str(i) / kind)
            assert all(torch.equal(again[key], first[key]) for key in first)
    for changes, message in (
        ({}, r"do not fit this network, 1 of \d+ \(such as class_embedding.weight is unknown\): give \[unet\]"),
        (
            {"class_conditional": True, "channels": 3},
            r"such as conv_in.weight is \(8, 1, 3, 3\), needed \(8, 3, 3, 3\)",
        ),
        ({"class_conditional": True, "label_dropout": 0.0}, r"class_embedding.weight is \(11, 32\), needed \(10, 32\)"),
        ({"class_conditional": True, "unet": UNET | {"layers_per_block": 2}}, "such as down_blocks.0.* is missing"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(tmp_path / "other", init_from=str(tmp_path / "run"), **changes)
    assert not (tmp_path / "other").exists()
