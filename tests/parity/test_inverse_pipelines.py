"""z_0 → z_T → z_0 in the own loop of stock pipelines, with the inverse schedulers and back with the samplers.

The networks are random, as a small part of a denoiser. Errors are root mean squares.
"""

import functools

import pytest
import tiny_flow_pipelines as flow
import tiny_pipelines as tiny
import torch
from tiny_flow_pipelines import STOCK, normal, run_flow
from tiny_pipelines import DECODED_BY, FAMILIES, INVERTED, LATENTS, SD, run

from ddim_plugin import (
    GeneralizedDDIMScheduler,
    InverseDDIMScheduler,
    InverseMultistepDDIMScheduler,
    MultistepDDIMScheduler,
)

TEXT, IMAGE, XL = "Stable Diffusion, text to image", "Stable Diffusion, image to image", "Stable Diffusion XL"
GUIDANCE = {"guidance_scale": 7.5}
FLOWS = {
    "Stable Diffusion 3": GUIDANCE,
    "Stable Diffusion 3, dynamic shift": GUIDANCE,
    "Flux": {"guidance_scale": 3.5},  # an input of the network
    "Flux, distilled": {},
    "Flux, image to image": {"strength": 1.0},
    "Wan": GUIDANCE,
    "Wan, Euler": GUIDANCE,
    "Qwen-Image": {"true_cfg_scale": 7.5},
    "Z-Image": {},
}
STEPS, K = 8, 5


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return tiny.Parts(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(autouse=True)
def no_complaints(quiet_diffusers):
    yield
    assert [message for message in quiet_diffusers if "cheduler" in message] == []


def rms(difference):
    return difference.float().square().mean().sqrt().item()


def trip(parts, family, up, steps=STEPS, x=None, sampler=GeneralizedDDIMScheduler, within=tiny.denoiser, **call):
    """Encode and decode, and return the error and the latents. The calls are as many as the timesteps."""
    x = normal(*LATENTS.get(family, (1, 4, 8, 8)), seed=9) if x is None else x
    build, back = (each if callable(each) else FAMILIES[each] for each in (family, DECODED_BY.get(family, family)))
    given = "image" if family in DECODED_BY else "latents"
    times, z = run(build, parts, up, steps, within=within, **{given: x}, **call)
    assert times == up.timesteps.tolist()
    call.pop("strength", None)
    decoded = run(back, parts, sampler.from_config(up.config), steps, within=within, latents=z, **call)[1]
    return rms(decoded - x), z


def flow_trip(name, up, steps=STEPS, x=None, sampler=GeneralizedDDIMScheduler, dtype=torch.float32, **call):
    shape = {"Wan": (1, 4, 1, 8, 8), "Sta": (1, 4, 8, 8), "Z-I": (1, 4, 8, 8)}.get(name[:3], (1, 16, 16))
    x = normal(*shape, seed=9, dtype=dtype) if x is None else x
    go = functools.partial(run_flow, name, dtype=dtype, steps=steps, within=flow.flow_denoiser, **call)
    times, samples, _ = go(scheduler=up, latents=x)
    assert times == up.timesteps.tolist()
    decoded = go(scheduler=sampler.from_config(up.config), latents=samples[-1])[1][-1]
    assert decoded.dtype == dtype
    return rms(decoded - x), samples[-1]


def check(report, up, z, steps, tolerance=1e-3):
    """The report has the timesteps and calls of the loop, and says that the latent decodes to the image."""
    assert report.timesteps.tolist() == list(dict.fromkeys(up.timesteps.tolist()))
    assert len(report.timesteps) == steps
    assert report.total_evaluations.tolist() == [len(up.timesteps)] * len(z)
    assert (report.residual <= tolerance).all()
    assert report.latent_std == pytest.approx(z.float().flatten(1).std(1, correction=0).numpy(), rel=1e-2)


# ---- every family ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", INVERTED)
def test_the_loop_closes(parts, family):
    """With refinement to rounding. Without, at as many calls as the plain inverse, with a smaller error than it."""
    call = GUIDANCE | INVERTED[family] if family != "Marigold" else INVERTED[family]
    plain, free, refined = (InverseDDIMScheduler.from_config(SD, refinement_steps=k) for k in (None, 0, K))
    errors = {up: trip(parts, family, up, **call)[0] for up in (plain, free)}
    assert len(plain.timesteps) == len(free.timesteps) == STEPS
    assert 0.05 < errors[plain] < 0.3
    assert errors[free] < 0.7 * errors[plain]
    error, z = trip(parts, family, refined, **call)
    assert error <= 1e-5
    check(refined.report(), refined, z, STEPS)
    assert not free.report().converged.all()
    with pytest.raises(ValueError, match="no residual was measured"):
        plain.report()


@pytest.mark.parametrize("name", FLOWS)
def test_the_loop_of_flow_matching_closes(name):
    config = STOCK[name]().config
    plain, refined = (InverseDDIMScheduler.from_config(config, refinement_steps=k) for k in (None, K))
    assert 0.03 < flow_trip(name, plain, **FLOWS[name])[0] < 0.3
    assert len(plain.timesteps) == STEPS
    error, z = flow_trip(name, refined, **FLOWS[name])
    assert error <= 1e-5
    check(refined.report(), refined, z, STEPS)


@pytest.mark.parametrize("name", ["Flux", "Wan", "Z-Image"])
def test_the_guess_is_better_than_the_plain_inverse(name):
    free = InverseDDIMScheduler.from_config(STOCK[name]().config, refinement_steps=0)
    plain = InverseDDIMScheduler.from_config(free.config, refinement_steps=None)
    errors = {up: flow_trip(name, up, 10, **FLOWS[name])[0] for up in (free, plain)}
    assert errors[free] < 0.75 * errors[plain]
    assert len(free.timesteps) == len(plain.timesteps)


def test_our_own_pipeline(parts):
    x = normal(2, 3, 8, 8, seed=9)
    plain, refined = (InverseDDIMScheduler(refinement_steps=k) for k in (None, 8))
    assert trip(parts, tiny.unconditional, plain, x=x, generator=None)[0] > 0.2
    error, z = trip(parts, tiny.unconditional, refined, x=x, generator=None)
    assert error <= 1e-5
    check(refined.report(), refined, z, STEPS)


# ---- parts of the process -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [None, 6])
def test_the_refiner_and_the_base_encode_their_parts(parts, k):
    """The refiner encodes x_0 to 0.4 of the process, and the base from there. Settings or arguments split decoding."""
    x, call = normal(1, 4, 8, 8, seed=9), GUIDANCE | {"within": tiny.denoiser}
    prompts = {key: normal(1, 7, 16, seed=8) for key in ("prompt_embeds", "negative_prompt_embeds")}
    refine = functools.partial(run, tiny.refiner, parts, steps=STEPS, **call | prompts)
    generate = functools.partial(run, FAMILIES[XL], parts, steps=STEPS, **call)
    low = InverseDDIMScheduler.from_config(SD, refinement_steps=k, denoising_start=0.4)
    high = InverseDDIMScheduler.from_config(SD, refinement_steps=k, denoising_end=0.4)
    early, y = refine(low, image=x, strength=1.0)
    late, z = generate(high, latents=y)
    assert [early, late] == [low.timesteps.tolist(), high.timesteps.tolist()]
    assert max(early) < 600 <= min(late)
    base, last, whole = (GeneralizedDDIMScheduler.from_config(each) for each in (high.config, low.config, SD))
    by_settings = refine(last, image=x, latents=generate(base, latents=z)[1], strength=1.0)[1]
    begun = generate(whole, latents=z, denoising_end=0.4)[1]
    by_arguments = refine(whole, image=begun, denoising_start=0.4)[1]
    for back in (by_settings, by_arguments):
        assert rms(back - x) > 0.05 if k is None else rms(back - x) <= 1e-5
    if k is not None:
        assert low.report(1e-4).converged.all()
        assert high.report(1e-4).converged.all()


@pytest.mark.parametrize("k", [None, 4])
def test_a_part_of_the_way(parts, k):
    """`denoising_start` is what `strength` is to image-to-image pipelines, without their noise."""
    up = InverseDDIMScheduler.from_config(SD, refinement_steps=k, denoising_start=0.5)
    error = trip(parts, TEXT, up, **GUIDANCE)[0]
    assert max(up.timesteps) < 500
    assert error > 0.01 if k is None else error <= 1e-5


# ---- steps, prompts, predictions, types -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "settings"),
    [
        (7, {"set_alpha_to_one": True}),
        (4, {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
    ],
)
def test_two_prompts(parts, steps, settings):
    up = InverseDDIMScheduler.from_config(SD | settings, refinement_steps=K)
    x = normal(2, 4, 8, 8, seed=9)
    error, z = trip(parts, TEXT, up, steps, x, prompt=["a cat", "a big dog"], **GUIDANCE)
    assert error <= 1e-5
    check(up.report(), up, z, steps)


def test_a_single_step(parts):
    """From noise to data, it has an inverse if the network hardly differs from the denoiser. Rounding is ×15 then."""
    up = InverseDDIMScheduler.from_config(SD, refinement_steps=2)
    error, z = trip(parts, TEXT, up, 1, within=functools.partial(tiny.denoiser, share=0.003), **GUIDANCE)
    assert error <= 5e-5
    check(up.report(), up, z, 1)


@pytest.mark.parametrize(("family", "bound"), [(TEXT, 0.04), ("Flux", 0.01)])
def test_half_precision(tmp_path, family, bound):
    """As near as the type allows: the sampler rounds x_t in every step."""
    x, config = normal(1, 4, 8, 8, seed=9, dtype=torch.bfloat16), STOCK[family]().config if family in STOCK else SD
    plain, refined = (InverseDDIMScheduler.from_config(config, refinement_steps=k) for k in (None, K))
    if family in STOCK:
        go = functools.partial(flow_trip, family, dtype=torch.bfloat16)
    else:
        parts = tiny.Parts(tmp_path)
        for name in ("unet", "text_encoder", "vae"):
            torch.nn.Module.to(parts.stable_diffusion[name], torch.bfloat16)
        go = functools.partial(trip, parts, family, x=x, **GUIDANCE)
    error, z = go(up=refined)
    assert z.dtype == torch.bfloat16
    assert error < bound < go(up=plain)[0]


# ---- multistep ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [TEXT, "Stable Diffusion 3"])
def test_multistep_of_order_3(parts, family):
    """One pass is as near as the method is exact. Passes that decode and encode close the loop."""
    config = STOCK[family]().config if family in STOCK else SD
    go = functools.partial(*((flow_trip, family) if family in STOCK else (trip, parts, family)))
    once, again = (
        InverseMultistepDDIMScheduler.from_config(config, solver_order=3, refinement_steps=k) for k in (None, 10)
    )
    one = go(up=once, sampler=MultistepDDIMScheduler, **GUIDANCE)[0]
    error, _ = go(up=again, sampler=MultistepDDIMScheduler, **GUIDANCE)
    assert 0.01 < one < 0.2
    assert error <= 1e-5
    report = again.report()
    assert report.converged.all()
    assert report.total_evaluations.tolist() == [len(again.timesteps)] == [STEPS * 11]


# ---- nothing is read on the host ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [InverseDDIMScheduler, InverseMultistepDDIMScheduler])
@pytest.mark.parametrize("family", [TEXT, "Flux"])
def test_the_loop_waits_for_no_device(parts, refuse_host_reads, family, cls):
    up = cls.from_config(STOCK[family]().config if family in STOCK else SD, refinement_steps=2)
    calls = []

    def guarded(method):
        @functools.wraps(method)
        def call(*args, **kwargs):
            calls.append(method.__name__)
            with refuse_host_reads:
                return method(*args, **kwargs)

        return call

    up.scale_model_input, up.step = guarded(up.scale_model_input), guarded(up.step)
    if family == "Flux":
        run_flow(family, up, steps=3)
    else:
        run(FAMILIES[family], parts, up, 3)
    assert calls.count("step") == len(up.timesteps)
    assert up.report().residual.shape[1] == 1  # which reads
