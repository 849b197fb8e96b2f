"""Frames, and the first images of a set for a network."""

import datasets
import numpy as np
import pytest
import torch
from painted import picture
from pictures import Frame, load, load_images
from PIL import Image


def test_frames():
    wide = picture(3, (30, 20))
    assert Frame(3, (8, 8)).canvas(wide, "x").shape == (3, 8, 8)
    assert Frame(1, (8, 12)).canvas(wide, "x").shape == (1, 8, 12)
    assert Frame(3, (8, 8), resize=10).canvas(wide, "x").shape == (3, 8, 8)
    assert Frame(3, (8, 8), crop="random").canvas(wide, "x").shape == (3, 8, 12)
    assert Frame(3, (8, 8), resize=10, crop="random").canvas(wide, "x").shape == (3, 10, 15)
    same = Frame(3, (20, 30)).canvas(wide, "x")
    assert np.array_equal(same, np.asarray(wide).transpose(2, 0, 1))
    canvas = np.arange(20).reshape(1, 4, 5)
    frame = Frame(1, (2, 2), crop="random")
    assert frame.cut(canvas, (0, 0)).tolist() == [[[0, 1], [5, 6]]]
    assert frame.cut(canvas, (0.999, 0.999)).tolist() == [[[13, 14], [18, 19]]]
    opaque = picture(3, (30, 20), mode="RGBA")
    assert np.array_equal(Frame(3, (20, 30)).canvas(opaque, "x"), same)
    opaque.putpixel((0, 0), (1, 2, 3, 254))
    with pytest.raises(ValueError, match="x has transparency"):
        Frame(3, (8, 8)).canvas(opaque, "x")


# ---- image sets ------------------------------------------------------------------------------------------------

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for i, pixels in enumerate(PIXELS):
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def test_a_folder(folder):
    images = load_images(str(folder), None, 3, (8, 8), 2)
    assert np.array_equal(images.permute(0, 2, 3, 1), PIXELS[:2])
    assert load_images(str(folder), "train", 1, (4, 6), 9).shape == (3, 1, 4, 6)


def test_names_of_pictures_are_splits_if_all_of_them_are(tmp_path):
    """One picture that happens to be called "test" hides no other; a folder called like an image is none."""
    for name, pixels in zip(("train_0", "test_1", "val"), PIXELS, strict=True):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    (tmp_path / "d.png").mkdir()
    images = load_images(str(tmp_path), "val", 3, (8, 8), 9)
    assert np.array_equal(images.permute(0, 2, 3, 1), PIXELS[2:])
    (tmp_path / "val.png").rename(tmp_path / "cat.png")
    assert len(load_images(str(tmp_path), None, 3, (8, 8), 9)) == 3


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_file(tmp_path, kind):
    rows = {"label": [0, 1, 2], "img": [Image.fromarray(pixels) for pixels in PIXELS]}
    features = datasets.Features({"label": datasets.Value("int64"), "img": datasets.Image()})
    table = datasets.Dataset.from_dict(rows, features=features)
    if kind == "parquet":
        path = tmp_path / "rows.parquet"
        table.to_parquet(path)
    else:
        table.save_to_disk(tmp_path / "rows")
        path = next((tmp_path / "rows").glob("*.arrow"))
    images = load_images(str(path), None, 3, (8, 8), 10)
    assert np.array_equal(images.permute(0, 2, 3, 1), PIXELS)


def test_a_folder_of_files_with_splits(tmp_path):
    for split, rows in (("train", PIXELS[:1]), ("test", PIXELS[1:])):
        made = datasets.Dataset.from_dict({"img": [Image.fromarray(pixels) for pixels in rows]})
        made.to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    images = load_images(str(tmp_path), "test", 3, (8, 8), 10)
    assert np.array_equal(images.permute(0, 2, 3, 1), PIXELS[1:])


def test_digits_fit_any_network():
    assert torch.equal(load_images("digits", "test", 1, (8, 8), 5), load("digits", "test")[0][:5])
    assert load_images("digits", "test", 3, (16, 16), 5).shape == (5, 3, 16, 16)


def test_what_is_no_image_set(tmp_path, folder):
    (tmp_path / "notes.txt").write_text("none")
    (tmp_path / "broken.parquet").write_text("none")
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "text.parquet")
    for name, message in (
        ("notes.txt", "is no data set: use a folder of images"),
        ("broken.parquet", "cannot read the data set"),
        ("text.parquet", "has no column of images: its columns are text"),
    ):
        with pytest.raises(ValueError, match=message):
            load_images(str(tmp_path / name), None, 3, None, 1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="there is no image in"):
        load_images(str(tmp_path / "empty"), None, 3, None, 1)
    with pytest.raises(ValueError, match="the network takes 4 channels: pictures have 1 or 3"):
        load_images(str(folder), None, 4, None, 1)
