"""The bound against data whose likelihood is known, and the τ that minimises it."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from gaussian_data import ALPHA, FLOW, MEAN, PATH, TRUE, VARIANCE, data, exact_network, table
from measure.bound import (
    BITS,
    Errors,
    VariationalBound,
    best_paths,
    bound_costs,
    bound_of,
    objective_weights,
    prior_nats,
    transition_nats,
)
from measure.likelihood import measure_errors
from pictures.bits import discretized_log_likelihood
from torch import Generator
from trainer.objective import Objective

from ddim_plugin.process.moves import beta_tilde, sigma, x0_weight
from ddim_plugin.process.paths import flow_matching, square_root, variance_preserving
from ddim_plugin.process.spacings import tau as tau_of

linear, quadratic = (partial(tau_of, name) for name in ("linear", "quadratic"))


def exact_errors(path):
    """E(x_0 − x̂0)² and E ε̂² of the exact network, for every time."""
    signal, noise = path.levels
    marginal = signal**2 * VARIANCE + noise**2
    error = VARIANCE * noise**2 / marginal
    with np.errstate(divide="ignore"):
        density = 0.5 * (np.log(2 * np.pi * error) + 1)
    return Errors(error, noise**2 / marginal, error[:, None], density[:, None], MEAN**2 + VARIANCE)


def exact_bound(path, tau, variance_type, eta):
    """The expectation of the bound over the data, in bits, with the best Gaussian decoder as a density."""
    errors, t, s = exact_errors(path), tau[1:], tau[:-1]
    nats = transition_nats(path, t, s, errors.x0[t], variance_type, eta, errors.eps_mean_square).sum()
    return (prior_nats(path.level(tau[-1]), errors.x0_mean_square) + nats + errors.decoder[tau[0]]) * BITS


# ---- the bound -----------------------------------------------------------------------------------------------------


def test_the_bound_meets_the_truth_where_it_should():
    """With many steps and β̃; and with the optimal variance at η = 1 for any τ, where the chain is the data's own."""
    gaps = []
    for T in (100, 1000, 10_000, 100_000):
        log_snr = np.linspace(14, -14, T)
        alpha_bar = np.concatenate([[1.0], 1 / (1 + np.exp(-log_snr))])
        gaps.append(exact_bound(variance_preserving(alpha_bar), np.arange(1, T + 1), "fixed_small", 1.0) - TRUE)
    assert all(first > 9 * second > 0 for first, second in itertools.pairwise(gaps))  # it falls as 1/T
    assert gaps[-1] < 5e-3
    for S in (1, 3, 10, 100, 1000):
        gap = exact_bound(PATH, linear(S, 1000), "optimal", 1.0) - TRUE
        assert 0 <= gap < 2e-5  # the prior's: ᾱ_T is not 0


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "optimal"])
@pytest.mark.parametrize("eta", [0.1, 0.2, 0.5, 1.0])
def test_the_bound_lies_above_the_truth(variance_type, eta):
    if variance_type == "fixed_large" and eta != 1:
        pytest.skip("stands at η = 1")
    for tau in (linear(1, 1000), linear(7, 1000), quadratic(10, 1000), linear(100, 1000), np.array([3, 50, 600])):
        assert exact_bound(PATH, tau, variance_type, eta) > TRUE - 1e-9


def test_the_optimal_variance_never_worsens_the_bound():
    for eta, S, spacing in itertools.product((0.2, 0.5, 1.0), (2, 5, 10, 50, 1000), (linear, quadratic)):
        tau = spacing(S, 1000)
        best = exact_bound(PATH, tau, "optimal", eta)
        assert best <= exact_bound(PATH, tau, "fixed_small", eta) + 1e-12
        assert eta < 1 or best <= exact_bound(PATH, tau, "fixed_large", eta) + 1e-12


def test_the_bound_of_flow_matching():
    """It meets the truth with many steps, by the closed form and as drawn from the network; σ = 1 is noise alone."""
    gaps = [exact_bound(flow_matching(T), np.arange(1, T + 1), "fixed_small", 1.0) - TRUE for T in (100, 1000, 10_000)]
    assert gaps[0] > gaps[1] > gaps[2] > 0
    tau, errors = np.arange(10, 1001, 10), exact_errors(FLOW)
    assert prior_nats(FLOW.level(1000), errors.x0_mean_square) == 0
    for kind in ("epsilon", "flow_prediction"):
        along = tau if kind == "flow_prediction" else tau[:-1]
        bound = VariationalBound(FLOW, along, kind, decoder=errors.decoder_variance, density=True)
        terms = bound.exact(exact_network(FLOW, kind), data(5000), Generator().manual_seed(1))
        error = float(terms.total.std() / math.sqrt(5000))
        assert error < 0.05
        assert abs(float(terms.total.mean()) - exact_bound(FLOW, along, "fixed_small", 1.0)) < 4 * error


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "optimal"])
def test_terms_have_the_expected_means(variance_type):
    """What is drawn from the network agrees with the closed form, within its standard error."""
    tau = quadratic(6, 1000)
    bound = VariationalBound(
        PATH,
        tau,
        variance_type=variance_type,
        eps_mean_square=exact_errors(PATH).eps_mean_square,
        decoder=exact_errors(PATH).decoder_variance,
        density=True,
    )
    terms = bound.exact(exact_network(PATH), data(60_000), Generator().manual_seed(1))
    assert terms.transitions.shape == (60_000, 5)
    expected = exact_bound(PATH, tau, variance_type, 1.0)
    error = float(terms.total.std() / math.sqrt(60_000))
    assert error < 0.03
    assert abs(float(terms.total.mean()) - expected) < 4 * error


def test_the_estimate_is_unbiased():
    bound = VariationalBound(PATH, linear(5, 1000), density=True)
    x0, network = data(40_000), exact_network(PATH)
    exact = bound.exact(network, x0, Generator().manual_seed(2)).total
    for draws in (1, 3):
        drawn = bound.sampled(network, x0, Generator().manual_seed(3), draws)
        error = math.hypot(float(drawn.std()), float(exact.std())) / 200
        assert abs(float(drawn.mean() - exact.mean())) < 4 * error


def test_images_do_not_depend_on_the_batch():
    bound = VariationalBound(PATH, linear(5, 1000), density=True)
    x0, network = data(6), exact_network(PATH)

    def seeds():
        return [Generator().manual_seed(i) for i in range(6)]

    together = bound.exact(network, x0, seeds())
    apart = [bound.exact(network, x0[i : i + 1], seeds()[i : i + 1]).total for i in range(6)]
    assert torch.equal(together.total, torch.cat(apart))
    drawn = bound.sampled(network, x0, seeds(), 2)
    assert torch.equal(drawn[3:], bound.sampled(network, x0[3:], seeds()[3:], 2))


@pytest.mark.parametrize(
    ("variance_type", "loss"), [("fixed_small", "bound"), ("fixed_large", "bound"), ("learned_range", "bound")]
)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "flow_prediction"])
def test_hos_conventions_are_those_of_the_loss(variance_type, loss, prediction_type, network):
    """The terms of the full chain are those that training minimises (`Objective`), bytes and decoder included."""
    T = 40
    flow = prediction_type == "flow_prediction"
    path, x0 = (
        flow_matching(T) if flow else variance_preserving(table(T)),
        (torch.randint(0, 256, (4, 1, 3, 3)).float() / 127.5 - 1),
    )
    objective = Objective(path, prediction_type, loss, variance_type)
    bound = VariationalBound(path, None, prediction_type, variance_type)
    learned = variance_type == "learned_range"

    def call(x, t):
        output = network(x, t.view(-1, 1, 1, 1))
        return torch.cat([output, torch.sin(3 * output)], 1) if learned else output

    for i, (t, _) in enumerate(bound.pairs):
        seeds = [Generator().manual_seed(k) for k in range(4)]
        noise = torch.cat([torch.randn(1, 1, 3, 3, generator=Generator().manual_seed(k)) for k in range(4)])
        batch = objective.noised(x0, noise, torch.full((4,), t))
        expected = objective(call(batch.x, batch.t), batch)
        term = bound._term(call, x0, torch.full((4,), i), seeds)
        assert torch.allclose(term * T + bound._prior(x0), expected.double(), rtol=2e-4, atol=2e-4), t


def test_clipping_can_only_bring_x0_nearer():
    x0 = (torch.randint(0, 2, (64, 1, 2, 2)) * 2 - 1).double()
    free = VariationalBound(PATH, linear(10, 1000), density=True)
    clipped = VariationalBound(PATH, linear(10, 1000), clip=1.0, density=True)
    network = exact_network(PATH)
    one = free.exact(network, x0, Generator().manual_seed(0))
    other = clipped.exact(network, x0, Generator().manual_seed(0))
    assert bool((other.transitions <= one.transitions + 1e-12).all())
    assert float(other.total.mean()) < float(one.total.mean())


def test_bins_sum_to_one():
    levels = (torch.arange(256, dtype=torch.float64) / 127.5 - 1).view(-1, 1)
    for mean, std in ((0.0, 0.01), (-1.3, 0.3), (0.999, 1e-4), (0.2, 5.0)):
        mass = discretized_log_likelihood(levels, torch.tensor(mean), torch.tensor(std)).exp().sum()
        assert abs(float(mass) - 1) < 1e-9


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"eta": 0.0}, "infinite"),
        ({"tau": [5, 3]}, "increasing times"),
        ({"tau": []}, "increasing times"),
        ({"tau": [0, 3]}, "increasing times"),
        ({"tau": [3, 1001]}, "increasing times in 1..1000"),
        ({"decoder": "best"}, "unknown decoder 'best'"),
        ({"variance_type": "optimal"}, "needs eps_mean_square"),
        ({"clip": 0}, "clip must be positive"),
        ({"prediction_type": "noise"}, "unknown prediction_type"),
        ({"eta": 5.0}, "too large"),
        ({"path": square_root(9)}, "ends with the noise 3"),
        ({"path": FLOW}, "divides by zero"),
        (
            {"path": FLOW, "prediction_type": "sample", "variance_type": "optimal", "eps_mean_square": ALPHA},
            "pure noise",
        ),
    ],
)
def test_bounds_that_do_not_exist(settings, said):
    with pytest.raises(ValueError, match=said):
        VariationalBound(**{"path": PATH} | settings)


def test_errors_are_measured():
    path = variance_preserving(table(100))
    found = measure_errors(exact_network(path), data(4000), path, "epsilon", Generator().manual_seed(0))
    expected = exact_errors(path)
    assert np.allclose(found.x0[1:], expected.x0[1:], rtol=0.15)
    assert np.allclose(found.eps_mean_square[1:], expected.eps_mean_square[1:], rtol=0.1)
    assert found.x0_mean_square == pytest.approx(expected.x0_mean_square, rel=0.05)
    assert np.allclose(expected.explained(path)[1:], expected.eps_mean_square[1:], rtol=1e-9)


def test_the_decoder_that_is_found_best_is_near_the_error():
    """Of data far from the ends and errors far above a bin, the best variance is the mean squared error."""
    x0 = (torch.randn(2000, 1, 2, 2, generator=Generator().manual_seed(0)) * 0.1 * 127.5).round() / 127.5
    a = table(100)

    def network(x, t):  # ε of N(0, 0.01)
        ratio = torch.as_tensor(a)[t].view(-1, 1, 1, 1).to(x)
        return (1 - ratio).sqrt() * x / (ratio * 0.01 + 1 - ratio)

    found = measure_errors(network, x0, variance_preserving(a), "epsilon", Generator().manual_seed(1))
    ratio = found.decoder_variance[50:] / found.x0[50:]
    assert ((ratio > 0.4) & (ratio < 2.5)).all()
    density = 0.5 * (np.log(2 * np.pi * found.x0[50:]) + 1) - math.log(2 / 255)
    assert np.allclose(found.decoder[50:], density, atol=0.15)


# ---- the paper's objective -----------------------------------------------------------------------------------------


def test_j_and_its_gamma_form_differ_by_a_constant():
    """For any two networks, that is for any two tables of their errors of ε: Theorem 1 with the factors it lost."""
    T, eta, tau = 30, 0.5, [4, 11, 30]
    a, rng = table(T), np.random.default_rng(0)
    deviation = np.sqrt(1 - a)
    path = variance_preserving(a)
    gamma = objective_weights(path, tau, eta, deviation)

    def j(eps_error):
        total, x0_error = 0.0, (1 - a) / a * eps_error
        for t, s in ((30, 11), (11, 4)):
            sig, c = sigma(path.level(t), path.level(s), eta), x0_weight(path.level(t), path.level(s), eta)
            total += c**2 * x0_error[t] / (2 * sig**2)  # KL of two Gaussians of one variance
        for t in set(range(1, T + 1)) - {11, 30}:
            density = 0.5 * (np.log(2 * np.pi * deviation[t] ** 2) + x0_error[t] / deviation[t] ** 2)
            total += density
        return total

    first, second = rng.uniform(0, 1, T + 1), rng.uniform(0, 1, T + 1)
    assert np.isclose(j(first) - j(second), (gamma * first)[1:].sum() - (gamma * second)[1:].sum(), rtol=1e-12)
    with pytest.raises(ValueError, match="infinite"):
        objective_weights(path, tau, 0.0, deviation)


# ---- τ -------------------------------------------------------------------------------------------------------------


def test_the_search_finds_what_trying_all_finds():
    T = 9
    a = variance_preserving(table(T))
    costs, start = bound_costs(a, exact_errors(a))
    for S in range(1, T + 1):
        tried = [bound_of(np.array(tau), costs, start) for tau in itertools.combinations(range(1, T + 1), S)]
        found = best_paths(costs, start, T)[S - 1]
        assert len(found.tau) == S
        assert np.isclose(found.cost, min(tried), rtol=1e-12)
        assert np.isclose(bound_of(found.tau, costs, start), found.cost, rtol=1e-12)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "optimal"])
def test_the_searched_tau_is_never_worse(variance_type):
    errors = exact_errors(PATH)
    costs, start = bound_costs(PATH, errors, variance_type)
    for found in best_paths(costs, start, 25):
        S = len(found.tau)
        assert (np.diff(found.tau) > 0).all()
        for spacing in (linear, quadratic):
            assert found.cost <= bound_of(spacing(S, 1000), costs, start) + 1e-12


def test_searches_that_cannot_be():
    path = variance_preserving(table(9))
    with pytest.raises(ValueError, match="has 1..9 moves, not 10"):
        best_paths(*bound_costs(path, exact_errors(path)), 10)
    blocked = np.full((5, 5), np.inf)
    with pytest.raises(ValueError, match="no path of 1 moves"):
        best_paths(blocked, np.zeros(5), 2)


def test_beta_tilde_is_what_the_bound_has_of_it():
    """σ² of q in `transition_nats` at η = 1 is β̃: without an error the KL to itself is 0."""
    assert transition_nats(PATH, 700, 300, 0.0) == pytest.approx(0.0, abs=1e-15)
    assert transition_nats(PATH, 700, 300, 0.0, "fixed_large") > 0
    assert beta_tilde(PATH.level(700), PATH.level(300)) == pytest.approx(
        sigma(PATH.level(700), PATH.level(300), 1.0) ** 2
    )
