"""diffusers' own schedulers of EDM: the same σ, timesteps and samples, and their configs there and back."""

import json

import diffusers
import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler

from ddim_plugin import GeneralizedDDIMScheduler, InverseDDIMScheduler, MultistepDDIMScheduler

CASES = [
    {},
    {"sigma_data": 1.0, "prediction_type": "v_prediction", "sigma_schedule": "exponential", "sigma_max": 120.0},
    {"sigma_data": 0.7, "rho": 5.0, "sigma_min": 0.01},
]


def public(config):
    return {key: value for key, value in config.items() if not key.startswith("_")}


def run(scheduler, x):
    for t in scheduler.timesteps:
        output = torch.tanh(2 * scheduler.scale_model_input(x, t) + t)
        x = scheduler.step(output, t, x).prev_sample
    return x


@pytest.mark.parametrize("S", [2, 7, 18, 40])
@pytest.mark.parametrize("config", CASES)
def test_without_noise_it_is_euler(config, S):
    stock = EDMEulerScheduler(**config)
    ours = GeneralizedDDIMScheduler.from_config(stock.config)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(S)
    assert torch.allclose(ours.timesteps, stock.timesteps, atol=3e-7)
    assert torch.allclose(ours.sigmas, stock.sigmas, rtol=1e-6)
    x = 80 * torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(run(ours, x), run(stock, x), atol=2e-5)


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("config", CASES)
@pytest.mark.parametrize("stock_cls", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
@pytest.mark.parametrize("cls", [GeneralizedDDIMScheduler, MultistepDDIMScheduler, InverseDDIMScheduler])
def test_configs_there_and_back(cls, stock_cls, config, loaded, tmp_path, quiet_diffusers):
    stock = stock_cls(**config)
    stock = stock_cls.from_config(stock.config) if loaded else stock
    ours = cls.from_config(stock.config, **{} if cls is InverseDDIMScheduler else {"eta": 0.3})
    kind = config.get("prediction_type", "edm")
    assert (ours.config.prediction_type, ours.config.sigma_data) == (kind, config.get("sigma_data", 0.5))
    ours.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"] == stock_cls.__name__
    for back in (stock_cls.from_config(ours.config), stock_cls.from_pretrained(tmp_path)):
        assert public(back.config) == public(stock.config)
        assert public(cls.from_config(back.config).config) == public(ours.config)
    for again in (cls.from_pretrained(tmp_path), cls.from_config(ours.config)):
        assert public(again.config) == public(ours.config)
    assert quiet_diffusers == []


def test_relatives_of_another_noise_are_refused():
    """Their networks have other inputs, though their settings have these names."""
    known = public(EDMEulerScheduler().config) | {"solver_order": 2, "lower_order_final": True}
    for config in (known, known | {"_class_name": "CosineDPMSolverMultistepScheduler"}):
        with pytest.raises(ValueError, match="belongs to another family of models"):
            GeneralizedDDIMScheduler.from_config(config)
    with pytest.raises(ValueError, match="belongs to another family of models"):
        GeneralizedDDIMScheduler.from_config(diffusers.CMStochasticIterativeScheduler().config)


@pytest.mark.parametrize("stock_cls", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
def test_the_spacing_is_their_sigma_schedule(stock_cls, tmp_path):
    """In both directions, and if it is changed on either side."""
    ours = GeneralizedDDIMScheduler.from_config(stock_cls().config, sigma_schedule="exponential")
    assert ours.config.timestep_spacing == "exponential"
    stock = stock_cls.from_config(ours.config)
    assert stock.config.sigma_schedule == "exponential"
    stock_cls.from_config(stock.config, sigma_schedule="karras").save_pretrained(tmp_path)
    assert GeneralizedDDIMScheduler.from_pretrained(tmp_path).config.timestep_spacing == "karras"
    ours.register_to_config(timestep_spacing="linear")  # not one of theirs
    ours.save_pretrained(tmp_path)
    again = GeneralizedDDIMScheduler.from_config(stock_cls.from_pretrained(tmp_path).config)
    assert again.config.timestep_spacing == "linear"
