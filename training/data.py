"""Data sets: images as uint8 tensors (N, C, H, W)."""

import torch
from torch import Tensor

HELD_OUT = 297
"""How many of the 1797 digits, the last ones, are the test split."""

SETS = ("digits",)


def load(name: str, split: str = "train") -> tuple[Tensor, Tensor]:
    """(images, labels) of a data set: uint8 (N, C, H, W) and int64 (N,).

    "digits" is scikit-learn's copy of the UCI optical digits, 8×8 grayscale, which needs no download.
    Raises ValueError for an unknown name or split.
    """
    if name not in SETS:
        raise ValueError(f"unknown data set {name!r}: use one of {', '.join(SETS)}")
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}: use train or test")
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images * (255 / 16)).round().to(torch.uint8)[:, None]
    labels = torch.tensor(digits.target, dtype=torch.int64)
    part = slice(None, -HELD_OUT) if split == "train" else slice(-HELD_OUT, None)
    return images[part], labels[part]


def to_model(images: Tensor) -> Tensor:
    """uint8 0..255 → float32 −1..1, the range a network is trained in."""
    return images.float() / 127.5 - 1
