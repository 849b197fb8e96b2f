"""Batches of pictures, which depend on nothing but the seed and the step.

So any number of workers and (except for streams) of processes, pictures in memory or on disk, and a resumed run yield
the same pictures, crops and flips.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from .frames import Frame, Name
from .sources import Pictures, Stream

CHUNK = 512
"""Pictures that a thread reads into memory at a time."""


def bounded(pool: ThreadPoolExecutor, work: Callable[[Any], Any], jobs: Iterable[Any], ahead: int) -> Iterator[Any]:
    """Yield work(job) of each job in order, with at most `ahead` jobs under way."""
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


def in_memory(pictures: Pictures, frame: Frame, given: bool, workers: int, quiet: bool) -> Tensor | None:
    """Read all pictures as uint8 (N, C, h, w), or return None if they differ in size and are cropped at random.

    Raises ValueError for pictures that differ in size, unless the resolution is `given`.
    """

    def read(i: int) -> np.ndarray:
        picture = pictures.picture(i)
        if not given and picture.size != (frame.size[1], frame.size[0]):
            raise ValueError(
                f"the pictures differ in size: {pictures.where(i)} is {picture.height}×{picture.width}, the first is "
                f"{frame.size[0]}×{frame.size[1]} (height × width). Pass --resolution"
            )
        return frame.canvas(picture, partial(pictures.where, i))

    first = read(0)
    images = torch.empty((pictures.count, *first.shape), dtype=torch.uint8)
    chunks = [range(i, min(i + CHUNK, pictures.count)) for i in range(0, pictures.count, CHUNK)]
    with (
        ThreadPoolExecutor(max(1, workers)) as pool,
        tqdm(total=pictures.count, desc="reading", unit="image", disable=quiet, leave=False) as bar,
    ):
        found = bounded(pool, lambda chunk: [read(i) for i in chunk], chunks, workers + 1)
        for chunk, arrays in zip(chunks, found, strict=True):
            if any(array.shape != first.shape for array in arrays):
                return None
            images.numpy()[chunk.start : chunk.stop] = arrays
            bar.update(len(chunk))
    return images


@dataclass(frozen=True)
class Share:
    """One process's share of each batch: `size` pictures in each of `parts` micro-batches."""

    size: int
    parts: int
    rank: int = 0
    processes: int = 1

    @property
    def batch(self) -> int:
        return self.size * self.parts * self.processes

    def of(self, values: Any, part: int) -> Any:
        """Return this process's rows of a whole batch."""
        start = (part * self.processes + self.rank) * self.size
        return values[start : start + self.size]


class Order:
    """The endless order of pictures: each once an epoch, in a new order each epoch, from any position on."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed = count, seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __call__(self, start: int, size: int) -> np.ndarray:
        """Return the numbers at positions start..start + size − 1."""
        found = []
        while size:
            epoch, at = divmod(start, self.count)
            if epoch != self._epoch:
                rng = np.random.default_rng([self.seed, 0, epoch])
                self._epoch, self._order = epoch, rng.permutation(self.count)
            found.append(self._order[at : at + size])
            start, size = start + len(found[-1]), size - len(found[-1])
        return np.concatenate(found)


class Plan(NamedTuple):
    """What a micro-batch is made of: numbers of pictures (none for streams), places (B, 2) of the crops, flips."""

    numbers: np.ndarray | None
    places: np.ndarray
    flips: np.ndarray


class Feed:
    """Micro-batches of one process: (images uint8 (B, C, H, W), labels int64 (B,) or None) on the device.

    Pass all pictures as `images` if they are in memory (see `in_memory`). Otherwise `workers` threads read them ahead
    of time, as decoding and resizing release Python's lock. `epochs` counts the rows of the epochs of a stream that
    this process has read. Restore it to resume without reading these epochs again.
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
        self.epochs: list[int] = []

    def batches(self, step: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield micro-batches without end, from the first one of `step` on."""
        if isinstance(self.pictures, Stream):
            read = self._streamed(step)
        else:
            read = self._from_disk(step) if self.images is None else self._from_memory(step)
        for images, labels, flips in read:
            images = images.to(self.device, non_blocking=True)
            if self.flip:
                flipped = torch.from_numpy(flips).to(self.device, non_blocking=True).view(-1, 1, 1, 1)
                images = torch.where(flipped, images.flip(-1), images)
            yield images, None if labels is None else torch.from_numpy(labels).to(self.device, non_blocking=True)

    def _plans(self, step: int) -> Iterator[Plan]:
        batch = self.share.batch
        order = Order(self.pictures.count, self.seed) if isinstance(self.pictures, Pictures) else None
        for k in itertools.count(step):
            rng = np.random.default_rng([self.seed, 1, k])
            places, flips = rng.random((batch, 2)), rng.random(batch) < 0.5
            numbers = None if order is None else order(k * batch, batch)
            for part in range(self.share.parts):
                yield Plan(*(None if each is None else self.share.of(each, part) for each in (numbers, places, flips)))

    def _from_memory(self, step: int) -> Iterator[tuple]:
        images, (height, width) = self.images, self.frame.size
        room = np.array(images.shape[2:]) - (height, width) + 1
        for plan in self._plans(step):
            index = torch.from_numpy(plan.numbers).to(images.device)
            if images.shape[2:] == (height, width):
                batch = images[index]
            else:
                top, left = torch.from_numpy((plan.places * room).astype(np.int64)).to(images.device).unbind(1)
                rows = top[:, None] + torch.arange(height, device=images.device)
                columns = left[:, None] + torch.arange(width, device=images.device)
                batch = images[index[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
            yield batch, self._labels(plan), plan.flips

    def _from_disk(self, step: int) -> Iterator[tuple]:
        def work(plan: Plan) -> tuple:
            pictures = [self.pictures.picture(i) for i in plan.numbers]
            names = [partial(self.pictures.where, i) for i in plan.numbers]
            return self._stack(pictures, plan.places, names), self._labels(plan), plan.flips

        with ThreadPoolExecutor(max(1, self.workers)) as pool:
            yield from bounded(pool, work, self._plans(step), self.workers + 1)

    def _streamed(self, step: int) -> Iterator[tuple]:
        share = self.share
        rows = self._rows(step * share.size * share.parts)

        def work(job: tuple) -> tuple:
            plan, rows = job
            pictures, labels = zip(*map(self.pictures.decode, rows.result()), strict=True)
            names = [f"an image of {self.pictures.name}"] * len(pictures)
            stack = self._stack(pictures, plan.places, names)
            return stack, None if labels[0] is None else np.array(labels), plan.flips

        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(max(1, self.workers)) as pool:
            read = (reader.submit(lambda: list(itertools.islice(rows, share.size))) for _ in itertools.count())
            yield from bounded(pool, work, zip(self._plans(step), read, strict=False), self.workers + 1)

    def _rows(self, start: int) -> Iterator[Any]:
        """Yield rows without end from number `start` on, without reading the epochs before it whose length is known."""
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

    def _labels(self, plan: Plan) -> np.ndarray | None:
        return None if self.pictures.labels is None else self.pictures.labels[plan.numbers]

    def _stack(self, pictures: Sequence[Image.Image], places: np.ndarray, names: Sequence[Name]) -> Tensor:
        """Make pictures a batch (B, C, H, W), in memory from which copies to a GPU do not block."""
        cuts = []
        for picture, place, name in zip(pictures, places, names, strict=True):
            canvas = self.frame.canvas(picture, name)
            cuts.append(self.frame.cut(canvas, place) if self.frame.crop == "random" else canvas)
        batch = torch.from_numpy(np.stack(cuts))
        return batch.pin_memory() if self.device.type == "cuda" else batch
