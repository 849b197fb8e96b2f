"""Checkpoints: resuming, damaged ones, disks that fail."""

import json
import resource
import shutil

import datasets
import numpy as np
import pytest
from pictures import load
from PIL import Image
from trainer import checkpoints as checkpoints_
from trainer.report import Log, read_log
from training_runs import UNET, WEIGHTS, fit, forget_accelerate, losses, same_weights
from trials import Fork


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
    with pytest.raises(ValueError, match="is finished, and has no checkpoint to continue from"):
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


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    fit(folder)
    forget_accelerate()
    return folder


@pytest.mark.parametrize("how", ["cut", "changed", "missing", "no manifest", "half a manifest"])
def test_a_damaged_checkpoint_is_recognised(trained, tmp_path, how, capsys):
    output = tmp_path / "run"
    shutil.copytree(trained, output)
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

    real = checkpoints_.seal
    monkeypatch.setattr(checkpoints_, "seal", lambda folder, step: full() if step > 3 else real(folder, step))
    assert fit(output)["status"] == "finished"
    assert [each.name for each in (output / "checkpoints").iterdir()] == ["step-00000003"]
    assert "no checkpoint at step 6 (OSError: [Errno 28] No space left on device); the last is of step 3" in (
        capsys.readouterr().err
    )


def with_small_files(output):
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
    fit(output)


def test_writes_that_fail_in_a_real_process(tmp_path):
    """A limit on the size of files: the run goes on without checkpoints, and says why it cannot save the pipeline."""
    done = Fork(with_small_files, tmp_path / "run").wait()
    assert "no checkpoint at step 3" in done.stderr, done.stderr
    assert list((tmp_path / "run" / "checkpoints").glob("*")) == []
    assert "OSError: cannot save the pipeline" in done.stderr
    assert "Make room, and continue with --resume latest" in done.stderr
    assert not (tmp_path / "run" / "model_index.json").exists()
    assert not (tmp_path / "run" / "pipeline.part").exists()
    assert [line["step"] for line in read_log(tmp_path / "run" / "log.jsonl") if "no_checkpoint" in line] == [3, 6]


def changed(folder, **entries):
    """Change entries of `run.json` in a checkpoint, or remove those that are None, and seal it again."""
    state = json.loads((folder / "run.json").read_text()) | entries
    kept = {key: value for key, value in state.items() if value is not None}
    (folder / "run.json").write_text(json.dumps(kept))
    (folder / "manifest.json").unlink()
    checkpoints_.seal(folder, state["step"] or 3)


def test_checkpoints_of_other_versions(tmp_path, capsys):
    output = tmp_path / "run"
    fit(output, steps=3)
    folder = output / "checkpoints" / "step-00000003"
    before = json.loads((folder / "run.json").read_text())
    settings = before["config"]
    old = {key: value for key, value in settings.items() if key not in ("init_from", "times", "loss_eta")}
    for resume, (entries, message) in zip(
        ["latest", str(folder)] * 5,
        (
            (
                {"format": 99},
                "has format 99, and this version reads formats up to 1: upgrade ddim-plugin, or start a new",
            ),
            ({"format": True}, "run.json has True for format, and needs a whole number"),
            ({"step": "4"}, "run.json has '4' for step, and needs a whole number"),
            ({"step": -3}, "run.json has -3 for step, and needs a whole number"),
            ({"processes": 0}, "run.json has 0 for processes, and needs a whole number"),
            ({"config": [1]}, r"run.json has \[1\] for config, and needs an object"),
            ({"config": settings | {"batch_size": "8"}}, "run.json has '8' for batch_size in its config, and needs"),
            (
                {"config": settings | {"lucky_number": 7}},
                "has settings that this version does not know: lucky_number. Up",
            ),
            ({"data": None, "config": None}, "run.json has no data, config: pass another checkpoint"),
            ({"config": old | {"loss": "min_snr"}}, "with another loss: it was 'min_snr', now 'simple'"),
        ),
        strict=True,
    ):
        changed(folder, **entries)
        with pytest.raises(ValueError, match=message):
            fit(output, resume=resume, steps=4)
        changed(folder, **before)
    for name in ("format", "seen", "unet", "scheduler"):
        changed(folder, **{name: None})  # as version 0.1 wrote it
    changed(folder, config=old)
    assert fit(output, resume="latest", steps=4)["pictures_seen"] == 32
    printed = capsys.readouterr().out
    assert "does not have the settings loss_eta, times, so it had their defaults" in printed
    changed(folder, config=old)
    with pytest.raises(ValueError, match="with another times: it was 'antithetic', now 'uniform'"):
        fit(output, resume=str(folder), steps=4, times="uniform")


def test_the_record_counts_the_pictures_that_were_seen(tmp_path):
    """With other batch sizes on the way, and reports that are rarer than checkpoints."""
    output = tmp_path / "run"
    fit(output, steps=2, batch_size=4, log_every=50, checkpoint_every=1)
    fit(output, resume="latest", steps=5, log_every=50, checkpoint_every=3)
    result = fit(output, resume="latest", steps=7, batch_size=16, gradient_accumulation_steps=2)
    assert result["pictures_seen"] == 2 * 4 + 3 * 8 + 2 * 16
    assert sum(line["images"] for line in read_log(output / "log.jsonl") if "images" in line) == 64
    assert json.loads((output / "training.json").read_text())["pictures_seen"] == 64


def test_a_disk_that_is_full_for_checkpoints_and_log_at_once(tmp_path, monkeypatch, capsys):
    def full(*arguments, **settings):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints_, "seal", full)
        patch.setattr(Log, "_append", full)
        assert fit(tmp_path / "run")["status"] == "finished"
    error = capsys.readouterr().err
    for step in (3, 6):
        assert (
            f"no checkpoint at step {step} (OSError: [Errno 28] No space left on device); there is none before, in "
            in (error)
        )
    assert str(tmp_path / "run" / "checkpoints") in error


def test_resuming_before_the_first_checkpoint_begins_the_run(tmp_path, capsys):
    fit(tmp_path / "run", resume="latest")
    assert "has no checkpoint yet: starting at step 0" in capsys.readouterr().out
