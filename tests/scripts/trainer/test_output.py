"""The output folder of a run: its files, what is replaced and kept, room on the disk."""

import json
import math
import os
import re
import shutil
from pathlib import Path

import guard
import numpy as np
import pytest
from accelerate import Accelerator
from cards.records import public
from diffusers import UNet2DModel
from PIL import Image
from trainer import loop as loop_
from trainer import output as output_
from trainer import report as report_
from trainer.loop import Loop
from trainer.report import read_log
from training_runs import SMALL, WEIGHTS, fit
from trials import Fork, two

from ddim_plugin.hub.card import is_written_here


def test_what_a_run_leaves(tmp_path):
    output = tmp_path / "run"
    result = fit(output, trackers=["tensorboard"], preview_every=3, preview_images=2, preview_steps=2)
    record = json.loads((output / "training.json").read_text())
    assert record == json.loads(json.dumps(public(result)))
    assert is_written_here((output / "README.md").read_text())
    assert (output / "samples.png").read_bytes() == (output / "previews" / "step-00000006.png").read_bytes()
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
    monkeypatch.setattr(Loop, "__call__", lambda loop: 1 / 0)
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


def test_another_run_is_not_overwritten(tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    fit(output, steps=1)  # an empty folder is free
    with pytest.raises(ValueError, match="holds another run: choose another folder, continue it by --resume latest"):
        fit(output)


def test_output_and_data_lie_apart(tmp_path):
    (tmp_path / "set").mkdir()
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(tmp_path / "set" / "a.png")
    for output in (tmp_path / "set" / "run", tmp_path, tmp_path / "set"):
        with pytest.raises(ValueError, match="lie in one another: keep them apart"):
            fit(output, data=str(tmp_path / "set"), overwrite=True)
    assert [each.name for each in (tmp_path / "set").iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    "settings", [{"data": "digits"}, {"data": "digits", "eval_data": "digits", "eval_split": "test"}]
)
def test_a_folder_of_the_name_of_a_data_set_is_no_data_set(tmp_path, monkeypatch, settings):
    monkeypatch.chdir(tmp_path)
    fit("digits", steps=1, **settings)
    assert fit("digits", steps=1, overwrite=True, **settings)["status"] == "finished"


def test_output_and_held_out_pictures_lie_apart(tmp_path):
    (tmp_path / "set").mkdir()
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(tmp_path / "set" / "a.png")
    with pytest.raises(ValueError, match="the output .* and the data .* lie in one another"):
        fit(tmp_path / "set" / "run", eval_every=1, eval_data=str(tmp_path / "set"))


@pytest.mark.parametrize("settings", [{"resume": "latest"}, {"overwrite": True}, {"resume": "latest", "steps": 9}])
def test_a_live_run_has_its_folder_alone(tmp_path, settings):
    fit(tmp_path / "run", steps=1)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    refused = pytest.raises(ValueError, match=rf"is in use by process {os.getpid()} on \S+: wait for its end")
    with guard.owned(tmp_path / "run"), refused:
        fit(tmp_path / "run", **settings)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_two_runs_at_once(tmp_path):
    """Of two processes that start in one folder one trains, and the other is refused."""
    done = Fork(two, SMALL | {"output": str(tmp_path / "run"), "steps": 20}, 1, 3).wait()
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "{'in use': 1}"


@pytest.mark.parametrize("last", ["unet", "model_index.json", "training.json"])
def test_a_run_is_finished_when_its_model_is_in_place(tmp_path, monkeypatch, last):
    """A kill just before each of the renames that put the pipeline in place."""
    output, replace = tmp_path / "run", Path.replace

    def killed(path, target):
        if path.name == last and path.parent.name == "pipeline.part":
            raise KeyboardInterrupt
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            fit(output)
    assert json.loads((output / "training.json").read_text())["status"] == "running"
    assert (output / "model_index.json").exists() is (last == "training.json")
    assert fit(output, resume="latest")["status"] == "finished"
    assert json.loads((output / "training.json").read_text())["status"] == "finished"


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_files_have_the_mode_of_new_files(tmp_path, mask):
    before = os.umask(mask)
    try:
        fit(tmp_path / "run", preview_every=6, preview_images=1, preview_steps=1)
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len([path for path in files if path.suffix == ".safetensors"]) == 6
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in files} == {
        path.name: oct(0o666 & ~mask) for path in files
    }


class FullBar(report_.tqdm):
    """A progress bar of its own, not that of reading pictures."""


def full(*arguments, **settings):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("place", "name", "warning"),
    [
        (output_, "plot_loss", "warning: the loss is not plotted"),
        (report_.Log, "_append", r"warning: \S+log.jsonl has no line for step 1 yet \(OSError: .*No space"),
        (loop_, "preview", "warning: no preview at step 3"),
        (Accelerator, "log", "warning: no tracker has step 1"),
        (FullBar, "update", None),
        (FullBar, "set_postfix", None),
    ],
)
def test_a_run_does_without_what_it_can_do_without(tmp_path, monkeypatch, capsys, place, name, warning):
    monkeypatch.setattr(report_, "tqdm", FullBar)
    monkeypatch.setattr(place, name, full)
    assert fit(tmp_path / "run", preview_every=3, preview_images=1, preview_steps=1)["loss"] > 0
    assert json.loads((tmp_path / "run" / "training.json").read_text())["status"] == "finished"
    assert warning is None or len(re.findall(warning, capsys.readouterr().err)) == 1


def test_previews_that_are_not_finite_are_not_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(UNet2DModel, "forward", nan_in_eval(UNet2DModel.forward))
    assert fit(tmp_path / "run", preview_every=3, preview_images=2, preview_steps=1)["status"] == "finished"
    assert not (tmp_path / "run" / "previews").exists()
    assert "no preview at step 6" in capsys.readouterr().err
    found = [line["step"] for line in read_log(tmp_path / "run" / "log.jsonl") if "no_preview" in line]
    assert found == [3, 6]


def nan_in_eval(forward):
    def call(unet, *arguments, **settings):
        made = forward(unet, *arguments, **settings)
        return (
            made
            if unet.training
            else tuple(each * math.nan for each in made.to_tuple())
            if isinstance(settings.get("return_dict"), bool)
            else type(made)(made.sample * math.nan)
        )

    return call


def test_a_disk_without_room(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(OSError, match="MB free; the run needs"):
        fit(tmp_path / "run")
    assert not (tmp_path / "run").exists()
