"""Grids of images with a label for each row."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont


def grid(rows: Sequence[np.ndarray], labels: Sequence[str], title: str = "", cell: int = 64) -> Image.Image:
    """One row of pictures for each entry of `rows`, each (N, H, W, C) in [0, 1], with its label on the left.

    Pictures are enlarged by a whole factor to about `cell` pixels high, with a bicubic filter. Labels are in ASCII: the
    font that comes with Pillow has no Greek.
    """
    scale = max(1, round(cell / rows[0].shape[1]))
    height, width = rows[0].shape[1] * scale, rows[0].shape[2] * scale
    gap, columns = max(2, scale // 2), max(len(row) for row in rows)
    font = ImageFont.load_default(size=max(11, min(16, height // 2)))
    margin = int(max(font.getlength(label) for label in labels)) + 3 * gap
    top = 2 * font.size if title else gap
    size = (margin + columns * (width + gap), int(top) + len(rows) * (height + gap))
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    if title:
        draw.text((gap, font.size // 2), title, fill="black", font=font)
    for i, (row, label) in enumerate(zip(rows, labels, strict=True)):
        y = int(top) + i * (height + gap)
        draw.text((gap, y + height // 2), label, fill="black", font=font, anchor="lm")
        for j, picture in enumerate(row):
            pixels = Image.fromarray((picture.repeat(3 // picture.shape[-1], axis=-1) * 255).round().astype(np.uint8))
            enlarged = pixels.resize((width, height), Image.Resampling.BICUBIC)
            canvas.paste(enlarged, (margin + j * (width + gap), y))
    return canvas
