"""Theorems about q_σ: its marginals, its posterior, and Ho's variances, for any path, τ and η."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_paths import chains, paths

from ddim_plugin.process import betas as schedules
from ddim_plugin.process import inversion
from ddim_plugin.process import moves as process
from ddim_plugin.process import spacings as spacing
from ddim_plugin.process.paths import Level, Path, square_root, variance_exploding, variance_preserving

LINEAR = variance_preserving(schedules.alpha_bar(schedules.betas("linear")))


@given(chains())
def test_marginals_of_the_whole_chain_are_those_of_q(chain):
    """Lemma 1: with the exact ε of x_0, every x_s is N(a_s·x_0, b_s²)."""
    path, steps, eta = chain
    x0, top = 0.7, path.level(steps[0][0])
    mean, variance = top.signal * x0, top.noise**2
    for t, s in steps:
        move, a, b = process.move(path, t, s, eta), *path.level(t)
        gain = move.eps / b  # ε̂ = (x_t − a·x_0)/b
        mean = move.x0 * x0 + gain * (mean - a * x0)
        variance = gain**2 * variance + move.noise**2
        assert mean == pytest.approx(path.level(s).signal * x0, rel=1e-11, abs=1e-12)
        assert variance == pytest.approx(path.level(s).noise ** 2, rel=1e-10, abs=1e-12)


@given(chains(), st.floats(-2, 2))
def test_eta_1_is_the_bayes_posterior_of_the_respaced_chain(chain, x_t):
    """q(x_s|x_t, x_0) by conditioning Gaussians: prior N(a_s·x_0, b_s²), likelihood N((a_t/a_s)·x_s, β)."""
    path, steps, _ = chain
    x0 = 0.3
    for t, s in steps:
        (a, b), (c, d) = path.level(t), path.level(s)
        if d == 0:
            continue
        slope = a / c
        beta = b**2 - slope**2 * d**2
        precision = 1 / d**2 + slope**2 / beta
        mean = (c * x0 / d**2 + slope * x_t / beta) / precision
        move = process.move(path, t, s, 1.0)
        assert move.noise**2 == pytest.approx(1 / precision, rel=1e-8)
        assert move.x0 * x0 + move.eps * (x_t - a * x0) / b == pytest.approx(mean, rel=1e-7, abs=1e-8 * (1 + c))


@given(chains())
def test_beta_and_its_companions(chain):
    """β = b_t² − (a_t/a_s)²·b_s², σ̂² = β, β̃ = (b_s/b_t)²·β, σ(η) = η·√β̃."""
    path, steps, eta = chain
    for t, s in steps:
        start, end = path.level(t), path.level(s)
        beta = start.noise**2 - (start.signal / end.signal) ** 2 * end.noise**2
        rounding = 1e-14 * start.noise**2
        assert process.beta(start, end) == pytest.approx(beta, rel=1e-10, abs=rounding)
        assert process.beta_tilde(start, end) == pytest.approx(
            beta * (end.noise / start.noise) ** 2, rel=1e-10, abs=rounding
        )
        assert process.sigma(start, end, eta) ** 2 == pytest.approx(
            eta**2 * process.beta_tilde(start, end), rel=1e-12, abs=1e-300
        )
        if s > 0:
            large = process.move(path, t, s, variance_type="fixed_large")
            low, high = process.move(path, t, s, variance_type="learned_range").log_variance or (0.0, 0.0)
            assert large.noise**2 == pytest.approx(beta, rel=1e-10, abs=rounding)
            assert large.eps == process.move(path, t, s, 1.0).eps
            assert math.exp(high) == pytest.approx(large.noise**2, rel=1e-10)
            if end.noise:
                assert math.exp(low) == pytest.approx(process.move(path, t, s, 1.0).noise ** 2, rel=1e-9)


@given(chains(), st.floats(0.2, 0.9))
def test_dividing_by_the_deviation_gives_the_papers_process(chain, known):
    """x/√(a² + b²) is on the variance-preserving path with ᾱ = a²/(a² + b²), and makes the same steps.

    σ̂ alone depends on the scale: it is a deviation of x_t, and grows with that of x_t rather than of x_s.
    """
    path, steps, eta = chain
    levels = [path.level(0), *(path.level(t) for t, _ in steps[::-1])]
    a, b = (np.array(each) for each in zip(*levels, strict=True))
    scale = np.sqrt(a**2 + b**2)
    paper = Path(Level(a / scale, b / scale))
    assert np.allclose(variance_preserving(a**2 / scale**2).levels, paper.levels, atol=1e-7)
    table = np.full(path.T + 1, known)
    for i, (t, s) in zip(range(len(steps), 0, -1), steps, strict=True):
        for kind, by in (("fixed_small", i - 1), ("fixed_large", i), ("optimal", i - 1)):
            if kind == "optimal" and path.level(t).signal == 0:
                continue
            ours = process.move(path, t, s, None if kind == "fixed_large" else eta, kind, table)
            theirs = process.move(paper, i, i - 1, None if kind == "fixed_large" else eta, kind, table[: len(a)])
            assert ours.x0 == pytest.approx(theirs.x0 * scale[i - 1], rel=1e-12)
            assert ours.eps == pytest.approx(theirs.eps * scale[i - 1], rel=1e-7, abs=1e-7 * scale[i - 1])
            assert ours.noise == pytest.approx(theirs.noise * scale[by], rel=1e-8, abs=1e-12 * scale[by])
        assert process.max_eta(path.level(t), path.level(s)) == pytest.approx(
            process.max_eta(paper.level(i), paper.level(i - 1)), rel=1e-9
        )


def test_variances_and_mean_on_the_full_chain_are_those_of_ho():
    """τ = 1..T: σ(1)² = β̃_t, σ̂² = β_t, and the mean is (x − β_t/√(1 − ᾱ_t)·ε)/√(1 − β_t) (Ho et al., Eq. 11)."""
    betas = schedules.betas("linear")
    alpha_bar = schedules.alpha_bar(betas)
    for t in range(2, 1001):
        beta = betas[t - 1]
        small = process.move(LINEAR, t, t - 1, 1.0)
        large = process.move(LINEAR, t, t - 1, variance_type="fixed_large")
        assert small.noise**2 == pytest.approx((1 - alpha_bar[t - 1]) / (1 - alpha_bar[t]) * beta, rel=1e-9)
        assert large.noise**2 == pytest.approx(beta, rel=1e-9)
        assert large.eps == small.eps
        x, eps = 0.8, -0.4
        x0 = (x - math.sqrt(1 - alpha_bar[t]) * eps) / math.sqrt(alpha_bar[t])
        ho = (x - beta / math.sqrt(1 - alpha_bar[t]) * eps) / math.sqrt(1 - beta)
        assert small.x0 * x0 + small.eps * eps == pytest.approx(ho, rel=1e-10)


@given(paths(), st.data())
def test_the_last_move_is_silent_for_every_kind_of_noise(path, data):
    gamma = np.full(path.T + 1, 0.9)
    t = data.draw(st.integers(1, path.T))
    for kind in process.VARIANCES:
        if path.level(0).noise == 0:
            move = process.move(path, t, 0, 1.0, kind, gamma)
            assert (move.noise, move.log_variance) == (0.0, None)
            assert (move.x0, move.eps) == (1.0, 0.0)


@pytest.mark.parametrize("schedule", list(schedules.SCHEDULES))
@pytest.mark.parametrize("eta", [0.0, 1.0, None])
def test_coefficients_are_finite_and_real(schedule, eta):
    """Every schedule, spacing and kind of noise (None is `fixed_large`): tens of thousands of moves."""
    kind = "fixed_large" if eta is None else "fixed_small"
    rng = np.random.default_rng(0)
    for T in (1, 2, 7, 100, 1000):
        alpha_bar = schedules.alpha_bar(schedules.betas(schedule, T))
        path = variance_preserving(alpha_bar)
        for S in {1, T, int(rng.integers(1, T + 1))}:
            for name in spacing.SPACINGS:
                for t, s in process.downwards(spacing.tau(name, S, T, alpha_bar=alpha_bar)):
                    move = process.move(path, t, s, eta, kind)
                    assert math.isfinite(move.x0 + move.eps + move.noise)
                    assert min(move.x0, move.eps, move.noise) >= 0


@given(paths(), st.data())
def test_a_move_and_the_move_back_are_the_identity(path, data):
    """Eq. 13 with one ε̂: t → s and s → t, whichever is above."""
    t, s = data.draw(st.integers(1, path.T)), data.draw(st.integers(0, path.T))
    ends = path.level(t).signal, path.level(s).signal
    if min(ends) == 0:
        return  # ε̂ does not give x̂0 there
    there, back = process.move(path, t, s), process.move(path, s, t)
    x_t, eps = 0.4, -1.3

    def apply(move, x):
        return move.x0 * (x - move.start.noise * eps) / move.start.signal + move.eps * eps

    scale = max(ends) / min(ends) + path.level(t).noise + path.level(s).noise
    assert apply(back, apply(there, x_t)) == pytest.approx(x_t, abs=1e-13 * (1 + scale))


@given(chains())
def test_the_largest_eta_is_allowed_and_a_larger_one_refused(chain):
    path, steps, _ = chain
    for t, s in steps:
        limit = process.max_eta(path.level(t), path.level(s))
        if math.isinf(limit):
            assert process.move(path, t, s, 5.0).noise == 0
            continue
        assert limit >= 1
        assert process.move(path, t, s, limit).eps == pytest.approx(0, abs=1e-5 * path.level(s).noise)
        with pytest.raises(ValueError, match=rf"too large for the step from time {t:g} to {s:g}"):
            process.move(path, t, s, limit * 1.001)


@given(chains(), st.floats(0.05, 4))
def test_optimal_variance_is_that_of_the_exact_reverse_process(chain, v):
    """Data N(0, v): Var(x_s|x_t) = σ² + c²·Var(x_0|x_t), with E‖ε̂‖²/d = b²/(a²·v + b²) of the exact ε̂."""
    path, steps, eta = chain
    for t, s in steps:
        (a, b), c = path.level(t), path.level(s).signal
        if s == 0 or a == 0:
            continue
        total, plain = a**2 * v + b**2, process.move(path, t, s, eta)
        weight = c - plain.eps * a / b
        exact = plain.noise**2 + weight**2 * v * b**2 / total
        optimal = process.move(path, t, s, eta, "optimal", np.full(path.T + 1, b**2 / total))
        rounding = 1e-15 * (1 + weight**2 * (b / a) ** 2)  # of 1 − Γ, which cancels where a is tiny
        assert optimal.noise**2 == pytest.approx(exact, rel=1e-8, abs=rounding)
        assert optimal.eps == plain.eps


@given(chains(), st.floats(0, 100), st.floats(-3, 3))
def test_the_slope_of_a_step_on_gaussian_data(chain, v, x):
    """Data N(0, v), exact ε̂ = b·x/(a²v + b²): x_s = f′·x_t, with f′ in the range that `step_size` is made for."""
    path, steps, _ = chain
    for t, s in steps:
        (a, b), (c, d) = path.level(t), path.level(s)
        total, move = a**2 * v + b**2, process.move(path, t, s)
        slope = (c * a * v + d * b) / total
        assert move.x0 * a * v / total * x + move.eps * b / total * x == pytest.approx(slope * x, rel=1e-9, abs=1e-12)
        ends = [(c * a * each + d * b) / (a**2 * each + b**2) for each in (0, inversion.VARIANCE)]
        assert inversion.step_size(path.level(t), path.level(s)) == pytest.approx(2 / sum(ends), rel=1e-12)
        assert min(ends) * (1 - 1e-9) <= slope <= max(ends) * (1 + 1e-9)


def test_functions_take_arrays():
    t, s = np.array([1000, 500, 20]), np.array([900, 10, 3])
    for path in (LINEAR, variance_exploding(1000, 0.01, 50.0)):
        many = [Level(*(each[at] for each in path.levels)) for at in (t, s)]
        one = [(path.level(i), path.level(j)) for i, j in zip(t, s, strict=True)]
        for function in (process.sigma, process.eps_coefficient, process.x0_weight):
            assert function(*many, 0.5) == pytest.approx([function(*pair, 0.5) for pair in one])
        for function in (process.beta, process.beta_tilde):
            assert function(*many) == pytest.approx([function(*pair) for pair in one])


@given(paths())
def test_a_repeated_time_is_the_identity(path):
    for kind in ("fixed_small", "fixed_large"):
        move = process.move(path, path.T, path.T, 1.0, kind)
        assert (move.x0, move.eps, move.noise) == (*path.level(path.T), 0.0)


# ---- the tutorial's process x_t = x_0 + √t·ε ------------------------------------------------------------------------


@given(st.integers(2, 1000), st.floats(-50, 50), st.floats(-3, 3))
def test_sampling_1_of_the_random_walk(t, x, eps):
    """x_t = x_{t−1} + z with z ~ N(0, 1), so q(x_t|x_0) = N(x_0, t).

    Given x_0 and x_t, x_{t−1} is a point of a Brownian bridge: its mean is x_0 + (t−1)/t·(x_t − x_0), its variance
    (t − 1)/t. With x̂0 = x_t − √t·ε̂ for x_0, the mean is x_t − ε̂/√t.
    """
    path = square_root(1000)
    move = process.move(path, t, t - 1, 1.0)
    x0 = x - math.sqrt(t) * eps
    mean = move.x0 * x0 + move.eps * eps
    assert process.beta(path.level(t), path.level(t - 1)) == pytest.approx(1, rel=1e-9)
    assert move.noise**2 == pytest.approx((t - 1) / t, rel=1e-9)
    assert mean == pytest.approx(x0 + (t - 1) / t * (x - x0), abs=1e-9)
    assert mean == pytest.approx(x - eps / math.sqrt(t), abs=1e-9)


@given(st.integers(1, 1000), st.floats(-50, 50), st.floats(-3, 3))
def test_sampling_2_of_the_random_walk(t, x, eps):
    """Keep x̂0 = x_t − √t·ε̂ and ε̂, and lower the noise from √t to √(t−1): x_{t−1} = x_t − (√t − √(t−1))·ε̂."""
    move = process.move(square_root(1000), t, t - 1)
    assert move.noise == 0
    found = move.x0 * (x - math.sqrt(t) * eps) + move.eps * eps
    assert found == pytest.approx(x - (math.sqrt(t) - math.sqrt(t - 1)) * eps, abs=1e-11)


# ---- variance exploding ---------------------------------------------------------------------------------------------


@given(chains(("variance preserving",)), st.integers(0, 99))
def test_proposition_1(chain, seed):
    """DDIM on the paper's path divided by √ᾱ is DDIM on the path x̄ = x_0 + σ·ε, with σ = √(1/ᾱ − 1)."""
    path, steps, eta = chain
    exploding = Path(Level(np.ones(path.T + 1), np.asarray(path.levels.ratio)))
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(3)
    x_bar = x / path.level(steps[0][0]).signal
    for t, s in steps:
        z, (a, b) = rng.standard_normal(3), path.level(t)
        eps = np.tanh(x_bar * a + t)
        assert np.allclose(np.tanh(x + t), eps, atol=1e-9)
        paper, other = process.move(path, t, s, eta), process.move(exploding, t, s, eta)
        x = paper.x0 * (x - b * eps) / a + paper.eps * eps + paper.noise * z
        x_bar = x_bar - other.start.noise * eps + other.eps * eps + other.noise * z
        assert np.allclose(x / path.level(s).signal, x_bar, rtol=1e-9, atol=1e-9)


@given(st.floats(0.05, 20), st.floats(-3, 3), st.floats(0.1, 2))
def test_small_moves_follow_the_probability_flow_of_the_exploding_sde(sigma, x, v):
    """Proposition 1: dx = −½·∇ln p·dσ², whose score is −ε/σ. The rest of a step is of second order in its length.

    On data N(0, v) the score is −x/(v + σ²), and the flow x·√((v + σ'²)/(v + σ²)).
    """
    left = []
    for h in (1e-2, 1e-3):
        path = Path(Level(np.ones(3), np.array([0.0, sigma * (1 - h), sigma])))
        move, score = process.move(path, 2, 1), -x / (v + sigma**2)
        found = x + (move.eps - move.start.noise) * (-sigma * score)
        flow = x * math.sqrt((v + move.end.noise**2) / (v + sigma**2))
        assert found - x == pytest.approx(-0.5 * score * (move.end.noise**2 - sigma**2), rel=h, abs=1e-12)
        left.append(abs(found - flow))
    assert left[1] <= 0.011 * left[0] + 1e-13


@given(chains(("variance exploding", "square root")), st.floats(-3, 3))
def test_large_noise_is_the_reverse_diffusion_predictor(chain, score):
    """Song et al. 2021, Eq. 46: x_s = x_t + (σ_t² − σ_s²)·∇ln p + √(σ_t² − σ_s²)·z. It is `fixed_large` to the letter.

    η = 1 has the same mean, and the noise of their ancestral sampler (Eq. 47): σ_s·√(σ_t² − σ_s²)/σ_t.
    """
    path, steps, _ = chain
    for t, s in steps:
        (_, b), (_, d) = path.level(t), path.level(s)
        for kind, eta, noise in (
            ("fixed_large", None, math.sqrt(b**2 - d**2) if s else 0.0),
            ("fixed_small", 1.0, d / b * math.sqrt(b**2 - d**2)),
        ):
            move = process.move(path, t, s, eta, kind)
            change = move.eps * (-b * score) - b * (-b * score)  # from x_t, which both keep whole
            assert change == pytest.approx((b**2 - d**2) * score, rel=1e-9, abs=1e-12 * b**2)
            assert move.noise == pytest.approx(noise, rel=1e-9)
