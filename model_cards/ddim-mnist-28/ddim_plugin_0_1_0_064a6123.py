"""ddim-plugin 0.1.0 in one file: Denoising Diffusion Implicit Models for Hugging Face diffusers.

Written by the package itself, from its modules in their order. License: Apache-2.0.
"""

from PIL import Image
from PIL import ImageDraw
from PIL import ImageFont
from PIL import ImageOps
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import fields
from diffusers import DDIMScheduler
from diffusers import DiffusionPipeline
from diffusers import ImagePipelineOutput
from diffusers import ModelMixin
from diffusers import SchedulerMixin
from diffusers import UNet2DModel
from diffusers.configuration_utils import ConfigMixin
from diffusers.configuration_utils import FrozenDict
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor
from functools import cached_property
from functools import lru_cache
from functools import partial
from huggingface_hub import CommitInfo
from huggingface_hub import CommitOperationAdd
from huggingface_hub import CommitOperationDelete
from huggingface_hub import EvalResult
from huggingface_hub import HfApi
from huggingface_hub import ModelCard
from huggingface_hub import ModelCardData
from huggingface_hub import constants
from huggingface_hub import get_token
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.errors import GatedRepoError
from huggingface_hub.errors import HFValidationError
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.errors import LocalTokenNotFoundError
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.errors import RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils import yaml_dump
from itertools import pairwise
from numbers import Integral
from numbers import Real
from numpy.typing import NDArray
from pathlib import Path
from pathlib import PureWindowsPath
from string import Template
from torch import Generator
from torch import Tensor
from typing import Any
from typing import BinaryIO
from typing import ClassVar
from typing import NamedTuple
import diffusers
import hashlib
import huggingface_hub
import inspect
import io
import json
import logging
import math
import numpy as np
import os
import re
import sys
import tempfile
import torch
import warnings
from types import SimpleNamespace


# ======== bundle ========


def code() -> tuple[str, str]:
    """(name, text) of this file."""
    return Path(__file__).stem, Path(__file__).read_text(encoding="utf-8")


# ======== version ========

"""The package's version, read at build time without importing anything else."""

__version__ = "0.1.0"


# ======== betas ========

"""β schedules and their cumulative product ᾱ, in float64.

The paper's α_t is written ᾱ_t here (`alpha_bar`), as in Ho et al. (2020): ᾱ_t = ∏_{i≤t} (1 − β_i).
Tables of ᾱ have T + 1 entries: entry 0 is the data (ᾱ_0 = 1), entry t the paper's time t = 1..T.
"""








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


schedules = SimpleNamespace(
    Array=Array,
    MAX_BETA=MAX_BETA,
    linear=linear,
    scaled_linear=scaled_linear,
    const=const,
    jsd=jsd,
    sigmoid=sigmoid,
    from_alpha_bar=from_alpha_bar,
    squaredcos_cap_v2=squaredcos_cap_v2,
    exp=exp,
    laplace=laplace,
    SCHEDULES=SCHEDULES,
    RANGED=RANGED,
    _MADE_FOR_1000=_MADE_FOR_1000,
    betas=betas,
    check_length=check_length,
    check=check,
    made_for_1000=made_for_1000,
    alpha_bar=alpha_bar,
    rescale_zero_terminal_snr=rescale_zero_terminal_snr,
)


# ======== tau ========

"""Subsequences τ of the times 1..T, along which an accelerated sampler moves (Section 4.2, Appendix D.2).

Times are the paper's: 1..T, increasing. The network's time index is one lower (see schedulers.py).
"""









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


def few_steps_power(S: int, alpha_bar: Array) -> Times:
    """The ends of `few_steps`, and S times between them along a power law of exponent 1.5: nearer to the data."""
    top, bottom = _ends(S, alpha_bar)
    return _spread(np.linspace(top ** (2 / 3), bottom ** (2 / 3), S) ** 1.5, len(alpha_bar) - 1)


def log_snr(S: int, alpha_bar: Array) -> Times:
    """The ends of `few_steps`, and S times between them evenly spaced in ln(ᾱ/(1 − ᾱ))."""
    top, bottom = _ends(S, alpha_bar)
    t = np.arange(bottom, top + 1)
    inside = np.clip(alpha_bar[t], 1e-12, 1 - 1e-12)
    values = np.log(inside / (1 - inside))
    return _spread(np.interp(np.linspace(values[-1], values[0], S), values[::-1], t[::-1]), len(alpha_bar) - 1)


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

OF_ALPHA_BAR: dict[str, Callable[[int, Array], Times]] = {
    f.__name__: f for f in (few_steps, few_steps_noise, few_steps_power, log_snr)
}
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


tau = SimpleNamespace(
    Array=Array,
    Times=Times,
    FIRST_GAPS=FIRST_GAPS,
    NOISE=NOISE,
    linear=linear,
    quadratic=quadratic,
    leading=leading,
    trailing=trailing,
    linspace=linspace,
    paper_linear=paper_linear,
    paper_quadratic=paper_quadratic,
    few_steps=few_steps,
    few_steps_noise=few_steps_noise,
    few_steps_power=few_steps_power,
    log_snr=log_snr,
    _ends=_ends,
    _spread=_spread,
    SPACINGS=SPACINGS,
    OF_ALPHA_BAR=OF_ALPHA_BAR,
    NAMES=NAMES,
    tau=tau,
    check_spacing=check_spacing,
    check_offset=check_offset,
    explicit=explicit,
    is_integer=is_integer,
)


# ======== process ========

"""One move t → s of the generalized process q_σ, and the plan of moves over a subsequence τ.

A move takes x_t to x_s = √ᾱ_s·x̂0 + √(1 − ᾱ_s − σ²)·ε̂ + noise·z (Eq. 12), with σ = σ(η) of Eq. 16. Functions take
ᾱ_t and ᾱ_s as floats or float64 arrays alike; everything here is float64, and made once before sampling begins.
"""







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


def adds_noise(variance_type: str, eta: float) -> bool:
    """Whether the process of these settings is stochastic by itself; "learned_range" names the network, with η = 0."""
    return eta > 0 or variance_type in ("fixed_large", "optimal")


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


process = SimpleNamespace(
    Array=Array,
    Number=Number,
    VARIANCES=VARIANCES,
    ETA_FREE=ETA_FREE,
    Move=Move,
    beta=beta,
    beta_tilde=beta_tilde,
    sigma=sigma,
    eps_coefficient=eps_coefficient,
    max_eta=max_eta,
    x0_weight=x0_weight,
    optimal_variance=optimal_variance,
    log_variance_range=log_variance_range,
    effective_eta=effective_eta,
    adds_noise=adds_noise,
    move=move,
    downwards=downwards,
)


# ======== prediction ========

"""From the network's output to (x̂0, ε̂), in three verbs: predict, constrain, combine.

With the noise prediction x̂0 = (x_t − √(1 − ᾱ_t)·ε̂)/√ᾱ_t (Eq. 9); a network may predict x0 instead, or
v = √ᾱ_t·ε − √(1 − ᾱ_t)·x_0 (Salimans & Ho 2022). All three are linear in (x_t, output).
"""









PREDICTIONS = ("epsilon", "sample", "v_prediction")
"""What a network may predict: the noise ε, the clean image x0, or the velocity v."""

FLAT = 0.02
"""Slope of a move below which `unfold` does not divide by it."""

Coefficient = float | Tensor
"""A number, or a tensor that broadcasts over (B, C, H, W)."""


class Prediction(NamedTuple):
    """x̂0 = x0_x·x_t + x0_out·output and ε̂ = eps_x·x_t + eps_out·output, at one time."""

    x0_x: Coefficient
    x0_out: Coefficient
    eps_x: Coefficient
    eps_out: Coefficient


def check_prediction(prediction_type: str) -> None:
    """Raise ValueError unless `prediction_type` is known."""
    if prediction_type not in PREDICTIONS:
        raise ValueError(f"unknown prediction_type {prediction_type!r}: use one of {', '.join(PREDICTIONS)}")


def prediction(prediction_type: str, alpha_bar_t: float) -> Prediction:
    """The linear map of a prediction type at ᾱ_t.

    Raises ValueError where it divides by zero: ε at ᾱ_t = 0 (zero terminal SNR), x0 at ᾱ_t = 1 (the data).
    """
    check_prediction(prediction_type)
    signal, noise = float(np.sqrt(alpha_bar_t)), float(np.sqrt(1 - alpha_bar_t))
    if prediction_type == "epsilon":
        if signal == 0:
            raise ValueError(
                "prediction_type='epsilon' divides by zero where ᾱ is 0: with zero terminal SNR use a network that "
                "predicts v or x0, or times τ that stay below the top"
            )
        return Prediction(1 / signal, -noise / signal, 0.0, 1.0)
    if prediction_type == "sample":
        if noise == 0:
            raise ValueError("prediction_type='sample' gives no ε̂ where ᾱ is 1")
        return Prediction(0.0, 1.0, 1 / noise, -signal / noise)
    return Prediction(signal, -noise, noise, signal)


def split_variance(output: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """(prediction, variance), each (B, C, H, W), of a network with twice the channels, output (B, 2C, H, W)."""
    mean, variance = torch.split(output, channels, dim=1)
    return mean, variance


def learned_std(variance: Tensor, log_variance: tuple[Coefficient, Coefficient]) -> Tensor:
    """√exp of `learned_log_variance`."""
    return torch.exp(0.5 * learned_log_variance(variance, log_variance))


def learned_log_variance(variance: Tensor, log_variance: tuple[Coefficient, Coefficient]) -> Tensor:
    """v·ln β + (1 − v)·ln β̃, v = (`variance` + 1)/2, from (ln β̃, ln β) (Nichol & Dhariwal 2021, Eq. 15)."""
    low, high = log_variance
    return low + (variance + 1) * (0.5 * (high - low))


def threshold(x0: Tensor, ratio: float, max_value: float) -> Tensor:
    """Dynamic thresholding (Saharia et al. 2022, Section 2.3): clip to [−s, s] and divide by s, per image.

    s is the `ratio` quantile of |x̂0| over the pixels of the image, kept in [1, `max_value`].
    """
    s = _quantile(x0.abs().flatten(1), ratio).clamp(1, max_value)
    s = s.view(-1, *[1] * (x0.ndim - 1))
    return torch.clamp(x0, -s, s) / s


def _quantile(rows: Tensor, ratio: float) -> Tensor:
    """The `ratio` quantile of each row, linear between ranks; of any length, and read by no host."""
    rank = ratio * (rows.shape[1] - 1)
    low = int(rank)
    below = rows.kthvalue(low + 1, dim=1).values
    if rank == low:
        return below
    above = rows.kthvalue(low + 2, dim=1).values
    return torch.lerp(below, above, rank - low)


def eps_from_x0(alpha_bar_t: float) -> tuple[float, float]:
    """(a, b) with ε̂ = a·x_t + b·x̂0 = (x_t − √ᾱ_t·x̂0)/√(1 − ᾱ_t): the noise that agrees with a given, clipped x̂0."""
    noise = float(np.sqrt(1 - alpha_bar_t))
    return 1 / noise, -float(np.sqrt(alpha_bar_t)) / noise


def combine(a: Coefficient, x: Tensor, b: Coefficient, y: Tensor) -> Tensor:
    """a·x + b·y, in float32 at least: two passes over memory, one new tensor."""
    return accumulate(torch.mul(at_least_float32(x), a), b, y)


def accumulate(x: Tensor, b: Coefficient, y: Tensor) -> Tensor:
    """x + b·y, in place."""
    if isinstance(b, Tensor):
        return x.addcmul_(b, y.to(x.dtype))
    return x.add_(y, alpha=b) if b else x


def rescale(x: Tensor, a: float, b: float, y: Tensor) -> Tensor:
    """a·x + b·y, in place; on the CPU in one pass, as a·x + b·(y ⊗ 1), which torch has as one kernel."""
    if b and x.device.type == "cpu" and x.dtype == y.dtype and x.is_contiguous() and y.is_contiguous():
        x.view(-1, 1).addr_(y.view(-1), _ONE if x.dtype == torch.float32 else x.new_ones(1), beta=a, alpha=b)
        return x
    return accumulate(x.mul_(a), b, y)


_ONE = torch.ones(1)


def at_least_float32(x: Tensor) -> Tensor:
    """`x`, in float32 where it is of half precision."""
    return x if x.dtype == torch.float32 or x.dtype == torch.float64 else x.float()


def fold(prediction: Prediction, move: Move) -> tuple[float, float]:
    """(a, b) with x_s = a·x_t + b·output for a move on an unconstrained prediction, noise apart."""
    return (
        float(move.x0 * prediction.x0_x + move.eps * prediction.eps_x),
        float(move.x0 * prediction.x0_out + move.eps * prediction.eps_out),
    )


def unfold(prediction: Prediction, move: Move) -> tuple[float, float]:
    """(a, b) with x_t = a·x_s + b·output: the move of `fold` solved for x_t, for the same output of the network.

    Where x_s hardly depends on x_t (a slope below `FLAT`; x0 networks near the data) that would blow up any error of
    the output: there the noise is taken from x_s instead, ε̂ = eps_x·x_s + eps_out·output, and x_t is made by Eq. 13.
    Raises ValueError for the move from ᾱ_t = 0 to the data, which forgets x_t.
    """
    x, out = fold(prediction, move)
    if abs(x) >= FLAT or (move.alpha_bar_t == 0 and x):
        return 1 / x, -out / x
    if move.alpha_bar_t == 0:
        raise ValueError(
            f"the move from time {move.t}, where ᾱ is 0, to {move.s} forgets x_{move.t}: it has no inverse. Take more "
            "steps, or times τ that stay below the top"
        )
    scale = float(np.sqrt(move.alpha_bar_t / move.alpha_bar_s))
    eps = float(np.sqrt(1 - move.alpha_bar_t) - scale * np.sqrt(1 - move.alpha_bar_s))
    return float(scale + eps * prediction.eps_x), float(eps * prediction.eps_out)


p = SimpleNamespace(
    PREDICTIONS=PREDICTIONS,
    FLAT=FLAT,
    Coefficient=Coefficient,
    Prediction=Prediction,
    check_prediction=check_prediction,
    prediction=prediction,
    split_variance=split_variance,
    learned_std=learned_std,
    learned_log_variance=learned_log_variance,
    threshold=threshold,
    _quantile=_quantile,
    eps_from_x0=eps_from_x0,
    combine=combine,
    accumulate=accumulate,
    rescale=rescale,
    _ONE=_ONE,
    at_least_float32=at_least_float32,
    fold=fold,
    unfold=unfold,
)


# ======== ode ========

"""The ODE of Eq. 14 and its SDEs, and multistep methods that are exact on any grid.

With ς = √(1/ᾱ − 1) the ODE reads d(x/√ᾱ) = ε̂ dς, or, in the data, d(x/√(1 − ᾱ)) = x̂0 d(1/ς). So a move from t to s
needs the mean of ε̂ over dς, or that of x̂0 over d(1/ς), and is a step of DDIM with that mean in place of the network's
last value. A multistep method takes the mean of the polynomial through the last values, in some coordinate u(ς).

Everything here is float64, takes ᾱ as numbers, and is made once before sampling begins.
"""






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
    exponent = log if of_eps else -(1 + eta**2) * log  # d(ς^p) = p·ς^p d ln ς
    measure = _WEIGHTS * np.exp(exponent - exponent.max() if eta else exponent)
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


ode = SimpleNamespace(
    Array=Array,
    QUANTITIES=QUANTITIES,
    COORDINATES=COORDINATES,
    NEGLIGIBLE=NEGLIGIBLE,
    _NODES=_NODES,
    _WEIGHTS=_WEIGHTS,
    mean_weights=mean_weights,
    check_solver=check_solver,
    _nsr=_nsr,
    _basis=_basis,
)


# ======== gaussian ========

"""Gaussians: the path between two latents, divergence, and the likelihood of 8-bit images."""






OPPOSITE = 0.01
"""Angle, in radians, below which two latents count as opposite: there the formula of `slerp` divides by almost 0."""


BITS = 1 / math.log(2)
"""Bits in a nat."""

BIN = 1 / 255
"""Half the width of one of the 256 levels of an image in −1..1."""


def kl(mean_q: Tensor, log_variance_q: Tensor, mean_p: Tensor, log_variance_p: Tensor) -> Tensor:
    """KL(N(mean_q, exp log_variance_q) ‖ N(mean_p, exp log_variance_p)) of each element, in nats."""
    ratio = log_variance_q - log_variance_p
    return 0.5 * (torch.expm1(ratio) - ratio + (mean_q - mean_p).square() * torch.exp(-log_variance_p))


def discretized_log_likelihood(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """ln of the mass that N(mean, std²) puts on each pixel's bin, in nats (Ho et al. 2020, Eq. 13).

    `x` holds 8-bit images in −1..1: 256 levels, each the middle of a bin; the first and the last bin are open. All
    tensors broadcast. Exact in both tails, where the mass itself is 0 in float32.
    """
    centred = x - mean
    sign = torch.where(centred > 0, -1.0, 1.0)  # the bin is mirrored to where the distribution function is small
    near = (sign * centred + BIN) / std
    far = (sign * centred - BIN) / std
    log_near, log_far = torch.special.log_ndtr(near), torch.special.log_ndtr(far)
    inside = log_near + torch.log(-torch.expm1(log_far - log_near))
    lowest, highest = x < BIN - 1, x > 1 - BIN
    open_end = torch.where((lowest & (sign > 0)) | (highest & (sign < 0)), log_near, torch.special.log_ndtr(-far))
    return torch.where(lowest | highest, open_end, inside)


def slerp(x0: Tensor, x1: Tensor, a: float) -> Tensor:
    """sin((1 − a)θ)/sin θ·x⁰ + sin(aθ)/sin θ·x¹, θ the angle between the two, sample by sample (Appendix D.5).

    `x0` and `x1` are (B, …) of one shape, `a` in [0, 1]. For a = 0 and a = 1 the ends, exactly. Parallel samples are
    interpolated linearly, which is the formula's limit. Opposite ones (within `OPPOSITE`) have no shortest path: they
    are joined by a great circle, through a fixed direction where they leave none, with the norm in between.
    Raises ValueError for shapes that differ, and for `a` outside [0, 1].
    """
    if not 0 <= a <= 1:
        raise ValueError(f"slerp goes from a = 0 to a = 1, not to {a!r}")
    if x0.shape != x1.shape or x0.ndim < 2:
        raise ValueError(f"slerp needs two batches of one shape, not {tuple(x0.shape)} and {tuple(x1.shape)}")
    if a == 0 or a == 1:
        return (x1 if a else x0).clone()
    work = precise(x0)
    p, q = x0.to(work).flatten(1), x1.to(work).flatten(1)
    norm_p, norm_q = p.norm(dim=1, keepdim=True), q.norm(dim=1, keepdim=True)
    u, v = _unit(p, norm_p), _unit(q, norm_q)
    angle = 2 * torch.atan2((u - v).norm(dim=1, keepdim=True), (u + v).norm(dim=1, keepdim=True))
    sine = angle.sin()
    parallel = (angle < 1e-8) | (norm_p == 0) | (norm_q == 0)
    opposite = torch.pi - angle < OPPOSITE
    safe = torch.where(parallel | opposite, torch.ones_like(sine), sine)
    weight_p = torch.where(parallel, 1 - a, ((1 - a) * angle).sin() / safe)
    weight_q = torch.where(parallel, a, (a * angle).sin() / safe)
    x = weight_p * p + weight_q * q
    if bool(opposite.any()):
        around = torch.cos(a * angle) * u + torch.sin(a * angle) * _across(u, v)
        x = torch.where(opposite & ~parallel, ((1 - a) * norm_p + a * norm_q) * around, x)
    return x.view_as(x0).to(x0.dtype)


def precise(x: Tensor) -> torch.dtype:
    """float64, or float32 on a device that has none."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def _unit(x: Tensor, norm: Tensor) -> Tensor:
    return x / torch.where(norm == 0, torch.ones_like(norm), norm)


def _across(u: Tensor, v: Tensor) -> Tensor:
    """A unit vector at right angles to u, towards v; towards a fixed Gaussian one where v is −u."""
    fixed = torch.randn(u.shape[1], generator=torch.Generator().manual_seed(0)).to(u)
    towards = torch.where((u + v).norm(dim=1, keepdim=True) < 1e-6, fixed.expand_as(u), v)
    across = towards - (towards * u).sum(1, keepdim=True) * u
    return _unit(across, across.norm(dim=1, keepdim=True))  # 0 in one dimension, where there is none


# ======== inversion ========

"""Exact inversion: for each move x_s = f(x_t) of the sampler, the x_t that gives a known x_s.

The naive inverse evaluates the network at the known end, and its error is the paper's Table 2. Here f(x_t) = x_s is
solved by a fixed-point iteration x ← x + γ(x_s − f(x)) under Anderson acceleration (Walker & Ni 2011), each image on
its own. f is the sampler's own step, rounding and all, so that what is found is what the sampler will undo. On the move
to the data f ends with the clamp to −1..1 that makes an image of x_0: a black pixel asks for x̂0 ≤ −1, not for −1.

That move is where an inverse may not exist, since a picture need not lie in the range of x̂0(·, τ_1); the lower τ_1, the
nearer it does. Where f′ is small, a small residual takes a large change of x_t. The search starts at the naive inverse
and ends when it makes no more progress; the report gives the deviation of the latents beside the residuals, since
latents that leave the shell of noise are worth less.
"""












MEMORY = 5
"""Earlier iterates that an accelerated one is made from."""

PATIENCE = 6
"""Evaluations over which the residual must make `PROGRESS`, or the search for an image ends."""

SETTLED = 3
"""The same, to tell whether an image is at its floor after a search of no more than `PATIENCE` evaluations."""

PROGRESS = 0.9
"""Factor by which the smallest residual must fall to count as progress."""

GROWTH = 2.0
"""Factor over the best residual at which an iteration is taken back to its best iterate, with half the step."""

VARIANCE = 100.0
"""Variance of data, along the direction it varies most, for which the plain iteration is made to converge."""

Residual = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(x, rows) ↦ (x_s − f(x), the network's output at x) for the images `rows`, indices into the batch."""


@dataclass(frozen=True)
class Solution:
    """x_t for one move: the iterate of the smallest residual of each image, and how it was come by; arrays are (B,)."""

    x: Tensor
    output: Tensor  # the network's, at x
    residual: NDArray[np.float64]  # root mean square of x_s − f(x_t)
    evaluations: NDArray[np.int64]
    at_floor: NDArray[np.bool_]  # no progress at the end
    damped: NDArray[np.bool_]  # grew at least once, and was taken back

    def report(self, tolerance: float, unit: float, cost: int, guessed: bool) -> "MoveReport":
        """The report of this move, whose residual is in multiples of `unit`; an evaluation counts `cost` times."""
        residual, evaluations = self.residual / unit, (self.evaluations + guessed) * cost
        return MoveReport(residual, evaluations, residual <= tolerance, self.at_floor, self.damped)


def step_size(alpha_bar_t: float, alpha_bar_s: float) -> float:
    """γ = 2/(m + M), where f′ lies in [m, M] for Gaussian data of variance 0 to `VARIANCE` with the exact ε̂.

    For data of variance v, f′ = (√(ᾱ_s·ᾱ_t)·v + √((1 − ᾱ_s)(1 − ᾱ_t)))/(ᾱ_t·v + 1 − ᾱ_t).
    """

    def slope(v: float) -> float:
        signal, noise = np.sqrt(alpha_bar_s * alpha_bar_t), np.sqrt((1 - alpha_bar_s) * (1 - alpha_bar_t))
        return float((signal * v + noise) / (alpha_bar_t * v + 1 - alpha_bar_t))

    return 2 / (slope(0.0) + slope(VARIANCE))


def solve(residual: Residual, guess: Tensor, step: float, tolerance: float, evaluations: int) -> Solution:
    """The x of the smallest residual found from `guess`, (B, C, H, W), with `evaluations` ≥ 1 calls at most.

    An image is done when the root mean square of its residual is at most `tolerance`, or has stopped falling. One
    whose residual grows goes on from its best iterate with half the `step` γ, and without its history; so the result
    is never worse than the guess. Images do not enter each other's iterations.
    """
    B = len(guess)
    best, best_residual, best_output = guess.clone(), torch.zeros_like(guess), torch.empty(0)
    smallest, spent = np.full(B, np.inf), np.zeros(B, np.int64)
    falls: list[NDArray[np.float64]] = []  # the smallest residuals after each evaluation
    damped, born, gamma = np.zeros(B, bool), np.zeros(B, np.int64), np.full(B, step)
    active, x = np.arange(B), guess
    history: list[tuple[Tensor, Tensor]] = []  # (x, residual) of the active images, the newest last
    for i in range(evaluations):
        rows = torch.as_tensor(active, device=guess.device)
        r, output = residual(x, rows)
        if i == 0:
            best_output = output.clone()
        size = root_mean_square(r)
        spent[active] += 1
        grown = ~(size <= GROWTH * smallest[active])  # NaN has grown
        better = size < smallest[active]
        smallest[active] = np.where(better, size, smallest[active])
        falls.append(smallest.copy())
        keep = torch.as_tensor(better, device=guess.device)
        kept = rows[keep]
        best[kept], best_residual[kept], best_output[kept] = x[keep], r[keep], output[keep]

        lost = active[grown]
        damped[lost], born[lost] = True, i
        gamma[lost] /= 2
        back = torch.as_tensor(grown, device=guess.device).view(-1, *[1] * (x.ndim - 1))
        history.append((torch.where(back, best[rows], x), torch.where(back, best_residual[rows], r)))
        going = (smallest[active] > tolerance) & ~_settled(falls, spent, PATIENCE)[active]
        if not going.any():
            break
        if not going.all():
            left = torch.as_tensor(going, device=guess.device)
            history, active = [(x[left], r[left]) for x, r in history], active[going]
        history = history[-MEMORY - 1 :]
        first = i + 1 - len(history)
        known = np.arange(first, i)[None, :] >= born[active][:, None]
        x = _next(history, gamma[active], known)
    settled = _settled(falls, spent, np.where(spent > PATIENCE, PATIENCE, SETTLED))
    return Solution(best, best_output, smallest, spent, settled & ~(smallest <= tolerance), damped)


def _settled(
    falls: list[NDArray[np.float64]], spent: NDArray[np.int64], window: int | NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Which images' smallest residuals made no `PROGRESS` over the last `window` of their `spent` evaluations."""
    images, before = np.arange(len(spent)), spent - 1 - window
    earlier = np.stack(falls)[np.maximum(before, 0), images]
    return (before >= 0) & ~(falls[-1] < PROGRESS * earlier)


def _next(history: list[tuple[Tensor, Tensor]], gamma: NDArray[np.float64], known: NDArray[np.bool_]) -> Tensor:
    """x̄ + γ·r̄, for the combination x̄ of earlier iterates whose residual r̄ is smallest, if residuals were linear.

    `known`, (B, len(history) − 1), says which earlier iterates count.
    """
    x, r = history[-1]
    work = precise(x)
    shape = (-1, *[1] * (x.ndim - 1))
    new, mean_r = x.to(work), r.to(work)
    if known.any():
        counts = torch.as_tensor(known, device=x.device)
        changes = torch.stack([(past - r).flatten(1) for _, past in history[:-1]], 1).to(work)
        changes = torch.where(counts[..., None], changes, torch.zeros_like(changes))
        gram, right = changes @ changes.mT, changes @ mean_r.flatten(1)[..., None]
        weights = _weights(gram.cpu().double(), right.cpu().double(), torch.finfo(work).eps).to(work).to(x.device)
        for j, (past_x, past_r) in enumerate(history[:-1]):
            weight, counted = weights[:, j].view(shape), counts[:, j].view(shape)
            new = new + torch.where(counted, weight * (past_x - x), torch.zeros_like(new))
            mean_r = mean_r + torch.where(counted, weight * (past_r - r), torch.zeros_like(mean_r))
    step = torch.as_tensor(gamma).to(work).to(x.device).view(shape)
    return (new + step * mean_r).to(x.dtype)


def _weights(gram: Tensor, right: Tensor, eps: float) -> Tensor:
    """−(G + ridge)⁻¹·right of each image, (B, m): a few numbers, whose errors relative to G are `eps`."""
    diagonal = gram.diagonal(dim1=1, dim2=2)
    ridge = torch.where(diagonal > 0, max(1e-10, 10 * eps) * diagonal, torch.ones_like(diagonal))
    return -torch.linalg.solve(gram + torch.diag_embed(ridge), right)[..., 0]


def root_mean_square(x: Tensor) -> NDArray[np.float64]:
    """√mean(x²) of each image, (B,)."""
    return x.to(precise(x)).flatten(1).pow(2).mean(1).sqrt().cpu().numpy().astype(np.float64)


class MoveReport(NamedTuple):
    """How one move went, for each image; see `InversionReport`."""

    residual: NDArray[np.float64]
    evaluations: NDArray[np.int64]
    converged: NDArray[np.bool_]
    at_floor: NDArray[np.bool_]
    damped: NDArray[np.bool_]


def naive(B: int, evaluations: int) -> MoveReport:
    """The report of a move taken with the network at its lower end: its residual is not known."""
    no = np.zeros(B, bool)
    return MoveReport(np.full(B, np.nan), np.full(B, evaluations), no, no, no)


def nothing(B: int) -> MoveReport:
    """The report of a move between times of the same ᾱ, which changes nothing."""
    no = np.zeros(B, bool)
    return MoveReport(np.zeros(B), np.zeros(B, np.int64), ~no, no, no)


def report(timesteps: list[int], moves: list[MoveReport], tolerance: float, latents: Tensor) -> "InversionReport":
    """The report of an encoding from those of its moves."""
    whole = MoveReport(*(np.stack(column) for column in zip(*moves, strict=True)))
    rows = latents.cpu().double().flatten(1).numpy()
    return InversionReport(np.array(timesteps), *whole, tolerance, rows.mean(1), rows.std(1))


def join(reports: Sequence["InversionReport"]) -> "InversionReport":
    """The report of several batches encoded along the same τ with the same tolerance."""
    first = reports[0]
    images = {
        field.name: np.concatenate([getattr(each, field.name) for each in reports], axis=-1)
        for field in fields(first)
        if field.name not in ("timesteps", "tolerance")
    }
    return InversionReport(timesteps=first.timesteps, tolerance=first.tolerance, **images)


@dataclass(frozen=True)
class InversionReport:
    """How each move of an encoding went, in the order they were made; arrays are (moves, B).

    Attributes:
        timesteps: the network time each move ends at, (moves,).
        residual: root mean square of (x_s − f(x_t))/√ᾱ_s, in units of the network's images (−1..1); NaN where it was
            not measured (the naive inverse).
        evaluations: network evaluations spent; a guided one counts twice.
        converged: whether the residual reached `tolerance`.
        at_floor: whether it had stopped falling above that, by 10 % at least over the last evaluations made.
        damped: whether an iteration grew and was taken back.
        tolerance: the residual that was asked for.
        latent_mean, latent_std: of each latent, (B,): 0 and 1 for one that lies where noise does.
    """

    timesteps: NDArray[np.int64]
    residual: NDArray[np.float64]
    evaluations: NDArray[np.int64]
    converged: NDArray[np.bool_]
    at_floor: NDArray[np.bool_]
    damped: NDArray[np.bool_]
    tolerance: float
    latent_mean: NDArray[np.float64]
    latent_std: NDArray[np.float64]

    @property
    def total_evaluations(self) -> NDArray[np.int64]:
        """Network evaluations spent on each image, (B,)."""
        return self.evaluations.sum(0)

    def where(self, flags: NDArray[np.bool_]) -> list[int]:
        """The network times of the moves for which any image has this flag."""
        return self.timesteps[flags.any(1)].tolist()

    def to_dict(self) -> dict[str, Any]:
        """Everything as numbers and lists, for JSON; what is not finite as None."""
        known = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in asdict(self).items()}
        known["residual"] = [[r if np.isfinite(r) else None for r in row] for row in known["residual"]]
        return known

    def __str__(self) -> str:
        """A table with a line for each move: the worst image's residual, evaluations, and what to know of it."""
        lines = ["timestep  residual  evaluations"]
        for i, t in enumerate(self.timesteps):
            notes = {"not converged": ~self.converged[i], "at its floor": self.at_floor[i], "damped": self.damped[i]}
            said = [f"{note} ({flags.sum()} of {len(flags)})" for note, flags in notes.items() if flags.any()]
            naive = np.isnan(self.residual[i]).any()
            residual = "       –" if naive else f"{self.residual[i].max():8.1e}"
            lines.append(
                f"{t:8d}  {residual}  {self.evaluations[i].max():11d}  {'' if naive else ', '.join(said)}".rstrip()
            )
        lines.append(
            f"evaluations for an image: {self.total_evaluations.mean():.1f}; tolerance {self.tolerance:g}; latents: "
            f"mean {self.latent_mean.mean():.3f}, standard deviation {self.latent_std.mean():.3f}"
        )
        return "\n".join(lines)


inversion = SimpleNamespace(
    MEMORY=MEMORY,
    PATIENCE=PATIENCE,
    SETTLED=SETTLED,
    PROGRESS=PROGRESS,
    GROWTH=GROWTH,
    VARIANCE=VARIANCE,
    Residual=Residual,
    Solution=Solution,
    step_size=step_size,
    solve=solve,
    _settled=_settled,
    _next=_next,
    _weights=_weights,
    root_mean_square=root_mean_square,
    MoveReport=MoveReport,
    naive=naive,
    nothing=nothing,
    report=report,
    join=join,
    InversionReport=InversionReport,
)


# ======== images ========

"""Images on their way into a network, checked, and grids of images on their way out."""










Images = Any
"""A PIL image, an array (H, W), (H, W, C) or (B, H, W, C), a tensor (C, H, W) or (B, C, H, W), or a list of those."""

MODES = {1: "L", 3: "RGB"}
"""Modes of PIL images for a number of channels."""

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
"""Names of image files end so."""


def read(images: Images, channels: int, size: tuple[int, int] | None) -> Tensor:
    """Images as (B, C, H, W) in −1..1, the range of a network; float32, or float64 where they are.

    Integers are bytes (uint8, 0..255), floating-point numbers lie in [0, 1]. `size` is (H, W); None takes any.
    Raises ValueError naming the first image that has another shape, mode, type or range, and the remedy.
    """
    many = images if isinstance(images, list | tuple) else [images]
    if not many:
        raise ValueError("an empty list of images: give at least one")
    batch = [_read(image, channels, f"image {i}" if len(many) > 1 else "the image") for i, image in enumerate(many)]
    for i, x in enumerate(batch):
        if x.shape[2:] != (size or batch[0].shape[2:]):
            wanted = size or tuple(batch[0].shape[2:])
            raise ValueError(
                f"image {i} is {x.shape[2]}×{x.shape[3]} (height × width), not {wanted[0]}×{wanted[1]} as the "
                f"{'network' if size else 'first'} is: crop or resize it, e.g. image.resize({(wanted[1], wanted[0])})"
            )
    return torch.cat(batch) * 2 - 1


def _read(image: Any, channels: int, name: str) -> Tensor:
    """One entry of a list as (B, C, H, W) in [0, 1]."""
    if isinstance(image, Image.Image):
        mode = MODES.get(channels)
        if image.mode != mode:
            remedy = f'image.convert("{mode}")' if mode else f"pass a tensor with {channels} channels"
            if _is_deep(image):
                remedy = "scale it to 0..255 first"
            raise ValueError(f"{name} has mode {image.mode!r}; this network takes {channels} channels: {remedy}")
        image = np.asarray(image)
    if isinstance(image, np.ndarray):
        array = image[..., None] if image.ndim == 2 else image
        if array.ndim not in (3, 4) or array.shape[-1] != channels:
            raise ValueError(
                f"{name} has shape {image.shape}: an array must be (H, W, {channels}) or (B, H, W, {channels}) for "
                "this network" + (", or (H, W)" if channels == 1 else "")
            )
        if array.dtype.kind not in "uif":
            raise ValueError(
                f"{name} is of type {array.dtype}: pass bytes (uint8), or floating-point numbers in [0, 1]"
            )
        if array.dtype.itemsize > 8:  # more than torch has
            array = array.astype(np.float64)
        native = np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
        x = torch.from_numpy(native if native.ndim == 4 else native[None]).permute(0, 3, 1, 2)
    elif isinstance(image, Tensor):
        x = image if image.ndim == 4 else image[None]
        if x.ndim != 4 or x.shape[1] != channels:
            raise ValueError(
                f"{name} has shape {tuple(image.shape)}: a tensor must be ({channels}, H, W) or (B, {channels}, H, W) "
                "for this network"
            )
    else:
        raise ValueError(f"{name} must be a PIL image, an array or a tensor, not {type(image).__name__}")
    if x.numel() == 0:
        raise ValueError(f"{name} is empty: its shape is {tuple(image.shape)}")
    if x.dtype == torch.uint8:
        return x.float() / 255
    if not x.is_floating_point():
        raise ValueError(f"{name} is of type {x.dtype}: pass bytes (uint8), or floating-point numbers in [0, 1]")
    x = x if x.dtype == torch.float64 else x.float()
    low, high = float(x.min()), float(x.max())
    if not (low >= 0 and high <= 1):
        remedy = "; pass (image + 1)/2" if low >= -1.001 and high <= 1.001 else ""
        raise ValueError(f"{name} lies in [{low:g}, {high:g}]: floating-point images must lie in [0, 1]{remedy}")
    return x


def image_files(folder: str | Path) -> list[str]:
    """The image files in a folder, by name. Raises ValueError where there is none."""
    found = sorted(str(file) for file in Path(folder).iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
    if not found:
        raise ValueError(f"there is no image in {folder}: it needs files such as .png or .jpg")
    return found


def open_image(
    file: str | Path, channels: int, size: tuple[int, int] | None, resize: bool = False, hint: str = ""
) -> Image.Image:
    """An image file as a PIL image for a network: upright, in gray or RGB, and of its size (H, W).

    `resize` crops to the shape of `size` and resizes to it (Lanczos); without, another size is refused, with `hint`.
    Raises ValueError naming a file that is damaged, has more than 8 bits, or transparency.
    """
    return fit(open_upright(file, f"the image {file}"), channels, size, resize, str(file), hint)


def open_upright(file: str | Path | BinaryIO, name: str) -> Image.Image:
    """An image file, by its path or opened, turned as its EXIF says. Raises ValueError with `name` where damaged."""
    try:
        with Image.open(file) as opened:
            opened.load()
            return ImageOps.exif_transpose(opened)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read {name}: {error}") from error


def fit(
    image: Image.Image, channels: int, size: tuple[int, int] | None, resize: bool, name: str, hint: str = ""
) -> Image.Image:
    """A PIL image in the mode and, with `resize`, the size that a network takes; as `open_image`."""
    mode = check_channels(channels)
    if _is_deep(image):
        raise ValueError(f"{name} has mode {image.mode!r}, more than 8 bits: scale it to 0..255 first")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        raise ValueError(
            f"{name} has transparency, which has no place in a picture of the model: put it on a background"
        )
    image = image.convert(mode)
    if size is not None and image.size != size[::-1]:
        if not resize:
            raise ValueError(
                f"{name} is {image.width}×{image.height}, the network takes {size[1]}×{size[0]} (width × height): "
                f"crop and resize it{hint}"
            )
        image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.LANCZOS)
    return image


def check_channels(channels: int) -> str:
    """The mode of pictures with this many channels, or ValueError where there is none."""
    if channels not in MODES:
        raise ValueError(f"the network takes {channels} channels: pictures have 1 or 3")
    return MODES[channels]


def _is_deep(image: Image.Image) -> bool:
    return image.mode.startswith(("I", "F"))


def grid(rows: Sequence[np.ndarray], labels: Sequence[str] = (), title: str = "", cell: int = 64) -> Image.Image:
    """One row of pictures for each entry of `rows`, each (N, H, W, C) in [0, 1], with its label on the left.

    Pictures are enlarged by a whole factor to about `cell` pixels high, with a bicubic filter. Labels are in ASCII: the
    font that comes with Pillow has no Greek.
    """
    labels = labels or [""] * len(rows)
    check_channels(rows[0].shape[-1])
    scale = max(1, round(cell / rows[0].shape[1]))
    height, width = rows[0].shape[1] * scale, rows[0].shape[2] * scale
    gap, columns = max(2, scale // 2), max(len(row) for row in rows)
    points = max(11, min(16, height // 2))
    font = ImageFont.load_default(size=points)
    margin = gap + int(max((font.getlength(label) + 2 * gap for label in labels if label), default=0))
    top = 2 * points if title else gap
    size = (margin + columns * (width + gap), top + len(rows) * (height + gap))
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    if title:
        draw.text((gap, points // 2), title, fill="black", font=font)
    for i, (row, label) in enumerate(zip(rows, labels, strict=True)):
        y = top + i * (height + gap)
        draw.text((gap, y + height // 2), label, fill="black", font=font, anchor="lm")
        for j, picture in enumerate(row):
            pixels = Image.fromarray((picture.repeat(3 // picture.shape[-1], axis=-1) * 255).round().astype(np.uint8))
            enlarged = pixels.resize((width, height), Image.Resampling.BICUBIC)
            canvas.paste(enlarged, (margin + j * (width + gap), y))
    return canvas


pictures = SimpleNamespace(
    Images=Images,
    MODES=MODES,
    SUFFIXES=SUFFIXES,
    read=read,
    _read=_read,
    image_files=image_files,
    open_image=open_image,
    open_upright=open_upright,
    fit=fit,
    check_channels=check_channels,
    _is_deep=_is_deep,
    grid=grid,
)


# ======== schedulers ========

"""Schedulers of the generalized process for diffusers.

A network's `timestep` is the paper's time minus one: 0..T−1. That shift lives in this file only.
"""






















OWN = "_ddim_plugin"
"""Key of a saved config that keeps what stock schedulers have no word for; they carry it along unread."""

SAMPLER = "sampler"
"""Key in there for what an inverse scheduler switched off, and a sampler made from it switches on again."""

CONSTRAINTS = ("clip_sample", "thresholding", "use_clipped_model_output")
"""Settings that change x̂0, which no inverse can undo."""

DETERMINISTIC = {"eta": 0.0, "variance_type": "fixed_small", "clip_sample": False, "thresholding": False}
"""Settings under which a latent and its image determine each other."""

SOLVER = (
    "solver_order",
    "solver_quantity",
    "solver_coordinate",
    "solver_corrector",
    "solver_extrapolation",
    "lower_order_final",
    "start_from_top",
    "fitted_timesteps",
)
"""Settings of `MultistepDDIMScheduler` beside those of the process."""

CORRECTORS = ("pec", "pece")
"""Predict, evaluate, correct; and evaluate again."""

COORDINATE = {"epsilon": "bounded", "sample": "log_snr"}
"""The coordinate in which ε̂, or x̂0, is held as a polynomial where none is said."""

MUCH_NOISE = 0.5
"""η from which on τ and the extrapolation are those for noise."""

_OWN_KEYS = ("eta", "eps_mean_square", "use_clipped_model_output")
_STOCK_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
STOCK_SPACINGS = ("leading", "trailing", "linspace")
_STOCK_VARIANCES = ("fixed_large", "learned_range")  # "fixed_small" is what they take where nothing is said

Randomness = Generator | list[Generator] | None

_mean_weights = lru_cache(maxsize=4096)(ode.mean_weights)  # of one plan after the other, mostly the same


class Step(NamedTuple):
    """All coefficients of one step: numbers, or tensors (B, 1, 1, 1) where each sample has its own time."""

    x0_x: p.Coefficient
    x0_out: p.Coefficient
    eps_x: p.Coefficient
    eps_out: p.Coefficient
    x0: p.Coefficient
    eps: p.Coefficient
    noise: p.Coefficient
    log_low: p.Coefficient
    log_high: p.Coefficient
    fold_x: p.Coefficient  # the whole move as fold_x·x_t + fold_out·output
    fold_out: p.Coefficient
    eps_x_again: p.Coefficient  # ε̂ recomputed as eps_x_again·x_t + eps_x0_again·x̂0
    eps_x0_again: p.Coefficient
    again_x: p.Coefficient  # the move with it as again_x·x_t + again_x0·x̂0
    again_x0: p.Coefficient


def _step(move: process.Move, prediction_type: str) -> Step:
    """The step of a move down, x_t ↦ x_s."""
    prediction = p.prediction(prediction_type, move.alpha_bar_t)
    learned = move.log_variance is not None
    log_low, log_high = move.log_variance or (0.0, 0.0)
    noise = 1.0 if learned else move.noise  # a learned deviation is multiplied by this
    eps_x, eps_x0 = p.eps_from_x0(move.alpha_bar_t)
    again = (eps_x, eps_x0, move.eps * eps_x, move.x0 + move.eps * eps_x0)
    return Step(*prediction, move.x0, move.eps, noise, log_low, log_high, *p.fold(prediction, move), *again)


def _from_top(step: Step, alpha_bar_T: float) -> Step:
    """The step for a sample x_T that the network saw at a lower time: ε̂ = (x_T − √ᾱ_T·x̂0)/√(1 − ᾱ_T)."""
    x, x0 = p.eps_from_x0(alpha_bar_T)
    eps_x, eps_out = x + x0 * step.x0_x, x0 * step.x0_out
    return step._replace(
        eps_x=eps_x,
        eps_out=eps_out,
        fold_x=step.x0 * step.x0_x + step.eps * eps_x,
        fold_out=step.x0 * step.x0_out + step.eps * eps_out,
        eps_x_again=x,
        eps_x0_again=x0,
        again_x=step.eps * x,
        again_x0=step.x0 + step.eps * x0,
    )


def _inverse_step(move: process.Move, prediction_type: str) -> Step:
    """The step back, x_s ↦ x_t: the move solved for x_t, the network's output at time t taken as known.

    `Prediction` is then in terms of x_s, and x_t = √ᾱ_t·x̂0 + √(1 − ᾱ_t)·ε̂.
    """
    prediction = p.prediction(prediction_type, move.alpha_bar_t)
    x, out = p.unfold(prediction, move)
    inverse = p.Prediction(
        prediction.x0_x * x,
        prediction.x0_x * out + prediction.x0_out,
        prediction.eps_x * x,
        prediction.eps_x * out + prediction.eps_out,
    )
    x0, eps = float(np.sqrt(move.alpha_bar_t)), float(np.sqrt(1 - move.alpha_bar_t))
    nan = float("nan")
    return Step(*inverse, x0, eps, 0.0, 0.0, 0.0, x, out, nan, nan, nan, nan)


def _step_from_data(move: process.Move, prediction_type: str) -> Step:
    """The step up from x_0, with ε̂ as the network sees x_0 at the upper end; x̂0 follows from x_0 and ε̂."""
    called = p.prediction(prediction_type, move.alpha_bar_s)
    signal, noise = float(np.sqrt(move.alpha_bar_t)), float(np.sqrt(1 - move.alpha_bar_t))
    x0 = (1 - noise * called.eps_x) / signal, -noise * called.eps_out / signal
    prediction = p.Prediction(*x0, called.eps_x, called.eps_out)
    nan = float("nan")
    return Step(*prediction, move.x0, move.eps, 0.0, 0.0, 0.0, *p.fold(prediction, move), nan, nan, nan, nan)


class GeneralizedDDIMSchedulerOutput:
    """What a step gives. All tensors are (B, C, H, W) in the sample's dtype; all but the first are made when asked for.

    It reads as diffusers' outputs do: by attribute, by key, by position, `to_tuple()`. What is made later is made from
    the step's `sample` and `model_output`: do not change those in place before.

    Attributes:
        prev_sample: x_s, the sample after the move.
        pred_original_sample: x̂0, after clipping or thresholding (Eq. 9).
        pred_epsilon: ε̂ as it entered the move.
        mean: the mean of x_s given x_t (Eq. 12 without its last term).
        std: standard deviation of x_s given x_t: a scalar tensor, (B, 1, 1, 1) with times for each sample, or
            (B, C, H, W) where the variance is learned.
    """

    _KEYS = ("prev_sample", "pred_original_sample", "mean", "std", "pred_epsilon")

    def __init__(self, prev_sample: Tensor, evaluation: "_Evaluation"):
        self.prev_sample = prev_sample
        self._evaluation = evaluation

    @cached_property
    def pred_original_sample(self) -> Tensor:
        return self._evaluation.x0().to(self.prev_sample.dtype)

    @cached_property
    def pred_epsilon(self) -> Tensor:
        return self._evaluation.eps().to(self.prev_sample.dtype)

    @cached_property
    def mean(self) -> Tensor:
        return self._evaluation.mean().to(self.prev_sample.dtype)

    @cached_property
    def std(self) -> Tensor:
        std = self._evaluation.std()
        if not isinstance(std, Tensor):
            return torch.full((), std, dtype=self.prev_sample.dtype, device=self.prev_sample.device)
        return std.to(self.prev_sample.dtype)

    def keys(self) -> tuple[str, ...]:
        return self._KEYS

    def items(self) -> tuple[tuple[str, Tensor], ...]:
        return tuple(zip(self._KEYS, self.to_tuple(), strict=True))

    def get(self, key: str, default: Any = None) -> Any:
        return getattr(self, key) if key in self._KEYS else default

    def __iter__(self) -> Iterator[str]:
        return iter(self._KEYS)

    def to_tuple(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, key) for key in self._KEYS)

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, slice):
            return self.to_tuple()[key]
        name = self._KEYS[key] if isinstance(key, int) else key
        if name not in self._KEYS:
            raise KeyError(name)
        return getattr(self, name)

    def __len__(self) -> int:
        return len(self._KEYS)

    def __contains__(self, key: str) -> bool:
        return key in self._KEYS


class _Evaluation(NamedTuple):
    """One evaluation of the network, and what follows from it for one step."""

    step: Step
    sample: Tensor
    output: Tensor
    variance: Tensor | None  # the network's choice between β̃ and β
    limit: float | None  # x̂0 is clipped to ± this
    thresholding: tuple[float, float] | None  # ratio and largest value of dynamic thresholding
    recompute_eps: bool
    others: Sequence[tuple[float, Tensor]] = ()  # what a multistep method adds: weights, and values of g

    def x0(self) -> Tensor:
        x0 = p.combine(self.step.x0_x, self.sample, self.step.x0_out, self.output)
        if self.thresholding is not None:
            return p.threshold(x0, *self.thresholding)
        return x0 if self.limit is None else x0.clamp_(-self.limit, self.limit)

    def eps(self) -> Tensor:
        if self.recompute_eps:
            return p.combine(self.step.eps_x_again, self.sample, self.step.eps_x0_again, self.x0())
        return p.combine(self.step.eps_x, self.sample, self.step.eps_out, self.output)

    def mean(self) -> Tensor:
        mean = self.first_order()
        for weight, value in self.others:
            mean = p.accumulate(mean, weight, value)
        return mean

    def first_order(self) -> Tensor:
        step = self.step
        if self.limit is None and self.thresholding is None:
            return p.combine(step.fold_x, self.sample, step.fold_out, self.output)
        # x0·x̂0 + eps·ε̂ as w·x̂0 + u·x_t + v·output
        if self.recompute_eps:
            w, u, v = step.again_x0, step.again_x, 0.0
        else:
            w, u, v = step.x0, step.eps * step.eps_x, step.eps * step.eps_out
        a, b = w * step.x0_x, w * step.x0_out
        if self.thresholding is not None or isinstance(a, Tensor) or a == 0:
            mean = p.accumulate(w * self.x0(), v, self.output)
        else:  # w·clip(x̂0) = a·clip(x_t + b/a·output, ± limit·w/a), in one new tensor
            bound = abs(w / a) * self.limit
            x = p.at_least_float32(self.sample)
            mean = p.rescale(torch.add(x, self.output, alpha=b / a).clamp_(-bound, bound), a, v, self.output)
        return p.accumulate(mean, u, self.sample)

    def std(self) -> p.Coefficient:
        if self.variance is None:
            return self.step.noise
        variance = self.variance.to(torch.promote_types(self.variance.dtype, torch.float32))
        return p.learned_std(variance, (self.step.log_low, self.step.log_high)) * self.step.noise


class GeneralizedDDIMScheduler(SchedulerMixin, ConfigMixin):
    """The generalized process of Denoising Diffusion Implicit Models, along any subsequence τ.

    One step is x_s = √ᾱ_s·x̂0 + √(1 − ᾱ_s − σ²)·ε̂ + σz (Eq. 12), σ = σ(η) (Eq. 16), for the pairs (t, s) of τ.
    Understands every key of diffusers' `DDIMScheduler`; defaults follow the paper: nothing is clipped.

    Args:
        num_train_timesteps: T, the number of times the network was trained on.
        beta_start, beta_end: range of β for the schedules that have one.
        beta_schedule: "linear", "scaled_linear", "squaredcos_cap_v2", "const", "jsd", "sigmoid", "laplace", "exp".
        trained_betas: β_1..β_T given outright, instead of a named schedule.
        clip_sample, clip_sample_range: clip x̂0 to ±`clip_sample_range` in each step.
        set_alpha_to_one: ᾱ_0 = 1 (the paper). False keeps ᾱ_0 = ᾱ_1, as Stable Diffusion was configured.
        steps_offset: added to the times of "leading" spacing.
        prediction_type: what the network predicts: "epsilon", "sample" (x0) or "v_prediction".
        thresholding, dynamic_thresholding_ratio, sample_max_value: dynamic thresholding of x̂0 (instead of clipping).
        timestep_spacing: τ by name: "linear", "quadratic", "leading", "trailing", "linspace", "paper_linear",
            "paper_quadratic", and for few steps "few_steps", "few_steps_noise", "few_steps_power", "log_snr" (see
            `ddim_plugin.tau`).
        rescale_betas_zero_snr: rescale β so that ᾱ_T = 0 (Lin et al. 2023).
        eta: η of Eq. 16 where a step is not given one: 0 is DDIM, 1 is DDPM. Not used by "fixed_large" and
            "learned_range", which stand at η = 1.
        variance_type: "fixed_small" (σ = η·√β̃, Eq. 16), "fixed_large" (σ̂, Appendix D.3: noise only, ε̂ keeps σ(1)),
            "learned_range" (a network with twice the channels, between β̃ and β), "optimal" (Analytic-DPM).
        eps_mean_square: E‖ε̂(x_t, t)‖²/d for t = 1..T, for "optimal".
        use_clipped_model_output: where x̂0 is clipped, recompute ε̂ from it so that the two agree on x_t, as Ho's
            sampler does; False (the authors' code and diffusers' DDIM) keeps the network's ε̂.

    Raises:
        ValueError: for any value that is unknown, out of range, or impossible together with another.
    """

    _upwards = False
    _derived_betas = False
    _compatibles: ClassVar = [scheduler.name for scheduler in KarrasDiffusionSchedulers]
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        clip_sample: bool = False,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "linear",
        rescale_betas_zero_snr: bool = False,
        eta: float = 0.0,
        variance_type: str = "fixed_small",
        eps_mean_square: list[float] | None = None,
        use_clipped_model_output: bool = False,
    ):
        T = num_train_timesteps
        schedules.check_length(T)
        if trained_betas is not None:
            betas = schedules.check(trained_betas, T)
        else:
            betas = schedules.betas(beta_schedule, T, beta_start, beta_end)
            if schedules.made_for_1000(beta_schedule, T, beta_start, beta_end):
                message = (
                    f"beta_start={beta_start:g} and beta_end={beta_end:g} were made for 1000 steps; at "
                    f"num_train_timesteps={T} they leave ᾱ_T = {np.prod(1 - betas):.3g}. Scale them by 1000/{T}, "
                    "or take a schedule without a range, such as squaredcos_cap_v2."
                )
                warnings.warn(message, stacklevel=3)
        p.check_prediction(prediction_type)
        tau.check_spacing(timestep_spacing)
        tau.check_offset(steps_offset)
        self._check_noise(variance_type, eta)
        if clip_sample and not (isinstance(clip_sample_range, Real) and clip_sample_range > 0):
            raise ValueError(f"clip_sample_range must be positive, not {clip_sample_range!r}")
        if thresholding and not (0 <= dynamic_thresholding_ratio <= 1 and sample_max_value >= 1):
            raise ValueError(
                "thresholding needs dynamic_thresholding_ratio in [0, 1] and sample_max_value ≥ 1, not "
                f"{dynamic_thresholding_ratio!r} and {sample_max_value!r}"
            )
        self._eps_mean_square = _eps_table(variance_type, eps_mean_square, T)

        alpha_bar = schedules.alpha_bar(betas)
        if rescale_betas_zero_snr:
            alpha_bar = schedules.rescale_zero_terminal_snr(alpha_bar)
        if not set_alpha_to_one:
            alpha_bar[0] = alpha_bar[1]
        self._alpha_bar = alpha_bar
        if trained_betas is None and beta_schedule not in _STOCK_SCHEDULES:
            self._derived_betas = True  # stock schedulers know this schedule only as numbers
            self.register_to_config(trained_betas=betas.tolist())

        # Attributes that pipelines of diffusers read.
        alphas_cumprod = alpha_bar[1:]
        alphas = alphas_cumprod / np.concatenate([[1.0], alphas_cumprod[:-1]])
        self.alphas_cumprod = torch.tensor(alphas_cumprod, dtype=torch.float32)
        self.alphas = torch.tensor(alphas, dtype=torch.float32)
        self.betas = torch.tensor(1 - alphas, dtype=torch.float32)
        self.final_alpha_cumprod = torch.tensor(alpha_bar[0], dtype=torch.float32)
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.timesteps = self._planned = torch.arange(T - 1, -1, -1)

        self._tau = np.empty(0, dtype=np.int64)
        self._pairs: list[tuple[int, int]] = []
        self._first: dict[int, int] = {}
        self._moving: dict[int, int] = {}
        self._plans: dict[tuple[str, float], list[Step]] = {}
        self._off_plan: dict[tuple[str, float, int], Step] = {}
        self._tables: dict[Any, Tensor] = {}
        self._next = 0
        self._place: int | None = None  # in the plan, of the step that was found last

    def _check_noise(self, variance_type: str, eta: float) -> None:
        """Raise ValueError for a process that does not exist, or not in this class."""
        process.effective_eta(variance_type, None, eta)
        if variance_type in process.ETA_FREE and eta not in (0, 1):
            raise ValueError(f"variance_type={variance_type!r} stands at η = 1: eta={eta!r} has no meaning with it")

    # ---- configuration -----------------------------------------------------------------------------------------

    def register_to_config(self, **kwargs: Any) -> None:
        """Record `kwargs` in the config, and keep it readable for stock schedulers.

        What they have no word for is listed in `_use_default_values`, which diffusers drops when it converts a config,
        and kept under an underscored key, which it carries along. All else is said outright, since defaults
        (`clip_sample`) differ from class to class. In memory `_class_name` names the stock scheduler whose keys these
        are: diffusers looks there which of them another class may drop in silence.
        """
        super().register_to_config(**kwargs)
        own = self._own_settings()
        hidden = [key for key in own if key != "trained_betas"]
        hints = {"_use_default_values": hidden, "_class_name": DDIMScheduler.__name__}
        super().register_to_config(**{OWN: own} | hints)

    def _own_settings(self) -> dict[str, Any]:
        own = {key: self.config[key] for key in _OWN_KEYS}
        if self.config.timestep_spacing not in STOCK_SPACINGS:
            own["timestep_spacing"] = self.config.timestep_spacing
        if self.config.variance_type not in _STOCK_VARIANCES:
            own["variance_type"] = self.config.variance_type
        if self._derived_betas:
            own["trained_betas"] = None
        return own

    @classmethod
    def from_config(cls, config: FrozenDict | dict[str, Any] | None = None, return_unused_kwargs=False, **kwargs):
        """A scheduler from the config of this or any compatible scheduler; `kwargs` override its entries.

        Our own settings survive a stay in a stock scheduler; an entry that was set explicitly there wins. From a
        scheduler that never was ours "fixed_small" and "fixed_large" are not taken over: they belong to its sampler,
        and the deterministic process is the default here. "learned_range" is a property of the network, and is.
        """
        if isinstance(config, dict):
            config = dict(config)
            own = config.pop(OWN, None)
            carried = config.get("variance_type")
            if carried is None or (own is None and carried.startswith("fixed_")):
                config.pop("variance_type", None)
            if own is not None:
                if SOLVER[0] in own and SOLVER[0] not in inspect.signature(cls.__init__).parameters:
                    own = dict(own)
                    if own.get("timestep_spacing") in ("few_steps", "few_steps_noise"):  # for the multistep method
                        del own["timestep_spacing"]
                said = _said(config) - {"trained_betas"}
                sampler = {} if cls._upwards else own.get(SAMPLER, {})
                if any(config.get(key) for key in CONSTRAINTS):
                    sampler = {}  # one was set in between
                known = inspect.signature(cls.__init__).parameters.keys() - said
                kwargs = {k: v for k, v in own.items() if k in known} | sampler | kwargs
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def to_json_string(self) -> str:
        """The config as JSON, in words that stock schedulers read without a warning; ours are under `_ddim_plugin`."""
        live = self._internal_dict
        try:
            hidden = live["_use_default_values"]
            self._internal_dict = FrozenDict({k: v for k, v in live.items() if k not in hidden})
            return super().to_json_string()
        finally:
            self._internal_dict = live

    # ---- planning ----------------------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | Tensor | np.ndarray | None = None,
    ) -> None:
        """Plan the moves over τ: `num_inference_steps` of the spacing, or an explicit list of network times.

        Args:
            num_inference_steps: S, 1 ≤ S ≤ T.
            device: where `self.timesteps` is put.
            timesteps: network times 0..T−1, distinct, descending; instead of `num_inference_steps`.

        Raises:
            ValueError: for a step count or times out of range or order, η too large for a move, or ε prediction on a
                move from ᾱ_t = 0.
        """
        T = self.config.num_train_timesteps
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("set_timesteps takes either num_inference_steps or timesteps=[...], not both or neither")
        if timesteps is not None:
            values = timesteps.tolist() if isinstance(timesteps, Tensor | np.ndarray) else timesteps
            times = tau.explicit(values, T, lowest=0, descending=True)
        else:
            times = self._spaced(num_inference_steps)
        kind = self._kind(None)
        pairs = self._make_pairs(times)
        plan = self._make_plan(pairs, *kind)

        self._tau, self._pairs, self._plans, self._off_plan, self._next = times, pairs, {kind: plan}, {}, 0
        upper = self._called(pairs)
        self._first = {t: i for i, t in reversed(list(enumerate(upper)))}
        self._moving = {t: i for i, (t, s) in enumerate(pairs) if t != s}
        self._tables = {key: value for key, value in self._tables.items() if key[0] == "marginals"}
        self.num_inference_steps = len(times)
        self.timesteps = self._planned = torch.tensor(upper, dtype=torch.int64).sub(1).to(device)

    @property
    def alpha_bar(self) -> np.ndarray:
        """ᾱ_0..ᾱ_T, float64, shape (T + 1,): ᾱ_0 belongs to the data."""
        return self._alpha_bar.copy()

    def move(self, i: int) -> process.Move:
        """The i-th move of the plan, in the order of `timesteps`, without noise."""
        return process.move(self._alpha_bar, *self._pairs[i])

    def check_eta(self, eta: float | None) -> None:
        """Raise ValueError where a step of the current plan could not be made at this η (None: the scheduler's)."""
        self._plan(self._kind(eta))

    def _spaced(self, S: int | None) -> tau.Times:
        """τ of S steps by the spacing."""
        config = self.config
        return tau.tau(config.timestep_spacing, S, config.num_train_timesteps, config.steps_offset, self._alpha_bar)

    def _make_pairs(self, times: tau.Times) -> list[tuple[int, int]]:
        """(t, s) of each move, in the order they are made."""
        return process.downwards(times)[:: -1 if self._upwards else 1]

    def _called(self, pairs: list[tuple[int, int]]) -> list[int]:
        """The time at which the network is called, for each move."""
        return [t for t, _ in pairs]

    def _make_plan(self, pairs: list[tuple[int, int]], kind: str, eta: float) -> list[Step]:
        return [self._make_step(t, s, kind, eta) for t, s in pairs]

    def _make_step(self, t: int, s: int, kind: str, eta: float) -> Step:
        move = process.move(self._alpha_bar, t, s, eta, kind, self._eps_mean_square)
        return _step(move, self.config.prediction_type)

    def _kind(self, eta: float | None) -> tuple[str, float]:
        return process.effective_eta(self.config.variance_type, eta, self.config.eta)

    def _plan(self, kind: tuple[str, float]) -> list[Step]:
        if kind not in self._plans:
            self._plans[kind] = self._make_plan(self._pairs, *kind)
        return self._plans[kind]

    def _step_at(self, timestep: int, kind: tuple[str, float]) -> Step:
        """The step between any network time and the nearest time of the plan below it."""
        T = self.config.num_train_timesteps
        if not 0 <= timestep < T:
            raise ValueError(f"timestep {timestep} is outside 0..{T - 1}")
        t = timestep + 1
        if t in self._moving:
            return self._plan(kind)[self._moving[t]]
        key = (*kind, t)
        if key not in self._off_plan:
            below = int(np.searchsorted(self._tau, t))
            s = int(self._tau[below - 1]) if below else 0
            self._off_plan[key] = self._make_step(t, s, *kind)
        return self._off_plan[key]

    def _next_step_at(self, timestep: int, kind: tuple[str, float]) -> Step:
        """`_step_at`, but of a time that the plan repeats, each call takes the next: all but one stay in place."""
        i = self._next
        if i >= len(self._pairs) or self._pairs[i][0] != timestep + 1:  # not the next one: go to the first of its kind
            if timestep + 1 not in self._first:
                return self._step_at(timestep, kind)
            i = self._first[timestep + 1]
        return self._take(i, kind)

    def _take(self, i: int, kind: tuple[str, float]) -> Step:
        self._place, self._next = i, i + 1
        return self._plan(kind)[i]

    def _find(self, timestep: int | Tensor, kind: tuple[str, float], sample: Tensor) -> Step:
        """The step for `timestep`: one for all, or one for each sample. Never reads a tensor of a device."""
        self._place = None
        if not isinstance(timestep, Tensor):
            if not tau.is_integer(timestep):
                raise ValueError(f"timestep must be an integer, not {timestep!r}")
            return self._next_step_at(int(timestep), kind)
        if timestep.is_floating_point() or timestep.is_complex() or timestep.dtype == torch.bool:
            raise ValueError(f"timestep must be an integer, not a tensor of {timestep.dtype}")
        if timestep.numel() == 1:
            # An element of our own timesteps is told by its place, not by its value: nothing waits for a device.
            if timestep.untyped_storage().data_ptr() == self._planned.untyped_storage().data_ptr():
                return self._take(timestep.storage_offset(), kind)
            return self._next_step_at(int(timestep), kind)
        if timestep.shape != sample.shape[:1]:
            raise ValueError(
                f"timestep has shape {tuple(timestep.shape)}: give one, or one for each of {sample.shape[0]} samples"
            )
        dtype = torch.promote_types(sample.dtype, torch.float32)
        if timestep.device.type == "cpu":
            steps = [self._step_at(t, kind) for t in timestep.tolist()]
            rows = torch.tensor(steps, dtype=torch.float64).to(dtype).to(sample.device)
        else:
            rows = self._all_steps(kind, dtype, sample.device)[timestep.to(sample.device)]
        return Step(*(column.view(-1, *[1] * (sample.ndim - 1)) for column in rows.unbind(1)))

    def _all_steps(self, kind: tuple[str, float], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The steps from every network time, one in a row, kept on the device; NaN where there is none."""
        key = ("steps", kind, dtype, device)
        if key not in self._tables:
            rows = np.full((self.config.num_train_timesteps, len(Step._fields)), np.nan)
            for timestep in range(len(rows)):
                try:
                    rows[timestep] = self._step_at(timestep, kind)
                except ValueError:
                    continue
            self._tables[key] = torch.tensor(rows).to(dtype).to(device)
        return self._tables[key]

    # ---- stepping ----------------------------------------------------------------------------------------------

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """The network's input: `sample` as it is."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float | None = None,
        use_clipped_model_output: bool | None = None,
        generator: Randomness = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> GeneralizedDDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """One move from `timestep` to the next time of the plan below it (Eq. 12).

        Args:
            model_output: the network's output, (B, C, H, W), or (B, 2C, H, W) with "learned_range".
            timestep: a network time 0..T−1, or an integer tensor (B,) with one for each sample. A time that is not in
                the plan moves to the nearest one below it. Elements of `self.timesteps` are told by their place in
                it, so that no device is ever waited for. Of a time that the plan repeats (the `paper_` spacings), a
                plain integer is the next one in order.
            sample: x_t, (B, C, H, W). Half precision is computed in float32 and cast once at the end.
            eta: η of Eq. 16 for this step; None is the scheduler's process. With "fixed_large" and "learned_range" 0
                (deterministic) and 1 (their own noise) exist.
            use_clipped_model_output: whether ε̂ is recomputed from a clipped x̂0; None is the scheduler's setting.
            generator: source of z: a generator, or one for each sample.
            variance_noise: z itself, (B, C, H, W), instead of a generator.
            return_dict: False returns the tuple (x_s, x̂0).

        Raises:
            ValueError: before `set_timesteps`; for shapes, times, η or generators that do not fit.
        """
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps before step: there is no plan of moves yet")
        output, variance = self._split(model_output, sample)
        _check_noise(sample, generator, variance_noise)
        kind = self._kind(eta)
        step = self._find(timestep, kind, sample)
        evaluation = self._evaluate(
            kind, step, sample, output, variance if kind[0] == "learned_range" else None, use_clipped_model_output
        )
        x = evaluation.mean()
        if kind != ("fixed_small", 0.0) and (isinstance(step.noise, Tensor) or step.noise > 0):
            z = variance_noise
            if z is None:  # drawn in float32 at least
                z = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=x.dtype)
            x = p.accumulate(x, evaluation.std(), z)
        if x.dtype != sample.dtype:
            x = x.to(sample.dtype)
        result = GeneralizedDDIMSchedulerOutput(x, evaluation)
        return result if return_dict else (result.prev_sample, result.pred_original_sample)

    def _split(self, model_output: Tensor, sample: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.config.variance_type != "learned_range":
            if model_output.shape != sample.shape:
                hint = ""
                if model_output.shape[:1] + model_output.shape[2:] == sample.shape[:1] + sample.shape[2:]:
                    hint = "; a network with twice the channels needs variance_type='learned_range'"
                raise ValueError(
                    f"model_output has shape {tuple(model_output.shape)}, the sample {tuple(sample.shape)}: "
                    f"they must agree{hint}"
                )
            return model_output, None
        B, C, *size = sample.shape
        if model_output.shape != (B, 2 * C, *size):
            raise ValueError(
                f"variance_type='learned_range' needs a model_output of shape {(B, 2 * C, *size)} (prediction and "
                f"variance), not {tuple(model_output.shape)}"
            )
        return p.split_variance(model_output, C)

    def _evaluate(
        self,
        kind: tuple[str, float],
        step: Step,
        sample: Tensor,
        output: Tensor,
        variance: Tensor | None,
        recompute_eps: bool | None,
    ) -> _Evaluation:
        """The evaluation under the constraint on x̂0 that the live config asks for."""
        config = self.config
        limit = config.clip_sample_range if config.clip_sample and not config.thresholding else None
        thresholding = None
        if config.thresholding:
            thresholding = (config.dynamic_thresholding_ratio, config.sample_max_value)
        if recompute_eps is None:
            recompute_eps = config.use_clipped_model_output
        recompute_eps = recompute_eps and (limit is not None or thresholding is not None)
        return _Evaluation(step, sample, output, variance, limit, thresholding, recompute_eps)

    # ---- marginals ---------------------------------------------------------------------------------------------

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor | int) -> Tensor:
        """x_t = √ᾱ_t·x_0 + √(1 − ᾱ_t)·ε (Eq. 4) at network times `timesteps`, an integer or (B,)."""
        signal, deviation = self._marginals(original_samples, timesteps)
        return p.combine(signal, original_samples, deviation, noise).to(original_samples.dtype)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor | int) -> Tensor:
        """v = √ᾱ_t·ε − √(1 − ᾱ_t)·x_0 at network times `timesteps`, an integer or (B,); `sample` is x_0."""
        signal, deviation = self._marginals(sample, timesteps)
        return p.combine(-deviation, sample, signal, noise).to(sample.dtype)

    def _marginals(self, like: Tensor, timesteps: Tensor | int) -> tuple[Tensor, Tensor]:
        """(√ᾱ_t, √(1 − ᾱ_t)) for each sample, broadcasting over `like`."""
        if not like.is_floating_point():
            raise ValueError(f"samples must be floating point, not {like.dtype}")
        times = timesteps if isinstance(timesteps, Tensor) else torch.as_tensor(timesteps)
        if times.is_floating_point() or times.is_complex() or times.dtype == torch.bool:
            raise ValueError(f"timesteps must be integers, not {times.dtype}")
        times = times.flatten()
        if len(times) not in (1, like.shape[0]):
            raise ValueError(f"{len(times)} timesteps for {like.shape[0]} samples: give one, or one for each")
        T = self.config.num_train_timesteps
        if times.device.type == "cpu" and not 0 <= int(times.min()) <= int(times.max()) < T:
            raise ValueError(f"timesteps must lie in 0..{T - 1}, not {times.tolist()}")
        dtype = torch.promote_types(like.dtype, torch.float32)
        key = ("marginals", dtype, like.device)
        if key not in self._tables:
            table = np.stack([np.sqrt(self._alpha_bar[1:]), np.sqrt(1 - self._alpha_bar[1:])])
            self._tables[key] = torch.tensor(table).to(dtype).to(like.device)
        signal, deviation = self._tables[key][:, times.to(like.device)]
        shape = (-1, *[1] * (like.ndim - 1))
        return signal.view(shape), deviation.view(shape)

    def __len__(self) -> int:
        return self.config.num_train_timesteps


class InverseDDIMScheduler(GeneralizedDDIMScheduler):
    """The deterministic process upwards: encodes an image x_0 into its latent x_T (Sections 4.3 and 5.4).

    The moves are those of `GeneralizedDDIMScheduler` on the same τ, solved for their upper end: `timesteps` ascend, and
    `step(model_output, timestep, sample)` takes x_s to x_t, s < t the next two of 0, τ_1, τ_2, …, `timestep` = t − 1.
    Each is the exact inverse of the sampler's step for the same `model_output`, but where that hardly depends on x_t
    (`ddim_plugin.prediction.unfold`). Since x_t is not known before, the network is called with x_s in its place, in
    the loop of any sampler. `GeneralizedDDIMPipeline.encode` can go on from there to the x_t that solves the move.

    `from_config` takes the config of any sampler, and a sampler's takes this one's. Noise is refused: with η > 0, x_t
    is no function of x_s. Clipping and thresholding have no inverse: where a sampler's config has them they are
    switched off here (and on again on the way back), unless they are asked for, as in `from_config(config,
    clip_sample=True)`. The output's `prev_sample` is x_t.

    Args and errors are those of `GeneralizedDDIMScheduler`.
    """

    _upwards = True
    _set_aside: tuple[str, ...] = ()  # the sampler's constraints that are switched off

    def _check_noise(self, variance_type: str, eta: float) -> None:
        super()._check_noise(variance_type, eta)
        if process.adds_noise(variance_type, eta):
            raise ValueError(
                f"encoding needs the deterministic process: with noise (eta={eta:g}, variance_type={variance_type!r}) "
                "many x_t lead to one x_s, and no latent is determined. Pass eta=0.0, variance_type='fixed_small'"
            )

    def _own_settings(self) -> dict[str, Any]:
        return super()._own_settings() | {SAMPLER: dict.fromkeys(self._set_aside, True)}

    @classmethod
    def from_config(cls, config: FrozenDict | dict[str, Any] | None = None, return_unused_kwargs=False, **kwargs):
        """An inverse scheduler from the config of a sampler, or of this class; `kwargs` override its entries.

        A sampler's clipping, thresholding and `use_clipped_model_output` are switched off unless `kwargs` set them.
        """
        aside: tuple[str, ...] = ()
        if isinstance(config, dict):
            own = config.get(OWN) or {}
            aside = tuple(key for key in own.get(SAMPLER, ()) if key not in kwargs)
            if SAMPLER not in own:
                aside = tuple(key for key in CONSTRAINTS if config.get(key, own.get(key)) and key not in kwargs)
                kwargs = dict.fromkeys(aside, False) | kwargs
        made = super().from_config(config, return_unused_kwargs, **kwargs)
        scheduler = made[0] if return_unused_kwargs else made
        scheduler._set_aside = aside
        scheduler.register_to_config()
        return made

    def _kind(self, eta: float | None) -> tuple[str, float]:
        if process.effective_eta("fixed_small", eta, 0.0)[1] > 0:
            raise ValueError(f"encoding is deterministic: eta={eta:g} would make x_t no function of x_s; leave it out")
        return "fixed_small", 0.0

    def _make_step(self, t: int, s: int, kind: str, eta: float) -> Step:
        return _inverse_step(process.move(self._alpha_bar, t, s), self.config.prediction_type)

    def _evaluate(self, *args: Any) -> _Evaluation:
        evaluation = super()._evaluate(*args)
        if evaluation.recompute_eps:
            raise ValueError("use_clipped_model_output takes ε̂ from x_t, which an inverse move is only looking for")
        return evaluation


class MultistepDDIMScheduler(GeneralizedDDIMScheduler):
    """The ODE of Eq. 14 by a multistep method: what DDIM needs many steps for in a few, on the same weights.

    A move is a step of DDIM with the mean of g over the move in place of its last value. g is ε̂ or x̂0, taken as the
    polynomial through its last `solver_order` values in a coordinate u(ς), ς = √(1/ᾱ − 1), and its mean is exact on any
    grid (`ddim_plugin.ode`). The first moves have fewer values; order 1 is `GeneralizedDDIMScheduler`. A step at a time
    that does not follow the one before, or of another shape, begins anew, as does one with times for each sample. The
    values are kept in the scheduler: two loops that take turns need one each. With η > 0 the mean of the stochastic
    move is made in the same way, of x̂0 in the SDE that adds η² times the noise (variance) of DDPM.

    The first sample is x_T, also where τ ends below T, as it should for few steps: the network sees x_T at τ_S, where
    it tells nearly the same x̂0, and the first move of the deterministic process is made from T with it. Elsewhere than
    at the beginning of the plan a sample is what its time says.

    `from_config` takes the config of any sampler, but not its τ, noise and clipping: what stands there was chosen for
    another.

    Args:
        solver_order: values that a move is made from, 1 to 4. None is 3 for the deterministic process, 2 with noise.
        solver_quantity: what is held as a polynomial, "epsilon" or "sample" (x̂0, after clipping and thresholding),
            whatever the network predicts. None is ε̂ for the deterministic process, and x̂0 with noise, since there ε̂
            changes with every draw.
        solver_coordinate: u: "nsr" (ς), "log_snr", "angle" (arctan ς) or "bounded" (ς/(1 + ς)). None is "bounded" for ε̂
            and "log_snr" for x̂0.
        solver_corrector: None; "pec": each new value also corrects the move that led to it, at no cost in evaluations
            (as in UniPC); or "pece": the network is then called again at the corrected sample, so that S steps take
            2S − 1 evaluations. With `solver_order=1` that is Heun's method. "pec" helps order 2 on some models and not
            on others; with order 3 of ε̂ it can be unstable at few steps.
        solver_extrapolation: how far a move goes from the last value of g towards the mean of the polynomial; 1 is all
            the way. None is 1, but 1.5 with noise that τ was planned for (η ≥ 0.5): the mean of x̂0 lacks the variance
            that x_0 has given x_t, and going further makes up for some of it. A corrector takes it back.
        lower_order_final: whether the last move, to the data, is of order 1 (that of x̂0 to ᾱ = 1 always is). An ε̂
            extrapolated there leaves what it is wrong by in the picture, but keeps detail that x̂0 lacks.
        start_from_top: whether the first sample is x_T; False takes it as x at τ_S, as other schedulers, order 1,
            "pece" and the process with noise do.
        fitted_timesteps: τ for some numbers of steps, {"S": network times, descending}, as `ddim_plugin.fit_timesteps`
            finds them for a model; it takes the place of the spacing "few_steps" there, in the deterministic process.
        The others are those of `GeneralizedDDIMScheduler`. With η ≥ 0.5 the spacing "few_steps" is "few_steps_noise";
        with "learned_range" eta=0, the default, is the deterministic process here.

    Raises:
        ValueError: as there, and for settings of the solver that are unknown.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        clip_sample: bool = False,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "few_steps",
        rescale_betas_zero_snr: bool = False,
        eta: float = 0.0,
        variance_type: str = "fixed_small",
        eps_mean_square: list[float] | None = None,
        use_clipped_model_output: bool = False,
        solver_order: int | None = None,
        solver_quantity: str | None = None,
        solver_coordinate: str | None = None,
        solver_corrector: str | None = None,
        solver_extrapolation: float | None = None,
        lower_order_final: bool = False,
        start_from_top: bool = True,
        fitted_timesteps: dict[str, list[int]] | None = None,
    ):
        if solver_order is not None and not (tau.is_integer(solver_order) and 1 <= solver_order <= 4):
            raise ValueError(f"solver_order must be 1, 2, 3 or 4, or None, not {solver_order!r}")
        ode.check_solver(solver_quantity or "epsilon", solver_coordinate or "bounded")
        if solver_corrector not in (None, *CORRECTORS):
            raise ValueError(f"unknown solver_corrector {solver_corrector!r}: use pec, pece or None")
        reach = solver_extrapolation
        if reach is not None and not (isinstance(reach, Real) and 0 <= reach < float("inf")):
            raise ValueError(f"solver_extrapolation must be a number from 0 on, or None, not {solver_extrapolation!r}")
        super().__init__(
            num_train_timesteps,
            beta_start,
            beta_end,
            beta_schedule,
            trained_betas,
            clip_sample,
            set_alpha_to_one,
            steps_offset,
            prediction_type,
            thresholding,
            dynamic_thresholding_ratio,
            clip_sample_range,
            sample_max_value,
            timestep_spacing,
            rescale_betas_zero_snr,
            eta,
            variance_type,
            eps_mean_square,
            use_clipped_model_output,
        )
        self._fitted = _fitted(fitted_timesteps, num_train_timesteps)
        if fitted_timesteps is not None:  # as they are read from a file
            kept = {str(S): (times[::-1] - 1).tolist() for S, times in self._fitted.items()}
            self.register_to_config(fitted_timesteps=kept)
        self._kept = (solver_order or 3) - 1 + (solver_corrector is not None)  # values, beside the newest
        self.order = 2 if solver_corrector == "pece" else 1  # times for each step, to pipelines that count
        self._noisy = False
        self._forget()

    def _own_settings(self) -> dict[str, Any]:
        return super()._own_settings() | {key: self.config[key] for key in SOLVER if key in self.config}

    @classmethod
    def from_config(cls, config: FrozenDict | dict[str, Any] | None = None, return_unused_kwargs=False, **kwargs):
        """A scheduler from the config of this or any compatible scheduler; `kwargs` override its entries.

        From another class τ, noise and clipping are not taken over, but for "learned_range", which the network asks
        for, and thresholding.
        """
        return super().from_config(cls._adopted(config), return_unused_kwargs, **kwargs)

    @staticmethod
    def _adopted(config: Any) -> Any:
        """The config without what belongs to another sampler; that of this class as it is."""
        if not isinstance(config, dict) or SOLVER[0] in (config.get(OWN) or {}):
            return config
        own = config.get(OWN)
        learned = "learned_range" in (config.get("variance_type"), (own or {}).get("variance_type"))
        dropped = {"timestep_spacing", "steps_offset", "eta", "clip_sample", "use_clipped_model_output", *SOLVER}
        dropped |= set() if learned else {"variance_type"}

        def left(settings: dict[str, Any]) -> dict[str, Any]:
            return {key: value for key, value in settings.items() if key not in dropped}

        config = left(config)
        if own is not None:
            config[OWN] = left(own)
            if SAMPLER in own:
                config[OWN][SAMPLER] = left(own[SAMPLER])
        return config

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | Tensor | np.ndarray | None = None,
        eta: float | None = None,
    ) -> None:
        """Plan the moves over τ; see `GeneralizedDDIMScheduler.set_timesteps`. "pece" takes S steps in 2S − 1 times.

        `eta` is that of the steps to come, where it is not the scheduler's: from 0.5 on "few_steps" is
        "few_steps_noise", `fitted_timesteps` are not used, and a move goes 1.5 times as far. A loop that tells η to
        `step` alone has the times of the deterministic process, which end too near to the data for noise: set η in the
        config there.
        """
        self._noisy = self._kind(eta)[1] >= MUCH_NOISE
        super().set_timesteps(num_inference_steps, device, timesteps)
        self._forget()

    def _spaced(self, S: int | None) -> tau.Times:
        config = self.config
        if config.timestep_spacing != "few_steps":
            return super()._spaced(S)
        if self._noisy:
            return tau.tau("few_steps_noise", S, config.num_train_timesteps, alpha_bar=self._alpha_bar)
        return self._fitted[S] if tau.is_integer(S) and S in self._fitted else super()._spaced(S)

    def _make_pairs(self, times: tau.Times) -> list[tuple[int, int]]:
        pairs = super()._make_pairs(times)
        if self.config.solver_corrector != "pece":
            return pairs
        return [pairs[0], *(pair for t, s in pairs[1:] for pair in ((t, t), (t, s)))]

    def _make_plan(self, pairs: list[tuple[int, int]], kind: str, eta: float) -> list[Step]:
        plan = super()._make_plan(pairs, kind, eta)
        if self._starts_above(pairs, kind, eta):
            plan[0] = _from_top(plan[0], float(self._alpha_bar[-1]))
        return plan

    def _starts_above(self, pairs: list[tuple[int, int]], kind: str = "fixed_small", eta: float = 0.0) -> bool:
        """Whether the first move is made from T, above the first time, where no noise is added."""
        config = self.config
        allowed = config.start_from_top and config.solver_order != 1 and config.solver_corrector != "pece"
        return allowed and pairs[0][0] < config.num_train_timesteps and not process.adds_noise(kind, eta)

    def _forget(self) -> None:
        self._values: list[Tensor] = []  # of g, the newest first
        self._times: tuple[int, ...] = ()  # that they belong to
        self._last: tuple[str, int] | None = None  # what g is, and the place of the newest in the plan
        self._moved: tuple[str, float] | None = None  # the kind of the move from there
        self._rows: dict[tuple[tuple[str, float], int, tuple[int, ...], bool], tuple[Step, float, list[float]]] = {}

    def _kind(self, eta: float | None) -> tuple[str, float]:
        if eta is None and self.config.variance_type == "learned_range":
            eta = self.config.eta  # the network has a variance; the process is the deterministic one unless asked
        kind = super()._kind(eta)
        noisy = process.adds_noise(*kind)
        if noisy and self.config.solver_quantity == "epsilon" and self._kept:
            raise ValueError(
                f"with noise (eta={kind[1]:g}, variance {kind[0]!r}) ε̂ changes with every draw and is no polynomial: "
                "take solver_quantity='sample', or None"
            )
        return kind

    def _evaluate(self, kind: tuple[str, float], *args: Any) -> _Evaluation:
        evaluation, place = super()._evaluate(kind, *args), self._place
        if place is None or not self._kept:
            return evaluation
        quantity = self.config.solver_quantity or ("sample" if process.adds_noise(*kind) else "epsilon")
        g, t = self._value(evaluation, quantity), self._pairs[place][0]
        follows = self._last == (quantity, place - 1) and self._values[0].shape == g.shape
        again = int(follows and self._times[0] == t)  # in place of the value that was there
        older = slice(again, again + self._kept if follows else 0)
        self._values, self._times = [g, *self._values[older]], (t, *self._times[older])
        corrected = bool(self.config.solver_corrector) and follows and self._moved == kind
        self._last, self._moved = (quantity, place), kind
        values = self._values[1:]
        if place == len(self._pairs) - 1:
            self._values, self._last = [], None  # nothing follows: they can go

        key = kind, place, self._times, corrected
        if key not in self._rows:
            first, *rest = self._row(quantity, *key)
            step = evaluation.step
            x, out = (step.x0_x, step.x0_out) if quantity == "sample" else (step.eps_x, step.eps_out)
            step = step._replace(fold_x=step.fold_x + first * x, fold_out=step.fold_out + first * out)
            self._rows[key] = step, first, rest
        step, first, rest = self._rows[key]
        others = [(weight, value) for weight, value in zip(rest, values, strict=True) if weight]
        if first and not (evaluation.limit is None and evaluation.thresholding is None):
            others.append((first, g))
        return evaluation._replace(step=step, others=others)

    def _value(self, evaluation: _Evaluation, quantity: str) -> Tensor:
        """g at the sample of this evaluation."""
        step = evaluation.step
        if quantity == "sample":
            return evaluation.x0()
        if step.eps_x == 0 and step.eps_out == 1 and not evaluation.recompute_eps:
            return evaluation.output
        return evaluation.eps()

    def _row(
        self, quantity: str, kind: tuple[str, float], place: int, known: tuple[int, ...], corrected: bool
    ) -> list[float]:
        """What the values of g at the times `known`, the newest first, add to the step of DDIM.

        That step is scale·x_t + slope·g: the mean of g stands in place of its last value. Where the move that led to
        x_t is corrected, x_t has changed by its slope times the change of its mean.
        """
        noisy = process.adds_noise(*kind)
        order = self.config.solver_order or (2 if noisy else 3)
        reach = self.config.solver_extrapolation
        reach = (1.5 if noisy and self._noisy else 1.0) if reach is None else reach
        row = np.zeros(len(known))
        mean = self._mean(quantity, self._pairs[place], known[:order], kind[1], reach)
        if len(mean) > 1:
            slope = self._linear(quantity, kind, place)[1]
            row[: len(mean)] += slope * mean
            row[0] -= slope
        if corrected and self._is_corrected(quantity, kind, place, known):
            before = self._pairs[place - 1]
            factor = self._linear(quantity, kind, place)[0] * self._linear(quantity, kind, place - 1)[1]
            old = self._mean(quantity, before, known[1 : order + 1], kind[1], reach)
            new = self._mean(quantity, before, known[: max(2, order)], kind[1])
            row[: len(new)] += factor * new
            row[1 : len(old) + 1] -= factor * old
        return row.tolist()

    def _is_corrected(self, quantity: str, kind: tuple[str, float], place: int, known: tuple[int, ...]) -> bool:
        """Whether the move before this place is one of the process, and is corrected here."""
        if len(known) == 1 or (place == 1 and self._starts_above(self._pairs, *kind)):
            return False
        t = self._pairs[place - 1][0]
        return t != known[0] and (quantity == "sample" or self._alpha_bar[t] > 0)

    def _linear(self, quantity: str, kind: tuple[str, float], place: int) -> tuple[float, float]:
        """(scale, slope) of a step of the plan as scale·x_t + slope·g."""
        step, alpha_bar = self._plan(kind)[place], self._alpha_bar[self._pairs[place][0]]
        alpha, sigma = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
        if quantity == "sample":
            return float(step.eps / sigma), float(step.x0 - step.eps * alpha / sigma)
        return float(step.x0 / alpha), float(step.eps - step.x0 * sigma / alpha)

    def _mean(
        self, quantity: str, move: tuple[int, int], times: tuple[int, ...], eta: float, reach: float = 1.0
    ) -> ode.Array:
        """Weights of g at these times, or at the first of them, for its mean over a move, gone so far towards it."""
        ends = [float(self._alpha_bar[time]) for time in move]
        known = [float(self._alpha_bar[time]) for time in times]
        to_data = (quantity == "sample" and ends[1] == 1) or (self.config.lower_order_final and move[1] == 0)
        to_noise = quantity == "epsilon" and ends[1] == 0
        if to_data or to_noise or ends[0] == ends[1] or len(set(known)) < len(known):
            known = known[:1]  # x̂0 or ε̂ as it is, a time that is repeated
        coordinate = self.config.solver_coordinate or COORDINATE[quantity]
        if (known[-1] == 0 and coordinate in ("nsr", "log_snr")) or (known[-1] == 1 and coordinate == "log_snr"):
            known = known[:-1]  # the top, or the data, where these are infinite
        if len(known) < 2:
            return np.ones(1)
        weights = reach * _mean_weights(quantity, coordinate, *ends, tuple(known), eta)
        weights[0] += 1 - reach
        return weights


class InverseMultistepDDIMScheduler(InverseDDIMScheduler, MultistepDDIMScheduler):
    """The ODE of Eq. 14 upwards by a multistep method: encodes an image x_0 into x_T in few steps.

    A move from s up to t is made from the last values of g, at s and below, in the loop of any sampler: nothing is
    called twice, and at the same number of evaluations decoding returns nearer to the image than with
    `InverseDDIMScheduler`, which is of order 1. The network is called at the lower end of a move; on the first, from
    the data, at τ_1. Where the sampler starts from the top, the last move goes there.

    `from_config` takes the config of a `MultistepDDIMScheduler`, and the other way round. Args and errors are those of
    that and of `InverseDDIMScheduler`. A corrector is not used.
    """

    def _make_pairs(self, times: tau.Times) -> list[tuple[int, int]]:
        path = [0, *(int(t) for t in times)]
        if len(times) > 1 and self._starts_above([(path[-1], path[-2])]):
            path[-1] = self.config.num_train_timesteps  # a single step ends at τ_1, where the network was called
        return list(pairwise(path))

    def _called(self, pairs: list[tuple[int, int]]) -> list[int]:
        return [t or s for t, s in pairs]

    _make_plan = GeneralizedDDIMScheduler._make_plan  # no move is made from the top

    def _make_step(self, t: int, s: int, kind: str, eta: float) -> Step:
        move, prediction_type = process.move(self._alpha_bar, t, s), self.config.prediction_type
        return _step(move, prediction_type) if t else _step_from_data(move, prediction_type)

    @classmethod
    def from_config(cls, config: FrozenDict | dict[str, Any] | None = None, return_unused_kwargs=False, **kwargs):
        """An inverse scheduler from the config of any sampler, as `MultistepDDIMScheduler` takes it over."""
        return super().from_config(cls._adopted(config), return_unused_kwargs, **kwargs)

    def _step_at(self, timestep: int, kind: tuple[str, float]) -> Step:
        raise ValueError(f"timestep {timestep} is not in the plan, or not the same for all samples: encode along τ")

    def _all_steps(self, kind: tuple[str, float], dtype: torch.dtype, device: torch.device) -> Tensor:
        raise ValueError("a time for each sample is not the same for all samples: encode along τ")

    def _is_corrected(self, *args: Any) -> bool:
        return False


def sampler_class(scheduler: SchedulerMixin) -> type[GeneralizedDDIMScheduler]:
    """The class that samples with the method of a scheduler, whichever way that goes; of others the generalized one."""
    return MultistepDDIMScheduler if isinstance(scheduler, MultistepDDIMScheduler) else GeneralizedDDIMScheduler


def keep_learned(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` to a config without "fixed_small" where it says "learned_range": the network has two halves."""
    if config.get("variance_type") == "learned_range" and changes.get("variance_type") == "fixed_small":
        return {key: value for key, value in changes.items() if key != "variance_type"}
    return changes


def _said(config: dict[str, Any]) -> set[str]:
    """The keys of a config that were set, not left to the default of the class that wrote it.

    In memory diffusers keeps a list of those left; on disk only a value equal to that class's default tells.
    """
    if "_use_default_values" in config:
        return config.keys() - set(config["_use_default_values"])
    writer = getattr(diffusers, str(config.get("_class_name")), None)
    if writer is None:
        return set(config)
    defaults = {name: parameter.default for name, parameter in inspect.signature(writer.__init__).parameters.items()}
    return {key for key, value in config.items() if key not in defaults or defaults[key] != value}


def _fitted(timesteps: dict[str, list[int]] | None, T: int) -> dict[int, tau.Times]:
    """τ by the number of steps, checked."""
    found = {}
    if not isinstance(timesteps or {}, dict):
        raise ValueError(f"fitted_timesteps must be a dictionary of lists by numbers of steps, not {timesteps!r}")
    for S, times in (timesteps or {}).items():
        if not (tau.is_integer(S) or (isinstance(S, str) and S.isdecimal())):
            raise ValueError(f"fitted_timesteps has lists of times by numbers of steps: {S!r} is none")
        found[int(S)] = tau.explicit(times, T, lowest=0, descending=True)
        if len(found[int(S)]) != int(S):
            raise ValueError(f"fitted_timesteps has {len(times)} times for {S} steps: give as many as there are steps")
    return found


def _eps_table(variance_type: str, eps_mean_square: Sequence[float] | None, T: int) -> np.ndarray | None:
    """E‖ε̂‖²/d with one entry for each time 0..T, checked."""
    if eps_mean_square is None:
        if variance_type == "optimal":
            raise ValueError(f"variance_type='optimal' needs eps_mean_square: E‖ε̂‖²/d, one for each of the {T} times")
        return None
    table = np.asarray(eps_mean_square, dtype=np.float64)
    if table.shape != (T,) or not (np.isfinite(table) & (table >= 0)).all():
        raise ValueError(f"eps_mean_square must be {T} finite non-negative numbers, one for each time")
    return np.concatenate([[0.0], table])


def check_generators(generator: Randomness, batch_size: int) -> None:
    """Raise ValueError unless `generator` is one, none, or a list with one for each image."""
    each = generator if isinstance(generator, list) else [generator]
    if generator is not None and not all(isinstance(one, Generator) for one in each):
        raise ValueError(f"generator must be a torch.Generator or a list of them, not {generator!r}")
    if isinstance(generator, list) and len(generator) != batch_size:
        raise ValueError(f"{len(generator)} generators for a batch of {batch_size}: give one, or one for each image")


def _check_noise(sample: Tensor, generator: Randomness, variance_noise: Tensor | None) -> None:
    """Raise ValueError unless z can be drawn, or was given, for this sample."""
    if generator is not None:
        check_generators(generator, sample.shape[0])
        if variance_noise is not None:
            raise ValueError("give either generator or variance_noise, not both")
    if variance_noise is not None and variance_noise.shape != sample.shape:
        raise ValueError(f"variance_noise has shape {tuple(variance_noise.shape)}, the sample {tuple(sample.shape)}")


# ======== card ========

"""Model cards: one template, filled from what was written by the scripts that trained and measured the model.

`results.json` holds a list under "results". An entry has
    metric: its id ("fid"), and optionally name ("FID") and standard_error;
    value, and nfe: evaluations of the network for an image;
    dataset: {"name", and optionally "id" on the Hub and "split"}, what the value was measured against;
and optionally the settings it was measured with: num_inference_steps, eta, variance_type, timestep_spacing, scheduler,
images, draws (sets of so many images, whose values were averaged), seed. With `"listed": false` it stands in the card's
tables but not in the metadata that the Hub lists.
`training.json` is the record that the training script leaves.
"""

















TASK = "unconditional-image-generation"
"""The Hub's name for the task of these pipelines."""

SETTINGS = ("num_inference_steps", "eta", "variance_type", "timestep_spacing", "scheduler", "images", "draws", "seed")
"""What a result may tell of how it was measured."""

MARK = "*Written by ddim-plugin"
"""Begins the last line of a card that was made here, which ends with a digest of the text above it."""

WITH_PLUGIN = "from ddim_plugin import GeneralizedDDIMPipeline"  # diffusers would miss it, at the head of a line

TEMPLATE = Template("""# $title

$summary

$picture

## Use

With ddim-plugin installed, which runs no code of this repo:

```python
$with_plugin

pipe = GeneralizedDDIMPipeline.from_pretrained("$repo"$variant$revision)
${sampler}images = pipe(batch_size=16, num_inference_steps=20$labels).images
```

With diffusers alone. The flag runs the `ddim_plugin_….py` files of this repo: read them, and pin the commit you read.

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("$repo"$variant, trust_remote_code=True, revision="THE COMMIT YOU READ")
```

$stock

## Settings

$settings

## Figures

$figures
$pictures
## Training

$training

## Limits and biases

- The pictures resemble the training data, with whatever it over- or underrepresents; nothing filters them, and nothing
  was done to find out what they may show.
- A picture may come close to one of the training set. Do not take pictures for evidence of anything real.
- Made for $size pictures and for research on sampling; at other sizes the network is out of its range.
- The fewer the steps, the further the pictures are from those of the model's own process: compare at equal
  evaluations of the network (NFE).

## Licence

$licence

## Citation

```bibtex
@inproceedings{song2021denoising,
  title     = {Denoising Diffusion Implicit Models},
  author    = {Song, Jiaming and Meng, Chenlin and Ermon, Stefano},
  booktitle = {International Conference on Learning Representations},
  year      = {2021}
}
```
""")

STOCK = """With the classes of diffusers only:

```python
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

unet = UNet2DModel.from_pretrained("$repo", subfolder="unet"$variant$revision)
scheduler = DDIMScheduler.from_pretrained("$repo", subfolder="scheduler"$revision)
images = DDIMPipeline(unet, scheduler)(batch_size=16, num_inference_steps=20).images
```$other"""

LOOP = """The parts load into the classes of diffusers too, `UNet2DModel.from_pretrained("$repo", subfolder="unet")` and
`$scheduler.from_pretrained("$repo", subfolder="scheduler")`; `DDIMPipeline` does not know $unknown."""

SAMPLING = """pipe.scheduler = GeneralizedDDIMScheduler.from_config(pipe.scheduler.config)  # the saved one encodes
"""

TAU_NAMES = {
    "linear": "linear, τ_i = ⌊T·i/S⌋",
    "quadratic": "quadratic, τ_i = max(i, ⌊T·i²/S²⌋)",
    "paper_linear": "linear, as the authors' code",
    "paper_quadratic": "quadratic, as the authors' code",
}


# ---- reading -------------------------------------------------------------------------------------------------------


def read_results(file: str | Path) -> list[dict[str, Any]]:
    """The entries of a `results.json`. Raises ValueError naming what does not fit the format."""
    return entries_of(read_object(file), file)


def entries_of(content: dict[str, Any], file: str | Path) -> list[dict[str, Any]]:
    """`read_results` of what the file holds."""
    entries = content.get("results")
    if not isinstance(entries, list):
        raise ValueError(f'{file} holds no list under "results"')
    for i, entry in enumerate(entries):
        problem = _problem(entry)
        if problem:
            raise ValueError(f"{file}: entry {i} of results {problem}")
    return entries


def read_object(file: str | Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError naming a file that holds none."""
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"cannot read {file}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object")
    return content


def _problem(entry: Any) -> str | None:
    if not isinstance(entry, dict):
        return f"is no object: {entry!r}"
    for key in ("metric", "value", "nfe", "dataset"):
        if key not in entry:
            return f"has no {key}"
    if not isinstance(entry["metric"], str) or not entry["metric"]:
        return f"has the metric {entry['metric']!r}: give its id, such as fid"
    for key in ("value", "nfe", "standard_error"):
        value = entry.get(key)
        if not (key == "standard_error" and value is None) and not _finite(value):
            return f"has {key}={value!r}: it must be a finite number"
    if entry["nfe"] <= 0:
        return f"has nfe={entry['nfe']!r}: it must be positive"
    dataset = entry["dataset"]
    texts = isinstance(dataset, dict) and all(isinstance(dataset.get(key, ""), str) for key in ("name", "id", "split"))
    if not texts or not dataset.get("name"):
        return f"has the dataset {dataset!r}: give at least its name; name, id and split are texts"
    return None


def _finite(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and abs(value) < 1e300


PLACE = re.compile(
    r"(?:^|(?<=[\s\"'=:]))(?!//)(?:file://[^/\s]*)?(?:~|[A-Za-z]:)?[\\/](?:[^\s\"'\\/]+[\\/])+([^\s\"'\\/,;:)]*)"
)
"""A place on a machine within a text: two parts or more, from the root or the home."""


def public(value: Any) -> Any:
    """A record without the places of this machine: of each the last part is left."""
    if isinstance(value, dict):
        return {public(key): public(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [public(each) for each in value]
    if not isinstance(value, str):
        return value
    if Path(value).is_absolute() or value.startswith(("~/", "../", "./")):
        return Path(value).name
    if PureWindowsPath(value).is_absolute():
        return PureWindowsPath(value).name
    return PLACE.sub(r"\1", value)


# ---- writing -------------------------------------------------------------------------------------------------------


def card(
    repo_id: str,
    unet: dict[str, Any],
    scheduler: dict[str, Any],
    parameters: int,
    results: list[dict[str, Any]] | None = None,
    training: dict[str, Any] | None = None,
    conversion: dict[str, Any] | None = None,
    picture: str | None = None,
    caption: str = "",
    pictures: dict[str, str] | None = None,
    license: str | None = None,
    variant: str | None = None,
    revision: str | None = None,
) -> str:
    """The card of a model, as Markdown with its metadata in front.

    Args:
        repo_id: id of the repo on the Hub.
        unet, scheduler: the configs of the two.
        parameters: number of the network's parameters.
        results, training, conversion: what `results.json` lists, and what `training.json` and `conversion.json` hold,
            where there are such.
        picture, caption: name of a sample grid in the repo, and what is said below it.
        pictures: the same for further pictures, by their names.
        license: the Hub's id of the licence of the weights.
        variant: the weights to load, where there are no ordinary ones.
        revision: the branch of the repo, if not main.

    Raises:
        ValueError: for a licence that is no id.
    """
    check_license(license)
    results, training = results or [], training or {}
    origin = _training(training) if training else _conversion(conversion) if conversion else []
    title = repo_id.split("/")[-1]
    height, width = _size(unet)
    classes = unet.get("num_class_embeds")
    kind = "A class-conditional" if classes else "An unconditional"
    colours = {1: "grayscale", 3: "RGB"}.get(unet["in_channels"], f"{unet['in_channels']}-channel")
    inverse = str(scheduler.get("_class_name")).startswith("Inverse")
    ours = "eta" in scheduler  # a stock scheduler has none
    unknown = _unknown_to_stock(unet, scheduler)
    words = {
        "repo": repo_id,
        "variant": f', variant="{variant}"' if variant else "",
        "revision": f', revision="{revision}"' if revision else "",
        "scheduler": "DDIMScheduler" if ours else scheduler.get("_class_name"),
        "unknown": unknown,
        "other": _other_sampler(scheduler),
    }
    process = "sampled by the generalized process of"
    if not ours:
        process = f"saved with `{scheduler.get('_class_name')}`, a network as in"
    known = training.get("classes")
    labels = len(known) if isinstance(known, list) and known else classes
    data_set = training["config"].get("data") if training.get("data_from") == "hub" else None
    data = "under its own licence, which may bind the weights"
    if data_set:
        data = f"[{data_set}](https://huggingface.co/datasets/{data_set}), {data}"
    body = TEMPLATE.substitute(
        words,
        title=title,
        summary=f"{kind} diffusion model of {height}×{width} {colours} pictures: a `{unet.get('_class_name')}` of "
        f"{parameters:,} parameters, {process} "
        "[Denoising Diffusion Implicit Models](https://arxiv.org/abs/2010.02502) (DDIM).",
        picture=f"![samples]({picture})\n\n*{caption}*" if picture else "*There is no sample grid.*",
        with_plugin=WITH_PLUGIN + (", GeneralizedDDIMScheduler" if inverse else ""),
        sampler=SAMPLING if inverse else "",
        labels=", class_labels=0" if classes else "",
        stock=Template(LOOP if unknown else STOCK).substitute(words),
        settings=_table([*_settings(scheduler), ("classes", labels)]),
        figures=_figures(results),
        pictures="".join(f"\n![{name}]({name})\n\n*{_cell(told)}*\n" for name, told in (pictures or {}).items()),
        training=_table(origin) if origin else "How these weights were trained was not recorded.",
        size=f"{height}×{width}",
        licence=f"The weights: {license or 'nothing is said'}. The training data: {data}. The code files: Apache-2.0.",
    )
    metadata = ModelCardData(
        library_name="diffusers",
        pipeline_tag=TASK,
        license=license,
        tags=["ddim", "diffusion", "ddim-plugin"],
        datasets=[data_set] if data_set else None,
        model_name=title,
        eval_results=[_eval_result(entry) for entry in results if entry.get("listed", True)] or None,
    )
    return _signed(f"---\n{metadata.to_yaml()}\n---\n\n{body}")


def _signed(text: str) -> str:
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{text}\n{MARK} {__version__} from the records and configs of this repo ({digest}).*\n"


def is_written_here(text: str) -> bool:
    """Whether a card was made here, and nobody has changed it since."""
    above, _, mark = text.replace("\r\n", "\n").rpartition(f"\n{MARK}")
    return mark.rstrip().endswith(f"({hashlib.sha256(above.encode()).hexdigest()[:8]}).*")


def check_license(license: str | None) -> None:
    """Raise ValueError for what is no id of a licence."""
    if license is not None and not re.fullmatch(r"[a-z0-9.+-]+", license):
        raise ValueError(f"license must be as the Hub names it, such as mit or cc-by-4.0, not {license!r}")


def license_of(text: str) -> str | None:
    """The licence that a card names."""
    try:
        return ModelCard(text).data.license
    except ValueError:  # no metadata that can be read
        return None


def eval_results(results: list[dict[str, Any]]) -> dict[str, str]:
    """`.eval_results/*.yaml` for what was measured against data sets of the Hub: name → text.

    Nothing where `huggingface_hub` is too old to know that format.
    """
    if not hasattr(huggingface_hub, "EvalResultEntry"):
        return {}
    files: dict[str, list[Any]] = {}
    for entry in results:
        if entry["dataset"].get("id") and entry.get("listed", True):
            made = huggingface_hub.EvalResultEntry(
                entry["dataset"]["id"], TASK, float(entry["value"]), notes=_notes(entry)
            )
            files.setdefault(entry["dataset"]["id"].replace("/", "--"), []).append(made)
    return {
        f".eval_results/{name}.yaml": yaml_dump(huggingface_hub.eval_result_entries_to_yaml(entries))
        for name, entries in files.items()
    }


def _eval_result(entry: dict[str, Any]) -> EvalResult:
    dataset = entry["dataset"]
    return EvalResult(
        task_type=TASK,
        dataset_type=dataset.get("id") or dataset["name"],
        dataset_name=dataset["name"],
        dataset_split=dataset.get("split"),
        metric_type=entry["metric"],
        metric_name=f"{_name(entry)} ({_notes(entry)})",
        metric_value=float(entry["value"]),
        metric_args={"nfe": entry["nfe"]} | {key: entry[key] for key in SETTINGS if entry.get(key) is not None},
    )


def _name(entry: dict[str, Any]) -> str:
    return entry.get("name") or entry["metric"].upper()


def _notes(entry: dict[str, Any]) -> str:
    """How a result was measured, in a line."""
    known = {"num_inference_steps": "S", "eta": "η", "variance_type": "variance", "timestep_spacing": "τ"}
    said = [f"{known.get(key, key)} = {entry[key]}" for key in SETTINGS[:5] if entry.get(key) is not None]
    return ", ".join([f"NFE = {entry['nfe']:g}", *said])


def _size(unet: dict[str, Any]) -> tuple[Any, Any]:
    size = unet.get("sample_size") or ("?", "?")
    return (size, size) if isinstance(size, int) else tuple(size)


def _unknown_to_stock(unet: dict[str, Any], scheduler: dict[str, Any]) -> str:
    """What of this model the stock DDIM pipeline has no word for."""
    if unet.get("num_class_embeds"):
        return "class labels"
    if "eta" not in scheduler:
        return f"the settings of `{scheduler.get('_class_name')}`"
    return "learned variances" if unet.get("out_channels") != unet["in_channels"] else ""


def _other_sampler(scheduler: dict[str, Any]) -> str:
    """What is to be said where the stock pipeline, which has η = 0 and its own τ, makes other pictures."""
    told = [] if scheduler.get("timestep_spacing") in STOCK_SPACINGS else ["its own τ"]
    if "solver_order" in scheduler and scheduler["solver_order"] != 1:
        told.append("order 1")
    if scheduler.get("eta") or scheduler.get("variance_type") in ("fixed_large", "optimal"):
        told.append("η = 0")
    if scheduler.get("beta_schedule") and scheduler.get("use_clipped_model_output"):
        told.append("the network's ε̂ beside a clipped x̂0")
    return f"\n\nThat is another sampler than the one above: it has {', '.join(told)}." if told else ""


def _settings(scheduler: dict[str, Any]) -> list[tuple[str, Any]]:
    derived = "trained_betas" in (scheduler.get("_ddim_plugin") or {})  # from a schedule with a name
    schedule, ends = scheduler.get("beta_schedule"), (scheduler.get("beta_start"), scheduler.get("beta_end"))
    betas = schedule
    if scheduler.get("trained_betas") is not None and not derived:
        betas = "given as numbers, in the config"
    elif schedule in RANGED and all(map(_finite, ends)):
        betas = f"{schedule}, {ends[0]:g} to {ends[1]:g}"
    if betas and scheduler.get("rescale_betas_zero_snr"):
        betas += ", rescaled to zero terminal SNR"
    constraint = "not constrained"
    if scheduler.get("thresholding"):
        constraint = f"thresholded dynamically, ratio {scheduler.get('dynamic_thresholding_ratio')}"
    elif scheduler.get("clip_sample"):
        constraint = f"clipped to ±{scheduler.get('clip_sample_range')}"
    spacing, fitted = scheduler.get("timestep_spacing"), scheduler.get("fitted_timesteps") or {}
    return [
        ("scheduler", f"`{scheduler.get('_class_name')}`"),
        ("T", scheduler.get("num_train_timesteps")),
        ("β", betas),
        ("prediction", scheduler.get("prediction_type")),
        ("τ", TAU_NAMES.get(spacing, spacing)),
        ("τ fitted to these weights", ", ".join(f"S = {S}" for S in sorted(map(int, fitted))) or None),
        ("order", (scheduler["solver_order"] or "3, or 2 with noise") if "solver_order" in scheduler else None),
        ("η", scheduler.get("eta")),
        ("variance", scheduler.get("variance_type")),
        ("x̂0", constraint),
    ]


def _figures(results: list[dict[str, Any]]) -> str:
    """A table for each metric and data set: settings by S."""
    if not results:
        return "None have been measured for these weights."
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for entry in results:
        data = " ".join(filter(None, (entry["dataset"]["name"], entry["dataset"].get("split"))))
        key = (_name(entry), data, entry.get("images"), entry.get("draws"), entry.get("seed"))
        groups.setdefault(key, []).append(entry)
    parts = []
    for (name, data, images, draws, seed), entries in groups.items():
        told = [f"**{_cell(name)}**", _cell(data)]
        sets = "" if draws in (None, 1) else f"mean of {draws} sets of "
        told += [] if images is None else [f"{sets}{images:,} images"]
        told += [] if seed is None else [f"seed {seed}"]
        parts += [", ".join(told), _by_steps(entries)]
    note = "In brackets evaluations of the network for an image (NFE), where they are not S; ± the standard error."
    return "\n\n".join([*parts, f"{note} All of it is in `results.json`."])


def _by_steps(entries: list[dict[str, Any]]) -> str:
    """The values of entries, a row for each setting and a column for each S."""
    heads = {"scheduler": "scheduler", "variance_type": "variance", "eta": "η", "timestep_spacing": "τ"}
    used = [key for key in heads if any(entry.get(key) is not None for entry in entries)]
    columns = sorted({_column(entry) for entry in entries})
    rows: dict[tuple, dict[tuple, list[str]]] = {}
    for entry in entries:
        error, steps = entry.get("standard_error"), entry.get("num_inference_steps")
        value = f"{entry['value']:.4g}" + ("" if error is None else f" ± {error:.2g}")
        value += "" if steps in (None, entry["nfe"]) else f" ({entry['nfe']:.4g})"
        setting = tuple("" if entry.get(key) is None else _cell(entry[key]) for key in used)
        rows.setdefault(setting, {}).setdefault(_column(entry), []).append(value)
    lines = [[heads[key] for key in used] + [head for _, _, head in columns]]
    lines += [["---"] * len(lines[0])]
    lines += [
        [*setting, *(", ".join(values.get(column, ())) for column in columns)] for setting, values in rows.items()
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _column(entry: dict[str, Any]) -> tuple[bool, float, str]:
    """Where an entry stands: its S, or where it has none its evaluations."""
    steps = entry.get("num_inference_steps")
    if steps is None:
        return True, entry["nfe"], f"NFE {entry['nfe']:.4g}"
    return False, steps, f"S = {steps}"


def _training(training: dict[str, Any]) -> list[tuple[str, Any]]:
    config = training.get("config", {})
    steps, batch, seconds = config.get("steps"), config.get("batch_size"), training.get("seconds")
    seen = f"{steps * batch:,} in {steps:,} steps of {batch}" if steps and batch else None
    data = config.get("data")
    if isinstance(data, str) and training.get("data_from") != "hub":
        data = Path(data).name  # of a folder
    hours = None if seconds is None else f"{seconds / 3600:.2f} h on {training.get('device')}"
    if hours and training.get("processes", 1) > 1:
        hours += f", {training['processes']} processes"
    rate = training.get("images_per_second")
    revision = training.get("revision")
    return [
        ("data", f"{data}, {config.get('split')}"),
        ("pictures in the set", None if training.get("images") is None else f"{training['images']:,}"),
        ("pictures seen", seen),
        ("loss", config.get("loss")),
        ("optimizer", f"{config.get('optimizer')}, learning rate {config.get('learning_rate')}"),
        ("weights", f"exponential average, decay {config.get('ema_decay')}"),
        ("precision", training.get("mixed_precision")),
        ("seed", config.get("seed")),
        ("last loss", None if training.get("loss") is None else f"{training['loss']:.4g}"),
        ("cost", hours),
        ("pictures a second", None if rate is None else f"{rate:.4g}"),
        ("code", None if revision is None else f"revision {revision}"),
        ("status", training.get("status")),
    ]


def _conversion(conversion: dict[str, Any]) -> list[tuple[str, Any]]:
    source = conversion.get("source", {})
    return [
        ("converted from", source.get("file")),
        ("its SHA-256", source.get("sha256")),
        ("published as", source.get("published")),
        ("weights", conversion.get("weights")),
        ("step", source.get("step")),
    ]


def _cell(value: Any) -> str:
    """A value in a table of Markdown."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _table(rows: list[tuple[str, Any]]) -> str:
    lines = [f"| {name} | {_cell(value)} |" for name, value in rows if value is not None]
    return "\n".join(["| | |", "|---|---|", *lines])


# ======== hub ========

"""Pipelines as folders and repos of the Hub: written for three kinds of reader, and opened without running code.

A folder has, beside the weights and configs, the package as one file (see `bundle`) and for each kind of class a short
entry to it, which `model_index.json` names: that is what diffusers needs to load it where this package is missing. Here
those files are never run: classes are taken by their names, from what this process knows.
"""






































logger = logging.getLogger("ddim_plugin")

INDEX = "model_index.json"
PIPELINE = "GeneralizedDDIMPipeline"
SCHEDULERS = {
    each.__name__: each
    for each in (
        GeneralizedDDIMScheduler,
        InverseDDIMScheduler,
        MultistepDDIMScheduler,
        InverseMultistepDDIMScheduler,
    )
}

CODE = re.compile(r"(scheduler/)?ddim_plugin_\w+_[0-9a-f]{8}(_pipeline|_scheduler)?\.py")
"""Names of the code files, of any version."""

OURS = re.compile(r"ddim_plugin(_\w+)?")
"""Modules that `model_index.json` may name for classes of this package."""

ENTRY = '''"""{classes} for diffusers. The code is in {name}.py.

diffusers runs this file anew at each load. The code is run once, so that the classes of all pipelines stay the same.
"""

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for diffusers: it copies the files that such lines name
    {line}

if "{name}" not in sys.modules:
    spec = importlib.util.spec_from_file_location("{name}", Path(__file__).with_name("{name}.py"))
    module = sys.modules["{name}"] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules["{name}"]
        raise

sys.modules.setdefault("{name}_scheduler", sys.modules["{name}"])  # where diffusers looks for what it is given instead
{takes}
'''

WEIGHTS = re.compile(
    r"(unet/)?diffusion_pytorch_model((\.(?P<variant>[^/]+?))?(-\d{5}-of-\d{5})?\.(safetensors|bin)"
    r"|\.(safetensors|bin)\.index(\.(?P<parts>[^/]+))?\.json)"
)
"""Names of a network's weights, and of the index of those in several files."""

DTYPE = "dtype" if tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 42) else "torch_dtype"
"""What this version of diffusers calls it."""

HUB_SETTINGS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision")
WEIGHT_SETTINGS = ("torch_dtype", "dtype", "variant", "use_safetensors", "low_cpu_mem_usage", "disable_mmap")
WEIGHT_SETTINGS += ("device_map", "max_memory", "offload_folder", "offload_state_dict", "quantization_config")
WEIGHT_SETTINGS += ("use_flashpack",)
"""Keywords of `from_pretrained`: where files come from, and how a network is read and placed."""


# ---- writing -------------------------------------------------------------------------------------------------------


def write_index(pipe: DiffusionPipeline, folder: str | Path) -> None:
    """`model_index.json` for all readers, and the code files it names; those of other versions go."""
    folder = Path(folder)
    index = json.loads(pipe.to_json_string())
    index.pop("_name_or_path", None)  # a place on this machine
    index, files = with_code(index)
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_whole(folder / name, text)
    write_whole(folder / INDEX, json.dumps(index, indent=2) + "\n")
    for path in (*folder.glob("*.py"), *folder.glob("scheduler/*.py")):
        name = path.relative_to(folder).as_posix()
        if CODE.fullmatch(name) and name not in files:
            path.unlink()


def variant_of(name: str) -> str | None:
    """The variant of a file of weights, or of the index of several: "" is none; None for files that are neither."""
    match = WEIGHTS.fullmatch(name)
    return None if match is None else match["variant"] or match["parts"] or ""


@contextmanager
def replaced(folder: str | Path, variant: str | None) -> Iterator[None]:
    """In here a network's weights are written anew: those that were there, in any form, go; or stay if that fails."""
    unet = Path(folder) / "unet"
    files = [path for path in unet.glob("diffusion_pytorch_model*") if variant_of(path.name) == (variant or "")]
    asides = {path: path.with_name(path.name + ".before") for path in files}
    for path, aside in asides.items():
        path.replace(aside)
    try:
        yield
    except BaseException:
        for path, aside in asides.items():
            aside.replace(path)
        raise
    for aside in asides.values():
        aside.unlink()


def weights_digest(*modules: Any) -> str:
    """SHA-256 of the names, types, shapes and bytes of all weights."""
    found = hashlib.sha256()
    for module in modules:
        for name, value in module.state_dict().items():
            found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def with_code(index: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """What `model_index.json` holds, with entries that name code files; and those files, names and texts."""
    name, text = code()
    files = {f"{name}.py": text, f"{name}_pipeline.py": _entry([PIPELINE])}
    index = index | {"_class_name": [f"{name}_pipeline", PIPELINE]}
    if scheduler_is_ours(index):
        files |= {f"scheduler/{name}.py": text, f"scheduler/{name}_scheduler.py": _entry(list(SCHEDULERS))}
        index["scheduler"] = [f"{name}_scheduler", index["scheduler"][1]]
    return index, files


def _entry(classes: list[str]) -> str:
    name, names = code()[0], ", ".join(classes)
    line = f"from .{name} import {names}"  # not in the template: diffusers would take it for one of this file
    takes = "\n".join(f'{each} = sys.modules["{name}"].{each}' for each in classes)
    return ENTRY.format(name=name, classes=names, line=line, takes=takes)


def write_whole(path: str | Path, text: str) -> None:
    """A text file, written aside and renamed, so that a reader never meets half of it."""
    path = Path(path)
    aside = path.with_name(path.name + ".part")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


# ---- opening -------------------------------------------------------------------------------------------------------


class _Download(DiffusionPipeline):
    """Downloads the files of a U-Net and a scheduler, whatever classes and code the repo names for them."""

    def __init__(self, unet: Any, scheduler: Any): ...

    @classmethod
    def _dict_from_json_file(cls, json_file: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        index = read_object(json_file)
        ours = {key: ["diffusers", "ModelMixin"] for key in ("unet", "scheduler") if key in components(index)}
        return {"_class_name": cls.__name__} | ours


def parts(cls: Any, source: str | os.PathLike, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments with which to make a `cls` of what is in a folder or a repo.

    Nothing of a repo is run: scheduler and network are made here, from classes that this process knows. Raises
    ValueError or OSError that says what to do.
    """
    name, kwargs = os.fspath(source), dict(kwargs)
    if kwargs.pop("custom_pipeline", None) is not None:
        raise ValueError(
            f"{cls.__name__} runs no code of a repo: custom_pipeline is for DiffusionPipeline.from_pretrained"
        )
    kwargs.pop("trust_remote_code", None)  # there is nothing to trust
    hub = {key: kwargs.pop(key) for key in HUB_SETTINGS if key in kwargs}
    weights = {key: kwargs.pop(key) for key in WEIGHT_SETTINGS if key in kwargs}
    wanted = inspect.signature(cls.__init__).parameters.keys() - {"self"}
    if kwargs.keys() - wanted:
        raise TypeError(f"{cls.__name__}.from_pretrained() got an unexpected keyword {min(kwargs.keys() - wanted)!r}")
    folder = Path(name) if os.path.isdir(name) else _download(name, hub, weights)
    index = read_index(folder, name)
    others = components(index).keys() - wanted
    if others:
        raise ValueError(
            f"{name} has {', '.join(sorted(others))} beside a network and a scheduler: open it with DiffusionPipeline, "
            "and give that pipeline a scheduler of this package"
        )
    made = {key: value for key, value in kwargs.items() if value is not None}
    if "scheduler" not in made:
        made["scheduler"] = open_scheduler(folder, index, name)
    if "unet" not in made:
        made["unet"] = open_unet(folder, index, name, weights)
    missing = components(index).keys() - made.keys()
    if missing:
        raise ValueError(f"{name} has {', '.join(sorted(missing))}: a {cls.__name__} is to open that, and pass it on")
    return {key: value for key, value in index.items() if key in wanted and key not in components(index)} | made


def plain_index(index: dict[str, Any]) -> dict[str, Any]:
    """What `model_index.json` holds, naming no code files but the modules of this process."""
    plain = index | {"_class_name": _class_name(index.get("_class_name"))}
    if scheduler_is_ours(index):
        plain["scheduler"] = [GeneralizedDDIMScheduler.__module__, index["scheduler"][1]]
    return plain


def _download(name: str, hub: dict[str, Any], weights: dict[str, Any]) -> Path:
    """The folder of a snapshot of a repo, with the weights that are asked for."""
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise OSError(f"there is no folder {name}")
    check_repo_id(name)
    wanted = {key: weights[key] for key in ("variant", "use_safetensors") if key in weights}
    with told(name, hub.get("token"), hub.get("revision")):
        return Path(_Download.download(name, **hub, **wanted))


def read_index(folder: Path, name: str) -> dict[str, Any]:
    """What `model_index.json` holds, where it is of a network and a scheduler."""
    if not (folder / INDEX).is_file():
        raise OSError(f"{name} is no pipeline: it has no {INDEX}")
    index = read_object(folder / INDEX)
    for key, value in index.items():
        named = key == "_class_name" or not key.startswith("_")
        if named and isinstance(value, list) and not (len(value) == 2 and {*map(type, value)} <= {str, type(None)}):
            raise ValueError(f"{name}: {INDEX} says {key}={value!r}, which is not a module and a class")
    missing = [key for key in ("unet", "scheduler") if key not in components(index)]
    if missing:
        raise ValueError(f"{name}: {INDEX} names no {' and no '.join(missing)}, so it is no model of this kind")
    return index


def is_ours(index: dict[str, Any]) -> bool:
    """Whether a `model_index.json` is of a pipeline of this package."""
    return _class_name(index.get("_class_name")) == PIPELINE


def scheduler_is_ours(index: dict[str, Any]) -> bool:
    """Whether the scheduler that a `model_index.json` names is of this package."""
    module, name = components(index).get("scheduler", ("", ""))
    return name in SCHEDULERS and OURS.fullmatch(module) is not None


def components(index: dict[str, Any]) -> dict[str, list[str]]:
    """Module and class of each component that a `model_index.json` names."""
    named = {key: value for key, value in index.items() if isinstance(value, list) and not key.startswith("_")}
    return {key: value for key, value in named.items() if None not in value}


def _class_name(value: Any) -> Any:
    return value[1] if isinstance(value, list | tuple) else value


def _part(folder: Path, component: str) -> Path:
    """Where the files of a component are: old repos keep all in one folder."""
    return folder / component if (folder / component).is_dir() else folder


def _class(name: str, component: str, module: str, class_name: str, base: type) -> Any:
    """A class that this process knows: of diffusers, or of a module that was imported before."""
    found = getattr(diffusers if module == "diffusers" else sys.modules.get(module), class_name, None)
    if not (isinstance(found, type) and issubclass(found, base) and hasattr(found, "from_pretrained")):
        raise ValueError(
            f"{name}: {INDEX} names {class_name} of {module} for the {component}, and this process knows no such "
            f"{base.__name__}. Import that module before, or pass {component}=…. If it is code of the repo, read it "
            "and use DiffusionPipeline.from_pretrained with trust_remote_code=True and a pinned revision"
        )
    return found


def open_scheduler(folder: Path, index: dict[str, Any], name: str) -> SchedulerMixin:
    """The scheduler of a folder. That of a stock pipeline becomes one of ours, and what that changes is logged."""
    file = _part(folder, "scheduler") / "scheduler_config.json"
    if not file.is_file():
        raise OSError(f"{name} has no scheduler_config.json")
    config = read_object(file)
    if scheduler_is_ours(index):
        known, adopts = SCHEDULERS[index["scheduler"][1]], False
    else:
        known, adopts = _class(name, "scheduler", *index["scheduler"], SchedulerMixin), not is_ours(index)
    try:
        if not adopts:
            return known.from_config(config)
        scheduler, story = adopt(config, known)
    except (ValueError, TypeError, AttributeError, ArithmeticError, MemoryError, LookupError) as error:
        raise ValueError(f"{name}: scheduler_config.json makes no scheduler: {_line(error)}") from error
    logger.warning("%s is a %s. %s", name, _class_name(index.get("_class_name")), story)
    return scheduler


def adopt(config: dict[str, Any], known: type) -> tuple[GeneralizedDDIMScheduler, str]:
    """A scheduler of ours from the config of a stock one; and in words what was taken over, and what is another now."""
    if known.__name__ not in GeneralizedDDIMScheduler._compatibles:
        raise ValueError(f"a {known.__name__} is of another family: pass scheduler=… that fits the network")
    ours, theirs = _defaults(GeneralizedDDIMScheduler), _defaults(known)
    taken = {key: value for key, value in config.items() if key in ours or key.startswith("_")}
    scheduler = GeneralizedDDIMScheduler.from_config(taken)
    before = theirs | {key: value for key, value in config.items() if key in theirs}
    after = {key: scheduler.config[key] for key in ours if key in before}
    changed = {key: value for key, value in after.items() if value != before[key]}
    said = {
        "taken over": [f"{key}={value!r}" for key, value in after.items() if key in config and key not in changed],
        "another now": [f"{key}={value!r} (was {before[key]!r})" for key, value in changed.items()],
        "left out": [key for key in config if key not in taken],
    }
    lines = [f"Its {known.__name__} became a GeneralizedDDIMScheduler with η = {scheduler.config.eta:g}."]
    lines += [f"  {what}: {', '.join(settings)}" for what, settings in said.items() if settings]
    if scheduler.config.clip_sample:
        lines.append("  x̂0 is clipped in each step, as its config says; the paper does not clip (clip_sample=False)")
    return scheduler, "\n".join(lines)


def _defaults(known: type) -> dict[str, Any]:
    """The settings of a scheduler and their defaults."""
    parameters = inspect.signature(known.__init__).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty}


def open_unet(folder: Path, index: dict[str, Any], name: str, settings: dict[str, Any]) -> ModelMixin:
    """The network of a folder. Raises OSError or ValueError unless its weights are whole, all there, and no others."""
    known = _class(name, "unet", *index["unet"], ModelMixin)
    if known.__module__.startswith("diffusers.") and not issubclass(known, UNet2DModel):
        raise ValueError(f"{name} has a {known.__name__}; this pipeline is for a UNet2DModel")
    settings = {key: value for key, value in settings.items() if value is not None}
    dtype = settings.pop("dtype", None) or settings.pop("torch_dtype", None)
    settings.pop("torch_dtype", None)
    if isinstance(dtype, dict):
        dtype = dtype.get("unet", dtype.get("default", torch.float32))
    if dtype is not None:
        settings[DTYPE] = dtype
    part, variant = _part(folder, "unet"), settings.get("variant")
    found = sorted(path.name for path in part.glob("*") if variant_of(path.name) is not None)
    fitting = [file for file in found if variant_of(file) == (variant or "")]
    if known.__module__.startswith("diffusers.") and not fitting:
        wanted = "weights of a network" if variant is None else f"weights of the variant {variant!r}"
        raise OSError(f"{name} has no {wanted}; it has {', '.join(found) or 'none at all'}")
    if "use_safetensors" not in settings:  # or diffusers says that it looks for others
        settings["use_safetensors"] = any(file.endswith(".safetensors") for file in fitting)
    try:
        unet, report = known.from_pretrained(part, output_loading_info=True, **settings)
    except Exception as error:  # settings and files of any kind reach the class, which fails in as many ways
        said = _line(error).split(" If you want")[0]
        if "shape" in said or "size mismatch" in said:
            raise ValueError(f"the weights of {name} do not fit its config: {said}") from error
        again = "" if os.path.isdir(name) else ". Where the download is damaged, force_download=True mends it"
        raise OSError(f"cannot load the network of {name} ({', '.join(fitting)}): {said}{again}") from error
    kinds = ("missing", "unexpected", "mismatched")
    wrong = {kind: sorted(map(str, report[f"{kind}_keys"])) for kind in kinds if report[f"{kind}_keys"]}
    if wrong:
        said = "; ".join(f"{len(keys)} {kind}, such as {keys[0]}" for kind, keys in wrong.items())
        raise ValueError(f"the weights of {name} do not fit its config: {said}")
    return unet


# ---- failures of the Hub's client ----------------------------------------------------------------------------------


def check_repo_id(name: str) -> None:
    """Raise OSError for what is no id of a repo."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise OSError(f"{name!r} is no id of a repo: it must be like user/model") from error


@contextmanager
def told(name: str, token: Any = None, revision: str | None = None, to: str = "read") -> Iterator[None]:
    """Failures of the Hub's client in here become an OSError that says what to do, and never the token.

    `to` "read" or "write" is what is being tried with the repo.
    """
    used = token if isinstance(token, str) else None if token is False else get_token()
    if used is not None and not (used and used.isascii() and used.isprintable() and " " not in used):
        raise OSError("the token is empty, or has characters that no token has: copy it again")  # the client shows it
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and not isinstance(error, OSError | HFValidationError):
            raise
        raise OSError(_meaning(list(_causes(error)), name, revision, to)) from error


def _meaning(chain: list[BaseException], name: str, revision: str | None, to: str) -> str:
    where = constants.ENDPOINT

    def has(*kinds: type) -> bool:
        return any(isinstance(each, kinds) for each in chain)

    answers = [each.response for each in chain if isinstance(each, HfHubHTTPError)]
    status = next((answer.status_code for answer in answers if answer is not None), None)
    if has(RevisionNotFoundError):
        return f"{name} has no revision {revision!r} on {where}: give a branch, a tag or a commit that is there"
    if has(GatedRepoError):
        return f"{name} is gated: accept its conditions at {where}/{name}, and log in"
    if has(LocalTokenNotFoundError) or (status == 401 and not has(RepositoryNotFoundError)):
        return f"{where} needs another token for {name}: log in with `hf auth login`, set HF_TOKEN, or pass a token"
    if has(RepositoryNotFoundError):
        return f"there is no {name} on {where} for all to {to}: check the name, or log in with a token that may {to} it"
    if status == 403:
        return f"the token may not write to {name} on {where}: use one that may"
    if status == 412:
        return f"somebody else pushed to {name} at the same time: push again"
    if status is not None and status != 404:
        return f"{where} answered {name} with status {status}: try again later"
    if has(LocalEntryNotFoundError, ConnectionError) or any("Connect" in type(each).__name__ for each in chain):
        return f"{where} cannot be reached, and {name} is not whole in the cache"
    if has(EntryNotFoundError):
        return f"{name} is no pipeline: it has no {INDEX}"
    return f"{name}: {_line(chain[0])}"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


# ======== push ========

"""Pushing a saved pipeline to the Hub: one commit with weights, configs, code, card, pictures and results."""

































README, RESULTS, TRAINING, CONVERSION = "README.md", "results.json", "training.json", "conversion.json"
GRID, LOSS = "samples.png", "loss.png"
CONFIG = "unet/config.json"
CONFIGS = (CONFIG, "scheduler/scheduler_config.json")
RECORDS = (RESULTS, TRAINING, CONVERSION)
PICTURE = re.compile(r"[\w-]+\.png")
DRAWN, DRAWN_STEPS = 16, 20
"""Pictures of the grid that is drawn where there is none, and S for it."""

SAID = re.compile("|".join([*map(re.escape, (*RECORDS, GRID, LOSS)), r"\.eval_results/[^/]+\.yaml"]))
"""Names of what a push says of a model, beside its card."""

Content = Path | bytes


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    license: str | None = None,
    records: str | Path | None = None,
    samples: int | None = None,
    sampler: Callable[[], Any] | None = None,
) -> CommitInfo:
    """Push what `save_pretrained` or the training script wrote, in one commit; nothing in the folder is changed.

    The weights of all variants there go along, and from the folder `records` (the same, if not given) `results.json`,
    `training.json`, `conversion.json`, `samples.png` (or the last of `previews/`), `loss.png`, and the pictures that
    `results.json` names under "pictures". A README.md that somebody wrote in the folder, else one in the repo, is the
    card; else one is written from the records (see `card`). Where a model of this package with other weights is in the
    repo, what was said of it goes.

    Args:
        repo_id: id of the repo; it is made where it does not exist.
        private: whether a repo that is made is private. Raises where True and the repo exists and is public.
        token: a token that may write; by default the one that is logged in.
        revision: the branch, made where it does not exist; main by default.
        create_pr: open a pull request instead.
        license: the Hub's id of the licence of the weights.
        samples: number of pictures to draw for the card; by default 16 where `records` has none, and there is a
            `sampler`, which gives the pipeline to draw them with.

    Returns:
        the commit; where nothing has changed, the last one.

    Raises:
        ValueError: before anything is sent, for a folder, record or id that is not right.
        OSError: where the Hub cannot be reached or refuses. The branch is then as it was; a new repo may be left empty.
    """
    check_repo_id(repo_id)
    check_license(license)
    if samples is not None and (not is_integer(samples) or samples < 0):
        raise ValueError(f"samples must be a non-negative integer, not {samples!r}")
    folder, records = Path(folder), Path(records or folder)
    if not records.is_dir():
        raise ValueError(f"there is no folder {records}")
    branch = None if revision is None or revision.startswith("refs/") else revision
    model = Model(folder, records)
    api = HfApi(token=token)
    repo_id = open_repo(api, repo_id, private)
    with told(repo_id, token, revision, to="write"):
        if branch is not None and not create_pr:
            api.create_branch(repo_id, branch=branch, exist_ok=True)
        info = api.model_info(repo_id, revision=revision, files_metadata=True)
        there = {each.rfilename: each for each in info.siblings or ()}
        texts = {}
        for name in (README, INDEX, RESULTS, CONFIG):
            if name in there:
                path = api.hf_hub_download(repo_id, name, revision=info.sha)
                texts[name] = Path(path).read_text(encoding="utf-8", errors="replace")

    files = dict(model.files)
    same = _same_model(there, files, _object(texts.get(CONFIG, "")))
    card_there = texts.get(README, "")
    ours = is_written_here(card_there)
    if model.own_card is not None:
        files[README] = model.own_card
    elif not card_there or (ours and (model.said or not same)):  # not somebody's, nor one that says more
        drawn = None
        if sampler is not None and samples != 0 and (samples or GRID not in model.pictures):
            drawn = draw(sampler(), samples or DRAWN, classes=model.classes)
            files[GRID] = _png(drawn[0])
        license = license or model.license or (license_of(card_there) if ours and same else None)
        files[README] = model.card(repo_id, license, drawn, branch).encode()
    stale = {name for name in there if CODE.fullmatch(name) or (not same and variant_of(name) is not None)}
    if is_ours(_object(texts.get(INDEX, ""))) and (model.said or not same):
        listed = _object(texts.get(RESULTS, "")).get("pictures")
        listed = listed if isinstance(listed, list | dict) else []
        stale |= {name for name in there if SAID.fullmatch(name) or (name in listed and PICTURE.fullmatch(name))}
    operations: list[Any] = [CommitOperationAdd(name, content) for name, content in files.items()]
    operations += [CommitOperationDelete(name) for name in sorted(stale & there.keys() - files.keys())]
    with told(repo_id, token, revision, to="write"):
        return api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message or "Upload GeneralizedDDIMPipeline",
            revision=revision,
            create_pr=create_pr,
            parent_commit=info.sha,
        )


def open_repo(api: HfApi, repo_id: str, private: bool | None) -> str:
    """The whole id of a repo that the token may write to, made where it does not exist.

    Raises OSError where the Hub cannot be reached or refuses, ValueError where `private` and the repo is public.
    """
    check_repo_id(repo_id)
    with told(repo_id, api.token, to="write"):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and not api.model_info(repo_id).private:
            raise ValueError(f"{repo_id} is public, and private=True changes no repo that exists: nothing was pushed")
        return repo_id


def _same_model(there: dict[str, Any], files: dict[str, Content], config: dict[str, Any]) -> bool:
    """Whether the repo has this network: these weights, or none of their variants and the same config."""
    weights = {name: content for name, content in files.items() if variant_of(name) is not None}
    pushed = {variant_of(name) for name in weights}
    if any(variant_of(name) in pushed for name in there):
        return all(name in there and _digest(content, there[name]) for name, content in weights.items())
    configs = (json.loads(files[CONFIG]), config)
    first, second = ({key: value for key, value in each.items() if not key.startswith("_")} for each in configs)
    return first == second


def _object(text: str) -> dict[str, Any]:
    """A JSON object of a repo; an empty one where the text is none."""
    try:
        content = json.loads(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _digest(content: Content, there: Any) -> bool:
    """Whether a file in the repo has this content, by the digest that the Hub keeps of it."""
    data = content.read_bytes() if isinstance(content, Path) else content
    if there.lfs is not None:
        return hashlib.sha256(data).hexdigest() == there.lfs["sha256"]
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() == there.blob_id


# ---- what is pushed ------------------------------------------------------------------------------------------------


class Model:
    """What is pushed of a folder, by its name in the repo (`files`), and what is known of the model.

    Raises ValueError or OSError for a folder that would not load again, or records that are not in order.
    """

    def __init__(self, folder: Path, records: Path):
        index = _index(folder)
        self.records = records
        self.files = _code(folder, index) | _state(folder)
        for name in CONFIGS:
            content = read_object(folder / name)
            self.files[name] = _json(content, folder / name, finite=False)  # some schedulers have infinite settings
        found = {name: read_object(records / name) for name in RECORDS if (records / name).is_file()}
        self.results = public(entries_of(found[RESULTS], records / RESULTS)) if RESULTS in found else []
        self.training, self.conversion = (public(found.get(name, {})) for name in (TRAINING, CONVERSION))
        listed = listed_pictures(found.get(RESULTS, {}).get("pictures", {}), records / RESULTS)
        self.pictures = _pictures(records, list(listed))
        self.captions = {name: public(told) for name, told in listed.items() if told and name in self.pictures}
        measured = found.get(RESULTS, {}).get("model")
        measured = measured.get("sha256") if isinstance(measured, dict) else None  # of the weights, where it is noted

        self.variants, fits = variants(folder), measured is None
        for variant in self.variants:
            self.unet = open_unet(folder, index, str(folder), {"variant": variant})
            fits = fits or weights_digest(self.unet) == measured
        if not fits:
            raise ValueError(f"{records / RESULTS} was measured on other weights than those in {folder}: measure these")
        self.scheduler = open_scheduler(folder, index, str(folder))
        self.files |= {name: _json(content, records / name) for name, content in found.items()} | self.pictures
        self.files |= {name: text.encode() for name, text in eval_results(self.results).items()}
        self.said = bool(self.results or self.training or self.conversion or self.pictures)
        own = folder / README
        written = own.is_file() and not is_written_here(own.read_text(encoding="utf-8", errors="replace"))
        self.own_card = own if written else None
        self.license = license_of(own.read_text(encoding="utf-8")) if own.is_file() and not written else None
        self.card("user/model", None, None, None)  # finds records that are not in order before anything is sent

    @property
    def classes(self) -> int | None:
        """How many classes the training had; the network may have a label more, for none of them."""
        classes = self.training.get("classes")
        return len(classes) if isinstance(classes, list) and classes else None

    def card(
        self, repo_id: str, license: str | None, drawn: tuple[Image.Image, str] | None, revision: str | None
    ) -> str:
        """The card, with a grid that was drawn for it, or the one in the records."""
        caption = ""
        try:
            if drawn is not None:
                caption = drawn[1]
            elif GRID in self.pictures:
                caption = _caption(self.records, self.training)
            return card(
                repo_id,
                dict(self.unet.config),
                dict(self.scheduler.config) | {"_class_name": type(self.scheduler).__name__},
                self.unet.num_parameters(),
                self.results,
                self.training,
                self.conversion,
                GRID if drawn is not None or GRID in self.pictures else None,
                caption,
                self.captions,
                license,
                self.variants[0],
                revision,
            )
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"the records in {self.records} are not as the scripts write them: {error!r}") from error


def _index(folder: Path) -> dict[str, Any]:
    """What `model_index.json` holds, where all readers can open what it names."""
    index = read_index(folder, str(folder))
    if not is_ours(index):
        raise ValueError(
            f"{folder} is a {index.get('_class_name')}: open it with GeneralizedDDIMPipeline.from_pretrained, push that"
        )
    for key, (module, name) in components(index).items():
        if key not in ("unet", "scheduler") or not (
            module == "diffusers" or (key == "scheduler" and scheduler_is_ours(index))
        ):
            raise ValueError(f"{folder}: {INDEX} names {name} of {module} for {key}, which others do not have")
    return index


def variants(folder: str | Path) -> list[str | None]:
    """The variants of the network's weights in a folder, the ordinary ones, None, first."""
    found = sorted({variant_of(name) or "" for name in _state(Path(folder)) if not name.endswith(".json")})
    if not found:
        raise ValueError(f"{folder} has no weights as safetensors: open it, and save_pretrained into a new folder")
    return [variant or None for variant in found]


def same_weights(folder: str | Path, other: str | Path, variant: str | None) -> bool:
    """Whether another folder holds the network's weights of this one, in the same files."""
    names = [name for name in _state(Path(folder)) if variant_of(name) == (variant or "")]
    if not all((Path(other) / name).is_file() for name in names):
        return False
    return all((Path(other) / name).read_bytes() == (Path(folder) / name).read_bytes() for name in names)


def _state(folder: Path) -> dict[str, Content]:
    """The network's weights as safetensors, and the indexes of those in several files."""
    names = {f"unet/{path.name}": path for path in sorted((folder / "unet").glob("diffusion_pytorch_model*"))}
    return {name: path for name, path in names.items() if variant_of(name) is not None and ".bin" not in name}


def _code(folder: Path, index: dict[str, Any]) -> dict[str, Content]:
    """`model_index.json` and the code files it names: those of the folder, or where some are missing, ours.

    Raises ValueError for a file whose content is not the one its name was made from.
    """
    made, ours = with_code(index)
    files: dict[str, Content] = {name: text.encode() for name, text in ours.items()}
    if isinstance(index["_class_name"], list):
        stem, new = (each["_class_name"][0].removesuffix("_pipeline") for each in (index, made))
        there = {name.replace(new, stem): folder / name.replace(new, stem) for name in ours}
        if all(path.is_file() for path in there.values()):
            for path in there.values():
                digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
                if path.stem == stem and not stem.endswith(f"_{digest}"):
                    raise ValueError(f"{path} was changed since it was saved: save the pipeline again")
            made, files = index, dict(there)
    return files | {INDEX: (json.dumps(public(made), indent=2) + "\n").encode()}


def listed_pictures(listed: Any, file: Path) -> dict[str, str]:
    """The pictures that `results.json` names, a list or captions by name, with their captions. Raises ValueError."""
    named = {str(name): "" for name in listed} if isinstance(listed, list) else listed
    if not isinstance(named, dict) or not all(
        isinstance(told, str) and PICTURE.fullmatch(name) for name, told in named.items()
    ):
        raise ValueError(
            f'{file} must list names such as figure4.png under "pictures", or captions by name: {listed!r}'
        )
    return named


def _pictures(records: Path, listed: list[str]) -> dict[str, Content]:
    """The pictures in a folder that belong to the model; of previews the last, where there are no samples."""
    names = [GRID, LOSS, *listed]
    pictures: dict[str, Content] = {name: records / name for name in names if (records / name).is_file()}
    previews = sorted(records.glob("previews/*.png"))
    return pictures if GRID in pictures or not previews else pictures | {GRID: previews[-1]}


def _caption(records: Path, training: dict[str, Any]) -> str:
    """What is known of the samples: from the file that the command line writes beside them, or from the training."""
    if (records / GRID).is_file():
        settings = {}
        if (records / "sample.json").is_file():
            settings = read_object(records / "sample.json").get("settings", {})
        known = {"S": settings.get("steps"), "η": settings.get("eta"), "the first seed": settings.get("seed")}
        return (
            ", ".join(["Samples", *(f"{name} = {value}" for name, value in known.items() if value is not None)]) + "."
        )
    return f"Samples at S = {training.get('config', {}).get('preview_steps')}, η = 0."


def draw(pipe: Any, number: int, steps: int = DRAWN_STEPS, classes: int | None = None) -> tuple[Image.Image, str]:
    """A grid of samples for the card, in rows of 8, and what is said below it; image i from seed i.

    Of a conditional network image i is of class i modulo `classes`, by default as many as it has labels.
    """
    kept = pipe.scheduler
    if isinstance(kept, InverseDDIMScheduler):
        pipe.scheduler = sampler_class(kept).from_config(kept.config)
    steps = min(steps, pipe.scheduler.config.num_train_timesteps)
    classes = classes or pipe.unet.config.num_class_embeds
    labels = [i % classes for i in range(number)] if classes else None
    generators = [Generator().manual_seed(i) for i in range(number)]
    try:
        images = pipe(number, steps, generator=generators, class_labels=labels, output_type="np").images
        eta = getattr(pipe.scheduler.config, "eta", None)
        said = f"{type(pipe.scheduler).__name__}, S = {steps}" + ("" if eta is None else f", η = {eta:g}")
    finally:
        pipe.scheduler = kept
    return grid([images[i : i + 8] for i in range(0, number, 8)]), f"{said}, seeds 0 to {number - 1}."


def _json(content: dict[str, Any], path: Path, finite: bool = True) -> bytes:
    """A JSON file without the places of this machine. Raises ValueError for numbers that JSON does not have."""
    content = {key: value for key, value in content.items() if key != "_name_or_path"}
    try:
        return (json.dumps(public(content), indent=2, allow_nan=not finite) + "\n").encode()
    except ValueError as error:
        raise ValueError(f"{path} holds a number that is not finite, which JSON does not have") from error


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


# ======== pipeline ========

"""The pipeline: a U-Net and a scheduler, from noise to images, and from images to latents and back."""



































OUTPUT_TYPES = ("pil", "np", "pt", "latent")
CALLBACK_TENSORS = ("latents", "sample", "pred_original_sample", "pred_epsilon")

TOLERANCE = 1e-5
"""Residual of a move, in units of the network's images, at which its refinement ends."""

StepEndCallback = Callable[["GeneralizedDDIMPipeline", int, Tensor, dict[str, Tensor | None]], dict[str, Any] | None]


class Condition(NamedTuple):
    """Class labels (B,), the labels of no class where guidance is on, and its scale."""

    labels: Tensor | None
    null_labels: Tensor | None
    scale: float

    def rows(self, rows: Tensor | slice) -> "Condition":
        labels, null_labels = (None if each is None else each[rows] for each in self[:2])
        return Condition(labels, null_labels, self.scale)


class GeneralizedDDIMPipeline(DiffusionPipeline):
    """Unconditional and class-conditional images with the generalized process, or any scheduler of diffusers.

    The call draws images from noise. Where the process is deterministic (η = 0), x_T is a latent code of the image:
    `encode`, `decode`, `reconstruct`, `interpolate` and `interpolate_grid` work with it, with the scheduler of this
    package.

    Args:
        unet: a `UNet2DModel`, with `num_class_embeds` where it is class-conditional. Its `config.sample_size` (an
            integer, or height and width) and `in_channels` give the shape of an image.
        scheduler: a `GeneralizedDDIMScheduler`, or any scheduler of diffusers for ε, x0 or v prediction.
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: UNet2DModel, scheduler: SchedulerMixin):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(H, W) of the network's images; None where its config does not say."""
        size = self.unet.config.sample_size
        return (size, size) if isinstance(size, int) else size and tuple(size)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | Tensor | None = None,
        eta: float | None = None,
        generator: Randomness = None,
        latents: Tensor | None = None,
        class_labels: int | Sequence[int] | Tensor | None = None,
        guidance_scale: float = 1.0,
        null_class_label: int | None = None,
        use_clipped_model_output: bool | None = None,
        callback_on_step_end: StepEndCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = CALLBACK_TENSORS,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Generate images.

        Args:
            batch_size: number of images B; 1 by default, or as many as `latents`.
            num_inference_steps: S, the number of steps; 50 by default, or T where that is less.
            timesteps: τ itself: network times, distinct and descending; instead of `num_inference_steps`.
            eta: η of Eq. 16; None is the scheduler's. Schedulers whose `step` has no η refuse a non-zero one.
            generator: one for the batch, or a list with one for each image. With a list an image depends on its own
                generator only, at any batch size and position.
            latents: x_T, (B, C, H, W), instead of fresh noise.
            class_labels: for a class-conditional network: one label for all, or one for each image.
            guidance_scale: w of classifier-free guidance, ε̂ = ε̂(null) + w·(ε̂(class) − ε̂(null)) (Ho & Salimans 2022);
                1 is none, and costs one evaluation a step instead of two.
            null_class_label: the label that stands for no class; the network's last by default.
            use_clipped_model_output: recompute ε̂ from a clipped x̂0; None is the scheduler's setting.
            callback_on_step_end: called as `callback(pipe, i, timestep, tensors)` after each step; what it returns
                under "latents" takes the place of x_s.
            callback_on_step_end_tensor_inputs: which of "latents" (x_s), "sample" (x_t), "pred_original_sample" (x̂0)
                and "pred_epsilon" (ε̂) it is given; the last two are None where the scheduler does not tell them.
            output_type: "pil", "np" (B, H, W, C) in [0, 1], "pt" (B, C, H, W) in [0, 1], or "latent" (x_0 as it is).
            return_dict: False returns a tuple.

        Returns:
            `ImagePipelineOutput` with `images`.

        Raises:
            ValueError: for any argument that does not fit, before the network is called.
        """
        _check_output_type(output_type)
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise ValueError(f"callback_on_step_end must be a function, not {callback_on_step_end!r}")
        unknown = set(callback_on_step_end_tensor_inputs) - set(CALLBACK_TENSORS)
        if unknown:
            raise ValueError(f"unknown callback tensors {sorted(unknown)}: use some of {', '.join(CALLBACK_TENSORS)}")
        shape = self._shape(batch_size, latents)
        check_generators(generator, shape[0])
        device, network_dtype = self._execution_device, self.unet.dtype  # slow to ask for: once
        condition = self._condition(class_labels, guidance_scale, null_class_label, shape[0], device)
        self._check_channels()
        self._set_timesteps(self.scheduler, num_inference_steps, timesteps, device, eta)
        step_kwargs = self._step_kwargs(eta, generator, use_clipped_model_output)

        dtype = torch.promote_types(network_dtype, torch.float32)  # of the state
        if latents is None:
            x = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        else:
            x = latents.to(device=device, dtype=dtype)
        x = x * self.scheduler.init_noise_sigma

        x = self._descend(
            x,
            self.scheduler.timesteps,
            network_dtype,
            condition,
            step_kwargs,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )
        images = self._images(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    # ---- sharing -----------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any):
        """A pipeline from a folder or from the Hub. No code of a repo is run, and no flag is needed.

        Opens what this class or the training script saved, and any unconditional pipeline of diffusers whose network is
        a `UNet2DModel` (`DDPMPipeline`, `DDIMPipeline`, `PNDMPipeline`): the scheduler of such a one becomes a
        `GeneralizedDDIMScheduler`, and what that takes over and changes is logged.

        Args:
            pretrained_model_name_or_path: a folder, or the id of a repo.
            kwargs: those of `DiffusionPipeline.from_pretrained`: `revision`, `token`, `cache_dir`, `local_files_only`,
                `variant`, `torch_dtype`, `device_map` (of the network), …; and `unet` or `scheduler` to take instead of
                those in the repo.

        Raises:
            OSError: for a repo, revision or file that is not there, not allowed, or damaged.
            ValueError: for a model of another kind, classes that this process does not know, weights that do not fit.
        """
        pipe = cls(**parts(cls, pretrained_model_name_or_path, kwargs))
        pipe.register_to_config(_name_or_path=os.fspath(pretrained_model_name_or_path))
        return pipe

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any):
        """What `model_index.json` holds, naming the classes of this process where the file names code of its repo."""
        loaded = super().load_config(*args, **kwargs)
        return (plain_index(loaded[0]), *loaded[1:]) if isinstance(loaded, tuple) else plain_index(loaded)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save into a folder that loads with this package, with diffusers alone, and into the classes of diffusers.

        Args:
            save_directory: the folder; other files in it stay.
            safe_serialization: safetensors, not pickles.
            variant: name of the weights beside the ordinary ones, such as "fp16".
            max_shard_size: of a file of weights.
            push_to_hub: also push it; `kwargs` are then those of the method `push_to_hub`, with `repo_id` (by default
                the folder's name).
        """
        if kwargs and not push_to_hub:
            raise TypeError(f"save_pretrained() got an unexpected keyword {min(kwargs)!r}")
        with replaced(save_directory, variant):
            super().save_pretrained(save_directory, safe_serialization, variant=variant, max_shard_size=max_shard_size)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), variant=variant, **kwargs)

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write `model_index.json` and the code files it names."""
        if type(self) is GeneralizedDDIMPipeline:
            write_index(self, save_directory)
        else:
            super().save_config(save_directory)  # a class of somebody's own: its code is not known here

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        revision: str | None = None,
        license: str | None = None,
        records: str | os.PathLike | None = None,
        samples: int | None = None,
    ) -> CommitInfo:
        """Push to the Hub in one commit: weights, configs, code files, card, pictures and results.

        Nothing local is changed. Where nothing has changed since the last push there is no commit. A card on the Hub
        that somebody wrote stays.

        Args:
            repo_id: id of the repo, such as "user/model"; it is made where it does not exist.
            commit_message: the commit's title.
            private: whether a repo that is made is private. Refused where True and the repo is public.
            token: a token that may write; by default the one of `hf auth login`, or HF_TOKEN.
            create_pr: open a pull request instead of writing to the branch.
            safe_serialization: must be True: pickles are not pushed.
            variant: name of the weights, such as "fp16" for a network in half precision.
            revision: the branch; main by default, made where it does not exist.
            license: the Hub's id of the licence of the weights, for the card.
            records: folder with `results.json`, `training.json` and pictures for the card; by default the one that this
                pipeline was loaded from, where the weights are still those.
            samples: number of pictures to draw for the card, at 20 steps; by default 16 where there is no picture yet.

        Returns:
            the commit, which reads as its URL.

        Raises:
            ValueError: before anything is sent, for settings and records that are not right.
            OSError: where the Hub cannot be reached, or refuses.
        """
        if not safe_serialization:
            raise ValueError("pickles are not pushed: leave out safe_serialization=False")
        if type(self) is not GeneralizedDDIMPipeline:
            raise ValueError(
                f"a {type(self).__name__} has code of its own, which cannot be pushed: push a GeneralizedDDIMPipeline"
            )
        check_repo_id(repo_id)
        source = self.name_or_path or ""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, variant=variant)
            if records is None and os.path.isdir(source):
                if same_weights(folder, source, variant):
                    records = source
                else:
                    logger.warning("the records in %s are left out: its weights are others, or in other files", source)
            return push_folder(
                folder,
                repo_id,
                commit_message=commit_message,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
                license=license,
                records=records,
                samples=samples,
                sampler=None if self.image_size is None else lambda: self,
            )

    # ---- latents -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(
        self,
        images: pictures.Images,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | Tensor | None = None,
        strength: float = 1.0,
        class_labels: int | Sequence[int] | Tensor | None = None,
        guidance_scale: float = 1.0,
        null_class_label: int | None = None,
        refinement_steps: int = 0,
        tolerance: float = TOLERANCE,
        batch_size: int | None = None,
        return_report: bool = False,
    ) -> Tensor | tuple[Tensor, InversionReport]:
        """The latents x_T that images come from in the deterministic process (Sections 4.3 and 5.4).

        The naive inverse (`refinement_steps=0`) takes each move backwards with the network evaluated at its lower end:
        decoding returns to the image only as S grows (Table 2). With `refinement_steps` each move is solved for its
        upper end, so that decoding at the same S does: see `ddim_plugin.inversion`. Each image is encoded on its own;
        what is left of its neighbours is the rounding of the network at another batch size, which a move that did not
        converge can amplify.

        With a `MultistepDDIMScheduler` the naive inverse is that of its orders (`InverseMultistepDDIMScheduler`). Its
        moves depend on each other, and are refined together: the image is moved by what decoding misses it by, encoded
        again, and so on. The report then has one row, for the whole path.

        Args:
            images: PIL images, arrays (B, H, W, C), tensors (B, C, H, W), one of them or a list; bytes, or numbers in
                [0, 1], of the network's size and channels.
            num_inference_steps, timesteps: τ, as in the call; use the same to decode.
            strength: the part of the moves to make, counted from the image: ⌊strength·S⌋ of S. Less than 1 gives x_t at
                an intermediate t, for `decode` with the same `strength`.
            class_labels, guidance_scale, null_class_label: as in the call.
            refinement_steps: network evaluations to refine each move with, at most; the first move takes one more, for
                its guess. A multistep path is refined with two for each move at a time, and the first two only tell
                what the naive inverse misses.
            tolerance: residual, as a root mean square over the pixels of (x_s − f(x_t))/√ᾱ_s in units of the network's
                images (−1..1), at which a move is solved.
            batch_size: images encoded together; all by default.
            return_report: also return an `InversionReport`.

        Returns:
            Latents (B, C, H, W), in float32 at least; with `return_report` a tuple of them and the report.

        Raises:
            ValueError: before the network is called, for images, labels, times or settings that do not fit; for a
                scheduler that adds noise (η > 0) or constrains x̂0, whose moves have no inverse. Afterwards, for latents
                that are not finite.
        """
        if not is_integer(refinement_steps) or refinement_steps < 0:
            raise ValueError(f"refinement_steps must be a non-negative integer, not {refinement_steps!r}")
        if not isinstance(tolerance, Real) or not 0 <= tolerance < math.inf:
            raise ValueError(f"tolerance must be a non-negative number, not {tolerance!r}")
        self._check_deterministic(invertible=True)
        batches = _batches(batch_size)
        x = pictures.read(images, self.unet.config.in_channels, self.image_size)
        device, network_dtype = self._execution_device, self.unet.dtype
        condition = self._condition(class_labels, guidance_scale, null_class_label, len(x), device)
        self._check_channels()
        self._set_timesteps(self.scheduler, num_inference_steps, timesteps, device)
        multistep = isinstance(self.scheduler, MultistepDDIMScheduler)
        upwards = InverseMultistepDDIMScheduler if multistep else InverseDDIMScheduler
        inverse = upwards.from_config(self.scheduler.config)
        self._set_timesteps(inverse, num_inference_steps, timesteps, device)
        moves = self._moves(strength)
        ascend = self._ascend_together if multistep else self._ascend

        x = x.to(device=device, dtype=torch.promote_types(network_dtype, torch.float32))
        parts = [
            ascend(x[rows], inverse, moves, network_dtype, condition.rows(rows), refinement_steps, tolerance)
            for rows in batches(len(x))
        ]
        self.maybe_free_model_hooks()
        z = torch.cat([latents for latents, _ in parts])
        if not bool(torch.isfinite(z).all()):
            raise ValueError(
                "the latents are not finite: the network gave NaN or infinity (in half precision, try float32)"
            )
        return (z, inversion.join([report for _, report in parts])) if return_report else z

    def _ascend(
        self,
        x: Tensor,
        inverse: InverseDDIMScheduler,
        moves: int,
        network_dtype: torch.dtype,
        condition: Condition,
        refinement_steps: int,
        tolerance: float,
    ) -> tuple[Tensor, InversionReport]:
        """The first `moves` moves up from the images `x`, and their report."""
        image, cost = x, 1 if condition.null_labels is None else 2
        reports: list[inversion.MoveReport] = []
        at_x: GeneralizedDDIMSchedulerOutput | None = None  # the sampler's step from x, where it is known
        for i, t in enumerate(self.progress_bar(inverse.timesteps[:moves])):
            move = inverse.move(i)
            if move.alpha_bar_t == move.alpha_bar_s:  # the identity
                reports.append(inversion.nothing(len(x)))
                continue
            if at_x is None:
                guess = inverse.step(self._predict(x.to(network_dtype), t, condition), t, x).prev_sample
            else:
                signal, noise = math.sqrt(move.alpha_bar_t), math.sqrt(1 - move.alpha_bar_t)
                guess = signal * at_x.pred_original_sample + noise * at_x.pred_epsilon
            if refinement_steps == 0:
                x = guess
                reports.append(inversion.naive(len(x), cost))
                continue
            down = self.scheduler.timesteps[-1 - i]
            residual = partial(self._residual, x, x is image, down, network_dtype, condition)
            step, unit = inversion.step_size(move.alpha_bar_t, move.alpha_bar_s), math.sqrt(move.alpha_bar_s)
            solution = inversion.solve(residual, guess, step, tolerance * unit, refinement_steps)
            reports.append(solution.report(tolerance, unit, cost, guessed=at_x is None))
            x = solution.x
            at_x = self.scheduler.step(solution.output, down, x, eta=0.0)

        return x, inversion.report(inverse.timesteps[:moves].tolist(), reports, tolerance, x)

    def _ascend_together(
        self,
        image: Tensor,
        inverse: InverseMultistepDDIMScheduler,
        moves: int,
        network_dtype: torch.dtype,
        condition: Condition,
        refinement_steps: int,
        tolerance: float,
    ) -> tuple[Tensor, InversionReport]:
        """The first `moves` moves up from the images, refined as one, and the report of the path."""
        up, down = inverse.timesteps[:moves], self._last(moves)
        guided = 1 if condition.null_labels is None else 2
        tries = max(1, refinement_steps // 2)

        def encoded(x: Tensor, rows: Tensor | slice) -> Tensor:
            bar.update()
            return self._run(inverse, x, up, network_dtype, condition.rows(rows))

        def residual(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            z = encoded(x, rows)
            made = self._run(self.scheduler, z, down, network_dtype, condition.rows(rows))
            return image[rows] - made.clamp(-1, 1), z

        with self.progress_bar(total=tries) as bar:
            if refinement_steps == 0:
                z, made = encoded(image, slice(None)), inversion.naive(len(image), guided * moves)
            else:
                solution = inversion.solve(residual, image, 1.0, tolerance, tries)
                made = solution.report(tolerance, 1.0, guided * (moves + len(down)), guessed=False)
                z = solution.output
        return z, inversion.report([int(down[0])], [made], tolerance, z)

    def _run(
        self,
        scheduler: GeneralizedDDIMScheduler,
        x: Tensor,
        timesteps: Tensor,
        network_dtype: torch.dtype,
        condition: Condition,
        see: Callable[[int, Tensor, GeneralizedDDIMSchedulerOutput], None] | None = None,
    ) -> Tensor:
        """x after the deterministic steps of `scheduler` at these times; `see` is shown (number, x_t, step) of each."""
        for i, t in enumerate(timesteps):
            step = scheduler.step(self._predict(x.to(network_dtype), t, condition), t, x, eta=0.0)
            if see:
                see(i, x, step)
            x = step.prev_sample
        return x

    @torch.no_grad()
    def decode(
        self,
        latents: Tensor,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | Tensor | None = None,
        strength: float = 1.0,
        class_labels: int | Sequence[int] | Tensor | None = None,
        guidance_scale: float = 1.0,
        null_class_label: int | None = None,
        batch_size: int | None = None,
        output_type: str = "pil",
    ) -> Any:
        """The images of latents: the call with `latents` and η = 0, bit for bit.

        Args:
            latents: x_T, or x_t from `encode` with the same `strength`; (B, C, H, W).
            strength: the part of the moves to make, as in `encode`.
            batch_size: images decoded together; all by default.
            num_inference_steps, timesteps, class_labels, guidance_scale, null_class_label, output_type: as in the call.

        Returns:
            Images: a list of PIL images, an array or a tensor.

        Raises:
            ValueError: as `encode`.
        """
        _check_output_type(output_type)
        self._check_deterministic()
        self._check_latents(latents)
        batches = _batches(batch_size)
        device, network_dtype = self._execution_device, self.unet.dtype
        condition = self._condition(class_labels, guidance_scale, null_class_label, len(latents), device)
        self._check_channels()
        self._set_timesteps(self.scheduler, num_inference_steps, timesteps, device)
        times = self._last(self._moves(strength))
        x = latents.to(device=device, dtype=torch.promote_types(network_dtype, torch.float32))
        x = torch.cat(
            [
                self._descend(x[rows], times, network_dtype, condition.rows(rows), {"eta": 0.0})
                for rows in batches(len(x))
            ]
        )
        images = self._images(x, output_type)
        self.maybe_free_model_hooks()
        return images

    def reconstruct(
        self,
        images: pictures.Images,
        num_inference_steps: int | None = None,
        refinement_steps: int = 0,
        tolerance: float = TOLERANCE,
        output_type: str = "pil",
        return_report: bool = False,
        **settings: Any,
    ) -> Any:
        """Encode images and decode them again (Section 5.4, Table 2).

        Args:
            images, num_inference_steps, refinement_steps, tolerance: as in `encode`.
            output_type: as in the call.
            return_report: also return the latents and the `InversionReport`.
            settings: other keywords that `encode` and `decode` share.

        Returns:
            Images; with `return_report` a tuple of them, the latents, and the report.

        Raises:
            ValueError: as `encode`.
        """
        _check_output_type(output_type)
        settings["num_inference_steps"] = num_inference_steps
        unknown = settings.keys() - set(inspect.signature(self.decode).parameters)
        if unknown:
            raise TypeError(f"reconstruct() got an unexpected keyword argument {min(unknown)!r}")
        z, report = self.encode(
            images, refinement_steps=refinement_steps, tolerance=tolerance, return_report=True, **settings
        )
        again = self.decode(z, output_type=output_type, **settings)
        return (again, z, report) if return_report else again

    def interpolate(self, z0: Tensor, z1: Tensor, num: int = 11, **decoding: Any) -> Any:
        """Images along the path between two latents, by spherical interpolation (Section 5.3, Appendix D.5, Fig. 6).

        Args:
            z0, z1: the ends, (C, H, W), or (B, C, H, W) for B paths.
            num: images on a path, the ends included; at least 2.
            decoding: keywords of `decode`; of `class_labels` one for all, or one for each path.

        Returns:
            Images, path after path: a list of B·num PIL images, an array or a tensor.

        Raises:
            ValueError: for latents of different shapes, `num` below 2, and as `decode`.
        """
        _check_count("num", num)
        z0, z1 = (z[None] if isinstance(z, Tensor) and z.ndim == 3 else z for z in (z0, z1))
        for z in (z0, z1):
            self._check_latents(z)
        path = _path(z0, z1.to(z0), num)
        labels = decoding.get("class_labels")
        if labels is not None and torch.as_tensor(labels).ndim:
            if len(labels) != len(z0):
                raise ValueError(f"{len(labels)} class_labels for {len(z0)} paths: give one, or one for each")
            decoding["class_labels"] = torch.as_tensor(labels).repeat_interleave(num, 0)
        return self.decode(path.flatten(0, 1), **decoding)

    def interpolate_grid(self, corners: Tensor, num: int | tuple[int, int] = 11, **decoding: Any) -> Any:
        """Images on the grid between four latents: the slerp of two slerps (Appendix D.5, Fig. 6).

        Args:
            corners: the top left, top right, bottom left and bottom right one, (4, C, H, W).
            num: rows and columns of the grid, or (rows, columns); each at least 2.
            decoding: keywords of `decode`; of `class_labels` one for all.

        Returns:
            Images, row after row: a list of rows·columns PIL images, an array or a tensor.

        Raises:
            ValueError: for other than four latents, fewer than 2 rows or columns, and as `decode`.
        """
        rows, columns = num if isinstance(num, tuple) and len(num) == 2 else (num, num)
        _check_count("num", rows)
        _check_count("num", columns)
        self._check_latents(corners)
        if len(corners) != 4:
            raise ValueError(f"a grid lies between 4 latents, not {len(corners)}")
        left, right = _path(corners[:2], corners[2:], rows)
        return self.decode(_path(left, right, columns).flatten(0, 1), **decoding)

    # ---- before the loop ---------------------------------------------------------------------------------------

    def _check_latents(self, latents: Tensor) -> None:
        """Raise ValueError unless `latents` are some for this network."""
        if latents is None:
            raise ValueError("latents must be a torch tensor, not None")
        self._shape(None, latents)

    def _shape(self, batch_size: int | None, latents: Tensor | None) -> tuple[int, ...]:
        """(B, C, H, W) of the images to make."""
        if batch_size is not None and (not is_integer(batch_size) or batch_size < 1):
            raise ValueError(f"batch_size must be a positive integer, not {batch_size!r}")
        if latents is not None and not isinstance(latents, Tensor):
            raise ValueError(f"latents must be a torch tensor, not {type(latents).__name__}")
        if latents is not None and (latents.ndim != 4 or len(latents) == 0):
            raise ValueError(f"latents must be (B, C, H, W) with B ≥ 1, not of shape {tuple(latents.shape)}")
        size = self.image_size
        if size is None:
            if latents is None:
                raise ValueError("the network's config has no sample_size: pass latents of the wanted size")
            size = tuple(latents.shape[2:])
        shape = (batch_size or (1 if latents is None else len(latents)), self.unet.config.in_channels, *size)
        if latents is None:
            return shape
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}; this network and batch_size need {shape}")
        if not latents.is_floating_point() or not bool(torch.isfinite(latents).all()):
            raise ValueError("latents must be finite numbers: they hold NaN, infinity or integers")
        return shape

    def _condition(
        self,
        class_labels: Any,
        guidance_scale: float,
        null_class_label: int | None,
        batch_size: int,
        device: torch.device,
    ) -> Condition:
        """The labels of the images and, where guidance is on, the null labels, on the network's device."""
        classes = self.unet.config.num_class_embeds
        if self.unet.class_embedding is None:
            if class_labels is not None or guidance_scale != 1 or null_class_label is not None:
                raise ValueError("this network is unconditional: it takes no class_labels and no guidance_scale")
            return Condition(None, None, 1.0)
        if class_labels is None:
            raise ValueError(f"this network is class-conditional: pass class_labels (0..{(classes or 0) - 1})")
        if not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale must be a finite number, not {guidance_scale!r}")
        labels = torch.as_tensor(class_labels)
        labels = labels.expand(batch_size) if labels.ndim == 0 else labels
        if labels.shape[:1] != (batch_size,):
            raise ValueError(f"{labels.shape[0]} class_labels for a batch of {batch_size}: give one, or one for each")
        null_labels = None
        if guidance_scale != 1:
            if null_class_label is None and classes is None:
                raise ValueError("pass null_class_label: this network does not say how many classes it has")
            null_labels = torch.full_like(labels, classes - 1 if null_class_label is None else null_class_label)
        for values in (labels, null_labels):
            if classes is None or values is None:
                continue  # an embedding of one's own, whose labels need not be classes
            whole = not values.is_floating_point() and values.dtype != torch.bool and values.ndim == 1
            if not whole or not ((values >= 0) & (values < classes)).all():
                raise ValueError(f"class labels must be integers in 0..{classes - 1}, not {values.tolist()}")
        null_labels = None if null_labels is None else null_labels.to(device)
        return Condition(labels.to(device), null_labels, guidance_scale)

    def _check_channels(self) -> None:
        """Raise ValueError where the network's channels are not those our scheduler's variance type needs."""
        made, channels = self.unet.config.out_channels, self.unet.config.in_channels
        if not isinstance(self.scheduler, GeneralizedDDIMScheduler):
            return
        learned = self.scheduler.config.variance_type == "learned_range"
        if made != (2 if learned else 1) * channels:
            remedy = "needs twice the channels" if learned else "needs as many; with twice use 'learned_range'"
            raise ValueError(
                f"the network makes {made} channels from {channels}: "
                f"variance_type={self.scheduler.config.variance_type!r} {remedy}"
            )

    def _set_timesteps(
        self,
        scheduler: SchedulerMixin,
        num_inference_steps: int | None,
        timesteps: Sequence[int] | Tensor | None,
        device: torch.device,
        eta: float | None = None,
    ) -> None:
        taken = inspect.signature(scheduler.set_timesteps).parameters
        if timesteps is None:
            steps = num_inference_steps
            if steps is None:
                steps = min(50, getattr(scheduler.config, "num_train_timesteps", 50))
            told = {"eta": eta} if "eta" in taken else {}
            scheduler.set_timesteps(steps, device=device, **told)
            return
        if not hasattr(timesteps, "__len__") or getattr(timesteps, "ndim", 1) != 1:
            raise ValueError(f"timesteps must be a list of integers, not {timesteps!r}")
        if num_inference_steps is not None and num_inference_steps != len(timesteps):
            raise ValueError(
                f"num_inference_steps={num_inference_steps} and {len(timesteps)} timesteps disagree: pass one of them"
            )
        if "timesteps" not in taken:
            raise ValueError(f"{type(scheduler).__name__} takes no timesteps of one's own: pass num_inference_steps")
        scheduler.set_timesteps(timesteps=timesteps, device=device)

    def _check_deterministic(self, invertible: bool = False) -> None:
        """Raise ValueError unless the scheduler's process makes the image a function of x_T, or also the reverse."""
        scheduler, config = self.scheduler, self.scheduler.config
        remedy = f"pipe.scheduler = {sampler_class(scheduler).__name__}.from_config(pipe.scheduler.config"
        if not isinstance(scheduler, GeneralizedDDIMScheduler) or isinstance(scheduler, InverseDDIMScheduler):
            given = f"{type(scheduler).__module__}.{type(scheduler).__name__}"
            raise ValueError(
                f"latents need a GeneralizedDDIMScheduler of {__name__.split('.')[0]}, not {given}: {remedy})"
            )
        if process.adds_noise(config.variance_type, config.eta):
            raise ValueError(
                f"latents need the deterministic process: with noise (eta={config.eta:g}, "
                f"variance_type={config.variance_type!r}) x_T does not determine the image: {remedy}, eta=0.0, "
                "variance_type='fixed_small')"
            )
        if invertible and (config.clip_sample or config.thresholding):
            key = "thresholding" if config.thresholding else "clip_sample"
            raise ValueError(
                f"the scheduler constrains x̂0 ({key}=True), and such a move has no inverse: {remedy}, {key}=False)"
            )

    def _moves(self, strength: float) -> int:
        """⌊strength·S⌋, the number of moves between the image and an intermediate t."""
        S = self.scheduler.num_inference_steps
        if not isinstance(strength, Real) or not 0 < strength <= 1:
            raise ValueError(f"strength must lie in (0, 1], not {strength!r}")
        moves = int(strength * S + 1e-9)
        if moves == 0:
            raise ValueError(f"strength={strength:g} of {S} steps is no step: use at least {1 / S:.3g}, or more steps")
        return moves

    def _last(self, moves: int) -> Tensor:
        """The times at which the last moves of the plan call the network."""
        times = self.scheduler.timesteps
        twice = len(times) > self.scheduler.num_inference_steps  # but at the first of them
        return times[-(2 * moves - 1) :] if twice else times[-moves:]

    def _step_kwargs(
        self, eta: float | None, generator: Randomness, use_clipped_model_output: bool | None
    ) -> dict[str, Any]:
        """What the scheduler's `step` takes of η, the generator and the switch for clipping."""
        given = {"eta": eta, "generator": generator, "use_clipped_model_output": use_clipped_model_output}
        if isinstance(self.scheduler, GeneralizedDDIMScheduler):
            self.scheduler.check_eta(eta)
            return given
        if eta is not None and not (isinstance(eta, Real) and eta >= 0):
            raise ValueError(f"eta must be a non-negative number, not {eta!r}")
        known = inspect.signature(self.scheduler.step).parameters
        for name, value in (("eta", eta), ("use_clipped_model_output", use_clipped_model_output)):
            if value and name not in known:
                raise ValueError(f"{type(self.scheduler).__name__} knows no {name}: leave it out")
        return {key: value for key, value in given.items() if value is not None and key in known}

    # ---- the loop ----------------------------------------------------------------------------------------------

    def _descend(
        self,
        x: Tensor,
        timesteps: Tensor,
        network_dtype: torch.dtype,
        condition: Condition,
        step_kwargs: dict[str, Any],
        callback: StepEndCallback | None = None,
        callback_tensors: Sequence[str] = (),
    ) -> Tensor:
        """x after the steps at `timesteps`, which are the scheduler's, or the last of them."""
        for i, t in enumerate(self.progress_bar(timesteps)):
            x_t = x
            model_input = self.scheduler.scale_model_input(x_t, t).to(network_dtype)
            output = self._predict(model_input, t, condition)
            step = self.scheduler.step(output, t, x_t, **step_kwargs)
            x = step.prev_sample
            if callback is not None:
                known = {"latents": x, "sample": x_t}
                tensors = {
                    name: known[name] if name in known else getattr(step, name, None) for name in callback_tensors
                }
                x = (callback(self, i, t, tensors) or {}).get("latents", x)
        return x

    def _residual(
        self,
        x_s: Tensor,
        is_image: bool,
        t: Tensor,
        network_dtype: torch.dtype,
        condition: Condition,
        x: Tensor,
        rows: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """x_s minus what the sampler makes of `x` in its step at `t`, for some images; and the network's output.

        Where x_s is the image, what the sampler makes is clamped to −1..1 as an image is.
        """
        output = self._predict(x.to(network_dtype), t, condition.rows(rows))
        made = self.scheduler.step(output, t, x, eta=0.0).prev_sample
        return x_s[rows] - (made.clamp(-1, 1) if is_image else made), output

    def _predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The network's output, guided where there are null labels; learned variances are not guided."""
        labels, null_labels, guidance_scale = condition
        if null_labels is None:
            output = self.unet(x, t, class_labels=labels).sample
        else:
            both = self.unet(torch.cat([x, x]), t, class_labels=torch.cat([labels, null_labels])).sample
            output, null = both.chunk(2)
            channels = x.shape[1]
            guided = torch.lerp(null[:, :channels], output[:, :channels], guidance_scale)
            output = torch.cat([guided, output[:, channels:]], dim=1)
        ours = isinstance(self.scheduler, GeneralizedDDIMScheduler)
        learned = getattr(self.scheduler.config, "variance_type", None) in ("learned", "learned_range")
        if output.shape[1] == 2 * x.shape[1] and not (ours or learned):
            output = output[:, : x.shape[1]]  # stock samplers that know no variance take the prediction alone
        return output

    def _images(self, x: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return x
        images = (x / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        array = images.permute(0, 2, 3, 1).float().cpu().numpy()
        return self.numpy_to_pil(array) if output_type == "pil" else array


def _check_output_type(output_type: str) -> None:
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"unknown output_type {output_type!r}: use one of {', '.join(OUTPUT_TYPES)}")


def _path(z0: Tensor, z1: Tensor, num: int) -> Tensor:
    """(B, num, …): the points between each of `z0` and `z1`, (B, …), ends included."""
    return torch.stack([slerp(z0, z1, i / (num - 1)) for i in range(num)], 1)


def _batches(batch_size: int | None) -> Callable[[int], list[slice]]:
    """A function from the number of images to the slices of their batches; checks `batch_size`."""
    if batch_size is not None:
        _check_count("batch_size", batch_size, 1)
    return lambda count: [slice(i, i + (batch_size or count)) for i in range(0, count, batch_size or count)]


def _check_count(name: str, value: int, least: int = 2) -> None:
    if not is_integer(value) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, not {value!r}")
