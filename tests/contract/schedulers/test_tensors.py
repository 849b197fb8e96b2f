"""Tensor work of a step: thresholds, learned deviations, and the precision of sums."""

import math

import pytest
import torch

from ddim_plugin.schedulers.step import combine, learned_log_variance, threshold


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.995, 1.0])
def test_threshold_is_the_quantile(ratio):
    x0 = 2 * torch.randn(5, 3, 7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    s = torch.quantile(x0.abs().flatten(1), ratio, dim=1).clamp(1, 2.5).view(-1, 1, 1, 1)
    assert torch.allclose(threshold(x0, ratio, 2.5), x0.clamp(-s, s) / s, atol=1e-12)


def test_learned_std_interpolates_logarithms():
    low, high = math.log(0.01), math.log(0.04)
    ends = learned_log_variance(torch.tensor([-1.0, 0.0, 1.0]), (low, high))
    assert (0.5 * ends).exp().tolist() == pytest.approx([0.1, math.sqrt(0.02), 0.2])


def test_combine_is_float32_at_least():
    x = torch.randn(4, dtype=torch.float16)
    assert combine(0.5, x, 0.25, x).dtype == torch.float32
    assert combine(0.5, x.double(), 0.25, x).dtype == torch.float64
