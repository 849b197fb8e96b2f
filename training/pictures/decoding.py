"""Decode pictures upright, to 8 bits a channel and without transparency. Errors name the picture."""

import dataclasses
import io
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
from PIL import Image, ImageColor

DARK = 1 / 4
"""Share of 16 bits that a picture must reach to count as one of 16 bits."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The settings of all programs that read pictures."""

    data_config: str | None = field(default=None, metadata={"help": "configuration (subset) of the data set"})
    image_column: str | None = field(
        default=None, metadata={"help": "column of the pictures; by default found by its type"}
    )
    background: str | None = field(
        default=None, metadata={"help": "colour behind transparent pictures, such as white or #808080"}
    )
    bit_depth: int | None = field(
        default=None, metadata={"help": "bits that pictures of more than 8 bits use, such as 12; by default 16"}
    )

    @property
    def reading(self) -> dict[str, Any]:
        """Return these settings as arguments of `open_pictures`."""
        return {each.name: getattr(self, each.name) for each in dataclasses.fields(Reading)}


def check_reading(background: str | None, bit_depth: int | None) -> None:
    """Raise ValueError for a colour that is unknown, or for impossible numbers of bits."""
    if background is not None:
        try:
            colour = ImageColor.getrgb(background)
        except ValueError as error:
            raise ValueError(f"unknown background {background!r}: use a colour such as white or #808080") from error
        if len(colour) > 3:
            raise ValueError(f"background {background!r} is transparent itself: use a colour such as white or #808080")
    if bit_depth is not None and not 8 <= bit_depth <= 16:
        raise ValueError(f"bit_depth must be in 8..16, not {bit_depth}")


def is_gray(mode: str) -> bool:
    """Test whether a mode of PIL has no colours."""
    return mode in ("1", "L", "LA", "La") or mode.startswith(("I", "F"))


def read_mode(value: Any, name: str) -> str:
    """Return the mode of the picture in a row. Reads its header only, if it is a file or bytes."""
    source = _source(value)
    if source is None:
        return decode(value, name).mode
    try:
        with Image.open(source) as opened:
            return opened.mode
    except Exception as error:
        raise _unreadable(value, name, error) from error


def decode(value: Any, name: str, background: str | None = None, bit_depth: int | None = None) -> Image.Image:
    """Decode the bytes or the path in a row. `name` and the path name it in errors.

    Raises ValueError for a picture that cannot be read, is transparent without a `background`, or seems to use fewer
    than its 16 bits without a `bit_depth`.
    """
    try:
        image = datasets.Image().decode_example(value)
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise _unreadable(value, name, error) from error
    if not isinstance(image, Image.Image):
        raise ValueError(f"cannot read {name}: its row holds no image, but {type(image).__name__}")
    title = name_of(value, name)
    if image.mode in ("RGB", "RGBA", "LA") and image.format in (None, "PNG", "TIFF"):
        _check_deep_colour(value, image, title, bit_depth)
    return flatten(to_8_bits(image, title, bit_depth), title, background)


def _source(value: Any) -> str | io.BytesIO | None:
    """Return the file or the bytes of the picture in a row, which Pillow can open; None if it is elsewhere."""
    data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (None, None)
    if data is not None:
        return io.BytesIO(data)
    return None if path is None or "://" in path else path


def name_of(value: Any, name: str) -> str:
    """Return the name of the picture in a row, with its path if the row has it."""
    path = value.get("path") if isinstance(value, dict) else None
    return f"{name} ({path})" if path else name


def _unreadable(value: Any, name: str, error: Exception) -> ValueError:
    return ValueError(f"cannot read {name_of(value, name)}: {error or type(error).__name__}")


def to_8_bits(image: Image.Image, name: str, bit_depth: int | None = None) -> Image.Image:
    """Scale a grayscale picture of more than 8 bits to 0..255; return any other unchanged.

    Its values use `bit_depth` bits. Without it they use 16, and a picture that reaches no quarter of that is refused.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"{name} has mode {image.mode!r}: pictures have 8 or 16 bits, from 0 up")
    highest, largest = int(values.max()), 2 ** (bit_depth or 16) - 1
    if highest > largest:
        raise ValueError(f"{name} has values up to {highest}, more than bit_depth={bit_depth} allows: raise it")
    if bit_depth is None and 0 < highest < DARK * 65536:
        bits = max(8, highest.bit_length())
        raise ValueError(
            f"{name} has 16 bits a pixel, but values up to {highest} only: pass --bit_depth {bits} if they use "
            f"{bits} bits, or --bit_depth 16 for a dark picture"
        )
    return Image.fromarray(np.round(values * (255 / largest)).astype(np.uint8))


def _check_deep_colour(value: Any, image: Image.Image, title: str, bit_depth: int | None) -> None:
    """Raise ValueError for colours of fewer than 16 bits in 16, of which Pillow reads the upper eight alone."""
    highest = max(high for _, high in image.getextrema()[: 1 if image.mode == "LA" else 3])
    if bit_depth == 16 or (bit_depth is None and highest >= DARK * 256):
        return
    source = _source(value)
    if source is None:
        return
    with Image.open(source) as opened:
        deep = any(";16" in str(tile[3]) for tile in opened.tile)
    if deep:
        raise ValueError(
            f"{title} has colours of 16 bits that may use fewer, as it is dark or bit_depth={bit_depth}: convert it to "
            "8 bits, or pass --bit_depth 16"
        )


def flatten(image: Image.Image, name: str, background: str | None) -> Image.Image:
    """Drop an opaque alpha channel, or put a transparent picture on a background.

    Raises ValueError for a transparent picture without a background.
    """
    if not image.has_transparency_data:
        return image
    rgba, gray = image.convert("RGBA"), is_gray(image.mode)
    if rgba.getextrema()[3][0] == 255:
        return rgba.convert("L" if gray else "RGB")
    if background is None:
        raise ValueError(f"{name} has transparency: pass --background COLOUR, such as white, or drop its alpha channel")
    colour = ImageColor.getrgb(background)
    behind = Image.new("RGBA", image.size, colour)
    behind.alpha_composite(rgba)
    return behind.convert("L" if gray and len(set(colour)) == 1 else "RGB")
