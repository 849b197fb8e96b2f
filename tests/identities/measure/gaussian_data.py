"""Data whose likelihood is known, N(MEAN, VARIANCE) in each dimension, and the network that is exact for them."""

import math

import torch
from measure.bound import BITS
from measure.ode import angles_of, time_of
from torch import Generator

from ddim_plugin.process import betas
from ddim_plugin.process.paths import FlowMatching, flow_matching, variance_preserving

MEAN, VARIANCE = 0.3, 0.25
TRUE = 0.5 * math.log(2 * math.pi * math.e * VARIANCE) * BITS  # E −log p of N(MEAN, VARIANCE), for a dimension


def table(T=1000):
    scale = 1000 / T
    return betas.alpha_bar(betas.betas("linear", T, 1e-4 * scale, min(0.02 * scale, 0.999)))


ALPHA = table()
PATH = variance_preserving(ALPHA)
FLOW = flow_matching(1000)


def exact_network(path, kind="epsilon"):
    """ε, or the velocity ε − x_0, of N(MEAN, VARIANCE) at the time t, real or whole."""
    angles = angles_of(path)

    def network(x, t):
        if bool((t == t.round()).all()):
            a, b = (torch.as_tensor(each)[t.long()].view(-1, 1, 1, 1).to(x) for each in path.levels)
        else:  # between times: the inverse of `time_of`
            assert len(set(t.tolist())) == 1
            low, high = 0.0, float(angles[-1])
            for _ in range(60):
                middle = (low + high) / 2
                below = time_of(middle, angles, isinstance(path, FlowMatching)) < float(t[0])
                low, high = (middle, high) if below else (low, middle)
            a, b = math.cos(low), math.sin(low)
            a, b = (a / (a + b), b / (a + b)) if isinstance(path, FlowMatching) else (a, b)
        mean = (a * VARIANCE * (x - a * MEAN)) / (a**2 * VARIANCE + b**2) + MEAN
        eps = b * (x - a * MEAN) / (a**2 * VARIANCE + b**2)
        return eps if kind == "epsilon" else eps - mean

    return network


def data(count, seed=0, shape=(1, 2, 2)):
    x = torch.randn(count, *shape, generator=Generator().manual_seed(seed), dtype=torch.float64)
    return MEAN + math.sqrt(VARIANCE) * x
