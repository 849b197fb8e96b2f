"""What is committed of measurements: the tables are those of the JSON beside them."""

import json
from itertools import product
from pathlib import Path

import gallery
import pytest
import timing
import tokens
from measure import likelihood, reconstructions
from measure.comparison import tables as comparison
from measure.grid import tables as grid
from measure.grid.settings import PRESETS
from measure.inversion import tables as inversion
from measure.records import headline

ROOT = Path(__file__).parents[3]
RECORDS = sorted([*ROOT.glob("training/measured/*/*.json"), *ROOT.glob("model_cards/*/measured/*.json")])
TABLES = {
    "nll": ("nll.md", likelihood.table),
    "reconstruct": ("table2.md", reconstructions.table),
    "few_steps": ("few_steps.md", comparison.table),
    "inversion": ("inversion.md", inversion.table),
    "gallery": ("gallery.md", gallery.table),
    "results": ("table.md", grid.table),
    "speed": ("speed.md", timing.table),
    "tokens": ("tokens.md", lambda record: tokens.table(record["results"])),
}
"""Those of evaluate.py have the name of their folder where they were packaged."""


def read(path):
    return json.loads(path.read_text())


GRIDS = [path for path in RECORDS if "references" in read(path)]


def identify(path):
    return path.relative_to(ROOT).as_posix()


def test_there_are_some():
    assert {path.parent.relative_to(ROOT).as_posix() for path in GRIDS} == {
        "model_cards/class-mnist-28/measured",
        "model_cards/ddim-mnist-28/measured",
        "training/measured/mnist_small",
    }


@pytest.mark.parametrize("path", [path for path in RECORDS if path.stem != "fit"], ids=identify)
def test_tables_are_made_from_the_json(path):
    name, table = TABLES.get(path.stem, (f"{path.stem}.md", grid.table))
    assert (path.parent / name).read_text() == table(read(path))


@pytest.mark.parametrize("path", GRIDS, ids=identify)
def test_the_whole_grid_was_measured(path):
    """S × η × τ × w, all with as many images, against both splits."""
    result = read(path)
    assert result["status"] == "finished"
    config = result["config"]
    found = {
        (
            each["num_inference_steps"],
            "fixed_large" if each["variance_type"] == "fixed_large" else f"{each['eta']:g}",
            each["timestep_spacing"],
            each.get("guidance_scale"),
            each["dataset"]["split"],
        )
        for each in result["results"]
        if each["images"] == config["images"] and "split" in each["dataset"]
    }
    guidance = config.get("guidance") or (None,)
    assert found == set(product(config["steps"], config["variances"], config["spacings"], guidance, ("train", "test")))


def test_a_small_network_has_the_grid_of_table_1():
    config = read(ROOT / "training" / "measured" / "mnist_small" / "results.json")["config"]
    assert config["steps"] == list(PRESETS["table1"]["steps"])
    assert config["variances"] == list(PRESETS["table1"]["variances"])
    assert config["spacings"] == ["linear", "quadratic"]


PACKAGED = sorted(path.parent / "measured" for path in ROOT.glob("model_cards/*/results.json"))


def test_the_packages_have_records():
    assert len(PACKAGED) >= 2
    assert all(folder.is_dir() for folder in PACKAGED)


@pytest.mark.parametrize("folder", PACKAGED, ids=identify)
def test_the_headline_is_made_from_the_records(folder):
    """Those of version 0.1 too, whose commands are read from their settings."""
    table, commands = headline(folder.parent, folder.parent.relative_to(ROOT).as_posix())
    assert (folder / "headline.md").read_text() == table
    for line in commands.splitlines()[1:-1]:
        program, script, *_ = line.split()
        assert program == "ddim-plugin" or (ROOT / script).is_file()
