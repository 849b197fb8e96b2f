"""Grids with labels."""

import numpy as np
from pictures.grids import grid

RNG = np.random.default_rng(0)


def test_a_grid_without_labels():
    rows = [RNG.random((3, 8, 8, 1)), RNG.random((2, 8, 8, 1))]
    plain, labelled = grid(rows), grid(rows, ["first", "second"], "title")
    assert labelled.width > plain.width
    assert labelled.height > plain.height
    assert plain.width < 3 * 80
