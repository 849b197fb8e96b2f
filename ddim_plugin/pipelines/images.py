"""Images for a network, checked, and grids of images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils import load_image, numpy_to_pil
from PIL import Image, ImageDraw, ImageFont, ImageOps
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
    if isinstance(image, Image.Image):
        image = np.asarray(fit(image, channels, None, name))
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
    mode = check_channels(channels)
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"{name} has mode {image.mode!r}, more than 8 bits: scale it to 0..255 first")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getextrema()[3][0] < 255:
            raise ValueError(f"{name} has transparency, which the network cannot use: put it on a background")
    image = image.convert(mode)
    resized = size is not None and image.size != size[::-1]
    return ImageOps.fit(image, size[::-1], Image.Resampling.LANCZOS) if resized else image


def check_channels(channels: int) -> str:
    """Return the mode of images with this many channels, or raise ValueError if there is none."""
    if channels not in MODES:
        raise ValueError(f"the network takes {channels} channels: pictures have 1 or 3")
    return MODES[channels]


def grid(rows: Sequence[np.ndarray], labels: Sequence[str] = (), title: str = "", cell: int = 64) -> Image.Image:
    """Draw rows of pictures (N, H, W, C) in [0, 1], each with its label, in ASCII, on the left."""
    check_channels(rows[0].shape[-1])
    scale = max(1, round(cell / rows[0].shape[1]))
    height, width = (scale * side for side in rows[0].shape[1:3])
    gap, points = max(2, scale // 2), max(11, min(16, height // 2))
    font = ImageFont.load_default(size=points)
    margin = gap + int(max((font.getlength(label) + 2 * gap for label in labels if label), default=0))
    top = 2 * points if title else gap
    size = margin + max(map(len, rows)) * (width + gap), top + len(rows) * (height + gap)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((gap, points // 2), title, fill="black", font=font)
    for y, row, label in zip(range(top, size[1], height + gap), rows, labels or [""] * len(rows), strict=True):
        draw.text((gap, y + height // 2), label, fill="black", font=font, anchor="lm")
        for x, picture in zip(range(margin, size[0], width + gap), numpy_to_pil(row), strict=False):
            canvas.paste(picture.resize((width, height), Image.Resampling.BICUBIC), (x, y))
    return canvas
