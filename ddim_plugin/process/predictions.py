"""What a network predicts, as linear maps from (x_t, output) to x̂0 and ε̂.

With the noise prediction x̂0 = (x_t − √(1 − ᾱ_t)·ε̂)/√ᾱ_t (Eq. 9). A network may predict x_0 instead, or
v = √ᾱ_t·ε − √(1 − ᾱ_t)·x_0 (Salimans & Ho 2022).
"""

from typing import NamedTuple

import numpy as np

from .moves import Move

PREDICTIONS = ("epsilon", "sample", "v_prediction")  # a network predicts the noise ε, the image x_0 or the velocity v
FLAT = 0.02  # slope of a step below which `unfold` does not divide by it


class Prediction(NamedTuple):
    """x̂0 = x0_x·x_t + x0_out·output and ε̂ = eps_x·x_t + eps_out·output, at one time."""

    x0_x: float
    x0_out: float
    eps_x: float
    eps_out: float


def check_prediction(prediction_type: str) -> None:
    """Raise ValueError unless `prediction_type` is known."""
    if prediction_type not in PREDICTIONS:
        raise ValueError(f"unknown prediction_type {prediction_type!r}: use one of {', '.join(PREDICTIONS)}")


def prediction(prediction_type: str, alpha_bar_t: float) -> Prediction:
    """Return the linear map of a prediction type at ᾱ_t.

    Raises ValueError if it divides by zero: ε at ᾱ_t = 0 (zero terminal SNR), x_0 at ᾱ_t = 1 (the data).
    """
    check_prediction(prediction_type)
    signal, noise = float(np.sqrt(alpha_bar_t)), float(np.sqrt(1 - alpha_bar_t))
    if prediction_type == "epsilon":
        if signal == 0:
            raise ValueError(
                "prediction_type='epsilon' divides by zero at ᾱ = 0: with zero terminal SNR use a network that "
                "predicts v or x0, or timesteps below the top"
            )
        return Prediction(1 / signal, -noise / signal, 0.0, 1.0)
    if prediction_type == "sample":
        if noise == 0:
            raise ValueError("prediction_type='sample' gives no ε̂ at ᾱ = 1: use timesteps above the data")
        return Prediction(0.0, 1.0, 1 / noise, -signal / noise)
    return Prediction(signal, -noise, noise, signal)


def eps_from_x0(alpha_bar_t: float) -> tuple[float, float]:
    """Return (a, b) with ε̂ = a·x_t + b·x̂0 = (x_t − √ᾱ_t·x̂0)/√(1 − ᾱ_t)."""
    noise = float(np.sqrt(1 - alpha_bar_t))
    return 1 / noise, -float(np.sqrt(alpha_bar_t)) / noise


def fold(prediction: Prediction, move: Move) -> tuple[float, float]:
    """Return (a, b) with x_s = a·x_t + b·output, for a step without noise or constraint."""
    return (
        float(move.x0 * prediction.x0_x + move.eps * prediction.eps_x),
        float(move.x0 * prediction.x0_out + move.eps * prediction.eps_out),
    )


def unfold(prediction: Prediction, move: Move) -> tuple[float, float]:
    """Return (a, b) with x_t = a·x_s + b·output: the step of `fold` solved for x_t, for the same output.

    If x_s hardly depends on x_t (a slope below `FLAT`, as for x_0 networks near the data), the solution would amplify
    any error of the output. Then ε̂ is taken from x_s, ε̂ = eps_x·x_s + eps_out·output, and x_t follows by Eq. 13.

    Raises ValueError for the step from ᾱ_t = 0 to the data, which does not depend on x_t.
    """
    x, out = fold(prediction, move)
    if abs(x) >= FLAT or (move.alpha_bar_t == 0 and x):
        return 1 / x, -out / x
    if move.alpha_bar_t == 0:
        raise ValueError(
            f"the step from time {move.t} to {move.s} does not depend on x_{move.t}, so it has no inverse: use more "
            "steps, or timesteps at which ᾱ > 0"
        )
    scale = float(np.sqrt(move.alpha_bar_t / move.alpha_bar_s))
    eps = float(np.sqrt(1 - move.alpha_bar_t) - scale * np.sqrt(1 - move.alpha_bar_s))
    return float(scale + eps * prediction.eps_x), float(eps * prediction.eps_out)
