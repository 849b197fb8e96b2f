"""One move t → s of the generalized process q_σ, and the plan of moves over a subsequence τ.

A move takes x_t to x_s = √ᾱ_s·x̂0 + √(1 − ᾱ_s − σ²)·ε̂ + noise·z (Eq. 12), with σ = σ(η) of Eq. 16. Functions take
ᾱ_t and ᾱ_s as floats or float64 arrays alike; everything here is float64, and made once before sampling begins.
"""

from dataclasses import dataclass
from numbers import Real

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Number = float | Array

VARIANCES = ("fixed_small", "fixed_large", "learned_range", "optimal")
"""Kinds of noise of a move: η·√β̃ (Eq. 16), σ̂ (Appendix D.3), learned between β̃ and β, optimal (Analytic-DPM)."""

ETA_FREE = ("fixed_large", "learned_range")
"""Kinds that exist at η = 1 only: Ho's larger variance, and Nichol & Dhariwal's learned one."""


@dataclass(frozen=True)
class Move:
    """Coefficients of x_s = x0·x̂0 + eps·ε̂ + noise·z for a move from time t to time s, all float64.

    `alpha_bar_t` and `alpha_bar_s` are ᾱ at both ends. For "learned_range", `noise` is 0 and `log_variance` holds
    (ln β̃, ln β), between which the network chooses for each pixel; it is None elsewhere, and on a move to s = 0.
    """

    t: int
    s: int
    alpha_bar_t: float
    alpha_bar_s: float
    x0: float
    eps: float
    noise: float
    log_variance: tuple[float, float] | None = None


def beta(alpha_bar_t: Number, alpha_bar_s: Number) -> Number:
    """β of the move: 1 − ᾱ_t/ᾱ_s, the variance of q(x_t|x_s). Its root is σ̂, Ho's larger one (Appendix D.3)."""
    return 1 - alpha_bar_t / alpha_bar_s


def beta_tilde(alpha_bar_t: Number, alpha_bar_s: Number) -> Number:
    """β̃ of the move: (1 − ᾱ_s)/(1 − ᾱ_t)·β, the variance of the posterior q(x_s|x_t, x_0); σ(η)² = η²·β̃ (Eq. 16)."""
    return (1 - alpha_bar_s) / (1 - alpha_bar_t) * beta(alpha_bar_t, alpha_bar_s)


def sigma(alpha_bar_t: Number, alpha_bar_s: Number, eta: float) -> Number:
    """σ(η) = η·√((1 − ᾱ_s)/(1 − ᾱ_t))·√(1 − ᾱ_t/ᾱ_s) (Eq. 16): 0 is DDIM, 1 the Bayes posterior of any pair."""
    return eta * np.sqrt(beta_tilde(alpha_bar_t, alpha_bar_s))


def eps_coefficient(alpha_bar_t: Number, alpha_bar_s: Number, eta: float) -> Number:
    """√(1 − ᾱ_s − σ(η)²) (Eq. 12), computed as √(1 − ᾱ_s)·√(1 − η²·β/(1 − ᾱ_t)). NaN where η exceeds `max_eta`."""
    remaining = 1 - eta**2 * beta(alpha_bar_t, alpha_bar_s) / (1 - alpha_bar_t)
    remaining = np.where((remaining < 0) & (remaining > -1e-11), 0.0, remaining)  # rounding at the largest η
    remaining = np.where(np.equal(alpha_bar_s, 1), 1.0, remaining)  # at the data σ is 0 for every η
    with np.errstate(invalid="ignore"):
        return np.sqrt(1 - alpha_bar_s) * np.sqrt(remaining)


def max_eta(alpha_bar_t: float, alpha_bar_s: float) -> float:
    """Largest η of the move: where 1 − ᾱ_s − σ(η)² reaches 0. Infinite for a move to the data or to the same time."""
    if alpha_bar_s == 1 or alpha_bar_t == alpha_bar_s:
        return float("inf")
    return float(np.sqrt((1 - alpha_bar_t) / beta(alpha_bar_t, alpha_bar_s)))


def x0_weight(alpha_bar_t: Number, alpha_bar_s: Number, eta: float) -> Number:
    """c = √ᾱ_s − √(1 − ᾱ_s − σ²)·√ᾱ_t/√(1 − ᾱ_t): weight of x_0 in the mean of q_σ(x_s|x_t, x_0) (Eq. 7)."""
    eps = eps_coefficient(alpha_bar_t, alpha_bar_s, eta)
    return np.sqrt(alpha_bar_s) - eps * np.sqrt(alpha_bar_t) / np.sqrt(1 - alpha_bar_t)


def optimal_variance(alpha_bar_t: Number, alpha_bar_s: Number, eta: float, eps_mean_square: Number) -> Number:
    """σ*² = σ² + c²·(1 − ᾱ_t)/ᾱ_t·(1 − E‖ε̂‖²/d), the last factor kept in [0, 1] (Bao et al. 2022, Theorem 1).

    `eps_mean_square` is E‖ε̂(x_t, t)‖²/d at time t, d the number of pixels times channels.
    """
    unexplained = np.clip(1 - eps_mean_square, 0.0, 1.0)
    weight = x0_weight(alpha_bar_t, alpha_bar_s, eta) ** 2 * (1 - alpha_bar_t) / alpha_bar_t
    return sigma(alpha_bar_t, alpha_bar_s, eta) ** 2 + weight * unexplained


def log_variance_range(alpha_bar_t: float, alpha_bar_s: float) -> tuple[float, float]:
    """(ln β̃, ln β) of the move, for any pair (Nichol & Dhariwal 2021, Eq. 15). Needs s > 0: β̃ is 0 at the data."""
    return (
        float(np.log(beta_tilde(alpha_bar_t, alpha_bar_s))),
        float(np.log(beta(alpha_bar_t, alpha_bar_s))),
    )


def effective_eta(variance_type: str, eta: float | None, default: float) -> tuple[str, float]:
    """The kind of noise and the η of a step: `eta` where given, else the scheduler's `default`.

    "fixed_large" and "learned_range" stand at η = 1; with eta=0 the step is the deterministic one. Raises ValueError
    for a negative or non-finite η, and for another η with those two.
    """
    if variance_type not in VARIANCES:
        raise ValueError(f"unknown variance_type {variance_type!r}: use one of {', '.join(VARIANCES)}")
    if variance_type in ETA_FREE:
        if eta is None or eta == 1:
            return variance_type, 1.0
        if eta == 0:
            return "fixed_small", 0.0
        raise ValueError(f"variance_type={variance_type!r} stands at η = 1 (or η = 0, no noise), not at eta={eta!r}")
    eta = default if eta is None else eta
    if not isinstance(eta, Real) or not 0 <= eta < float("inf"):
        raise ValueError(f"eta must be a non-negative number, not {eta!r}")
    return variance_type, float(eta)


def move(
    alpha_bar: Array,
    t: int,
    s: int,
    eta: float | None = None,
    variance_type: str = "fixed_small",
    eps_mean_square: Array | None = None,
) -> Move:
    """The coefficients of a move from time t to time s of the table `alpha_bar`, shape (T + 1,).

    `eta` None is 0, or 1 where `variance_type` stands at 1. σ(η) ends where ᾱ_0 = 1 does; the other kinds of noise are
    silent on a move to s = 0. Upwards (s > t, encoding) only the deterministic move exists, and s = t is the
    identity. `eps_mean_square`, shape (T + 1,), is E‖ε̂‖²/d for each time, for "optimal".
    Raises ValueError where η leaves 1 − ᾱ_s − σ² negative, for noise upwards, and for "optimal" without the table.
    """
    kind, eta = effective_eta(variance_type, eta, 0.0)
    a_t, a_s = float(alpha_bar[t]), float(alpha_bar[s])
    if s >= t and (eta > 0 or kind == "optimal"):
        if s > t:
            raise ValueError(f"a move from {t} up to {s} must be deterministic: eta is {eta:g}, variance {kind!r}")
        kind, eta = "fixed_small", 0.0
    if eta > 0 and eta > max_eta(a_t, a_s) * (1 + 1e-12):
        raise ValueError(
            f"eta={eta:g} is too large for the move from time {t} to {s}: σ² would exceed 1 − ᾱ_s; "
            f"the largest is {max_eta(a_t, a_s):.6g}"
        )
    if a_t == a_s:
        return Move(t, s, a_t, a_s, x0=float(np.sqrt(a_s)), eps=float(np.sqrt(1 - a_s)), noise=0.0)
    noise, log_variance = 0.0, None
    if kind == "fixed_small":
        noise = sigma(a_t, a_s, eta) if eta else 0.0
    elif s > 0 and kind == "fixed_large":
        noise = np.sqrt(beta(a_t, a_s))
    elif s > 0 and kind == "learned_range":
        log_variance = log_variance_range(a_t, a_s)
    elif s > 0 and kind == "optimal":
        if eps_mean_square is None:
            raise ValueError("variance_type='optimal' needs eps_mean_square: E‖ε̂‖²/d for each time")
        if a_t == 0:
            raise ValueError(f"variance_type='optimal' is undefined at time {t}, where ᾱ is 0")
        noise = np.sqrt(optimal_variance(a_t, a_s, eta, float(eps_mean_square[t])))
    eps = eps_coefficient(a_t, a_s, eta) if eta else np.sqrt(1 - a_s)
    return Move(t, s, a_t, a_s, float(np.sqrt(a_s)), float(eps), float(noise), log_variance)


def downwards(tau: NDArray[np.int64]) -> list[tuple[int, int]]:
    """The pairs (t, s) of sampling along τ: (τ_S, τ_{S−1}), …, (τ_1, 0)."""
    times = [int(t) for t in tau]
    return list(zip(times[::-1], [*times[-2::-1], 0], strict=True))
