"""The pictures of the README, which one command draws from the committed model."""

import json
import shutil
from pathlib import Path

import gallery
import numpy as np
import pytest
import torch
from pictures.grids import grid
from pictures.strips import HELD_OUT, read_strip
from PIL import Image
from trainer.settings import build

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler

ROOT = Path(__file__).parents[3]
MODEL = ROOT / "model_cards" / "ddim-mnist-28"
GAP = 2  # pixels between pictures
PITCH = {
    "one-noise.png": (2 * gallery.TEXT, 0),
    "exact-inverse.png": (GAP, 3 * gallery.TEXT // 2),
    "paths.png": (GAP, 0),
}
"""Pixels above the first row, and of the text above each row."""

SHOWN, STEPS = 2, (2, 5, 10)
"""Columns and rows that are drawn again here: an image does not depend on the others."""

QUICK = {
    "columns": 3,
    "images": 3,
    "paths": 1,
    "points": 3,
    "steps": (1, 2),
    "inverse_steps": 2,
    "path_steps": 2,
    "refinement_steps": 1,
}


def opened(folder, name):
    with Image.open(folder / name) as picture:
        return np.asarray(picture.convert("RGB")).astype(np.int16)


@pytest.fixture(scope="module")
def again(tmp_path_factory):
    """The first columns, and the first path, as the command draws them from the committed folder alone."""
    output = tmp_path_factory.mktemp("gallery") / "again"
    settings = {"model": str(MODEL), "output": str(output), "columns": SHOWN, "steps": STEPS, "paths": 1}
    return output, gallery.main(build(gallery.GalleryConfig, settings))


@pytest.fixture(scope="module")
def committed():
    return json.loads((MODEL / "measured" / "gallery.json").read_text())


@pytest.mark.parametrize("name", PITCH)
def test_the_committed_pictures_are_those_of_the_command(again, name):
    """Pixel by pixel but for rounding, without the text, which has the mean of all columns."""
    old, new = opened(MODEL, name), opened(again[0], name)
    first, text = PITCH[name]
    all_columns, columns = (9, 9) if name == "paths.png" else (10, SHOWN)
    pitch = gallery.CELL + GAP
    old, new = (each[:, each.shape[1] - count * pitch :] for each, count in ((old, all_columns), (new, columns)))
    old = old[:, : new.shape[1]]
    rows = range(first + text, len(new), pitch + text)
    assert len(rows) == {"one-noise.png": 3, "exact-inverse.png": 5, "paths.png": 1}[name]
    for y in rows:
        difference = np.abs(old[y : y + gallery.CELL] - new[y : y + gallery.CELL])
        assert difference.shape == (gallery.CELL, columns * pitch, 3)
        assert difference.mean() < 0.5
        assert difference.max() < 40
    assert new.std() > 50


def test_the_errors_are_those_that_are_written_in_the_picture(again, committed):
    found, picture = again[1], opened(MODEL, "exact-inverse.png")
    assert committed["exact"]["mean_squared_error"] < 1e-3 * committed["plain"]["mean_squared_error"]
    assert found["plain"]["errors"] == pytest.approx(committed["plain"]["errors"][:SHOWN], rel=0.05)
    assert max(found["exact"]["errors"]) < 1e-5  # how far below depends on the processor
    _, text = PITCH["exact-inverse.png"]
    for kind, row in (("plain", 2), ("exact", 4)):
        errors = committed[kind]["errors"]
        assert np.mean(errors) == pytest.approx(committed[kind]["mean_squared_error"])

        def band(error, row=row, width=picture.shape[1]):
            """The text above a row."""
            blank = [np.zeros((10, 28, 28, 1))] * (row + 1)
            labels = [""] * row + [f"Ten times its error (mean square {error:.1e})"]
            drawn = np.asarray(grid(blank, labels, "", gallery.CELL, gallery.TEXT, above=True)).astype(np.int16)
            assert drawn.shape[1] == width
            return drawn[-text - gallery.CELL - GAP : -gallery.CELL - GAP]

        top = GAP + row * (text + gallery.CELL + GAP)
        right, wrong = (np.abs(picture[top : top + text] - band(each)).mean() for each in (np.mean(errors), 2.2e-5))
        assert right < 0.2 * wrong


def test_the_errors_are_those_of_the_pipeline(again):
    """By hand, and the error of the exact inverse is far below that of the plain one."""
    pipe = GeneralizedDDIMPipeline.from_pretrained(MODEL)
    settings = {"timestep_spacing": "linear", "fitted_solvers": None, "eta": 0.0}
    pipe.scheduler = GeneralizedDDIMScheduler.from_config(pipe.scheduler.config, **settings)
    pipe.set_progress_bar_config(disable=True)
    images = read_strip(MODEL / HELD_OUT, 1, (28, 28))
    assert len(images) == 12
    images = images[:1]
    z = pipe.encode(images, num_inference_steps=10, refinement_steps=None)
    error = (pipe.decode(z, num_inference_steps=10, output_type="pt") - images / 255).square().mean()
    assert again[1]["plain"]["errors"][0] == pytest.approx(float(error), rel=1e-3)
    assert again[1]["exact"]["errors"][0] < 1e-3 * error


def test_held_out_pictures_are_small_gray_and_kept(again):
    with Image.open(MODEL / HELD_OUT) as strip:
        assert (strip.size, strip.mode) == ((336, 28), "L")
    assert np.array_equal(opened(MODEL, HELD_OUT), opened(again[0], HELD_OUT))
    for name in gallery.PICTURES:
        assert (MODEL / name).stat().st_size < 300_000


def test_the_readme_shows_them():
    text = (ROOT / "README.md").read_text()
    for name in PITCH:
        assert f"](model_cards/ddim-mnist-28/{name})" in text


@pytest.fixture(scope="module")
def model(make_unet, tmp_path_factory):
    folder = tmp_path_factory.mktemp("small") / "model"
    GeneralizedDDIMPipeline(make_unet(), GeneralizedDDIMScheduler(eta=0.5)).save_pretrained(folder)
    return folder


def test_a_model_of_ones_own(model, tmp_path, monkeypatch, capsys):
    """The held-out images come from a data set, and then from the picture that it left."""
    monkeypatch.chdir(tmp_path)
    settings = {"model": str(model), "data": "digits", "output": "first"} | QUICK
    found = gallery.main(build(gallery.GalleryConfig, settings))
    labels = torch.tensor(
        gallery.open_labelled("digits", build(gallery.GalleryConfig, settings | {"split": "test"})).labels
    )
    assert labels[found["held_out"]].tolist() == [0, 1, 2]
    assert all(int((labels == label).nonzero()[0]) == i for label, i in enumerate(found["held_out"]))
    shutil.copy(tmp_path / "first" / HELD_OUT, model / HELD_OUT)
    second = gallery.main(build(gallery.GalleryConfig, settings | {"data": None, "output": "second"}))
    assert second["held_out"] is None
    assert second["plain"]["errors"] == found["plain"]["errors"]
    for name in gallery.PICTURES:
        assert np.array_equal(opened(tmp_path / "first", name), opened(tmp_path / "second", name))
    (model / HELD_OUT).unlink()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"data": None}, "has no held-out.png: pass the data set"),
        ({"columns": 4}, "4 columns and 1 paths need 4 images, not 3"),
        ({"points": 1}, "points 2 or more, not 1"),
        ({"paths": 0}, "paths must be positive, not 0"),
        ({"images": 1000}, "there are 297 held-out images, not 1000"),
    ],
)
def test_what_is_refused(model, tmp_path, changes, told):
    settings = {"model": str(model), "output": str(tmp_path / "out"), "data": "digits"} | QUICK | changes
    with pytest.raises(ValueError, match=told):
        gallery.main(build(gallery.GalleryConfig, settings))
    assert not (tmp_path / "out").exists()
