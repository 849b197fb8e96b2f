"""Images for a network, checked, and grids of images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

Images = Any
"""A PIL image, an array (H, W), (H, W, C) or (B, H, W, C), a tensor (C, H, W) or (B, C, H, W), or a list of those."""

MODES = {1: "L", 3: "RGB"}
"""Modes of PIL images by their number of channels."""

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
"""Endings of the names of image files."""


def read(images: Images, channels: int, size: tuple[int, int] | None) -> Tensor:
    """Convert images to (B, C, H, W) in −1..1, in float32, or float64 if they are.

    Images are bytes (uint8), or floating-point numbers in [0, 1]. `size` is (H, W), or None for any. Raises ValueError
    naming the first image of another shape, mode, type or range.
    """
    many = images if isinstance(images, list | tuple) else [images]
    if not many:
        raise ValueError("an empty list of images: give at least one")
    batch = [_read(image, channels, f"image {i}" if len(many) > 1 else "the image") for i, image in enumerate(many)]
    for i, x in enumerate(batch):
        if x.shape[2:] != (size or batch[0].shape[2:]):
            wanted = size or tuple(batch[0].shape[2:])
            raise ValueError(
                f"image {i} is {x.shape[2]}×{x.shape[3]} (height × width), not {wanted[0]}×{wanted[1]} as the "
                f"{'network' if size else 'first'} is: crop or resize it, e.g. image.resize({(wanted[1], wanted[0])})"
            )
    return torch.cat(batch) * 2 - 1


def _read(image: Any, channels: int, name: str) -> Tensor:
    """Convert one entry of a list to (B, C, H, W) in [0, 1]."""
    if isinstance(image, Image.Image):
        mode = MODES.get(channels)
        if image.mode != mode:
            convert = f'image.convert("{mode}")' if mode else f"pass a tensor with {channels} channels"
            remedy = "scale it to 0..255 first" if _is_deep(image) else convert
            raise ValueError(f"{name} has mode {image.mode!r}; this network takes {channels} channels: {remedy}")
        image = np.asarray(image)
    if isinstance(image, np.ndarray):
        array = image[..., None] if image.ndim == 2 else image
        if array.ndim not in (3, 4) or array.shape[-1] != channels:
            shapes = f"(H, W, {channels}) or (B, H, W, {channels})" + (", or (H, W)" if channels == 1 else "")
            raise ValueError(f"{name} has shape {image.shape}: an array must be {shapes} for this network")
        if array.dtype.kind not in "uif":
            raise ValueError(_wrong_type(name, array.dtype))
        if array.dtype.itemsize > 8:  # torch has no longer numbers
            array = array.astype(np.float64)
        native = np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
        x = torch.from_numpy(native if native.ndim == 4 else native[None]).permute(0, 3, 1, 2)
    elif isinstance(image, Tensor):
        x = image if image.ndim == 4 else image[None]
        if x.ndim != 4 or x.shape[1] != channels:
            shapes = f"({channels}, H, W) or (B, {channels}, H, W)"
            raise ValueError(f"{name} has shape {tuple(image.shape)}: a tensor must be {shapes} for this network")
    else:
        raise ValueError(f"{name} must be a PIL image, an array or a tensor, not {type(image).__name__}")
    if x.numel() == 0:
        raise ValueError(f"{name} is empty: its shape is {tuple(image.shape)}")
    if x.dtype == torch.uint8:
        return x.float() / 255
    if not x.is_floating_point():
        raise ValueError(_wrong_type(name, x.dtype))
    x = x if x.dtype == torch.float64 else x.float()
    low, high = float(x.min()), float(x.max())
    if not (low >= 0 and high <= 1):
        remedy = "; pass (image + 1)/2" if low >= -1.001 and high <= 1.001 else ""
        raise ValueError(f"{name} lies in [{low:g}, {high:g}]: floating-point images must lie in [0, 1]{remedy}")
    return x


def _wrong_type(name: str, dtype: Any) -> str:
    return f"{name} is of type {dtype}: pass bytes (uint8), or floating-point numbers in [0, 1]"


def _is_deep(image: Image.Image) -> bool:
    return image.mode.startswith(("I", "F"))


def image_files(folder: str | Path) -> list[str]:
    """List the image files in a folder, by name. Raises ValueError if it has none."""
    found = sorted(str(file) for file in Path(folder).iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
    if not found:
        raise ValueError(f"there is no image in {folder}: it needs files such as .png or .jpg")
    return found


def open_image(
    file: str | Path, channels: int, size: tuple[int, int] | None, resize: bool = False, hint: str = ""
) -> Image.Image:
    """Open an image file for a network, upright according to its EXIF; other arguments as in `fit`."""
    try:
        with Image.open(file) as opened:
            opened.load()
            image = ImageOps.exif_transpose(opened)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read the image {file}: {error}") from error
    return fit(image, channels, size, resize, str(file), hint)


def fit(
    image: Image.Image, channels: int, size: tuple[int, int] | None, resize: bool, name: str, hint: str = ""
) -> Image.Image:
    """Convert a PIL image to the mode of a network, and to its size (H, W), if given.

    `resize` crops and resizes (Lanczos) an image of another size, which is otherwise refused with `hint`. Raises
    ValueError with `name`, also for more than 8 bits and for transparency.
    """
    mode = check_channels(channels)
    if _is_deep(image):
        raise ValueError(f"{name} has mode {image.mode!r}, more than 8 bits: scale it to 0..255 first")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        raise ValueError(f"{name} has transparency, which the network cannot use: put it on a background")
    image = image.convert(mode)
    if size is not None and image.size != size[::-1]:
        if not resize:
            raise ValueError(
                f"{name} is {image.width}×{image.height}, the network takes {size[1]}×{size[0]} (width × height): "
                f"crop and resize it{hint}"
            )
        image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.LANCZOS)
    return image


def check_channels(channels: int) -> str:
    """Return the mode of images with this many channels, or raise ValueError if there is none."""
    if channels not in MODES:
        raise ValueError(f"the network takes {channels} channels: pictures have 1 or 3")
    return MODES[channels]


def grid(rows: Sequence[np.ndarray], labels: Sequence[str] = (), title: str = "", cell: int = 64) -> Image.Image:
    """Draw rows of pictures (N, H, W, C) in [0, 1], each with its label on the left.

    Pictures are enlarged by a whole factor to about `cell` pixels. Labels are in ASCII; Pillow's font has no Greek.
    """
    labels = labels or [""] * len(rows)
    check_channels(rows[0].shape[-1])
    scale = max(1, round(cell / rows[0].shape[1]))
    height, width = rows[0].shape[1] * scale, rows[0].shape[2] * scale
    gap, columns = max(2, scale // 2), max(len(row) for row in rows)
    points = max(11, min(16, height // 2))
    font = ImageFont.load_default(size=points)
    margin = gap + int(max((font.getlength(label) + 2 * gap for label in labels if label), default=0))
    top = 2 * points if title else gap
    size = (margin + columns * (width + gap), top + len(rows) * (height + gap))
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    if title:
        draw.text((gap, points // 2), title, fill="black", font=font)
    for i, (row, label) in enumerate(zip(rows, labels, strict=True)):
        y = top + i * (height + gap)
        draw.text((gap, y + height // 2), label, fill="black", font=font, anchor="lm")
        for j, picture in enumerate(row):
            pixels = Image.fromarray((picture.repeat(3 // picture.shape[-1], axis=-1) * 255).round().astype(np.uint8))
            pixels = pixels.resize((width, height), Image.Resampling.BICUBIC)
            canvas.paste(pixels, (margin + j * (width + gap), y))
    return canvas
