"""Networks with self-conditioning: the loop, what has no inverse, and what opens their folders."""

import json

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler, MultistepDDIMScheduler, fit_solver
from ddim_plugin.pipelines.loop import SELF_CONDITIONING


@pytest.fixture
def make_fed(make_pipe, make_unet):
    def build(scheduler=None, channels=1, **config):
        marked = {SELF_CONDITIONING: True} | config
        return make_pipe(scheduler, make_unet(channels=2 * channels, out_channels=channels, **marked))

    return build


def noise(B, channels=1, seed=0):
    return torch.randn(B, channels, 8, 8, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def by_hand(pipe, x, S, **labels):
    """Each evaluation sees x̂0 of the last, and the first sees 0."""
    guess = torch.zeros_like(x)
    pipe.scheduler.set_timesteps(S, eta=0.0)
    for t in pipe.scheduler.timesteps:
        step = pipe.scheduler.step(pipe.unet(torch.cat([x, guess], 1), t, **labels).sample, t, x)
        x, guess = step.prev_sample, step.pred_original_sample.clamp(-1, 1)
    return x


@pytest.mark.parametrize("cls", [GeneralizedDDIMScheduler, MultistepDDIMScheduler])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_loop_gives_the_network_its_last_guess(make_fed, cls, channels):
    pipe, x = make_fed(cls(prediction_type="v_prediction"), channels), noise(3, channels)
    expected = by_hand(pipe, x, 5)
    assert pipe.image_channels == channels
    assert torch.equal(pipe(3, 5, latents=x, output_type="latent").images, expected)
    assert torch.equal(pipe.decode(x, 5, batch_size=3, output_type="latent"), expected)
    assert torch.allclose(pipe.decode(x, 5, batch_size=2, output_type="latent"), expected, atol=1e-5)
    assert pipe(2, 3, output_type="pt").images.shape == (2, channels, 8, 8)
    assert pipe.interpolate(x[0], x[1], 3, num_inference_steps=3, output_type="pt").shape == (3, channels, 8, 8)


def test_guidance_sees_the_guess_of_both(make_fed):
    pipe, x = make_fed(num_class_embeds=3), noise(2)
    labels = {"class_labels": torch.tensor([1, 0])}
    same = pipe(2, 4, latents=x, output_type="latent", **labels).images
    assert torch.equal(same, by_hand(pipe, x, 4, **labels))
    guided = pipe(2, 4, latents=x, guidance_scale=1 + 1e-6, output_type="latent", **labels).images
    assert torch.allclose(guided, same, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(make_fed, dtype):
    pipe, x = make_fed(GeneralizedDDIMScheduler(prediction_type="v_prediction")), noise(2)
    whole = pipe(2, 4, latents=x, output_type="latent").images
    half = pipe.to(dtype)(2, 4, latents=x, output_type="latent").images
    assert torch.allclose(half, whole, atol=0.05 * float(whole.abs().max()))


def test_no_step_has_an_inverse(make_fed):
    pipe = make_fed()
    for method in (pipe.encode, pipe.reconstruct):
        with pytest.raises(ValueError, match="so no step has an inverse"):
            method(torch.rand(1, 1, 8, 8), 3)


def test_schedulers_of_diffusers_are_refused(make_fed):
    with pytest.raises(ValueError, match="self-conditioning need a GeneralizedDDIMScheduler"):
        make_fed(DDIMScheduler())(1, 3)


def test_channels_that_do_not_fit_the_mark(make_pipe, make_unet):
    for config in ({"channels": 2, "out_channels": 1}, {"channels": 1, SELF_CONDITIONING: True}):
        with pytest.raises(ValueError, match="the network predicts"):
            make_pipe(unet=make_unet(**config))(1, 3)


def test_only_ours_opens_the_folder(make_fed, tmp_path, quiet_diffusers):
    """A stock pipeline would give the network noise for x̂0."""
    pipe, x = make_fed(), noise(1)
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "GeneralizedDDIMPipeline"
    again = GeneralizedDDIMPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert quiet_diffusers == []
    made, known = again(1, 3, latents=x, output_type="latent").images, by_hand(pipe, x, 3)
    assert (made - known).abs().max() <= 1e-5 * known.abs().max()  # weights of a file may lie elsewhere in memory
    with pytest.raises((AttributeError, ValueError)):
        DiffusionPipeline.from_pretrained(tmp_path)


def test_a_solver_is_fitted_in_the_loop(make_fed):
    """The network sees its own guesses there too, and what is kept is nearer on other images."""
    pipe = make_fed(GeneralizedDDIMScheduler(prediction_type="v_prediction"))
    found = fit_solver(pipe, [4], 8, teacher_steps=20)
    kept = pipe.scheduler.config.fitted_solvers or {}
    assert ("4" in kept) == (found[4]["error"] < found[4]["default_error"])
    assert pipe(2, 4, output_type="latent").images.isfinite().all()
