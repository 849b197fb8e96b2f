"""β schedules, subsequences and predictions: what they promise, and what they refuse."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddim_plugin.process import betas as schedules
from ddim_plugin.process import predictions as p
from ddim_plugin.process import spacings as tau

DISTINCT = ["linear", "quadratic", "leading", "trailing", "linspace", *tau.OF_ALPHA_BAR]


# ---- tau -------------------------------------------------------------------------------------------------------


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
    for S in (1, 2, 5, 10, 20):
        for spacing in tau.OF_ALPHA_BAR:
            times = tau.tau(spacing, S, 1000, alpha_bar=alpha_bar)
            assert times[-1] == max(noise, round(1000 * S / (S + 2)))
            bottom = {1: int(times[-1]), 2: 250, 5: 100, 10: 25, 20: 6}[S]
            assert times[0] == (bottom if spacing != "few_steps_noise" or S == 1 else min(125, 1000 / S))
    _, noisy, power, _ = (np.diff(tau.tau(name, 10, 1000, alpha_bar=alpha_bar)) for name in tau.OF_ALPHA_BAR)
    assert np.ptp(noisy) <= 1
    gaps = np.diff(tau.tau("few_steps", 10, 1000, alpha_bar=alpha_bar) ** 0.8)
    assert np.allclose(gaps[:-2], gaps[:-2].mean(), rtol=0.02)
    assert np.allclose(gaps[:-3:-1] / gaps[:-2].mean(), tau.FIRST_GAPS, atol=0.02)
    assert (np.diff(power) > 0).all()
    snr = np.log(alpha_bar[1:] / (1 - alpha_bar[1:]))
    gaps = np.diff(snr[tau.tau("log_snr", 10, 1000, alpha_bar=alpha_bar) - 1])
    assert np.ptp(gaps) < 0.1 * abs(gaps.mean())
    with pytest.raises(ValueError, match="depends on ᾱ: give alpha_bar"):
        tau.tau("log_snr", 10, 1000)


def test_with_noise_the_bottom_falls_once_steps_are_many():
    for S, bottom in ((5, 125), (8, 125), (20, 50), (50, 20), (100, 10), (1000, 1)):
        times = tau.tau("few_steps_noise", S, 1000, alpha_bar=schedules.alpha_bar(schedules.betas("linear", 1000)))
        assert (len(times), times[0]) == (S, bottom)
    alpha_bar = schedules.alpha_bar(schedules.betas("linear", 4, 0.1, 0.5))
    assert tau.tau("few_steps_noise", 2, 4, alpha_bar=alpha_bar).tolist() == [1, 4]


def test_offset_shifts_leading_only():
    assert (tau.tau("leading", 4, 1000, 1) - 1).tolist() == [1, 251, 501, 751]
    assert tau.tau("linear", 4, 1000, 1)[-1] == 1000


@pytest.mark.parametrize("S", [0, -1, 1001, 2.5, True, None, "10"])
def test_bad_step_counts(S):
    with pytest.raises(ValueError, match="num_inference_steps must be an integer from 1 to 1000"):
        tau.tau("linear", S, 1000)


def test_unknown_spacing_lists_the_known():
    with pytest.raises(ValueError, match=r"'cosine'.*linear, quadratic, leading, trailing, linspace, paper_linear"):
        tau.tau("cosine", 10, 1000)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([], "empty"),
        ([1, 5, 5], "timestep 5 stands twice"),
        ([1, 7, 5], "increasing order, but 7 stands before 5"),
        ([0, 3], r"timestep 0 is outside 1\.\.10"),
        ([3, 11], r"timestep 11 is outside 1\.\.10"),
        ([1, 2.5], "must be integers, not 2.5"),
        ([True, 2], "must be integers, not True"),
    ],
)
def test_bad_explicit_times(times, message):
    with pytest.raises(ValueError, match=message):
        tau.explicit(times, 10)


# ---- betas -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", list(schedules.SCHEDULES))
@pytest.mark.parametrize("T", [1, 2, 10, 1000, 4000])
def test_schedules_are_float64_and_valid(schedule, T):
    betas = schedules.betas(schedule, T)
    assert betas.shape == (T,)
    assert betas.dtype == np.float64
    alpha_bar = schedules.alpha_bar(betas)
    assert alpha_bar.shape == (T + 1,)
    assert alpha_bar[0] == 1
    assert (np.diff(alpha_bar) < 0).all()


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"])
def test_schedules_that_diffusers_has(schedule):
    from diffusers import DDPMScheduler

    stock = DDPMScheduler(beta_schedule=schedule).betas.double().numpy()
    assert schedules.betas(schedule) == pytest.approx(stock, rel=2e-5, abs=1e-7)


def test_exp_is_diffusers_transform():
    from diffusers.schedulers.scheduling_ddpm import betas_for_alpha_bar

    stock = betas_for_alpha_bar(1000, alpha_transform_type="exp").double().numpy()
    assert schedules.betas("exp") == pytest.approx(stock, rel=2e-5)


def test_authors_schedules():
    """quad, const and jsd as in the authors' code, from their formulas."""
    assert schedules.betas("scaled_linear") == pytest.approx(np.linspace(1e-4**0.5, 0.02**0.5, 1000) ** 2)
    assert (schedules.betas("const", 7, 1e-4, 0.02) == 0.02).all()
    assert schedules.betas("jsd", 4).tolist() == [1 / 4, 1 / 3, 1 / 2, 1.0]


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "const"])
def test_zero_terminal_snr(schedule):
    alpha_bar = schedules.alpha_bar(schedules.betas(schedule))
    rescaled = schedules.rescale_zero_terminal_snr(alpha_bar)
    assert rescaled[-1] == 0
    assert rescaled[0] == 1
    assert rescaled[1] == pytest.approx(alpha_bar[1], rel=1e-12)
    assert (np.diff(rescaled) < 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cubic", 10), "unknown beta_schedule 'cubic': use one of linear, scaled_linear, squaredcos_cap_v2, const"),
        (("linear", 0), "num_train_timesteps must be a positive integer, not 0"),
        (("linear", 2.5), "not 2.5"),
        (("linear", 10, 0.02, 0.01), "beta_start ≤ beta_end"),
        (("linear", 10, 0.0, 0.01), "0 < beta_start"),
        (("scaled_linear", 10, 0.1, 1.5), "beta_end < 1"),
    ],
)
def test_bad_schedules(arguments, message):
    with pytest.raises(ValueError, match=message):
        schedules.betas(*arguments)


def test_bad_trained_betas():
    with pytest.raises(ValueError, match=r"β_2 = .*1\.2"):
        schedules.check([0.1, 1.2, 0.3])
    with pytest.raises(ValueError, match="β_1 = .*nan"):
        schedules.check([float("nan"), 0.2])
    with pytest.raises(ValueError, match="trained_betas has 2 entries, num_train_timesteps is 1000"):
        schedules.check([0.1, 0.2], 1000)
    assert schedules.check([0.1, 1.0])[-1] == 1


# ---- prediction ------------------------------------------------------------------------------------------------


@given(st.floats(1e-4, 1 - 1e-4), st.floats(-2, 2), st.floats(-2, 2))
def test_the_three_predictions_say_the_same(alpha_bar, x0, eps):
    x = math.sqrt(alpha_bar) * x0 + math.sqrt(1 - alpha_bar) * eps
    v = math.sqrt(alpha_bar) * eps - math.sqrt(1 - alpha_bar) * x0
    for kind, output in (("epsilon", eps), ("sample", x0), ("v_prediction", v)):
        m = p.prediction(kind, alpha_bar)
        assert m.x0_x * x + m.x0_out * output == pytest.approx(x0, abs=1e-9)
        assert m.eps_x * x + m.eps_out * output == pytest.approx(eps, abs=1e-9)


def test_impossible_predictions():
    with pytest.raises(ValueError, match="'epsilon' divides by zero where ᾱ is 0"):
        p.prediction("epsilon", 0.0)
    with pytest.raises(ValueError, match="no ε̂ where ᾱ is 1"):
        p.prediction("sample", 1.0)
    with pytest.raises(ValueError, match="unknown prediction_type 'score': use one of epsilon, sample, v_prediction"):
        p.prediction("score", 0.5)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.995, 1.0])
def test_threshold_is_the_quantile(ratio):
    x0 = 2 * torch.randn(5, 3, 7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    s = torch.quantile(x0.abs().flatten(1), ratio, dim=1).clamp(1, 2.5).view(-1, 1, 1, 1)
    assert torch.allclose(p.threshold(x0, ratio, 2.5), x0.clamp(-s, s) / s, atol=1e-12)


def test_clipped_x0_and_recomputed_eps_agree_on_x():
    x, out = torch.randn(2, 4, 3, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    m = p.prediction("epsilon", 0.3)
    x0 = p.combine(m.x0_x, x, m.x0_out, out).clamp(-0.5, 0.5)
    a, b = p.eps_from_x0(0.3)
    eps = p.combine(a, x, b, x0)
    assert torch.allclose(0.3**0.5 * x0 + 0.7**0.5 * eps, x)


def test_learned_std_interpolates_logarithms():
    low, high = math.log(0.01), math.log(0.04)
    ends = p.learned_std(torch.tensor([-1.0, 0.0, 1.0]), (low, high))
    assert ends.tolist() == pytest.approx([0.1, math.sqrt(0.02), 0.2])


def test_combine_is_float32_at_least():
    x = torch.randn(4, dtype=torch.float16)
    assert p.combine(0.5, x, 0.25, x).dtype == torch.float32
    assert p.combine(0.5, x.double(), 0.25, x).dtype == torch.float64


# ---- the floor -------------------------------------------------------------------------------------------------


def test_the_ground_floor_needs_no_diffusers():
    """Each module is loaded where importing diffusers fails."""
    code = """
import importlib, sys, types
sys.modules["diffusers"] = None
from importlib.machinery import PathFinder
spec = PathFinder.find_spec("ddim_plugin")
package = types.ModuleType("ddim_plugin")
package.__path__ = spec.submodule_search_locations if spec else [sys.argv[1]]
sys.modules["ddim_plugin"] = package
for name in ("betas", "tau", "process", "prediction", "gaussian", "ode", "bound", "search", "inversion", "objective"):
    importlib.import_module("ddim_plugin." + name)
"""
    import ddim_plugin

    subprocess.run([sys.executable, "-c", code, ddim_plugin.__path__[0]], check=True)
