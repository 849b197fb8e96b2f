"""Multistep weights: exact for polynomials on any grid, and of the order that they have values."""

import itertools
import math

import numpy as np
import pytest
from oracle import Mixture
from scipy.integrate import quad, solve_ivp

from ddim_plugin.process.multistep import mean_weights

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
    weights = mean_weights(of_x0, alpha_of(nsr_t), alpha_of(nsr_s), [alpha_of(n) for n in known])
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
    weights = mean_weights(True, alpha_of(2.0), alpha_of(0.6), [alpha_of(n) for n in known], eta)
    edges = np.linspace(-math.log(2.0), -math.log(0.6), 20_001)
    middle = (edges[1:] + edges[:-1]) / 2
    left = np.exp((1 + eta**2) * middle)
    share = (middle + math.log(5.0)) / math.log(2.5)  # of the value at ς = 2; 0 at ς = 5
    assert weights[0] == pytest.approx((share * left).sum() / left.sum(), rel=1e-6)
    assert weights.sum() == pytest.approx(1, abs=1e-12)


def test_much_noise_leaves_the_last_value():
    """Without overflow, however much is forgotten."""
    weights = mean_weights(True, 0.9999, 0.99991, [0.9999, 0.9998], 20.0)
    assert weights.sum() == pytest.approx(1)


def test_down_to_the_data():
    """∫ of a polynomial in ς/(1 + ς) to ς = 0."""
    known = [alpha_of(0.1), alpha_of(0.4)]
    weights = mean_weights(False, known[0], 1.0, known)
    u = COORDINATE[False]
    mean = quad(lambda y: float(u(np.float64(0.1 * y**4))) * 4 * y**3, 0, 1, epsrel=1e-12)[0]
    assert weights @ [u(np.float64(0.1)), u(np.float64(0.4))] == pytest.approx(mean, rel=1e-7)


def test_with_a_value_at_zero_signal():
    weights = mean_weights(False, alpha_of(3.0), alpha_of(1.0), [alpha_of(3.0), 0.0])
    assert weights.sum() == pytest.approx(1)
    u = COORDINATE[False]
    mean = quad(u, 1.0, 3.0, epsrel=1e-12)[0] / 2
    assert weights @ [u(3.0), 1.0] == pytest.approx(mean, rel=1e-9)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((False, 0.5, 0.6, []), "at least one value"),
        ((False, 0.5, 0.6, [0.5, 0.5]), "distinct"),
        ((True, 0.5, 0.5, [0.5]), "to itself has no mean"),
        ((False, 0.0, 0.5, [0.0]), r"ε̂ has no mean at ᾱ = 0 .*: use that of x̂0"),
        ((False, 0.5, 0.6, [0.5], 1.0), r"ε̂ has no mean .* with noise \(eta=1\)"),
        ((True, 1.0, 0.5, [0.9]), "ln ς is infinite at the data .*: use the mean of ε̂"),
        ((True, 0.5, 1.0, [0.5, 0.4]), "ln ς is infinite at the data"),
        ((True, 0.1, 0.5, [0.1, 0.0]), "or other values of x̂0"),
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


def paths(x):
    """(ε̂(x, ς), the ODE's solution at ς through x at TOP)."""
    data = Mixture((0.3, 0.7), (-0.9, 0.8), (0.1, 0.2), None)

    def eps(x, nsr):
        return data.eps_at(x, alpha_of(nsr))

    def slope(nsr, x_bar):
        return eps(x_bar * math.sqrt(alpha_of(nsr)), nsr)

    path = solve_ivp(
        slope, (TOP, BOTTOM), x / math.sqrt(alpha_of(TOP)), method="DOP853", rtol=1e-12, atol=1e-12, dense_output=True
    )
    return eps, lambda nsr: path.sol(nsr) * math.sqrt(alpha_of(nsr))


def solve(eps, solution, grid, order, of_x0):
    """The multistep method over the grid; what it needs of the past at its start is exact."""
    known, x = [], None
    for i, (n_t, n_s) in enumerate(itertools.pairwise(grid)):
        a_t, a_s = alpha_of(n_t), alpha_of(n_s)
        x = solution(n_t) if i < order else x
        e = eps(x, n_t)
        g = (x - math.sqrt(1 - a_t) * e) / math.sqrt(a_t) if of_x0 else e
        known = [(a_t, g), *known][:order]
        weights = mean_weights(of_x0, a_t, a_s, [a for a, _ in known])
        mean = sum(w * g for w, (_, g) in zip(weights, known, strict=True))
        if of_x0:
            mean = (x - math.sqrt(a_t) * mean) / math.sqrt(1 - a_t)
        x = math.sqrt(a_s / a_t) * x + (math.sqrt(1 - a_s) - math.sqrt(a_s / a_t * (1 - a_t))) * mean
    return x


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("of_x0", [False, True])
def test_orders(of_x0, order, grid):
    x = np.linspace(-2.0, 2.0, 9) * math.sqrt(1 - alpha_of(TOP))
    eps, solution = paths(x)
    exact = solution(BOTTOM)
    coarse, fine = (np.abs(solve(eps, solution, GRIDS[grid](n), order, of_x0) - exact).max() for n in (200, 400))
    assert fine < 3e-3
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.35)
