"""The pipeline's call."""

import inspect
import itertools

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

import ddim_plugin
from ddim_plugin import GeneralizedDDIMScheduler, MultistepDDIMScheduler


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# ---- what comes out --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 8), (1, (8, 12)), (3, (12, 8))])
def test_output_types_and_shapes(make_pipe, channels, size):
    pipe = make_pipe(channels=channels, size=size)
    height, width = (size, size) if isinstance(size, int) else size
    call = {"batch_size": 2, "num_inference_steps": 3, "generator": None}
    outputs = {
        kind: pipe(**call | {"generator": generators(1, 2)}, output_type=kind).images
        for kind in ("pil", "np", "pt", "latent")
    }
    assert outputs["latent"].shape == outputs["pt"].shape == (2, channels, height, width)
    assert torch.equal(outputs["pt"], (outputs["latent"] / 2 + 0.5).clamp(0, 1))
    assert outputs["np"].shape == (2, height, width, channels)
    assert np.array_equal(outputs["np"], outputs["pt"].permute(0, 2, 3, 1).numpy())
    assert all(isinstance(image, Image.Image) for image in outputs["pil"])
    assert outputs["pil"][0].mode == ("L" if channels == 1 else "RGB")
    assert outputs["pil"][0].size == (width, height)
    pixels = np.asarray(outputs["pil"][1]).reshape(height, width, channels)
    assert np.array_equal(pixels, (outputs["np"][1] * 255).round().astype("uint8"))


def test_the_loop_is_the_plain_loop(make_pipe):
    pipe = make_pipe()
    images = pipe(batch_size=2, num_inference_steps=7, generator=generators(3, 4), output_type="latent").images
    x = torch.cat([torch.randn(1, 1, 8, 8, generator=g) for g in generators(3, 4)])
    scheduler = GeneralizedDDIMScheduler()
    scheduler.set_timesteps(7)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(pipe.unet(x, t).sample, t, x).prev_sample
    assert torch.equal(images, x)
    assert torch.equal(
        pipe(batch_size=2, num_inference_steps=7, generator=generators(3, 4), return_dict=False, output_type="latent")[
            0
        ],
        x,
    )


def test_explicit_times_are_those_of_the_name(make_pipe):
    pipe = make_pipe()
    by_name = pipe(num_inference_steps=4, generator=generators(1), output_type="latent").images
    for times in ([999, 749, 499, 249], torch.tensor([999, 749, 499, 249])):
        assert torch.equal(pipe(timesteps=times, generator=generators(1), output_type="latent").images, by_name)


@pytest.mark.parametrize(("T", "steps"), [(1000, 50), (20, 20)])
def test_default_steps(make_pipe, T, steps):
    pipe = make_pipe(GeneralizedDDIMScheduler(num_train_timesteps=T, beta_schedule="squaredcos_cap_v2"))
    pipe()
    assert pipe.scheduler.num_inference_steps == steps


def test_eta_none_is_the_schedulers(make_pipe):
    pipe = make_pipe(GeneralizedDDIMScheduler(eta=1.0))
    call = {"num_inference_steps": 5, "output_type": "latent"}
    own = pipe(generator=generators(1), **call).images
    assert torch.equal(pipe(generator=generators(1), eta=1.0, **call).images, own)
    quiet = pipe(generator=generators(1), eta=0.0, **call).images
    assert not torch.equal(quiet, own)
    assert torch.equal(make_pipe()(generator=generators(1), **call).images, quiet)


@pytest.mark.parametrize(
    "scheduler", [{"eta": 0.7}, {"variance_type": "fixed_large"}, {"eta": 1.0, "clip_sample": True}]
)
def test_the_same_generator_gives_the_same_image_in_any_batch(make_pipe, scheduler):
    pipe = make_pipe(GeneralizedDDIMScheduler(**scheduler))

    def run(*seeds):
        return pipe(
            batch_size=len(seeds), num_inference_steps=5, generator=generators(*seeds), output_type="latent"
        ).images

    together = run(1, 2, 3)
    assert torch.allclose(run(3, 1), together[[2, 0]], rtol=1e-4, atol=1e-4)
    assert torch.allclose(run(2), together[[1]], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=0.1)


def test_latents(make_pipe):
    pipe = make_pipe()
    x_T = torch.randn(3, 1, 8, 8)
    kept = x_T.clone()
    first = pipe(latents=x_T, num_inference_steps=5, output_type="latent").images
    assert torch.equal(x_T, kept)
    assert torch.equal(pipe(3, latents=x_T, num_inference_steps=5, output_type="latent").images, first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scheduler", [{}, {"eta": 1.0}, {"timestep_spacing": "quadratic", "clip_sample": True}])
def test_half_precision(make_pipe, dtype, scheduler):
    pipe = make_pipe(GeneralizedDDIMScheduler(**scheduler))
    call = {"batch_size": 2, "num_inference_steps": 20}
    full = pipe(generator=generators(1, 2), output_type="np", **call).images
    pipe.to(dtype=dtype)
    assert pipe.unet.dtype == dtype
    half = pipe(generator=generators(1, 2), output_type="np", **call).images
    assert np.isfinite(half).all()
    others = pipe(generator=generators(3, 4), output_type="np", **call).images
    assert np.abs(half - full).mean() < 0.5 * np.abs(others - full).mean()
    assert pipe(output_type="pil", **call).images[0].mode == "L"


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_loop_reads_nothing_on_the_host(make_pipe, refuse_host_reads, eta):
    pipe = make_pipe()
    with refuse_host_reads:
        assert pipe(2, 5, eta=eta, output_type="pt").images.shape == (2, 1, 8, 8)


# ---- labels and guidance ---------------------------------------------------------------------------------------


def test_class_labels(make_pipe):
    pipe = make_pipe(num_class_embeds=4)
    call = {"num_inference_steps": 4, "output_type": "latent"}
    one = pipe(batch_size=2, class_labels=1, generator=generators(1, 2), **call).images
    for labels in ([1, 1], torch.tensor([1, 1]), np.array([1, 1])):
        assert torch.equal(pipe(batch_size=2, class_labels=labels, generator=generators(1, 2), **call).images, one)
    mixed = pipe(batch_size=2, class_labels=[1, 2], generator=generators(1, 2), **call).images
    assert torch.allclose(mixed[0], one[0], atol=1e-4)
    assert not torch.allclose(mixed[1], one[1], atol=1e-3)


def test_labels_of_a_custom_embedding_are_vectors(make_pipe):
    """(B, D), guided and in batches, each image as if it were alone."""
    pipe = make_pipe(class_embed_type="identity")
    labels = torch.randn(3, pipe.unet.time_embedding.linear_2.out_features)
    z = torch.randn(3, 1, 8, 8)
    for guidance in ({}, {"guidance_scale": 2.0, "null_class_label": 0}):
        alone = [
            pipe.decode(z[i : i + 1], 3, class_labels=labels[i : i + 1], output_type="pt", **guidance) for i in (0, 2)
        ]
        found = pipe.decode(z, 3, class_labels=labels, batch_size=2, output_type="pt", **guidance)
        assert torch.allclose(found[[0, 2]], torch.cat(alone), atol=1e-3)


def test_guidance_mixes_class_and_null(make_pipe):
    pipe = make_pipe(num_class_embeds=4)
    x_T = torch.randn(2, 1, 8, 8)
    call = {"latents": x_T, "timesteps": [500], "output_type": "latent"}
    scheduler = GeneralizedDDIMScheduler()
    scheduler.set_timesteps(timesteps=[500])
    with torch.no_grad():
        labels, null = torch.tensor([1, 2]), torch.tensor([3, 3])
        cond, free = (pipe.unet(x_T, 500, class_labels=c).sample for c in (labels, null))
    expected = scheduler.step(free + 2.5 * (cond - free), 500, x_T).prev_sample
    guided = pipe(class_labels=[1, 2], guidance_scale=2.5, **call).images
    assert torch.allclose(guided, expected, atol=1e-3)
    assert torch.allclose(pipe(class_labels=[1, 2], guidance_scale=2.5, null_class_label=3, **call).images, guided)
    plain = pipe(class_labels=[1, 2], **call).images
    assert torch.allclose(plain, scheduler.step(cond, 500, x_T).prev_sample, atol=1e-3)


def test_learned_variance_with_guidance(make_pipe):
    pipe = make_pipe(GeneralizedDDIMScheduler(variance_type="learned_range"), num_class_embeds=3, out_channels=2)
    images = pipe(2, 5, class_labels=[0, 1], guidance_scale=2.0, generator=generators(1, 2), output_type="pt").images
    assert images.shape == (2, 1, 8, 8)
    assert torch.isfinite(images).all()


# ---- callbacks and progress ------------------------------------------------------------------------------------


def test_callback_sees_x_t_x0_and_eps(make_pipe):
    pipe = make_pipe()
    seen = []

    def callback(pipe_, i, t, tensors):
        seen.append((i, int(t), {key: value.clone() for key, value in tensors.items()}))
        return {}

    final = pipe(num_inference_steps=4, generator=generators(1), callback_on_step_end=callback, output_type="latent")
    assert [(i, t) for i, t, _ in seen] == [(0, 999), (1, 749), (2, 499), (3, 249)]
    assert torch.equal(seen[-1][2]["latents"], final.images)
    for (_, t, now), (_, _, then) in itertools.pairwise(seen):
        assert torch.equal(now["latents"], then["sample"])
        a = pipe.scheduler.alphas_cumprod[t]
        x = a.sqrt() * now["pred_original_sample"] + (1 - a).sqrt() * now["pred_epsilon"]
        assert torch.allclose(x, now["sample"], atol=1e-3)


def test_callback_may_change_the_sample(make_pipe):
    pipe = make_pipe()
    zeros = torch.zeros(1, 1, 8, 8)

    def callback(pipe_, i, t, tensors):
        assert set(tensors) == {"latents"}
        return {"latents": zeros} if i == 3 else None

    call = {"num_inference_steps": 4, "callback_on_step_end_tensor_inputs": ["latents"], "output_type": "latent"}
    assert torch.equal(pipe(callback_on_step_end=callback, **call).images, zeros)


@pytest.mark.parametrize("after", [0, 2])
def test_a_callback_may_end_the_steps(make_pipe, after):
    """As in the pipelines of diffusers: `pipe._interrupt = True`."""
    pipe, seen = make_pipe(), []

    def callback(pipe, i, t, tensors):
        seen.append(tensors["latents"])
        pipe._interrupt = i == after
        return {}

    images = pipe(1, 5, generator=torch.Generator().manual_seed(0), callback_on_step_end=callback, output_type="latent")
    assert len(seen) == after + 1
    assert torch.equal(images.images, seen[-1])
    whole = pipe(
        1, 5, generator=torch.Generator().manual_seed(0), output_type="latent"
    ).images  # the next call is whole
    assert not torch.equal(whole, seen[-1])


@pytest.mark.parametrize("scheduler", [GeneralizedDDIMScheduler(), MultistepDDIMScheduler(), DDIMScheduler()])
@pytest.mark.parametrize("output_type", ["pil", "np"])
def test_images_with_nan_are_an_error(make_pipe, make_unet, scheduler, output_type):
    """Not a black picture: the network overflowed, or its weights are broken."""
    unet = make_unet()
    torch.nn.init.constant_(unet.conv_out.bias, float("nan"))
    pipe = make_pipe(scheduler, unet)
    with pytest.raises(ValueError, match="the output of the network or classifier is not finite: in half precision"):
        pipe(2, 3, output_type=output_type)
    assert torch.isnan(pipe(2, 3, output_type="latent").images).all()  # numbers show it by themselves
    if not isinstance(scheduler, DDIMScheduler):
        with pytest.raises(ValueError, match="not finite"):
            pipe.decode(torch.randn(1, 1, 8, 8), num_inference_steps=3, output_type=output_type)


@pytest.mark.parametrize("config", [{"eta": 1.0}, {"variance_type": "fixed_large"}, {"eta": 0.4}])
def test_the_calls_zero_is_a_zero(make_pipe, config):
    """Through `step` a zero is "not said", in our call it is said."""
    call = {"batch_size": 2, "num_inference_steps": 4, "output_type": "pt"}
    quiet, plain = make_pipe(GeneralizedDDIMScheduler(**config)), make_pipe()
    for steps in ({}, {"num_inference_steps": None, "timesteps": [900, 500, 100]}):
        images = quiet(generator=generators(1, 2), eta=0.0, **call | steps).images
        assert torch.equal(images, plain(generator=generators(1, 2), **call | steps).images)
        assert not torch.equal(images, quiet(generator=generators(1, 2), **call | steps).images)
    one = quiet(generator=[torch.Generator().manual_seed(3)], **call).images  # a list of one serves the batch
    assert torch.equal(one, quiet(generator=torch.Generator().manual_seed(3), **call).images)


def test_progress_bar(make_pipe, capfd):
    pipe = make_pipe()
    pipe.set_progress_bar_config(disable=False)
    pipe(num_inference_steps=6)
    assert "6/6" in capfd.readouterr().err


# ---- other schedulers ------------------------------------------------------------------------------------------

STOCK = [
    "DDIMScheduler",
    "DDPMScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "IPNDMScheduler",
    "SASolverScheduler",
]


@pytest.mark.parametrize("name", STOCK)
def test_any_scheduler_of_diffusers(make_pipe, name):
    cls = getattr(diffusers, name)
    pipe = make_pipe(cls())
    images = pipe(2, 8, generator=torch.Generator().manual_seed(0), output_type="latent").images

    scheduler, generator = cls(), torch.Generator().manual_seed(0)
    scheduler.set_timesteps(8)
    noise = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    with torch.no_grad():
        x = torch.randn(2, 1, 8, 8, generator=generator) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            output = pipe.unet(scheduler.scale_model_input(x, t), t).sample
            x = scheduler.step(output, t, x, **noise).prev_sample
    assert torch.allclose(images, x, rtol=1e-4, atol=1e-4)


def test_the_stock_ddim_scheduler_gives_the_stock_pipelines_images(make_pipe):
    pipe = make_pipe(diffusers.DDIMScheduler())
    stock = diffusers.DDIMPipeline(pipe.unet, diffusers.DDIMScheduler())
    stock.set_progress_bar_config(disable=True)
    for eta in (0.0, 0.5):
        ours = pipe(2, 5, eta=eta, generator=torch.Generator().manual_seed(5), output_type="np").images
        theirs = stock(2, torch.Generator().manual_seed(5), eta, 5, output_type="np").images
        assert np.array_equal(ours, theirs)


def test_a_learned_variance_is_dropped_for_samplers_that_know_none(make_pipe):
    pipe = make_pipe(diffusers.DDIMScheduler(), out_channels=2)
    assert pipe(2, 3, output_type="pt").images.shape == (2, 1, 8, 8)
    pipe = make_pipe(diffusers.DDPMScheduler(variance_type="learned_range"), out_channels=2)
    assert pipe(2, 3, output_type="pt").images.shape == (2, 1, 8, 8)


# ---- bad input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, "from 1 to 1000"),
        ({"num_inference_steps": 1001}, "not 1001"),
        ({"timesteps": [1, 2]}, "descending order"),
        ({"timesteps": [3, 2], "num_inference_steps": 3}, "either num_inference_steps or timesteps"),
        ({"eta": -0.5}, "eta must be a non-negative number, not -0.5"),
        ({"eta": 7.0}, "eta=7 is too large for the step from time 1000"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, not 0"),
        ({"batch_size": 1.5}, "not 1.5"),
        ({"batch_size": 2.0}, "not 2.0"),
        ({"timesteps": 5}, "must be a list of integers, not 5"),
        ({"timesteps": torch.tensor(5)}, "must be a list of integers"),
        ({"eta": "x"}, "eta must be a non-negative number, not 'x'"),
        ({"generator": 3}, "must be a torch.Generator or a list of them, not 3"),
        ({"latents": np.zeros((1, 1, 8, 8))}, "latents must be a torch tensor .*, not ndarray"),
        ({"latents": torch.zeros(0, 1, 8, 8)}, "with B ≥ 1"),
        ({"output_type": "jpg"}, "unknown output_type 'jpg': use one of pil, np, pt, latent"),
        ({"generator": generators(1, 2), "batch_size": 3}, "2 generators for a batch of 3"),
        ({"latents": torch.zeros(2, 3, 8, 8)}, r"latents have shape \(2, 3, 8, 8\); .* need \(2, 1, 8, 8\)"),
        ({"latents": torch.zeros(2, 1, 8, 9)}, r"need \(2, 1, 8, 8\)"),
        ({"latents": torch.zeros(2, 1, 8, 8), "batch_size": 3}, r"need \(3, 1, 8, 8\)"),
        ({"latents": torch.zeros(1, 8, 8)}, r"must be a torch tensor \(B, C, H, W\)"),
        ({"latents": torch.full((1, 1, 8, 8), float("nan"))}, "latents must be finite"),
        ({"latents": torch.full((1, 1, 8, 8), float("inf"))}, "latents must be finite"),
        ({"latents": torch.zeros(1, 1, 8, 8, dtype=torch.int64)}, "latents must be finite numbers"),
        ({"class_labels": 1}, "this network is unconditional"),
        ({"guidance_scale": 2.0}, "this network is unconditional"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "unknown tensor for the callback 'noise'"),
    ],
)
def test_bad_calls_fail_before_the_network_runs(make_pipe, arguments, message):
    pipe = make_pipe()
    pipe.unet.forward = None  # calling the network would be a TypeError
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"class-conditional: pass class_labels \(0\.\.3\)"),
        ({"class_labels": 4}, r"integers in 0\.\.3, not \[4\]"),
        ({"class_labels": -1}, r"integers in 0\.\.3"),
        ({"class_labels": 0.5}, r"integers in 0\.\.3"),
        ({"class_labels": True}, r"integers in 0\.\.3"),
        ({"class_labels": [[1]]}, r"integers in 0\.\.3"),
        ({"class_labels": [0, 1, 2]}, "3 class_labels for a batch of 1"),
        ({"class_labels": 0, "guidance_scale": 2.0, "null_class_label": 9}, r"integers in 0\.\.3, not \[0, 9\]"),
    ],
)
def test_bad_labels(make_pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_pipe(num_class_embeds=4)(**arguments)


@pytest.mark.parametrize(("variance_type", "out_channels"), [("fixed_small", 2), ("learned_range", 1)])
def test_a_network_that_does_not_fit_the_variance_type(make_pipe, variance_type, out_channels):
    pipe = make_pipe(GeneralizedDDIMScheduler(variance_type=variance_type), out_channels=out_channels)
    pipe.unet.forward = None
    with pytest.raises(ValueError, match=rf"predicts {out_channels} channels from 1: variance_type='{variance_type}'"):
        pipe()


def test_what_other_schedulers_do_not_know(make_pipe):
    pipe = make_pipe(diffusers.EulerDiscreteScheduler())
    with pytest.raises(ValueError, match="EulerDiscreteScheduler.step does not support eta: leave it out"):
        pipe(eta=0.5)
    with pytest.raises(ValueError, match="does not support use_clipped_model_output"):
        pipe(use_clipped_model_output=True)
    with pytest.raises(ValueError, match="PNDMScheduler.set_timesteps does not support timesteps: leave it out"):
        make_pipe(diffusers.PNDMScheduler())(timesteps=[3, 1])


def test_a_network_without_a_size_needs_latents(make_pipe, make_unet):
    pipe = make_pipe(unet=make_unet(size=None))
    with pytest.raises(ValueError, match="no sample_size: pass latents"):
        pipe()
    assert pipe(latents=torch.randn(1, 1, 8, 16), num_inference_steps=2, output_type="pt").images.shape == (1, 1, 8, 16)


def test_classes_live_at_the_package_root():
    """Their module is a file format: it is written into folders by whatever else saves them."""
    for name in (
        "GeneralizedDDIMPipeline",
        "GeneralizedDDIMScheduler",
        "InverseDDIMScheduler",
        "InverseMultistepDDIMScheduler",
        "MultistepDDIMScheduler",
    ):
        assert getattr(ddim_plugin, name).__module__ == "ddim_plugin"
    assert ddim_plugin.SchedulerMixin is diffusers.SchedulerMixin
    assert ddim_plugin.ModelMixin is diffusers.ModelMixin


def test_offload_hooks(make_pipe):
    """diffusers' own offloading hooks, with the CPU as the device they load to."""
    pipe = make_pipe()
    call = {"num_inference_steps": 3, "output_type": "latent"}
    expected = pipe(generator=generators(1), **call).images
    pipe.enable_model_cpu_offload(device="cpu")
    assert pipe.unet._hf_hook is not None
    assert torch.equal(pipe(generator=generators(1), **call).images, expected)
