"""Subsequences τ of the times 1..T, along which an accelerated sampler moves (Section 4.2, Appendix D.2).

Times are the paper's: 1..T, increasing. The network's time index is one lower (see schedulers.py).
"""

import warnings
from collections.abc import Callable, Iterable
from itertools import pairwise
from numbers import Integral

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Times = NDArray[np.int64]

FIRST_GAPS = (0.7, 0.85)
"""The uppermost gaps of `few_steps`, in terms of the others: moves there are of order 1 and 2 yet."""

NOISE = 0.004
"""ᾱ from which on the sample is noise to a network that is shown x_T in its place."""


def linear(S: int, T: int) -> Times:
    """τ_i = ⌊T·i/S⌋, i = 1..S (Appendix D.2, with c = T/S, so that τ_S = T)."""
    i = np.arange(1, S + 1, dtype=np.int64)
    return T * i // S


def quadratic(S: int, T: int) -> Times:
    """τ_i = max(i, ⌊T·i²/S²⌋), i = 1..S (Appendix D.2 with c = T/S²; the maximum keeps small times distinct)."""
    i = np.arange(1, S + 1, dtype=np.int64)
    return np.maximum(i, T * i * i // (S * S))


def leading(S: int, T: int) -> Times:
    """τ_i = 1 + (i − 1)·⌊T/S⌋, as diffusers' "leading"; an offset is added by `tau`."""
    return 1 + np.arange(S, dtype=np.int64) * (T // S)


def trailing(S: int, T: int) -> Times:
    """τ_i = round(T·i/S), half to even, as diffusers' "trailing": the top is T."""
    return np.round(T * np.arange(1, S + 1) / S).astype(np.int64)


def linspace(S: int, T: int) -> Times:
    """S times evenly spaced from 1 to T, rounded half to even, as diffusers' "linspace" (S = 1 gives 1)."""
    return 1 + np.round(np.linspace(0, T - 1, S)).astype(np.int64)


def paper_linear(S: int, T: int) -> Times:
    """The authors' "uniform" to the letter: every ⌊T/S⌋-th time from 1 on.

    Gives more than S times where S does not divide T (S = 12, T = 1000: 13), and never reaches T.
    """
    return 1 + np.arange(0, T, T // S, dtype=np.int64)


def paper_quadratic(S: int, T: int) -> Times:
    """The authors' "quad" to the letter: 1 + ⌊u²⌋, u evenly spaced on [0, √(0.8 T)].

    Repeats small times for large S (S = 50, T = 1000: 49 distinct), and its top is 1 + 0.8 T or one below, where
    rounding takes it (S = 1: 1).
    """
    return 1 + (np.linspace(0, np.sqrt(T * 0.8), S) ** 2).astype(np.int64)


def few_steps(S: int, alpha_bar: Array) -> Times:
    """S times between two ends that move out as S grows: 2.5·T/S² (T/(2S) below S = 5), and T·S/(S + 2) or, where that
    is higher, the start of noise; even in t^(4/5) but for the uppermost gaps, which are smaller.

    For a multistep method whose first move is made from T. Above its top the network is shown noise alone (ᾱ ≤ NOISE),
    and tells hardly more of it than at the top.
    """
    top, bottom = _ends(S, alpha_bar)
    gaps = np.append(FIRST_GAPS, np.ones(S))[: S - 1]
    way = np.append(0, gaps.cumsum()) / (gaps.sum() or 1)
    return _spread((top**0.8 - (top**0.8 - bottom**0.8) * way) ** 1.25, len(alpha_bar) - 1)


def few_steps_noise(S: int, alpha_bar: Array) -> Times:
    """S times from T/8, or T/S where that is lower, to the top of `few_steps`, evenly spaced.

    For a multistep method with noise: the last draw is at the bottom, and in so few steps what is drawn nearer to the
    data costs more than it mends.
    """
    T = len(alpha_bar) - 1
    top = _ends(S, alpha_bar)[0]
    return _spread(np.linspace(top, min(top, max(1, T / max(8, S))), S), T)


def _ends(S: int, alpha_bar: Array) -> tuple[int, int]:
    """Top and bottom for few steps."""
    T = len(alpha_bar) - 1
    noise = np.flatnonzero(alpha_bar <= NOISE)
    top = min(T, max(S, round(T * S / (S + 2)), int(noise[0]) if len(noise) else T))
    return top, min(top, max(1, round(min(T / (2 * S), 2.5 * T / S**2))))


def _spread(times: Array, T: int) -> Times:
    """Decreasing numbers as distinct increasing times in 1..T, rounded; those too near are moved up, or down at T."""
    steps = np.arange(len(times))
    rounded = np.round(times[::-1]).astype(np.int64)
    up = np.maximum.accumulate(rounded - steps) + steps
    return np.minimum(up, T + 1 - len(times) + steps)


SPACINGS: dict[str, Callable[[int, int], Times]] = {
    f.__name__: f for f in (linear, quadratic, leading, trailing, linspace, paper_linear, paper_quadratic)
}

OF_ALPHA_BAR: dict[str, Callable[[int, Array], Times]] = {f.__name__: f for f in (few_steps, few_steps_noise)}
"""Spacings that depend on ᾱ."""

NAMES = (*SPACINGS, *OF_ALPHA_BAR)


def tau(spacing: str, S: int, T: int, steps_offset: int = 0, alpha_bar: Array | None = None) -> Times:
    """The subsequence named `spacing` with S steps: increasing times in 1..T, int64.

    Named spacings give exactly S distinct times for every 1 ≤ S ≤ T; the two `paper_` ones what the authors' code
    gives. `steps_offset` ≥ 0 shifts "leading" upwards (diffusers' key of that name), as far as T allows,
    with a warning where that is less. `alpha_bar`, (T + 1,), is for the spacings that depend on it.
    Raises ValueError for an unknown name, S outside 1..T, a negative or fractional offset, or ᾱ that is needed.
    """
    check_spacing(spacing)
    if not is_integer(S) or not 1 <= S <= T:
        raise ValueError(f"num_inference_steps must be an integer from 1 to {T} (num_train_timesteps), not {S!r}")
    if spacing in OF_ALPHA_BAR:
        if alpha_bar is None or len(alpha_bar) != T + 1:
            raise ValueError(f"the spacing {spacing!r} depends on ᾱ: give alpha_bar, ᾱ_0..ᾱ_{T}")
        return OF_ALPHA_BAR[spacing](int(S), alpha_bar)
    times = SPACINGS[spacing](int(S), T)
    if spacing != "leading":
        return times
    room = T - int(times[-1])
    if check_offset(steps_offset) > room:
        message = f"steps_offset={steps_offset} does not fit {S} of {T} steps: taken as {room}"
        warnings.warn(message, stacklevel=2)
    return times + min(steps_offset, room)


def check_spacing(spacing: str) -> None:
    """Raise ValueError unless `spacing` is a known name."""
    if spacing not in NAMES:
        raise ValueError(f"unknown timestep_spacing {spacing!r}: use one of {', '.join(NAMES)}, or pass timesteps=")


def check_offset(steps_offset: int) -> int:
    """`steps_offset` as an int, or ValueError where it is negative or not an integer."""
    if not is_integer(steps_offset) or steps_offset < 0:
        raise ValueError(f"steps_offset must be a non-negative integer, not {steps_offset!r}")
    return int(steps_offset)


def explicit(times: Iterable[int], T: int, *, lowest: int = 1, descending: bool = False) -> Times:
    """An explicit τ, checked: distinct integers in order. Returns increasing times in 1..T.

    `lowest` is what the caller calls time 1 (0 where times index the network), `descending` the order it gives.
    Raises ValueError naming the first value that is not an integer, out of range, repeated or out of order.
    """
    if not isinstance(times, Iterable):
        raise ValueError(f"timesteps must be a list of integers, not {times!r}")
    values = list(times)
    highest = lowest + T - 1
    if not values:
        raise ValueError("an empty list of timesteps: give at least one time")
    for value in values:
        if not is_integer(value):
            raise ValueError(f"timesteps must be integers, not {value!r}")
        if not lowest <= value <= highest:
            raise ValueError(f"timestep {value} is outside {lowest}..{highest}")
    for first, second in pairwise(values):
        if first == second:
            raise ValueError(f"timestep {first} stands twice: the times must be distinct")
        if (first < second) == descending:
            order = "descending" if descending else "increasing"
            raise ValueError(f"timesteps must be in {order} order, but {first} stands before {second}")
    return np.array(sorted(values), dtype=np.int64) - lowest + 1


def is_integer(value: object) -> bool:
    """Whether `value` is an integer of Python or NumPy; a bool is not."""
    return isinstance(value, Integral) and not isinstance(value, bool)
