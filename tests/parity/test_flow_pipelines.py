"""Our schedulers inside the stock pipelines for flow matching: Stable Diffusion 3, Flux, Wan, Qwen-Image, Z-Image."""

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from tiny_flow_pipelines import FLOW_FAMILIES, STOCK, run_flow

from ddim_plugin import (
    GeneralizedDDIMScheduler,
    InverseDDIMScheduler,
    MultistepDDIMScheduler,
    restore_scheduler,
)

OURS = (GeneralizedDDIMScheduler, MultistepDDIMScheduler, InverseDDIMScheduler)
HALF = torch.bfloat16


def ours(name, cls=GeneralizedDDIMScheduler, **settings):
    """What a user types."""
    return cls.from_config(STOCK[name]().config, **settings)


def first_order(name, steps):
    """The stock sampler of a family at order 1: Euler, or what UniPC is without its corrector."""
    if STOCK[name].func is FlowMatchEulerDiscreteScheduler:
        return STOCK[name]()
    return STOCK[name](solver_order=1, disable_corrector=list(range(steps)))


@pytest.fixture(autouse=True)
def no_complaints(quiet_diffusers, recwarn):
    """Nothing is logged about our schedulers."""
    yield
    assert [message for message in quiet_diffusers if "cheduler" in message] == []
    assert [str(each.message) for each in recwarn if "ddim_plugin" in each.filename] == []


@pytest.mark.parametrize("name", FLOW_FAMILIES)
def test_eta_0_is_the_stock_sampler(name):
    expected_times, samples, expected = run_flow(name, first_order(name, 6))
    times, mine, picture = run_flow(name, ours(name))
    assert times == pytest.approx(expected_times, rel=1e-6)
    for sample, other in zip(mine, samples, strict=True):
        assert sample.dtype == other.dtype
        assert (sample - other).abs().max() <= 2e-5
    assert (picture - expected).abs().max() <= 2e-5
    assert picture.std() > 0.05


@pytest.mark.parametrize("name", FLOW_FAMILIES)
def test_half_precision(name):
    """Near the stock sampler's picture, which rounds x in every step."""
    expected = run_flow(name, first_order(name, 6), HALF)[2]
    for cls in (GeneralizedDDIMScheduler, MultistepDDIMScheduler):
        picture = run_flow(name, ours(name, cls), HALF)[2]
        assert picture.isfinite().all()
        if cls is GeneralizedDDIMScheduler:
            assert (picture.float() - expected.float()).abs().max() <= 0.03


@pytest.mark.parametrize("name", FLOW_FAMILIES)
def test_noise_of_the_config(name):
    times, samples, plain = run_flow(name, ours(name))
    torch.manual_seed(1)  # these pipelines do not pass their generator to the steps
    noisy_times, noisy, picture = run_flow(name, ours(name, eta=0.7))
    assert noisy_times == times
    assert picture.isfinite().all()
    assert (picture - plain).abs().max() > 0.02
    assert all(not torch.equal(one, other) for one, other in zip(noisy, samples, strict=True))
    torch.manual_seed(1)
    assert torch.equal(picture, run_flow(name, ours(name, eta=0.7))[2])
    assert run_flow(name, ours(name, eta=0.7), HALF)[2].isfinite().all()


@pytest.mark.parametrize("name", FLOW_FAMILIES)
@pytest.mark.parametrize("order", [None, 1, 2, 4])
def test_multistep(name, order):
    times, samples, picture = run_flow(name, ours(name, MultistepDDIMScheduler, solver_order=order))
    assert len(times) in (4, 5, 6)  # a part of the plan with `strength`
    assert times == sorted(times, reverse=True)
    assert samples[-1].isfinite().all()
    again = run_flow(name, ours(name, MultistepDDIMScheduler, solver_order=order))[2]
    assert torch.equal(picture, again)


@pytest.mark.parametrize("name", FLOW_FAMILIES)
@pytest.mark.parametrize("cls", OURS)
def test_back_to_the_stock_class(name, cls, quiet_diffusers):
    """Without a warning, with every setting that the stock config has, and with its pictures."""
    stock = STOCK[name]()
    back = type(stock).from_config(ours(name, cls).config)
    assert quiet_diffusers == []
    settings = {key: value for key, value in stock.config.items() if not key.startswith("_")}
    assert {key: back.config[key] for key in settings} == settings
    if cls is GeneralizedDDIMScheduler:
        assert torch.equal(run_flow(name, back)[2], run_flow(name, STOCK[name]())[2])


def test_the_user_may_pass_sigmas():
    for name in ("Flux, distilled", "Qwen-Image", "Z-Image"):
        sigmas = [0.95, 0.7, 0.4, 0.1]
        expected = run_flow(name, STOCK[name](), steps=4, sigmas=sigmas)
        found = run_flow(name, ours(name), steps=4, sigmas=sigmas)
        assert found[0] == pytest.approx(expected[0])
        assert (found[2] - expected[2]).abs().max() <= 2e-5


def test_other_flow_samplers_convert_too():
    """A pipeline in which a user has set another sampler of diffusers for flow matching."""
    config = STOCK["Flux, distilled"]().config
    for cls in (diffusers.FlowMatchHeunDiscreteScheduler, diffusers.FlowMatchLCMScheduler):
        other = GeneralizedDDIMScheduler.from_config(cls.from_config(config).config)
        found = run_flow("Flux, distilled", other, sigmas=None)
        expected = run_flow("Flux, distilled", STOCK["Flux, distilled"]())
        assert (found[2] - expected[2]).abs().max() <= 2e-5
    for cls in (UniPCMultistepScheduler, diffusers.DPMSolverMultistepScheduler):
        stock = cls(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
        other = GeneralizedDDIMScheduler.from_config(stock.config)
        assert run_flow("Flux, distilled", other)[2].isfinite().all()  # which passes mu to every scheduler
        assert other.timesteps.tolist() == pytest.approx(_times(stock, 6))


def _times(stock, steps):
    stock.set_timesteps(steps)
    return stock.timesteps.tolist()


def test_a_pipeline_keeps_our_scheduler_on_disk(tmp_path):
    scheduler = ours("Flux", eta=0.3)
    FLOW_FAMILIES["Flux"](scheduler, torch.float32)[0].save_pretrained(tmp_path)
    texts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    loaded = diffusers.FluxPipeline.from_pretrained(tmp_path, **texts)
    assert type(loaded.scheduler) is FlowMatchEulerDiscreteScheduler  # so that it opens without this package
    assert loaded.scheduler.config.use_dynamic_shifting
    restored = restore_scheduler(loaded).scheduler
    assert type(restored) is GeneralizedDDIMScheduler
    assert restored.config.eta == 0.3
    for key in [key for key in scheduler.config if not key.startswith("_")]:
        assert restored.config[key] == scheduler.config[key], key
