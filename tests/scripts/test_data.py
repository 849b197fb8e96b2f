"""Data sets of every kind, and the batches made of them."""

import io
import itertools

import datasets
import numpy as np
import pytest
import torch
from pictures.sources import (
    Feed,
    Frame,
    Order,
    Share,
    find_frame,
    held_out,
    in_memory,
    open_pictures,
    open_stream,
    to_8_bits,
)
from PIL import Image

CPU = torch.device("cpu")


def picture(i, size=(8, 8), mode="RGB"):
    """A picture (width, height) that tells its number by its red, or its gray."""
    rng = np.random.default_rng(i)
    array = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    array[..., 0] = i
    return Image.fromarray(array).convert(mode) if mode != "L" else Image.fromarray(array[..., 0])


def numbers(batch):
    """Which pictures are in a batch."""
    return batch[:, 0].flatten(1).float().mean(1).round().int().tolist()


@pytest.fixture
def parquet(tmp_path):
    """40 pictures with the columns that CIFAR-10 has on the Hub, in two files."""
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["even", "odd"])})
    for part in range(2):
        rows = range(part * 20, part * 20 + 20)
        table = {"img": [picture(i) for i in rows], "label": [i % 2 for i in rows]}
        datasets.Dataset.from_dict(table, features).to_parquet(tmp_path / f"train-{part}.parquet")
    return tmp_path


def feed(pictures, frame=None, share=None, memory=True, flip=False, seed=0, workers=2):
    frame = frame or find_frame(pictures, None, None)
    images = in_memory(pictures, frame, True, 2, True) if memory else None
    return Feed(pictures, frame, share or Share(4, 1), seed, flip, workers, CPU, images)


def take(feed, count, step=0):
    return list(itertools.islice(feed.batches(step), count))


# ---- opening -------------------------------------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match="has no split 'test': its files are train-0.parquet, train-1.parquet"):
        open_pictures(str(parquet), "test")
    with pytest.raises(ValueError, match=r"has no split 'test', as it has no splits"):
        open_pictures(str(parquet / "train-0.parquet"), "test")
    (parquet / "train-1.parquet").rename(parquet / "test-0.parquet")
    assert numbers(held_out(open_pictures(str(parquet), "test"), Frame(3, (8, 8)), 3)[0]) == [20, 21, 22]
    assert open_pictures(str(parquet), "train").count == 20
    for name in ("train/0000.parquet", "test/0000.parquet", "mnist_train.parquet"):  # as on the Hub, and as at home
        (parquet / "other" / name).parent.mkdir(parents=True, exist_ok=True)
        (parquet / "other" / name).write_bytes((parquet / "train-0.parquet").read_bytes())
    assert open_pictures(str(parquet / "other"), "train").count == 40
    assert open_pictures(str(parquet / "other"), "test").count == 20


def test_pictures_beside_a_table_of_them(tmp_path):
    picture(0).save(tmp_path / "a.png")
    (tmp_path / "metadata.parquet").write_bytes(b"")
    assert open_pictures(str(tmp_path)).count == 1


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
        with pytest.raises(ValueError, match="there is no split 'test', only train"):
            open_pictures(str(name), "test")


def test_a_folder_with_a_subfolder_for_each_class(tmp_path):
    """Also one whose names read like splits, and files that are no pictures."""
    for i, name in enumerate(["test_cats/b.png", "test_cats/a.JPG", "train_dogs/deep/er/c.webp"]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("hello")
    found = open_pictures(str(tmp_path), labelled=True)
    assert found.classes == ("test_cats", "train_dogs")
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


# ---- frames --------------------------------------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match="x has transparency"):
        Frame(3, (8, 8)).canvas(picture(0, mode="RGBA"), "x")


def test_mixed_sizes_need_a_resolution(tmp_path):
    for i, size in enumerate([(8, 8), (8, 8), (9, 8)]):
        picture(i, size).save(tmp_path / f"{i}.png")
    found = open_pictures(str(tmp_path))
    frame = find_frame(found, None, None)
    with pytest.raises(ValueError, match=r"differ in size: number 2 is 8×9, the first 8×8 .*Say --resolution"):
        in_memory(found, frame, False, 2, True)
    assert in_memory(found, frame, True, 2, True).shape == (3, 3, 8, 8)
    assert in_memory(found, Frame(3, (8, 8), crop="random"), True, 2, True) is None  # each is cropped by itself


# ---- batches -------------------------------------------------------------------------------------------------------


def test_every_picture_once_an_epoch_from_any_step_on():
    order = Order(10, seed=3)
    first = np.concatenate([order(start, 4) for start in range(0, 20, 4)])
    assert sorted(first[:10]) == sorted(first[10:]) == list(range(10))
    assert first[:10].tolist() != first[10:].tolist()
    assert Order(10, seed=3)(8, 8).tolist() == first[8:16].tolist()
    assert Order(10, seed=4)(0, 10).tolist() != first[:10].tolist()
    assert sorted(Order(3, 0)(0, 9)) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("memory", [True, False])
def test_batches_do_not_depend_on_processes_workers_or_where_they_begin(parquet, memory):
    found = open_pictures(str(parquet), labelled=True)
    frame = Frame(3, (6, 6), crop="random", resize=8)
    whole = take(feed(found, frame, Share(8, 1), memory, flip=True), 12)
    seen = [number for images, _ in whole[:5] for number in numbers(images)]
    assert sorted(seen) == list(range(40))
    for images, labels in whole:
        assert images.shape == (8, 3, 6, 6)
        assert images.dtype == torch.uint8
        assert labels.tolist() == [number % 2 for number in numbers(images)]
    other = take(feed(found, frame, Share(8, 1), not memory, flip=True, workers=0), 3, step=9)
    for (images, _), (again, _) in zip(whole[9:], other, strict=True):
        assert torch.equal(images, again)
    shares = [take(feed(found, frame, Share(2, 2, rank, 2), memory, flip=True), 24) for rank in range(2)]
    for step, (images, _) in enumerate(whole):
        parts = [shares[rank][2 * step + part][0] for part in range(2) for rank in range(2)]
        assert torch.equal(torch.cat(parts), images)
    flipped = take(feed(found, frame, Share(8, 1), memory), 12)
    turned = [
        not torch.equal(a, b)
        for (images, _), (plain, _) in zip(whole, flipped, strict=True)
        for a, b in zip(images, plain, strict=True)
    ]
    assert 25 < sum(turned) < 71
    assert all(torch.equal(b, a) or torch.equal(b.flip(-1), a) for a, b in zip(whole[3][0], flipped[3][0], strict=True))


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_streams(parquet, kind, streams_end_at_once):
    name = parquet
    if kind == "saved":
        name = parquet / "saved"
        datasets.load_dataset("parquet", data_files=str(parquet / "*.parquet"), split="train").save_to_disk(name)
    stream = open_stream(str(name), labelled=True)
    assert stream.classes == ("even", "odd")
    frame = find_frame(stream, None, (8, 8))
    whole = take(feed(stream, frame, Share(4, 1), memory=False), 20)
    epochs = [[number for images, _ in whole[half : half + 10] for number in numbers(images)] for half in (0, 10)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(40))
    assert epochs[0] != epochs[1] != list(range(40))
    assert all(labels.tolist() == [number % 2 for number in numbers(images)] for images, labels in whole)
    again = take(feed(stream, frame, Share(4, 1), memory=False, workers=1), 7, step=13)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(whole[13:], again, strict=True))
    halves = [take(feed(stream, frame, Share(2, 1, rank, 2), memory=False), 10) for rank in range(2)]
    seen = [[number for images, _ in half[:8] for number in numbers(images)] for half in halves]
    assert len({*seen[0], *seen[1]}) == 32


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


def test_a_picture_that_cannot_be_read_ends_the_feed(tmp_path):
    for i in range(4):
        picture(i).save(tmp_path / f"{i}.png")
    found = open_pictures(str(tmp_path))
    (tmp_path / "2.png").write_bytes(b"gone bad")
    with pytest.raises(ValueError, match=r"cannot read .*2.png"):
        take(feed(found, Frame(3, (8, 8)), Share(4, 1), memory=False), 1)
