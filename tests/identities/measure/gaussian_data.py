"""Data whose likelihood is known, N(MEAN, VARIANCE) in each dimension, and the network that is exact for them."""

import math

import numpy as np
import torch
from measure.bound import BITS
from measure.ode import time_of
from torch import Generator

from ddim_plugin.process import betas

MEAN, VARIANCE = 0.3, 0.25
TRUE = 0.5 * math.log(2 * math.pi * math.e * VARIANCE) * BITS  # E −log p of N(MEAN, VARIANCE), for a dimension


def table(T=1000):
    scale = 1000 / T
    return betas.alpha_bar(betas.betas("linear", T, 1e-4 * scale, min(0.02 * scale, 0.999)))


ALPHA = table()


def exact_network(alpha_bar):
    """ε of N(MEAN, VARIANCE) at the paper's time t, real or whole."""
    angles = np.arccos(np.sqrt(alpha_bar))

    def network(x, t):
        if bool((t == t.round()).all()):
            a = torch.as_tensor(alpha_bar)[t.long()]
        else:  # between times: the inverse of `time_of`
            assert len(set(t.tolist())) == 1
            low, high = 0.0, float(angles[-1])
            for _ in range(60):
                middle = (low + high) / 2
                low, high = (middle, high) if time_of(middle, angles) < float(t[0]) else (low, middle)
            a = torch.full_like(t, math.cos(low) ** 2)
        a = a.view(-1, 1, 1, 1).to(x)
        return (1 - a).sqrt() * (x - a.sqrt() * MEAN) / (a * VARIANCE + 1 - a)

    return network


def data(count, seed=0, shape=(1, 2, 2)):
    x = torch.randn(count, *shape, generator=Generator().manual_seed(seed), dtype=torch.float64)
    return MEAN + math.sqrt(VARIANCE) * x
