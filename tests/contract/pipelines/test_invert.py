"""Pictures inverted in the pipelines of diffusers, on tiny random networks."""

import copy
import json
import logging
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import tiny_flow_pipelines as flow
import tiny_pipelines as tiny
import torch
from PIL import Image

from ddim_plugin import GeneralizedDDIMScheduler, Inverted, MultistepDDIMScheduler, invert
from ddim_plugin.pipelines.invert import _encode

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
S = 8


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return tiny.Parts(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def pictures():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    return [Image.fromarray(each) for each in pixels]


@pytest.fixture
def trained(monkeypatch):
    """Make a network of ε a denoiser of noise of deviation .3, mixed with its random output."""
    handles = []

    def mix(network, share=0.3):
        table = GeneralizedDDIMScheduler(**SD).alphas_cumprod

        def guess(module, args, kwargs, output):
            x, t = args[0], torch.as_tensor(kwargs.get("timestep", args[1] if len(args) > 1 else 0))
            a = table[t.flatten()[0].long()].to(x)
            exact = (1 - a).sqrt() * x / (0.09 * a + 1 - a)
            known = output[0]
            known[:, : x.shape[1]] = (1 - share) * exact + share * known[:, : x.shape[1]]
            return (known,)

        handles.append(network.register_forward_hook(guess, with_kwargs=True))

    yield mix
    for handle in handles:
        handle.remove()


def pixart(parts):
    texts = dict.fromkeys(("tokenizer", "text_encoder"))
    scheduler = GeneralizedDDIMScheduler(**SD)
    vae = parts.stable_diffusion["vae"]
    pipe = diffusers.PixArtAlphaPipeline(vae=vae, transformer=parts.pixart, scheduler=scheduler, **texts)
    call = {f"{sign}prompt_embeds": tiny.normal(1, 5, 16, seed=i) for i, sign in enumerate(("", "negative_"))}
    call |= {"negative_prompt": None}
    call |= {f"{sign}prompt_attention_mask": torch.ones(1, 5, dtype=torch.long) for sign in ("", "negative_")}
    return pipe, call


def build(name, parts, trained, dtype=torch.float32):
    if name in flow.FLOW_FAMILIES:
        pipe, call = flow.FLOW_FAMILIES[name](flow.STOCK[name](), dtype)
    elif name == "PixArt":
        pipe, call = pixart(parts)
        trained(pipe.transformer)
    else:
        pipe, call = tiny.FAMILIES[name](parts, diffusers.DDIMScheduler(**SD))
        for each in ("unet", "vae") if dtype != torch.float32 else ():
            setattr(pipe, each, torch.nn.Module.to(copy.deepcopy(getattr(pipe, each)), dtype))
        call = {key: value.to(dtype) if isinstance(value, torch.Tensor) else value for key, value in call.items()}
        trained(pipe.unet)
    if name not in flow.FLOW_FAMILIES:
        call["guidance_scale"] = 1.5
    pipe.set_progress_bar_config(disable=True)
    return pipe, {key: value for key, value in call.items() if key not in ("height", "width", "output_type")}


def distance(a, b):
    return float((a - b).float().square().mean().sqrt())


def coded(pipe, pictures):
    pixels = torch.stack([torch.from_numpy(np.asarray(each)).movedim(-1, 0) / 255 for each in pictures])
    with torch.no_grad():
        return _encode(pipe, 2 * pixels - 1)


NAMES = ["Stable Diffusion, text to image", "Stable Diffusion XL", "PixArt", "Stable Diffusion 3", "Flux", "Qwen-Image"]


@pytest.mark.parametrize("name", [*NAMES, "Z-Image", "Wan"])
def test_a_picture_comes_back(name, parts, trained, pictures, tmp_path):
    pipe, call = build(name, parts, trained)
    before = pipe.scheduler
    inverted = invert(pipe, pictures[:1], refinement_steps=9, num_inference_steps=S, **call)
    assert pipe.scheduler is before
    assert inverted.report.converged.all()
    inverted.save(tmp_path / "z.safetensors")
    again = Inverted.load(tmp_path / "z.safetensors")
    assert torch.equal(again.latents, inverted.latents)
    assert again.settings == inverted.settings
    assert np.array_equal(again.report.residual, inverted.report.residual)
    tensors = {key: call[key] for key in again.settings["left_out"]}
    z = again.decode(pipe, output_type="latent", **tensors)
    assert pipe.scheduler is before
    assert distance(z, coded(pipe, pictures[:1])) < 5e-4
    made = again.decode(pipe, output_type="np", **tensors)
    assert np.shape(made)[-3:] == (16, 16, 3)


def test_latents_of_a_variance_exploding_model_are_in_units_of_its_noise(parts, pictures):
    pipe, call = tiny.FAMILIES["Stable Diffusion XL"](parts, diffusers.EDMEulerScheduler(sigma_max=20.0))
    call = {key: value for key, value in call.items() if key not in ("height", "width", "output_type")}
    pipe.set_progress_bar_config(disable=True)
    inverted = invert(pipe, pictures[:1], refinement_steps=9, num_inference_steps=S, guidance_scale=1.0, **call)
    assert inverted.report.converged.all()
    tensors = {key: call[key] for key in inverted.settings["left_out"]}
    assert distance(inverted.decode(pipe, output_type="latent", **tensors), coded(pipe, pictures[:1])) < 1e-3
    assert inverted.latents.std() < 3


HALF = ["Stable Diffusion XL", "Flux", "Wan"]


@pytest.mark.parametrize("name", HALF)
def test_half_precision(name, parts, trained, pictures):
    """The VAE of Stable Diffusion XL overflows in half precision: it is float32 while it encodes."""
    pipe, call = build(name, parts, trained, torch.bfloat16)
    kind = pipe.vae.dtype
    inverted = invert(pipe, pictures[:1], num_inference_steps=S, **call)
    assert pipe.vae.dtype == kind
    assert inverted.latents.dtype == (torch.float32 if name in ("Z-Image", "Wan") else torch.bfloat16)
    tensors = {key: call[key] for key in inverted.settings["left_out"]}
    assert distance(inverted.decode(pipe, output_type="latent", **tensors), coded(pipe, pictures[:1])) < 0.03


def test_an_upcast_vae_is_exact_and_comes_back(parts, trained, pictures, monkeypatch):
    pipe, _ = build("Stable Diffusion XL", parts, trained)
    exact, kinds, encode = coded(pipe, pictures), [], type(pipe.vae).encode
    monkeypatch.setattr(
        type(pipe.vae), "encode", lambda self, x: kinds.append((self.dtype, x.dtype)) or encode(self, x)
    )
    torch.nn.Module.to(pipe.vae, torch.bfloat16)
    try:
        upcast = coded(pipe, pictures)
        assert kinds == [(torch.float32, torch.float32)]
        assert pipe.vae.dtype == torch.bfloat16
        assert distance(upcast, exact) < 0.01 * float(exact.std())
        monkeypatch.setattr(type(pipe.vae), "encode", lambda self, x: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            coded(pipe, pictures)
        assert pipe.vae.dtype == torch.bfloat16
    finally:
        torch.nn.Module.to(pipe.vae, torch.float32)


@pytest.mark.parametrize("statistics", [False, True])
def test_latents_are_those_of_image_to_image(statistics, parts, pictures):
    """The mode of the distribution in the units of diffusers' own pipelines."""
    vae = diffusers.AutoencoderKL.from_config(parts.stable_diffusion["vae"].config).eval()
    if statistics:
        vae.register_to_config(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0], scaling_factor=0.5)
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline(
        scheduler=diffusers.DDIMScheduler(**SD), **tiny._xl(parts) | {"vae": vae}
    )
    x = pipe.image_processor.preprocess(pictures)
    with torch.no_grad():
        vae.config.get("force_upcast")
        mode = vae.encode(x).latent_dist.mode()
        ours = _encode(pipe, x)
    config = vae.config
    mean, std = (
        torch.tensor(config.get(key) or value) for key, value in (("latents_mean", [0.0]), ("latents_std", [1.0]))
    )
    expected = (mode - mean.view(1, -1, 1, 1)) * config.scaling_factor / std.view(1, -1, 1, 1)
    assert torch.allclose(ours, expected, atol=1e-6)


def text_to_image(parts, trained):
    pipe, _ = build("Stable Diffusion, text to image", parts, trained)
    return pipe


def test_prompts_for_many_pictures(parts, trained, pictures):
    pipe = text_to_image(parts, trained)
    call = {"num_inference_steps": 4, "guidance_scale": 1.2, "refinement_steps": 6}
    one = invert(pipe, pictures, "a cat", **call)
    each = invert(pipe, pictures, ["a cat", "a dog"], **call)
    alone = invert(pipe, pictures[1], "a dog", **call)
    assert distance(one.latents[0], each.latents[0]) < 1e-4
    assert distance(each.latents[1], alone.latents[0]) < 1e-4
    assert distance(one.latents[1], each.latents[1]) > 1e-3
    edited = each.decode(pipe, "a fox", output_type="np")
    assert edited.shape == (2, 16, 16, 3)
    assert np.abs(edited - each.decode(pipe, output_type="np")).max() > 0.001
    embedded, _ = pipe.encode_prompt("a fox", "cpu", 1, False)
    assert np.allclose(
        edited, each.decode(pipe, prompt_embeds=embedded, negative_prompt="", output_type="np"), atol=1e-5
    )
    with pytest.raises(ValueError, match=r"3 of prompt do not fit 2 picture\(s\)"):
        invert(pipe, pictures, ["a", "b", "c"], **call)
    assert isinstance(pipe.scheduler, diffusers.DDIMScheduler)
    assert each.settings["call"]["prompt"] == ["a cat", "a dog"]
    assert invert(pipe, pictures[0], **call).settings["call"]["prompt"] == ""


def test_settings_are_json_and_tensors_are_passed_again(parts, trained, pictures):
    pipe = text_to_image(parts, trained)
    embeds, empty = pipe.encode_prompt("a cat", "cpu", 1, True)
    call = {"prompt_embeds": embeds, "negative_prompt_embeds": empty, "guidance_scale": 2.0, "clip_skip": None}
    seen = []
    inverted = invert(
        pipe,
        pictures[0],
        num_inference_steps=4,
        callback_on_step_end=lambda pipe, i, t, known: seen.append(i) or known,
        **call,
    )
    assert len(seen) > 4
    settings = json.loads(json.dumps(inverted.settings))
    assert settings == inverted.settings
    assert settings["left_out"] == ["prompt_embeds", "negative_prompt_embeds"]
    assert settings["call"]["num_inference_steps"] == 4
    assert (settings["call"]["height"], settings["call"]["width"]) == (16, 16)
    with pytest.raises(ValueError, match="had prompt_embeds, negative_prompt_embeds, which is not kept"):
        inverted.decode(pipe)
    inverted.decode(pipe, prompt_embeds=embeds, negative_prompt_embeds=empty)
    with pytest.raises(ValueError, match="had negative_prompt_embeds, which is not kept"):
        inverted.decode(pipe, "a dog")
    inverted.decode(pipe, "a dog", negative_prompt_embeds=empty)


def test_defaults_of_the_call_are_kept(parts, trained, pictures):
    pipe = text_to_image(parts, trained)
    call = invert(pipe, pictures[0], "a cat", refinement_steps=None, strength=0.1).settings["call"]
    assert (call["guidance_scale"], call["num_inference_steps"]) == (7.5, 50)


def test_part_of_the_process(parts, trained, pictures):
    """Less strength stays nearer to the picture, and takes fewer evaluations."""
    pipe = text_to_image(parts, trained)
    call = {"num_inference_steps": 5, "guidance_scale": 1.5, "refinement_steps": 9}
    whole, part = (invert(pipe, pictures, "a cat", strength=strength, **call) for strength in (1.0, 0.4))
    assert len(whole.report.timesteps) == 5
    assert len(part.report.timesteps) == 2
    assert part.report.timesteps.max() < 400
    z = coded(pipe, pictures)
    assert distance(part.decode(pipe, output_type="latent"), z) < 1e-3
    changes = [distance(each.decode(pipe, "a dog", output_type="latent"), z) for each in (part, whole)]
    assert changes[0] < changes[1]


@pytest.mark.parametrize("steps", [None, 0, 9])
def test_a_multistep_scheduler(steps, parts, trained, pictures):
    pipe = text_to_image(parts, lambda network: trained(network, share=0.03))
    pipe.scheduler = MultistepDDIMScheduler.from_config(pipe.scheduler.config)
    call = {"num_inference_steps": 20, "guidance_scale": 1.0}
    inverted = invert(pipe, pictures, "a cat", refinement_steps=steps, **call)
    assert inverted.settings["scheduler"]["_ddim_plugin"]["class"] == "MultistepDDIMScheduler"
    z = inverted.decode(pipe, output_type="latent")
    assert (inverted.report is None) is not bool(steps)
    assert distance(z, coded(pipe, pictures)) < (0.04 if steps else 0.1)


def test_pictures_that_do_not_converge_are_reported_once(parts, trained, pictures, caplog):
    pipe = text_to_image(parts, trained)
    with caplog.at_level(logging.WARNING, "ddim_plugin"):
        inverted = invert(pipe, pictures, "a cat", tolerance=1e-12, num_inference_steps=4)
    messages = [each.getMessage() for each in caplog.records if each.name == "ddim_plugin"]
    assert len(messages) == 1
    assert messages[0].startswith("2 of 2 images did not converge")
    assert not inverted.report.converged.any()
    caplog.clear()
    with caplog.at_level(logging.WARNING, "ddim_plugin"):
        plain = invert(pipe, pictures, "a cat", refinement_steps=None, num_inference_steps=4)
    assert plain.report is None
    assert [each for each in caplog.records if each.name == "ddim_plugin"] == []


def test_refusals_before_a_network_runs(parts, trained, pictures, monkeypatch):
    pipe = text_to_image(parts, trained)
    monkeypatch.setattr(type(pipe.vae), "encode", lambda *args: pytest.fail("encoded"))
    for changes, message in (
        ({"strength": 0}, r"strength must lie in \(0, 1\].* not 0 and"),
        ({"strength": 1.5}, r"strength must lie in \(0, 1\].* not 1.5 and"),
        ({"denoising_end": 0.8}, "denoising_end cannot be passed on"),
        ({"refinement_steps": -1}, "refinement_steps must be 0 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            invert(pipe, pictures, "a cat", **changes)
    wrong = Image.new("RGB", (17, 16))
    with pytest.raises(ValueError, match=r"16×17 \(height × width\): crop or resize them to multiples of 2"):
        invert(pipe, wrong, "a cat")
    with pytest.raises(ValueError, match="crop or resize it"):
        invert(pipe, [pictures[0], wrong], "a cat")
    pipe.scheduler = GeneralizedDDIMScheduler.from_config(pipe.scheduler.config, eta=1.0)
    with pytest.raises(ValueError, match="with eta=1, .*: pass eta=0, 'fixed_small'"):
        invert(pipe, pictures, "a cat")
    packed, _ = build("Flux", parts, trained)
    with pytest.raises(ValueError, match=r"16×18 \(height × width\): .* multiples of 4"):
        invert(packed, Image.new("RGB", (18, 16)), "a cat")


@pytest.mark.parametrize("name", ["Stable Diffusion, image to image", "DDIMPipeline", "Flux, image to image"])
def test_pipelines_that_do_not_begin_with_latents(name, parts, trained, pictures):
    pipe, _ = build(name, parts, lambda network: None)
    with pytest.raises(ValueError, match=f"{type(pipe).__name__} does not begin with latents"):
        invert(pipe, pictures, "a cat")


def test_latents_of_another_kind(tmp_path):
    from safetensors.torch import save_file

    save_file({"latents": torch.zeros(1, 4, 8, 8)}, tmp_path / "z.safetensors")
    found = Inverted.load(tmp_path / "z.safetensors")
    assert found.latents.shape == (1, 4, 8, 8)
    with pytest.raises(ValueError, match="have no settings of an inversion"):
        found.decode(None)


def test_the_scheduler_comes_back_after_an_error(parts, trained, pictures):
    pipe = text_to_image(parts, trained)
    before = pipe.scheduler

    def stop(*args):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        invert(pipe, pictures, "a cat", num_inference_steps=2, callback_on_step_end=stop)
    assert pipe.scheduler is before
    inverted = invert(pipe, pictures, "a cat", num_inference_steps=2, refinement_steps=0)
    with pytest.raises(KeyboardInterrupt):
        inverted.decode(pipe, callback_on_step_end=stop)
    assert pipe.scheduler is before


def test_steps_that_are_given_replace_those_of_the_file(parts, pictures):
    pipe, _ = tiny.text_to_image(parts, GeneralizedDDIMScheduler(**SD))
    pipe.set_progress_bar_config(disable=True)
    times = [900, 500, 20]
    by_count, by_times = (
        invert(pipe, pictures, "a cat", refinement_steps=0, **steps)
        for steps in ({"num_inference_steps": 3}, {"timesteps": times})
    )
    assert "num_inference_steps" not in by_count.call(pipe, timesteps=times)
    assert "timesteps" not in by_times.call(pipe, num_inference_steps=3)
    replaced = replace(by_times, latents=by_count.latents).decode(pipe, num_inference_steps=3, output_type="np")
    assert np.array_equal(replaced, by_count.decode(pipe, output_type="np"))
    part = invert(pipe, pictures, "a cat", refinement_steps=0, strength=0.5, num_inference_steps=4)
    for steps in ({"num_inference_steps": 3}, {"timesteps": times}):
        with pytest.raises(ValueError, match=f"belong to their inversion's steps: leave out {next(iter(steps))}"):
            part.decode(pipe, **steps)


@pytest.mark.parametrize(("cls", "strength"), [(GeneralizedDDIMScheduler, 0.5), (MultistepDDIMScheduler, 1.0)])
def test_corrections_close_the_round_trip_at_another_guidance(cls, strength, parts, trained, pictures, tmp_path):
    pipe, _ = tiny.text_to_image(parts, cls(**SD))
    pipe.set_progress_bar_config(disable=True)
    trained(pipe.unet)
    z_0 = _encode(
        pipe, torch.stack([torch.tensor(np.array(each)) for each in pictures]).permute(0, 3, 1, 2) / 127.5 - 1
    )
    call = {"num_inference_steps": S, "guidance_scale": 1.0, "strength": strength}
    plain = invert(pipe, pictures, "a cat", **call)
    found = invert(pipe, pictures, "a cat", decode_with={"guidance_scale": 7.5}, **call)
    assert torch.equal(found.latents, plain.latents)
    assert found.corrections.shape == (S * strength, *z_0.shape)
    found.save(tmp_path / "found.safetensors")
    found = Inverted.load(tmp_path / "found.safetensors")
    missed = plain.decode(pipe, guidance_scale=7.5, output_type="latent") - z_0
    closed = found.decode(pipe, output_type="latent") - z_0
    assert closed.abs().max() < 1e-2 * missed.abs().max()  # this network amplifies rounding at guidance 7.5
    assert pipe.scheduler.step.__name__ == "step"
    assert not torch.equal(found.decode(pipe, "a dog", output_type="latent"), found.decode(pipe, output_type="latent"))
    with pytest.raises(ValueError, match="belong to their inversion's steps: leave out num_inference_steps"):
        found.decode(pipe, num_inference_steps=S + 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"decode_with": {"num_inference_steps": 3}}, "num_inference_steps cannot be passed on"),
        ({"decode_with": {"eta": 1.0}}, "eta cannot be passed on"),
        ({"guidance": 7.5}, "guidance cannot be passed on to StableDiffusionPipeline"),
        ({"latents": None, "output_type": "pil"}, "latents, output_type cannot be passed on"),
        ({"tolerance": float("nan")}, "tolerance be 0 or more, not 1.0 and nan"),
        ({"strength": "1"}, "strength must lie in"),
        ({"prompt": []}, r"0 of prompt do not fit 2 picture\(s\)"),
    ],
)
def test_arguments_that_do_not_fit(call, message, parts, pictures):
    pipe, _ = tiny.text_to_image(parts, GeneralizedDDIMScheduler(**SD))
    with pytest.raises(ValueError, match=message):
        invert(pipe, pictures, num_inference_steps=S, **call)
