"""Configs of version 0.1 with settings that are gone: they open, with one warning if a value is lost."""

import json
import warnings

import diffusers
import numpy as np
import pytest
from plans import settings

from ddim_plugin import GeneralizedDDIMScheduler, InverseMultistepDDIMScheduler, MultistepDDIMScheduler

DEFAULTS = {
    "solver_quantity": None,
    "solver_coordinate": None,
    "solver_corrector": None,
    "solver_extrapolation": None,
    "start_from_top": True,
}
OTHERS = {
    "solver_quantity": "sample",
    "solver_coordinate": "angle",
    "solver_corrector": "pec",
    "solver_extrapolation": 1.2,
    "start_from_top": False,
}
MULTISTEP = [MultistepDDIMScheduler, InverseMultistepDDIMScheduler]


def saved_by_0_1(cls, own, **stock):
    """`scheduler_config.json` as version 0.1 wrote it."""
    base = settings(diffusers.DDIMScheduler(clip_sample=False, **stock))
    base.pop("timestep_spacing")
    kept = {"eta": 0.0, "eps_mean_square": None, "use_clipped_model_output": False, "variance_type": "fixed_small"}
    if cls in MULTISTEP:
        kept |= {"timestep_spacing": "few_steps", "solver_order": 2, "lower_order_final": True}
        kept |= DEFAULTS | {"fitted_timesteps": {"3": [900, 500, 20]}}
    else:
        kept |= {"timestep_spacing": "linear"}
    sampler = {"sampler": {}} if cls is InverseMultistepDDIMScheduler else {}
    return base | {"_class_name": cls.__name__, "_diffusers_version": "0.42.1", "_ddim_plugin": kept | own | sampler}


def opened(cls, config, tmp_path):
    """The scheduler from a file and from a dictionary, each with the warnings it gave."""
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    made = []
    for make in (lambda: cls.from_pretrained(tmp_path), lambda: cls.from_config(config)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            made.append((make(), [str(each.message) for each in caught]))
    assert settings(made[0][0]) == settings(made[1][0])
    assert len(made[0][1]) == len(made[1][1])
    return made[0]


@pytest.mark.parametrize("cls", MULTISTEP)
def test_defaults_open_in_silence(cls, tmp_path, quiet_diffusers):
    for config in (saved_by_0_1(cls, {}), saved_by_0_1(cls, {}) | DEFAULTS):
        scheduler, said = opened(cls, config, tmp_path)
        assert said == quiet_diffusers == []
        assert (scheduler.config.solver_order, scheduler.config.lower_order_final) == (2, True)
        assert scheduler.config.fitted_solvers == {"3": {"timesteps": [900, 500, 20]}}
        assert DEFAULTS.keys().isdisjoint(scheduler.config)


@pytest.mark.parametrize("place", ["own", "top"])
@pytest.mark.parametrize("key", OTHERS)
@pytest.mark.parametrize("cls", MULTISTEP)
def test_a_value_that_is_lost_is_warned_of_once(cls, key, place, tmp_path, quiet_diffusers):
    lost = {key: OTHERS[key]}
    config = saved_by_0_1(cls, lost) if place == "own" else saved_by_0_1(cls, {}) | lost
    scheduler, said = opened(cls, config, tmp_path)
    assert len(said) == 1
    assert key in said[0]
    assert repr(OTHERS[key]) in said[0]
    assert quiet_diffusers == []
    assert DEFAULTS.keys().isdisjoint(scheduler.config)
    expected = opened(cls, saved_by_0_1(cls, {}), tmp_path)[0]
    assert settings(scheduler) == settings(expected)


def test_all_at_once_is_one_warning(tmp_path):
    scheduler, said = opened(MultistepDDIMScheduler, saved_by_0_1(MultistepDDIMScheduler, OTHERS), tmp_path)
    assert len(said) == 1
    assert all(key in said[0] for key in OTHERS)
    scheduler.save_pretrained(tmp_path / "again")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what is saved now has nothing to lose
        again = MultistepDDIMScheduler.from_pretrained(tmp_path / "again")
    assert settings(again) == settings(scheduler)


@pytest.mark.parametrize("spacing", ["few_steps_power", "log_snr"])
@pytest.mark.parametrize(
    ("cls", "default"), [(GeneralizedDDIMScheduler, "linear"), (MultistepDDIMScheduler, "few_steps")]
)
@pytest.mark.parametrize("place", ["own", "top"])
def test_a_spacing_that_is_gone_becomes_the_default(cls, default, spacing, place, tmp_path, quiet_diffusers):
    config = saved_by_0_1(cls, {"timestep_spacing": spacing})
    if place == "top":
        del config["_ddim_plugin"]["timestep_spacing"]
        config["timestep_spacing"] = spacing
    scheduler, said = opened(cls, config, tmp_path)
    assert scheduler.config.timestep_spacing == default
    assert len(said) == 1
    assert spacing in said[0]
    assert quiet_diffusers == []


def exp(T=1000):
    """β of diffusers' "exp" transform: ᾱ(u) = exp(−12 u)."""
    return np.full(T, 1 - np.exp(-12.0 / T)).tolist()


@pytest.mark.parametrize("cls", [GeneralizedDDIMScheduler, MultistepDDIMScheduler])
def test_a_schedule_that_is_gone_keeps_its_numbers(cls, tmp_path, quiet_diffusers):
    """0.1 wrote β beside the name, for stock schedulers."""
    config = saved_by_0_1(cls, {"trained_betas": None}, trained_betas=exp()) | {"beta_schedule": "exp"}
    scheduler, said = opened(cls, config, tmp_path)
    assert np.allclose(scheduler.alpha_bar, np.exp(-12.0 * np.arange(1001) / 1000), rtol=1e-12, atol=0)
    assert len(said) == 1
    assert "exp" in said[0]
    assert quiet_diffusers == []
    scheduler.save_pretrained(tmp_path / "again")
    assert np.array_equal(cls.from_pretrained(tmp_path / "again").alpha_bar, scheduler.alpha_bar)


@pytest.mark.parametrize("key", OTHERS)
def test_a_setting_that_is_gone_is_refused_where_it_is_asked_for(key):
    with pytest.raises(TypeError, match=key):
        MultistepDDIMScheduler(**{key: OTHERS[key]})


def test_what_stays_is_not_dropped(tmp_path):
    config = saved_by_0_1(MultistepDDIMScheduler, {"solver_corrector": "pec"})
    scheduler, _ = opened(MultistepDDIMScheduler, config, tmp_path)
    assert scheduler.config.solver_order == config["_ddim_plugin"]["solver_order"]
    scheduler.set_timesteps(3)
    assert scheduler.timesteps.tolist() == config["_ddim_plugin"]["fitted_timesteps"]["3"]
