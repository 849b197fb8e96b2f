"""Held-out pictures in one file: side by side, pixel by pixel, without gaps."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ddim_plugin.pipelines.images import MODES

HELD_OUT = "held-out.png"
"""Name of the file in the folder of a model."""


def choose(labels: Iterable[int] | None, count: int) -> list[int]:
    """Choose `count` pictures: the first of each class, in the order of classes, then the next of the set.

    Without labels they are the first of the set. A set of fewer pictures has fewer.
    """
    if labels is None:
        return list(range(count))
    first: dict[int, int] = {}
    for i, label in enumerate(labels):
        first.setdefault(int(label), i)
    chosen = [first[label] for label in sorted(first)][:count]
    total = 1 + max(first.values(), default=-1)
    rest = (i for i in range(total + count) if i not in chosen)
    return chosen + [next(rest) for _ in range(count - len(chosen))]


def to_strip(images: Tensor) -> Image.Image:
    """Put pictures, uint8 (N, C, H, W), side by side."""
    joined = torch.cat(list(images), dim=2).permute(1, 2, 0).numpy()
    return Image.fromarray(joined[..., 0] if joined.shape[2] == 1 else joined)


def read_strip(file: Path, channels: int, size: tuple[int, int]) -> Tensor:
    """Read the pictures of a strip, uint8 (N, C, H, W).

    Raises ValueError if the file holds no pictures of this size (H, W).
    """
    with Image.open(file) as opened:
        strip = np.asarray(opened.convert(MODES[channels]))
    height, width = size
    if strip.shape[0] != height or strip.shape[1] % width:
        raise ValueError(f"{file} is {strip.shape[1]}×{strip.shape[0]}, no row of pictures of {width}×{height}")
    found = torch.from_numpy(strip.copy()).view(height, -1, width, channels)
    return found.permute(1, 3, 0, 2).contiguous()
