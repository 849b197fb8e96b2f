"""Networks of EDM: what is refused, and what the loop sees."""

import json
import math

import numpy as np
import pytest
import torch
from diffusers import EDMEulerScheduler

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler, MultistepDDIMScheduler

EDM = {"prediction_type": "edm", "sigma_data": 0.5}
KEPT = "GeneralizedDDIMPipeline"  # no stock pipeline fits


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"prediction_type": "edm"}, "take a positive sigma_data, and no others, not None and 'edm'"),
        (EDM | {"sigma_data": 0.0}, "positive sigma_data.* not 0.0"),
        (EDM | {"sigma_data": -1.0}, "positive sigma_data.* not -1.0"),
        (EDM | {"sigma_data": math.inf}, "positive sigma_data.* not inf"),
        (EDM | {"sigma_data": "0.5"}, "positive sigma_data.* not '0.5'"),
        (EDM | {"prediction_type": "epsilon"}, "no others, not 0.5 and 'epsilon'"),
        (EDM | {"prediction_type": "score", "sigma_max": 9.0}, "no others, not 0.5 and 'score'"),
        (EDM | {"sigma_min": 9.0, "sigma_max": 3.0}, "sigma_min must be positive and less than sigma_max"),
        (EDM | {"beta_end": 0.03}, "beta_end=0.03 has no effect on variance exploding"),
        (EDM | {"shift": 3.0}, "shift=3.0 has no effect on variance exploding"),
        (EDM | {"variance_type": "learned_range"}, "needs a β schedule, not variance exploding"),
        ({"sigma_data": 0.5, "prediction_type": "flow_prediction"}, "sigma_data=0.5 has no effect on flow matching"),
        ({"timestep_spacing": "karras"}, "for the path of a β schedule 'karras': use one of linear"),
        (
            {"timestep_spacing": "exponential", "prediction_type": "flow_prediction"},
            "for flow matching 'exponential': use one of linear, few_steps",
        ),
    ],
)
@pytest.mark.parametrize("cls", [GeneralizedDDIMScheduler, MultistepDDIMScheduler])
def test_settings(cls, config, message):
    with pytest.raises(ValueError, match=message):
        cls(**config)


def test_the_defaults_are_those_of_diffusers():
    scheduler = GeneralizedDDIMScheduler(**EDM)
    assert (scheduler.config.sigma_min, scheduler.config.sigma_max) == (0.002, 80.0)
    assert scheduler.image_range == (-1.0, 1.0)
    scheduler.set_timesteps(10)
    assert scheduler.init_noise_sigma == pytest.approx(80.0)
    assert scheduler.timesteps == pytest.approx(np.log(scheduler.sigmas[:-1].double()) / 4, abs=1e-6)


@pytest.mark.parametrize("config", [EDM, {"prediction_type": "score", "sigma_min": 0.002, "sigma_max": 80.0}])
def test_the_spacings_of_sigma(config):
    """On every path of variance exploding."""
    for name, between in (("karras", 2.515), ("exponential", 0.4)):
        scheduler = GeneralizedDDIMScheduler(**config, timestep_spacing=name)
        scheduler.set_timesteps(3)
        assert scheduler.sigmas.tolist() == pytest.approx([80.0, between, 0.002, 0.0], rel=2e-3)
        scheduler.set_timesteps(1)
        assert scheduler.sigmas.tolist() == pytest.approx([80.0, 0.0])
        with pytest.raises(ValueError, match="num_inference_steps must be an integer from 1 to 1000, not 0"):
            scheduler.set_timesteps(0)


def test_explicit_timesteps_and_noise_at_them():
    scheduler = GeneralizedDDIMScheduler(**EDM)
    times = [math.log(sigma) / 4 for sigma in (20.0, 1.0, 0.01)]
    scheduler.set_timesteps(timesteps=times)
    assert scheduler.sigmas.tolist() == pytest.approx([20.0, 1.0, 0.01, 0.0], rel=1e-6)
    x, z = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    noisy = scheduler.add_noise(x, z, torch.tensor([*times[:2], math.log(3) / 4]))
    sigma = torch.tensor([20.0, 1.0, 3.0], dtype=torch.float64).view(3, 1, 1, 1)
    assert torch.allclose(noisy, x + sigma * z, rtol=1e-5)
    for bad in ([1.2], [0.1, 0.2], [-1.6]):
        with pytest.raises(ValueError, match=r"is outside -1.55.*1.09|in descending order"):
            scheduler.set_timesteps(timesteps=bad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_networks_input_has_unit_variance(dtype):
    """One timestep, or one for each sample. A path without sigma_data leaves x_t as it is."""
    scheduler, x = GeneralizedDDIMScheduler(**EDM), torch.ones(2, 1, 2, 2, dtype=dtype)
    scheduler.set_timesteps(3)
    t, low = scheduler.timesteps[0], scheduler.timesteps[2]
    seen = scheduler.scale_model_input(x, torch.stack([t, low]))
    assert seen.dtype == dtype
    expected = [1 / math.hypot(sigma, 0.5) for sigma in scheduler.sigmas[[0, 2]].tolist()]
    assert seen[:, 0, 0, 0].tolist() == pytest.approx(expected, rel=2e-3)
    assert torch.equal(scheduler.scale_model_input(x, t)[0], seen[0])
    assert torch.equal(scheduler.scale_model_input(x, float(t))[0], seen[0])
    assert GeneralizedDDIMScheduler().scale_model_input(x, 5) is x
    frames, times = x[:1, None].expand(1, 2, 1, 2, 2), torch.stack([t, low])[None]  # (B, T), one for each frame
    assert torch.equal(scheduler.scale_model_input(frames, times)[0], seen)


@pytest.mark.parametrize("rho", [0, -7.0, math.nan])
def test_rho_is_positive(rho):
    scheduler = GeneralizedDDIMScheduler.from_config(EDMEulerScheduler().config, rho=rho)
    with pytest.raises(ValueError, match="rho must be positive, not"):
        scheduler.set_timesteps(5)


def test_nothing_is_read_on_the_host(refuse_host_reads):
    scheduler, x = GeneralizedDDIMScheduler(**EDM, timestep_spacing="karras", eta=0.5), torch.randn(2, 1, 4, 4)
    scheduler.set_timesteps(5)
    with refuse_host_reads:
        for t in scheduler.timesteps:
            x = scheduler.step(torch.tanh(scheduler.scale_model_input(x, t)), t, x, return_dict=False)[0]


def test_a_pipeline_saves_encodes_and_decodes(make_unet, tmp_path, quiet_diffusers):
    pipe = GeneralizedDDIMPipeline(make_unet(), GeneralizedDDIMScheduler(**EDM, timestep_spacing="karras"))
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert (index["_class_name"], index["scheduler"]) == (KEPT, ["diffusers", "EDMEulerScheduler"])
    again = GeneralizedDDIMPipeline.from_pretrained(tmp_path)
    assert quiet_diffusers == []
    images = []
    for each in (pipe, again):
        each.set_progress_bar_config(disable=True)
        images.append(each(2, 8, output_type="pt", generator=torch.Generator().manual_seed(0)).images)
    assert torch.equal(*images)
    assert images[0].isfinite().all()
    picture = 0.2 + 0.6 * torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    z = again.encode(picture, 8, refinement_steps=20)
    assert z.std() < 3
    assert torch.allclose(again.decode(z, 8, output_type="pt"), picture, atol=1e-4)


@pytest.mark.parametrize("cls", [GeneralizedDDIMScheduler, MultistepDDIMScheduler])
def test_a_process_that_ends_above_the_data_is_refused(cls):
    with pytest.raises(ValueError, match="final_sigmas_type='sigma_min' ends above the data: set it to 'zero'"):
        cls.from_config(EDMEulerScheduler(final_sigmas_type="sigma_min").config)
