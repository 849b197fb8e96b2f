"""The scheduler against the paper written out again (oracle.py): any τ, any η, σ̂, in float64."""

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddim_plugin import GeneralizedDDIMScheduler
from ddim_plugin.process import moves as process

ALPHA = oracle.alphas(oracle.linear_betas())


def eps(x, t):
    return np.tanh(0.8 * x) + 0.1 * np.cos(0.01 * t + x)


def run(scheduler, x, noises, **kwargs):
    x = torch.tensor(x)
    for t, z in zip(scheduler.timesteps, noises, strict=True):
        out = torch.tensor(eps(x.numpy(), int(t) + 1))
        x = scheduler.step(out, t, x, variance_noise=torch.tensor(z), **kwargs).prev_sample
    return x.numpy()


@st.composite
def cases(draw):
    tau = sorted(draw(st.sets(st.integers(1, 1000), min_size=1, max_size=30)))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    return tau, draw(st.floats(0, 1)), rng.standard_normal((2, 3)), rng.standard_normal((len(tau), 2, 3))


def planned(tau, **config):
    scheduler = GeneralizedDDIMScheduler(**config)
    scheduler.set_timesteps(timesteps=[t - 1 for t in reversed(tau)])
    return scheduler


@given(cases())
def test_any_tau_and_eta(case):
    tau, eta, x, noises = case
    expected = oracle.sample(eps, x, ALPHA, tau, eta, noises=noises)
    scale = max(1.0, np.abs(expected).max())
    assert np.abs(run(planned(tau, eta=eta), x, noises) - expected).max() < 1e-11 * scale
    assert np.abs(run(planned(tau), x, noises, eta=eta) - expected).max() < 1e-11 * scale


@given(cases())
def test_any_tau_with_clipping(case):
    tau, eta, x, noises = case
    expected = oracle.sample(eps, x, ALPHA, tau, eta, noises=noises, clip=0.7)
    assert (
        np.abs(run(planned(tau, eta=eta, clip_sample=True, clip_sample_range=0.7), x, noises) - expected).max() < 1e-11
    )


@given(cases())
def test_sigma_hat_on_any_tau(case):
    tau, _, x, noises = case
    expected = oracle.sample(eps, x, ALPHA, tau, larger=True, noises=noises)
    scale = max(1.0, np.abs(expected).max())
    assert np.abs(run(planned(tau, variance_type="fixed_large"), x, noises) - expected).max() < 1e-11 * scale


@pytest.mark.parametrize("spacing", ["linear", "quadratic", "leading", "trailing", "linspace"])
@pytest.mark.parametrize("S", [1, 3, 7, 30, 333, 999, 1000])
def test_step_counts_that_do_not_divide_T(spacing, S):
    """Where the stock scheduler moves off its own list."""
    rng = np.random.default_rng(S)
    x, noises = rng.standard_normal((2, 3)), rng.standard_normal((S, 2, 3))
    scheduler = GeneralizedDDIMScheduler(timestep_spacing=spacing, eta=0.7)
    scheduler.set_timesteps(S)
    tau = [int(t) + 1 for t in reversed(scheduler.timesteps)]
    assert len(set(tau)) == S
    expected = oracle.sample(eps, x, ALPHA, tau, 0.7, noises=noises)
    assert np.abs(run(scheduler, x, noises) - expected).max() < 1e-10 * max(1.0, np.abs(expected).max())


def test_offset_with_as_many_steps_as_times():
    scheduler = GeneralizedDDIMScheduler(timestep_spacing="leading", steps_offset=1)
    with pytest.raises(ValueError, match="steps_offset must be an integer from 0 to 0, not 1"):
        scheduler.set_timesteps(1000)


def test_the_authors_repeated_times_leave_x_as_it_is():
    """paper_quadratic repeats small times; the authors' code then evaluates the network and stays where it is."""
    scheduler = GeneralizedDDIMScheduler(timestep_spacing="paper_quadratic", eta=0.3)
    scheduler.set_timesteps(100)
    times = scheduler.timesteps.tolist()
    assert len(times) == 100
    assert len(set(times)) == 96
    rng = np.random.default_rng(0)
    x, noises = rng.standard_normal((2, 3)), rng.standard_normal((100, 2, 3))
    distinct = sorted({t + 1 for t in times})
    kept = [noises[99 - times[::-1].index(t - 1)] for t in reversed(distinct)]  # of equal times, the last one moves
    expected = oracle.sample(eps, x, ALPHA, distinct, 0.3, noises=kept)
    assert np.abs(run(scheduler, x, noises) - expected).max() < 1e-11

    for _ in range(2):  # plain integers do not tell their place; the order does, the second time round as well
        y = torch.tensor(x)
        for t, z in zip(times, noises, strict=True):
            out = torch.tensor(eps(y.numpy(), t + 1))
            y = scheduler.step(out, t, y, variance_noise=torch.tensor(z)).prev_sample
        assert np.abs(y.numpy() - expected).max() < 1e-11

    out, y = torch.randn(2, 2, 3, dtype=torch.float64)
    twice = next(t for t in times if times.count(t) == 2)
    moved = scheduler.step(out, torch.tensor([twice, twice]), y).mean  # for single samples a repeated time moves on
    assert not torch.allclose(moved, y)


def test_optimal_variance_enters_the_step():
    gamma = np.linspace(0.1, 0.95, 1000).tolist()
    scheduler = GeneralizedDDIMScheduler(variance_type="optimal", eps_mean_square=gamma, eta=0.4)
    scheduler.set_timesteps(10)
    x, out, z = torch.randn(3, 1, 2, dtype=torch.float64)
    for t, s in process.downwards(np.arange(100, 1001, 100)):
        step = scheduler.step(out, t - 1, x, variance_noise=z)
        sigma = oracle.sigma(ALPHA, t, s, 0.4)
        c = ALPHA[s] ** 0.5 - (1 - ALPHA[s] - sigma**2) ** 0.5 * (ALPHA[t] / (1 - ALPHA[t])) ** 0.5
        variance = sigma**2 + c**2 * (1 - ALPHA[t]) / ALPHA[t] * (1 - gamma[t - 1])
        assert step.std.item() == pytest.approx(variance**0.5 if s else 0.0, rel=1e-9)
        assert torch.allclose(step.prev_sample, step.mean + step.std * z)
