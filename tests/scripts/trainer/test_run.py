"""A step of training: averages, clipping, importance, fp16, losses, labels, compilation."""

import math

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from trainer import run as run_
from trainer import setup as setup_
from trainer.objective import ImportanceTimes
from trainer.report import read_log
from trainer.run import make_average
from training_runs import UNET, WEIGHTS, fit, forget_accelerate, same_weights

from ddim_plugin import GeneralizedDDIMPipeline


def wander(unet, steps, update):
    """Change the weights at random, and call `update(step)` after each time."""
    generator = torch.Generator().manual_seed(0)
    for step in range(1, steps + 1):
        with torch.no_grad():
            for parameter in unet.parameters():
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
        update(step)


def test_the_average_is_that_of_diffusers(make_unet):
    unet = make_unet()
    ours = make_average(unet, 0.97, warmup=True)
    theirs = EMAModel(unet.parameters(), decay=0.97, use_ema_warmup=True, power=0.75)

    def update(step):
        ours.step(unet.parameters())
        theirs.step(unet.parameters())
        assert ours.get_decay(step) == pytest.approx(theirs.cur_decay_value)

    wander(unet, 150, update)
    assert ours.get_decay(150) == 0.97
    for mine, other in zip(ours.shadow_params, theirs.shadow_params, strict=True):
        assert torch.allclose(mine, other, atol=1e-6)


def test_an_average_without_warmup(make_unet):
    unet = make_unet()
    ours = make_average(unet, 0.9, warmup=False)
    expected = unet.conv_in.weight.detach().clone()

    def update(step):
        nonlocal expected
        ours.step(unet.parameters())
        expected = 0.9 * expected + 0.1 * unet.conv_in.weight.detach()

    wander(unet, 20, update)
    averages = dict(zip((name for name, _ in unet.named_parameters()), ours.shadow_params, strict=True))
    assert torch.allclose(averages["conv_in.weight"], expected, atol=1e-6)


def test_gradients_are_clipped(tmp_path):
    """With a large ε Adam's steps are proportional to the gradient."""
    moved = []
    for name, norm in (("clipped", 1e-3), ("whole", 0.0), ("start", 0.0)):
        settings = {"adam_epsilon": 1e2, "learning_rate": 1e2 if name != "start" else 1e-30, "warmup_steps": 0}
        fit(tmp_path / name, steps=1, max_grad_norm=norm, checkpoint_every=0, **settings)
        moved.append(load_file(tmp_path / name / WEIGHTS[1])["conv_in.weight"])
    clipped, whole, start = moved
    norm = read_log(tmp_path / "clipped" / "log.jsonl")[0]["grad_norm"]
    assert norm == pytest.approx(read_log(tmp_path / "whole" / "log.jsonl")[0]["grad_norm"])
    assert norm > 0.1
    ratio = ((clipped - start).norm() / (whole - start).norm()).item()
    assert ratio == pytest.approx(1e-3 / norm, rel=0.05)


def test_importance_weights_reach_the_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(
        ImportanceTimes, "draw", lambda self, count, rng: (rng.integers(1, 1001, count), np.zeros(count))
    )
    fit(tmp_path / "run", steps=1, times="importance")
    line = read_log(tmp_path / "run" / "log.jsonl")[0]
    assert (line["loss"], line["grad_norm"]) == (0, 0)


def with_scaler(monkeypatch, scale):
    """fp16 on the CPU, which has it for tests like this one."""
    make = setup_.make_accelerator

    def scaled(config):
        accelerator = make(config)
        accelerator.state._mixed_precision = "fp16"
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=scale)
        return accelerator

    monkeypatch.setattr(setup_, "make_accelerator", scaled)


def test_steps_that_overflow_in_fp16_are_skipped(tmp_path, monkeypatch):
    with_scaler(monkeypatch, 2.0**24)
    result = fit(tmp_path / "run", steps=40)
    log = read_log(tmp_path / "run" / "log.jsonl")
    assert 0 < result["skipped_steps"] < 39
    assert log[-1]["skipped_steps"] == result["skipped_steps"]
    assert log[0]["grad_norm"] == 0
    assert log[-1]["grad_norm"] > 0
    monkeypatch.setattr(run_, "SKIPS", 3)
    forget_accelerate()
    with pytest.raises(FloatingPointError, match="gradients overflow in fp16, 3 times in a row, up to step 3: stopped"):
        fit(tmp_path / "endless", steps=20)


@pytest.mark.parametrize(
    "settings",
    [
        {"scheduler": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}},
        {"scheduler": {"prediction_type": "sample", "beta_schedule": "sigmoid"}, "loss": "soft_min_snr"},
        {"scheduler": {"variance_type": "learned_range"}, "loss": "hybrid", "times": "importance"},
        {"loss": "theorem1", "loss_eta": 0.5},
        {"loss": "bound", "scheduler": {"variance_type": "fixed_large"}},
        {"loss": "min_snr", "times": "uniform", "optimizer": "adamw", "weight_decay": 0.1},
        {"mixed_precision": "bf16", "channels_last": True, "channels": 3},
        {"max_grad_norm": 0.0, "lr_schedule": "linear", "ema_warmup": False},
    ],
)
def test_what_is_trained_is_drawn_from(tmp_path, settings):
    result = fit(tmp_path / "run", preview_every=6, preview_images=4, preview_steps=3, eval_every=3, **settings)
    assert result["status"] == "finished"
    assert math.isfinite(result["loss"])
    held_out = [line["held_out_loss"] for line in read_log(tmp_path / "run" / "log.jsonl") if "held_out_loss" in line]
    assert len(held_out) == 2
    assert held_out[0] != held_out[1]
    weights = load_file(tmp_path / "run" / WEIGHTS[0])
    assert all(value.dtype == torch.float32 for value in weights.values())
    pipe = GeneralizedDDIMPipeline.from_pretrained(tmp_path / "run")
    assert pipe(num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, settings.get("channels", 1))
    raw = GeneralizedDDIMPipeline.from_pretrained(tmp_path / "run", variant="non_ema")
    assert not torch.equal(raw.unet.conv_in.weight, pipe.unet.conv_in.weight)


def test_class_conditional_training_and_guidance(tmp_path):
    result = fit(tmp_path / "run", class_conditional=True, preview_every=3, preview_images=20, preview_steps=2)
    assert result["classes"] == list("0123456789")
    pipe = GeneralizedDDIMPipeline.from_pretrained(tmp_path / "run")
    assert pipe.unet.config.num_class_embeds == 11
    seeds = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": 2, "output_type": "np"}
    assert pipe(class_labels=[3], guidance_scale=2.0, **seeds).images.shape == (1, 8, 8, 1)
    trained = load_file(tmp_path / "run" / WEIGHTS[1])["class_embedding.weight"]
    fit(tmp_path / "never", class_conditional=True, label_dropout=0.0)
    assert GeneralizedDDIMPipeline.from_pretrained(tmp_path / "never").unet.config.num_class_embeds == 10
    assert trained.shape == (11, 32)


def test_dropped_labels_train_the_last_embedding(tmp_path):
    """With every label dropped only the embedding of no class moves; with none, only those of classes."""
    folders = {share: tmp_path / str(share) for share in (0.0, 0.999999)}
    for share, folder in folders.items():
        unet = UNET | {"num_class_embeds": 11 if share else 10}
        fit(folder, class_conditional=True, label_dropout=share, unet=unet, steps=2, warmup_steps=0)
    moved = load_file(folders[0.999999] / WEIGHTS[1])["class_embedding.weight"]
    ema = load_file(folders[0.999999] / WEIGHTS[0])["class_embedding.weight"]
    assert (moved != ema).any(1).tolist() == [False] * 10 + [True]
    moved, ema = (load_file(folders[0.0] / name)["class_embedding.weight"] for name in WEIGHTS[::-1])
    assert 1 < (moved != ema).any(1).sum() <= 10


def test_a_compiled_network_is_the_same_network(tmp_path, monkeypatch):
    compiled = []
    plain = UNet2DModel.compile

    def through_dynamo(self):
        compiled.append(self)
        plain(self, backend="eager")

    monkeypatch.setattr(UNet2DModel, "compile", through_dynamo)
    unet = UNET | {"dropout": 0.0}
    fit(tmp_path / "eager", unet=unet, steps=3)
    fit(tmp_path / "compiled", unet=unet, steps=3, compile=True)
    assert len(compiled) == 1
    same_weights(tmp_path / "eager", tmp_path / "compiled")
