"""The stock DDIM scheduler, where it is right: "leading" spacing, at every S that divides T."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from ddim_plugin import GeneralizedDDIMScheduler
from ddim_plugin.process import betas as schedules

DIVISORS = [S for S in range(1, 1001) if 1000 % S == 0]
SHAPE = (2, 3, 4, 4)


def pair(**config):
    """Ours and the stock scheduler of one config, and the stock one again with tables of float64."""
    config = {"timestep_spacing": "leading", "clip_sample": True} | config
    ours, stock, exact = GeneralizedDDIMScheduler(**config), DDIMScheduler(**config), DDIMScheduler(**config)
    betas = schedules.betas(config.get("beta_schedule", "linear"), 1000, ours.config.beta_start, ours.config.beta_end)
    alpha_bar = schedules.alpha_bar(betas)
    if config.get("rescale_betas_zero_snr"):
        alpha_bar = schedules.rescale_zero_terminal_snr(alpha_bar)
    exact.alphas_cumprod = torch.tensor(alpha_bar[1:])
    one = exact.config.set_alpha_to_one
    exact.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64) if one else exact.alphas_cumprod[0]
    return ours, stock, exact


def trajectory(scheduler, network, S, eta, recompute=False):
    scheduler.set_timesteps(S)
    generator = torch.Generator().manual_seed(S)
    x = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    for t in scheduler.timesteps:
        z = torch.randn(SHAPE, generator=generator, dtype=torch.float64) if eta > 0 else None
        out = network(x, int(t))
        x = scheduler.step(out, t, x, eta=eta, use_clipped_model_output=recompute, variance_noise=z).prev_sample
    return x


def check_trajectory(schedulers, network, S, eta):
    """Ours is the stock scheduler with tables of float64, and near to it with its own."""
    ours, stock, exact = schedulers
    x = trajectory(ours, network, S, eta)
    assert torch.allclose(x, trajectory(exact, network, S, eta), rtol=0, atol=1e-6), S
    if S <= 50:
        reference = trajectory(stock, network, S, eta)
        assert (x - reference).norm() <= 1e-3 * reference.norm(), S


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_trajectories_at_every_divisor_of_T(network, prediction_type, eta):
    schedulers = pair(prediction_type=prediction_type)
    for S in DIVISORS if eta == 0.5 else DIVISORS[:-2]:
        check_trajectory(schedulers, network, S, eta)


VARIANTS = {
    "not clipped": {"clip_sample": False, "prediction_type": "v_prediction"},
    "clip range": {"clip_sample_range": 0.4},
    "thresholding": {"thresholding": True, "dynamic_thresholding_ratio": 0.7, "sample_max_value": 1.5},
    "thresholding, plain quantile": {"thresholding": True, "dynamic_thresholding_ratio": 1.0, "sample_max_value": 3.0},
    "zero terminal SNR": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    "zero terminal SNR, x0": {"rescale_betas_zero_snr": True, "prediction_type": "sample"},
    "zero terminal SNR, below the top": {"rescale_betas_zero_snr": True, "prediction_type": "epsilon"},
    "set_alpha_to_one": {"set_alpha_to_one": False},
    "set_alpha_to_one and offset": {"set_alpha_to_one": False, "steps_offset": 1},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "squaredcos_cap_v2": {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
}


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_trajectories_of_other_settings(network, variant, eta):
    schedulers = pair(**VARIANTS[variant])
    for S in (1, 2, 5, 10, 50, 250):
        check_trajectory(schedulers, network, S, eta)


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_zero_terminal_snr_with_the_top_time(network, prediction_type):
    ours, _, exact = pair(rescale_betas_zero_snr=True, prediction_type=prediction_type)
    x = trajectory(ours, network, 1000, 0.5)
    assert torch.allclose(x, trajectory(exact, network, 1000, 0.5), rtol=0, atol=1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(
    "constraint", [{"clip_sample_range": 0.5}, {"thresholding": True, "dynamic_thresholding_ratio": 0.5}]
)
def test_recomputed_eps_after_clipping(network, prediction_type, constraint):
    ours, _, exact = pair(prediction_type=prediction_type, **constraint)

    def loud(x, t):  # so that clipping bites with every prediction type
        return 3 * network(x, t)

    for S in (5, 50):
        x = trajectory(ours, loud, S, 0.5, recompute=True)
        assert torch.allclose(x, trajectory(exact, loud, S, 0.5, recompute=True), rtol=0, atol=1e-6)
        assert not torch.allclose(x, trajectory(ours, loud, S, 0.5), rtol=0, atol=1e-3)


def test_add_noise_and_velocity(network):
    ours, _, exact = pair()
    x0, noise = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64)
    times = torch.tensor([0, 1, 500, 998, 999])
    assert torch.allclose(ours.add_noise(x0, noise, times), exact.add_noise(x0, noise, times), atol=1e-14)
    assert torch.allclose(ours.get_velocity(x0, noise, times), exact.get_velocity(x0, noise, times), atol=1e-14)


def test_tables_agree():
    ours, stock, _ = pair(beta_schedule="scaled_linear", set_alpha_to_one=False)
    for name in ("betas", "alphas", "alphas_cumprod", "final_alpha_cumprod"):
        assert getattr(ours, name).dtype == torch.float32
        assert torch.allclose(getattr(ours, name), getattr(stock, name), rtol=1e-4), name
    assert len(ours) == len(stock) == 1000
    assert np.array_equal(ours.timesteps, stock.timesteps)
