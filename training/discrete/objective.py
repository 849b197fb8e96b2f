"""The losses and the variational bound of the process for categorical data: pictures of K levels of brightness."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from pictures.bits import BITS
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from ddim_plugin import DiscreteDDIMScheduler
from ddim_plugin.process import categorical

DISCRETE_LOSSES = ("cross_entropy", "bound")
"""See `DiscreteObjective`."""


class Corrupted(NamedTuple):
    """A batch for training: tokens x_0 and x_t, the latter also as the network sees it, and times t in 1..T, (B,)."""

    x0: Tensor
    tokens: Tensor
    x: Tensor
    t: Tensor


class DiscreteObjective:
    """Computes the loss of each picture of a batch, for a network that predicts logits (B, K·C, H, W) of x_0.

    - "cross_entropy": −ln p̂(x_0|x_t), the bound on the KL in Appendix A without its weight, in nats per dimension.
    - "bound": an unbiased estimate of the variational bound in bits per dimension: T times KL(q(x_s|x_t, x_0)‖
      p(x_s|x_t)) with s = t − 1, which at t = 1 is −ln p̂(x_0|x_1), and the prior's KL.

    Args:
        scheduler: the process. Pictures are divided into its K levels.
        loss: one of `DISCRETE_LOSSES`.
        eta: η of the process that "bound" refers to. Every η has a finite bound, 0 too.

    Raises:
        ValueError: for unknown losses, an η outside [0, 1], and more levels than a picture has.
    """

    def __init__(self, scheduler: DiscreteDDIMScheduler, loss: str, eta: float = 1.0, device: str | None = None):
        if loss not in DISCRETE_LOSSES:
            raise ValueError(f"loss {loss!r} is not for num_classes in [scheduler]: use {' or '.join(DISCRETE_LOSSES)}")
        if scheduler.config.num_classes > 256:
            raise ValueError(f"num_classes={scheduler.config.num_classes}, and pictures have 256 levels: use 2 to 256")
        self.scheduler, self.loss, self.T, self.K = scheduler, loss, scheduler.T, scheduler.config.num_classes
        rows = [scheduler.posterior(t, t - 1, eta) for t in range(1, self.T + 1)]
        self._posteriors = torch.tensor([[0.0] * 5, *rows], dtype=_real(device), device=device)
        self._flipped = torch.tensor(1 - scheduler.alpha_bar, dtype=torch.float32, device=device)
        self._prior = prior_nats(scheduler.alpha_bar[-1], self.K)

    def timesteps(self, t: Tensor) -> Tensor:
        """Return the timesteps at which the network is evaluated at times `t` in 1..T, float32 (B,)."""
        return (t - 1).float()

    def seen(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the network's input, (B, C, H, W): `x` itself."""
        return x

    def noised(self, images: Tensor, noise: Tensor, t: Tensor) -> Corrupted:
        """Make tokens x_t of images −1..1 and normal `noise`, both (B, C, H, W), at times `t` in 1..T, (B,)."""
        x0 = quantize(images, self.K)
        flipped = self._flipped[t].view(-1, 1, 1, 1)
        tokens = categorical.noised(x0, categorical.uniforms(noise), flipped, self.K)
        return Corrupted(x0, tokens, self.scheduler.scale_model_input(tokens), t)

    def __call__(self, output: Tensor, batch: Corrupted) -> Tensor:
        """Return the loss of each picture, (B,), from the network's `output` (B, K·C, H, W)."""
        logits = output.float().unflatten(1, (self.K, -1))
        if self.loss == "cross_entropy":
            return cross_entropy(logits, batch.x0, reduction="none").flatten(1).mean(1)
        posterior = categorical.Posterior(*self._posteriors[batch.t].T.view(5, -1, 1, 1, 1, 1))
        nats = step_nats(logits, batch.tokens, batch.x0, posterior) * self.T
        return ((nats.flatten(1).mean(1) + self._prior) * BITS).float()


def quantize(images: Tensor, K: int) -> Tensor:
    """Divide the 256 bytes of images −1..1 into `K` equal parts: tokens, int64."""
    return (((images + 1) * 127.5).round() * (K / 256)).long().clamp_(0, K - 1)


def step_nats(logits: Tensor, x: Tensor, x0: Tensor, posterior: categorical.Posterior) -> Tensor:
    """Return KL(q(x_s|x_t, x_0)‖p(x_s|x_t)) of each token, from logits (B, K, …), x_t and x_0, (B, …), in nats.

    At s = 0 it is −ln p̂(x_0|x_t).
    """
    known = logits.movedim(1, -1).to(_real(logits.device)).softmax(-1)
    q = categorical.reverse(one_hot(x0, known.shape[-1]).to(known), x, posterior)
    p = categorical.reverse(known, x, posterior).clamp_min(1e-30)
    return (torch.xlogy(q, q) - torch.xlogy(q, p)).sum(-1)


def prior_nats(alpha: float, K: int) -> float:
    """Return KL(q(x_T|x_0)‖uniform) of a token, in nats."""
    rest = (1 - alpha) / K
    return (alpha + rest) * math.log(K * (alpha + rest)) + (K - 1) * rest * math.log(K * rest)


@torch.no_grad()
def bound_bits(
    network: Callable[[Tensor, int], Tensor],
    tokens: Tensor,
    scheduler: DiscreteDDIMScheduler,
    generator: torch.Generator,
    eta: float | None = None,
) -> Tensor:
    """Estimate −log₂ p(x_0) ≤ prior + Σ KL over the planned steps of a scheduler, in bits per dimension, (B,).

    Args:
        network: logits of x_0, (B, K·C, H, W), from x_t as the network sees it and a timestep.
        tokens: x_0, (B, C, H, W).
        generator: source of one x_t for each step.
    """
    times = [*(scheduler.timesteps + 1).tolist(), 0]
    nats: Any = prior_nats(scheduler.alpha_bar[times[0]], scheduler.config.num_classes)
    for t, s in pairwise(times):
        noise = torch.randn(tokens.shape, generator=generator, device=generator.device).to(tokens.device)
        x = scheduler.add_noise(tokens, noise, t - 1)
        logits = network(scheduler.scale_model_input(x), t - 1).unflatten(1, (scheduler.config.num_classes, -1))
        nats = nats + step_nats(logits, x, tokens, scheduler.posterior(t, s, eta)).flatten(1).mean(1)
    return nats * BITS


def _real(device: torch.device | str | None) -> torch.dtype:
    """Return float64, in which small differences of probabilities are exact, if the device has it."""
    return torch.float32 if torch.device(device or "cpu").type == "mps" else torch.float64
