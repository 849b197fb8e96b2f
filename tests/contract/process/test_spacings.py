"""Subsequences of the timesteps: what they promise, and what they refuse."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddim_plugin.process import betas as schedules
from ddim_plugin.process import spacings as tau
from ddim_plugin.process.paths import square_root, variance_exploding

OF_ALPHA_BAR = ("few_steps", "few_steps_noise")
DISTINCT = ["linear", "quadratic", "leading", "trailing", "linspace", *OF_ALPHA_BAR]


@pytest.mark.parametrize("spacing", DISTINCT)
def test_exactly_S_distinct_times_for_every_S(spacing):
    for T in (1, 2, 3, 10, 37, 1000):
        alpha_bar = schedules.alpha_bar(schedules.betas("linear", T, 0.1 / T, min(20 / T, 0.999)))
        for S in range(1, T + 1):
            times = tau.tau(spacing, S, T, alpha_bar=alpha_bar)
            assert len(times) == S
            assert (np.diff(times) > 0).all()
            assert times[0] >= 1
            assert times[-1] <= T
            if spacing in ("linear", "quadratic", "trailing"):
                assert times[-1] == T


@given(st.integers(1, 5000), st.data())
def test_exactly_S_distinct_times_for_any_T(T, data):
    S = data.draw(st.integers(1, T))
    drops = data.draw(st.lists(st.floats(0, 1), min_size=T, max_size=T)) if T < 50 else np.full(T, 5.0 / T)
    alpha_bar = np.cumprod([1.0, *(1 - np.asarray(drops))])
    for spacing in DISTINCT:
        times = tau.tau(spacing, S, T, steps_offset=0, alpha_bar=alpha_bar)
        assert len(times) == S
        assert (np.diff(times) > 0).all()
        assert 1 <= times[0] <= times[-1] <= T


def test_linear_and_quadratic_are_the_appendix():
    """Appendix D.2: ⌊c·i⌋ and ⌊c·i²⌋ with the last element at T."""
    assert tau.tau("linear", 10, 1000).tolist() == [100 * i for i in range(1, 11)]
    assert tau.tau("linear", 3, 1000).tolist() == [333, 666, 1000]
    assert tau.tau("quadratic", 10, 1000).tolist() == [10 * i * i for i in range(1, 11)]
    assert tau.tau("quadratic", 100, 1000).tolist()[:12] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14]


@pytest.mark.parametrize("S", [1, 2, 3, 7, 10, 12, 20, 30, 50, 64, 100, 333, 999, 1000])
def test_paper_spacings_are_the_authors_code(S):
    """Their code counts from 0: range(0, 1000, 1000 // S), and int(u²) of u spaced evenly up to √800."""
    assert (tau.tau("paper_linear", S, 1000) - 1).tolist() == list(range(0, 1000, 1000 // S))
    quadratic = [int(u) for u in list(np.linspace(0, np.sqrt(1000 * 0.8), S) ** 2)]
    assert (tau.tau("paper_quadratic", S, 1000) - 1).tolist() == quadratic


def test_paper_spacings_overshoot_and_repeat():
    assert [len(tau.tau("paper_linear", S, 1000)) for S in (10, 12, 30)] == [10, 13, 31]
    assert [len(set(tau.tau("paper_quadratic", S, 1000).tolist())) for S in (50, 100)] == [49, 96]
    assert tau.tau("paper_linear", 10, 1000)[-1] == 901


@pytest.mark.parametrize(
    ("spacing", "expected"),
    [
        ("leading", [0, 142, 284, 426, 568, 710, 852]),
        ("trailing", [142, 285, 428, 570, 713, 856, 999]),
        ("linspace", [0, 166, 333, 500, 666, 832, 999]),
    ],
)
def test_diffusers_spacings_at_seven_steps(spacing, expected):
    assert (tau.tau(spacing, 7, 1000) - 1).tolist() == expected


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2", "scaled_linear"])
def test_few_steps_stays_inside(schedule):
    """From what falls as 1/S² above the data to two steps below T, or to where the sample is noise."""
    alpha_bar = schedules.alpha_bar(schedules.betas(schedule, 1000, 1e-4, 0.02))
    noise = int(np.flatnonzero(alpha_bar <= tau.NOISE)[0])
    assert alpha_bar[noise - 1] > tau.NOISE
    for S in (1, 2, 5, 7, 10, 20):
        for spacing in OF_ALPHA_BAR:
            times = tau.tau(spacing, S, 1000, alpha_bar=alpha_bar)
            assert times[-1] == max(noise, round(1000 * S / (S + 2)))
            bottom = {1: int(times[-1]), 2: 250, 5: 100, 7: 51, 10: 10, 20: 2}[S]
            assert times[0] == (bottom if spacing != "few_steps_noise" or S == 1 else min(125, 1000 / S))
    assert np.ptp(np.diff(tau.tau("few_steps_noise", 10, 1000, alpha_bar=alpha_bar))) <= 1
    times = tau.tau("few_steps", 10, 1000, alpha_bar=alpha_bar)
    log_snr = np.log(alpha_bar[times] / (1 - alpha_bar[times]))
    gaps = 0.55 * np.diff(times) / np.ptp(times) - 0.45 * np.diff(log_snr) / np.ptp(log_snr)
    assert np.allclose(gaps, 1 / 9, rtol=0.1)  # even in the mixture, but for rounding
    gaps = np.diff(tau.tau("few_steps", 7, 1000, alpha_bar=alpha_bar) ** 0.8)
    assert np.allclose(gaps[:-2], gaps[:-2].mean(), rtol=0.02)
    assert np.allclose(gaps[:-3:-1] / gaps[:-2].mean(), tau.FIRST_GAPS, atol=0.02)


def test_with_noise_the_bottom_falls_once_steps_are_many():
    for S, bottom in ((5, 125), (8, 125), (20, 50), (50, 20), (100, 10), (1000, 1)):
        times = tau.tau("few_steps_noise", S, 1000, alpha_bar=schedules.alpha_bar(schedules.betas("linear", 1000)))
        assert (len(times), times[0]) == (S, bottom)
    alpha_bar = schedules.alpha_bar(schedules.betas("linear", 4, 0.1, 0.5))
    assert tau.tau("few_steps_noise", 2, 4, alpha_bar=alpha_bar).tolist() == [1, 4]


@pytest.mark.parametrize("S", [8, 10, 20, 50, 200])
def test_many_sigmas_are_even_in_a_mixture(S):
    sigmas = np.array(tau.few_sigmas(S))
    assert (sigmas[0], sigmas[-1]) == pytest.approx((max(0.9, 1 - 0.5 / S), max(4 / S**2, 0.001)))
    log_snr = np.log(1 / sigmas - 1)
    gaps = 0.6 * np.diff(log_snr) / np.ptp(log_snr) - 0.4 * np.diff(sigmas) / np.ptp(sigmas)
    assert np.allclose(gaps, 1 / (S - 1), rtol=0.01)
    bottoms = [tau.few_sigmas(S, shifted=True)[-1], tau.few_sigmas(S, noisy=True)[-1], tau.few_sigmas(7)[-1]]
    assert bottoms == pytest.approx([0.25 / S, 1 / S, 0.5 / 7])


def test_offset_shifts_leading_only():
    assert (tau.tau("leading", 4, 1000, 1) - 1).tolist() == [1, 251, 501, 751]
    assert tau.tau("linear", 4, 1000, 1)[-1] == 1000


@pytest.mark.parametrize("S", [0, -1, 1001, 2.5, True, None, "10"])
def test_bad_step_counts(S):
    with pytest.raises(ValueError, match="num_inference_steps must be an integer from 1 to 1000"):
        tau.tau("linear", S, 1000)


@pytest.mark.parametrize("spacing", ["few_steps_power", "log_snr"])
def test_spacings_of_0_1_that_are_gone(spacing):
    with pytest.raises(ValueError, match=f"unknown timestep_spacing '{spacing}'"):
        tau.tau(spacing, 10, 1000, alpha_bar=np.linspace(1, 0, 1001))


def test_unknown_spacing_lists_the_known():
    with pytest.raises(ValueError, match=r"'cosine'.*linear, quadratic, leading, trailing, linspace, .*paper_linear"):
        tau.tau("cosine", 10, 1000)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([], r"a list of integers, not \[\]"),
        ([5, 5, 1], r"distinct, in descending order .*not \[5, 5, 1\]"),
        ([7, 1, 5], r"distinct, in descending order .*not \[7, 1, 5\]"),
        ([3, -1], r"timestep -1 is outside 0\.\.9"),
        ([10, 3], r"timestep 10 is outside 0\.\.9"),
        (5, "must be a list of integers, not 5"),
        ([2.5, 1], r"must be a list of integers, not \[2.5, 1\]"),
        ([True, 2], "must be a list of integers, not "),
    ],
)
def test_bad_explicit_times(times, message):
    with pytest.raises(ValueError, match=message):
        square_root(10).times(times)


def test_real_times_descend_within_their_bounds():
    """σ in float32 may be rounded beyond a bound."""
    rounded = float(np.float32(0.01)), float(np.float32(50.0))
    times = variance_exploding(10, 0.01, 50.0).times([50, 3.5, rounded[0]])
    assert times[[0, 2]] == pytest.approx([1, 10])
    assert variance_exploding(10, 0.01, 1.1).times([float(np.float32(1.1))]) == pytest.approx([10])


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([], "must be a list of numbers"),
        (5.0, "must be a list of numbers, not 5.0"),
        ([3.0, 5.0], r"distinct, in descending order .*not \[3.0, 5.0\]"),
        ([3.0, 3.0], r"distinct, in descending order .*not \[3.0, 3.0\]"),
        ([11.0, 3.0], r"timestep 11 is outside 1\.\.10"),
        ([3.0, 0.5], r"timestep 0\.5 is outside 1\.\.10"),
        ([float("nan")], r"timestep nan is outside 1\.\.10"),
        (["3"], "must be a list of numbers, not"),
    ],
)
def test_bad_real_times(times, message):
    with pytest.raises(ValueError, match=message):
        variance_exploding(10, 1, 10).times(times)
