"""Our schedulers inside the stock pipelines, where a user's checkpoint already lives."""

import functools
import inspect
import re
from pathlib import Path

import diffusers
import pytest
import tiny_pipelines as tiny
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from tiny_pipelines import FAMILIES, INVERTED, SD, run

from ddim_plugin import (
    GeneralizedDDIMScheduler,
    InverseDDIMScheduler,
    MultistepDDIMScheduler,
    restore_scheduler,
)

README = Path(__file__).parents[2] / "ddim_plugin" / "README.md"
SPLIT, LEDITS = "Stable Diffusion XL, base and refiner", "LEDITS++"
SAMPLED = [name for name in FAMILIES if name != LEDITS]
WORKS = {
    "GeneralizedDDIMScheduler": [*SAMPLED, SPLIT],
    "MultistepDDIMScheduler": [*SAMPLED, SPLIT],
    "InverseDDIMScheduler": [*INVERTED, SPLIT],
}
"""The families that the tests below run with each scheduler, and `test_inverse_pipelines` with the inverse one."""


def seeded():
    return torch.Generator().manual_seed(11)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return tiny.Parts(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def no_complaints(quiet_diffusers, recwarn):
    """Fail if diffusers or a warning complains about the scheduler."""
    yield
    said = [*quiet_diffusers, *(str(warning.message) for warning in recwarn)]
    assert [message for message in said if re.search("scheduler|outdated|config attributes", message, re.I)] == []


def near(ours, stock, tolerance=2e-5):
    assert (ours - stock).abs().max() <= tolerance * stock.abs().max()


# ---- the table ------------------------------------------------------------------------------------------------------


def test_the_table_of_the_reference_is_what_is_tested():
    section = README.read_text().split("## Works with\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    (_, *classes), _, *rows = rows
    classes = [name.strip("`") for name in classes]
    assert classes == list(WORKS)
    assert [row[0] for row in rows] == sorted([*FAMILIES, SPLIT], key=[row[0] for row in rows].index)
    assert {(family, cls, cell) for family, *cells in rows for cls, cell in zip(classes, cells, strict=True)} == {
        (family, cls, "yes" if family in WORKS[cls] else "no") for family in [*FAMILIES, SPLIT] for cls in WORKS
    }


# ---- every family ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", WORKS["GeneralizedDDIMScheduler"][:-1])
def test_same_samples_as_the_stock_scheduler(parts, family, no_complaints):
    stock = DDIMScheduler(**SD)
    ours = GeneralizedDDIMScheduler.from_config(stock.config, timestep_spacing="leading")
    expected_times, expected = run(FAMILIES[family], parts, stock)
    times, sample = run(FAMILIES[family], parts, ours)
    assert times == expected_times
    near(sample, expected)


@pytest.mark.parametrize("family", WORKS["MultistepDDIMScheduler"][:-1])
def test_multistep(parts, family, no_complaints):
    """At order 1 it is the stock scheduler. With its defaults it steps along its plan, and repeats itself."""
    stock = DDIMScheduler(**SD)
    first = MultistepDDIMScheduler.from_config(stock.config, timestep_spacing="leading", steps_offset=1, solver_order=1)
    near(run(FAMILIES[family], parts, first)[1], run(FAMILIES[family], parts, stock)[1])
    ours = MultistepDDIMScheduler.from_config(stock.config)
    times, sample = run(FAMILIES[family], parts, ours)
    assert times == ours.timesteps.tolist()[-len(times) :]
    assert len(times) in (4, 6)  # a part of the plan with `strength`
    assert sample.isfinite().all()
    again, same = run(FAMILIES[family], parts, ours)
    assert times == again
    assert torch.equal(sample, same)


@pytest.mark.parametrize("family", [name for name in SAMPLED if name not in INVERTED])
def test_pipelines_that_cannot_encode(parts, family):
    """They draw x_T themselves, or replace a part of the picture in each step."""
    pipe, _ = FAMILIES[family](parts, DDIMScheduler(**SD))
    arguments = inspect.signature(type(pipe).__call__).parameters
    assert "latents" not in arguments or "strength" in arguments


def test_ledits_replaces_foreign_schedulers(parts, quiet_diffusers):
    """It needs the private parts of two stock classes. What it puts in place has our β, and edits."""
    ours = GeneralizedDDIMScheduler.from_config(DDIMScheduler(**SD).config)
    pipe, _ = FAMILIES[LEDITS](parts, ours)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.scheduler) is diffusers.DPMSolverMultistepScheduler
    assert any("has been changed" in message for message in quiet_diffusers)
    assert torch.allclose(pipe.scheduler.alphas_cumprod, ours.alphas_cumprod)
    picture = diffusers.image_processor.VaeImageProcessor.numpy_to_pil(tiny.uniform(1, 32, 32, 3).numpy())[0]
    pipe.invert(image=picture, num_inversion_steps=4, skip=0.25, generator=seeded())
    assert pipe.init_latents.isfinite().all()
    pipe.scheduler = ours
    with pytest.raises(NotImplementedError):
        pipe.invert(image=picture, num_inversion_steps=4, skip=0.25, generator=seeded())


# ---- Stable Diffusion XL, base and refiner --------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [GeneralizedDDIMScheduler, MultistepDDIMScheduler])
@pytest.mark.parametrize("end", [0.25, 0.5, 0.8])
def test_base_and_refiner_take_each_step_once(parts, cls, end, no_complaints):
    whole = cls.from_config(DDIMScheduler(**SD).config)
    times, expected = run(FAMILIES["Stable Diffusion XL"], parts, whole)
    for same in (False, True):  # two schedulers, or one for both pipelines
        base = cls.from_config(whole.config)
        last = base if same else cls.from_config(whole.config)
        early, begun = run(FAMILIES["Stable Diffusion XL"], parts, base, denoising_end=end)
        late, sample = run(tiny.refiner, parts, last, denoising_start=end, image=begun)
        assert early + late == times == whole.timesteps.tolist()
        if cls is GeneralizedDDIMScheduler:
            near(sample, expected)
        assert sample.isfinite().all()


def test_base_and_refiner_of_first_order(parts):
    first = MultistepDDIMScheduler.from_config(DDIMScheduler(**SD).config, timestep_spacing="trailing", solver_order=1)
    _, expected = run(FAMILIES["Stable Diffusion XL"], parts, first)
    _, begun = run(FAMILIES["Stable Diffusion XL"], parts, first, denoising_end=0.6)
    near(run(tiny.refiner, parts, first, denoising_start=0.6, image=begun)[1], expected)


def test_an_inverse_scheduler_is_split_by_its_settings(parts):
    """Not by the argument of the call: the base takes the first times, and those are the part of the refiner."""
    inverse = InverseDDIMScheduler.from_config(DDIMScheduler(**SD).config, refinement_steps=None)
    early, _ = run(FAMILIES["Stable Diffusion XL"], parts, inverse, denoising_end=0.5)
    assert early == inverse.timesteps.tolist()[:3]
    assert max(early) < 500


# ---- settings of the stock scheduler --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family", ["Stable Diffusion, text to image", "Stable Diffusion, image to image", "ControlNet"]
)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_noise_of_the_call(parts, family, prediction_type, no_complaints):
    stock = DDIMScheduler(**SD, prediction_type=prediction_type)
    ours = GeneralizedDDIMScheduler.from_config(stock.config, timestep_spacing="leading")
    expected = run(FAMILIES[family], parts, stock, eta=0.6)[1]
    near(run(FAMILIES[family], parts, ours, eta=0.6)[1], expected, 1e-4)


@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
@pytest.mark.parametrize("family", ["Stable Diffusion, image to image", "Stable Diffusion, inpainting"])
def test_strength(parts, family, strength):
    stock = DDIMScheduler(**SD)
    ours = GeneralizedDDIMScheduler.from_config(stock.config, timestep_spacing="leading")
    expected = run(FAMILIES[family], parts, stock, 10, strength=strength)
    times, sample = run(FAMILIES[family], parts, ours, 10, strength=strength)
    assert times == expected[0]
    near(sample, expected[1])


def test_ddim_pipeline(parts):
    """With clipping, as the stock defaults have it."""
    stock = DDIMScheduler()
    ours = GeneralizedDDIMScheduler.from_config(stock.config, timestep_spacing="leading", clip_sample=True)
    for eta in (0.0, 0.5):
        expected = run(FAMILIES["DDIMPipeline"], parts, stock, 10, eta=eta)[1]
        near(run(FAMILIES["DDIMPipeline"], parts, ours, 10, eta=eta)[1], expected, 1e-4)


def test_ddpm_pipeline(parts):
    """With η = 1 on the full chain ours is Ho's sampler with its smaller variance: the stock DDPM scheduler's.

    Ho's mean is a mixture of the clipped x̂0 and x_t, which is to recompute ε̂ after clipping.
    """
    stock = DDPMScheduler(num_train_timesteps=60, beta_end=0.3, clip_sample=True)
    ours = GeneralizedDDIMScheduler.from_config(stock.config, eta=1.0, clip_sample=True, use_clipped_model_output=True)
    expected = run(FAMILIES["DDPMPipeline"], parts, stock, 60)[1]
    near(run(FAMILIES["DDPMPipeline"], parts, ours, 60)[1], expected, 1e-4)


def test_times_of_ones_own(parts):
    ours = GeneralizedDDIMScheduler.from_config(DDIMScheduler(**SD).config, timestep_spacing="quadratic")
    own = {"num_inference_steps": None, "timesteps": [901, 400, 33]}
    times, sample = run(FAMILIES["Stable Diffusion, text to image"], parts, ours, **own)
    assert times == [901, 400, 33]
    assert sample.isfinite().all()


@pytest.mark.parametrize("cls", [GeneralizedDDIMScheduler, MultistepDDIMScheduler])
def test_one_generator_for_each_picture_in_batches(parts, cls):
    """Marigold passes the generators of all pictures to the steps of each batch."""
    pictures = {"image": tiny.uniform(3, 3, 16, 16), "batch_size": 2}
    stock = DDIMScheduler(**SD)
    settings = {"timestep_spacing": "leading", "steps_offset": 1}
    settings |= {"solver_order": 1} if cls is MultistepDDIMScheduler else {}
    found = []
    for scheduler in (stock, cls.from_config(stock.config, **settings)):
        generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
        found.append(run(FAMILIES["Marigold"], parts, scheduler, generator=generators, **pictures)[1])
    near(found[1], found[0])


def test_stable_diffusion_keeps_our_scheduler_on_disk(parts, tmp_path):
    ours = GeneralizedDDIMScheduler.from_config(DDIMScheduler(**SD).config, eta=0.2, timestep_spacing="quadratic")
    FAMILIES["Stable Diffusion, text to image"](parts, ours)[0].save_pretrained(tmp_path)
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is DDIMScheduler  # so that it opens without this package
    assert isinstance(restore_scheduler(loaded).scheduler, GeneralizedDDIMScheduler)
    assert loaded.scheduler.config.eta == 0.2
    assert loaded.scheduler.config.timestep_spacing == "quadratic"
    for key in [key for key in ours.config if not key.startswith("_")]:
        assert loaded.scheduler.config[key] == ours.config[key], key


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_few_steps_with_guidance(parts, prediction_type, no_complaints):
    """Nearer to what many steps make than DDIM in as many steps, in pipelines that know nothing of it."""
    stock = DDIMScheduler(**SD, prediction_type=prediction_type, timestep_spacing="trailing")

    def images(scheduler, steps):
        return run(FAMILIES["Stable Diffusion, text to image"], parts, scheduler, steps, guidance_scale=3.0)[1]

    solution = images(MultistepDDIMScheduler.from_config(stock.config, timestep_spacing="trailing"), 120)
    few = MultistepDDIMScheduler.from_config(stock.config)
    distances = [(images(each, 10) - solution).abs().mean() for each in (few, stock)]
    assert distances[0] < {"epsilon": 0.9, "v_prediction": 0.4}[prediction_type] * distances[1]


@pytest.mark.parametrize("cls", [GeneralizedDDIMScheduler, MultistepDDIMScheduler])
def test_views_take_turns(parts, cls):
    """The panorama saves and restores the scheduler's state for each view."""
    one = run(tiny.panorama, parts, cls(**SD))[1]
    times, sample = run(functools.partial(tiny.panorama, views=3), parts, cls(**SD))
    assert times == [time for time in times[::3] for _ in range(3)]
    near(sample, one)


@pytest.mark.parametrize("cls", [GeneralizedDDIMScheduler, MultistepDDIMScheduler])
def test_floating_point_times(parts, cls):
    ours = cls(**SD)
    times, sample = run(tiny.audio, parts, ours, 4)
    pipe, _ = tiny.audio(parts, ours)
    x = torch.randn(sample.shape, generator=seeded())
    ours.set_timesteps(4)
    for t in ours.timesteps:
        with torch.no_grad():
            x = ours.step(pipe.unet(x, t.float()).sample, t, x).prev_sample
    assert times == ours.timesteps.tolist()
    assert torch.equal(sample, x)


# ---- noise that the config asks for ---------------------------------------------------------------------------------

SD_TEXT, SD_IMAGE = "Stable Diffusion, text to image", "Stable Diffusion, image to image"
NOISE = {
    "eta": {"eta": 1.0},
    "some": {"eta": 0.4},
    "fixed_large": {"variance_type": "fixed_large"},
    "optimal": {"variance_type": "optimal", "eps_mean_square": [0.4] * 1000},
    "learned_range": {"variance_type": "learned_range"},
}


def paper(family):
    """A config with ᾱ_0 = 1. Stable Diffusion's pipelines rewrite configs without an offset."""
    return SD | {"set_alpha_to_one": True, "steps_offset": int("Stable" in family)}


def draws(generator, shape):
    """Count the draws of noise of a shape since the generator was seeded."""
    again = seeded()
    for count in range(100):
        if torch.equal(again.get_state(), generator.get_state()):
            return count
        torch.randn(shape, generator=again)
    raise AssertionError("another number was drawn")


def made_for(parts, family, kind):
    """The pipeline, with a network that predicts a variance if the scheduler needs it."""
    if kind != "learned_range":
        return FAMILIES[family]
    unet = parts.learned if "Stable" in family else parts.unconditional_learned
    return functools.partial(FAMILIES[family], unet=unet)


def deaf(scheduler):
    """Drop η from each step, as if the pipeline passed none."""
    step = scheduler.step

    @functools.wraps(step)
    def quiet(*args, eta=None, **kwargs):
        return step(*args, **kwargs)

    scheduler.step = quiet
    return scheduler


@pytest.mark.parametrize("family", ["DDIMPipeline", "DDPMPipeline", SD_TEXT, SD_IMAGE])
@pytest.mark.parametrize("kind", NOISE)
def test_configured_noise_is_drawn(parts, family, kind):
    """Stock pipelines pass η = 0 to each step whether or not the user asked for it."""
    build = made_for(parts, family, kind)

    def ours():
        return GeneralizedDDIMScheduler(**paper(family), timestep_spacing="leading", **NOISE[kind])

    generator = seeded()
    times, sample = run(build, parts, ours(), generator=generator)
    assert draws(generator, sample.shape) == (2 if family == SD_IMAGE else 1) + len(times) - 1  # none in the last
    assert torch.equal(sample, run(build, parts, deaf(ours()))[1])


@pytest.mark.parametrize("family", ["DDIMPipeline", SD_TEXT, SD_IMAGE])
def test_noise_of_the_config_is_that_of_the_stock_call(parts, family):
    """An η in the config is the η of a stock scheduler's call, and an η in the call replaces it."""
    stock = DDIMScheduler(**paper(family))
    for configured, called in [(1.0, {}), (0.4, {}), (1.0, {"eta": 0.3}), (0.0, {"eta": 0.3})]:
        ours = GeneralizedDDIMScheduler(**paper(family), timestep_spacing="leading", eta=configured)
        expected = run(FAMILIES[family], parts, stock, eta=called.get("eta", configured))[1]
        near(run(FAMILIES[family], parts, ours, **called)[1], expected, 1e-4)


@pytest.mark.parametrize("family", ["DDIMPipeline", "DDPMPipeline", SD_TEXT, SD_IMAGE])
@pytest.mark.parametrize("kind", ["fixed_large", "learned_range"])
def test_large_and_learned_noise_are_those_of_the_stock_scheduler(parts, family, kind):
    """The reference of DDIMPipeline is DDPMPipeline: the stock scheduler of these kinds of noise takes no η."""
    plain = {key: value for key, value in paper(family).items() if key != "set_alpha_to_one"}
    stock = DDPMScheduler(**plain, variance_type=kind, timestep_spacing="leading")
    ours = GeneralizedDDIMScheduler(**paper(family), timestep_spacing="leading", **NOISE[kind])
    reference = made_for(parts, "DDPMPipeline" if family == "DDIMPipeline" else family, kind)
    plan = {"num_inference_steps": None, "timesteps": [901, 650, 333, 120, 0]} if "Stable" in family else {}
    times, sample = run(made_for(parts, family, kind), parts, ours, **plan)
    expected_times, expected = run(reference, parts, stock, **plan)
    assert times == expected_times
    near(sample, expected, 1e-4)


@pytest.mark.parametrize("family", ["DDIMPipeline", SD_TEXT, SD_IMAGE])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_multistep_noise_is_drawn(parts, family, eta):
    generator, ours = seeded(), MultistepDDIMScheduler(**paper(family), eta=eta)
    times, sample = run(FAMILIES[family], parts, ours, generator=generator)
    noisy = len(times) - 1 if eta else 0
    assert draws(generator, sample.shape) == (2 if family == SD_IMAGE else 1) + noisy
    assert times == ours.timesteps.tolist()[-len(times) :]
    assert torch.equal(sample, run(FAMILIES[family], parts, deaf(MultistepDDIMScheduler(**paper(family), eta=eta)))[1])
