"""The ODE of Eq. 14 and its SDEs, and multistep methods that are exact on any grid.

With ς = √(1/ᾱ − 1) the ODE reads d(x/√ᾱ) = ε̂ dς, or, in the data, d(x/√(1 − ᾱ)) = x̂0 d(1/ς). So a move from t to s
needs the mean of ε̂ over dς, or that of x̂0 over d(1/ς), and is a step of DDIM with that mean in place of the network's
last value. A multistep method takes the mean of the polynomial through the last values, in some coordinate u(ς).

Everything here is float64, takes ᾱ as numbers, and is made once before sampling begins.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

QUANTITIES = ("epsilon", "sample")
"""What is held as a polynomial: the noise ε̂, or the clean image x̂0."""

COORDINATES: dict[str, Callable[[Array], Array]] = {
    "nsr": lambda nsr: nsr,
    "log_snr": lambda nsr: -2 * np.log(nsr),
    "angle": np.arctan,
    "bounded": lambda nsr: 1 / (1 + 1 / nsr),
}
"""The coordinate u of that polynomial as a function of ς: ς, ln(ᾱ/(1 − ᾱ)), arctan ς, ς/(1 + ς)."""

NEGLIGIBLE = 1e-13
"""Where a move runs to ς = 0 or 1/ς = 0, its integral is cut off at this share of the other end."""

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(96)


def mean_weights(
    quantity: str, coordinate: str, alpha_bar_t: float, alpha_bar_s: float, known: Sequence[float], eta: float = 0.0
) -> Array:
    """Weights w with Σ_j w_j·g_j the mean of g over the move from ᾱ_t to ᾱ_s, for g_j at the ᾱ in `known`; Σ w_j = 1.

    Exact where g is a polynomial of degree len(known) − 1 in the coordinate. The move may go down or up; `known` may
    hold ᾱ_s, as in a corrector, and need not hold ᾱ_t. On a move to the data (ᾱ_s = 1) the mean of x̂0 is its value
    there. With `eta` it is the mean of x̂0 in the SDE that adds η² times the noise (variance) of DDPM, over
    d(ς^−(1 + η²)). Raises ValueError for ε̂ where ᾱ is 0 or there is noise, for x̂0 from ᾱ_t = 1, for a move from a time
    to itself, and for a coordinate that is infinite where it is needed.
    """
    check_solver(quantity, coordinate)
    if len(set(known)) < len(known) or not len(known):
        raise ValueError(f"a polynomial needs values at distinct ᾱ, one at least, not at {list(known)}")
    if alpha_bar_t == alpha_bar_s:
        raise ValueError(f"a move from ᾱ = {alpha_bar_t:g} to itself has no mean")
    of_eps = quantity == "epsilon"
    if of_eps and 0 in (alpha_bar_t, alpha_bar_s):
        raise ValueError("where ᾱ is 0 the ODE has no solution in ε̂: take quantity 'sample'")
    if of_eps and eta > 0:
        raise ValueError(f"with noise (eta={eta:g}) ε̂ changes with every draw: take quantity 'sample'")
    if alpha_bar_t == 1 and not of_eps:
        raise ValueError("from the data (ᾱ = 1) the ODE has no solution in x̂0: take quantity 'epsilon'")
    if len(known) == 1:
        return np.ones(1)
    values = np.array([_nsr(alpha_bar) for alpha_bar in known])
    if alpha_bar_s == 1 and not of_eps:
        return _basis(coordinate, values, np.zeros(1))[:, 0]
    low, high = sorted((_nsr(alpha_bar_t), _nsr(alpha_bar_s)))
    low, high = (low or high * NEGLIGIBLE), (high if np.isfinite(high) else low / NEGLIGIBLE)
    log = np.log(low * high) / 2 + np.log(high / low) / 2 * _NODES
    power = 1 if of_eps else -(1 + eta**2)
    measure = _WEIGHTS * np.exp(power * log)  # d(ς^p) = p·ς^p d ln ς
    return _basis(coordinate, values, np.exp(log)) @ (measure / measure.sum())


def check_solver(quantity: str, coordinate: str) -> None:
    """Raise ValueError for an unknown quantity or coordinate."""
    if quantity not in QUANTITIES:
        raise ValueError(f"unknown quantity {quantity!r}: use one of {', '.join(QUANTITIES)}")
    if coordinate not in COORDINATES:
        raise ValueError(f"unknown coordinate {coordinate!r}: use one of {', '.join(COORDINATES)}")


def _nsr(alpha_bar: float) -> float:
    """ς = √(1/ᾱ − 1)."""
    return float(np.sqrt((1 - alpha_bar) / alpha_bar)) if alpha_bar else np.inf


def _basis(coordinate: str, known: Array, where: Array) -> Array:
    """Lagrange's polynomials through the values at ς = `known`, (k,), at ς = `where`, (n,): (k, n)."""
    with np.errstate(divide="ignore"):
        u, at = COORDINATES[coordinate](known), COORDINATES[coordinate](where)
    if not (np.isfinite(u).all() and np.isfinite(at).all()):
        raise ValueError(f"the coordinate {coordinate!r} is infinite at the end of a move, or at a value")
    ratios = (at - u[None, :, None]) / (u[:, None, None] - u[None, :, None] + np.eye(len(u))[:, :, None])
    return np.where(np.eye(len(u), dtype=bool)[:, :, None], 1.0, ratios).prod(axis=1)
