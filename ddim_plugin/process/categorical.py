"""The process for categorical data of Appendix A, for tokens 0..K−1 and the paper's α (the table ᾱ of `betas`).

q(x_t|x_0) = Cat(α_t·x_0 + (1 − α_t)/K). A posterior that treats all tokens alike is five probabilities. It has these
marginals at s if and only if A_t·`same` + (1 − A_t)·`clean` = A_s, A = α + (1 − α)/K. That is linear: mixtures of such
posteriors have them too, for any τ and any weights in each step (Lemma 1 for categories).
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Posterior(NamedTuple):
    """q(x_s | x_t, x_0) for one pair (t, s)."""

    same: float  # probability of x_s = x_0 if x_t = x_0
    clean: float  # of x_s = x_0 if x_t ≠ x_0
    kept: float  # of x_s = x_t if x_t ≠ x_0
    third: float  # of each token that is neither, if x_t ≠ x_0
    other: float  # of each token but x_0, if x_t = x_0


def posterior(alpha_t: float, alpha_s: float, K: int, eta: float = 1.0, noisiest: str = "bayes") -> Posterior:
    """Mix (1 − η)·q_0 + η·q_1, where q_0 is least stochastic: x_t with probability m = (1 − α_s)/(1 − α_t), else x_0.

    With q_1 "independent" of x_t, q is Cat(σ·x_t + (α_s − σ·α_t)·x_0 + ((1 − α_s) − (1 − α_t)·σ)/K) (Appendix A), where
    σ = (1 − η)·m. "bayes" is q_1 ∝ q(x_t|x_s)·q(x_s|x_0) of the Markov chain q(x_t|x_s) = Cat(r·x_s + (1 − r)/K),
    r = α_t/α_s: D3PM with uniform noise (Austin et al. 2021, Eq. 3). For K > 2 and 0 < α_t < α_s < 1 no σ gives it.
    """
    m, rest = (1 - alpha_s) / (1 - alpha_t), (1 - alpha_s) / K
    start, most = alpha_s + rest, (alpha_s + rest, alpha_s + rest, rest, rest, rest)
    if noisiest == "bayes":
        r, differs = alpha_t / alpha_s, (1 - alpha_t) / K
        move, same = (1 - r) / K, alpha_t + differs  # `same` and `differs` are q(x_t|x_0)
        stay, given_differs = r + move, (move * start / differs, (r + move) * rest / differs, move * rest / differs)
        most = (stay * start / same, *given_differs, move * rest / same)
    return Posterior(*((1 - eta) * a + eta * b for a, b in zip((1.0, 1 - m, m, 0.0, 0.0), most, strict=True)))


def reverse(p: Tensor, x: Tensor, q: Posterior) -> Tensor:
    """Compute Σ p̂(x_0)·q(x_s|x_t, x_0), (B, …, K), from p̂(x_0|x_t), (B, …, K), and x_t, (B, …), in O(K) a token."""
    here = p.gather(-1, x[..., None])
    moved = (p * (q.clean - q.third)).add_(q.third * (1 - here) + q.other * here)
    return moved.scatter_(-1, x[..., None], q.same * here + q.kept * (1 - here))


def pick(p: Tensor, uniform: Tensor) -> Tensor:
    """Draw tokens from p, (B, …, K), by inverting its sums at `uniform`, (B, …), in [0, 1). None has probability 0."""
    below = p.cumsum(-1)
    return p.shape[-1] - (below > uniform[..., None] * below[..., -1:]).sum(-1)


def noised(x0: Tensor, uniform: Tensor, noise: Tensor, K: int) -> Tensor:
    """Draw x_t ~ Cat(α·x_0 + (1 − α)/K) from x_0, numbers `uniform` in [0, 1), both (B, …), and `noise` 1 − α."""
    return torch.where(uniform < noise, (uniform / noise * K).long().clamp_(max=K - 1), x0)


def uniforms(normal: Tensor) -> Tensor:
    """Turn standard normal numbers into uniform ones in [0, 1), in float32 at least."""
    normal = normal.to(torch.promote_types(normal.dtype, torch.float32))
    return torch.special.ndtr(normal).clamp_(max=1 - torch.finfo(normal.dtype).eps / 2)
