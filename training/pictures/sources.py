"""Data sets of pictures, read by number or as a stream: digits, folders, files, and data sets of the Hub."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from PIL import Image
from torch import Tensor

from .files import FORMATS, folder_files, has_splits, is_saved, row_files, split_files

HELD_OUT = 297
"""How many of the 1797 digits, the last ones, are the test split."""

LABELS = ("label", "labels", "fine_label", "class", "class_label", "y")
"""Columns that hold labels if no column has the type ClassLabel."""

SHUFFLE_BUFFER = 10_000
"""Rows of a stream that are shuffled among themselves, besides the order of its files."""


@dataclass(frozen=True)
class Pictures:
    """A set of `count` pictures, read by number. `labels` is int64 (N,) in 0..len(classes) − 1, or None."""

    name: str
    count: int
    picture: Callable[[int], Image.Image]
    labels: np.ndarray | None = None
    classes: tuple[str, ...] = ()

    def first(self) -> Image.Image:
        return self.picture(0)


@dataclass(frozen=True)
class Stream:
    """Pictures that arrive one after the other. `rows(rank, processes, seed, epoch)` yields those of one process."""

    name: str
    rows: Callable[[int, int, int, int], Iterator[Any]]
    decode: Callable[[Any], tuple[Image.Image, int | None]]
    row: Any
    classes: tuple[str, ...] = ()

    def first(self) -> Image.Image:
        return self.decode(self.row)[0]


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
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    labelled: bool = False,
) -> Pictures:
    """Open a data set whose pictures are read by number.

    Args:
        name: "digits", a folder, a file or a pattern of files, or the id of a data set on the Hub. A folder holds
            images at any depth, whose labels are the names of its subfolders, or parquet or arrow files, or is one
            that `save_to_disk` wrote.
        split: the part of a data set that has splits.
        image_column, label_column: names of columns. By default columns are found by their types.
        labelled: whether to read labels.

    Raises:
        ValueError: a file, split, column or label is missing, or cannot be read.
    """
    if name == "digits":
        images, labels = load(name, split)
        kinds = (labels.numpy(), tuple("0123456789")) if labelled else (None, ())
        return Pictures(name, len(images), lambda i: Image.fromarray(images[i, 0].numpy()), *kinds)
    rows = _rows(name, split, labelled)
    column = _image_column(rows.features, name, image_column)
    labels, classes = _labels(rows, name, label_column) if labelled else (None, ())
    try:
        raw = rows.cast_column(column, datasets.Image(decode=False)).select_columns([column])
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"the column {column!r} of {name} holds no images: {error}") from error

    def picture(i: int) -> Image.Image:
        return _decode(raw[int(i)][column], f"image {i} of {name}")

    return Pictures(name, len(rows), picture, labels, classes)


def open_stream(
    name: str,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    labelled: bool = False,
) -> Stream:
    """Open a data set of the Hub, or of parquet or arrow files, that is read as it arrives; see `open_pictures`."""
    if name == "digits" or (Path(name).is_dir() and not folder_files(Path(name))[1]):
        raise ValueError(f"{name} is read by number, not as a stream: leave out --streaming")
    rows = _rows(name, split, labelled, streaming=True).decode(False)
    row = next(iter(rows), None)
    if row is None:
        raise ValueError(f"the data set {name} is empty")
    features = rows.features or row
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

    def decode(row: Any) -> tuple[Image.Image, int | None]:
        return _decode(row[column], f"an image of {name}"), None if label is None else int(row[label])

    return Stream(name, epoch_rows, decode, row, classes)


# ---- rows, by the `datasets` library -------------------------------------------------------------------------------


def _rows(name: str, split: str, labelled: bool, streaming: bool = False) -> Any:
    """Load the rows of a data set as a Dataset, or as an IterableDataset if `streaming`."""
    path = Path(name)
    if split != "train" and not has_splits(name):
        raise ValueError(f"{name} has no split {split!r}, as it has no splits: name another data set for it")
    images, files = folder_files(path) if path.is_dir() else ([], row_files(name))
    if path.is_dir() and not files:
        return _image_rows(path, images, labelled)
    saved = path.is_dir() and is_saved(path)
    if path.is_dir() and not saved:
        files = split_files(path, files, split)
    try:
        if saved:
            return _saved_rows(name, split, streaming)
        if files:
            kind, names = FORMATS[files[0].suffix], [str(file) for file in files]
            return datasets.load_dataset(kind, data_files=names, split="train", streaming=streaming)
        return datasets.load_dataset(name, split=split, streaming=streaming)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise ValueError(f"cannot read the data set {name}: {error}") from error


def _image_rows(folder: Path, files: list[Path], labelled: bool) -> datasets.Dataset:
    """Make rows of image files, in the order of their paths, labelled by the first folder on the way to them.

    The loader "imagefolder" takes the last folder instead, and orders and chooses files in other ways.
    """
    if not files:
        raise ValueError(f"there is no image in {folder}: it needs files such as .png or .jpg, or .parquet or .arrow")
    columns = {"image": [str(file) for file in files]}
    if labelled:
        loose = next((file for file in files if file.parent == folder), None)
        if loose is not None:
            raise ValueError(
                f"{loose} has no label: for class-conditional training a folder holds one subfolder for each class"
            )
        columns["label"] = [file.relative_to(folder).parts[0] for file in files]
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


def _saved_rows(name: str, split: str, streaming: bool) -> Any:
    """Load rows that `save_to_disk` wrote."""
    saved = datasets.load_from_disk(name)
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise ValueError(f"there is no split {split!r}, only {', '.join(saved)}")
        saved = saved[split]
    return saved.to_iterable_dataset(num_shards=16) if streaming else saved


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
    names = getattr(rows.features[column], "names", None)
    if values.ndim != 1 or values.dtype.kind not in "iuUSO" or any(value is None for value in values):
        raise ValueError(f"the column {column!r} of {name} holds no labels: they are integers or names, one an image")
    if names is not None:
        if values.min() < 0:
            raise ValueError(f"the split of {name} has no labels: {column!r} is {values.min()}")
        return values.astype(np.int64), tuple(names)
    classes, labels = np.unique(values, return_inverse=True)
    return labels.astype(np.int64), tuple(str(value) for value in classes)


# ---- pictures ------------------------------------------------------------------------------------------------------


def _decode(value: Any, name: str) -> Image.Image:
    """Decode an upright picture, of at most 8 bits a channel, from the bytes or the path in a row."""
    try:
        image = datasets.Image().decode_example(value)
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, Image.DecompressionBombError) as error:
        path = value.get("path") if isinstance(value, dict) else None
        raise ValueError(f"cannot read {name}{f' ({path})' if path else ''}: {error}") from error
    if not isinstance(image, Image.Image):
        raise ValueError(f"cannot read {name}: its row holds no image, but {type(image).__name__}")
    return to_8_bits(image, name)


def to_8_bits(image: Image.Image, name: str) -> Image.Image:
    """Scale a grayscale picture of 16 bits from 0..65535 to 0..255; return any other unchanged."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"{name} has mode {image.mode!r}: pictures have 8 or 16 bits, from 0 up")
    return Image.fromarray(np.round(values / 257).astype(np.uint8))
