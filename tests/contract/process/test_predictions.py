"""Predictions that divide by zero, and names that do not exist."""

import numpy as np
import pytest

from ddim_plugin.process import moves as p
from ddim_plugin.process.paths import Level, flow_matching, variance_preserving


def test_impossible_predictions():
    for level in (Level(0.0, 1.0), flow_matching(1000).level(1000), variance_preserving(np.array([1.0, 0.0])).level(1)):
        for kind in ("epsilon", "score"):
            with pytest.raises(
                ValueError, match=f"prediction_type='{kind}' divides by zero at .*: use timesteps below"
            ):
                p.prediction(kind, level)
    with pytest.raises(ValueError, match="'sample' divides by zero at the data"):
        p.prediction("sample", Level(1.0, 0.0))
    with pytest.raises(ValueError, match="unknown prediction_type 'noise': use one of epsilon, sample, v_prediction"):
        p.prediction("noise", Level(0.7, 0.7))
