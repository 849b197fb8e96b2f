"""What is committed under training/measured: the tables are those of the JSON beside them."""

import json
from pathlib import Path

import evaluate
import nll
import pytest

FOLDERS = sorted((Path(__file__).parents[2] / "training" / "measured").iterdir())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_tables_are_made_from_the_json(folder):
    result = json.loads((folder / "results.json").read_text())
    assert result["status"] == "finished"
    assert (folder / "table.md").read_text() == evaluate.table(result)
    assert (folder / "nll.md").read_text() == nll.table(json.loads((folder / "nll.json").read_text()))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_whole_grid_was_measured(folder):
    """S × η × τ, all with as many images, against both splits."""
    result = json.loads((folder / "results.json").read_text())
    found = {
        (
            each["num_inference_steps"],
            each["eta"],
            each["variance_type"],
            each["timestep_spacing"],
            each["dataset"]["split"],
        )
        for each in result["results"]
        if each["images"] == result["config"]["images"]
    }
    noise = [
        (0.0, "fixed_small"),
        (0.2, "fixed_small"),
        (0.5, "fixed_small"),
        (1.0, "fixed_small"),
        (None, "fixed_large"),
    ]
    assert found == {
        (S, *kind, spacing, split)
        for S in (10, 20, 50, 100, 1000)
        for kind in noise
        for spacing in ("linear", "quadratic")
        for split in ("train", "test")
    }
