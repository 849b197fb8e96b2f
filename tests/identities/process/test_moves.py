"""Theorems about q_σ: its marginals, its posterior, and Ho's variances, for any τ, η and β."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddim_plugin.process import betas as schedules
from ddim_plugin.process import moves as process
from ddim_plugin.process import spacings as spacing


@st.composite
def chains(draw, max_T=60):
    """(ᾱ, τ, η): any β, any subsequence, any η that every move of it allows."""
    T = draw(st.integers(1, max_T))
    betas = draw(st.lists(st.floats(1e-5, 0.7), min_size=T, max_size=T))
    tau = sorted(draw(st.sets(st.integers(1, T), min_size=1)))
    alpha_bar = schedules.alpha_bar(schedules.check(betas))
    limit = min(process.max_eta(alpha_bar[t], alpha_bar[s]) for t, s in process.downwards(np.array(tau)))
    eta = draw(st.floats(0, 1)) * min(limit, 2.0)
    return alpha_bar, tau, eta


@given(chains())
def test_marginals_of_the_whole_chain_are_those_of_q(chain):
    """Lemma 1: with the exact ε of x_0, every x_s is N(√ᾱ_s x_0, 1 − ᾱ_s)."""
    alpha_bar, tau, eta = chain
    x0 = 0.7
    mean, variance = math.sqrt(alpha_bar[tau[-1]]) * x0, 1 - alpha_bar[tau[-1]]
    for t, s in process.downwards(np.array(tau)):
        move = process.move(alpha_bar, t, s, eta)
        gain = move.eps / math.sqrt(1 - alpha_bar[t])  # ε̂ = (x_t − √ᾱ_t x_0)/√(1 − ᾱ_t)
        mean = move.x0 * x0 + gain * (mean - math.sqrt(alpha_bar[t]) * x0)
        variance = gain**2 * variance + move.noise**2
        assert mean == pytest.approx(math.sqrt(alpha_bar[s]) * x0, abs=1e-12)
        assert variance == pytest.approx(1 - alpha_bar[s], abs=1e-12)


@given(chains())
def test_eta_1_is_the_bayes_posterior_of_the_respaced_chain(chain):
    """q(x_s|x_t, x_0) by conditioning Gaussians: prior N(√ᾱ_s x_0, 1 − ᾱ_s), likelihood N(√(ᾱ_t/ᾱ_s) x_s, β)."""
    alpha_bar, tau, _ = chain
    x0, x_t = 0.3, -1.1
    for t, s in process.downwards(np.array(tau)):
        if s == 0:
            continue
        a, b = alpha_bar[t], alpha_bar[s]
        slope, beta = math.sqrt(a / b), 1 - a / b
        precision = 1 / (1 - b) + slope**2 / beta
        mean = (math.sqrt(b) * x0 / (1 - b) + slope * x_t / beta) / precision
        move = process.move(alpha_bar, t, s, 1.0)
        eps = (x_t - math.sqrt(a) * x0) / math.sqrt(1 - a)
        assert move.noise**2 == pytest.approx(1 / precision, rel=1e-9)
        assert move.x0 * x0 + move.eps * eps == pytest.approx(mean, rel=1e-8, abs=1e-8)


def test_variances_and_mean_on_the_full_chain_are_those_of_ho():
    """τ = 1..T: σ(1)² = β̃_t, σ̂² = β_t, and the mean is (x − β_t/√(1 − ᾱ_t)·ε)/√(1 − β_t) (Ho et al., Eq. 11)."""
    betas = schedules.betas("linear")
    alpha_bar = schedules.alpha_bar(betas)
    for t in range(2, 1001):
        beta = betas[t - 1]
        small = process.move(alpha_bar, t, t - 1, 1.0)
        large = process.move(alpha_bar, t, t - 1, variance_type="fixed_large")
        assert small.noise**2 == pytest.approx((1 - alpha_bar[t - 1]) / (1 - alpha_bar[t]) * beta, rel=1e-9)
        assert large.noise**2 == pytest.approx(beta, rel=1e-9)
        assert large.eps == small.eps
        x, eps = 0.8, -0.4
        x0 = (x - math.sqrt(1 - alpha_bar[t]) * eps) / math.sqrt(alpha_bar[t])
        ho = (x - beta / math.sqrt(1 - alpha_bar[t]) * eps) / math.sqrt(1 - beta)
        assert small.x0 * x0 + small.eps * eps == pytest.approx(ho, rel=1e-10)


def test_last_move_is_silent_for_every_kind_of_noise():
    alpha_bar = schedules.alpha_bar(schedules.betas("linear"))
    gamma = np.full(1001, 0.9)
    for kind in process.VARIANCES:
        move = process.move(alpha_bar, 37, 0, 1.0, kind, gamma)
        assert (move.noise, move.log_variance) == (0.0, None)
        assert (move.x0, move.eps) == (1.0, 0.0)


@pytest.mark.parametrize("schedule", list(schedules.SCHEDULES))
@pytest.mark.parametrize("eta", [0.0, 0.2, 0.5, 1.0])
def test_coefficients_are_finite_and_real(schedule, eta):
    """Every schedule, spacing and kind of noise: some 200,000 moves in all."""
    rng = np.random.default_rng(0)
    for T in (1, 2, 7, 100, 1000):
        alpha_bar = schedules.alpha_bar(schedules.betas(schedule, T))
        for S in {1, T, *rng.integers(1, T + 1, 4).tolist()}:
            for name in spacing.NAMES:
                for t, s in process.downwards(spacing.tau(name, S, T, alpha_bar=alpha_bar)):
                    for kind in ("fixed_small", "fixed_large"):
                        move = process.move(alpha_bar, t, s, None if kind == "fixed_large" else eta, kind)
                        assert math.isfinite(move.x0 + move.eps + move.noise)
                        assert min(move.x0, move.eps, move.noise) >= 0


@given(chains(), st.data())
def test_a_move_and_the_move_back_are_the_identity(chain, data):
    """Eq. 13 with one ε̂: t → s and s → t, whichever is above."""
    alpha_bar, _, _ = chain
    t = data.draw(st.integers(1, len(alpha_bar) - 1))
    s = data.draw(st.integers(0, len(alpha_bar) - 1))
    there, back = process.move(alpha_bar, t, s), process.move(alpha_bar, s, t)
    x_t, eps = 0.4, -1.3

    def apply(move, x):
        return move.x0 * (x - math.sqrt(1 - move.alpha_bar_t) * eps) / math.sqrt(move.alpha_bar_t) + move.eps * eps

    scale = math.sqrt(max(alpha_bar[s], alpha_bar[t]) / min(alpha_bar[s], alpha_bar[t]))
    assert apply(back, apply(there, x_t)) == pytest.approx(x_t, abs=1e-13 * (1 + scale))


@given(chains())
def test_the_largest_eta_is_allowed_and_a_larger_one_refused(chain):
    alpha_bar, tau, _ = chain
    for t, s in process.downwards(np.array(tau)):
        limit = process.max_eta(alpha_bar[t], alpha_bar[s])
        if math.isinf(limit):
            assert process.move(alpha_bar, t, s, 5.0).noise == 0
            continue
        assert limit >= 1
        assert process.move(alpha_bar, t, s, limit).eps == pytest.approx(0, abs=1e-5)
        with pytest.raises(ValueError, match=rf"too large for the step from time {t} to {s}"):
            process.move(alpha_bar, t, s, limit * 1.001)


def test_learned_range_is_beta_tilde_and_beta_of_any_pair():
    alpha_bar = schedules.alpha_bar(schedules.betas("linear"))
    for t, s in [(1000, 900), (500, 499), (2, 1), (613, 12)]:
        low, high = process.move(alpha_bar, t, s, variance_type="learned_range").log_variance
        assert math.exp(low) == pytest.approx(process.move(alpha_bar, t, s, 1.0).noise ** 2, rel=1e-9)
        assert math.exp(high) == pytest.approx(1 - alpha_bar[t] / alpha_bar[s], rel=1e-9)


@given(chains(), st.floats(0.05, 4))
def test_optimal_variance_is_that_of_the_exact_reverse_process(chain, v):
    """Data N(0, v): Var(x_s|x_t) = σ² + c²·Var(x_0|x_t), with E‖ε̂‖²/d = (1 − ᾱ)/(ᾱv + 1 − ᾱ) of the exact ε̂."""
    alpha_bar, tau, eta = chain
    total = alpha_bar * v + 1 - alpha_bar
    gamma = (1 - alpha_bar) / total
    for t, s in process.downwards(np.array(tau)):
        if s == 0:
            continue
        a, b = alpha_bar[t], alpha_bar[s]
        plain = process.move(alpha_bar, t, s, eta)
        c = math.sqrt(b) - plain.eps * math.sqrt(a / (1 - a))
        exact = plain.noise**2 + c**2 * v * (1 - a) / total[t]
        optimal = process.move(alpha_bar, t, s, eta, "optimal", gamma)
        rounding = 1e-15 * (1 + c**2 * (1 - a) / a)  # of 1 − Γ, which cancels where ᾱ is tiny
        assert optimal.noise**2 == pytest.approx(exact, rel=1e-8, abs=rounding)
        assert optimal.eps == plain.eps


def test_functions_take_arrays():
    alpha_bar = schedules.alpha_bar(schedules.betas("linear"))
    t, s = np.array([1000, 500, 20]), np.array([900, 10, 3])
    for function in (process.sigma, process.eps_coefficient, process.x0_weight):
        values = function(alpha_bar[t], alpha_bar[s], 0.5)
        assert values == pytest.approx([function(alpha_bar[i], alpha_bar[j], 0.5) for i, j in zip(t, s, strict=True)])


def test_upwards_only_the_deterministic_move_exists():
    alpha_bar = schedules.alpha_bar(schedules.betas("linear"))
    with pytest.raises(ValueError, match="from time 3 up to 9 must be deterministic"):
        process.move(alpha_bar, 3, 9, 0.5)
    with pytest.raises(ValueError, match="must be deterministic"):
        process.move(alpha_bar, 3, 9, variance_type="fixed_large")


def test_a_repeated_time_is_the_identity():
    alpha_bar = schedules.alpha_bar(schedules.betas("linear"))
    for kind in ("fixed_small", "fixed_large"):
        move = process.move(alpha_bar, 8, 8, 1.0, kind)
        assert (move.x0, move.eps, move.noise) == (math.sqrt(alpha_bar[8]), math.sqrt(1 - alpha_bar[8]), 0.0)
