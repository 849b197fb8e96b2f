"""Held-out pictures side by side in one file."""

import pytest
import torch
from pictures.strips import choose, read_strip, to_strip
from PIL import Image


def test_the_first_of_each_class_and_then_the_next():
    labels = [2, 2, 0, 2, 1, 0, 1]
    assert choose(labels, 5) == [2, 4, 0, 1, 3]
    assert choose(labels, 2) == [2, 4]
    assert choose(None, 3) == [0, 1, 2]
    assert choose(labels, 7) == [2, 4, 0, 1, 3, 5, 6]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_strip_is_read_as_it_was_written(channels, tmp_path):
    images = torch.randint(256, (5, channels, 4, 6), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    to_strip(images).save(tmp_path / "strip.png")
    with Image.open(tmp_path / "strip.png") as opened:
        assert (opened.size, opened.mode) == ((30, 4), "L" if channels == 1 else "RGB")
    assert torch.equal(read_strip(tmp_path / "strip.png", channels, (4, 6)), images)
    for size in ((4, 7), (5, 6)):
        with pytest.raises(ValueError, match=rf"strip.png is 30×4, no row of pictures of {size[1]}×{size[0]}"):
            read_strip(tmp_path / "strip.png", channels, size)
