"""What a network predicts: five linear maps that say the same, and the steps that are made of them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import outputs
from random_paths import chains, paths

from ddim_plugin.process import moves
from ddim_plugin.process import moves as p
from ddim_plugin.process.paths import Level, flow_matching, variance_exploding


@given(paths(), st.data(), st.floats(-2, 2), st.floats(-2, 2))
def test_the_five_predictions_say_the_same(path, data, x0, eps):
    level = path.level(data.draw(st.integers(1, path.T)))
    (a, b), given = level, outputs(level, x0, eps)
    assert given.keys() == {*p.PREDICTIONS} - {"edm"}
    x = a * x0 + b * eps
    for kind, output in given.items():
        if a == 0 and kind in ("epsilon", "score"):
            continue
        m = p.prediction(kind, level)
        assert m.x0_x * x + m.x0_out * output == pytest.approx(x0, rel=1e-9, abs=1e-13 * (1 + b / (a or 1)))
        assert m.eps_x * x + m.eps_out * output == pytest.approx(eps, rel=1e-9, abs=1e-13 * (1 + (1 + a) / b))


def test_v_and_the_flow_are_defined_at_both_ends():
    for level in (Level(0.0, 1.0), Level(1.0, 0.0)):
        for kind in ("v_prediction", "flow_prediction"):
            assert all(np.isfinite(p.prediction(kind, level)))
    assert p.prediction("flow_prediction", Level(0.0, 1.0)) == (1, -1, 1, 0)


@given(chains(), st.sampled_from(p.PREDICTIONS[:-1]), st.floats(-2, 2), st.floats(-2, 2))
def test_a_folded_step_is_the_step(chain, kind, x, output):
    path, steps, eta = chain
    for t, s in steps:
        if path.level(t).signal == 0 and kind in ("epsilon", "score"):
            continue
        m, move = p.prediction(kind, path.level(t)), moves.move(path, t, s, eta)
        of_x, of_output = p.fold(m, move)
        x0, eps = m.x0_x * x + m.x0_out * output, m.eps_x * x + m.eps_out * output
        size = abs(move.x0 * x0) + abs(move.eps * eps) + 1
        assert of_x * x + of_output * output == pytest.approx(move.x0 * x0 + move.eps * eps, abs=1e-11 * size)


@given(chains(), st.sampled_from(p.PREDICTIONS[:-1]), st.floats(-2, 2), st.floats(-2, 2))
def test_a_step_and_the_unfolded_step_are_the_identity(chain, kind, x, output):
    """For one output, unless the step hardly depends on x_t: then ε̂ is that of the lower level."""
    path, steps, _ = chain
    for t, s in steps:
        start, end = path.level(t), path.level(s)
        if start.signal == 0 and kind in ("epsilon", "score"):
            continue
        m, move = p.prediction(kind, start), moves.move(path, t, s)
        slope, _ = p.fold(m, move)
        if start.signal == 0 and slope == 0:
            with pytest.raises(ValueError, match=f"from time {t:g} to {s:g} does not depend on"):
                p.unfold(m, move)
            continue
        (a, b), (c, d) = p.fold(m, move), p.unfold(m, move)
        if abs(a) >= p.FLAT:
            below = a * x + b * output
            assert c * below + d * output == pytest.approx(x, rel=1e-9, abs=1e-9 * (1 + abs(d)))
        else:
            x_s = 0.3
            eps = m.eps_x * x_s + m.eps_out * output
            expected = start.signal * (x_s - end.noise * eps) / end.signal + start.noise * eps
            size = 1 + abs(eps) * (start.noise + end.noise / end.signal)
            assert c * x_s + d * output == pytest.approx(expected, abs=1e-11 * size)


@given(st.floats(0.001, 1), st.floats(0, 0.999), st.floats(-2, 2), st.floats(-2, 2))
def test_a_flow_step_is_a_step_of_euler(sigma, share, x, velocity):
    """x_s = x_t + (σ_s − σ_t)·(ε̂ − x̂0), whatever σ."""
    path = flow_matching(1)
    m, move = p.prediction("flow_prediction", path.level(sigma)), moves.move(path, sigma, share * sigma)
    a, b = p.fold(m, move)
    assert (a, b) == pytest.approx((1, share * sigma - sigma), rel=1e-12, abs=1e-15)


@given(st.integers(2, 50), st.data(), st.floats(-2, 2), st.floats(-2, 2))
def test_a_step_of_the_exploding_path_is_a_step_of_euler_in_sigma(T, data, x, score):
    """x_s = x_t + (σ_s − σ_t)·ε̂ with ε̂ = −σ_t·∇ln p."""
    path = variance_exploding(T, 0.01, 50.0)
    s, t = sorted(data.draw(st.sets(st.integers(0, T), min_size=2, max_size=2)))
    m, move = p.prediction("score", path.level(t)), moves.move(path, t, s)
    b, d = path.level(t).noise, path.level(s).noise
    assert p.fold(m, move) == pytest.approx((1, (b - d) * b), rel=1e-11)
