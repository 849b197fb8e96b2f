"""Loops of flow-matching pipelines: how they find a step, add noise to a picture, and start in the middle."""

import copy

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from ddim_plugin import GeneralizedDDIMScheduler, InverseDDIMScheduler, MultistepDDIMScheduler

FLOW = {"prediction_type": "flow_prediction", "shift": 3.0}
VE = {"prediction_type": "score", "sigma_max": 50.0}


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape or (2, 3, 4, 4), generator=torch.Generator().manual_seed(seed)).to(dtype)


def planned(cls=GeneralizedDDIMScheduler, config=FLOW, S=8, **more):
    scheduler = cls(**config, **more)
    scheduler.set_timesteps(S)
    return scheduler


def stock(S=8):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(S)
    return scheduler


def network(x, t):
    return torch.tanh(0.7 * x + 0.001 * float(t))


@pytest.mark.parametrize("config", [FLOW, VE])
@pytest.mark.parametrize("cls", [GeneralizedDDIMScheduler, MultistepDDIMScheduler])
def test_timesteps_in_any_form_find_the_same_step(cls, config):
    """Elements of `timesteps`, clones of them, and numbers of Python. Each loop is one of its own."""
    found = []
    for form in (lambda t: t, torch.clone, float, lambda t: t.double(), lambda t: t.numpy()):
        scheduler, x = planned(cls, config), normal()
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t), form(t), x).prev_sample
        found.append(x)
    assert all(torch.equal(x, found[0]) for x in found)


@pytest.mark.parametrize("config", [FLOW, VE])
@pytest.mark.parametrize("cls", [GeneralizedDDIMScheduler, MultistepDDIMScheduler, InverseDDIMScheduler])
def test_nothing_is_read_on_the_host(cls, config, refuse_host_reads):
    scheduler, x = planned(cls, config), normal()
    outputs = [normal(seed=i) for i in range(8)]
    with refuse_host_reads:
        for t, output in zip(scheduler.timesteps, outputs, strict=True):
            x = scheduler.step(output, t, x, return_dict=False)[0]
    assert x.isfinite().all()


@pytest.mark.parametrize("begin", [0, 2, 7])
def test_a_loop_that_begins_in_the_middle(begin):
    """Image to image: noise is added for `timesteps[begin]`, and the loop runs from there."""
    reference, ours = stock(), planned()
    picture, noise = normal(), normal(seed=1)
    xs = []
    for scheduler in (reference, ours):
        times = scheduler.timesteps[begin:]
        scheduler.set_begin_index(begin)
        x = scheduler.scale_noise(picture, times[:1], noise)
        for t in times:
            x = scheduler.step(network(x, t), t, x, return_dict=False)[0]
        xs.append(x)
    assert (xs[0] - xs[1]).abs().max() <= 2e-6


def test_noise_at_times_of_the_plan_and_between():
    ours, picture, noise = planned(), normal(), normal(seed=1)
    for i, t in enumerate(ours.timesteps):
        sigma = ours.sigmas[i]
        for form in (t, t[None], float(t), t.expand(2)):
            assert torch.allclose(ours.scale_noise(picture, form, noise), (1 - sigma) * picture + sigma * noise)
    between = torch.tensor([432.1, 17.5])
    expected = picture + (between / 1000).view(2, 1, 1, 1) * (noise - picture)
    assert torch.allclose(ours.add_noise(picture, noise, between), expected, atol=1e-6)
    assert torch.allclose(ours.get_velocity(picture, noise, between) * 0 + expected, expected)


def test_noise_without_a_plan():
    """Training: real times in [0, 1000]."""
    ours, picture, noise = GeneralizedDDIMScheduler(**FLOW), normal(), normal(seed=1)
    times = torch.tensor([250.0, 1000.0])
    found = ours.add_noise(picture, noise, times)
    assert torch.allclose(found[0], 0.75 * picture[0] + 0.25 * noise[0])
    assert torch.equal(found[1], noise[1])


def test_a_timestep_for_each_sample():
    ours, x = planned(eta=0.5), normal()
    times = ours.timesteps[[1, 5]]
    output, z = normal(seed=1), normal(seed=2)
    whole = ours.step(output, times, x, variance_noise=z).prev_sample
    for i in range(2):
        one = slice(i, i + 1)
        single = ours.step(output[one], times[i], x[one], variance_noise=z[one]).prev_sample
        assert torch.allclose(whole[one], single, atol=1e-6)


def test_a_timestep_for_each_token():
    """As LTX pipelines step: some tokens are already less noisy, and each goes to the next lower level."""
    reference, ours = stock(), planned()
    x, output = normal(2, 5, 6), normal(2, 5, 6, seed=1)
    tokens = ours.timesteps[[2, 4, 2, 7, 5]].expand(2, 5)
    expected = reference.step(output, ours.timesteps[2], x, per_token_timesteps=tokens, return_dict=False)[0]
    found = ours.step(output, ours.timesteps[2], x, per_token_timesteps=tokens, return_dict=False)[0]
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    ours, x = planned(), normal(dtype=dtype)
    t, output = ours.timesteps[4], normal(seed=1, dtype=dtype)
    found = ours.step(output, t, x).prev_sample
    wide = ours.step(output.float(), t, x.float()).prev_sample
    assert found.dtype == dtype
    assert torch.equal(found, wide.to(dtype))


@pytest.mark.parametrize("cls", [GeneralizedDDIMScheduler, MultistepDDIMScheduler])
def test_two_loops_and_copies(cls):
    """A second `set_timesteps`, or a copy, begins anew."""
    ours, finals = planned(cls), []
    for scheduler in (ours, ours, copy.deepcopy(ours)):
        scheduler.set_timesteps(8)
        x = normal()
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t), t, x).prev_sample
        finals.append(x)
    assert all(torch.equal(x, finals[0]) for x in finals)


def test_outputs_of_a_step_are_those_of_the_path():
    """x̂0 = x − σ·v and ε̂ = x + (1 − σ)·v."""
    ours, x, v = planned(eta=0.4), normal(), normal(seed=1)
    for i, t in enumerate(ours.timesteps):
        sigma, out = float(ours.sigmas[i]), ours.step(v, t, x, generator=torch.Generator().manual_seed(0))
        assert torch.allclose(out.pred_original_sample, x - sigma * v, atol=1e-5)
        assert torch.allclose(out.pred_epsilon, x + (1 - sigma) * v, atol=1e-5)


def test_clipping_holds_the_image_in_its_range():
    ours = planned(clip_sample=True)
    x, v = 3 * normal(), 5 * normal(seed=1)
    for t in ours.timesteps:
        out = ours.step(v, t, x)
        assert out.pred_original_sample.abs().max() <= 1 + 1e-6
    assert out.prev_sample.abs().max() <= 1 + 1e-6
