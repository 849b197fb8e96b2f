"""Images for a network, checked, and grids of images."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils import load_image, make_image_grid, numpy_to_pil
from PIL import Image, ImageOps
from torch import Tensor

Images = Any  # a PIL image, an array (H, W), (H, W, C) or (B, H, W, C), a tensor (C, H, W) or (B, C, H, W), or a list
Size = tuple[int, int] | None  # (H, W), or None for any
MODES = {1: "L", 3: "RGB"}  # of PIL images, by the number of channels


def read(images: Images, channels: int, size: Size, low: float = -1.0, high: float = 1.0) -> Tensor:
    """Convert images, bytes or in [0, 1], to (B, C, H, W) from `low` to `high`, in float32, or float64 if they are.

    PIL images of other modes are converted. Raises ValueError naming the first image of another shape, type or range.
    """
    many = images if isinstance(images, list | tuple) else [images]
    if not many:
        raise ValueError("an empty list of images: give at least one")
    batch = [_read(image, channels, f"image {i}" if len(many) > 1 else "the image") for i, image in enumerate(many)]
    (H, W), other = size or batch[0].shape[2:], "network" if size else "first"
    for i, x in enumerate(batch):
        if x.shape[2:] != (H, W):
            sizes = f"{x.shape[2]}×{x.shape[3]} (height × width), not {H}×{W} as the {other} is"
            raise ValueError(f"image {i} is {sizes}: crop or resize it, e.g. image.resize({(W, H)})")
    return torch.cat(batch) * (high - low) + low


def _read(image: Any, channels: int, name: str) -> Tensor:
    image = np.asarray(fit(image, channels, None, name)) if isinstance(image, Image.Image) else image
    if isinstance(image, np.ndarray):
        x = torch.as_tensor(image.copy())
        image = x[None] if x.ndim == 2 else x.movedim(-1, -3) if x.ndim > 2 else x
    if not isinstance(image, Tensor):
        raise ValueError(f"{name} must be a PIL image, an array or a tensor, not {type(image).__name__}")
    if image.ndim not in (3, 4) or image.shape[-3] != channels or 0 in image.shape:
        forms = f"a tensor ({channels}, H, W) or an array (H, W, {channels}), or a batch of some"
        raise ValueError(f"{name} has shape {tuple(image.shape)}, channels first: pass {forms}")
    x = (image if image.ndim == 4 else image[None]).to(torch.promote_types(image.dtype, torch.float32))
    if image.dtype == torch.uint8:
        return x / 255
    if not image.is_floating_point():
        raise ValueError(f"{name} is of type {image.dtype}: pass bytes (uint8), or floating-point numbers in [0, 1]")
    if not (x.min() >= 0 and x.max() <= 1):
        raise ValueError(f"{name} lies in [{x.min():g}, {x.max():g}]: floating-point images must lie in [0, 1]")
    return x


def open_image(file: str | Path, channels: int, size: Size) -> Image.Image:
    """Open an image file for a network, upright according to its EXIF; other arguments as in `fit`."""
    try:
        image = load_image(str(file), lambda image: image)
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise ValueError(f"cannot read the image {file}: {error}") from error
    return fit(image, channels, size, str(file))


def fit(image: Image.Image, channels: int, size: Size, name: str) -> Image.Image:
    """Convert a PIL image to the mode of a network, and crop and resize it to a size (H, W), unless that is None.

    Raises ValueError with `name` for an image of more than 8 bits, or with transparency.
    """
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"{name} has mode {image.mode!r}, more than 8 bits: scale it to 0..255 first")
    if image.has_transparency_data and (image := image.convert("RGBA")).getextrema()[3][0] < 255:
        raise ValueError(f"{name} has transparency, which the network cannot use: put it on a background")
    image = image.convert(check_channels(channels))
    return image if size is None else ImageOps.fit(image, size[::-1], Image.Resampling.LANCZOS)


def check_channels(channels: int) -> str:
    """Return the mode of images with this many channels, or raise ValueError if there is none."""
    if channels not in MODES:
        raise ValueError(f"the network takes {channels} channels: pictures have 1 or 3")
    return MODES[channels]


def grid(pictures: np.ndarray, columns: int, cell: int = 64) -> Image.Image:
    """Draw pictures (N, H, W, C) in [0, 1] row by row, about `cell` pixels high or more."""
    scale = max(1, round(cell / pictures.shape[1]))
    gap, size = max(2, scale // 2), (scale * pictures.shape[2], scale * pictures.shape[1])
    made = [picture.resize(size, Image.Resampling.BICUBIC).convert("RGB") for picture in numpy_to_pil(pictures)]
    made = [ImageOps.expand(picture, (0, 0, gap, gap), "white") for picture in made]
    columns = min(columns, len(made))
    made += [Image.new("RGB", made[0].size, "white")] * (-len(made) % columns)
    return ImageOps.expand(make_image_grid(made, len(made) // columns, columns), (gap, gap, 0, 0), "white")
