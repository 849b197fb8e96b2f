"""Images on their way into a network: what is taken, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from ddim_plugin.pipelines.images import grid, open_image, read

RNG = np.random.default_rng(0)
GRAY = RNG.integers(0, 256, (8, 6), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (8, 6, 3), dtype=np.uint8)
AS_TENSOR = torch.from_numpy(COLOUR).permute(2, 0, 1)


@pytest.mark.parametrize(
    ("image", "channels"),
    [
        (Image.fromarray(GRAY), 1),
        (GRAY, 1),
        (GRAY[..., None], 1),
        (GRAY[None, ..., None], 1),
        (GRAY / 255, 1),
        (torch.from_numpy(GRAY)[None], 1),
        ([Image.fromarray(GRAY)], 1),
        (Image.fromarray(COLOUR), 3),
        (Image.fromarray(COLOUR).convert("RGBA"), 3),
        (Image.fromarray(GRAY).convert("LA"), 1),
        (COLOUR, 3),
        (COLOUR[None].astype(np.float32) / 255, 3),
        (np.asfortranarray(COLOUR[::-1, ::-1] / 255)[::-1, ::-1], 3),
        (AS_TENSOR, 3),
        (AS_TENSOR[None], 3),
        (AS_TENSOR.float() / 255, 3),
        (AS_TENSOR.double() / 255, 3),
        ((AS_TENSOR,), 3),
    ],
)
def test_all_kinds_are_the_same_image(image, channels):
    made = read(image, channels, (8, 6))
    expected = torch.from_numpy(GRAY)[None, None] if channels == 1 else AS_TENSOR[None]
    assert made.shape == (1, channels, 8, 6)
    assert made.dtype in (torch.float32, torch.float64)
    assert torch.allclose(made.double(), expected.double() / 127.5 - 1, atol=1e-6)


def test_lists_and_batches():
    mixed = [Image.fromarray(COLOUR), COLOUR[None].repeat(2, 0), AS_TENSOR.float() / 255]
    assert read(mixed, 3, None).shape == (4, 3, 8, 6)
    assert torch.equal(read(Image.fromarray(GRAY), 3, None), read(GRAY, 1, None).expand(1, 3, 8, 6))
    assert read(torch.rand(5, 2, 4, 4), 2, (4, 4)).shape == (5, 2, 4, 4)
    half = read(torch.rand(1, 3, 4, 4).half(), 3, None)
    assert half.dtype == torch.float32


@pytest.mark.parametrize(
    ("image", "channels", "size", "message"),
    [
        ([], 3, None, "an empty list of images"),
        (torch.zeros(0, 3, 4, 4), 3, None, r"has shape \(0, 3, 4, 4\)"),
        ("cat.png", 3, None, "must be a PIL image, an array or a tensor, not str"),
        ([COLOUR, Image.new("RGBA", (6, 8))], 3, None, "image 1 has transparency"),
        (Image.new("RGB", (6, 8)), 4, None, "the network takes 4 channels: pictures have 1 or 3"),
        (AS_TENSOR.float(), 3, None, r"floating-point images must lie in \[0, 1\]"),
        (AS_TENSOR / 127.5 - 1, 3, None, r"must lie in \[0, 1\]"),
        (torch.full((3, 4, 4), float("nan")), 3, None, r"lies in \[nan, nan\]"),
        (AS_TENSOR.int(), 3, None, "of type torch.int32: pass bytes"),
        (Image.fromarray(GRAY.astype(np.uint16)), 1, None, r"mode 'I;16'.*scale it to 0..255 first"),
        (Image.new("F", (6, 8)), 1, None, "scale it to 0..255 first"),
        (np.zeros((8, 6, 3), complex), 3, None, "is of type torch.complex128: pass bytes"),
        (GRAY.astype(np.uint16), 1, None, "is of type torch.uint16: pass bytes"),
        (AS_TENSOR, 1, None, r"pass a tensor \(1, H, W\) or an array \(H, W, 1\), or a batch"),
        (COLOUR.transpose(2, 0, 1), 3, None, r"shape \(6, 3, 8\), channels first: pass a tensor"),
        (COLOUR, 3, (6, 8), r"is 8×6 .* not 6×8 as the network is: .*resize\(\(8, 6\)\)"),
        ([COLOUR, COLOUR[:4]], 3, None, "image 1 is 4×6 .* as the first is"),
    ],
)
def test_what_is_refused(image, channels, size, message):
    with pytest.raises(ValueError, match=message):
        read(image, channels, size)


def test_files(tmp_path):
    """Upright, in the network's mode, and of its size."""
    turned = Image.fromarray(COLOUR).transpose(Image.Transpose.ROTATE_90)
    exif = turned.getexif()
    exif[274] = 6  # the camera was turned
    turned.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(np.asarray(open_image(tmp_path / "turned.png", 3, (8, 6))), COLOUR)
    assert open_image(tmp_path / "turned.png", 1, (8, 6)).mode == "L"
    assert open_image(tmp_path / "turned.png", 3, (4, 4)).size == (4, 4)
    Image.fromarray(GRAY).convert("P").save(tmp_path / "palette.png")
    assert open_image(tmp_path / "palette.png", 3, None).mode == "RGB"


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_judged_by_content(tmp_path, mode):
    """An opaque alpha channel is dropped; a transparent image is refused by its file's name."""
    opaque = Image.fromarray(COLOUR).convert(mode)
    used = opaque.getpixel((0, 0)) if mode == "P" else None
    absent = next(i for i in range(256) if i not in np.asarray(opaque)) if mode == "P" else None
    opaque.save(tmp_path / "opaque.png", **({} if absent is None else {"transparency": absent}))
    channels = 1 if mode == "LA" else 3
    seen = open_image(tmp_path / "opaque.png", channels, None)
    assert np.array_equal(np.asarray(seen), np.asarray(opaque.convert("L" if mode == "LA" else "RGB")))
    if mode != "P":
        opaque.putalpha(Image.fromarray(np.minimum(GRAY, 254)))
    opaque.save(tmp_path / "clear.png", **({} if used is None else {"transparency": used}))
    with pytest.raises(ValueError, match="clear.png has transparency, which the network cannot use"):
        open_image(tmp_path / "clear.png", channels, None)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid(channels):
    """Rows of pictures, enlarged by a whole factor, on white."""
    made = np.asarray(grid(RNG.random((3, 8, 6, channels)), 2))
    assert made.shape == (4 + 2 * 68, 4 + 2 * 52, 3)
    assert (made[72:, 56:] == 255).all()
    assert not (made[72:136, 4:52] == 255).all()
    assert grid(RNG.random((3, 8, 6, channels)), 8).size == (4 + 3 * 52, 4 + 68)
