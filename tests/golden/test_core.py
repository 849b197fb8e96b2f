"""The schedulers compute what version 0.1 computed: timesteps, x_s, x̂0, ε̂, mean and deviation."""

from pathlib import Path

import numpy as np
import pytest
from freeze_core import CASES, distance, frozen, run

FROZEN = frozen(Path(__file__).parent / "frozen" / "core.npz")


def test_every_case_is_frozen():
    assert list(FROZEN) == list(CASES)


@pytest.mark.parametrize("name", CASES)
def test_the_schedulers_compute_what_version_0_1_did(name):
    times, values = run(CASES[name])
    assert np.array_equal(times, FROZEN[name][0])
    assert values.shape == FROZEN[name][1].shape
    assert np.isfinite(values).all()
    assert distance(values, FROZEN[name][1]) < 1e-12
