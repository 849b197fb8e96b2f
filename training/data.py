"""Data sets: images as uint8 tensors (N, C, H, W)."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ddim_plugin.images import fit, image_files, open_image

HELD_OUT = 297
"""How many of the 1797 digits, the last ones, are the test split."""

FILES = {".parquet": "parquet", ".arrow": "arrow"}


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

    `name` is "digits", a folder of images, a .parquet or .arrow file, or the id of a data set on the Hub, of which
    `split` is read. Raises ValueError for a set that is not there or holds no images, and for an unknown split.
    """
    if name != "digits" and Path(name).is_dir():
        pictures = [open_image(file, channels, size, resize=True) for file in image_files(name)[:count]]
    else:
        if name == "digits":
            raw = [Image.fromarray(image.numpy()) for image in load(name, split)[0][:count, 0]]
        else:
            rows = _open(name, split)
            raw = rows.select(range(min(count, len(rows))))[_image_column(rows, name)]
        pictures = [fit(picture, channels, size, True, f"image {i} of {name}") for i, picture in enumerate(raw)]
    arrays = []
    for picture in pictures:
        arrays.append(np.asarray(picture).reshape(*picture.size[::-1], channels))
        if arrays[-1].shape != arrays[0].shape:
            raise ValueError(f"the images of {name} differ in size, and the network does not say which it takes")
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def _open(name: str, split: str) -> Any:
    """The rows of a file or of a data set on the Hub, by the `datasets` library."""
    import datasets

    path = Path(name)
    if path.is_file():
        if path.suffix not in FILES:
            raise ValueError(f"{name} is no data set: use a folder of images, or a {' or '.join(FILES)} file")
        settings = {"path": FILES[path.suffix], "data_files": name, "split": "train"}
    elif path.suffix in FILES or path.is_absolute() or name.startswith("."):
        raise ValueError(f"there is no file {name}")
    else:
        settings = {"path": name, "split": split}
    try:
        return datasets.load_dataset(**settings)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise ValueError(f"cannot read the data set {name}: {error}") from error


def _image_column(rows: Any, name: str) -> str:
    import datasets

    for column, kind in rows.features.items():
        if isinstance(kind, datasets.Image):
            return column
    raise ValueError(f"{name} has no column of images: its columns are {', '.join(rows.features)}")


def to_model(images: Tensor) -> Tensor:
    """uint8 0..255 → float32 −1..1, the range a network is trained in."""
    return images.float() / 127.5 - 1
