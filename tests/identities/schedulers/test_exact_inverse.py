"""InverseDDIMScheduler solves the steps of its sampler: on every path, in loops of every kind."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ddim_plugin import (
    GeneralizedDDIMScheduler,
    InverseDDIMScheduler,
    InverseMultistepDDIMScheduler,
    MultistepDDIMScheduler,
)

GAUSSIAN = ((1.0, 0.1, 0.05),)  # weight, mean and variance of each part
MIXTURE = ((0.3, -0.6, 0.1), (0.7, 0.5, 0.2))
PATHS = {
    "epsilon": {},
    "sample": {"prediction_type": "sample"},
    "v": {"prediction_type": "v_prediction"},
    "zero terminal SNR": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    "flow": {"prediction_type": "flow_prediction"},
    "exploding": {"prediction_type": "score", "sigma_max": 50.0},
    "quadratic": {"timestep_spacing": "quadratic"},
    "Stable Diffusion": {"timestep_spacing": "leading", "set_alpha_to_one": False, "steps_offset": 1},
}
IMAGES = 1.2 * torch.rand(3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 0.6


def perfect(data, scheduler, x, t):
    """The output of a perfect network for a mixture of Gaussians."""
    a, b = scheduler.path.level(scheduler.path.time(t.item()))
    weight, mean, variance = torch.tensor(data, dtype=torch.float64).T.reshape(3, -1, *[1] * x.ndim)
    variance_t, off = a**2 * variance + b**2, x.double() - a * mean
    share = torch.softmax(weight.log() - variance_t.log() / 2 - off**2 / variance_t / 2, 0)
    eps, x0 = (share * b * off / variance_t).sum(0), (share * (mean + a * variance * off / variance_t)).sum(0)
    outputs = {"epsilon": eps, "sample": x0, "v_prediction": a * eps - b * x0, "flow_prediction": eps - x0}
    made = -eps / b if scheduler.config.prediction_type == "score" else outputs[scheduler.config.prediction_type]
    return made.to(x.dtype)


def planned(S, cls=InverseDDIMScheduler, **config):
    scheduler = cls(**config)
    scheduler.set_timesteps(**({"num_inference_steps": S} if isinstance(S, int) else {"timesteps": S}))
    return scheduler


def loop(scheduler, x, data=GAUSSIAN, shows=True, turn=lambda x: x, times=None):
    for t in scheduler.timesteps if times is None else times:
        seen = scheduler.scale_model_input(x, t) if shows else x
        x = turn(scheduler.step(perfect(data, scheduler, seen, t), t, x, return_dict=False)[0])
    return x


def sampler_of(up, S, cls=GeneralizedDDIMScheduler):
    down = cls.from_config(up.config)
    down.set_timesteps(**({"num_inference_steps": S} if isinstance(S, int) else {"timesteps": S}))
    return down


def error(S, k, data=GAUSSIAN, dtype=torch.float64, classes=(InverseDDIMScheduler, GeneralizedDDIMScheduler), **config):
    """The mean square of x_0 → x_T → x_0."""
    keys = {"shows", "turn"} & config.keys()
    settings, how = {key: config[key] for key in config.keys() - keys}, {key: config[key] for key in keys}
    up = planned(S, classes[0], refinement_steps=k, **settings)
    x0 = IMAGES.to(dtype)
    again = loop(sampler_of(up, S, classes[1]), loop(up, x0, data, **how), data)
    return float((again.double() - x0.double()).square().mean())


# ---- what it costs and gains ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("S", [10, 20, 50])
@pytest.mark.parametrize(
    ("data", "path"),
    [(GAUSSIAN, path) for path in PATHS if path not in ("sample", "flow")]
    + [(MIXTURE, path) for path in ("epsilon", "sample", "exploding", "quadratic", "Stable Diffusion")],
)
def test_at_the_cost_of_the_plain_inverse_it_is_nearer(data, path, S):
    """Not with x_0, v or flow as output at any data: there the errors of the plain inverse may cancel."""
    assert len(planned(S, **PATHS[path]).timesteps) == S
    assert error(S, 0, data, **PATHS[path]) < error(S, None, data, **PATHS[path]) / 8


@pytest.mark.parametrize("S", [10, 20, 50])
@pytest.mark.parametrize("shows", [True, False])
def test_flow_is_nearer_at_the_same_cost(shows, S):
    """A first step of one evaluation is the plain one, so that nothing depends on `scale_model_input`."""
    flow = PATHS["flow"]
    assert len(planned(S, **flow).timesteps) == S
    assert error(S, 0, shows=shows, **flow) < error(S, None, **flow) / 7
    assert error(S, 0, MIXTURE, shows=shows, **flow) < error(S, None, MIXTURE, **flow) / 20


@pytest.mark.parametrize("path", PATHS)
def test_five_steps_of_gaussian_data_are_closed_to_rounding(path):
    assert error(5, 4, **PATHS[path]) < 1e-26
    assert error(5, 4, MIXTURE, **PATHS[path]) < 1e-20


@pytest.mark.parametrize(
    ("S", "path"),
    [(S, path) for S in (1, 2, 7) for path in ("epsilon", "flow", "exploding")] + [(999, "epsilon"), (1000, "flow")],
)
def test_any_number_of_steps(path, S):
    assert len(planned(S, **PATHS[path]).timesteps) == S
    limit = {1: 0.2, 2: 0.2, 7: 5e-3}.get(S, 1e-6)
    assert error(S, 0, **PATHS[path]) < limit
    if S in (2, 7):
        assert error(S, 4, **PATHS[path]) < 1e-26


def test_one_step_without_an_inverse_is_refused():
    with pytest.raises(ValueError, match="does not depend on x_1000, so it has no inverse"):
        planned(1, **PATHS["zero terminal SNR"])


@pytest.mark.parametrize("path", ["epsilon", "flow"])
def test_timesteps_of_ones_own(path):
    assert error([900, 500, 123, 7], 4, **PATHS[path]) < 1e-26


# ---- loops ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["epsilon", "flow", "exploding"])
@pytest.mark.parametrize(
    "how",
    [{"shows": False}, {"turn": torch.clone}, {"turn": lambda x: x.flatten(0, 1).view(x.shape)}],
    ids=["never shown", "cloned", "reshaped"],
)
def test_loops_of_other_pipelines(how, path):
    """Without a call of `scale_model_input`, and with samples that are other tensors between the steps."""
    assert error(10, 4, MIXTURE, **how, **PATHS[path]) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_state(dtype):
    """With a linear network the latent is as exact as its type, and the rest is the rounding of the sampler."""
    up, exact = planned(10, refinement_steps=4), planned(10, refinement_steps=4)
    x0 = IMAGES.to(dtype)
    z, truth = loop(up, x0), loop(exact, x0.double())
    assert (z.dtype, up._x.dtype) == (dtype, torch.float32)
    assert torch.equal(z, up._x.to(dtype))
    assert (z - truth).abs().max() < 2 * torch.finfo(dtype).eps * truth.abs().max()
    again, least = (loop(sampler_of(up, 10), each.to(dtype)).double() - x0.double() for each in (z, truth))
    assert again.square().mean() < 2 * least.square().mean()


@pytest.mark.parametrize("k", [0, 2])
def test_no_value_is_read_for_flow(k):
    up = planned(3, refinement_steps=k, **PATHS["flow"])
    times = up.timesteps.tolist()
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.randn(2, 4, 8, 8, dtype=torch.float16)
        for t in times:
            seen = up.scale_model_input(torch.cat([x] * 2), t)
            x = up.step(torch.tanh(seen)[:2] * 0.5, t, x, return_dict=False)[0]
        assert x.dtype == torch.float16


def test_a_step_of_another_loop_is_refused():
    """A step has several evaluations, and belongs to the loop that began it."""
    up = planned(5, refinement_steps=2)
    x = IMAGES
    for t in (up.timesteps[1], up.timesteps[-1]):
        with pytest.raises(ValueError, match="continues a step of another loop: step along scheduler.timesteps"):
            up.step(x, t, x)
    up.set_begin_index(0)
    loop(up, x, times=up.timesteps[:4])
    with pytest.raises(ValueError, match="one scheduler for each loop"):
        up.step(x, up.timesteps[1], x)
    up.set_begin_index(0)
    assert torch.equal(loop(up, x), loop(planned(5, refinement_steps=2), x))


def test_noise_is_added_to_an_image_at_other_times_only():
    """Image-to-image pipelines add noise for the first time of their loop, and the inverse begins with x_0."""
    up, noise = planned(5), torch.randn_like(IMAGES)
    assert torch.equal(up.add_noise(IMAGES, noise, up.timesteps[:1]), IMAGES)
    expected = sampler_of(up, 5).add_noise(IMAGES, noise, up.timesteps[3:4])
    assert torch.equal(up.add_noise(IMAGES, noise, up.timesteps[3:4]), expected)


# ---- the report ----------------------------------------------------------------------------------------------------


def test_the_report():
    up = planned(5, refinement_steps=3)
    with pytest.raises(ValueError, match="no residual was measured: run a loop"):
        up.report()
    z = loop(up, IMAGES, MIXTURE)
    report = up.report(tolerance=1e-2)
    assert report.timesteps.tolist() == sampler_of(up, 5).timesteps.tolist()[::-1]
    assert report.evaluations.shape == report.residual.shape == (5, 3)
    assert (report.total_evaluations == len(up.timesteps)).all()
    assert np.array_equal(report.converged, report.residual <= 1e-2)
    assert report.latent_std == pytest.approx(z.flatten(1).std(1, correction=0).numpy())
    assert not up.report(tolerance=0.0).converged.any()
    assert len(str(report).splitlines()) == 7
    assert report.to_dict()["residual"] == report.residual.tolist()
    plain = planned(5, refinement_steps=None)
    loop(plain, IMAGES)
    with pytest.raises(ValueError, match="no residual was measured"):
        plain.report()


@pytest.mark.parametrize("k", [-1, 1.5, "2", True])
def test_refinement_steps_are_checked(k):
    with pytest.raises(ValueError, match="refinement_steps must be 0 or more, or None"):
        InverseDDIMScheduler(refinement_steps=k)


@pytest.mark.parametrize("k", [None, 0, 3])
def test_a_config_keeps_refinement_steps_and_gives_a_sampler_none(k, tmp_path, quiet_diffusers):
    up = InverseDDIMScheduler(refinement_steps=k, denoising_start=0.25)
    up.save_pretrained(tmp_path)
    for each in (InverseDDIMScheduler.from_config(up.config), InverseDDIMScheduler.from_pretrained(tmp_path)):
        assert (each.config.refinement_steps, each.config.denoising_start) == (k, 0.25)
    for down in (GeneralizedDDIMScheduler.from_config(up.config), GeneralizedDDIMScheduler.from_pretrained(tmp_path)):
        assert "refinement_steps" not in down.config
        assert down.config.denoising_start == 0.25
    assert quiet_diffusers == []


# ---- a part of the process -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["epsilon", "flow", "exploding"])
def test_parts_of_the_process_are_the_whole(path):
    """A base model and a refiner, as in the pipelines of SDXL; and upwards the other way round."""
    S, data, config = 10, MIXTURE, PATHS[path]
    x = planned(S, GeneralizedDDIMScheduler, **config).init_noise_sigma * torch.randn_like(IMAGES)
    for cls in (GeneralizedDDIMScheduler, InverseDDIMScheduler):
        more = {"refinement_steps": 2} if cls is InverseDDIMScheduler else {}
        whole, base, refiner = (
            planned(S, cls, **part, **config, **more) for part in ({}, {"denoising_end": 0.6}, {"denoising_start": 0.6})
        )
        assert 0 < len(base.timesteps) < len(whole.timesteps)
        parts = (base, refiner) if cls is GeneralizedDDIMScheduler else (refiner, base)
        assert torch.equal(torch.cat([part.timesteps for part in parts]), whole.timesteps)
        begin = x if cls is GeneralizedDDIMScheduler else IMAGES
        if cls is GeneralizedDDIMScheduler:
            assert torch.equal(loop(refiner, loop(base, begin, data), data), loop(whole, begin, data))
            tail = whole.timesteps[len(base.timesteps) :]
            assert torch.equal(loop(refiner, begin, data), loop(whole, begin, data, times=tail))
    up = planned(S, denoising_start=0.4, refinement_steps=8, **config)
    again = loop(sampler_of(up, S), loop(up, IMAGES, data), data)
    assert torch.allclose(again, IMAGES, atol=1e-8)


@pytest.mark.parametrize(("start", "end"), [(-0.1, 1.0), (0.5, 0.5), (0.6, 0.4), (0.0, 1.1)])
def test_shares_out_of_order_are_refused(start, end):
    with pytest.raises(ValueError, match="must satisfy 0 ≤ start < end ≤ 1"):
        GeneralizedDDIMScheduler(denoising_start=start, denoising_end=end)


def test_a_part_without_a_step_is_refused():
    for cls in (GeneralizedDDIMScheduler, InverseDDIMScheduler):
        with pytest.raises(ValueError, match="no step lies between denoising_start=0.95 and denoising_end=1"):
            planned(5, cls, denoising_start=0.95)


# ---- multistep -----------------------------------------------------------------------------------------------------


def test_a_multistep_path_gains_with_each_pass():
    """A decoding and an encoding, two evaluations of each step, gain about two orders."""
    classes = InverseMultistepDDIMScheduler, MultistepDDIMScheduler
    errors = [error(10, k, MIXTURE, classes=classes) for k in (0, 2, 4, 8)]
    assert errors[1] < errors[0] / 10
    assert errors[2] < errors[1] / 10
    assert errors[3] < errors[2] / 100


def test_a_part_of_a_multistep_path():
    up = planned(10, InverseMultistepDDIMScheduler, refinement_steps=12, denoising_start=0.5)
    down = sampler_of(up, 10, MultistepDDIMScheduler)
    assert set(down.timesteps.tolist()) <= set(up.timesteps.tolist())
    assert torch.allclose(loop(down, loop(up, IMAGES, MIXTURE), MIXTURE), IMAGES, atol=1e-4)
    assert up.report().residual.shape == (1, 3)
    with pytest.raises(ValueError, match="denoising_end=0.5 must be 1: all steps are solved together"):
        planned(10, InverseMultistepDDIMScheduler, denoising_end=0.5)
    with pytest.raises(ValueError, match="no step lies between denoising_start"):
        planned(5, InverseMultistepDDIMScheduler, denoising_start=0.9999)


def test_parts_of_the_process_at_no_refinement():
    """Each step of a part is evaluated once, and levels that a sampler refuses are refused upwards too."""
    for start, end, count in ((0.0, 0.2, 2), (0.9, 1.0, 1), (0.3, 0.8, 5)):
        up = InverseDDIMScheduler(refinement_steps=0, denoising_start=start, denoising_end=end)
        up.set_timesteps(10)
        assert len(up.timesteps) == count
    up = InverseDDIMScheduler(refinement_steps=0, rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="divides by zero"):
        up.set_timesteps(10)


def test_loops_in_turn_without_set_timesteps():
    up = InverseDDIMScheduler()
    up.set_timesteps(5)
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    found = []
    for _ in range(2):
        z = x
        for t in up.timesteps:
            z = up.step(torch.tanh(up.scale_model_input(z, t)), t, z).prev_sample
        found.append((z, up.report().residual))
    assert torch.equal(found[0][0], found[1][0])
    assert (found[0][1] == found[1][1]).all()
