"""The scheduler's config: to and from every compatible scheduler, and to disk, without a warning or a loss."""

import json

import diffusers
import numpy as np
import pytest
import torch
from plans import settings

from ddim_plugin import (
    GeneralizedDDIMScheduler,
    InverseDDIMScheduler,
    InverseMultistepDDIMScheduler,
    MultistepDDIMScheduler,
    restore_scheduler,
)
from ddim_plugin.schedulers import restored

OWN = {
    "timestep_spacing": "quadratic",
    "eta": 0.3,
    "clip_sample": False,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.001,
    "beta_end": 0.013,
    "prediction_type": "epsilon",
}
COMPATIBLE = sorted(cls.__name__ for cls in diffusers.DDIMScheduler().compatibles if "dummy" not in cls.__module__)


def trajectory(scheduler, S=7):
    scheduler.set_timesteps(S)
    x = torch.linspace(-2, 2, 12, dtype=torch.float64).view(1, 3, 2, 2)
    z = x.flip(1)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.tanh(x), t, x, variance_noise=z if scheduler.config.eta else None).prev_sample
    return x


def test_there_are_schedulers_to_convert():
    assert len(COMPATIBLE) >= 12


@pytest.mark.parametrize("name", COMPATIBLE)
def test_there_and_back_without_a_warning(name, quiet_diffusers, recwarn, tmp_path):
    cls = getattr(diffusers, name)
    ours = GeneralizedDDIMScheduler(**OWN)
    stock = cls.from_config(ours.config)
    assert stock.config.prediction_type == "epsilon"
    if "beta_end" in stock.config:
        assert stock.config.beta_end == 0.013
    if "clip_sample" in stock.config:
        assert stock.config.clip_sample is False  # not left to the other class's default
    back = GeneralizedDDIMScheduler.from_config(stock.config)
    assert settings(back) == settings(ours)
    assert torch.equal(trajectory(back), trajectory(ours))

    assert quiet_diffusers == []

    ours.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path)
    if name != "EDMEulerScheduler":  # it takes no β and names no class it is compatible with: on disk it warns
        assert quiet_diffusers == []
    loaded.set_timesteps(10)
    loaded.save_pretrained(tmp_path)
    for stock in (cls.from_pretrained(tmp_path).config, cls.load_config(tmp_path)):
        back = settings(GeneralizedDDIMScheduler.from_config(stock))
        assert {key: back[key] for key in settings(ours)} == settings(ours)  # their own keys ride along too
    assert [str(w.message) for w in recwarn if "ddim" in str(w.message).lower()] == []


OF_BETA = sorted(
    {*COMPATIBLE, "LCMScheduler", "TCDScheduler", "SASolverScheduler", "UnCLIPScheduler"} - {"EDMEulerScheduler"}
)
OTHERS = {
    "CogVideoXDDIMScheduler": (diffusers.CogVideoXDDIMScheduler, {}, "snr_shift_scale=3.0 .*is of another process"),
    "CogVideoXDPMScheduler": (diffusers.CogVideoXDPMScheduler, {"snr_shift_scale": 2.0}, "snr_shift_scale=2.0"),
    "continuous": (diffusers.EulerDiscreteScheduler, {"timestep_type": "continuous"}, "timestep_type='continuous'"),
    "consistency": (diffusers.CMStochasticIterativeScheduler, {}, "belongs to another family of models"),
    "IPNDM": (diffusers.IPNDMScheduler, {}, "belongs to another family of models"),
}


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("name", OF_BETA)
def test_from_a_stock_default(name, on_disk, quiet_diffusers):
    """ᾱ is that of the other class, whatever its defaults are."""
    stock = getattr(diffusers, name)()
    config = json.loads(stock.to_json_string()) if on_disk else stock.config
    for cls in (GeneralizedDDIMScheduler, MultistepDDIMScheduler):
        ours = cls.from_config(config)
        assert ours.config.eta == 0
        assert torch.allclose(ours.alphas_cumprod, stock.alphas_cumprod, atol=1e-6)
        if hasattr(stock, "final_alpha_cumprod"):
            assert torch.allclose(ours.final_alpha_cumprod, stock.final_alpha_cumprod)
        assert torch.isfinite(trajectory(ours)).all()
    if on_disk:  # a config of an older version, without what was added or left to the defaults since
        config = {"_class_name": name, "num_train_timesteps": 1000}
        assert torch.allclose(
            GeneralizedDDIMScheduler.from_config(config).alphas_cumprod, stock.alphas_cumprod, atol=1e-6
        )
    assert quiet_diffusers == []


@pytest.mark.parametrize("name", OTHERS)
def test_the_config_of_another_process_is_refused(name):
    cls, config, message = OTHERS[name]
    stock = cls(**config)
    for read in (stock.config, json.loads(stock.to_json_string())):
        for ours in (GeneralizedDDIMScheduler, MultistepDDIMScheduler, InverseDDIMScheduler):
            with pytest.raises(ValueError, match=message):
                ours.from_config(read)


def test_an_entry_set_in_between_wins():
    stock = diffusers.DDIMScheduler.from_config(GeneralizedDDIMScheduler(**OWN).config, timestep_spacing="trailing")
    back = GeneralizedDDIMScheduler.from_config(stock.config)
    assert back.config.timestep_spacing == "trailing"
    assert back.config.eta == 0.3
    assert GeneralizedDDIMScheduler.from_config(stock.config, eta=0.9).config.eta == 0.9


@pytest.mark.parametrize(
    "config",
    [
        {},
        OWN,
        {"beta_schedule": "jsd", "prediction_type": "v_prediction", "timestep_spacing": "paper_quadratic"},
        {"beta_schedule": "const", "variance_type": "fixed_large"},
        {"variance_type": "optimal", "eps_mean_square": [0.5] * 1000, "timestep_spacing": "leading"},
        {"trained_betas": [0.01] * 1000, "rescale_betas_zero_snr": True, "prediction_type": "sample"},
        {"variance_type": "learned_range", "thresholding": True, "steps_offset": 1, "set_alpha_to_one": False},
    ],
)
def test_disk_keeps_everything(config, tmp_path, quiet_diffusers):
    ours = GeneralizedDDIMScheduler(**config)
    ours.save_pretrained(tmp_path)
    for other in (
        GeneralizedDDIMScheduler.from_pretrained(tmp_path),
        GeneralizedDDIMScheduler.from_config(ours.config),
        GeneralizedDDIMScheduler.from_config(dict(ours.config)),
    ):
        assert settings(other) == settings(ours)
        other.save_pretrained(tmp_path / "again")
        assert (tmp_path / "again" / "scheduler_config.json").read_text() == (
            tmp_path / "scheduler_config.json"
        ).read_text()
    assert quiet_diffusers == []


def test_stock_schedulers_get_schedules_they_have_no_name_for_as_numbers(tmp_path, quiet_diffusers):
    ours = GeneralizedDDIMScheduler(beta_schedule="const")
    ours.save_pretrained(tmp_path)
    for stock in (diffusers.DDIMScheduler.from_config(ours.config), diffusers.DDPMScheduler.from_pretrained(tmp_path)):
        assert torch.allclose(stock.alphas_cumprod, ours.alphas_cumprod, rtol=1e-4)
    assert quiet_diffusers == []


def test_a_schedule_may_be_overridden():
    """The numbers made for stock schedulers do not stand in the way of a later word."""
    ours = GeneralizedDDIMScheduler(beta_schedule="sigmoid")
    for change in ({"beta_schedule": "linear"}, {"beta_end": 0.01}, {"num_train_timesteps": 500, "beta_end": 0.041}):
        changed = GeneralizedDDIMScheduler.from_config(ours.config, **change)
        expected = GeneralizedDDIMScheduler(**{"beta_schedule": "sigmoid"} | change)
        assert torch.equal(changed.alphas_cumprod, expected.alphas_cumprod)
        assert settings(changed) == settings(expected)


def test_settings_changed_later_are_saved(tmp_path):
    """`register_to_config` is how users of diffusers change a setting in place."""
    ours = GeneralizedDDIMScheduler()
    ours.register_to_config(eta=0.7, timestep_spacing="quadratic", clip_sample=True)
    ours.save_pretrained(tmp_path)
    for other in (
        GeneralizedDDIMScheduler.from_pretrained(tmp_path),
        GeneralizedDDIMScheduler.from_config(ours.config),
    ):
        assert settings(other) == settings(ours)
        assert other.config.eta == 0.7


def test_noise_of_a_ddpm_config_is_not_taken_over(tmp_path):
    """A DDPM checkpoint opens as DDIM, as it does in the stock scheduler; asked for, its noise is there."""
    stock = diffusers.DDPMScheduler(variance_type="fixed_large", clip_sample=True)
    stock.save_pretrained(tmp_path)
    for ours in (
        GeneralizedDDIMScheduler.from_config(stock.config),
        GeneralizedDDIMScheduler.from_pretrained(tmp_path),
    ):
        assert ours.config.variance_type == "fixed_small"
        assert ours.config.clip_sample is True
    assert (
        GeneralizedDDIMScheduler.from_config(stock.config, variance_type="fixed_large").config.variance_type
        == "fixed_large"
    )
    learned = GeneralizedDDIMScheduler.from_config(diffusers.DDPMScheduler(variance_type="learned_range").config)
    assert learned.config.variance_type == "learned_range"


def test_every_key_of_the_stock_scheduler_is_understood():
    stock = {key for key in diffusers.DDIMScheduler().config if not key.startswith("_")}
    assert stock <= set(GeneralizedDDIMScheduler().config)


def test_config_on_disk_is_readable(tmp_path):
    GeneralizedDDIMScheduler(**OWN).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert saved["_class_name"] == "DDIMScheduler"
    assert saved["_ddim_plugin"] == {
        "class": "GeneralizedDDIMScheduler",
        "eta": 0.3,
        "eps_mean_square": None,
        "use_clipped_model_output": False,
        "timestep_spacing": "quadratic",
        "variance_type": "fixed_small",
    }
    assert "eta" not in saved
    assert saved["timestep_spacing"] == "trailing"  # a stock scheduler's nearest


# ---- the multistep scheduler ---------------------------------------------------------------------------------------


def test_multistep_from_any_sampler():
    own = MultistepDDIMScheduler()
    for config in (
        GeneralizedDDIMScheduler(timestep_spacing="quadratic", eta=1.0, beta_end=0.013).config,
        GeneralizedDDIMScheduler(variance_type="fixed_large", beta_end=0.013).config,
        diffusers.DDIMScheduler(timestep_spacing="trailing", beta_end=0.013, clip_sample=False).config,
        diffusers.UniPCMultistepScheduler(beta_end=0.013).config,
        diffusers.DDPMScheduler(variance_type="fixed_large", beta_end=0.013).config,
    ):
        made = MultistepDDIMScheduler.from_config(config)
        assert made.config.beta_end == 0.013
        for key in ("timestep_spacing", "eta", "variance_type", "steps_offset", "solver_order", "clip_sample"):
            assert made.config[key] == own.config[key], key
    clipping = diffusers.DDIMScheduler().config
    for cls in (InverseDDIMScheduler, InverseMultistepDDIMScheduler):
        back = MultistepDDIMScheduler.from_config(cls.from_config(clipping).config)
        assert (back.config.clip_sample, back.config.timestep_spacing) == (False, "few_steps")
    learned = GeneralizedDDIMScheduler(variance_type="learned_range")
    assert MultistepDDIMScheduler.from_config(learned.config).config.variance_type == "learned_range"
    asked = MultistepDDIMScheduler.from_config(learned.config, timestep_spacing="trailing", solver_order=2)
    assert (asked.config.timestep_spacing, asked.config.solver_order) == ("trailing", 2)


def test_multistep_on_disk_and_through_others(tmp_path, quiet_diffusers):
    own = MultistepDDIMScheduler(timestep_spacing="quadratic", solver_order=2, lower_order_final=True, eta=0.2)

    own.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert (saved["_class_name"], saved["_ddim_plugin"]["class"]) == ("DDIMScheduler", "MultistepDDIMScheduler")
    assert settings(MultistepDDIMScheduler.from_pretrained(tmp_path)) == settings(own)
    stock = diffusers.DPMSolverMultistepScheduler.from_config(own.config)
    assert settings(MultistepDDIMScheduler.from_config(stock.config)) == settings(own)
    assert GeneralizedDDIMScheduler.from_config(own.config).config.timestep_spacing == "quadratic"
    default = GeneralizedDDIMScheduler.from_config(MultistepDDIMScheduler().config)
    assert default.config.timestep_spacing == "linear"  # few_steps is for the multistep method
    theirs = diffusers.DPMSolverMultistepScheduler(solver_order=1).config
    assert MultistepDDIMScheduler.from_config(theirs).config.solver_order is None
    assert diffusers.DDIMScheduler.from_pretrained(tmp_path).config.beta_end == 0.02
    assert quiet_diffusers == []


# ---- ours from a stock scheduler -----------------------------------------------------------------------------------

SAVED = [
    GeneralizedDDIMScheduler(**OWN),
    GeneralizedDDIMScheduler(timestep_spacing="trailing", variance_type="fixed_large"),
    GeneralizedDDIMScheduler(beta_schedule="sigmoid", prediction_type="v_prediction"),
    InverseDDIMScheduler.from_config(GeneralizedDDIMScheduler(clip_sample=True).config),
    MultistepDDIMScheduler(solver_order=2, fitted_solvers={"2": {"timesteps": [900, 100]}}),
    MultistepDDIMScheduler(timestep_spacing="trailing"),
    InverseMultistepDDIMScheduler(lower_order_final=True),
]


@pytest.mark.parametrize("ours", SAVED, ids=lambda each: type(each).__name__)
def test_a_stock_scheduler_is_restored(ours, tmp_path, quiet_diffusers):
    """What a reader without this package loads, and saves again."""
    ours.save_pretrained(tmp_path)
    stock = diffusers.DDIMScheduler.from_pretrained(tmp_path)
    stock.save_pretrained(tmp_path / "again")
    for each in (stock, diffusers.DDIMScheduler.from_pretrained(tmp_path / "again")):
        back = restored(each)
        assert type(back) is type(ours)
        assert settings(back) == settings(ours)
        assert np.array_equal(back.alpha_bar, ours.alpha_bar)
        assert restored(back) is back
    assert quiet_diffusers == []


@pytest.mark.parametrize("change", [{"clip_sample": True}, {"timestep_spacing": "leading"}, {"beta_end": 0.015}])
def test_what_was_changed_in_a_stock_scheduler_wins(change, tmp_path):
    GeneralizedDDIMScheduler(**OWN).save_pretrained(tmp_path)
    stock = diffusers.DDIMScheduler.from_pretrained(tmp_path, **change)
    assert settings(restored(stock)) == settings(GeneralizedDDIMScheduler(**OWN | change))


def test_other_schedulers_stay_as_they_are():
    for stock in (diffusers.DDIMScheduler(), diffusers.EulerDiscreteScheduler()):
        assert restored(stock) is stock
    stay = diffusers.DPMSolverMultistepScheduler.from_config(GeneralizedDDIMScheduler(**OWN).config)
    assert restored(stay) is stay  # chosen by its user


def test_restoring_the_scheduler_of_a_pipeline(make_unet, tmp_path):
    ours = MultistepDDIMScheduler(solver_order=2)
    ours.save_pretrained(tmp_path)
    pipe = diffusers.DDPMPipeline(make_unet(), diffusers.DDIMScheduler.from_pretrained(tmp_path))
    assert restore_scheduler(pipe) is pipe
    assert type(pipe.scheduler) is MultistepDDIMScheduler
    assert settings(pipe.scheduler) == settings(ours)
    kept = pipe.scheduler
    assert restore_scheduler(pipe).scheduler is kept
    with pytest.raises(ValueError, match=r"DDIMScheduler has no '_ddim_plugin' entry: .*from_config\(pipe\.scheduler"):
        restore_scheduler(diffusers.DDPMPipeline(make_unet(), diffusers.DDIMScheduler()))
