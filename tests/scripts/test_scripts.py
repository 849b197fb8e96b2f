"""The scripts, run as a user runs them, on real digits."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import demo
import guard
import numpy as np
import pytest
import sample
import torch
import train
from pictures import load, to_model
from PIL import Image
from safetensors.torch import load_file
from trainer.config import TrainConfig
from trainer.settings import build, read_toml
from trials import Fork, script

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "training" / "configs" / "digits.toml"
QUICK = ["--steps", "6", "--warmup_steps", "2", "--batch_size", "8"]


def run(*command):
    done = Fork(script, *command).wait()
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "model"
    output = run("training/train.py", "--config", CONFIG, "--output", folder, *QUICK)
    assert "trained 6 steps" in output
    return folder


def test_training_writes_a_whole_pipeline(trained):
    record = json.loads((trained / "training.json").read_text())
    assert record["config"]["steps"] == 6
    assert record["config"]["seed"] == 0
    assert record["parameters"] == sum(
        value.numel() for value in load_file(trained / "unet" / "diffusion_pytorch_model.safetensors").values()
    )
    assert 0 < record["loss"] < 3
    assert set(record) >= {"revision", "versions", "seconds", "images_per_second"}
    assert not trained.with_name("model.part").exists()


def test_pictures_of_the_script(trained, tmp_path):
    output = run(
        "training/sample.py",
        "--model",
        trained,
        "--output",
        tmp_path,
        "--columns",
        3,
        "--steps",
        1,
        7,
        "--eta_steps",
        3,
    )
    assert "samples_by_steps.png" in output
    by_steps, by_eta = (Image.open(tmp_path / f"samples_by_{name}.png") for name in ("steps", "eta"))
    assert by_eta.height > by_steps.height > 2 * 64
    assert np.asarray(by_eta).std() > 10
    assert json.loads((tmp_path / "sample.json").read_text())["config"]["steps"] == [1, 7]


def test_training_is_repeatable(trained, tmp_path):
    """Without the launcher, in this process."""
    again = {"steps": 6, "warmup_steps": 2, "batch_size": 8, "output": str(tmp_path / "again")}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train.main(build(TrainConfig, read_toml(CONFIG) | again))
    finally:
        torch.set_num_threads(threads)
    name = Path("unet") / "diffusion_pytorch_model.safetensors"
    first, again = load_file(trained / name), load_file(tmp_path / "again" / name)
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_two_processes_train_one_model(tmp_path):
    """By the launcher of torch, which starts new processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "training/train.py"]
    command += ["--config", CONFIG, "--output", tmp_path / "model", *QUICK]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "model" / "training.json").read_text())
    assert record["processes"] == 2
    assert np.isfinite(record["loss"])


def test_an_existing_output_is_kept(trained):
    before = sorted(path.stat().st_mtime_ns for path in trained.rglob("*"))
    with pytest.raises(ValueError, match=f"the output {trained} holds another run: choose another folder"):
        train.main(build(TrainConfig, {"output": str(trained)}))
    assert sorted(path.stat().st_mtime_ns for path in trained.rglob("*")) == before


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps must be positive, not 0"),
        ({"data": "./faces"}, "there is no file ./faces"),
        ({"lr_schedule": "steps"}, "unknown lr_schedule 'steps'"),
        ({"ema_decay": 1.0}, "ema_decay must be in"),
        ({"scheduler": {"variance_type": "learned_range"}}, "a learned variance needs 'hybrid'"),
        ({"scheduler": {"beta_schedule": "cubic"}}, "unknown beta_schedule 'cubic'"),
        ({"scheduler": {"betas": "cubic"}}, r"unknown settings in \[scheduler\]: betas"),
        ({"unet": {"blocks": 3}}, r"unknown settings in \[unet\]: blocks"),
        ({"unet": {"out_channels": 2}}, r"out_channels, sample_size \(1, 2, 8\); the images need \(1, 1, 8\)"),
        ({"scheduler": {"rescale_betas_zero_snr": True}}, "ε does not determine x0 at zero terminal SNR"),
    ],
)
def test_bad_settings_end_training_before_it_begins(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        train.main(build(TrainConfig, {"output": str(tmp_path / "model")} | values))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["folder", "file", "here"])
def test_only_an_earlier_run_is_overwritten(tmp_path, kind, monkeypatch):
    output = tmp_path / "mine"
    if kind == "file":
        output.write_text("a thesis")
    else:
        output.mkdir()
        (output / "thesis.txt").write_text("a thesis")
    if kind == "here":
        monkeypatch.chdir(output)
        output = Path(".")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="replaces the folder of an earlier run only|is a file: choose a folder"):
        train.main(build(TrainConfig, {"output": str(output), "overwrite": True}))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_row_of_real_pictures(trained, tmp_path):
    settings = {"model": str(trained), "columns": 2, "steps": (2,), "etas": (0.0,), "eta_steps": (2,)}
    heights = []
    for data in (None, "digits"):
        sample.main(
            build(sample.SampleConfig, settings | {"output": str(tmp_path), "data": data, "overwrite": bool(data)})
        )
        heights.append(Image.open(tmp_path / "samples_by_steps.png").height)
        kept = json.loads((tmp_path / "sample.json").read_text())["config"]
        assert (kept["data"], kept["split"]) == (data, data and "test")  # the one that was drawn
    assert heights[1] > heights[0] + 60
    again = {"output": str(tmp_path / "val"), "data": "digits", "split": "val"}
    with pytest.raises(ValueError, match="digits has no split 'val'"):
        sample.main(build(sample.SampleConfig, settings | again))


@pytest.mark.parametrize("name", sample.WRITTEN)
def test_pictures_that_exist_are_kept(trained, tmp_path, name):
    (tmp_path / name).write_text("mine")
    settings = {"model": str(trained), "output": str(tmp_path), "columns": 1, "steps": (1,), "eta_steps": (1,)}
    with pytest.raises(ValueError, match=f"{name} exists: choose another output, or pass --overwrite"):
        sample.main(build(sample.SampleConfig, settings))
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [(name, "mine")]


def test_samples_of_a_class_and_those_that_are_not_finite(make_unet, tmp_path):
    unet = make_unet(num_class_embeds=4)
    GeneralizedDDIMPipeline(unet, GeneralizedDDIMScheduler()).save_pretrained(tmp_path / "model")
    quick = {"model": str(tmp_path / "model"), "columns": 2, "steps": (2,), "etas": (0.0,), "eta_steps": (2,)}
    seen = []
    for i, labels in enumerate(([0, 1], [1], [1, 1])):
        made = sample.main(
            build(sample.SampleConfig, quick | {"output": str(tmp_path / str(i)), "class_label": labels})
        )
        seen.append(Path(made["pictures"][0]).read_bytes())
    assert seen[0] != seen[1] == seen[2]
    with pytest.raises(ValueError, match="3 class labels for 2 columns: give one, or one for each"):
        sample.main(build(sample.SampleConfig, quick | {"output": str(tmp_path / "3"), "class_label": [1, 2, 3]}))
    torch.nn.init.constant_(unet.conv_out.bias, math.nan)
    GeneralizedDDIMPipeline(unet, GeneralizedDDIMScheduler()).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="not finite"):
        sample.main(build(sample.SampleConfig, quick | {"output": str(tmp_path / "4"), "class_label": [1]}))
    assert not (tmp_path / "4").exists()


def test_arrays_of_samples(make_unet, tmp_path):
    pipe = GeneralizedDDIMPipeline(make_unet(channels=3, num_class_embeds=2), GeneralizedDDIMScheduler())
    pipe.save_pretrained(tmp_path / "model")
    quick = {"columns": 2, "steps": (1, 2), "etas": (0.0,), "eta_steps": (2,), "class_label": [0, 1], "npz": 67}
    settings = {"model": str(tmp_path / "model"), "output": str(tmp_path / "out")} | quick
    made = sample.main(build(sample.SampleConfig, settings))
    assert [Path(path).name for path in made["pictures"][2:]] == ["samples-S1.npz", "samples-S2.npz"]
    with np.load(tmp_path / "out" / "samples-S2.npz") as loaded:  # as guided-diffusion reads it
        assert loaded.files == ["arr_0"]
        pictures = loaded["arr_0"]
    assert (pictures.dtype, pictures.shape) == (np.uint8, (67, 8, 8, 3))
    last = pipe(1, 2, generator=[torch.Generator().manual_seed(66)], class_labels=0).images[0]
    assert np.abs(pictures[66].astype(int) - np.asarray(last).astype(int)).max() <= 1
    (tmp_path / "out" / "sample.json").unlink()
    for name in sample.WRITTEN[:2]:
        (tmp_path / "out" / name).unlink()
    with pytest.raises(ValueError, match=r"samples-S1\.npz exists: choose another output, or pass --overwrite"):
        sample.main(build(sample.SampleConfig, settings))


def test_a_demo_replaces_nothing_unasked(tmp_path, monkeypatch):
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(ValueError, match="is not empty: choose another output, or pass --overwrite"):
        demo.main(demo.DemoConfig(output=str(tmp_path)))
    commands = []
    monkeypatch.setattr(demo, "run", lambda command: commands.append(command) or 1.0)
    demo.main(demo.DemoConfig(output=str(tmp_path), overwrite=True))
    demo.main(demo.DemoConfig(output=str(tmp_path / "new")))
    assert len(commands) == 8
    assert (tmp_path / "thesis.txt").read_text() == "all of it"


def test_a_signal_to_the_demo_ends_what_it_started(tmp_path):
    child = (
        "import os, signal, sys, time; signal.signal(15, lambda *a: (open(sys.argv[1], 'w').close(), sys.exit(1)))\n"
    )
    child += "os.kill(os.getppid(), signal.SIGINT); time.sleep(99)"
    before = guard.signals.SIGNALS.catch(ready=True)
    try:
        with pytest.raises(guard.Ended, match="130"):
            demo.run([sys.executable, "-c", child, str(tmp_path / "ended")])
    finally:
        guard.signals.SIGNALS.__init__()
        for number, handler in before.items():
            signal.signal(number, handler)
    assert (tmp_path / "ended").exists()
    with pytest.raises(OSError, match=r"x\.py failed, see above"):
        demo.run([sys.executable, "-c", "raise SystemExit(3)", "x.py"])


def test_an_empty_folder_is_no_model(tmp_path):
    with pytest.raises(OSError, match="model_index.json"):
        sample.main(sample.SampleConfig(model=str(tmp_path), output=str(tmp_path / "pictures")))
    assert not (tmp_path / "pictures").exists()


def test_digits():
    images, labels = load("digits")
    assert sorted(set(labels.tolist())) == list(range(10))
    held_out, _ = load("digits", "test")
    assert images.shape == (1500, 1, 8, 8)
    assert held_out.shape == (297, 1, 8, 8)
    assert images.dtype == torch.uint8
    assert (images.min(), images.max()) == (0, 255)
    assert (to_model(images).min(), to_model(images).max()) == (-1, 1)
