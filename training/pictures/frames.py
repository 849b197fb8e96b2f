"""Frames: how pictures of any size and mode become arrays of one shape."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ddim_plugin.pipelines.images import MODES, fit

from .decoding import is_gray
from .sources import Pictures, Stream, open_pictures

Name = str | Callable[[], str]  # of a picture in errors; a function if it takes time


@dataclass(frozen=True)
class Frame:
    """The shape that pictures get: channels, (H, W), the shorter side after `resize`, and where they are cropped.

    Without `resize` a picture is made just large enough. `crop` is "center" or "random". If the channels were `found`,
    and not given, a picture with colours is refused in a gray frame.
    """

    channels: int
    size: tuple[int, int]
    resize: int | None = None
    crop: str = "center"
    found: bool = False

    def canvas(self, picture: Image.Image, name: Name) -> np.ndarray:
        """Convert a picture to uint8 (C, h, w), of the frame's size or larger if it will be cropped at random."""
        height, width = self.size
        title = name if isinstance(name, str) else "the picture"
        if self.found and self.channels == 1 and not is_gray(picture.mode):
            title = name if isinstance(name, str) else name()
            raise ValueError(f"{title} has colours, unlike the others that were looked at: pass --channels 1 or 3")
        if self.resize is None and self.crop == "center":
            picture = fit(picture, self.channels, self.size, title)
        else:
            picture = fit(picture, self.channels, None, title)
            scale = max(width / picture.width, height / picture.height)
            if self.resize is not None:
                scale = self.resize / min(picture.size)
            size = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
            picture = picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)
        array = np.asarray(picture).reshape(picture.height, picture.width, self.channels).transpose(2, 0, 1)
        return array if self.crop == "random" else self.cut(array, (0.5, 0.5))

    def cut(self, canvas: np.ndarray, place: Sequence[float]) -> np.ndarray:
        """Cut the frame out of a canvas, at `place` (down, right) in [0, 1) of the room there is."""
        (height, width), (h, w) = self.size, canvas.shape[1:]
        top, left = int(place[0] * (h - height + 1)), int(place[1] * (w - width + 1))
        return canvas[:, top : top + height, left : left + width]

    def read(self, pictures: Pictures, i: int) -> np.ndarray:
        """Read picture number `i` of a set as a canvas."""
        return self.canvas(pictures.picture(i), partial(pictures.where, i))


def find_frame(
    pictures: Pictures | Stream,
    channels: int | None,
    size: tuple[int, int] | None,
    resize: int | None = None,
    crop: str = "center",
) -> Frame:
    """Choose the frame of a set; None stands for three channels if a picture has colours, and for the first's size.

    Raises ValueError for settings that no picture can have.
    """
    if crop not in ("center", "random"):
        raise ValueError(f"unknown crop {crop!r}: use center or random")
    first, found = pictures.first(), channels is None
    if channels is None:
        channels = 1 if pictures.is_gray() else 3
    if channels not in MODES:
        raise ValueError(f"channels={channels}: pictures have 1 or 3")
    size = size or (first.height, first.width)
    if min(size) < 1:
        raise ValueError(f"the resolution must be positive, not {size[0]}×{size[1]}")
    if resize is not None and resize < max(size):
        raise ValueError(f"resize={resize} leaves no room for pictures of {size[0]}×{size[1]}")
    return Frame(channels, size, resize, crop, found)


def load_images(
    name: str, split: str | None, channels: int, size: tuple[int, int] | None, count: int, **reading: Any
) -> Tensor:
    """Load the first `count` images of a data set as uint8 (N, C, H, W).

    They are cropped and resized to `size` (H, W); with None they must have one size. `name`, `split` and `reading` are
    as in `open_pictures`. Raises ValueError if the set cannot be read.
    """
    source = open_pictures(name, split, **reading)
    arrays = []
    for i in range(min(count, source.count)):
        picture = source.picture(i)
        arrays.append(Frame(channels, size or picture.size[::-1]).canvas(picture, partial(source.where, i)))
        if arrays[-1].shape != arrays[0].shape:
            raise ValueError(f"the images of {name} differ in size, and the network does not say which it takes")
    return torch.from_numpy(np.stack(arrays))


def held_out(
    pictures: Pictures, frame: Frame, count: int, classes: tuple[str, ...] = ()
) -> tuple[Tensor, Tensor | None]:
    """Load the first `count` pictures, cropped at the centre, and their labels as numbers of `classes`.

    Returns uint8 (N, C, H, W) and int64 (N,), or None for pictures without labels. Raises ValueError for a class that
    is not among `classes`.
    """
    unknown = sorted(set(pictures.classes) - set(classes)) if pictures.labels is not None else []
    if unknown:
        raise ValueError(f"{pictures.name} has classes that are not trained: {', '.join(unknown)}")
    centred = replace(frame, crop="center")
    images = torch.from_numpy(np.stack([centred.read(pictures, i) for i in range(min(count, pictures.count))]))
    if pictures.labels is None:
        return images, None
    order = np.array([classes.index(each) for each in pictures.classes])
    return images, torch.from_numpy(order[pictures.labels[: len(images)]])


def to_model(images: Tensor) -> Tensor:
    """Map uint8 0..255 to float32 −1..1, the range in which a network is trained."""
    return images.float() / 127.5 - 1
