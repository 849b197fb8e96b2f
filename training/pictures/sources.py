"""Pictures to train on: data sets as numbered pictures or streams, and the batches made of them.

Batches are a function of (seed, step) alone: any number of workers and (but for streams) of processes, in memory or
from disk, and a run that was resumed, see the same pictures, crops and flips.
"""

import glob
import io
import itertools
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ddim_plugin.pipelines.images import MODES, SUFFIXES, fit, open_upright

HELD_OUT = 297
"""How many of the 1797 digits, the last ones, are the test split."""

FILES = {".parquet": "parquet", ".arrow": "arrow"}

LABELS = ("label", "labels", "fine_label", "class", "class_label", "y")
"""Names under which a column of labels is looked for, where none is of the type ClassLabel."""

SHUFFLE_BUFFER = 10_000
"""Rows among which a stream is shuffled, besides the order of its files."""


def load(name: str, split: str = "train") -> tuple[Tensor, Tensor]:
    """(images, labels) of a data set: uint8 (N, C, H, W) and int64 (N,).

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


def load_images(name: str, split: str, channels: int, size: tuple[int, int] | None, count: int) -> Tensor:
    """The first `count` images of a data set as uint8 (N, C, H, W), cropped and resized to `size` (H, W).

    `name` is as in `open_pictures`; `split` is read where the set has splits. Raises ValueError for a set that is not
    there or holds no images, and for an unknown split.
    """
    source = open_pictures(name, split if has_splits(name) else "train")
    arrays = []
    for i in range(min(count, source.count)):
        picture = fit(source.picture(i), channels, size, True, f"image {i} of {name}")
        arrays.append(np.asarray(picture).reshape(*picture.size[::-1], channels))
        if arrays[-1].shape != arrays[0].shape:
            raise ValueError(f"the images of {name} differ in size, and the network does not say which it takes")
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


# ---- data sets -----------------------------------------------------------------------------------------------------


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
    """Pictures that come one after the other. `rows(rank, processes, seed, epoch)` are those of one process."""

    name: str
    rows: Callable[[int, int, int, int], Iterator[Any]]
    decode: Callable[[Any], tuple[Image.Image, int | None]]
    row: Any
    classes: tuple[str, ...] = ()

    def first(self) -> Image.Image:
        return self.decode(self.row)[0]


def open_pictures(
    name: str,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    labelled: bool = False,
) -> Pictures:
    """The pictures of a data set: "digits", a folder, a file or pattern of files, or the id of a data set on the Hub.

    A folder holds images at any depth, whose labels are the names of its subfolders, or parquet or arrow files, or is
    one that `save_to_disk` wrote. Columns are found by their types, or named. `labelled` asks for labels.
    Raises ValueError naming what is missing.
    """
    if name == "digits":
        images, labels = load(name, split)
        kinds = (labels.numpy(), tuple("0123456789")) if labelled else (None, ())
        return Pictures(name, len(images), lambda i: Image.fromarray(images[i, 0].numpy()), *kinds)
    _check_split(name, split)
    if Path(name).is_dir():
        files, rows = _files(Path(name))
        if not rows:
            return _folder(Path(name), files, labelled)
    rows = _open(name, split)
    column = _image_column(rows.features, name, image_column)
    labels, classes = _row_labels(rows, name, label_column, labelled)
    import datasets

    raw = rows.cast_column(column, datasets.Image(decode=False)).select_columns([column])

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
    """A data set read as it arrives, never whole: of the Hub, or parquet or arrow files. As `open_pictures`."""
    from datasets.distributed import split_dataset_by_node

    _check_split(name, split)
    if name == "digits" or (Path(name).is_dir() and not _row_files(Path(name))):
        raise ValueError(f"{name} is read by number, not as a stream: leave out --streaming")
    rows = _open(name, split, streaming=True).decode(False)
    row = next(iter(rows), None)
    if row is None:
        raise ValueError(f"the data set {name} is empty")
    column = _image_column(rows.features or row, name, image_column)
    label, classes = None, ()
    if labelled:
        label = _label_column(rows.features or row, name, label_column)
        classes = tuple(getattr((rows.features or {}).get(label), "names", None) or ())
        if not classes:
            raise ValueError(f"the stream {name} does not say how many classes {label!r} has: use it without streaming")

    def epoch_rows(rank: int, processes: int, seed: int, epoch: int) -> Iterator[Any]:
        shuffled = rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        shuffled.set_epoch(epoch)
        return iter(split_dataset_by_node(shuffled, rank, processes) if processes > 1 else shuffled)

    def decode(row: Any) -> tuple[Image.Image, int | None]:
        return _decode(row[column], f"an image of {name}"), None if label is None else int(row[label])

    return Stream(name, epoch_rows, decode, row, classes)


SPLITS = ("train", "test", "validation", "val", "dev", "eval")
"""Words in the paths of files that name their split."""


def _words(file: Path, folder: Path) -> set[str]:
    return set(re.split(r"[^a-z0-9]+", str(file.relative_to(folder)).lower()))


def _files(folder: Path) -> tuple[list[Path], list[Path]]:
    """(pictures, rows) in a folder at any depth: without pictures, rows are its parquet, or else its arrow files."""
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in (*SUFFIXES, *FILES) and file.is_file())
    if pictures := [file for file in files if file.suffix.lower() in SUFFIXES]:
        return pictures, []
    for suffix in FILES:
        if found := [file for file in files if file.suffix == suffix]:
            return [], found
    return [], []


def _row_files(folder: Path) -> list[Path]:
    return _files(folder)[1]


def origin(name: str) -> str:
    """Where the data set of that name comes from: "digits" (scikit-learn), "files" or "hub"."""
    if name == "digits":
        return name
    return "files" if Path(name).exists() or glob.has_magic(name) else "hub"


def as_dataset(name: str, split: str) -> dict[str, str]:
    """A data set as an entry of `results.json` names it."""
    return {"name": Path(name).name, "split": split} | ({"id": name} if origin(name) == "hub" else {})


def has_splits(name: str) -> bool:
    """Whether a data set says which of its pictures are for training, and which are not."""
    path = Path(name)
    if path.is_dir():
        named = any(_words(file, path) & set(SPLITS) for file in _row_files(path))
        return (path / "dataset_dict.json").is_file() or (named and not (path / "state.json").is_file())
    return not (path.is_file() or glob.has_magic(name))


def _check_split(name: str, split: str) -> None:
    if split != "train" and not has_splits(name):
        raise ValueError(f"{name} has no split {split!r}, as it has no splits: name another data set for it")


def _folder(folder: Path, files: list[Path], labelled: bool) -> Pictures:
    """The image files of a folder, in the order of their names."""
    if not files:
        raise ValueError(f"there is no image in {folder}: it needs files such as .png or .jpg, or .parquet or .arrow")
    labels, classes = None, ()
    if labelled:
        kinds = [file.relative_to(folder).parts[0] if file.parent != folder else "" for file in files]
        if "" in kinds:
            raise ValueError(
                f"{files[kinds.index('')]} has no label: for class-conditional training a folder holds one subfolder "
                "for each class"
            )
        classes = tuple(sorted(set(kinds)))
        labels = np.array([classes.index(kind) for kind in kinds])
    return Pictures(str(folder), len(files), lambda i: _decode({"path": str(files[i])}, str(files[i])), labels, classes)


def _open(name: str, split: str, streaming: bool = False) -> Any:
    """The rows of files, of a folder of them, or of a data set on the Hub, by the `datasets` library."""
    import datasets

    path = Path(name)
    files = [name] if path.is_file() else sorted(glob.glob(name)) if glob.has_magic(name) else []
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            settings = None
        else:
            named = _row_files(path)
            if has_splits(name):
                matching = [file for file in named if split.lower() in _words(file, path)]
                if not matching:
                    found = ", ".join(str(file.relative_to(path)) for file in named)
                    raise ValueError(f"{name} has no split {split!r}: its files are {found}")
                named = matching
            settings = {"path": FILES[named[0].suffix], "data_files": list(map(str, named)), "split": "train"}
    elif files:
        kinds = {Path(file).suffix for file in files}
        if len(kinds) > 1 or not kinds <= FILES.keys():
            raise ValueError(f"{name} is no data set: use a folder of images, or {' or '.join(FILES)} files")
        settings = {"path": FILES[kinds.pop()], "data_files": files, "split": "train"}
    elif path.suffix in FILES or path.is_absolute() or name.startswith(".") or glob.has_magic(name):
        raise ValueError(f"there is no file {name}")
    else:
        settings = {"path": name, "split": split}
    try:
        if settings is not None:
            return datasets.load_dataset(**settings, streaming=streaming)
        saved = datasets.load_from_disk(name)
        if isinstance(saved, datasets.DatasetDict):
            if split not in saved:
                raise ValueError(f"there is no split {split!r}, only {', '.join(saved)}")
            saved = saved[split]
        return saved.to_iterable_dataset(num_shards=16) if streaming else saved
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise ValueError(f"cannot read the data set {name}: {error}") from error


def _named_column(features: Any, name: str, named: str) -> str:
    if named not in features:
        raise ValueError(f"{name} has no column {named!r}: its columns are {', '.join(features)}")
    return named


def _image_column(features: Any, name: str, named: str | None = None) -> str:
    import datasets

    if named is not None:
        return _named_column(features, name, named)
    for column, kind in features.items():
        if isinstance(kind, datasets.Image) or (isinstance(kind, dict) and kind.keys() >= {"bytes", "path"}):
            return column
    raise ValueError(f"{name} has no column of images: its columns are {', '.join(features)}")


def _label_column(features: Any, name: str, named: str | None) -> str:
    import datasets

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


def _row_labels(rows: Any, name: str, named: str | None, labelled: bool) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Labels 0..K − 1 and the names of the K classes."""
    if not labelled:
        return None, ()
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


def _decode(value: Any, name: str) -> Image.Image:
    """A picture from the bytes or the path that a data set holds, upright, in at most 8 bits a channel."""
    try:
        if value.get("bytes") is None and not os.path.isfile(value["path"]):
            import datasets

            image = datasets.Image().decode_example(value)  # it knows the paths of the Hub
        else:
            image = open_upright(value["path"] if value.get("bytes") is None else io.BytesIO(value["bytes"]), name)
    except (OSError, SyntaxError, AttributeError, TypeError, KeyError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read {name}: {error}") from error
    return to_8_bits(image, name)


def to_8_bits(image: Image.Image, name: str) -> Image.Image:
    """A grayscale picture of 16 bits scaled from 0..65535 to 0..255; any other as it is."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"{name} has mode {image.mode!r}: pictures have 8 or 16 bits, from 0 up")
    return Image.fromarray(np.round(values / 257).astype(np.uint8))


# ---- from pictures to batches --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frame:
    """How a picture becomes (C, H, W): its mode, its shorter side after `resize` (None: just enough), the crop."""

    channels: int
    size: tuple[int, int]
    resize: int | None = None
    crop: str = "center"

    def canvas(self, picture: Image.Image, name: str) -> np.ndarray:
        """A picture as uint8 (C, h, w): of the frame's size, or larger where it will be cropped at random."""
        height, width = self.size
        if self.resize is None and self.crop == "center":
            picture = fit(picture, self.channels, self.size, True, name)
        else:
            picture = fit(picture, self.channels, None, False, name)
            scale = max(width / picture.width, height / picture.height)
            if self.resize is not None:
                scale = self.resize / min(picture.size)
            size = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
            picture = picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)
        array = np.asarray(picture).reshape(picture.height, picture.width, self.channels).transpose(2, 0, 1)
        return array if self.crop == "random" else self.cut(array, (0.5, 0.5))

    def cut(self, canvas: np.ndarray, place: Sequence[float]) -> np.ndarray:
        """The frame cut out of a canvas, `place` (down, right) in [0, 1) of the room there is."""
        (height, width), (h, w) = self.size, canvas.shape[1:]
        top, left = int(place[0] * (h - height + 1)), int(place[1] * (w - width + 1))
        return canvas[:, top : top + height, left : left + width]


def find_frame(
    pictures: Pictures | Stream,
    channels: int | None,
    size: tuple[int, int] | None,
    resize: int | None = None,
    crop: str = "center",
) -> Frame:
    """The frame of a set, with what is not said taken from its first picture. Raises ValueError where none will do."""
    if crop not in ("center", "random"):
        raise ValueError(f"unknown crop {crop!r}: use center or random")
    first = pictures.first()
    if channels is None:
        channels = 1 if first.mode in ("1", "L") else 3
    if channels not in MODES:
        raise ValueError(f"channels={channels}: pictures have 1 or 3")
    size = size or (first.height, first.width)
    if min(size) < 1:
        raise ValueError(f"the resolution must be positive, not {size[0]}×{size[1]}")
    if resize is not None and resize < max(size):
        raise ValueError(f"resize={resize} leaves no room for pictures of {size[0]}×{size[1]}")
    return Frame(channels, size, resize, crop)


def in_memory(pictures: Pictures, frame: Frame, given: bool, workers: int, quiet: bool) -> Tensor | None:
    """All pictures as uint8 (N, C, h, w), or None where they differ in size and each is to be cropped by itself.

    Unless a resolution is `given`, pictures that differ in size are refused with ValueError.
    """

    def read(i: int) -> np.ndarray:
        picture = pictures.picture(i)
        if not given and picture.size != (frame.size[1], frame.size[0]):
            raise ValueError(
                f"the pictures of {pictures.name} differ in size: number {i} is {picture.height}×{picture.width}, the "
                f"first {frame.size[0]}×{frame.size[1]} (height × width). Say --resolution"
            )
        return frame.canvas(picture, f"image {i} of {pictures.name}")

    first = read(0)
    images = torch.empty((pictures.count, *first.shape), dtype=torch.uint8)
    out = images.numpy()
    with ThreadPoolExecutor(max(1, workers)) as pool:
        chunks = [range(i, min(i + 512, pictures.count)) for i in range(0, pictures.count, 512)]
        with tqdm(total=pictures.count, desc="reading", unit="image", disable=quiet, leave=False) as bar:
            for chunk, arrays in zip(
                chunks, bounded(pool, lambda chunk: [read(i) for i in chunk], chunks, workers + 1), strict=True
            ):
                for i, array in zip(chunk, arrays, strict=True):
                    if array.shape != first.shape:
                        return None
                    out[i] = array
                bar.update(len(chunk))
    return images


def bounded(pool: ThreadPoolExecutor, work: Callable[[Any], Any], jobs: Any, ahead: int) -> Iterator[Any]:
    """work(job) of each job, in order, with at most `ahead` under way."""
    queue: deque = deque()
    try:
        for job in jobs:
            queue.append(pool.submit(work, job))
            if len(queue) > ahead:
                yield queue.popleft().result()
        while queue:
            yield queue.popleft().result()
    finally:
        for future in queue:
            future.cancel()


@dataclass(frozen=True)
class Share:
    """One process's part of each batch: `size` pictures in each of `parts` micro-batches."""

    size: int
    parts: int
    rank: int = 0
    processes: int = 1

    @property
    def batch(self) -> int:
        return self.size * self.parts * self.processes

    def of(self, values: Any, part: int) -> Any:
        """This process's rows of a whole batch."""
        start = (part * self.processes + self.rank) * self.size
        return values[start : start + self.size]


class Order:
    """Which pictures make a batch: each once an epoch, in a fresh order each epoch, from any step on."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed = count, seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __call__(self, start: int, size: int) -> np.ndarray:
        """The numbers at positions start..start + size − 1 of the endless order."""
        found = []
        while size:
            epoch, at = divmod(start, self.count)
            if epoch != self._epoch:
                rng = np.random.default_rng([self.seed, 0, epoch])
                self._epoch, self._order = epoch, rng.permutation(self.count)
            found.append(self._order[at : at + size])
            start, size = start + len(found[-1]), size - len(found[-1])
        return np.concatenate(found)


class Feed:
    """Micro-batches of one process, (images uint8 (B, C, H, W), labels int64 (B,) or None) on the device.

    `images` are all pictures in memory (see `in_memory`); without them pictures are read by `workers` threads, ahead of
    time: decoding and resizing do not hold Python's lock.
    """

    def __init__(
        self,
        pictures: Pictures | Stream,
        frame: Frame,
        share: Share,
        seed: int,
        flip: bool,
        workers: int,
        device: torch.device,
        images: Tensor | None = None,
    ):
        self.pictures, self.frame, self.share, self.seed, self.flip = pictures, frame, share, seed, flip
        self.workers, self.device = workers, device
        self.images = None if images is None else images.to(device)
        self.epochs: list[int] = []  # rows of the epochs of a stream that this process has read

    def batches(self, step: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Endless, from the first micro-batch of `step` on."""
        if isinstance(self.pictures, Stream):
            read = self._streamed(step)
        elif self.images is not None:
            read = (self._gather(*job) for job in self._jobs(step))
        else:
            read = self._read(step)
        for images, labels, flip in read:
            images = images.to(self.device, non_blocking=True)
            if flip is not None:
                turned = torch.from_numpy(flip).to(self.device, non_blocking=True)
                images = torch.where(turned.view(-1, 1, 1, 1), images.flip(-1), images)
            yield images, None if labels is None else torch.from_numpy(labels).to(self.device, non_blocking=True)

    def _jobs(self, step: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
        """(numbers, places of the crop, flips) of each micro-batch."""
        order = Order(self.pictures.count, self.seed) if isinstance(self.pictures, Pictures) else None
        for k in itertools.count(step):
            rng = np.random.default_rng([self.seed, 1, k])
            places, flips = rng.random((self.share.batch, 2)), rng.random(self.share.batch) < 0.5
            numbers = places if order is None else order(k * self.share.batch, self.share.batch)
            for part in range(self.share.parts):
                yield (
                    self.share.of(numbers, part),
                    self.share.of(places, part),
                    self.share.of(flips, part) if self.flip else None,
                )

    def _gather(self, numbers: np.ndarray, places: np.ndarray, flips: np.ndarray | None) -> tuple:
        images, (height, width) = self.images, self.frame.size
        index = torch.from_numpy(numbers).to(images.device)
        if images.shape[2:] == (height, width):
            batch = images[index]
        else:
            room = np.array(images.shape[2:]) - (height, width) + 1
            top, left = torch.from_numpy((places * room).astype(np.int64)).to(images.device).unbind(1)
            rows = top[:, None] + torch.arange(height, device=images.device)
            columns = left[:, None] + torch.arange(width, device=images.device)
            batch = images[index[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        return batch, self._labels(numbers), flips

    def _labels(self, numbers: np.ndarray) -> np.ndarray | None:
        return None if self.pictures.labels is None else self.pictures.labels[numbers]

    def _read(self, step: int) -> Iterator[tuple]:
        def work(job: tuple) -> tuple:
            numbers, places, flips = job
            cuts = [self._cut(self.pictures.picture(i), place) for i, place in zip(numbers, places, strict=True)]
            return self._stack(cuts), self._labels(numbers), flips

        with ThreadPoolExecutor(max(1, self.workers)) as pool:
            yield from bounded(pool, work, self._jobs(step), self.workers + 1)

    def _cut(self, picture: Image.Image, place: Sequence[float]) -> np.ndarray:
        canvas = self.frame.canvas(picture, f"an image of {self.pictures.name}")
        return self.frame.cut(canvas, place) if self.frame.crop == "random" else canvas

    def _stack(self, cuts: list[np.ndarray]) -> Tensor:
        batch = torch.from_numpy(np.stack(cuts))
        return batch.pin_memory() if self.device.type == "cuda" else batch  # so that the copy waits for nothing

    def _streamed(self, step: int) -> Iterator[tuple]:
        share = self.share
        rows = self._rows(step * share.size * share.parts)

        def work(job: tuple) -> tuple:
            rows, places, flips = job
            decoded = [self.pictures.decode(row) for row in rows.result()]
            cuts = [self._cut(picture, place) for (picture, _), place in zip(decoded, places, strict=True)]
            labels = None if decoded[0][1] is None else np.array([label for _, label in decoded])
            return self._stack(cuts), labels, flips

        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(max(1, self.workers)) as pool:
            jobs = (
                (reader.submit(lambda: list(itertools.islice(rows, share.size))), places, flips)
                for _, places, flips in self._jobs(step)
            )
            yield from bounded(pool, work, jobs, self.workers + 1)

    def _rows(self, start: int) -> Iterator[Any]:
        """The endless rows from number `start` on. Epochs whose length is known are left out, the rest read again."""
        known = 0
        while known < len(self.epochs) and self.epochs[known] <= start:
            start -= self.epochs[known]
            known += 1
        del self.epochs[known:]
        for epoch in itertools.count(known):
            count = 0
            for row in self.pictures.rows(self.share.rank, self.share.processes, self.seed, epoch):
                count += 1
                if count > start:
                    yield row
            if count == 0:
                raise ValueError(
                    f"the stream {self.pictures.name} has no rows for process {self.share.rank} of "
                    f"{self.share.processes}"
                )
            start = max(0, start - count)
            self.epochs.append(count)


def to_model(images: Tensor) -> Tensor:
    """uint8 0..255 → float32 −1..1, the range a network is trained in."""
    return images.float() / 127.5 - 1


def held_out(
    pictures: Pictures, frame: Frame, count: int, classes: tuple[str, ...] = ()
) -> tuple[Tensor, Tensor | None]:
    """The first `count` pictures, cropped at the centre: uint8 (N, C, H, W), and their labels among `classes`."""
    unknown = sorted(set(pictures.classes) - set(classes)) if pictures.labels is not None else []
    if unknown:
        raise ValueError(f"{pictures.name} has classes that are not trained: {', '.join(unknown)}")
    frame = replace(frame, crop="center")
    numbers = range(min(count, pictures.count))
    images = np.stack([frame.canvas(pictures.picture(i), f"image {i} of {pictures.name}") for i in numbers])
    if pictures.labels is None:
        return torch.from_numpy(images), None
    order = np.array([classes.index(each) for each in pictures.classes])
    return torch.from_numpy(images), torch.from_numpy(order[pictures.labels[: len(images)]])
