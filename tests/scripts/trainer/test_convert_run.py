"""Checkpoints of a run become pipelines."""

import json
import shutil

import convert_checkpoint
import pytest
import torch
from trainer.checkpoints import seal
from trainer.settings import build
from training_runs import fit, forget_accelerate

from ddim_plugin import GeneralizedDDIMPipeline


def convert(checkpoint, output, **settings):
    values = {"checkpoint": str(checkpoint), "output": str(output)} | settings
    return convert_checkpoint.main(build(convert_checkpoint.ConvertConfig, values))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run with classes and a learned variance, and its checkpoint before the last."""
    folder = tmp_path_factory.mktemp("run") / "run"
    settings = {"class_conditional": True, "scheduler": {"variance_type": "learned_range", "beta_end": 0.03}}
    fit(folder, **settings, loss="hybrid", resolution=8, steps=4, checkpoint_every=2)
    forget_accelerate()
    return folder, folder / "checkpoints" / "step-00000002"


@pytest.mark.parametrize(("kind", "variant"), [("auto", None), ("ema", None), ("raw", "non_ema")])
def test_a_checkpoint_of_a_run_becomes_its_pipeline(run, tmp_path, kind, variant):
    """That of the last step is the pipeline that the run saved; an earlier one has other weights."""
    pipes = [GeneralizedDDIMPipeline.from_pretrained(run[0], variant=variant)]
    for step in (4, 2):
        found = convert(run[1].with_name(f"step-0000000{step}"), tmp_path / str(step), weights=kind)
        assert (found["source"]["step"], found["weights"]) == (step, "ema" if kind == "auto" else kind)
        pipes.append(GeneralizedDDIMPipeline.from_pretrained(tmp_path / str(step)))
    saved, last, before = (pipe.unet.state_dict() for pipe in pipes)
    assert all(torch.equal(last[key], saved[key]) for key in saved)
    assert not torch.equal(before["conv_in.weight"], saved["conv_in.weight"])
    assert pipes[0].scheduler.config == pipes[2].scheduler.config
    assert pipes[2].unet.config.num_class_embeds == 11


def test_a_checkpoint_of_version_0_1(run, tmp_path):
    """It has no settings of the network but those of the run."""
    old = shutil.copytree(run[1], tmp_path / "step-00000002")
    state = json.loads((old / "run.json").read_text())
    for key in ("format", "unet", "scheduler", "seen"):
        del state[key]
    (old / "run.json").write_text(json.dumps(state))
    (old / "manifest.json").unlink()
    seal(old, 2)
    convert(old, tmp_path / "old")
    convert(run[1], tmp_path / "new")
    for name in ("unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"):
        assert (tmp_path / "old" / name).read_bytes() == (tmp_path / "new" / name).read_bytes()


def test_a_checkpoint_whose_entries_are_odd(run, tmp_path):
    folder = shutil.copytree(run[1], tmp_path / "step-00000002")
    state = json.loads((folder / "run.json").read_text())
    old = {key: value for key, value in state.items() if key not in ("unet", "scheduler")}
    needs = r"run.json has {} for {}, and needs an? .*: pass another checkpoint"
    for content, message in (
        (state | {"config": []}, needs.format(r"\[\]", "config")),
        (old | {"config": {}}, needs.format("None", "scheduler")),
        (old | {"config": {"scheduler": {}}}, needs.format("None", "resolution in its config")),
        (old | {"config": old["config"] | {"resolution": "8"}}, needs.format("'8'", "resolution in its config")),
        (old | {"config": old["config"] | {"unet": 3}}, needs.format("3", "unet in its config")),
        (state | {"step": "4"}, needs.format("'4'", "step")),
        (state | {"seen": None}, needs.format("None", "seen")),
        (state | {"format": -1}, needs.format("-1", "format")),
        (state | {"format": "1"}, needs.format("'1'", "format")),
        (state | {"unet": state["unet"] | {"in_channels": "x"}}, "run.json does not describe the network"),
        (state | {"unet": state["unet"] | {"sample_sizes": 8}}, "run.json does not describe the network"),
        (state | {"scheduler": {"beta_end": "x"}}, "run.json does not describe the network and scheduler"),
    ):
        (folder / "run.json").write_text(json.dumps(content))
        (folder / "manifest.json").unlink()
        seal(folder, 2)
        with pytest.raises(ValueError, match=message):
            convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_checkpoint_of_a_run(run, tmp_path):
    spoiled = shutil.copytree(run[1], tmp_path / "spoiled")
    (spoiled / "ema.safetensors").write_bytes(b"")
    for folder, settings, message in (
        (run[0], {}, r"is no checkpoint: its manifest.json cannot be read: .* Pass such as OUTPUT/checkpoints/step-"),
        (spoiled, {}, "ema.safetensors has 0 bytes"),
        (run[1], {"beta_end": 0.05}, "beta_end has no effect on a checkpoint of train.py, which knows its own"),
        (run[1], {"resolution": 16}, "resolution has no effect"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(folder, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
