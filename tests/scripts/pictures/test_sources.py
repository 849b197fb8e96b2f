"""Data sets of every kind, read by number or as streams."""

import io

import datasets
import numpy as np
import pytest
from painted import numbers, picture
from pictures import Frame, find_frame, held_out, open_pictures, open_stream, to_8_bits
from PIL import Image


@pytest.mark.parametrize("how", ["folder", "pattern", "file"])
def test_parquet_files(parquet, how):
    name = {"folder": parquet, "pattern": parquet / "train-*.parquet", "file": parquet / "train-0.parquet"}[how]
    found = open_pictures(str(name), labelled=True)
    assert found.count == (20 if how == "file" else 40)
    assert found.classes == ("even", "odd")
    assert found.labels[:4].tolist() == [0, 1, 0, 1]
    assert np.array_equal(np.asarray(found.picture(7)), np.asarray(picture(7)))
    assert open_pictures(str(name)).labels is None


def test_splits_of_a_folder_of_files(parquet):
    with pytest.raises(ValueError, match="has no split 'test': it has train"):
        open_pictures(str(parquet), "test")
    with pytest.raises(ValueError, match="has no split 'test': it has train"):
        open_pictures(str(parquet / "train-0.parquet"), "test")
    (parquet / "train-1.parquet").rename(parquet / "test-0.parquet")
    assert numbers(held_out(open_pictures(str(parquet), "test"), Frame(3, (8, 8)), 3)[0]) == [20, 21, 22]
    assert open_pictures(str(parquet), "train").count == 20
    for name in ("train/0000.parquet", "test/0000.parquet", "mnist_train.parquet"):  # as on the Hub, and as at home
        (parquet / "other" / name).parent.mkdir(parents=True, exist_ok=True)
        (parquet / "other" / name).write_bytes((parquet / "train-0.parquet").read_bytes())
    assert open_pictures(str(parquet / "other"), "train").count == 40
    assert open_pictures(str(parquet / "other"), "test").count == 20


@pytest.mark.parametrize("kind", ["arrow", "saved", "saved splits"])
def test_arrow_files(tmp_path, kind):
    rows = datasets.Dataset.from_dict({"image": [picture(i) for i in range(5)]}).cast_column("image", datasets.Image())
    if kind == "arrow":
        rows.save_to_disk(tmp_path / "saved")
        name = next((tmp_path / "saved").glob("*.arrow"))
    else:
        name = tmp_path / "saved"
        (rows if kind == "saved" else datasets.DatasetDict(train=rows)).save_to_disk(name)
    found = open_pictures(str(name))
    assert found.count == 5
    assert np.array_equal(np.asarray(found.picture(3)), np.asarray(picture(3)))
    if kind == "saved splits":
        with pytest.raises(ValueError, match="has no split 'test': it has train"):
            open_pictures(str(name), "test")


def test_a_folder_with_a_subfolder_for_each_class(tmp_path):
    """At any depth, beside files that are no pictures."""
    for i, name in enumerate(["cats/b.png", "cats/a.JPG", "dogs/deep/er/c.webp"]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("hello")
    found = open_pictures(str(tmp_path), labelled=True)
    assert found.classes == ("cats", "dogs")
    assert found.labels.tolist() == [0, 0, 1]
    assert np.abs(np.asarray(found.picture(1), dtype=int)[..., 0].mean() - 0) < 5
    picture(3).save(tmp_path / "loose.png")
    with pytest.raises(ValueError, match=r"loose.png has no label"):
        open_pictures(str(tmp_path), labelled=True)
    assert open_pictures(str(tmp_path)).count == 4


def test_columns_by_name_and_labels_of_other_types(tmp_path):
    def png(i):
        file = io.BytesIO()
        picture(i).save(file, "PNG")
        return file.getvalue()

    table = {
        "first": [{"bytes": png(i), "path": None} for i in range(4)],
        "second": [{"bytes": png(i + 10), "path": None} for i in range(4)],
        "kind": ["owl", "fox", "owl", "emu"],
        "code": [7, 7, 9, 11],
        "both": [[0, 1]] * 4,
    }
    datasets.Dataset.from_dict(table).to_parquet(tmp_path / "a.parquet")
    name = str(tmp_path / "a.parquet")
    assert np.asarray(open_pictures(name).picture(1))[0, 0, 0] == 1
    found = open_pictures(name, image_column="second", label_column="kind", labelled=True)
    assert np.asarray(found.picture(1))[0, 0, 0] == 11
    assert (found.labels.tolist(), found.classes) == ([2, 1, 2, 0], ("emu", "fox", "owl"))
    found = open_pictures(name, label_column="code", labelled=True)
    assert (found.labels.tolist(), found.classes) == ([0, 0, 1, 2], ("7", "9", "11"))
    for settings, message in (
        ({"image_column": "third"}, "has no column 'third': its columns are first, second, kind"),
        ({"labelled": True}, "has no column of labels for class-conditional training: its columns are first"),
        ({"labelled": True, "label_column": "x"}, "has no column 'x'"),
        ({"labelled": True, "label_column": "both"}, "the column 'both' of .* holds no labels"),
    ):
        with pytest.raises(ValueError, match=message):
            open_pictures(name, **settings)


def test_a_split_without_labels(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = datasets.Dataset.from_dict({"image": [picture(0)], "label": [-1]}, features)
    rows.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="has no labels: 'label' is -1"):
        open_pictures(str(tmp_path / "a.parquet"), labelled=True)


def test_pictures_are_turned_upright(tmp_path):
    """As their EXIF says, from files and from rows."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° clockwise
    picture(3, (8, 4)).save(tmp_path / "a.png", exif=exif)
    upright = np.rot90(np.asarray(picture(3, (8, 4))), -1)
    features = datasets.Features({"image": datasets.Image()})
    data = (tmp_path / "a.png").read_bytes()
    datasets.Dataset.from_dict({"image": [{"bytes": data, "path": None}]}, features).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "only").mkdir()
    (tmp_path / "a.png").rename(tmp_path / "only" / "a.png")
    for name in (tmp_path / "only", tmp_path / "a.parquet"):
        assert np.array_equal(np.asarray(open_pictures(str(name)).first()), upright)
    assert np.array_equal(np.asarray(open_stream(str(tmp_path / "a.parquet")).first()), upright)


def test_names_of_folders_and_files_are_taken_to_the_letter(tmp_path):
    """Patterns and letter case change nothing in a folder of images."""
    for i, name in enumerate(["B/[1].png", "a b/ .png", "a/__x.PNG", "a-b/*.png"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture(i).save(tmp_path / name)
    found = open_pictures(str(tmp_path), labelled=True)
    assert sorted(np.asarray(found.picture(i))[0, 0, 0] for i in range(found.count)) == [0, 1, 2, 3]
    assert found.classes == ("B", "a", "a b", "a-b")


def test_columns_that_hold_no_images(parquet, tmp_path):
    with pytest.raises(ValueError, match="the column 'label' of .* holds no images"):
        open_pictures(str(parquet / "train-0.parquet"), image_column="label")
    (tmp_path / "only").mkdir()
    picture(0).save(tmp_path / "only" / "a.png")
    with pytest.raises(ValueError, match="has no column 'img': its columns are image"):
        open_pictures(str(tmp_path / "only"), image_column="img")
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": [None]}, features).to_parquet(tmp_path / "none.parquet")
    for opened in (open_pictures, open_stream):
        with pytest.raises(ValueError, match="cannot read .*: its row holds no image"):
            opened(str(tmp_path / "none.parquet")).first()


def test_sixteen_bits(tmp_path):
    values = np.linspace(0, 65535, 64).reshape(8, 8).round().astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    found = open_pictures(str(tmp_path))
    frame = find_frame(found, None, None)
    assert frame.channels == 1
    assert np.array_equal(frame.canvas(found.picture(0), "x")[0], np.round(values / 257).astype(np.uint8))
    for array in (np.full((2, 2), -1, np.int32), np.full((2, 2), 70000, np.int32), np.zeros((2, 2), np.float32)):
        with pytest.raises(ValueError, match="x has mode .*pictures have 8 or 16 bits"):
            to_8_bits(Image.fromarray(array), "x")


@pytest.mark.parametrize("kind", ["empty", "missing", "text", "damaged", "no images", "mixed"])
def test_sets_that_cannot_be_read(tmp_path, kind):
    name = tmp_path / "set"
    if kind in ("empty", "damaged"):
        name.mkdir()
    if kind == "damaged":
        (name / "a.png").write_bytes(b"not a picture")
        with pytest.raises(ValueError, match="cannot read .*a.png"):
            open_pictures(str(name)).first()
        return
    if kind == "text":
        name = tmp_path / "a.txt"
        name.write_text("hello")
    if kind == "no images":
        name = tmp_path / "a.parquet"
        datasets.Dataset.from_dict({"x": [1]}).to_parquet(name)
    if kind == "mixed":
        for suffix in ("parquet", "arrow"):
            (tmp_path / f"a.{suffix}").write_text("x")
        name = tmp_path / "a.*"
    message = {
        "empty": "there is no image in .*: it needs files such as",
        "missing": "there is no file",
        "text": "is no data set",
        "no images": "has no column of images: its columns are x",
        "mixed": "is no data set",
    }[kind]
    with pytest.raises(ValueError, match=message):
        open_pictures(str(name))


def test_a_hub_that_cannot_be_reached(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="cannot read the data set nobody/nothing"):
        open_pictures("nobody/nothing")


def test_streams_that_cannot_be(parquet, tmp_path):
    with pytest.raises(ValueError, match="is read by number, not as a stream"):
        open_stream("digits")
    with pytest.raises(ValueError, match="has no column 'x'"):
        open_stream(str(parquet), image_column="x")
    (tmp_path / "plain").mkdir()
    datasets.Dataset.from_dict({"image": [picture(0)], "label": [3]}).cast_column("image", datasets.Image()).to_parquet(
        tmp_path / "plain" / "a.parquet"
    )
    with pytest.raises(ValueError, match="does not say how many classes 'label' has"):
        open_stream(str(tmp_path / "plain"), labelled=True)
