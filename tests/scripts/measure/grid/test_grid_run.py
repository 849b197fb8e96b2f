"""A run over a grid: what it writes, that a kill loses little, and that nothing is measured twice."""

import json
import random
import signal
import time

import evaluate
import numpy as np
import pytest
from cards.card import fits, made
from cards.records import read_records, read_results
from measure.grid import run, tables
from measure.parts import Parts, save_arrays
from measuring import values
from PIL import Image
from trainer.settings import build
from trials import Fork, ranks_of, script

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler
from ddim_plugin.hub.push import Model


def test_what_is_written(measure, tmp_path, places):
    result = measure(variances=("0", "0.5", "fixed_large"), spacings=("linear", "quadratic"), part=16, figures=True)
    output = tmp_path / "out"
    written = json.loads((output / "results.json").read_text())
    assert written == json.loads(json.dumps(result))
    model, records = Model(places["model"]), read_records(output)
    assert fits(records, model, places["model"])
    assert len(records.results) == len(result["results"])
    assert f"{result['results'][0]['value']:.4g}" in made(model, records, "ada/digits")
    entries = read_results(output / "results.json")
    assert len(entries) == 2 * 3 * 2 * 2  # S, variances, spacings, splits
    assert {entry["metric"] for entry in entries} == {"fd_classifier"}
    assert {entry["dataset"]["split"] for entry in entries} == {"train", "test"}
    assert all(entry["images"] == 40 and entry["seconds"] > 0 for entry in entries)
    assert [each["images"] for each in written["references"]] == [1500, 297]
    assert written["status"] == "finished"
    table = (output / "table.md").read_text()
    assert table == tables.table(written)
    assert table.count("| η = 0.5 |") == table.count("| σ̂ |") == 4
    for entry in entries:
        assert f"{entry['value']:.4g}" in table
    for name in ("quality", "time", "samples-S0002", "samples-S0003"):
        assert np.asarray(Image.open(output / f"{name}.png")).std() > 5
    assert sorted(path.name for path in output.iterdir() if path.is_dir()) == ["cells"]


def test_an_estimate_costs_little_and_leaves_nothing(measure, tmp_path, capsys):
    cost = measure(images=1000, steps=(10, 100), variances=("0", "1"), estimate=True)["estimate"]
    assert cost["evaluations"] == 1000 * 2 * (10 + 100)
    assert 0 < cost["hours"] < 1
    assert "4 cells, of which 0 are finished; for the others 220,000 evaluations" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_what_was_finished_is_not_measured_again(measure, drawn, monkeypatch, tmp_path):
    whole = measure("whole")
    assert sorted(drawn) == sorted([*range(40)] * 4)
    drawn.clear()
    with monkeypatch.context() as patch:
        extract, calls = run.extract, []

        def fail(extractors, pictures):
            calls.append(len(pictures))
            if len(calls) == 2 + 3 + 3 + 3:  # two of the estimate; the third cell's second part
                raise KeyboardInterrupt
            return extract(extractors, pictures)

        patch.setattr(run, "extract", fail)
        with pytest.raises(KeyboardInterrupt):
            measure(part=16)
    before = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (before["status"], len(before["cells"])) == ("running", 2)
    drawn.clear()
    again = measure(part=16)
    assert sorted(drawn) == sorted([*range(32, 40), *range(40)])  # two parts of the third cell were there
    assert values(again) == pytest.approx(values(whole), rel=1e-5)
    drawn.clear()
    assert measure(part=16, batch_size=9)["results"] == again["results"]
    assert drawn == []
    with pytest.raises(ValueError, match=r"holds results of other settings \(steps\).*--overwrite"):
        measure(steps=(2, 3, 4))
    wider = measure(steps=(2, 3, 4), overwrite=True)
    assert len(drawn) == 2 * 40
    assert values(wider)[: len(values(again))] == values(again)
    drawn.clear()
    measure(seed=1, steps=(2,), overwrite=True)
    assert len(drawn) == 2 * 40


def test_at_all_steps_the_spacings_are_one(measure, drawn, make_unet, tmp_path):
    model = str(tmp_path / "model")
    GeneralizedDDIMPipeline(
        make_unet(), GeneralizedDDIMScheduler(6, beta_schedule="squaredcos_cap_v2")
    ).save_pretrained(model)
    grid = {"model": model, "variances": ("0.5",), "spacings": ("linear", "quadratic", "leading")}
    result = measure(steps=(3, 6), **grid)
    assert sorted(drawn) == sorted([*range(40)] * (3 + 1))
    entries = [(e["num_inference_steps"], e["timestep_spacing"], e["value"]) for e in result["results"]]
    assert [spacing for S, spacing, _ in entries[::2] if S == 6] == ["linear", "quadratic", "leading"]
    assert len({value for S, _, value in entries[::2] if S == 6}) == 1
    assert len({value for S, _, value in entries[::2] if S == 3}) == 3
    assert "\n| GeneralizedDDIMScheduler, τ quadratic |" in (tmp_path / "out" / "table.md").read_text()
    drawn.clear()
    assert measure(steps=(3, 6), **grid)["results"] == result["results"]
    assert drawn == []


def test_damaged_files_of_a_cell(measure, drawn, tmp_path):
    """Each is a line that names the file before anything is drawn, and removing it measures that cell again."""
    settings = {"steps": (2,), "variances": ("0",)}
    whole, cells = measure(**settings), tmp_path / "out" / "cells"
    for kind, damage in (("safetensors", 40), ("json", 0), ("json", b"{}")):
        [file] = cells.glob(f"*.{kind}")
        file.write_bytes(file.read_bytes()[:damage] if isinstance(damage, int) else damage)
        drawn.clear()
        with pytest.raises(ValueError, match=rf"{file.name}.*: remove it, and start the same command again"):
            measure(**settings)
        file.unlink()
        assert drawn == []
        assert values(measure(**settings)) == values(whole)
        assert len(drawn) == 40


def test_a_damaged_part_of_a_cell(tmp_path):
    parts = Parts(tmp_path, 4, 2)
    for file in parts.files:
        save_arrays(file, {"a": np.zeros(2)}, {"seconds": 1})
    arrays, notes = parts.read()
    assert (arrays["a"].shape, notes) == ((4,), [{"seconds": 1}] * 2)
    for content in (b"", file.read_bytes()[:-1]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"cannot read {file} .*: remove it, and start the same command again"):
            parts.read()


def measuring(settings):
    evaluate.main(build(evaluate.EvaluateConfig, settings))


def parts(output):
    """How far a run is."""
    return len([*output.glob("parts/*/*.safetensors")]) + 1000 * len([*output.glob("cells/*.json")])


def test_a_run_killed_again_and_again(places, measure, tmp_path):
    """SIGKILL at random moments: the numbers and the pictures of the run that was not."""
    settings = {"images": 80, "steps": (5, 8), "variances": ("fixed_large",), "part": 20, "cache": None}
    whole = measure("whole", figures=True, **settings)
    killed = places | settings | {"reference": "digits", "batch_size": 16, "output": str(tmp_path / "killed")}
    rng = random.Random(0)
    for _ in range(2):
        before, child = parts(tmp_path / "killed"), Fork(measuring, killed)
        while parts(tmp_path / "killed") <= before:
            assert child.is_running()
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.1))
        child.signal(signal.SIGKILL)
        assert child.wait().returncode == -signal.SIGKILL
    done = Fork(measuring, killed).wait()
    assert done.returncode == 0, done.stdout + done.stderr
    again = json.loads((tmp_path / "killed" / "results.json").read_text())
    assert again["status"] == "finished"
    assert values(again) == pytest.approx(values(whole), rel=1e-9)
    for S in (5, 8):
        grids = [(tmp_path / name / f"samples-S{S:04d}.png").read_bytes() for name in ("whole", "killed")]
        assert grids[0] == grids[1]
    assert not list((tmp_path / "killed").rglob("*.part"))
    assert not (tmp_path / "killed" / "parts").exists()


def test_one_process_and_two_this_batch_and_that(places, measure, tmp_path):
    """The numbers are the same; a batch of another size may round the network's last bit otherwise."""
    settings = {"images": 90, "steps": (3, 5), "variances": ("0", "1"), "cache": None}
    one = measure("one", batch_size=32, **settings)
    other = measure("other", batch_size=50, part=60, **settings)
    flags = ["--model", places["model"], "--extractors", *places["extractors"], "--reference", "digits"]
    flags += [
        "--images",
        90,
        "--steps",
        3,
        5,
        "--variances",
        0,
        1,
        "--output",
        tmp_path / "two",
        "--part",
        20,
        "--batch_size",
        32,
    ]
    done = ranks_of(2, script, "training/evaluate.py", *flags)
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    assert two["processes"] == 2
    assert done.stdout.count("4 cells, of which 0 are finished") == 1
    assert values(two) == pytest.approx(values(one), rel=1e-9)
    assert values(other) == pytest.approx(values(one), rel=1e-5)
    tables = [(tmp_path / name / "table.md").read_text() for name in ("one", "other", "two")]
    assert tables[0] == tables[1] == tables[2]
