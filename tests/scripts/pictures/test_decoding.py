"""Pictures by content: transparency, bits, gray sets and files that cannot be read."""

import struct
import zlib

import datasets
import numpy as np
import pytest
from painted import picture
from pictures import Frame, find_frame, in_memory, load_images, open_pictures, open_stream
from PIL import Image


def deep_png(path, value, channels=3):
    """Write a picture of one value with 16 bits a channel, which Pillow reads and does not write."""
    rows = b"".join(b"\0" + np.full((4, channels), value, ">u2").tobytes() for _ in range(4))
    head = struct.pack(">IIBBBBB", 4, 4, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


RED, GRAY = Image.new("RGB", (4, 4), (200, 0, 0)), Image.new("L", (4, 4), 200)
PALETTE = RED.quantize(4)
TRANSPARENCY = {  # a picture of one colour, how it is saved, and how it is saved to be transparent
    "RGBA": (RED.convert("RGBA"), {}, Image.new("RGBA", (4, 4), (200, 0, 0, 0)), {}),
    "LA": (GRAY.convert("LA"), {}, Image.new("LA", (4, 4), (200, 0)), {}),
    "P": (PALETTE, {"transparency": 1 - PALETTE.getpixel((0, 0))}, PALETTE, {"transparency": PALETTE.getpixel((0, 0))}),
    "RGB": (RED, {"transparency": (1, 2, 3)}, RED, {"transparency": (200, 0, 0)}),
    "L": (GRAY, {"transparency": 7}, GRAY, {"transparency": 200}),
}


@pytest.mark.parametrize("mode", TRANSPARENCY)
def test_transparency_is_judged_by_content(tmp_path, mode):
    """Of channels, palettes and single colours; opaque pictures give their colours, others need a background."""
    opaque, known, clear, marks = TRANSPARENCY[mode]
    opaque.save(tmp_path / "0.png", **known)
    found = open_pictures(str(tmp_path))
    gray = mode in ("LA", "L")
    assert found.first().convert("RGB").getpixel((0, 0)) == ((200, 200, 200) if gray else (200, 0, 0))
    assert find_frame(found, None, None).channels == (1 if gray else 3)
    clear.save(tmp_path / "0.png", **marks)
    with pytest.raises(ValueError, match=r"0\.png\) has transparency: pass --background COLOUR"):
        found.first()
    behind = open_pictures(str(tmp_path), background="#ffffff").first()
    assert (behind.mode, behind.getpixel((0, 0))) == (("L", 255) if gray else ("RGB", (255, 255, 255)))
    assert open_pictures(str(tmp_path), background="red").first().getpixel((0, 0)) == (255, 0, 0)


def test_rows_and_streams_have_a_background_too(tmp_path):
    clear = Image.new("RGBA", (4, 4), (1, 2, 3, 0))
    rows = datasets.Dataset.from_dict({"image": [clear]}).cast_column("image", datasets.Image())
    rows.to_parquet(tmp_path / "a.parquet")
    for opened in (open_pictures, open_stream):
        with pytest.raises(ValueError, match="--background"):
            opened(str(tmp_path / "a.parquet")).first()
        assert opened(str(tmp_path / "a.parquet"), background="black").first().getpixel((0, 0)) == (0, 0, 0)
    assert load_images(str(tmp_path / "a.parquet"), None, 3, None, 1, background="lime")[0, :, 0, 0].tolist() == [
        0,
        255,
        0,
    ]
    for colour in ("octarine", "#12345678"):
        with pytest.raises(ValueError, match=f"background '{colour}'"):
            open_pictures("digits", background=colour)


def test_bits_in_sixteen_are_asked_for(tmp_path):
    """A gray picture names its bits, a colour one asks for a conversion; a dark one is read if that is said."""
    Image.fromarray(np.full((4, 4), 4095, np.uint16)).save(tmp_path / "gray.png")
    name = str(tmp_path)
    with pytest.raises(ValueError, match=r"gray\.png\) .*values up to 4095 only: pass --bit_depth 12"):
        open_pictures(name).first()
    assert open_pictures(name, bit_depth=12).first().getpixel((0, 0)) == 255
    assert open_pictures(name, bit_depth=16).first().getpixel((0, 0)) == 16
    with pytest.raises(ValueError, match="values up to 4095, more than bit_depth=10"):
        open_pictures(name, bit_depth=10).first()
    for bits in (7, 17):
        with pytest.raises(ValueError, match=f"bit_depth must be in 8..16, not {bits}"):
            open_pictures(name, bit_depth=bits)
    for value in (0, 40_000):
        Image.fromarray(np.full((4, 4), value, np.uint16)).save(tmp_path / "gray.png")
        assert open_pictures(name).first().getpixel((0, 0)) == round(value / 257)
    Image.fromarray(np.full((4, 4), 255, np.uint16)).save(tmp_path / "gray.png")
    with pytest.raises(ValueError, match="pass --bit_depth 8"):
        open_pictures(name).first()


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_colours_of_twelve_bits_are_refused(tmp_path, channels):
    deep_png(tmp_path / "deep.png", 4095, channels)
    settings = {"background": "black"} if channels in (2, 4) else {}
    with pytest.raises(ValueError, match=r"deep\.png\) .*--bit_depth"):
        open_pictures(str(tmp_path), **settings).first()
    deep_png(tmp_path / "deep.png", 65535, channels)
    assert np.asarray(open_pictures(str(tmp_path)).first()).min() == 255


def test_one_gray_picture_makes_no_set_gray(tmp_path):
    for i in range(6):
        picture(i, mode="L" if i == 0 else "RGB").save(tmp_path / f"{i}.png")
    name = str(tmp_path)
    assert find_frame(open_pictures(name), None, None).channels == 3
    assert find_frame(open_pictures(name), 1, None).channels == 1
    for i in range(1, 6):
        picture(i, mode="LA" if i == 1 else "1" if i == 2 else "L").save(tmp_path / f"{i}.png")
    assert find_frame(open_pictures(name), None, None).channels == 1
    picture(5).save(tmp_path / "5.png")
    assert find_frame(open_pictures(name), None, None).channels == 3
    rows = [picture(i, mode="L" if i < 9 else "RGB") for i in range(10)]
    datasets.Dataset.from_dict({"image": rows}).cast_column("image", datasets.Image()).to_parquet(
        tmp_path / "a.parquet"
    )
    for opened in (open_pictures, open_stream):
        assert find_frame(opened(str(tmp_path / "a.parquet")), None, (8, 8)).channels == 3


def test_a_colour_picture_that_was_not_looked_at_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("pictures.sources.LOOKED_AT", 2)
    for i in range(4):
        picture(i, mode="RGB" if i == 1 else "L").save(tmp_path / f"{i}.png")
    found = open_pictures(str(tmp_path))
    frame = find_frame(found, None, None)
    assert frame.channels == 1
    with pytest.raises(ValueError, match=r"1\.png\) has colours, unlike the others .*--channels"):
        in_memory(found, frame, False, 2, True)
    assert in_memory(found, find_frame(found, 1, None), False, 2, True).shape == (4, 1, 8, 8)
    assert in_memory(found, Frame(3, (8, 8)), False, 2, True).shape == (4, 3, 8, 8)


@pytest.mark.parametrize("damage", ["text", "empty", "cut", "bad chunk", "cut gif", "cut jpeg", "cut tiff"])
def test_files_that_cannot_be_read_are_named(tmp_path, damage):
    kind = {"gif": "gif", "jpeg": "jpg", "tiff": "tif"}.get(damage.split()[-1], "png")
    picture(1, (64, 64)).save(tmp_path / f"bad.{kind}")
    data = (tmp_path / f"bad.{kind}").read_bytes()
    changed = {"text": b"hello", "empty": b"", "bad chunk": data[:60] + b"\xff" * 40 + data[100:]}.get(
        damage, data[:-900]
    )
    (tmp_path / f"bad.{kind}").write_bytes(changed)
    with pytest.raises(ValueError, match=rf"cannot read .*bad\.{kind}"):
        open_pictures(str(tmp_path)).first()
