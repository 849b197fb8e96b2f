"""Multistep weights: exact for polynomials on any grid, and of the order that they have values."""

import itertools
import math

import numpy as np
import pytest
from oracle import Gaussian, Mixture, alphas, linear_betas
from scipy.integrate import quad, solve_ivp

from ddim_plugin.process.multistep import COORDINATES, QUANTITIES, mean_weights

TABLE = alphas(linear_betas())


def alpha_of(nsr):
    return 1 / (1 + nsr**2)


@pytest.mark.parametrize("coordinate", COORDINATES)
@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize(
    ("nsr_t", "nsr_s", "known"),
    [
        (150.0, 9.0, (150.0,)),
        (9.0, 2.0, (9.0, 150.0)),
        (0.8, 0.3, (0.8, 1.5, 9.0, 30.0)),  # down
        (0.3, 0.8, (0.3, 0.2, 0.05)),  # up
        (0.8, 0.3, (0.3, 0.8, 1.5)),  # a corrector
    ],
)
def test_the_mean_of_a_polynomial_is_exact(quantity, coordinate, nsr_t, nsr_s, known):
    weights = mean_weights(quantity, coordinate, alpha_of(nsr_t), alpha_of(nsr_s), [alpha_of(n) for n in known])
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    u = COORDINATES[coordinate]

    def over(g):  # dς, or d(1/ς), by the logarithm of ς
        sign = 1 if quantity == "epsilon" else -1
        ends = math.log(nsr_t), math.log(nsr_s)
        return quad(lambda log: g(np.exp(log)) * math.exp(sign * log), *ends, epsabs=0, epsrel=1e-12)[0]

    for degree in range(len(known)):
        mean = over(lambda n, degree=degree: u(n) ** degree) / over(lambda n: 1.0)
        found = sum(w * u(np.float64(n)) ** degree for w, n in zip(weights, known, strict=True))
        assert found == pytest.approx(mean, rel=1e-8, abs=1e-10)


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
def test_the_mean_in_an_sde_is_that_of_many_small_moves(eta):
    """Of x̂0 in λ = ln(1/ς), weighted by what is left of it at the end, e^(−(1 + η²)·(λ_s − λ))."""
    known = (2.0, 5.0)
    weights = mean_weights("sample", "log_snr", alpha_of(2.0), alpha_of(0.6), [alpha_of(n) for n in known], eta)
    edges = np.linspace(-math.log(2.0), -math.log(0.6), 20_001)
    middle = (edges[1:] + edges[:-1]) / 2
    left = np.exp((1 + eta**2) * middle)
    share = (middle + math.log(5.0)) / math.log(2.5)  # of the value at ς = 2; 0 at ς = 5
    assert weights[0] == pytest.approx((share * left).sum() / left.sum(), rel=1e-6)
    assert weights.sum() == pytest.approx(1, abs=1e-12)


def test_much_noise_leaves_the_last_value():
    """Without overflow, however much is forgotten."""
    weights = mean_weights("sample", "log_snr", 0.9999, 0.99991, [0.9999, 0.9998], 20.0)
    assert weights.sum() == pytest.approx(1)


@pytest.mark.parametrize("coordinate", COORDINATES)
def test_down_to_the_data(coordinate):
    """∫ of a polynomial in ς or ln ς to ς = 0; of x̂0 the value there."""
    known = [alpha_of(0.1), alpha_of(0.4)]
    weights = mean_weights("epsilon", coordinate, known[0], 1.0, known)
    u = COORDINATES[coordinate]
    mean = quad(lambda y: float(u(np.float64(0.1 * y**4))) * 4 * y**3, 0, 1, epsrel=1e-12)[0]
    assert weights @ [u(np.float64(0.1)), u(np.float64(0.4))] == pytest.approx(mean, rel=1e-7)
    assert mean_weights("sample", coordinate, known[0], 1.0, known[:1]).tolist() == [1.0]
    if coordinate == "log_snr":
        with pytest.raises(ValueError, match="'log_snr' is infinite"):
            mean_weights("sample", coordinate, known[0], 1.0, known)
    else:
        weights = mean_weights("sample", coordinate, known[0], 1.0, known)
        assert weights @ [u(np.float64(0.1)), u(np.float64(0.4))] == pytest.approx(0, abs=1e-12)


def test_from_zero_signal():
    weights = mean_weights("sample", "bounded", 0.0, alpha_of(3.0), [0.0])
    assert weights.tolist() == [1.0]
    weights = mean_weights("sample", "bounded", alpha_of(3.0), alpha_of(1.0), [alpha_of(3.0), 0.0])
    assert weights.sum() == pytest.approx(1)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("v", "nsr", 0.5, 0.6, [0.5]), "unknown quantity 'v'"),
        (("epsilon", "t", 0.5, 0.6, [0.5]), "unknown coordinate 't'"),
        (("epsilon", "nsr", 0.5, 0.6, []), "at least one value"),
        (("epsilon", "nsr", 0.5, 0.6, [0.5, 0.5]), "distinct"),
        (("epsilon", "nsr", 0.5, 0.5, [0.5]), "to itself has no mean"),
        (("epsilon", "nsr", 0.0, 0.5, [0.0]), "quantity 'sample'"),
        (("sample", "nsr", 1.0, 0.5, [0.9]), "quantity 'epsilon'"),
        (("sample", "nsr", 0.1, 0.5, [0.1, 0.0]), "'nsr' is infinite"),
        (("epsilon", "nsr", 0.5, 0.6, [0.5], 1.0), "eta=1. ε̂ changes with every draw"),
    ],
)
def test_means_that_do_not_exist(given, said):
    with pytest.raises(ValueError, match=said):
        mean_weights(*given)


# ---- orders --------------------------------------------------------------------------------------------------------

TOP, BOTTOM = 4.0, 0.4
GRIDS = {
    "uniform": lambda n: np.linspace(TOP, BOTTOM, n + 1),
    "log": lambda n: np.geomspace(TOP, BOTTOM, n + 1),
    "uneven": lambda n: (
        TOP + (BOTTOM - TOP) * (lambda y: y + 0.08 * np.sin(9 * y) * (1 - y) * y)(np.linspace(0, 1, n + 1))
    ),
}


def paths(kind, x):
    """(ε̂(x, ς), the ODE's solution at ς through x at TOP)."""
    if kind == "gaussian":
        data = Gaussian(0.4, 0.3, None)

        def eps(x, nsr):
            data.alpha = [alpha_of(nsr)]
            return data.eps(x, 0)

        def solution(nsr):
            data.alpha = [alpha_of(TOP), alpha_of(nsr)]
            return data.solution(x, 0, 1)

        return eps, solution
    data = Mixture((0.3, 0.7), (-0.9, 0.8), (0.1, 0.2), None)

    def eps(x, nsr):
        return data.eps_at(x, alpha_of(nsr))

    def slope(nsr, x_bar):
        return eps(x_bar * math.sqrt(alpha_of(nsr)), nsr)

    path = solve_ivp(
        slope, (TOP, BOTTOM), x / math.sqrt(alpha_of(TOP)), method="DOP853", rtol=1e-12, atol=1e-12, dense_output=True
    )
    return eps, lambda nsr: path.sol(nsr) * math.sqrt(alpha_of(nsr))


def solve(eps, solution, grid, order, quantity, coordinate):
    """The multistep method over the grid; what it needs of the past at its start is exact."""
    known, x = [], None
    for i, (n_t, n_s) in enumerate(itertools.pairwise(grid)):
        a_t, a_s = alpha_of(n_t), alpha_of(n_s)
        x = solution(n_t) if i < order else x
        e = eps(x, n_t)
        g = e if quantity == "epsilon" else (x - math.sqrt(1 - a_t) * e) / math.sqrt(a_t)
        known = [(a_t, g), *known][:order]
        mean = sum(
            w * g
            for w, (_, g) in zip(
                mean_weights(quantity, coordinate, a_t, a_s, [a for a, _ in known]), known, strict=True
            )
        )
        if quantity == "sample":
            mean = (x - math.sqrt(a_t) * mean) / math.sqrt(1 - a_t)
        x = math.sqrt(a_s / a_t) * x + (math.sqrt(1 - a_s) - math.sqrt(a_s / a_t * (1 - a_t))) * mean
    return x


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("kind", "quantity", "coordinate"),
    [
        ("gaussian", "epsilon", "nsr"),  # elsewhere its error changes sign: it is too small
        ("mixture", "epsilon", "nsr"),
        ("mixture", "epsilon", "bounded"),
        ("mixture", "sample", "log_snr"),
    ],
)
def test_orders(kind, quantity, coordinate, order, grid):
    x = np.linspace(-2.0, 2.0, 9) * math.sqrt(1 - alpha_of(TOP))
    eps, solution = paths(kind, x)
    exact = solution(BOTTOM)
    coarse, fine = (
        np.abs(solve(eps, solution, GRIDS[grid](n), order, quantity, coordinate) - exact).max() for n in (200, 400)
    )
    assert fine < 3e-3
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.35)
