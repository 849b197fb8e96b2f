"""Guidance by a classifier, for classes of normal pixels: everything is known in closed form."""

import math

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from oracle import outputs

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler, MultistepDDIMScheduler

SHARES, MEANS, DEVIATIONS = (0.2, 0.5, 0.3), (-0.6, 0.1, 0.7), (0.15, 0.3, 0.2)
PATHS = {kind: {"prediction_type": kind} for kind in ("epsilon", "sample", "v_prediction")}
PATHS |= {"flow": {"prediction_type": "flow_prediction", "shift": 2.0}}
PATHS |= {"inverted": {"prediction_type": "flow_prediction", "shift": 2.0, "invert_sigmas": True}}
PATHS |= {"exploding": {"prediction_type": "score", "sigma_min": 0.01, "sigma_max": 40.0}}
PATHS |= {"root": {"beta_schedule": "sqrt"}, "zero": PATHS["v_prediction"] | {"rescale_betas_zero_snr": True}}
PATHS |= {"edm": {"prediction_type": "edm", "sigma_data": 0.5}}
every_path = pytest.mark.parametrize("settings", PATHS.values(), ids=PATHS)


def build(settings, **changes):
    """A scheduler. `from_config` reads configs of diffusers, which have no sigma_data."""
    if "sigma_data" in settings:
        return GeneralizedDDIMScheduler(**settings, **changes)
    return GeneralizedDDIMScheduler.from_config(settings, **changes)


def level_of(scheduler, t):
    return scheduler.path.level(scheduler.path.time(t if scheduler.path.continuous else int(t)))


def conditional(x, level, k):
    """x̂0 and log p(x_t|y = k) of each image."""
    a, b = level
    mean, v = MEANS[k], DEVIATIONS[k] ** 2
    total = a**2 * v + b**2
    log = -0.5 * ((x - a * mean) ** 2 / total + math.log(2 * math.pi * total)).flatten(1).sum(1)
    return mean + a * v / total * (x - a * mean), log


def joint_logs(x, level):
    """log p(y)·p(x_t|y), (B, K): logits of the exact classifier."""
    return torch.stack([math.log(w) + conditional(x, level, k)[1] for k, w in enumerate(SHARES)], 1)


class Mixture(ModelMixin, ConfigMixin):
    """The exact network without labels, or with `known` that of one class."""

    @register_to_config
    def __init__(self, sample_size=2, in_channels=1, out_channels=1, num_class_embeds=None):
        super().__init__()
        self.class_embedding, self.weight, self.known = None, torch.nn.Parameter(torch.zeros(1)), None

    def forward(self, x, t, class_labels=None):
        level, width = level_of(self.scheduler, t.item()), self.scheduler.config.sigma_data
        c_in = 1 / math.hypot(level.noise, width) if width else 1.0
        x = x / c_in
        guesses = torch.stack([conditional(x, level, k)[0] for k in range(3)], 1)
        share = joint_logs(x, level).softmax(1)
        if self.known is not None:
            share = torch.nn.functional.one_hot(torch.tensor([self.known] * len(x)), 3).to(x)
        x0 = (share.view(-1, 3, 1, 1, 1) * guesses).sum(1)
        eps = (x - level.signal * x0) / level.noise
        made = outputs(level, x0, eps)
        if width:  # Eq. 7 of Karras et al. (2022), solved for F
            made["edm"] = (x0 - (width * c_in) ** 2 * x) / (level.noise * width * c_in)
        return UNet2DOutput(sample=self.scheduler.path.output_sign * made[self.scheduler.config.prediction_type])


def made(scheduler):
    network = torch.nn.Module.to(Mixture(), torch.float64)
    network.scheduler = scheduler
    pipe = GeneralizedDDIMPipeline(network, scheduler)
    pipe.set_progress_bar_config(disable=True)

    def classifier(x, t):
        assert t.shape == (len(x),)
        return joint_logs(x, level_of(scheduler, t[0].item()))

    return pipe, classifier


def noise(B, seed=0):
    return torch.randn(B, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@every_path
def test_guided_by_the_exact_classifier_the_network_is_that_of_the_class(settings):
    """At scale 1, Bayes' rule: ∇ log p(x|y) = ∇ log p(x) + ∇ log p(y|x). Labels are those of each image."""
    scheduler = build(settings)
    pipe, classifier = made(scheduler)
    scheduler.set_timesteps(7)
    condition = pipe._condition(3, class_labels=[2, 0, 1], classifier=classifier)
    for t in scheduler.timesteps:
        level = level_of(scheduler, t.item())
        x = level.signal * 0.2 + level.noise * noise(3)
        guided, exact, x = pipe._predict(x, t, condition), [], scheduler.scale_model_input(x, t)
        for row, k in enumerate((2, 0, 1)):
            pipe.unet.known = k if level.signal else None  # pure noise is not guided
            exact.append(pipe.unet(x[row : row + 1], t).sample)
        pipe.unet.known = None
        exact = torch.cat(exact)
        assert torch.allclose(guided, exact, rtol=1e-6, atol=1e-6 * float(exact.abs().max())), t
        if level.signal:
            assert not torch.allclose(pipe.unet(x, t).sample, exact, rtol=1e-2)


def moments(images):
    return [float(images.mean()), float(images.std())]


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["v_prediction", "flow", "exploding", "edm"])
def test_samples_have_the_moments_of_their_class(eta, name):
    pipe, classifier = made(build(PATHS[name], eta=eta))
    generator = torch.Generator().manual_seed(1)
    given = {"class_labels": 2, "classifier": classifier, "generator": generator, "output_type": "latent"}
    images = pipe(800, 150, latents=noise(800), **given).images
    assert moments(images) == pytest.approx([MEANS[2], DEVIATIONS[2]], abs=0.02)


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (GeneralizedDDIMScheduler, {"eta": 0.6}),
        (GeneralizedDDIMScheduler, {"eta": 1.0, "corrector_steps": 1}),
        (MultistepDDIMScheduler, {}),
        (MultistepDDIMScheduler, {"eta": 1.0}),
    ],
)
def test_samples_are_those_of_the_network_of_the_class(cls, settings):
    """Step by step, with the same noise, for every sampler that uses ε̂ alone."""
    scheduler = cls(prediction_type="v_prediction", **settings)
    pipe, classifier = made(scheduler)
    seeds = [torch.Generator().manual_seed(2) for _ in range(2)]
    guided = pipe(3, 9, generator=seeds[0], class_labels=0, classifier=classifier, output_type="latent").images
    pipe.unet.known = 0
    assert torch.allclose(guided, pipe(3, 9, generator=seeds[1], output_type="latent").images, atol=1e-6)


def test_a_larger_scale_sharpens():
    """p(x)·p(y|x)^s: with s the samples move away from the other classes."""
    pipe, classifier = made(GeneralizedDDIMScheduler(prediction_type="v_prediction"))
    given = {"class_labels": 1, "classifier": classifier, "output_type": "latent", "latents": noise(400)}
    spread = [moments(pipe(400, 60, classifier_scale=s, **given).images)[1] for s in (0.0, 1.0, 4.0)]
    assert spread[0] > 1.5 * spread[1] > 1.5 * 1.05 * spread[2]
    plain = pipe(400, 60, latents=noise(400), output_type="latent").images
    assert torch.equal(plain, pipe(400, 60, classifier_scale=0.0, **given).images)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_algorithm_1_is_a_loop_that_shifts_the_mean(variance_type):
    """With η = 1: μ + s·σ²·∇ log p(y|x_t), written out with the scheduler's own mean and deviation."""
    scheduler = GeneralizedDDIMScheduler(variance_type=variance_type, eta=1.0)
    pipe, classifier = made(scheduler)
    seeds = [torch.Generator().manual_seed(3) for _ in range(2)]
    given = {"class_labels": [0, 2], "classifier": classifier, "classifier_scale": 1.7, "output_type": "latent"}
    sampled = pipe(2, 12, latents=noise(2), generator=seeds[0], **given).images
    scheduler.set_timesteps(12)
    x = noise(2)
    for t in scheduler.timesteps:
        given_x = x.clone().requires_grad_()
        log = joint_logs(given_x, level_of(scheduler, t.item())).log_softmax(1)
        (gradient,) = torch.autograd.grad(log[0, 0] + log[1, 2], given_x)
        step = scheduler.step(pipe.unet(x, t).sample, t, x, generator=seeds[1])
        z = (step.prev_sample - step.mean) / step.std if step.std else torch.zeros_like(x)
        x = step.mean + 1.7 * step.std**2 * gradient + step.std * z
    assert torch.allclose(sampled, x, atol=1e-9)


@pytest.mark.parametrize("cls", [GeneralizedDDIMScheduler, MultistepDDIMScheduler])
@pytest.mark.parametrize("name", ["v_prediction", "flow"])
def test_inversion_with_a_classifier_is_exact(cls, name):
    """The gradient is part of the prediction, upwards as downwards."""
    pipe, classifier = made(cls.from_config(PATHS[name]))
    images = torch.tensor([0.55, 0.85]).double().view(2, 1, 1, 1) + 0.05 * noise(2)
    shared = {"num_inference_steps": 30, "class_labels": [1, 2], "classifier": classifier, "classifier_scale": 1.5}
    z, report = pipe.encode(images, refinement_steps=8, tolerance=1e-6, return_report=True, **shared)
    assert report.converged.all()
    again = pipe.decode(z, output_type="pt", **shared)
    assert torch.allclose(again, images, atol=1e-6)
    plain = pipe.encode(images, 30, refinement_steps=8)
    assert not torch.allclose(plain, z, atol=1e-2)
    path = pipe.interpolate(z[0], z[1], 3, output_type="latent", **(shared | {"class_labels": 2}))
    assert path.shape == (3, 1, 2, 2)
