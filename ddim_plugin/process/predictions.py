"""What a network predicts, as linear maps from (x_t, output) to x̂0 and ε̂.

With the noise prediction x̂0 = (x_t − b·ε̂)/a (Eq. 9). A network may predict x_0 instead, v = a·ε − b·x_0 (Salimans & Ho
2022), the velocity ε − x_0 of flow matching, or the score −ε/b (Song et al. 2021).

F of "edm" sees c_in·x, c_in = 1/√(σ² + σ_d²), and gives x̂0 = σ_d²·c_in²·x + σ·σ_d·c_in·F (Karras et al. 2022, Eq. 7).
On the paper's path c_in·x is the data x_0/σ_d at √ᾱ = σ_d·c_in, and F is −v there: v-prediction, but for the sign.
"""

import math
from typing import NamedTuple

from .moves import Move
from .paths import Level
from .spacings import check_name

PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow_prediction", "score", "edm")
FLAT = 0.02  # slope of a step below which `unfold` does not divide by it


class Prediction(NamedTuple):
    """x̂0 = x0_x·x_t + x0_out·output and ε̂ = eps_x·x_t + eps_out·output, at one time."""

    x0_x: float
    x0_out: float
    eps_x: float
    eps_out: float


def prediction(prediction_type: str, level: Level, sigma_data: float | None = None) -> Prediction:
    """Solve x_t = a·x_0 + b·ε and output = c·x_0 + d·ε for x_0 and ε. Raises ValueError if they are dependent."""
    check_name("prediction_type", prediction_type, PREDICTIONS)
    a, b = level
    c, d = {"sample": (1, 0), "v_prediction": (-b, a), "flow_prediction": (-1, 1)}.get(prediction_type, (0, 1))
    if prediction_type == "edm" and sigma_data is None:
        raise ValueError("prediction_type='edm' needs sigma_data, the standard deviation of the data: pass it too")
    if sigma_data is not None:  # F, or −F for "v_prediction"
        scale = (1 if prediction_type == "edm" else -1) / math.hypot(b, sigma_data)
        c, d = scale * b / sigma_data, -scale * sigma_data
    determinant = a * d - b * c
    if determinant == 0:
        place = "the data" if a else "ᾱ = 0 or σ = 1, pure noise: use timesteps below, or a network that predicts x0"
        raise ValueError(f"prediction_type={prediction_type!r} divides by zero at {place}")
    unit = -b if prediction_type == "score" else 1.0  # the score is ε in units of −b
    return Prediction(d / determinant, -unit * b / determinant, -c / determinant, unit * a / determinant)


def fold(m: Prediction, move: Move) -> tuple[float, float]:
    """Return (a, b) with x_s = a·x_t + b·output, for a step without noise or constraint."""
    return float(move.x0 * m.x0_x + move.eps * m.eps_x), float(move.x0 * m.x0_out + move.eps * m.eps_out)


def unfold(m: Prediction, move: Move) -> tuple[float, float]:
    """Return (a, b) with x_t = a·x_s + b·output: the step of `fold` solved for x_t, for the same output.

    If x_s hardly depends on x_t (a slope below `FLAT`, as for x_0 networks near the data), errors would grow. Then ε̂ is
    that of x_s, and x_t follows by Eq. 13. Raises ValueError for a step from pure noise that does not depend on x_t.
    """
    (x, out), start, end = fold(m, move), move.start, move.end
    if abs(x) >= FLAT or (start.signal == 0 and x):
        return 1 / x, -out / x
    if start.signal == 0:
        step = f"the step from time {move.t:g} to {move.s:g} does not depend on x_{move.t:g}"
        raise ValueError(f"{step}, so it has no inverse: use more steps, or timesteps below pure noise")
    scale = start.signal / end.signal
    eps = start.noise - scale * end.noise
    return float(scale + eps * m.eps_x), float(eps * m.eps_out)
