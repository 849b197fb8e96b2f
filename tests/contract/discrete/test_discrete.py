"""The scheduler for categorical data: what it takes, gives, stores and refuses."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from ddim_plugin import DiscreteDDIMScheduler, GeneralizedDDIMScheduler
from ddim_plugin.process import spacings

K = 5


@pytest.fixture
def scheduler():
    made = DiscreteDDIMScheduler(K, eta=0.5)
    made.set_timesteps(4)
    return made


def seeds(*numbers):
    return [torch.Generator().manual_seed(each) for each in numbers]


def test_logits_may_have_the_tokens_in_any_axis(scheduler):
    torch.manual_seed(0)
    x, logits, t = torch.randint(K, (2, 3, 4, 6)), torch.randn(2, K, 3, 4, 6), scheduler.timesteps[1]
    first = scheduler.step(logits, t, x, generator=seeds(0, 1))
    last = scheduler.step(logits.movedim(1, -1), t, x, generator=seeds(0, 1))
    joint = scheduler.step(logits.flatten(1, 2), t, x, generator=seeds(0, 1), return_dict=False)
    for each in (last.prev_sample, joint[0]):
        assert torch.equal(each, first.prev_sample)
    assert torch.equal(first.pred_original_sample, logits.argmax(1))
    assert torch.equal(last.probabilities, first.probabilities.movedim(1, -1))
    assert torch.equal(joint[2], first.probabilities.flatten(1, 2))
    torch.testing.assert_close(first.probabilities.sum(1), torch.ones(x.shape))


def test_an_axis_of_1_tells_axes_of_one_length_apart(scheduler):
    x, logits, t = torch.randint(K, (2, K, 1)), torch.randn(2, K, K, 1), scheduler.timesteps[1]
    first = scheduler.step(logits, t, x, generator=seeds(0, 1)).prev_sample
    assert torch.equal(scheduler.step(logits.movedim(1, -1), t, x, generator=seeds(0, 1)).prev_sample, first)


def test_a_sample_depends_on_its_generator_alone(scheduler):
    torch.manual_seed(0)
    x, logits, t = torch.randint(K, (3, 7)), torch.randn(3, K, 7), scheduler.timesteps[0]
    batch = scheduler.step(logits, t, x, generator=seeds(0, 1, 2)).prev_sample
    for i in range(3):
        alone = scheduler.step(logits[i : i + 1], t, x[i : i + 1], generator=seeds(i)).prev_sample
        assert torch.equal(alone[0], batch[i])
    z = torch.stack([torch.randn(7, generator=each) for each in seeds(0, 1, 2)])
    assert torch.equal(scheduler.step(logits, t, x, variance_noise=z).prev_sample, batch)


def test_the_last_step_samples_from_the_prediction(scheduler):
    logits = torch.randn(1, K, 3)
    out = scheduler.step(logits, scheduler.timesteps[-1], torch.zeros(1, 3, dtype=torch.int64))
    torch.testing.assert_close(out.probabilities, logits.softmax(1))


def test_eta_of_a_step_takes_the_place_of_that_of_the_config(scheduler):
    x, logits, t = torch.randint(K, (2, 7)), torch.randn(2, K, 7), scheduler.timesteps[1]
    found = [scheduler.step(logits, t, x, eta=eta).probabilities for eta in (0.0, None, 1.0)]
    torch.testing.assert_close(found[1], 0.5 * found[0] + 0.5 * found[2])
    keep = (1 - scheduler.alpha_bar[500]) / (1 - scheduler.alpha_bar[750])
    one = torch.nn.functional.one_hot(x, K).movedim(-1, 1)
    torch.testing.assert_close(found[0], (keep * one + (1 - keep) * logits.softmax(1)).float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(scheduler, dtype):
    x, logits, t = torch.randint(K, (2, 7)), torch.randn(2, K, 7).to(dtype), scheduler.timesteps[1]
    half, full = scheduler.step(logits, t, x, generator=seeds(0, 1)), scheduler.step(logits.float(), t, x)
    assert half.probabilities.dtype == torch.float32
    assert torch.equal(half.probabilities, full.probabilities)


@pytest.mark.parametrize("spacing", [*spacings.SPACINGS])
def test_timesteps_are_those_of_the_spacing(spacing):
    scheduler = DiscreteDDIMScheduler(K, timestep_spacing=spacing)
    scheduler.set_timesteps(50)
    tau = np.unique(spacings.tau(spacing, 50, 1000, 0, scheduler.alpha_bar))
    assert (scheduler.timesteps.flip(0) + 1).tolist() == tau.tolist()
    assert scheduler.num_inference_steps == len(tau)


def test_explicit_timesteps_and_timesteps_outside_the_plan(scheduler):
    scheduler.set_timesteps(timesteps=torch.tensor([900, 300, 20]))
    assert scheduler.timesteps.tolist() == [900, 300, 20]
    x, logits = torch.randint(K, (2, 7)), torch.randn(2, K, 7)
    given = scheduler.step(logits, scheduler.timesteps[1], x).probabilities
    assert torch.equal(scheduler.step(logits, 300, x).probabilities, given)
    outside = scheduler.step(logits, 500, x).probabilities
    scheduler.set_timesteps(timesteps=[500, 300])
    assert torch.equal(scheduler.step(logits, scheduler.timesteps[0], x).probabilities, outside)


@pytest.mark.parametrize("inference", [False, True])
def test_no_value_is_read_on_an_accelerator(scheduler, inference):
    """Tensors on the device "meta" have no values to read."""
    with torch.inference_mode(inference):
        scheduler.set_timesteps(3, device="meta")
    x = scheduler.initial_sample(torch.empty(2, 3, 4, device="meta"))
    for t in scheduler.timesteps:
        logits = torch.empty(2, K, 3, 4, device="meta", dtype=torch.float16)
        assert scheduler.scale_model_input(x, t).shape == x.shape
        x = scheduler.step(logits, t, x).prev_sample
    noised = scheduler.add_noise(x, torch.empty(x.shape, device="meta"), torch.empty(2, dtype=torch.int64).to("meta"))
    assert x.shape == noised.shape == (2, 3, 4)


def test_each_sample_has_noise_of_its_timestep(scheduler):
    x0, z = torch.randint(K, (3, 200)), torch.randn(3, 200)
    together = scheduler.add_noise(x0, z, torch.tensor([0, 400, 999]))
    for i, t in enumerate((0, 400, 999)):
        assert torch.equal(together[i : i + 1], scheduler.add_noise(x0[i : i + 1], z[i : i + 1], t))
    changed = (together != x0).float().mean(1)
    assert changed[0] < changed[1] < changed[2]
    assert torch.equal(torch.unique(scheduler.initial_sample(z)), torch.arange(K))


def test_brightness_covers_the_range():
    scheduler = DiscreteDDIMScheduler(3)
    assert scheduler.scale_model_input(torch.tensor([0, 1, 2])).tolist() == [-1, 0, 1]


def test_a_config_is_stored_and_loaded(tmp_path, quiet_diffusers):
    betas = np.linspace(0.1, 0.9, 10).tolist()
    made = DiscreteDDIMScheduler(K, 10, trained_betas=betas, eta=0.25, noisiest="independent")
    made.save_pretrained(tmp_path)
    loaded = DiscreteDDIMScheduler.from_pretrained(tmp_path)
    settings = [{k: v for k, v in each.config.items() if k[0] != "_"} for each in (made, loaded)]
    assert settings[0] == settings[1]
    assert np.array_equal(loaded.alpha_bar, made.alpha_bar)
    changed = DiscreteDDIMScheduler.from_config(made.config, eta=1.0)
    assert (changed.config.eta, changed.config.num_classes, changed.T) == (1.0, K, 10)
    assert quiet_diffusers == []
    gaussian = DDIMScheduler(beta_schedule="scaled_linear").config
    assert DiscreteDDIMScheduler.from_config(gaussian, num_classes=2).config.beta_schedule == "scaled_linear"


def test_schedulers_of_images_refuse_its_config(scheduler):
    with pytest.raises(ValueError, match="another family"):
        GeneralizedDDIMScheduler.from_config(scheduler.config)
    with pytest.raises(ValueError, match="num_classes"):
        DiscreteDDIMScheduler.from_config(GeneralizedDDIMScheduler().config)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_classes": 1}, "not 1"),
        ({"num_classes": 2.0}, r"not 2\.0"),
        ({"noisiest": "paper"}, "'paper'"),
        ({"eta": 1.5}, r"\[0, 1\], not 1\.5"),
        ({"eta": -0.1}, r"not -0\.1"),
        ({"beta_schedule": "sqrt"}, "'sqrt'"),
        ({"timestep_spacing": "even"}, "'even'"),
        ({"trained_betas": [0.1]}, "has 1 entries"),
        ({"num_train_timesteps": 0}, "not 0"),
    ],
)
def test_impossible_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        DiscreteDDIMScheduler(**{"num_classes": K} | settings)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_output": torch.zeros(2, 4, 7)}, r"have shape \(2, 4, 7\)"),
        ({"model_output": torch.full((2, K, 7), torch.nan)}, "NaN"),
        ({"sample": torch.full((2, 7), K)}, r"0\.\.4, not torch\.int64 5\.\.5"),
        ({"sample": torch.zeros(2, 7)}, r"integers 0\.\.4, not torch\.float32"),
        ({"sample": torch.zeros(2, K, dtype=torch.int64), "model_output": torch.zeros(2, K, K)}, "add an axis of 1"),
        ({"timestep": 1000}, "1000"),
        ({"timestep": -1}, "-1"),
        ({"timestep": 0.5}, "integer"),
        ({"timestep": torch.tensor([3, 5])}, r"integer, not tensor\(\[3, 5"),
        ({"eta": 2}, "not 2"),
        ({"generator": [torch.Generator()] * 3}, "3 generators"),
        ({"variance_noise": torch.zeros(2, 6)}, r"\(2, 6\)"),
    ],
)
def test_impossible_steps_are_refused(scheduler, change, words):
    known = {"model_output": torch.zeros(2, K, 7), "timestep": 3, "sample": torch.zeros(2, 7, dtype=torch.int64)}
    with pytest.raises(ValueError, match=words):
        scheduler.step(**known | change)


def test_one_step_has_one_timestep_and_leads_to_the_data(scheduler):
    with pytest.raises(ValueError, match=r"integer, not tensor\(\[999, 749"):
        scheduler.step(torch.zeros(2, K, 7), scheduler.timesteps[:2], torch.zeros(2, 7, dtype=torch.int64))
    for t, s in ((5, 5), (3, 5), (5, -1), (1001, 0)):
        with pytest.raises(ValueError, match=f"no step from time {t} to {s}: give T = 1000"):
            scheduler.posterior(t, s)


def test_impossible_plans_and_noise_are_refused(scheduler):
    for settings in ({}, {"num_inference_steps": 3, "timesteps": [1]}):
        with pytest.raises(ValueError, match="either"):
            scheduler.set_timesteps(**settings)
    for timesteps in ([1, 2], [1000], [3.5], "later"):
        with pytest.raises(ValueError, match="timestep"):
            scheduler.set_timesteps(timesteps=timesteps)
    x = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="1000"):
        scheduler.add_noise(x, torch.zeros(1, 3), 1000)
    with pytest.raises(ValueError, match=r"\(3,\), the sample \(1, 3\)"):
        scheduler.add_noise(x, torch.zeros(3), 10)
    with pytest.raises(ValueError, match=r"torch\.int64 5\.\.5"):
        scheduler.add_noise(x + K, torch.zeros(1, 3), 10)


def test_settings_changed_later_take_effect():
    changed, made = DiscreteDDIMScheduler(num_classes=4), DiscreteDDIMScheduler(4, 10, beta_schedule="linear", eta=1.0)
    changed.register_to_config(num_train_timesteps=10, beta_schedule="linear", eta=1.0)
    assert np.array_equal(changed.alpha_bar, made.alpha_bar)
    assert changed.timesteps.tolist() == made.timesteps.tolist()
    with pytest.raises(ValueError, match="eta"):
        changed.register_to_config(eta=2.0)
    assert changed.config.eta == 1.0
    assert np.array_equal(changed.alpha_bar, made.alpha_bar)
