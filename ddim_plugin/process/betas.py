"""β schedules and their cumulative product ᾱ, in float64.

The paper's α_t is written ᾱ_t here (`alpha_bar`), as in Ho et al. (2020): ᾱ_t = ∏_{i≤t} (1 − β_i).
Tables of ᾱ have T + 1 entries: entry 0 is the data (ᾱ_0 = 1), entry t the paper's time t = 1..T.
"""

import math
from collections.abc import Callable, Sequence
from numbers import Integral

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

MAX_BETA = 0.999
"""Largest β that a schedule given through ᾱ may reach (Nichol & Dhariwal 2021, Section 3.2)."""


def linear(T: int, beta_start: float, beta_end: float) -> Array:
    """β_t evenly spaced from `beta_start` to `beta_end` (Ho et al. 2020; the paper's schedule)."""
    return np.linspace(beta_start, beta_end, T)


def scaled_linear(T: int, beta_start: float, beta_end: float) -> Array:
    """√β_t evenly spaced: "quad" in the authors' code, the schedule of latent diffusion."""
    return np.linspace(math.sqrt(beta_start), math.sqrt(beta_end), T) ** 2


def const(T: int, beta_start: float, beta_end: float) -> Array:
    """β_t = `beta_end` throughout (the authors' code)."""
    return np.full(T, float(beta_end))


def jsd(T: int, beta_start: float, beta_end: float) -> Array:
    """β_t = 1/(T − t + 1) (Sohl-Dickstein et al. 2015): reaches ᾱ_T = 0."""
    return 1.0 / np.arange(T, 0, -1)


def sigmoid(T: int, beta_start: float, beta_end: float) -> Array:
    """β_t = `beta_start` + (`beta_end` − `beta_start`)·sigmoid(u), u evenly spaced on [−6, 6] (the authors' code)."""
    return beta_start + (beta_end - beta_start) / (1.0 + np.exp(-np.linspace(-6, 6, T)))


def from_alpha_bar(alpha_bar_at: Callable[[float], float], T: int) -> Array:
    """β_t = min(1 − ᾱ(t/T)/ᾱ((t−1)/T), 0.999) for a function ᾱ on [0, 1] (Nichol & Dhariwal 2021, Eq. 17)."""
    values = np.array([alpha_bar_at(i / T) for i in range(T + 1)])
    return np.minimum(1 - values[1:] / values[:-1], MAX_BETA)


def squaredcos_cap_v2(T: int, beta_start: float, beta_end: float) -> Array:
    """ᾱ(u) = cos²(π/2·(u + 0.008)/1.008), the cosine schedule (Nichol & Dhariwal 2021, Eq. 17)."""
    return from_alpha_bar(lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2, T)


def exp(T: int, beta_start: float, beta_end: float) -> Array:
    """ᾱ(u) = exp(−12 u), as diffusers' "exp" transform."""
    return from_alpha_bar(lambda u: math.exp(-12.0 * u), T)


def laplace(T: int, beta_start: float, beta_end: float) -> Array:
    """Log-SNR with a Laplace density over time (Hang et al. 2024), as diffusers' "laplace" transform."""

    def alpha_bar_at(u: float) -> float:
        log_snr = -0.5 * math.copysign(1.0, 0.5 - u) * math.log(1 - 2 * abs(0.5 - u) + 1e-6)
        return math.sqrt(1.0 / (1.0 + math.exp(-log_snr)))

    return from_alpha_bar(alpha_bar_at, T)


SCHEDULES: dict[str, Callable[[int, float, float], Array]] = {
    f.__name__: f for f in (linear, scaled_linear, squaredcos_cap_v2, const, jsd, sigmoid, laplace, exp)
}

RANGED = ("linear", "scaled_linear", "const", "sigmoid")
"""Schedules that have a range."""

_MADE_FOR_1000 = ((1e-4, 0.02), (8.5e-4, 0.012), (1.5e-3, 0.0195), (1.5e-3, 0.0155))


def betas(schedule: str, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Array:
    """β_1, …, β_T of a named schedule, float64, shape (T,).

    Raises ValueError for an unknown name, T < 1, or a range outside 0 < `beta_start` ≤ `beta_end` < 1.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown beta_schedule {schedule!r}: use one of {', '.join(SCHEDULES)}, or trained_betas")
    check_length(T)
    if schedule in RANGED and not 0 < beta_start <= beta_end < 1:
        raise ValueError(f"β must satisfy 0 < beta_start ≤ beta_end < 1, not {beta_start!r} and {beta_end!r}")
    return check(SCHEDULES[schedule](int(T), beta_start, beta_end))


def check_length(T: int) -> None:
    """Raise ValueError unless T is a positive integer."""
    if not isinstance(T, Integral) or isinstance(T, bool) or T < 1:
        raise ValueError(f"num_train_timesteps must be a positive integer, not {T!r}")


def check(values: Sequence[float] | Array, T: int | None = None) -> Array:
    """`values` as a float64 array of β, each in (0, 1); the last may be 1 (zero terminal SNR).

    Raises ValueError naming the first entry out of range, or the length where it is not `T`.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"β must be a list of numbers, not an array of shape {array.shape}")
    if T is not None and array.size != T:
        raise ValueError(f"trained_betas has {array.size} entries, num_train_timesteps is {T}: they must agree")
    bad = ~((array > 0) & (array < 1))
    bad[-1] &= array[-1] != 1
    if bad.any():
        i = int(np.argmax(bad))
        raise ValueError(f"β must lie in (0, 1), only the last may be 1: β_{i + 1} = {array[i]!r}")
    return array


def made_for_1000(schedule: str, T: int, beta_start: float, beta_end: float) -> bool:
    """Whether a range of β that belongs to T = 1000 is used with another T, so that x_T is not noise (or too soon)."""
    recipes = ((start, end) for start, end in _MADE_FOR_1000)
    return T != 1000 and schedule in RANGED and any(np.allclose((beta_start, beta_end), r) for r in recipes)


def alpha_bar(betas: Array) -> Array:
    """ᾱ_0 = 1, ᾱ_t = ∏_{i≤t} (1 − β_i): float64, shape (T + 1,)."""
    return np.concatenate([[1.0], np.cumprod(1 - betas)])


def rescale_zero_terminal_snr(alpha_bar: Array) -> Array:
    """√ᾱ shifted and scaled so that ᾱ_T = 0 exactly and ᾱ_1 stays (Lin et al. 2023, Algorithm 1).

    Takes and returns a table of shape (T + 1,). T = 1 has no room for both and is refused with ValueError.
    """
    if len(alpha_bar) < 3:
        raise ValueError("rescale_betas_zero_snr needs num_train_timesteps of at least 2")
    root = np.sqrt(alpha_bar[1:])
    rescaled = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    return np.concatenate([[1.0], rescaled])
