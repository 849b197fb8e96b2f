"""Batches: from memory, from disk and from streams."""

import itertools

import datasets
import numpy as np
import pytest
import torch
from painted import numbers, picture
from pictures import Feed, Frame, Order, Share, find_frame, in_memory, open_pictures, open_stream

CPU = torch.device("cpu")


def feed(pictures, frame=None, share=None, memory=True, flip=False, seed=0, workers=2):
    frame = frame or find_frame(pictures, None, None)
    images = in_memory(pictures, frame, True, 2, True) if memory else None
    return Feed(pictures, frame, share or Share(4, 1), seed, flip, workers, CPU, images)


def take(feed, count, step=0):
    return list(itertools.islice(feed.batches(step), count))


def test_mixed_sizes_need_a_resolution(tmp_path):
    for i, size in enumerate([(8, 8), (8, 8), (9, 8)]):
        picture(i, size).save(tmp_path / f"{i}.png")
    found = open_pictures(str(tmp_path))
    frame = find_frame(found, None, None)
    with pytest.raises(ValueError, match=r"differ in size: .*2\.png\) is 8×9, the first is 8×8 .*Pass --resolution"):
        in_memory(found, frame, False, 2, True)
    assert in_memory(found, frame, True, 2, True).shape == (3, 3, 8, 8)
    assert in_memory(found, Frame(3, (8, 8), crop="random"), True, 2, True) is None  # each is cropped by itself


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


def test_a_picture_that_cannot_be_read_ends_the_feed(tmp_path):
    for i in range(4):
        picture(i).save(tmp_path / f"{i}.png")
    found = open_pictures(str(tmp_path))
    (tmp_path / "2.png").write_bytes(b"gone bad")
    with pytest.raises(ValueError, match=r"cannot read .*2.png"):
        take(feed(found, Frame(3, (8, 8)), Share(4, 1), memory=False), 1)
