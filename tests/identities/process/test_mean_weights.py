"""Multistep weights: exact for polynomials on any grid, and of the order that they have values."""

import itertools
import math

import numpy as np
import pytest
from oracle import Mixture
from scipy.integrate import quad, solve_ivp

from ddim_plugin.process.moves import mean_weights

COORDINATE = {False: lambda nsr: nsr / (1 + nsr), True: np.log}  # of ε̂, and of x̂0


def alpha_of(nsr):
    return 1 / (1 + nsr**2)


@pytest.mark.parametrize("of_x0", [False, True])
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
def test_the_mean_of_a_polynomial_is_exact(of_x0, nsr_t, nsr_s, known):
    weights = mean_weights(of_x0, nsr_t, nsr_s, known)
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    u = COORDINATE[of_x0]

    def over(g):  # dς, or d(1/ς), by the logarithm of ς
        sign = -1 if of_x0 else 1
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
    weights = mean_weights(True, 2.0, 0.6, known, eta)
    edges = np.linspace(-math.log(2.0), -math.log(0.6), 20_001)
    middle = (edges[1:] + edges[:-1]) / 2
    left = np.exp((1 + eta**2) * middle)
    share = (middle + math.log(5.0)) / math.log(2.5)  # of the value at ς = 2; 0 at ς = 5
    assert weights[0] == pytest.approx((share * left).sum() / left.sum(), rel=1e-6)
    assert weights.sum() == pytest.approx(1, abs=1e-12)


def test_much_noise_leaves_the_last_value():
    """Without overflow, however much is forgotten."""
    weights = mean_weights(True, 0.01, 0.0095, [0.01, 0.014], 20.0)
    assert weights.sum() == pytest.approx(1)


def test_down_to_the_data():
    """∫ of a polynomial in ς/(1 + ς) to ς = 0."""
    weights = mean_weights(False, 0.1, 0.0, [0.1, 0.4])
    u = COORDINATE[False]
    mean = quad(lambda y: float(u(np.float64(0.1 * y**4))) * 4 * y**3, 0, 1, epsrel=1e-12)[0]
    assert weights @ [u(np.float64(0.1)), u(np.float64(0.4))] == pytest.approx(mean, rel=1e-7)


def test_from_pure_noise():
    """Of x̂0, over d(1/ς) from 1/ς = 0: the polynomial in ln ς has a mean there."""
    weights = mean_weights(True, np.inf, 0.5, [2.0, 5.0])
    mean = quad(lambda y: -np.log(y), 0, 2.0, epsrel=1e-12)[0] / 2
    assert weights @ np.log([2.0, 5.0]) == pytest.approx(mean, rel=1e-7)
    assert weights.sum() == pytest.approx(1)


def test_with_a_value_at_zero_signal():
    weights = mean_weights(False, 3.0, 1.0, [3.0, np.inf])
    assert weights.sum() == pytest.approx(1)
    u = COORDINATE[False]
    mean = quad(u, 1.0, 3.0, epsrel=1e-12)[0] / 2
    assert weights @ [u(3.0), 1.0] == pytest.approx(mean, rel=1e-9)


# ---- orders --------------------------------------------------------------------------------------------------------

TOP, BOTTOM = 4.0, 0.4
GRIDS = {
    "uniform": lambda n: np.linspace(TOP, BOTTOM, n + 1),
    "log": lambda n: np.geomspace(TOP, BOTTOM, n + 1),
    "uneven": lambda n: (
        TOP + (BOTTOM - TOP) * (lambda y: y + 0.08 * np.sin(9 * y) * (1 - y) * y)(np.linspace(0, 1, n + 1))
    ),
}


def level(path, nsr):
    """(a, b) with b/a = ς: on the three paths, or on a random one with a smooth, falling a and a rising b."""
    if isinstance(path, int):
        one, other = np.random.default_rng(path).uniform(0, 1, 2)
        signal = math.exp(-one * nsr / (1 + nsr)) * (1 + nsr**2) ** (-other / 2)
    else:
        signal = {"paper": math.sqrt(alpha_of(nsr)), "flow": 1 / (1 + nsr), "exploding": 1.0}[path]
    return signal, nsr * signal


def solutions(x, path):
    """(ε̂(x, ς), the ODE's solution at ς through x at TOP)."""
    data = Mixture((0.3, 0.7), (-0.9, 0.8), (0.1, 0.2), None)

    def eps(x, nsr):
        return data.eps_at(x * math.sqrt(alpha_of(nsr)) / level(path, nsr)[0], alpha_of(nsr))

    def slope(nsr, x_bar):
        return eps(x_bar * level(path, nsr)[0], nsr)

    ends = (TOP, BOTTOM)
    solved = solve_ivp(slope, ends, x / level(path, TOP)[0], method="DOP853", rtol=1e-12, atol=1e-12, dense_output=True)
    return eps, lambda nsr: solved.sol(nsr) * level(path, nsr)[0]


def solve(eps, solution, grid, order, of_x0, path):
    """The multistep method over the grid; what it needs of the past at its start is exact."""
    known, x = [], None
    for i, (n_t, n_s) in enumerate(itertools.pairwise(grid)):
        (a, b), (c, d) = level(path, n_t), level(path, n_s)
        x = solution(n_t) if i < order else x
        e = eps(x, n_t)
        g = (x - b * e) / a if of_x0 else e
        known = [(n_t, g), *known][:order]
        weights = mean_weights(of_x0, n_t, n_s, [n for n, _ in known])
        mean = sum(w * g for w, (_, g) in zip(weights, known, strict=True))
        if of_x0:
            mean = (x - a * mean) / b
        x = c * (x - b * mean) / a + d * mean
    return x


@pytest.mark.parametrize(
    ("path", "grid"),
    [*(("paper", grid) for grid in GRIDS), ("flow", "uneven"), ("exploding", "log"), (1, "uneven"), (2, "uniform")],
)
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("of_x0", [False, True])
def test_orders(of_x0, order, path, grid):
    """On smooth data the error falls as S^−order, on every path and grid."""
    x = np.linspace(-2.0, 2.0, 9) * level(path, TOP)[1]
    eps, solution = solutions(x, path)
    exact = solution(BOTTOM)
    coarse, fine = (np.abs(solve(eps, solution, GRIDS[grid](n), order, of_x0, path) - exact).max() for n in (200, 400))
    assert fine < 3e-3
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.35)
