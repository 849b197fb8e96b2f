"""The scheduler for categorical data with the best network of a known distribution, by enumeration."""

import pytest
import torch

from ddim_plugin import DiscreteDDIMScheduler

DATA = torch.tensor([0.1, 0.0, 0.65, 0.25], dtype=torch.float64)


@pytest.mark.parametrize("noisiest", ["bayes", "independent"])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("spacing", ["linear", "quadratic", "few_steps", "paper_quadratic"])
def test_the_best_network_samples_the_data(noisiest, eta, spacing):
    """With p̂ = q(x_0|x_t) each x_s has its marginal, and the last is distributed as the data."""
    K, x = 4, torch.arange(4)
    scheduler = DiscreteDDIMScheduler(K, timestep_spacing=spacing, eta=eta, noisiest=noisiest)
    scheduler.set_timesteps(7)
    times = [*(scheduler.timesteps + 1).tolist(), 0]
    alpha = torch.from_numpy(scheduler.alpha_bar)
    marginals = [alpha[t] * DATA + (1 - alpha[t]) / K for t in times]
    p = marginals[0]
    for i, t in enumerate(scheduler.timesteps):
        one = torch.eye(K, dtype=torch.float64)
        joint = (alpha[times[i]] * one + (1 - alpha[times[i]]) / K) * DATA  # x_t, x_0
        p = p @ scheduler.step(joint.log(), t, x).probabilities
        torch.testing.assert_close(p, marginals[i + 1], atol=1e-12, rtol=0)
    torch.testing.assert_close(p, DATA, atol=1e-12, rtol=0)


def test_samples_have_the_probabilities_of_the_step():
    scheduler, N = DiscreteDDIMScheduler(3, eta=0.5), 20000
    scheduler.set_timesteps(4)
    x, t = torch.full((N,), 1), scheduler.timesteps[1]
    logits = torch.tensor([0.3, -0.5, 1.0]).expand(N, 3)
    out = scheduler.step(logits, t, x, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(out.prev_sample, minlength=3) / N
    torch.testing.assert_close(counts, out.probabilities[0], atol=4 * 0.5 / N**0.5, rtol=0)
    noised = scheduler.add_noise(x, torch.randn(N, generator=torch.Generator().manual_seed(1)), t)
    alpha = scheduler.alpha_bar[int(t) + 1]
    expected = torch.tensor([(1 - alpha) / 3, alpha + (1 - alpha) / 3, (1 - alpha) / 3])
    torch.testing.assert_close(torch.bincount(noised) / N, expected.float(), atol=4 * 0.5 / N**0.5, rtol=0)
