"""Predictions as linear maps: that they agree, and what they refuse."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddim_plugin.process import predictions as p


@given(st.floats(1e-4, 1 - 1e-4), st.floats(-2, 2), st.floats(-2, 2))
def test_the_three_predictions_say_the_same(alpha_bar, x0, eps):
    x = math.sqrt(alpha_bar) * x0 + math.sqrt(1 - alpha_bar) * eps
    v = math.sqrt(alpha_bar) * eps - math.sqrt(1 - alpha_bar) * x0
    for kind, output in (("epsilon", eps), ("sample", x0), ("v_prediction", v)):
        m = p.prediction(kind, alpha_bar)
        assert m.x0_x * x + m.x0_out * output == pytest.approx(x0, abs=1e-9)
        assert m.eps_x * x + m.eps_out * output == pytest.approx(eps, abs=1e-9)


def test_impossible_predictions():
    with pytest.raises(ValueError, match="'epsilon' divides by zero at ᾱ = 0"):
        p.prediction("epsilon", 0.0)
    with pytest.raises(ValueError, match="'sample' gives no ε̂ at ᾱ = 1"):
        p.prediction("sample", 1.0)
    with pytest.raises(ValueError, match="unknown prediction_type 'score': use one of epsilon, sample, v_prediction"):
        p.prediction("score", 0.5)
