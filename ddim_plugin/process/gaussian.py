"""Spherical interpolation between Gaussian latents (Appendix D.5)."""

import torch
from torch import Tensor


def slerp(x0: Tensor, x1: Tensor, a: float) -> Tensor:
    """Interpolate spherically: sin((1 − a)θ)/sin θ·x⁰ + sin(aθ)/sin θ·x¹ for the angle θ (Appendix D.5).

    `x0` and `x1` are (B, …), and returned exactly for a = 0 and a = 1. Parallel samples are interpolated linearly.
    Raises ValueError for other shapes or `a`, and for opposite samples (to 0.01 radians): no path is the shortest.
    """
    if not 0 <= a <= 1:
        raise ValueError(f"slerp needs a in [0, 1], not {a!r}")
    if x0.shape != x1.shape or x0.ndim < 2:
        raise ValueError(f"slerp needs two batches of one shape, not {tuple(x0.shape)} and {tuple(x1.shape)}")
    work = torch.float32 if x0.device.type == "mps" else torch.float64  # which mps lacks
    p, q = x0.to(work).flatten(1), x1.to(work).flatten(1)
    norm_p, norm_q = p.norm(dim=1, keepdim=True), q.norm(dim=1, keepdim=True)
    u, v = (x / norm.masked_fill(norm == 0, 1) for x, norm in ((p, norm_p), (q, norm_q)))
    angle = 2 * torch.atan2((u - v).norm(dim=1, keepdim=True), (u + v).norm(dim=1, keepdim=True))
    parallel = (angle < 1e-8) | (norm_p == 0) | (norm_q == 0)
    if bool(((torch.pi - angle < 0.01) & ~parallel).any()):
        raise ValueError("two latents are opposite, and no path between them is the shortest: replace one of them")
    sine = angle.sin().masked_fill(parallel, 1)
    weight_p = torch.where(parallel, 1 - a, ((1 - a) * angle).sin() / sine)
    weight_q = torch.where(parallel, a, (a * angle).sin() / sine)
    return (weight_p * p + weight_q * q).view_as(x0).to(x0.dtype)
