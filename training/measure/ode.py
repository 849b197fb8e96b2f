"""The likelihood of the ODE of Eq. 14, in bits per dimension, on any Gaussian path that ends near N(0, I).

Networks are functions (x_t, t) ↦ output of the time t, here a real number in 0..T.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from pictures.bits import BITS
from torch import Tensor

from ddim_plugin.process.moves import prediction
from ddim_plugin.process.paths import FlowMatching, Level, Path

from .bound import Array, Generators, Network, draw


class ODELikelihood(NamedTuple):
    """Bits per dimension of each image (B,), the latents x_T (B, C, H, W), and network evaluations of the batch."""

    bits: Tensor
    latents: Tensor
    evaluations: int


def ode_log_density(
    network: Network,
    x0: Tensor,
    path: Path,
    prediction_type: str = "epsilon",
    generator: Generators | None = None,
    tolerance: float = 1e-5,
    top: float | None = None,
) -> tuple[Tensor, Tensor, int]:
    """Integrate the ODE of Eq. 14 from the data to time `top`.

    With the angle θ, tan θ = b/a, the ODE of y = x/√(a² + b²) reads dy/dθ = v̂ (y = cos θ·x0 + sin θ·ε), and
    log p(x_0) = log N(y_θ; 0, I) + ∫ tr ∂v̂/∂y dθ (Song et al. 2021, Eq. 39). In the paper y = x and ᾱ = cos²θ. SciPy's
    RK45 chooses the steps for the whole batch.

    Args:
        network: (x_t, t) ↦ output, t (B,) real in 0..T: the solver evaluates it between the trained times.
        x0: data, (B, C, H, W).
        path: the levels at the times 0..T. Between them t is linear in ln(b/a), and in flow matching exact.
        generator: of Hutchinson's probes, ±1; a list with one for each image makes them independent of the batch. None
            takes the exact trace, which costs a backward pass for each dimension.
        tolerance: of the solver, absolute and relative.
        top: the paper's time to end at; T by default.

    Returns:
        log p(x_0), (B,), in nats; the latents y; the network evaluations of the batch.

    Raises:
        ImportError: if SciPy is missing.
        ValueError: if the network's output or its gradient is not finite, or the solver fails.
    """
    try:
        from scipy.integrate import solve_ivp
    except ImportError as error:
        raise ImportError("the ODE's likelihood needs SciPy's solver: pip install scipy") from error
    angles = angles_of(path)
    end = float(angles[-1] if top is None else np.interp(top, np.arange(len(angles)), angles))
    B, d = len(x0), x0[0].numel()
    probes = None
    if generator is not None:
        bits = draw(generator, B, lambda size, one: torch.randint(2, (*size, *x0.shape[1:]), generator=one))
        probes = bits.to(x0) * 2 - 1

    def field(theta: float, state: Array) -> Array:
        x = torch.as_tensor(state[: B * d]).to(x0).view_as(x0)
        v, trace = _velocity(network, x, theta, path, angles, prediction_type, probes)
        return np.concatenate(
            [v.double().cpu().numpy().ravel(), finite(trace, "the network's gradient is").double().cpu().numpy()]
        )

    state = np.concatenate([x0.double().cpu().numpy().ravel(), np.zeros(B)])
    solved = solve_ivp(field, (0.0, end), state, rtol=tolerance, atol=tolerance)
    if not solved.success:
        raise ValueError(f"the ODE could not be solved: {solved.message}")
    last = torch.as_tensor(solved.y[:, -1])
    x, trace = last[: B * d].view(x0.shape), last[B * d :]
    prior = -0.5 * (x.square().flatten(1).sum(1) + d * math.log(2 * math.pi))
    return prior + trace, x.to(x0.dtype), solved.nfev


def _velocity(
    network: Network, y: Tensor, theta: float, path: Path, angles: Array, prediction_type: str, probes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return v̂ at the angle θ, and tr ∂v̂/∂y of each image: exact, or estimated from probes."""
    level = Level(math.cos(theta), max(math.sin(theta), 1e-6))  # x̂0 at θ = 0 equals the image, and determines no noise
    time = time_of(theta, angles, isinstance(path, FlowMatching))
    scale = _scale(path, level, time)
    t = torch.full((len(y),), time, dtype=y.dtype, device=y.device)
    predicted = prediction(prediction_type, Level(scale * level.signal, scale * level.noise))
    of_x = scale * (level.signal * predicted.eps_x - level.noise * predicted.x0_x)
    of_output = level.signal * predicted.eps_out - level.noise * predicted.x0_out
    with torch.enable_grad():
        y = y.requires_grad_()
        output = finite(network(scale * y, t)).to(y.dtype)[:, : y.shape[1]]
        v = of_x * y + of_output * output
        if probes is not None:
            (gradient,) = torch.autograd.grad((v * probes).sum(), y)
            trace = (gradient * probes).flatten(1).sum(1)
        else:
            trace = torch.zeros(len(y), dtype=y.dtype, device=y.device)
            flat = v.flatten(1)
            for k in range(flat.shape[1]):
                (gradient,) = torch.autograd.grad(flat[:, k].sum(), y, retain_graph=k + 1 < flat.shape[1])
                trace = trace + gradient.flatten(1)[:, k]
    return v.detach(), trace.detach()


def finite(values: Tensor, name: str = "the network's output is") -> Tensor:
    """Return the values. Raises ValueError if one is not finite, with which a solver would never end."""
    if not bool(values.isfinite().all()):
        raise ValueError(f"{name} not finite: measure other weights, such as those of an earlier checkpoint")
    return values


def angles_of(path: Path) -> Array:
    """Return the angles θ of the levels, tan θ = b/a, (T + 1,)."""
    return np.arctan2(*(np.asarray(each) for each in reversed(path.levels)))


def _scale(path: Path, level: Level, time: float) -> float:
    """Return √(a² + b²) at a real time, whose level of the same ratio is (cos θ, sin θ)."""
    if isinstance(path, FlowMatching):  # a + b = 1
        return float(1 / (level.signal + level.noise))
    if path.levels.signal[-1] == 1:  # a = 1
        return float(1 / level.signal)
    lengths = np.hypot(*(np.asarray(each) for each in path.levels))
    return float(np.exp(np.interp(time, np.arange(len(lengths)), np.log(lengths))))


def time_of(theta: float, angles: Array, of_flow: bool = False) -> float:
    """Return the time t, real, of an angle θ.

    It is linear in ln tan θ between the entries of `angles`, and below the first in θ, from 0 to 1. `of_flow` returns
    T·σ of flow matching, with σ/(1 − σ) = tan θ.
    """
    if of_flow:
        return (len(angles) - 1) * math.sin(theta) / (math.sin(theta) + math.cos(theta))
    if theta <= angles[1]:
        return float(theta / angles[1])
    with np.errstate(divide="ignore"):
        logs = np.log(np.tan(angles[1:]))
    return float(np.interp(math.log(math.tan(theta)), logs, np.arange(1, len(angles))))


def ode_bits(
    network: Network,
    images: Tensor,
    path: Path,
    prediction_type: str = "epsilon",
    generator: Generators | None = None,
    exact_trace: bool = False,
    tolerance: float = 1e-5,
) -> ODELikelihood:
    """Measure bits per dimension of 8-bit images under the ODE, by uniform dequantization.

    `images` are bytes, uint8 (B, C, H, W). Each is spread over its bin, x = 2(image + u)/256 − 1, u uniform on [0, 1).
    In expectation that is an upper bound.
    """
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"images must be bytes, uint8 (B, C, H, W), not {images.dtype} {tuple(images.shape)}")
    if generator is None:
        raise ValueError("pass a generator, or one for each image: dequantization and probes are drawn from it")
    u = draw(generator, len(images), lambda size, one: torch.rand(*size, *images.shape[1:], generator=one))
    x0 = 2 * (images.float() + u.to(images.device)) / 256 - 1
    probes = None if exact_trace else generator
    log_density, latents, evaluations = ode_log_density(network, x0, path, prediction_type, probes, tolerance)
    return ODELikelihood(7 - log_density * BITS / images[0].numel(), latents, evaluations)
