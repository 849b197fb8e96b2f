"""Bits of pictures: the likelihood of 8-bit images under Gaussians, and divergences."""

import math

import torch
from torch import Tensor

BITS = 1 / math.log(2)  # bits in a nat
BIN = 1 / 255  # half the width of one of the 256 levels of an image in −1..1


def kl(mean_q: Tensor, log_variance_q: Tensor, mean_p: Tensor, log_variance_p: Tensor) -> Tensor:
    """Compute KL(N(mean_q, exp log_variance_q) ‖ N(mean_p, exp log_variance_p)) of each element, in nats."""
    ratio = log_variance_q - log_variance_p
    return 0.5 * (torch.expm1(ratio) - ratio + (mean_q - mean_p).square() * torch.exp(-log_variance_p))


def discretized_log_likelihood(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Compute the log-probability of each pixel's bin under N(mean, std²), in nats (Ho et al. 2020, Eq. 13).

    `x` holds 8-bit images in −1..1. The 256 levels are the middles of bins, and the first and the last bin are open.
    It is exact in both tails, where the probability itself is 0 in float32. All tensors broadcast.
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
