"""Tensor work of a step: thresholds, learned deviations, and the precision of sums."""

import math

import pytest
import torch

from ddim_plugin.process import predictions as p
from ddim_plugin.process.paths import Level
from ddim_plugin.schedulers.tensors import combine, learned_log_variance, threshold


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.995, 1.0])
def test_threshold_is_the_quantile(ratio):
    x0 = 2 * torch.randn(5, 3, 7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    s = torch.quantile(x0.abs().flatten(1), ratio, dim=1).clamp(1, 2.5).view(-1, 1, 1, 1)
    assert torch.allclose(threshold(x0, ratio, 2.5), x0.clamp(-s, s) / s, atol=1e-12)


def test_clipped_x0_and_recomputed_eps_agree_on_x():
    x, out = torch.randn(2, 4, 3, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    m = p.prediction("epsilon", Level(0.3**0.5, 0.7**0.5))
    x0 = combine(m.x0_x, x, m.x0_out, out).clamp(-0.5, 0.5)
    a, b = p.eps_from_x0(Level(0.3**0.5, 0.7**0.5))
    eps = combine(a, x, b, x0)
    assert torch.allclose(0.3**0.5 * x0 + 0.7**0.5 * eps, x)


def test_learned_std_interpolates_logarithms():
    low, high = math.log(0.01), math.log(0.04)
    ends = learned_log_variance(torch.tensor([-1.0, 0.0, 1.0]), (low, high))
    assert (0.5 * ends).exp().tolist() == pytest.approx([0.1, math.sqrt(0.02), 0.2])


def test_combine_is_float32_at_least():
    x = torch.randn(4, dtype=torch.float16)
    assert combine(0.5, x, 0.25, x).dtype == torch.float32
    assert combine(0.5, x.double(), 0.25, x).dtype == torch.float64
