"""The output folder of a run: its files, what is replaced and kept, room on the disk."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from trainer.loop import Loop
from trainer.report import read_log
from training_runs import WEIGHTS, fit


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


def test_a_disk_without_room(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(OSError, match="MB free; the run needs"):
        fit(tmp_path / "run")
    assert not (tmp_path / "run").exists()
