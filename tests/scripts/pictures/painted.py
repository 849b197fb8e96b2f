"""Pictures that show their number."""

import numpy as np
from PIL import Image


def picture(i, size=(8, 8), mode="RGB"):
    """A picture (width, height) that tells its number by its red, or its gray."""
    rng = np.random.default_rng(i)
    array = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    array[..., 0] = i
    return Image.fromarray(array).convert(mode) if mode != "L" else Image.fromarray(array[..., 0])


def numbers(batch):
    """Which pictures are in a batch."""
    return batch[:, 0].flatten(1).float().mean(1).round().int().tolist()
