"""What is committed of measurements: the tables are those of the JSON beside them."""

import json
import sys
from pathlib import Path

import evaluate
import nll
import pytest
import reconstruct

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
import few_steps  # noqa: E402

FOLDERS = sorted([*(ROOT / "training" / "measured").iterdir(), *(ROOT / "model_cards").glob("*/measured")])
TABLES = {
    "results.json": ("table.md", evaluate.table),
    "nll.json": ("nll.md", nll.table),
    "reconstruct.json": ("table2.md", reconstruct.table),
    "few_steps.json": ("few_steps.md", few_steps.table),
}
each_folder = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.relative_to(ROOT).as_posix())


@each_folder
def test_tables_are_made_from_the_json(folder):
    there = [name for name in TABLES if (folder / name).is_file()]
    assert {"results.json", "nll.json"} <= set(there)
    for name in there:
        table, made_by = TABLES[name]
        assert (folder / table).read_text() == made_by(json.loads((folder / name).read_text()))


@each_folder
def test_the_whole_grid_was_measured(folder):
    """S × η × τ, all with as many images, against both splits."""
    result = json.loads((folder / "results.json").read_text())
    assert result["status"] == "finished"
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
        for spacing in result["config"]["spacings"]
        for split in ("train", "test")
    }
