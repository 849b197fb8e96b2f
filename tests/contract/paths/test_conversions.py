"""Configs of flow-matching and variance-exploding schedulers: to ours, and back without a warning."""

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ScoreSdeVeScheduler, UniPCMultistepScheduler

from ddim_plugin import GeneralizedDDIMScheduler, InverseDDIMScheduler, MultistepDDIMScheduler

OF_PATHS = {"num_train_timesteps", "prediction_type", "shift", "flow_shift", "use_flow_sigmas", "use_dynamic_shifting"}
OURS = (GeneralizedDDIMScheduler, MultistepDDIMScheduler, InverseDDIMScheduler)
STOCK = {
    "plain": (FlowMatchEulerDiscreteScheduler, {}),
    "shift": (FlowMatchEulerDiscreteScheduler, {"shift": 3.0}),
    "flux": (FlowMatchEulerDiscreteScheduler, {"shift": 3.0, "use_dynamic_shifting": True, "max_shift": 1.1}),
    "qwen": (
        FlowMatchEulerDiscreteScheduler,
        {"use_dynamic_shifting": True, "shift_terminal": 0.02, "max_shift": 0.9, "max_image_seq_len": 8192},
    ),
    "mochi": (FlowMatchEulerDiscreteScheduler, {"invert_sigmas": True}),
    "karras": (FlowMatchEulerDiscreteScheduler, {"use_karras_sigmas": True, "num_train_timesteps": 500}),
    "unipc": (
        UniPCMultistepScheduler,
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 5.0},
    ),
    "dpm": (
        diffusers.DPMSolverMultistepScheduler,
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 2.0},
    ),
    "ncsnpp": (ScoreSdeVeScheduler, {"sigma_max": 380.0, "num_train_timesteps": 1000, "snr": 0.075}),
}


def settings(scheduler):
    return {key: value for key, value in scheduler.config.items() if not key.startswith("_")}


def made(name, folder=None):
    """A stock scheduler: fresh, or read from disk as in a pipeline."""
    cls, config = STOCK[name]
    scheduler = cls(**config)
    if folder is not None:
        scheduler.save_pretrained(folder)
        scheduler = cls.from_pretrained(folder)
    return scheduler


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("cls", OURS)
@pytest.mark.parametrize("name", STOCK)
def test_there_and_back(name, cls, on_disk, tmp_path, quiet_diffusers):
    stock = made(name, tmp_path if on_disk else None)
    ours = cls.from_config(stock.config)
    back = type(stock).from_config(ours.config)
    assert quiet_diffusers == []
    known = settings(stock)
    assert {key: back.config[key] for key in known} == known
    for key in OF_PATHS & known.keys():
        assert ours.config[key] == known[key], key


@pytest.mark.parametrize("cls", OURS)
@pytest.mark.parametrize("name", STOCK)
def test_ours_on_disk(name, cls, tmp_path, quiet_diffusers):
    """The file is the stock scheduler's, with our settings beside. Ours restores itself from it."""
    stock = made(name)
    more = {} if cls is InverseDDIMScheduler else {"eta": 0.25}
    ours = cls.from_config(stock.config, **more)
    ours.save_pretrained(tmp_path)
    opened = type(stock).from_pretrained(tmp_path)
    again = cls.from_pretrained(tmp_path)
    assert quiet_diffusers == []
    known = settings(stock)
    assert {key: opened.config[key] for key in known} == known
    assert settings(again) == settings(ours)
    assert settings(cls.from_config(opened.config)) == settings(ours)
    given = {"mu": 0.7} if known.get("use_dynamic_shifting") else {}
    for each in (ours, again):
        each.set_timesteps(7, **given)
    assert torch.equal(again.timesteps, ours.timesteps)


def test_ours_to_ours():
    """What the other classes do not have comes back."""
    sampler = GeneralizedDDIMScheduler(prediction_type="flow_prediction", shift=3.0, eta=0.3, clip_sample=True)
    inverse = InverseDDIMScheduler.from_config(sampler.config, eta=0.0)
    assert inverse.config.shift == 3
    back = GeneralizedDDIMScheduler.from_config(inverse.config)
    assert not back.config.clip_sample  # it decodes what was encoded
    assert back.config.shift == 3
    few = MultistepDDIMScheduler.from_config(sampler.config, solver_order=2)
    assert MultistepDDIMScheduler.from_config(GeneralizedDDIMScheduler.from_config(few.config).config).config.shift == 3


def test_the_settings_of_a_user_win():
    stock = FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = GeneralizedDDIMScheduler.from_config(stock.config, shift=6.0)
    assert ours.config.shift == 6
    assert FlowMatchEulerDiscreteScheduler.from_config(ours.config).config.shift == 6
    own = GeneralizedDDIMScheduler.from_config(stock.config, prediction_type="sample")
    own.set_timesteps(4)
    assert own.sigmas[0] == 1
    assert own.config.use_flow_sigmas
    terminal = GeneralizedDDIMScheduler.from_config(stock.config, shift_terminal=0.1)
    terminal.set_timesteps(5)
    assert float(terminal.sigmas[-2]) == pytest.approx(0.1)


def test_attributes_that_pipelines_read():
    """`config.get` of the shifts, `order`, `sigmas`, `init_noise_sigma`."""
    ours = GeneralizedDDIMScheduler.from_config(made("flux").config)
    for key, value in settings(made("flux")).items():
        if key in ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "use_dynamic_shifting"):
            assert ours.config.get(key) == value, key
    ours.set_timesteps(4, mu=0.5)
    assert ours.order == 1
    assert ours.init_noise_sigma == 1
    assert ours.sigmas.shape == (5,)
    assert ours.image_range == (-1, 1)
    assert GeneralizedDDIMScheduler.from_config(made("unipc").config).config.use_flow_sigmas


def test_a_variance_exploding_config():
    ours = GeneralizedDDIMScheduler.from_config(made("ncsnpp").config)
    assert (ours.config.sigma_min, ours.config.sigma_max, ours.config.prediction_type) == (0.01, 380.0, "score")
    assert ours.init_noise_sigma == 380
    assert ours.image_range == (0, 1)
    assert ours.config.corrector_steps == 0
    ours.set_timesteps(1000)
    stock = made("ncsnpp")
    assert ours.timesteps.tolist() == pytest.approx(stock.discrete_sigmas.flip(0).tolist(), rel=1e-4)


def test_the_paths_do_not_mix(quiet_diffusers):
    """A table of β from a config with σ of Karras, and a family that is neither."""
    for cls in (diffusers.EulerDiscreteScheduler, diffusers.UniPCMultistepScheduler):
        ours = GeneralizedDDIMScheduler.from_config(cls(beta_schedule="scaled_linear").config)
        assert ours.config.beta_schedule == "scaled_linear"
        assert len(ours.alphas_cumprod) == 1000
    with pytest.raises(ValueError, match="belongs to another family of models"):
        GeneralizedDDIMScheduler.from_config(diffusers.CMStochasticIterativeScheduler().config)
