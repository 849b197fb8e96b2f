"""EDM (Karras et al. 2022): its networks are v-prediction on another path, and its churn is σ(η)."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddim_plugin import (
    GeneralizedDDIMScheduler,
    InverseDDIMScheduler,
    InverseMultistepDDIMScheduler,
    MultistepDDIMScheduler,
)
from ddim_plugin.process import moves, spacings
from ddim_plugin.process.betas import from_alpha_bars
from ddim_plugin.process.moves import prediction
from ddim_plugin.process.paths import Level, variance_exploding

SIGMA, DATA = st.floats(1e-3, 100), st.floats(0.1, 2)
T = 12


@given(SIGMA, DATA, st.floats(-2, 2), st.floats(-2, 2))
def test_the_output_is_v_of_scaled_data_with_the_other_sign(sigma, data, x, output):
    """c_in·x is x_0/σ_d on the paper's path at √ᾱ = σ_d·c_in. For σ_d = 1 nothing is scaled."""
    c_in = 1 / math.hypot(sigma, data)
    ours = prediction("edm", Level(1.0, sigma), data)
    of_v = prediction("v_prediction", Level(data * c_in, sigma * c_in))
    x0, eps = ours.x0_x * x + ours.x0_out * output, ours.eps_x * x + ours.eps_out * output
    assert x0 == pytest.approx(data * (of_v.x0_x * c_in * x - of_v.x0_out * output), rel=1e-9, abs=1e-12)
    assert eps == pytest.approx(of_v.eps_x * c_in * x - of_v.eps_out * output, rel=1e-9, abs=1e-9)
    skip, out = data**2 / (sigma**2 + data**2), sigma * data / math.sqrt(sigma**2 + data**2)
    assert x0 == pytest.approx(skip * x + out * output, rel=1e-9, abs=1e-12)  # Eq. 7
    negative = prediction("v_prediction", Level(1.0, sigma), data)
    assert negative == pytest.approx((ours.x0_x, -ours.x0_out, ours.eps_x, -ours.eps_out))


def network(seen, place):
    return 0.4 * torch.sin(seen + place)


def run(scheduler, x, noises, sign=1):
    """The loop of a pipeline, with a network that sees its input and the place of its timestep."""
    known = sorted(set(scheduler.timesteps.tolist()))
    for t, z in zip(scheduler.timesteps, noises, strict=False):
        output = sign * network(scheduler.scale_model_input(x, t), known.index(t.item()))
        noise = {"variance_noise": z} if scheduler.config.eta else {}
        x = scheduler.step(output, t, x, **noise).prev_sample
    return x


@pytest.mark.parametrize(
    ("cls", "config", "data"),
    [
        (GeneralizedDDIMScheduler, {}, 0.5),
        (GeneralizedDDIMScheduler, {"eta": 0.6}, 0.5),
        (GeneralizedDDIMScheduler, {"eta": 1.0}, 1.3),
        (MultistepDDIMScheduler, {}, 1.0),
        (MultistepDDIMScheduler, {"eta": 1.0}, 0.5),
        (InverseDDIMScheduler, {"refinement_steps": 3}, 1.0),
        (InverseMultistepDDIMScheduler, {"refinement_steps": 2}, 1.0),
    ],
)
def test_whole_chains_are_those_of_v_prediction(cls, config, data):
    """With the factor √(σ² + σ_d²) between the samples, for every scheduler, noise and method."""
    edm = cls(T, prediction_type="edm", sigma_data=data, sigma_min=0.02, sigma_max=30.0, **config)
    levels = np.array([edm.path.level(t).noise for t in range(1, T + 1)])
    alpha_bar = data**2 / (levels**2 + data**2)
    of_v = cls(T, prediction_type="v_prediction", trained_betas=from_alpha_bars(alpha_bar).tolist(), **config)
    edm.set_timesteps(timesteps=[edm.path.timestep(t) for t in range(T, 0, -1)])
    of_v.set_timesteps(timesteps=list(range(T - 1, -1, -1)))
    assert len(edm.timesteps) == len(of_v.timesteps)
    x, *noises = torch.randn(1 + T, 2, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    top = math.sqrt(levels[-1] ** 2 + data**2)
    first, last = (data, 1 / top) if "Inverse" in cls.__name__ else (top, 1 / data)
    found = run(edm, first * x, noises * 9)
    expected = run(of_v, x, noises * 9, sign=-1)
    assert torch.allclose(last * found, expected, rtol=1e-5, atol=2e-6)


@given(SIGMA, st.floats(0.01, 0.999), st.floats(0, 1), st.floats(-2, 2), st.floats(-2, 2))
def test_churn_is_eta(sigma, share, eta, x, x0):
    """Noise up to σ̂ = (1 + γ)·σ and an Euler step to s, for one x̂0: mean and variance of q_σ (Eq. 12)."""
    s = share * sigma
    higher = sigma / math.sqrt(1 - eta**2 * (1 - share**2))  # (1 + γ)·σ
    mean = x + (s - higher) * (x - x0) / higher
    variance = (s / higher) ** 2 * (higher**2 - sigma**2)
    t, end = Level(1.0, sigma), Level(1.0, s)
    ours = x0 + moves.eps_coefficient(t, end, eta) * (x - x0) / sigma
    assert ours == pytest.approx(mean, rel=1e-9, abs=1e-9)
    assert moves.sigma(t, end, eta) ** 2 == pytest.approx(variance, rel=1e-6, abs=1e-9 * s**2)
    if eta == 1:
        assert higher == pytest.approx(sigma**2 / s)


@given(st.integers(2, 40), st.floats(1e-3, 0.5), st.floats(1, 100), st.floats(1, 9))
def test_the_spacing_of_karras(S, low, high, rho):
    levels = spacings.SIGMAS["karras"](S, low, high, rho)
    a, b = high ** (1 / rho), low ** (1 / rho)
    assert levels == pytest.approx(np.array([(a + i / (S - 1) * (b - a)) ** rho for i in range(S)]))
    path = variance_exploding(1000, low, high, 0.5)
    times = path.at(levels)
    assert [path.level(t).noise for t in times] == pytest.approx(levels.tolist(), rel=1e-9)
    assert [path.time(path.timestep(t)) for t in times] == pytest.approx(times.tolist(), rel=1e-9)
    assert path.timestep(times[0]) == pytest.approx(math.log(high) / 4)


@pytest.mark.parametrize(
    ("cls", "S", "eta"),
    [(MultistepDDIMScheduler, 12, 0.0), *((GeneralizedDDIMScheduler, 400, eta) for eta in (0.0, 0.5, 1.0))],
)
def test_gaussian_data_are_sampled(cls, S, eta):
    """With the exact network: mean and deviation of N(0.3, 0.5²)."""
    config = {} if cls is MultistepDDIMScheduler else {"timestep_spacing": "karras"}
    scheduler = cls(prediction_type="edm", sigma_data=0.5, eta=eta, **config)
    scheduler.set_timesteps(S)
    generator = torch.Generator().manual_seed(0)
    x = scheduler.init_noise_sigma * torch.randn(4000, 1, 1, 1, generator=generator, dtype=torch.float64)
    for t in scheduler.timesteps:
        sigma, seen = math.exp(4 * t.double().item()), scheduler.scale_model_input(x, t)
        skip, out = (0.25 / (sigma**2 + 0.25), 0.5 * sigma / math.sqrt(sigma**2 + 0.25))
        x0 = (0.25 * x + 0.3 * sigma**2) / (sigma**2 + 0.25)
        assert torch.allclose(seen, x / math.sqrt(sigma**2 + 0.25), rtol=1e-5)
        x = scheduler.step((x0 - skip * x) / out, t, x, generator=generator).prev_sample
    assert (float(x.mean()), float(x.std())) == pytest.approx((0.3, 0.5), abs=0.04)
