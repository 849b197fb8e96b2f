"""Paths: their levels, their times, and the timesteps at which networks are evaluated."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_paths import paths

from ddim_plugin.process import betas
from ddim_plugin.process.paths import (
    Level,
    Path,
    flow_matching,
    square_root,
    variance_exploding,
    variance_preserving,
)


@given(paths(max_T=200))
def test_a_path_begins_at_its_data_and_loses_signal(path):
    a, b = (np.asarray(each) for each in path.levels)
    assert a.shape == b.shape == (path.T + 1,)
    assert a.dtype == b.dtype == np.float64
    assert (np.diff(path.levels.ratio) > 0).all()
    for t in {0, 1, path.T // 2, path.T}:
        assert path.level(t) == pytest.approx((a[t], b[t]), rel=1e-12, abs=1e-15)
        assert all(isinstance(each, float) for each in path.level(t))
        assert path.level(t).ratio == pytest.approx(b[t] / a[t] if a[t] else math.inf)


@given(paths(max_T=200), st.data())
def test_times_and_timesteps_go_round(path, data):
    t = data.draw(st.integers(1, path.T))
    if path.T > 1:  # a single level of the exploding path has no logarithm to be placed on
        assert path.time(path.timestep(t)) == pytest.approx(t, rel=1e-9)


def test_a_table_is_evaluated_one_below_its_time():
    for path in (variance_preserving(betas.alpha_bar(betas.betas("linear"))), square_root(1000)):
        assert [path.timestep(t) for t in (1, 500, 1000)] == [0, 499, 999]
        assert [path.time(t) for t in (0, 499, 999)] == [1, 500, 1000]


@given(st.lists(st.floats(1e-5, 0.9), min_size=1, max_size=50))
def test_the_papers_path(values):
    alpha_bar = betas.alpha_bar(np.array(values))
    path = variance_preserving(alpha_bar)
    assert len(values) == path.T
    assert path.level(0) == (1.0, 0.0)
    for t in range(path.T + 1):
        a, b = path.level(t)
        assert a**2 == pytest.approx(alpha_bar[t], rel=1e-12)
        assert a**2 + b**2 == pytest.approx(1, rel=1e-12)
        assert path.level(t).ratio == pytest.approx(math.sqrt(1 / alpha_bar[t] - 1), rel=1e-6, abs=1e-7)


def test_zero_terminal_snr_ends_at_pure_noise():
    path = variance_preserving(betas.rescale_zero_terminal_snr(betas.alpha_bar(betas.betas("linear"))))
    assert path.level(1000) == (0.0, 1.0)
    assert path.level(1000).ratio == math.inf


@given(st.integers(1, 5000), st.floats(0, 1))
def test_flow_matching_is_a_straight_line_in_real_time(T, u):
    path, inverted = flow_matching(T), flow_matching(T, inverted=True)
    a, b = path.level(u * T)
    assert (a, b) == pytest.approx((1 - u, u), abs=1e-15)
    assert b / (a + b) == pytest.approx(path.level(u * T).noise)  # ς/(1 + ς) is σ
    assert path.timestep(u * T) == path.time(u * T) == u * T
    assert inverted.level(u * T) == path.level(u * T)
    assert inverted.timestep(u * T) == pytest.approx(T * (1 - u))
    assert inverted.time(inverted.timestep(u * T)) == pytest.approx(u * T, abs=1e-9)
    assert path.level(T) == (0.0, 1.0)
    assert path.level(0) == (1.0, 0.0)
    assert path.level(T).ratio == math.inf


@given(st.integers(2, 3000), st.floats(1e-3, 1), st.floats(1.5, 1e5), st.floats(0, 1))
def test_the_exploding_path_is_even_in_the_logarithm(T, sigma_min, factor, u):
    path, t = variance_exploding(T, sigma_min, sigma_min * factor), 1 + u * (T - 1)
    assert path.level(0) == (1.0, 0.0)
    assert path.level(1) == pytest.approx((1.0, sigma_min))
    assert path.level(T) == pytest.approx((1.0, sigma_min * factor))
    assert path.level(t).noise == path.timestep(t) == pytest.approx(sigma_min * factor**u, rel=1e-9)
    assert path.time(path.timestep(t)) == pytest.approx(t, rel=1e-9)


def test_the_levels_of_ncsnpp():
    """They are those of diffusers' scheduler, lowest first."""
    from diffusers import ScoreSdeVeScheduler

    stock = ScoreSdeVeScheduler(num_train_timesteps=2000, sigma_min=0.01, sigma_max=1348.0)
    path = variance_exploding(2000, 0.01, 1348.0)
    assert path.levels.noise[1:] == pytest.approx(stock.discrete_sigmas.double().numpy(), rel=1e-5)


def test_the_random_walk():
    path = square_root(9)
    assert [path.level(t) for t in (0, 1, 4, 9)] == [(1, 0), (1, 1), (1, 2), (1, 3)]


def test_a_path_of_ones_own():
    path = Path(Level(np.array([1.0, 0.8, 0.5]), np.array([0.0, 0.3, 2.0])))
    assert (path.T, path.level(2), path.timestep(2)) == (2, (0.5, 2.0), 1)
    assert path.level(2).ratio == 4
