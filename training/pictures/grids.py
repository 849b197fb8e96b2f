"""Grids of pictures with labels."""

from collections.abc import Sequence

import numpy as np
from diffusers.utils import numpy_to_pil
from PIL import Image, ImageDraw, ImageFont

from ddim_plugin.pipelines.images import check_channels


def grid(
    rows: Sequence[np.ndarray],
    labels: Sequence[str] = (),
    title: str = "",
    cell: int = 64,
    points: int | None = None,
    above: bool = False,
) -> Image.Image:
    """Draw rows of pictures (N, H, W, C) in [0, 1], each with its label, in ASCII.

    Args:
        cell: about the height of a picture, a whole multiple of its own, in pixels.
        points: size of the text in pixels; by default 11 to 16.
        above: whether labels are above their rows, not on the left.
    """
    check_channels(rows[0].shape[-1])
    scale = max(1, round(cell / rows[0].shape[1]))
    height, width = (scale * side for side in rows[0].shape[1:3])
    gap, points = max(2, scale // 2), points or max(11, min(16, height // 2))
    font = ImageFont.load_default(size=points)
    widest = int(max((font.getlength(label) + 2 * gap for label in labels if label), default=0))
    margin, head = (gap, 3 * points // 2) if above else (gap + widest, 0)
    top = 2 * points if title else gap
    size = margin + max(map(len, rows)) * (width + gap), top + len(rows) * (head + height + gap)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((gap, points // 2), title, fill="black", font=font)
    ys = range(top + head, size[1], head + height + gap)
    for y, row, label in zip(ys, rows, labels or [""] * len(rows), strict=True):
        draw.text((gap, y - head // 2 if above else y + height // 2), label, fill="black", font=font, anchor="lm")
        for x, picture in zip(range(margin, size[0], width + gap), numpy_to_pil(row), strict=False):
            canvas.paste(picture.resize((width, height), Image.Resampling.BICUBIC), (x, y))
    return canvas
