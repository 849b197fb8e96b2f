"""Spherical interpolation between Gaussian latents (Appendix D.5)."""

import torch
from torch import Tensor
from torch.nn.functional import normalize


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
    u, v = normalize(p), normalize(q)
    angle = 2 / torch.pi * torch.atan2((u - v).norm(dim=1, keepdim=True), (u + v).norm(dim=1, keepdim=True))
    angle = angle * (u.any(1, keepdim=True) & v.any(1, keepdim=True))  # in units of π; zeros are parallel to all
    if bool((1 - angle < 0.01 / torch.pi).any()):
        raise ValueError("two latents are opposite, and no path between them is the shortest: replace one of them")
    of_p, of_q = (w * torch.sinc(w * angle) / torch.sinc(angle) for w in (1 - a, a))  # w itself for parallel samples
    return (of_p * p + of_q * q).view_as(x0).to(x0.dtype)
