"""The training loop: bit for bit the same trajectory, signals, numbers that are not finite."""

import json
import math
import os
import signal
import time

import guard
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from train import exit_status
from trainer import checkpoints as checkpoints_
from trainer import loop as loop_
from trainer import output as output_
from trainer.objective import Objective
from trainer.report import read_log
from training_runs import SMALL, UNET, WEIGHTS, fit, losses, same_weights
from trials import Fork, kill, script

EVERYTHING = SMALL | {
    "steps": 60,  # longer than two kills, on fast machines too
    "checkpoint_every": 1,
    "times": "importance",
    "scheduler": {"num_train_timesteps": 4, "beta_end": 0.5},
    "class_conditional": True,
    "flip": True,
    "resize": 10,
    "resolution": 8,
    "crop": "random",
    "gradient_accumulation_steps": 2,
    "lr_schedule": "cosine",
}


def test_a_run_killed_again_and_again_is_the_run_that_was_not(tmp_path):
    """SIGKILL at random moments, most of them while saving: bit for bit the same weights, averages and losses."""
    fit(tmp_path / "whole", **EVERYTHING | {"checkpoint_every": 0})
    done = Fork(
        kill, EVERYTHING | {"output": str(tmp_path / "killed")}, int(os.environ.get("DDIM_KILLS", "3")), 0
    ).wait()
    assert done.returncode == 0, done.stdout + done.stderr
    ends = done.stdout.splitlines()
    assert ends.count("killed while saving") >= 1, done.stdout
    assert ends.count("killed while saving") + ends.count("killed") >= 2, done.stdout
    same_weights(tmp_path / "whole", tmp_path / "killed")
    assert losses(tmp_path / "whole") == losses(tmp_path / "killed")
    assert len(losses(tmp_path / "killed")) == 60
    assert len(list((tmp_path / "killed" / "checkpoints").iterdir())) == 2


def test_previews_and_logs_do_not_touch_the_trajectory(tmp_path):
    fit(tmp_path / "quiet", checkpoint_every=0)
    fit(
        tmp_path / "loud",
        preview_every=2,
        preview_images=3,
        preview_steps=2,
        eval_every=2,
        eval_images=5,
        log_every=4,
        checkpoint_every=1,
        workers=1,
    )
    same_weights(tmp_path / "quiet", tmp_path / "loud")


def test_pictures_from_disk_train_as_those_in_memory(tmp_path):
    settings = {"resolution": 8, "resize": 9, "crop": "random", "flip": True, "class_conditional": True}
    assert fit(tmp_path / "memory", **settings)["in_memory"]
    assert not fit(tmp_path / "disk", memory_gb=0, **settings)["in_memory"]
    same_weights(tmp_path / "memory", tmp_path / "disk")


def test_a_batch_in_parts_is_the_same_batch(tmp_path):
    unet = UNET | {"dropout": 0.0}
    fit(tmp_path / "whole", unet=unet)
    fit(tmp_path / "parts", unet=unet, gradient_accumulation_steps=4)
    for name in WEIGHTS:
        first, second = load_file(tmp_path / "whole" / name), load_file(tmp_path / "parts" / name)
        apart = torch.cat([(first[key] - second[key]).abs().flatten() for key in first])
        assert apart.mean() < 1e-6  # Adam turns a rounding error of a gradient near 0 into a step
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "parts"), rel=1e-5)


def test_the_loss_falls(tmp_path):
    fit(tmp_path / "run", steps=60, learning_rate=4e-3, eval_every=60, checkpoint_every=0)
    found = losses(tmp_path / "run")
    assert np.mean([found[step] for step in range(51, 61)]) < 0.5 * found[1]


# ---- signals and numbers that are not finite ----


def test_a_signal_saves_and_leaves(tmp_path):
    number = signal.SIGTERM
    output = tmp_path / "run"
    file = tmp_path / "s.toml"
    unet = "".join(f"{key} = {json.dumps(value)}\n" for key, value in UNET.items())
    file.write_text(f"steps = 40\nwarmup_steps = 3\nlog_every = 1\npreview_every = 0\n[unet]\n{unet}")
    command = ["training/train.py", "--config", file, "--batch_size", 8, "--trackers", "none", "--output", output]
    process = Fork(script, *command, "--steps=100000")
    deadline = time.monotonic() + 120
    while len(read_log(output / "log.jsonl")) < 5:
        assert time.monotonic() < deadline
        assert process.is_running()
        time.sleep(0.02)
    process.signal(number)
    ended = process.wait()
    assert ended.returncode == 128 + number
    stopped = json.loads((output / "training.json").read_text())["status"]
    step = int(stopped.removeprefix("stopped at step "))
    assert f"{number.name}: stopped at step {step}, which is saved. Continue with --resume latest" in ended.stderr
    assert [each.name for each in (output / "checkpoints").iterdir()] == [f"step-{step:08d}"]
    assert not (output / "model_index.json").exists()
    steps = step + 3
    done = Fork(script, *command, "--resume", "latest", f"--steps={steps}").wait()
    assert done.returncode == 0, done.stderr
    assert f"resuming after step {step}" in done.stdout
    assert sorted(losses(output)) == list(range(1, steps + 1))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("when", ["step", "preview", "last step"])
def test_the_first_signal_waits_for_a_step(tmp_path, monkeypatch, capfd, number, when):
    """Also while a preview is drawn, and the run finishes if it was in its last step."""
    place, name = (loop_, "preview") if when == "preview" else (Objective, "__call__")
    before, calls = getattr(place, name), []

    def interrupted(*arguments):
        calls.append(None)
        if len(calls) == {"step": 4, "preview": 1, "last step": 6}[when]:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # launchers deliver it more than once
        return before(*arguments)

    monkeypatch.setattr(place, name, interrupted)
    result = fit(tmp_path / "run", preview_every=3, preview_images=1, preview_steps=1, checkpoint_every=5)
    assert result["status"] == ("finished" if when == "last step" else "stopped at step 4")
    assert capfd.readouterr().err.count(f"{number.name}: ending after this step, with a checkpoint; again to") == 1
    assert exit_status(result) == (0 if when == "last step" else 128 + number)
    if when != "last step":
        assert [each.name for each in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000004"]
        assert fit(tmp_path / "run", resume="latest")["status"] == "finished"
    assert sorted(losses(tmp_path / "run")) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("when", ["step", "checkpoint", "pipeline"])
def test_a_second_signal_ends_without_a_checkpoint(tmp_path, monkeypatch, when):
    """Nothing is half-written, and the record does not call the run finished."""
    monkeypatch.setattr(guard.signals, "PATIENCE", 0.0)
    cases = {"step": (Objective, "__call__", 5), "checkpoint": (checkpoints_, "seal", 2)}
    place, name, at = cases.get(when, (output_, "save_file", 1))
    before, calls = getattr(place, name), []

    def interrupted(*arguments):
        calls.append(None)
        made = before(*arguments)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        return made

    monkeypatch.setattr(place, name, interrupted)
    with pytest.raises(guard.Ended, match="143"):
        fit(tmp_path / "run")
    monkeypatch.undo()
    left = {each.name for each in (tmp_path / "run").iterdir()}
    assert left == {"checkpoints", "log.jsonl", "training.json"}
    record = json.loads((tmp_path / "run" / "training.json").read_text())
    assert record["status"] == ("running" if when == "pipeline" else "ended by a signal")
    steps = {each.name for each in (tmp_path / "run" / "checkpoints").iterdir()}
    assert steps == {"step-00000003"} | ({"step-00000006"} if when == "pipeline" else set())
    assert fit(tmp_path / "run", resume="latest")["status"] == "finished"


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, precision, monkeypatch):
    output = tmp_path / "run"
    before = Objective.__call__

    def broken(self, given, batch):
        losses = before(self, given, batch)
        calls.append(None)
        return losses * math.nan if len(calls) == 5 else losses

    calls = []
    monkeypatch.setattr(Objective, "__call__", broken)
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 5: stopped; the checkpoint .*step-00000003"):
        fit(output, log_every=6, mixed_precision=precision)
    assert [each.name for each in (output / "checkpoints").iterdir()] == ["step-00000003"]
    assert not (output / "model_index.json").exists()
    assert fit(output, resume="latest", mixed_precision=precision)["status"] == "finished"


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match="at step 2: stopped; there is no checkpoint from before"):
        fit(tmp_path / "run", learning_rate=1e30, warmup_steps=0)
