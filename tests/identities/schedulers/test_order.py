"""On data whose exact ε is known in closed form, DDIM converges to the ODE of Eq. 14 with order 1."""

import itertools
import math

import numpy as np
import pytest
import torch
from oracle import Gaussian, Mixture, alphas, linear_betas
from scipy.integrate import solve_ivp

from ddim_plugin import GeneralizedDDIMScheduler


def ddim(data, x_T, S, spacing):
    scheduler = GeneralizedDDIMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(S)
    x = torch.tensor(x_T)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.as_tensor(data.eps(x.numpy(), int(t) + 1)), t, x).prev_sample
    return x.numpy()


def orders(data, x_T, exact, spacing, steps):
    errors = [np.abs(ddim(data, x_T, S, spacing) - exact).max() for S in steps]
    return [math.log2(a / b) for a, b in itertools.pairwise(errors)], errors


@pytest.mark.parametrize("spacing", ["linear", "quadratic"])
def test_order_1_on_a_gaussian(spacing):
    alpha = alphas(linear_betas())
    data = Gaussian(0.4, 0.3, alpha)
    x_T = np.linspace(-2.5, 2.5, 11)
    measured, errors = orders(data, x_T, data.solution(x_T, 1000, 0), spacing, (31, 62, 125, 250))
    assert errors[-1] < 0.02
    assert measured[-1] == pytest.approx(1, abs=0.15)
    assert measured[-2] == pytest.approx(1, abs=0.25)


def test_order_1_on_a_mixture():
    """The reference solves dx̄ = ε dς between the two ends in ς = √(1/ᾱ − 1) with an adaptive solver of order 8."""
    alpha = alphas(linear_betas())
    data = Mixture((0.3, 0.7), (-0.9, 0.8), (0.02, 0.05), alpha)
    x_T = np.linspace(-2.0, 2.0, 9)

    def slope(nsr, x_bar):
        return data.eps_at(x_bar / math.sqrt(1 + nsr**2), 1 / (1 + nsr**2))

    top = math.sqrt(1 / alpha[1000] - 1)
    path = solve_ivp(slope, (top, 0.0), x_T / math.sqrt(alpha[1000]), method="DOP853", rtol=1e-10, atol=1e-10)
    measured, errors = orders(data, x_T, path.y[:, -1], "linear", (62, 125, 250, 500))
    assert errors[-1] < 0.02
    assert measured[-1] == pytest.approx(1, abs=0.1)
