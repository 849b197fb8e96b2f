"""The multistep scheduler converges to the ODE of Eq. 14 with its order, and to the SDE with noise."""

import itertools

import numpy as np
import pytest
import torch
from exact import exact_pipe
from oracle import Gaussian, Mixture

from ddim_plugin import GeneralizedDDIMScheduler, MultistepDDIMScheduler

ALPHA = GeneralizedDDIMScheduler().alpha_bar


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("even", [True, False])
def test_orders_of_the_scheduler(order, even):
    """On Gaussian data, from T to another time, on even and uneven grids: the error falls as S^−order."""
    errors = []
    for S in (40, 80, 160):
        betas = np.linspace(1e-4 / 16, 0.02 / 16, 16_000)[:12_001]
        scheduler = MultistepDDIMScheduler(12_001, trained_betas=betas.tolist(), solver_order=order)
        data = Gaussian(0.3, 0.25, scheduler.alpha_bar)
        grid = np.linspace(12_000, 1_000, S + 1) if even else np.geomspace(12_000, 1_000, S + 1).round()
        scheduler.set_timesteps(timesteps=[int(t) for t in grid])
        x = start = torch.linspace(-2, 2, 4, dtype=torch.float64).view(1, 1, 2, 2)
        largest = 0.0
        for t, s in itertools.pairwise(scheduler.timesteps):
            x = scheduler.step(data.eps(x, int(t) + 1), t, x).prev_sample
            largest = max(largest, float((x - data.solution(start, int(grid[0]) + 1, int(s) + 1)).abs().max()))
        errors.append(largest)
    found = np.log2(errors[0] / errors[2]) / 2
    assert found > order - 0.25
    assert found < order + 0.4


def test_higher_orders_are_nearer():
    data = Mixture((0.3, 0.7), (-0.6, 0.8), (0.1, 0.3), ALPHA)
    x = torch.linspace(-2, 2, 16, dtype=torch.float64).view(1, 1, 4, 4)

    def images(scheduler, S):
        return exact_pipe(data, scheduler)(latents=x, num_inference_steps=S, output_type="pt").images

    exact = images(MultistepDDIMScheduler(timestep_spacing="quadratic"), 500)
    errors = []
    for order in (1, 2, 3):
        scheduler = MultistepDDIMScheduler(solver_order=order, timestep_spacing="quadratic")
        errors.append(float((images(scheduler, 25) - exact).abs().max()))
    assert errors[0] > 2 * errors[1]
    assert errors[1] > 1.2 * errors[2]


def test_with_noise_the_mean_is_that_of_the_sde():
    """Second order: what x̂0 that is linear in log-SNR leads to in one move, and in many small ones of order 1."""
    alpha_bar = MultistepDDIMScheduler().alpha_bar
    lam = np.log(alpha_bar[1:] / (1 - alpha_bar[1:]))
    x, z = torch.zeros(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)

    def x0(t):
        return torch.full_like(x, lam[t] / 10)

    def mean(scheduler, times, given):
        scheduler.set_timesteps(timesteps=times)
        y = given
        for t in scheduler.timesteps[:-1]:
            y = scheduler.step(x0(int(t)), t, y, **noise).prev_sample
        return y

    noise = {"eta": 1.0, "variance_noise": z}
    small = mean(GeneralizedDDIMScheduler(prediction_type="sample"), list(range(600, 399, -1)), x)
    scheduler = MultistepDDIMScheduler(prediction_type="sample")
    scheduler.set_timesteps(timesteps=[700, 600, 400, 100])
    scheduler.step(x0(700), scheduler.timesteps[0], x, **noise)
    found = scheduler.step(x0(600), scheduler.timesteps[1], x, **noise).prev_sample
    assert found.item() == pytest.approx(small.item(), rel=0.02)
    first = GeneralizedDDIMScheduler(prediction_type="sample")
    first.set_timesteps(timesteps=[600, 400, 100])
    assert first.step(x0(600), 600, x, **noise).prev_sample.item() != pytest.approx(small.item(), rel=0.2)
