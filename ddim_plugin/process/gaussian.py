"""Spherical interpolation between Gaussian latents (Appendix D.5)."""

import torch
from torch import Tensor

OPPOSITE = 0.01  # angle to π, in radians, below which two latents count as opposite: `slerp` would divide by almost 0


def slerp(x0: Tensor, x1: Tensor, a: float) -> Tensor:
    """Interpolate spherically: sin((1 − a)θ)/sin θ·x⁰ + sin(aθ)/sin θ·x¹ for the angle θ (Appendix D.5).

    Parallel samples are interpolated linearly, which is the formula's limit. Opposite ones (within `OPPOSITE`) have no
    shortest path. They are joined by a great circle, in a fixed direction if their own plane is undefined. `x0` and
    `x1` are (B, …) of one shape, and a = 0 and a = 1 return them exactly. Raises ValueError for other shapes or `a`.
    """
    if not 0 <= a <= 1:
        raise ValueError(f"slerp needs a in [0, 1], not {a!r}")
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
    """Return float64, or float32 on a device without float64."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def _unit(x: Tensor, norm: Tensor) -> Tensor:
    return x / torch.where(norm == 0, torch.ones_like(norm), norm)


def _across(u: Tensor, v: Tensor) -> Tensor:
    """Return a unit vector orthogonal to u, towards v, or towards a fixed Gaussian vector if v is −u."""
    fixed = torch.randn(u.shape[1], generator=torch.Generator().manual_seed(0)).to(u)
    towards = torch.where((u + v).norm(dim=1, keepdim=True) < 1e-6, fixed.expand_as(u), v)
    across = towards - (towards * u).sum(1, keepdim=True) * u
    return _unit(across, across.norm(dim=1, keepdim=True))  # 0 in one dimension
