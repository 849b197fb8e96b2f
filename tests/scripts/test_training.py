"""The training loop: resuming, checkpoints, several processes, signals, numbers that are not finite, bad input."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import train
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel
from pictures import Share, load
from PIL import Image
from safetensors.torch import load_file
from trainer import checkpoints as checkpoints_
from trainer.ema import EMA
from trainer.report import Spikes, Window, read_log
from trainer.settings import build, read_toml
from trials import digests

from ddim_plugin import GeneralizedDDIMPipeline

ROOT = Path(__file__).parents[2]
UNET = {
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
    "attention_head_dim": 8,
    "dropout": 0.1,
}
SMALL = {
    "unet": UNET,
    "steps": 6,
    "batch_size": 8,
    "warmup_steps": 3,
    "learning_rate": 1e-3,
    "log_every": 1,
    "trackers": ["none"],
    "preview_every": 0,
    "checkpoint_every": 3,
}
WEIGHTS = ("unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.non_ema.safetensors")


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    forget_accelerate()


def forget_accelerate():
    """Accelerate keeps its settings for the whole process."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def fit(output, **settings):
    return train.main(build(train.TrainConfig, SMALL | {"output": str(output)} | settings))


def same_weights(one, other):
    for name in WEIGHTS:
        first, second = load_file(one / name), load_file(other / name)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first), name


def losses(folder):
    return {line["step"]: line["loss"] for line in read_log(folder / "log.jsonl") if "loss" in line}


def python(*arguments, **env):
    command = [sys.executable, *map(str, arguments)]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | env
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=300)


# ---- the very same trajectory --------------------------------------------------------------------------------------

EVERYTHING = SMALL | {
    "steps": 60,
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
    file = tmp_path / "settings.json"
    for name, kills in (("whole", 0), ("killed", int(os.environ.get("DDIM_KILLS", "4")))):
        file.write_text(json.dumps(EVERYTHING | {"output": str(tmp_path / name)}))
        done = python("tests/trials.py", "kill", file, kills, 0)
        assert done.returncode == 0, done.stdout + done.stderr
    ends = done.stdout.splitlines()
    assert ends.count("killed while saving") >= 1, done.stdout
    assert ends.count("killed while saving") + ends.count("killed") >= 3, done.stdout
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


def test_another_step_count_goes_on_and_other_networks_are_refused(tmp_path, capsys):
    output = tmp_path / "run"
    fit(output)
    with pytest.raises(ValueError, match="with another loss: it was 'simple', now 'min_snr'"):
        fit(output, resume="latest", loss="min_snr")
    with pytest.raises(ValueError, match=r"is of step 6, beyond steps=4"):
        fit(output, resume="latest", steps=4)
    fit(output, resume="latest", steps=8, learning_rate=1e-4)
    assert "learning_rate was 0.001, from here on 0.0001" in capsys.readouterr().out
    fit(tmp_path / "long", steps=8)
    assert {step: loss for step, loss in losses(output).items() if step < 8} == {
        step: loss for step, loss in losses(tmp_path / "long").items() if step < 8
    }
    assert json.loads((output / "training.json").read_text())["config"]["steps"] == 8
    before = (output / WEIGHTS[0]).read_bytes()
    assert fit(output, resume="latest", steps=8)["status"] == "finished"  # there is nothing left to do
    assert (output / WEIGHTS[0]).read_bytes() == before


def test_a_run_may_go_on_in_other_parts(tmp_path):
    """With less memory a batch is computed in more parts, from any step on."""
    unet = UNET | {"dropout": 0.0}
    fit(tmp_path / "whole", unet=unet)
    fit(tmp_path / "parts", unet=unet, steps=3)
    fit(tmp_path / "parts", unet=unet, resume="latest", gradient_accumulation_steps=2)
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "parts"), rel=1e-5)
    norms = [[line["grad_norm"] for line in read_log(tmp_path / n / "log.jsonl")] for n in ("whole", "parts")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_going_on_from_an_earlier_checkpoint_leaves_the_later_ones_aside(tmp_path):
    output = tmp_path / "run"
    fit(output, checkpoint_every=1, keep_checkpoints=6)
    early = output / "checkpoints" / "step-00000002"
    fit(output, resume=str(early), steps=4, checkpoint_every=1, keep_checkpoints=2)
    names = sorted(each.name for each in (output / "checkpoints").iterdir())
    assert [name for name in names if not name.endswith(".later")] == ["step-00000003", "step-00000004"]
    assert "step-00000006.later" in names
    fit(tmp_path / "branch", resume=str(output / "checkpoints" / "step-00000003"), steps=4)  # into a new folder
    same_weights(output, tmp_path / "branch")
    with pytest.raises(ValueError, match="is another run than"):
        fit(tmp_path / "branch", resume=str(output / "checkpoints" / "step-00000003"), steps=5)


def test_a_finished_run_without_checkpoints_is_not_begun_again(tmp_path):
    fit(tmp_path / "run", checkpoint_every=0)
    with pytest.raises(ValueError, match="is finished, and has no checkpoint to go on from"):
        fit(tmp_path / "run", resume="latest", steps=8)


def test_a_stream_goes_on_where_it_was(tmp_path, streams_end_at_once):
    images, labels = load("digits")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    for part in range(2):
        rows = range(part * 10, part * 10 + 10)
        table = {"image": [Image.fromarray(images[i, 0].numpy()) for i in rows], "label": labels[:10].tolist()}
        (tmp_path / "set").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(table, features).to_parquet(tmp_path / "set" / f"train-{part}.parquet")
    settings = {"data": str(tmp_path / "set"), "streaming": True, "resolution": 8, "class_conditional": True}
    fit(tmp_path / "whole", **settings)
    fit(tmp_path / "parts", **settings, steps=5)  # beyond two epochs
    checkpoint = tmp_path / "parts" / "checkpoints" / "step-00000005"
    epochs = json.loads((checkpoint / "stream-0.json").read_text())["epochs"]
    assert epochs[:2] == [20, 20]  # and what was read ahead
    fit(tmp_path / "parts", **settings, resume="latest")
    same_weights(tmp_path / "whole", tmp_path / "parts")


def test_another_data_set_is_noticed_on_resuming(tmp_path):
    for i in range(9):
        Image.fromarray(np.full((8, 8), i * 20, dtype=np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "set").mkdir()
    for file in tmp_path.glob("*.png"):
        file.rename(tmp_path / "set" / file.name)
    fit(tmp_path / "run", data=str(tmp_path / "set"), steps=3)
    (tmp_path / "set" / "8.png").unlink()
    with pytest.raises(ValueError, match="the data set is not the one of .*'images': 9.*'images': 8"):
        fit(tmp_path / "run", data=str(tmp_path / "set"), resume="latest")


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def spoil(folder, how):
    if how == "cut":
        file = folder / "optimizer.bin"
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "changed":
        file = folder / "ema.safetensors"
        data = bytearray(file.read_bytes())
        data[-7] ^= 1
        file.write_bytes(data)
    elif how == "missing":
        (folder / "model.safetensors").unlink()
    elif how == "no manifest":
        (folder / "manifest.json").unlink()
    else:
        (folder / "manifest.json").write_text('{"step": 6, "fil')


@pytest.mark.parametrize("how", ["cut", "changed", "missing", "no manifest", "half a manifest"])
def test_a_damaged_checkpoint_is_recognised(tmp_path, how, capsys):
    output = tmp_path / "run"
    fit(output)
    folders = sorted((output / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["step-00000003", "step-00000006"]
    spoil(folders[1], how)
    fit(output, resume="latest", steps=7)
    printed = capsys.readouterr()
    assert "step-00000006 is damaged" in printed.err
    assert f"resuming after step 3 from {folders[0]}" in printed.out
    assert sorted(losses(output)) == [1, 2, 3, 4, 5, 6, 7]
    spoil(folders[1], how)
    with pytest.raises(ValueError, match="cannot resume from"):
        fit(output, resume=str(folders[1]), steps=7)
    for folder in (output / "checkpoints").iterdir():
        (folder / "manifest.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="all checkpoints in .* are damaged"):
        fit(output, resume="latest", steps=7)


def test_a_full_disk_while_saving_leaves_the_checkpoint_before(tmp_path, monkeypatch, capsys):
    output = tmp_path / "run"

    def full(*arguments, **settings):
        raise OSError(28, "No space left on device")

    real = checkpoints_._seal
    monkeypatch.setattr(checkpoints_, "_seal", lambda folder, step: full() if step > 3 else real(folder, step))
    assert fit(output)["status"] == "finished"
    assert [each.name for each in (output / "checkpoints").iterdir()] == ["step-00000003"]
    assert "no checkpoint at step 6 (OSError: [Errno 28] No space left on device); the last is of step 3" in (
        capsys.readouterr().err
    )


def test_writes_that_fail_in_a_real_process(tmp_path):
    """A limit on the size of files: the run goes on without checkpoints, and says why it cannot save the pipeline."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)); "
        "sys.path.insert(0, 'training'); import train, json; from config import build; "
        "train.main(build(train.TrainConfig, json.loads(sys.argv[1])))"
    )
    done = python("-c", code, json.dumps(SMALL | {"output": str(tmp_path / "run")}))
    assert "no checkpoint at step 3" in done.stderr, done.stderr
    assert list((tmp_path / "run" / "checkpoints").glob("*")) == []
    assert "OSError: cannot save the pipeline" in done.stderr
    assert "Make room, and go on with --resume latest" in done.stderr
    assert not (tmp_path / "run" / "model_index.json").exists()
    assert not (tmp_path / "run" / "pipeline.part").exists()
    assert [line["step"] for line in read_log(tmp_path / "run" / "log.jsonl") if "no_checkpoint" in line] == [3, 6]


def test_resuming_before_the_first_checkpoint_begins_the_run(tmp_path, capsys):
    fit(tmp_path / "run", resume="latest")
    assert "has no checkpoint yet: starting at step 0" in capsys.readouterr().out


# ---- signals and numbers that are not finite -----------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves(tmp_path, number):
    output = tmp_path / "run"
    file = tmp_path / "s.toml"
    unet = "".join(f"{key} = {json.dumps(value)}\n" for key, value in UNET.items())
    file.write_text(f"steps = 40\nwarmup_steps = 3\nlog_every = 1\npreview_every = 0\n[unet]\n{unet}")
    command = [sys.executable, "training/train.py", "--config", str(file), "--batch_size", "8", "--trackers", "none"]
    slow = "--steps=100000"
    process = subprocess.Popen(
        [*command, "--output", str(output), slow],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while len(read_log(output / "log.jsonl")) < 5:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 128 + number
    stopped = json.loads((output / "training.json").read_text())["status"]
    step = int(stopped.removeprefix("stopped at step "))
    assert f"{number.name}: stopped at step {step}, which is saved. Go on with --resume latest" in error
    assert [each.name for each in (output / "checkpoints").iterdir()] == [f"step-{step:08d}"]
    assert not (output / "model_index.json").exists()
    steps = step + 3
    done = python(*command[1:], "--output", output, "--resume", "latest", f"--steps={steps}")
    assert done.returncode == 0, done.stderr
    assert f"resuming after step {step}" in done.stdout
    assert sorted(losses(output)) == list(range(1, steps + 1))


@pytest.fixture
def interruptible():
    """SIGINT as Python has it, also in a shell's background job, which is born ignoring it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_signal_delivered_twice_still_saves(tmp_path, interruptible):
    """Schedulers signal a launcher and its children, and the launcher its children again."""
    signals, accelerator = (
        train.Signals(),
        train.make_accelerator(build(train.TrainConfig, SMALL | {"output": str(tmp_path / "x")}), tmp_path),
    )
    with signals.noted():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert signals.anywhere(accelerator, 1) == signal.SIGTERM
        signals.PATIENCE = -1.0
        signal.signal(signal.SIGINT, signal.getsignal(signal.SIGTERM))  # our handler, with another end
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, precision, monkeypatch):
    output = tmp_path / "run"
    before = train.Objective.__call__

    def broken(self, given, batch):
        losses = before(self, given, batch)
        calls.append(None)
        return losses * math.nan if len(calls) == 5 else losses

    calls = []
    monkeypatch.setattr(train.Objective, "__call__", broken)
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 5: stopped; the checkpoint .*step-00000003"):
        fit(output, log_every=6, mixed_precision=precision)
    assert [each.name for each in (output / "checkpoints").iterdir()] == ["step-00000003"]
    assert not (output / "model_index.json").exists()
    assert fit(output, resume="latest", mixed_precision=precision)["status"] == "finished"


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match="at step 2: stopped; there is no checkpoint from before"):
        fit(tmp_path / "run", learning_rate=1e30, warmup_steps=0)


def test_spikes():
    spikes = Spikes()
    assert spikes.find([9.0] + [1.0] * 24, [1.0] * 25, 25) == []  # a beginning has nothing before it
    assert spikes.find([1.1, 6.0, 1.0], [1.0, 1.0, 7.0], 28) == [
        {"step": 27, "loss": 6.0, "grad_norm": 1.0},
        {"step": 28, "loss": 1.0, "grad_norm": 7.0},
    ]


# ---- several processes ---------------------------------------------------------------------------------------------


def two_ranks(file, settings):
    file.write_text(json.dumps(settings))
    done = python(
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "tests/trials.py", "ranks", file),
        ACCELERATE_USE_CPU="true",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    held = [json.loads(path.read_text()) for path in sorted(Path(settings["output"]).glob("rank-*.json"))]
    for path in Path(settings["output"]).glob("rank-*.json"):
        path.unlink()
    return held


def test_two_processes_train_as_one_does_and_resume(tmp_path):
    settings = SMALL | {"preview_every": 3, "preview_images": 5, "preview_steps": 2, "times": "importance"}
    held = two_ranks(tmp_path / "a.json", settings | {"output": str(tmp_path / "whole")})
    assert held[0]["unet"] == held[1]["unet"]
    assert held[0]["ema"] == held[1]["ema"]
    pictures, to_model = [], train.to_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "to_model", lambda images: pictures.append(digests(images)) or to_model(images))
        fit(tmp_path / "one")
    alone = [line["learning_rate"] for line in read_log(tmp_path / "one" / "log.jsonl")]
    assert held[0]["lr"] == held[1]["lr"] == alone
    log = read_log(tmp_path / "whole" / "log.jsonl")
    assert [line["images"] for line in log] == [8] * 6
    for step in range(6):  # together the ranks see the pictures that one process sees, each its own half
        mine, other = held[0]["pictures"][step], held[1]["pictures"][step]
        assert len(mine) == len(other) == 4
        assert sorted(mine + other) == sorted(pictures[step])

    broken = settings | {"output": str(tmp_path / "broken")}
    two_ranks(tmp_path / "b.json", broken | {"steps": 3})
    held = two_ranks(tmp_path / "c.json", broken | {"resume": "latest"})
    assert held[0]["unet"] == held[1]["unet"]
    assert len(held[0]["lr"]) == 3
    same_weights(tmp_path / "whole", tmp_path / "broken")
    assert losses(tmp_path / "whole") == losses(tmp_path / "broken")

    settings = broken | {"resume": "latest", "steps": 7}  # with one process it goes on too
    assert train.main(build(train.TrainConfig, settings))["status"] == "finished"


def test_a_preview_is_the_same_at_any_number_of_processes(tmp_path):
    settings = SMALL | {"preview_every": 6, "preview_images": 5, "preview_steps": 2, "learning_rate": 1e-12}
    two_ranks(tmp_path / "a.json", settings | {"output": str(tmp_path / "two")})
    fit(tmp_path / "one", **{key: settings[key] for key in settings})
    pictures = [
        np.asarray(Image.open(tmp_path / n / "previews" / "step-00000006.png")).astype(int) for n in ("one", "two")
    ]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
    assert pictures[0].std() > 10


def test_shares_make_up_the_batch():
    batch = np.arange(24)
    shares = [Share(4, 2, rank, 3) for rank in range(3)]
    assert all(share.batch == 24 for share in shares)
    parts = [np.concatenate([share.of(batch, part) for share in shares]) for part in range(2)]
    assert np.concatenate(parts).tolist() == batch.tolist()


# ---- what is trained, and how --------------------------------------------------------------------------------------


def test_the_schedule_counts_optimiser_steps():
    def rates(**settings):
        config = build(train.TrainConfig, SMALL | {"output": "x", "steps": 10, "warmup_steps": 4} | settings)
        return [train.learning_rate(step, config) / config.learning_rate for step in range(1, 11)]

    assert rates()[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates() == [0.25, 0.5, 0.75] + [1.0] * 7
    assert rates(lr_schedule="linear")[4:] == pytest.approx([1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert rates(lr_schedule="cosine")[7] == pytest.approx(0.5)
    assert 0 < rates(lr_schedule="cosine")[9] < 0.1
    for schedule in train.SCHEDULES:
        assert rates(warmup_steps=0, lr_schedule=schedule)[0] == 1
        assert rates(warmup_steps=20, lr_schedule=schedule)[9] == 0.5


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
    ours = EMA(unet, 0.97, warmup=True)
    ours.follow(unet)
    theirs = EMAModel(unet.parameters(), decay=0.97, use_ema_warmup=True, power=0.75)

    def update(step):
        ours.update(step)
        theirs.step(unet.parameters())
        assert ours.decay_at(step) == pytest.approx(theirs.cur_decay_value)

    wander(unet, 150, update)
    assert ours.decay_at(150) == 0.97
    for mine, other in zip(ours.gather().parameters(), theirs.shadow_params, strict=True):
        assert torch.allclose(mine, other, atol=1e-6)


def test_an_average_without_warmup(make_unet):
    unet = make_unet()
    ours = EMA(unet, 0.9, warmup=False)
    ours.follow(unet)
    expected = unet.conv_in.weight.detach().clone()

    def update(step):
        nonlocal expected
        ours.update(step)
        expected = 0.9 * expected + 0.1 * unet.conv_in.weight.detach()

    wander(unet, 20, update)
    assert torch.allclose(ours.gather().conv_in.weight, expected, atol=1e-6)
    assert not ours.unet.training


def test_the_optimiser_is_as_the_settings_say(tmp_path):
    settings = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-7, "weight_decay": 0.02}
    for name, kind in train.OPTIMIZERS.items():
        run = train.build(
            build(train.TrainConfig, SMALL | {"output": str(tmp_path / "x"), "optimizer": name} | settings)
        )
        group = run.optimizer.param_groups[0]
        assert type(run.optimizer.optimizer) is kind
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.95), 1e-7, 0.02)


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
        train.ImportanceTimes, "draw", lambda self, count, rng: (rng.integers(1, 1001, count), np.zeros(count))
    )
    fit(tmp_path / "run", steps=1, times="importance")
    line = read_log(tmp_path / "run" / "log.jsonl")[0]
    assert (line["loss"], line["grad_norm"]) == (0, 0)


def with_scaler(monkeypatch, scale):
    """fp16 on the CPU, which has it for tests like this one."""
    make = train.make_accelerator

    def scaled(config, output):
        accelerator = make(config, output)
        accelerator.state._mixed_precision = "fp16"
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=scale)
        return accelerator

    monkeypatch.setattr(train, "make_accelerator", scaled)


def test_steps_that_overflow_in_fp16_are_skipped(tmp_path, monkeypatch):
    with_scaler(monkeypatch, 2.0**24)
    result = fit(tmp_path / "run", steps=40)
    log = read_log(tmp_path / "run" / "log.jsonl")
    assert 0 < result["skipped_steps"] < 39
    assert log[-1]["skipped_steps"] == result["skipped_steps"]
    assert log[0]["grad_norm"] == 0
    assert log[-1]["grad_norm"] > 0
    monkeypatch.setattr(train, "SKIPS", 3)
    forget_accelerate()
    with pytest.raises(FloatingPointError, match="gradients overflow in fp16, 3 times in a row, up to step 3: stopped"):
        fit(tmp_path / "endless", steps=20)


SHARDED = """
import sys; sys.path[:0] = ["tests", "training"]
import os, torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from diffusers import UNet2DModel
from trainer.ema import EMA
dist.init_process_group("gloo")
torch.manual_seed(0)
unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1,
    down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, norm_num_groups=4, attention_head_dim=8)
plain, whole = [p.detach().clone() for p in unet.parameters()], EMA(unet, 0.9, False)
sharded = EMA(unet, 0.9, False)
whole_source = __import__("copy").deepcopy(unet)
fully_shard(unet, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
sharded.follow(unet); whole.follow(whole_source)
assert sharded._sharded and not whole._sharded
with torch.no_grad():
    for a, b in zip(unet.parameters(), whole_source.parameters()): a.mul_(1.5); b.mul_(1.5)
for step in (1, 2, 3): sharded.update(step); whole.update(step)
for a, b in zip(sharded.gather().parameters(), whole.gather().parameters()): assert torch.equal(a, b)
state = {k: v.clone() for k, v in whole.unet.state_dict().items()}
sharded.load({k: torch.zeros_like(v) for k, v in state.items()}); sharded.gather()
assert all((p == 0).all() for p in sharded.unet.parameters())
sharded.load(state)
for a, b in zip(sharded.gather().parameters(), whole.gather().parameters()): assert torch.equal(a, b)
if dist.get_rank() == 0: print("equal")
dist.barrier(); dist.destroy_process_group()
"""


def test_the_average_of_shards_is_the_average(tmp_path):
    """Weights in shards, as FSDP keeps them, on two processes."""
    file = tmp_path / "sharded.py"
    file.write_text(SHARDED)
    done = python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", file)
    assert "equal" in done.stdout, done.stdout + done.stderr


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


def test_the_loss_falls(tmp_path):
    fit(tmp_path / "run", steps=60, learning_rate=4e-3, eval_every=60, checkpoint_every=0)
    found = losses(tmp_path / "run")
    assert np.mean([found[step] for step in range(51, 61)]) < 0.5 * found[1]


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


def test_what_a_run_leaves(tmp_path):
    output = tmp_path / "run"
    result = fit(output, trackers=["tensorboard"], preview_every=3, preview_images=2, preview_steps=2)
    record = json.loads((output / "training.json").read_text())
    assert record == json.loads(json.dumps(result))
    assert record["status"] == "finished"
    assert record.keys() >= {"config", "revision", "versions", "machine", "device", "images_per_second", "seconds"}
    assert 0 <= record["loader_share"] < 1
    assert sorted(each.name for each in (output / "previews").iterdir()) == ["step-00000003.png", "step-00000006.png"]
    assert Image.open(output / "loss.png").size[0] > 300
    for line in read_log(output / "log.jsonl"):
        assert line.keys() >= {"step", "loss", "grad_norm", "learning_rate", "images_per_second", "loader_share"}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(output / "trackers" / "ddim"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Images("preview")] == [3, 6]
    assert not (output / "pipeline.part").exists()


def test_an_earlier_pipeline_stays_until_there_is_a_new_one(tmp_path, monkeypatch):
    output, old = tmp_path / "run", tmp_path / "run" / ".earlier"
    fit(output)
    (output / "mine.txt").write_text("a thesis")
    backup = tmp_path / "run.old"
    backup.mkdir()
    before = (output / WEIGHTS[0]).read_bytes()
    monkeypatch.setattr(train, "loop", lambda *arguments: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            fit(output, overwrite=True, seed=1)
        assert (old / WEIGHTS[0]).read_bytes() == before
    monkeypatch.undo()
    fit(output, overwrite=True, seed=1)
    assert not old.exists()
    assert (output / WEIGHTS[0]).read_bytes() != before
    assert (output / "mine.txt").read_text() == "a thesis"  # what the run did not write stays
    assert backup.exists()


def test_only_whole_lines_of_a_log_are_read_and_later_ones_forgotten(tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert read_log(file) == [{"step": 1}, {"step": 2}]
    assert read_log(tmp_path / "none") == []


def test_a_window_names_the_first_step_that_is_not_finite():
    class Alone:
        @staticmethod
        def reduce(tensor, how):
            return tensor

    window = Window(Alone())
    for loss, norm in ((1.0, 2.0), (1.0, math.inf), (math.nan, 1.0)):
        window.add(torch.tensor(loss), torch.tensor(norm))
    with pytest.raises(FloatingPointError, match="the norm of the gradient is inf at step 9"):
        window.read(10)


# ---- presets and bad input -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "channels", "parameters"),
    [
        ("digits", 1, None),
        ("mnist", 1, 1_324_721),
        ("mnist_small", 1, 156_057),
        ("cifar10_small", 3, 1_325_299),
        ("cifar10", 3, 35_746_307),
        ("celeba64", 3, 78_700_803),
        ("lsun_bedroom256", 3, 113_673_219),
        ("lsun_church256", 3, 113_673_219),
    ],
)
def test_presets(name, channels, parameters):
    table = read_toml(ROOT / "training" / "configs" / f"{name}.toml")
    config = build(train.TrainConfig, table | {"output": "x"})
    train.check(config, 1)
    settings = {key: None if value == "none" else value for key, value in config.unet.items()}
    with torch.device("meta"):
        unet = UNet2DModel(in_channels=channels, out_channels=channels, **settings)
    assert parameters in (None, unet.num_parameters())
    heads = {block.heads for block in unet.modules() if type(block).__name__ == "Attention"}
    if name not in ("digits", "mnist", "mnist_small", "cifar10_small"):
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
        ({"memory_gb": 0}, "say --resolution"),
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
        ({"eval_every": 1, "eval_split": "late"}, "unknown split 'late'"),
    ],
)
def test_bad_settings(tmp_path, values, message):
    output = tmp_path / "run"
    with pytest.raises(ValueError, match=message):
        fit(output, **values)
    assert not output.exists()


def test_another_run_is_not_overwritten(tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    fit(output, steps=1)  # an empty folder is free
    with pytest.raises(ValueError, match="holds another run: choose another folder, go on with it by --resume latest"):
        fit(output)


def test_output_and_data_lie_apart(tmp_path):
    (tmp_path / "set").mkdir()
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(tmp_path / "set" / "a.png")
    for output in (tmp_path / "set" / "run", tmp_path, tmp_path / "set"):
        with pytest.raises(ValueError, match="lie in one another: keep them apart"):
            fit(output, data=str(tmp_path / "set"), overwrite=True)
    assert [each.name for each in (tmp_path / "set").iterdir()] == ["a.png"]


def test_held_out_pictures_are_others(tmp_path):
    for folder, classes in (("train", "abc"), ("test", "bc"), ("odd", "bd")):
        for kind in classes:
            (tmp_path / folder / kind).mkdir(parents=True)
            Image.fromarray(np.full((8, 8), ord(kind), dtype=np.uint8)).save(tmp_path / folder / kind / "1.png")
    settings = {"data": str(tmp_path / "train"), "class_conditional": True, "eval_every": 6, "batch_size": 2}
    with pytest.raises(ValueError, match="has no split 'test', as it has no splits: name another data set"):
        fit(tmp_path / "run", **settings)
    with pytest.raises(ValueError, match="has classes that are not trained: d"):
        fit(tmp_path / "run", **settings, eval_data=str(tmp_path / "odd"))
    run = train.build(build(train.TrainConfig, SMALL | settings | {"output": "x", "eval_data": str(tmp_path / "test")}))
    images, labels = run.eval_set
    assert labels.tolist() == [1, 2]  # as in training
    assert images[:, 0, 0, 0].tolist() == [ord("b"), ord("c")]


def test_a_disk_without_room(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(OSError, match="MB free; the run needs"):
        fit(tmp_path / "run")
    assert not (tmp_path / "run").exists()
