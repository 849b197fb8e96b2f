"""Rising subsequences τ of the paper's times 1..T (Section 4.2, Appendix D.2). Timesteps of networks are one lower."""

import math
from collections.abc import Callable, Iterable
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Times = NDArray[np.int64]

MANY_STEPS = 8  # S from which `few_steps` looks at the log-SNR, and multistep methods have order 4
SHARE, SHARE_OF_FLOW = 0.45, 0.6  # of the log-SNR in the coordinate in which `few_steps` is even
FIRST_GAPS = (0.7, 0.85)  # uppermost gaps of `few_steps` relative to the others: two steps are of lower order
NOISE = 0.004  # largest ᾱ at which a network can be evaluated with x_T in place of the sample


def few_steps(S: int, alpha_bar: Array) -> Times:
    """Space S times for a multistep method that starts from T: closer at both ends, up to where x̂0 hardly changes.

    The top is T·S/(S + 2), or the lowest time with ᾱ ≤ `NOISE` if that is higher. Below 8 steps the bottom is 2.5·T/S²
    (T/(2S) for S < 5), and times are even in t^0.8. Else it is T/S², and they are even in a mixture of t and log-SNR.
    """
    T, (top, bottom) = len(alpha_bar) - 1, _ends(S, alpha_bar)
    if S < MANY_STEPS:
        return _spread(_descend(top, bottom, S, 1.25), T)
    times = np.arange(max(1, min(top, round(T / S**2))), top + 1)
    return _spread(_mixed(S, times, 1 / np.clip(alpha_bar[times], 1e-12, 1 - 1e-12) - 1, SHARE), T)


def few_steps_noise(S: int, alpha_bar: Array) -> Times:
    """Space S times evenly from T/8 (T/S for S > 8) to the top of `few_steps`, for a multistep method with noise."""
    T, top = len(alpha_bar) - 1, _ends(S, alpha_bar)[0]
    bottom = min(top, max(1, T / max(8, S)))  # the last noise is added there: later noise degrades images of few steps
    return _spread(np.linspace(top, bottom, S), T)


def few_sigmas(S: int, shifted: bool = False, noisy: bool = False) -> list[float]:
    """Space S values of σ for a multistep method on the path of flow matching, before its shift, descending.

    They are even from 1 − 1/(2S), at least 0.9, to 1/(2S), with smaller uppermost gaps. From 8 steps on they are even
    in a mixture of σ and log-SNR, to 4/S², at least 0.001. If they are `shifted`, they are even in σ^(1/1.25), to
    1/(4S). With noise they end at 1/S.
    """
    top, (power, bottom) = max(0.9, 1 - 0.5 / S), (1.25, 0.25) if shifted else (1.0, 0.5)
    if S >= MANY_STEPS and not shifted and not noisy:
        sigmas = np.linspace(max(4 / S**2, 1e-3), top, 100_000)  # networks of 1000 times have not seen less
        return _mixed(S, sigmas, sigmas / (1 - sigmas), SHARE_OF_FLOW).tolist()
    return _descend(top, min(0.9, (1 if noisy else bottom) / S), S, power).tolist()


def _mixed(S: int, values: Array | Times, noise: Array, share: float) -> Array:
    scaled = [(each - each[0]) / max(each[-1] - each[0], 1e-12) for each in (values, np.log(noise))]
    return np.interp(np.linspace(1, 0, S), (1 - share) * scaled[0] + share * scaled[1], values)


def _descend(top: float, bottom: float, S: int, power: float) -> Array:
    gaps = np.append(FIRST_GAPS, np.ones(S))[: S - 1]
    way = np.append(0, gaps.cumsum()) / (gaps.sum() or 1)
    top, bottom = top ** (1 / power), bottom ** (1 / power)
    return (top - (top - bottom) * way) ** power


def _ends(S: int, alpha_bar: Array) -> tuple[int, int]:
    T, noise = len(alpha_bar) - 1, np.flatnonzero(alpha_bar <= NOISE)
    top = min(T, max(S, round(T * S / (S + 2)), int(noise[0]) if len(noise) else T))
    return top, min(top, max(1, round(min(T / (2 * S), 2.5 * T / S**2))))


def _spread(times: Array, T: int) -> Times:
    steps, rounded = np.arange(len(times)), np.round(times[::-1]).astype(np.int64)
    return np.minimum(np.maximum.accumulate(rounded - steps) + steps, T + 1 - len(times) + steps)


# τ_i for i = 1..S by name, as functions of i, S, T and ᾱ_0..ᾱ_T.
SPACINGS: dict[str, Callable[[Times, int, int, Any], NDArray]] = {
    "linear": lambda i, S, T, _: T * i // S,  # ⌊T·i/S⌋ (Appendix D.2, with c = T/S, so that τ_S = T)
    "quadratic": lambda i, S, T, _: np.maximum(i, T * i * i // (S * S)),  # ⌊T·i²/S²⌋ (Appendix D.2), but distinct
    "leading": lambda i, S, T, _: 1 + (i - 1) * (T // S),  # as in diffusers; `tau` adds an offset
    "trailing": lambda i, S, T, _: np.round(T * i / S),  # as in diffusers, half to even: the top is T
    "linspace": lambda i, S, T, _: 1 + np.round(np.linspace(0, T - 1, S)),  # as in diffusers: from 1 to T
    "few_steps": lambda i, S, T, alpha_bar: few_steps(S, alpha_bar),
    "few_steps_noise": lambda i, S, T, alpha_bar: few_steps_noise(S, alpha_bar),
    # The authors' code to the letter: more than S times if S does not divide T, and small times that may repeat.
    "paper_linear": lambda i, S, T, _: 1 + np.arange(0, T, T // S),
    "paper_quadratic": lambda i, S, T, _: 1 + np.floor(np.linspace(0, np.sqrt(T * 0.8), S) ** 2),
}
# Descending σ by name, as functions of S, the range and ρ, for variance exploding (Karras et al. 2022, Eq. 5).
SIGMAS: dict[str, Callable[[int, float, float, float], Array]] = {
    "karras": lambda S, low, high, rho: np.linspace(high ** (1 / rho), low ** (1 / rho), S) ** rho,
    "exponential": lambda S, low, high, _: np.geomspace(high, low, S),
}
NAMES = (*SPACINGS, *SIGMAS)


def tau(spacing: str, S: int, T: int, steps_offset: int = 0, alpha_bar: Array | None = None) -> Times:
    """Compute the subsequence named `spacing`: S distinct increasing times in 1..T, int64.

    The two `paper_` spacings have those of the authors' code instead. `steps_offset` ≥ 0 shifts "leading" upwards as in
    diffusers. `alpha_bar`, (T + 1,), is for "few_steps" and "few_steps_noise". Raises ValueError for an unknown name, S
    outside 1..T, and an offset that is no integer or leads beyond T.
    """
    check_name("timestep_spacing", spacing, SPACINGS)
    S = integer("num_inference_steps", S, 1, T)
    times = SPACINGS[spacing](np.arange(1, S + 1, dtype=np.int64), S, T, alpha_bar).astype(np.int64)
    return times + (integer("steps_offset", steps_offset, 0, T - int(times[-1])) if spacing == "leading" else 0)


def check_name(setting: str, value: str, names: Iterable[str]) -> None:
    """Raise ValueError unless the `value` of a setting is one of `names`."""
    if value not in (*names,):  # a value need not be hashable
        raise ValueError(f"unknown {setting} {value!r}: use one of {', '.join(names)}")


def integer(setting: str, value: Any, low: int = 0, high: float = math.inf) -> int:
    """Convert the value of a setting to an int. Raises ValueError unless it is an integer from `low` to `high`."""
    if not is_integer(value) or not low <= value <= high:
        bounds = f"from {low} to {high}" if high < math.inf else f"of at least {low}"
        raise ValueError(f"{setting} must be an integer {bounds}, not {value!r}")
    return int(value)


def is_integer(value: object) -> bool:
    """Return whether `value` is an integer of Python or NumPy. A bool is not."""
    return isinstance(value, Integral) and not isinstance(value, bool)
