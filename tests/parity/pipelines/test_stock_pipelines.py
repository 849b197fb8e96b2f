"""Our scheduler inside the stock pipelines, where a user's checkpoint already lives."""

import diffusers
import numpy as np
import pytest
import tiny_stable_diffusion
import torch
from diffusers import DDIMScheduler

from ddim_plugin import GeneralizedDDIMScheduler, MultistepDDIMScheduler, restore_scheduler


def seeded():
    return torch.Generator().manual_seed(11)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_ddpm_pipeline(make_unet):
    """With η = 1 on the full chain ours is Ho's sampler with its smaller variance: the stock DDPM scheduler's.

    Ho's mean is a mixture of the clipped x̂0 and x_t, which is to recompute ε̂ after clipping.
    """
    unet = make_unet()
    stock = diffusers.DDPMScheduler(num_train_timesteps=60, beta_end=0.3, clip_sample=True)
    ours = GeneralizedDDIMScheduler.from_config(stock.config, eta=1.0, clip_sample=True, use_clipped_model_output=True)
    expected = quiet(diffusers.DDPMPipeline(unet, stock))(2, seeded(), 60, output_type="np").images
    images = quiet(diffusers.DDPMPipeline(unet, ours))(2, seeded(), 60, output_type="np").images
    assert np.abs(images - expected).max() < 1e-3


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_ddim_pipeline(make_unet, eta):
    """The stock pipeline replaces any scheduler it is built with: ours is assigned afterwards."""
    unet, stock = make_unet(channels=3), DDIMScheduler()
    expected = quiet(diffusers.DDIMPipeline(unet, stock))(2, seeded(), eta, 10, output_type="np").images
    pipe = quiet(diffusers.DDIMPipeline(unet, stock))
    pipe.scheduler = GeneralizedDDIMScheduler.from_config(stock.config, timestep_spacing="leading", clip_sample=True)
    images = pipe(2, seeded(), eta, 10, output_type="np").images
    assert np.abs(images - expected).max() < 1e-3


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    """The parts of Stable Diffusion, tiny and randomly initialised."""
    return tiny_stable_diffusion.parts(tmp_path_factory.mktemp("tokenizer"))


SD = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_text_to_image(stable_diffusion, eta, prediction_type, quiet_diffusers, recwarn):
    stock = DDIMScheduler(**SD, prediction_type=prediction_type)
    ours = GeneralizedDDIMScheduler.from_config(stock.config, timestep_spacing="leading")
    call = {"num_inference_steps": 7, "guidance_scale": 4.0, "eta": eta, "height": 16, "width": 16, "output_type": "np"}
    pipe = quiet(diffusers.StableDiffusionPipeline(scheduler=stock, **stable_diffusion))
    expected = pipe("a cat", generator=seeded(), **call).images
    quiet_diffusers.clear()
    pipe.scheduler = ours
    assert np.abs(pipe("a cat", generator=seeded(), **call).images - expected).max() < 2e-3
    built = quiet(diffusers.StableDiffusionPipeline(scheduler=ours, **stable_diffusion))
    assert np.abs(built("a cat", generator=seeded(), **call).images - expected).max() < 2e-3
    assert [message for message in quiet_diffusers if "scheduler" in message.lower()] == []
    assert [str(w.message) for w in recwarn if "scheduler" in str(w.message).lower()] == []


def test_text_to_image_with_times_of_ones_own(stable_diffusion):
    ours = GeneralizedDDIMScheduler.from_config(DDIMScheduler(**SD).config, eta=0.0, timestep_spacing="quadratic")
    pipe = quiet(diffusers.StableDiffusionPipeline(scheduler=ours, **stable_diffusion))
    images = pipe("a dog", timesteps=[901, 400, 33], height=16, width=16, output_type="np").images
    assert images.shape == (1, 16, 16, 3)
    assert np.isfinite(images).all()
    assert pipe.scheduler.timesteps.tolist() == [901, 400, 33]


@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
def test_image_to_image(stable_diffusion, strength):
    stock = DDIMScheduler(**SD)
    ours = GeneralizedDDIMScheduler.from_config(stock.config, timestep_spacing="leading")
    image = torch.rand(1, 3, 16, 16, generator=seeded())
    call = {"image": image, "strength": strength, "num_inference_steps": 10, "guidance_scale": 3.0, "output_type": "np"}
    pipe = quiet(diffusers.StableDiffusionImg2ImgPipeline(scheduler=stock, **stable_diffusion))
    expected = pipe("a cat", generator=seeded(), **call).images
    pipe.scheduler = ours
    assert np.abs(pipe("a cat", generator=seeded(), **call).images - expected).max() < 2e-3


def test_stable_diffusion_keeps_our_scheduler_on_disk(stable_diffusion, tmp_path):
    ours = GeneralizedDDIMScheduler.from_config(DDIMScheduler(**SD).config, eta=0.2, timestep_spacing="quadratic")
    diffusers.StableDiffusionPipeline(scheduler=ours, **stable_diffusion).save_pretrained(tmp_path)
    loaded = quiet(diffusers.StableDiffusionPipeline.from_pretrained(tmp_path))
    assert type(loaded.scheduler) is DDIMScheduler  # so that it opens without this package
    assert isinstance(restore_scheduler(loaded).scheduler, GeneralizedDDIMScheduler)
    assert loaded.scheduler.config.eta == 0.2
    assert loaded.scheduler.config.timestep_spacing == "quadratic"
    for key in [key for key in ours.config if not key.startswith("_")]:
        assert loaded.scheduler.config[key] == ours.config[key], key


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_few_steps_with_guidance(stable_diffusion, prediction_type, quiet_diffusers):
    """Nearer to what many steps make than DDIM in as many steps, in pipelines that know nothing of it."""
    stock = DDIMScheduler(**SD, prediction_type=prediction_type, timestep_spacing="trailing")
    pipe = quiet(diffusers.StableDiffusionPipeline(scheduler=stock, **stable_diffusion))
    call = {"guidance_scale": 3.0, "height": 16, "width": 16, "output_type": "np"}

    def images(scheduler, steps):
        pipe.scheduler = scheduler
        return pipe("a cat", generator=seeded(), num_inference_steps=steps, **call).images

    solution = images(MultistepDDIMScheduler.from_config(stock.config, timestep_spacing="trailing"), 250)
    few = MultistepDDIMScheduler.from_config(stock.config)
    assert few.config.steps_offset == 0
    distances = [np.abs(images(each, 10) - solution).mean() for each in (few, stock)]
    assert distances[0] < {"epsilon": 0.9, "v_prediction": 0.4}[prediction_type] * distances[1]
    half = quiet(diffusers.StableDiffusionImg2ImgPipeline(scheduler=few, **stable_diffusion))
    image = torch.rand(1, 3, 16, 16, generator=seeded())
    made = half("a cat", image=image, strength=0.5, num_inference_steps=8, output_type="np", generator=seeded()).images
    assert np.isfinite(made).all()
    assert [message for message in quiet_diffusers if "scheduler" in message.lower()] == []
