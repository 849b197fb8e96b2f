"""Data sets of pictures, read by number or as a stream: digits, folders, files, and data sets of the Hub."""

import glob
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from guard import is_first
from PIL import Image
from torch import Tensor

from .decoding import check_reading, decode, is_gray, name_of, read_mode
from .files import address, choose_split, is_loaded, is_saved, loaded, row_files
from .folders import FORMATS, columns, scan, splits

HELD_OUT = 297
"""How many of the 1797 digits, the last ones, are the test split."""

LABELS = ("label", "labels", "fine_label", "class", "class_label", "y")
"""Columns that hold labels if no column has the type ClassLabel."""

SHUFFLE_BUFFER = 10_000
"""Rows of a stream that are shuffled among themselves, besides the order of its files."""

LOOKED_AT, FIRST_ROWS = 2000, 32
"""Pictures of a set, and of a stream, that decide whether it is gray."""


@dataclass(frozen=True)
class Pictures:
    """A split of `count` pictures, read by number. `labels` is int64 (N,) in 0..len(classes) − 1, or None.

    `where` names a picture in errors, and `mode` returns its mode without decoding it.
    """

    name: str
    count: int
    picture: Callable[[int], Image.Image]
    labels: np.ndarray | None = None
    classes: tuple[str, ...] = ()
    split: str = "train"
    where: Callable[[int], str] = "image {}".format
    mode: Callable[[int], str] | None = None

    def first(self) -> Image.Image:
        return self.picture(0)

    def is_gray(self) -> bool:
        """Return whether pictures are gray: all, or `LOOKED_AT` of them spread over the set."""
        mode = self.mode or (lambda i: self.picture(i).mode)
        count = min(self.count, LOOKED_AT)
        return all(is_gray(mode(i * (self.count - 1) // max(1, count - 1))) for i in range(count))


@dataclass(frozen=True)
class Stream:
    """Pictures that arrive one after the other. `rows(rank, processes, seed, epoch)` yields those of one process."""

    name: str
    rows: Callable[[int, int, int, int], Iterator[Any]]
    decode: Callable[[Any], tuple[Image.Image, int | None]]
    begin: list[Any]
    classes: tuple[str, ...] = ()
    split: str = "train"

    def first(self) -> Image.Image:
        return self.decode(self.begin[0])[0]

    def is_gray(self) -> bool:
        """Return whether the first pictures are gray."""
        return all(is_gray(self.decode(row)[0].mode) for row in self.begin)


def load(name: str, split: str = "train") -> tuple[Tensor, Tensor]:
    """Load all (images, labels) of a small data set: uint8 (N, C, H, W) and int64 (N,).

    "digits" is scikit-learn's copy of the UCI optical digits, 8×8 grayscale, which needs no download.
    Raises ValueError for an unknown name or split.
    """
    if name != "digits":
        raise ValueError(f"unknown data set {name!r}: use digits")
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}: use train or test")
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images * (255 / 16)).round().to(torch.uint8)[:, None]
    labels = torch.tensor(digits.target, dtype=torch.int64)
    part = slice(None, -HELD_OUT) if split == "train" else slice(-HELD_OUT, None)
    return images[part], labels[part]


def open_pictures(
    name: str,
    split: str | None = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    labelled: bool = False,
    data_config: str | None = None,
    background: str | None = None,
    bit_depth: int | None = None,
) -> Pictures:
    """Open a split of a data set whose pictures are read by number.

    Args:
        name: "digits", a folder, a file or a pattern of files, or the id of a data set on the Hub. A folder holds
            pictures or parquet or arrow files at any depth, or is one that `save_to_disk` wrote; see `folders`.
        split: "train" for a data set that is not divided; None as in `choose_split`.
        image_column, label_column: names of columns. By default columns are found by their types.
        labelled: whether to read labels.
        data_config: name of a configuration of a data set on the Hub.
        background, bit_depth: as in `Reading`.

    Raises:
        ValueError: a file, split, column or label is missing, or cannot be read.
    """
    check_reading(background, bit_depth)
    split = choose_split(name, split, data_config)
    if name == "digits":
        return _digits(split, image_column, label_column, labelled)
    rows = _rows(name, split, data_config, labelled)
    column = _image_column(rows.features, name, image_column)
    if len(rows) == 0:
        raise ValueError(f"{name} holds no pictures in its split {split!r}: choose another")
    labels, classes = _labels(rows, name, label_column) if labelled else (None, ())
    try:
        raw = rows.cast_column(column, datasets.Image(decode=False)).select_columns([column])
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"the column {column!r} of {name} holds no images: {error}") from error

    def value(i: int) -> tuple[Any, str]:
        return raw[int(i)][column], f"image {i} of {name}"

    def where(i: int) -> str:
        return name_of(*value(i))

    def picture(i: int) -> Image.Image:
        return decode(*value(i), background, bit_depth)

    return Pictures(name, len(rows), picture, labels, classes, split, where, lambda i: read_mode(*value(i)))


def open_stream(
    name: str,
    split: str | None = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    labelled: bool = False,
    data_config: str | None = None,
    background: str | None = None,
    bit_depth: int | None = None,
) -> Stream:
    """Open a data set of the Hub, or of parquet or arrow files, that is read as it arrives; see `open_pictures`."""
    check_reading(background, bit_depth)
    path = Path(name)
    if name == "digits" or (path.is_dir() and not (is_saved(path) or is_loaded(name) or scan(path).rows)):
        raise ValueError(f"{name} is read by number, not as a stream: leave out --streaming")
    split = choose_split(name, split, data_config)
    rows = _rows(name, split, data_config, labelled, streaming=True).decode(False)
    begin = list(itertools.islice(rows, FIRST_ROWS))
    if not begin:
        raise ValueError(f"the data set {name} is empty in its split {split!r}: choose another")
    features = rows.features or begin[0]
    column = _image_column(features, name, image_column)
    label, classes = None, ()
    if labelled:
        label = _label_column(features, name, label_column)
        classes = tuple(getattr(features[label], "names", None) or ())
        if not classes:
            raise ValueError(f"the stream {name} does not say how many classes {label!r} has: use it without streaming")

    def epoch_rows(rank: int, processes: int, seed: int, epoch: int) -> Iterator[Any]:
        shuffled = rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        shuffled.set_epoch(epoch)
        return iter(split_dataset_by_node(shuffled, rank, processes) if processes > 1 else shuffled)

    def read(row: Any) -> tuple[Image.Image, int | None]:
        picture = decode(row[column], f"an image of {name}", background, bit_depth)
        return picture, None if label is None else int(row[label])

    return Stream(name, epoch_rows, read, begin, classes, split)


def _digits(split: str, image_column: str | None, label_column: str | None, labelled: bool) -> Pictures:
    """Open scikit-learn's digits, whose columns are image and label."""
    for named, column in ((image_column, "image"), (label_column, "label")):
        if named not in (None, column):
            raise ValueError(f"digits has no column {named!r} for this: its columns are image, label")
    images, labels = load("digits", split)
    kinds = (labels.numpy(), tuple("0123456789")) if labelled else (None, ())
    return Pictures("digits", len(images), lambda i: Image.fromarray(images[i, 0].numpy()), *kinds, split)


# ---- rows, by the `datasets` library -------------------------------------------------------------------------------


def _rows(name: str, split: str, config: str | None, labelled: bool, streaming: bool = False) -> Any:
    """Load the rows of a split as a Dataset, or as an IterableDataset if `streaming`."""
    path = Path(name)
    if is_loaded(name):
        given = (address(name), config)
        return loaded(name, lambda: datasets.load_dataset(*given, split=split, streaming=streaming), config)
    if path.is_dir() and is_saved(path):
        saved = loaded(name, lambda: datasets.load_from_disk(name), config)
        saved = saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        return saved.to_iterable_dataset(num_shards=16) if streaming else saved
    if not path.is_dir():
        return _load_files(name, row_files(name), split, streaming)
    folder = scan(path)
    files = splits(folder)[split] if folder.rows or folder.pictures else []
    if not files:
        raise ValueError(f"there is no image in {path}: it needs files such as .png or .jpg, or .parquet or .arrow")
    found = columns(folder, files, labelled) if not folder.rows else {}
    if note := folder.note():
        say_once(note)
    if folder.rows:
        return _load_files(name, [path / file for file in files], split, streaming)
    try:
        return datasets.Dataset.from_dict(found).cast_column("image", datasets.Image())
    except (TypeError, ValueError) as error:  # those of Arrow are of these kinds
        raise ValueError(f"cannot read the metadata files of {name}: {error}") from error


def _load_files(name: str, files: list[Path], split: str, streaming: bool) -> Any:
    kind, paths = FORMATS[files[0].suffix.lower()], [glob.escape(str(file.absolute())) for file in files]
    given = {"data_files": {split: paths}, "split": split, "streaming": streaming}
    return loaded(name, lambda: datasets.load_dataset(kind, **given), None)


@lru_cache(1000)
def say_once(text: str) -> None:
    """Print a note to stderr, once and by the first process."""
    if is_first():
        print(f"note: {text}", file=sys.stderr)


def _image_column(features: Any, name: str, named: str | None) -> str:
    if named is not None:
        return _named_column(features, name, named)
    for column, kind in features.items():
        if isinstance(kind, datasets.Image) or (isinstance(kind, dict) and kind.keys() >= {"bytes", "path"}):
            return column
    raise ValueError(f"{name} has no column of images: its columns are {', '.join(features)}")


def _label_column(features: Any, name: str, named: str | None) -> str:
    if named is not None:
        return _named_column(features, name, named)
    typed = [column for column, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    found = typed or [column for column in LABELS if column in features]
    if not found:
        raise ValueError(
            f"{name} has no column of labels for class-conditional training: its columns are {', '.join(features)}; "
            "name one by --label_column"
        )
    return found[0]


def _named_column(features: Any, name: str, named: str) -> str:
    if named not in features:
        raise ValueError(f"{name} has no column {named!r}: its columns are {', '.join(features)}")
    return named


def _labels(rows: Any, name: str, named: str | None) -> tuple[np.ndarray, tuple[str, ...]]:
    """Read labels 0..K − 1 and the names of the K classes."""
    column = _label_column(rows.features, name, named)
    values = np.asarray(rows[column])
    values = values.astype(str) if values.dtype == bool else values  # True and False are names
    names = getattr(rows.features[column], "names", None)
    if values.ndim != 1 or values.dtype.kind not in "iuUSO" or any(value is None for value in values):
        raise ValueError(f"the column {column!r} of {name} holds no labels: they are integers or names, one an image")
    if names is not None:
        if values.min() < 0:
            raise ValueError(f"the split of {name} has no labels: {column!r} is {values.min()}")
        return values.astype(np.int64), tuple(names)
    classes, labels = np.unique(values, return_inverse=True)
    return labels.astype(np.int64), tuple(str(value) for value in classes)
