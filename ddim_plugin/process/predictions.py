"""From the network's output to (x̂0, ε̂), in three verbs: predict, constrain, combine.

With the noise prediction x̂0 = (x_t − √(1 − ᾱ_t)·ε̂)/√ᾱ_t (Eq. 9); a network may predict x0 instead, or
v = √ᾱ_t·ε − √(1 − ᾱ_t)·x_0 (Salimans & Ho 2022). All three are linear in (x_t, output).
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .moves import Move

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
