"""Settings and arguments of flow matching and variance exploding that cannot be: refused by name, before any work."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from ddim_plugin import GeneralizedDDIMScheduler, InverseDDIMScheduler, MultistepDDIMScheduler

OURS = (GeneralizedDDIMScheduler, MultistepDDIMScheduler, InverseDDIMScheduler)
FLOW = {"prediction_type": "flow_prediction"}
VE = {"prediction_type": "score", "sigma_max": 50.0}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        # a β schedule's settings on other paths
        ({**FLOW, "trained_betas": [0.1, 0.2]}, r"trained_betas=.*has no effect on flow matching: leave it out"),
        ({**FLOW, "beta_schedule": "scaled_linear"}, "beta_schedule='scaled_linear' has no effect on flow"),
        ({**FLOW, "rescale_betas_zero_snr": True}, "rescale_betas_zero_snr=True has no effect on flow"),
        ({**FLOW, "set_alpha_to_one": False}, "set_alpha_to_one=False has no effect on flow"),
        ({**VE, "beta_end": 0.03}, r"beta_end=0\.03 has no effect on variance exploding"),
        # noise that needs a table over β
        ({**FLOW, "variance_type": "learned_range"}, "'learned_range' needs a β schedule, not flow matching"),
        ({**FLOW, "variance_type": "optimal", "eps_mean_square": [0.5] * 1000}, "'optimal' needs a β schedule"),
        ({**FLOW, "eta": -0.1}, r"eta must be a non-negative number, not -0\.1"),
        # spacings of the paper's times
        (
            {**FLOW, "timestep_spacing": "quadratic"},
            "timestep_spacing for flow matching 'quadratic': use one of linear",
        ),
        ({**FLOW, "timestep_spacing": "trailing"}, "for flow matching 'trailing'"),
        # the shift
        ({**FLOW, "shift": 0.0}, r"shift.*positive"),
        ({**FLOW, "shift": -3.0}, r"shift.*positive"),
        ({**FLOW, "shift": 2.0, "flow_shift": 3.0}, r"shift and flow_shift must be one positive number"),
        # settings of another path
        ({"shift": 3.0}, r"shift=3\.0 has no effect on the path of a β schedule: leave it out"),
        ({"use_dynamic_shifting": True}, "use_dynamic_shifting=True has no effect on the path of a β schedule"),
        ({"flow_shift": 3.0}, r"flow_shift=3\.0 has no effect"),
        ({**VE, "shift": 3.0}, r"shift=3\.0 has no effect on variance exploding"),
        ({**FLOW, "sigma_max": 50.0}, r"sigma_max=50\.0 has no effect on flow matching"),
        ({"sigma_min": 0.1}, r"sigma_min=0\.1 has no effect on the path of a β schedule"),
        # σ of variance exploding
        ({**VE, "sigma_min": 50.0}, r"sigma_min must be positive and less than sigma_max.*50\.0 and 50\.0"),
        ({**VE, "sigma_min": 60.0}, r"60\.0 and 50\.0"),
        ({**VE, "sigma_min": 0.0}, r"0\.0 and 50\.0"),
        ({**VE, "sigma_max": float("inf")}, "inf"),
        ({**VE, "sigma_max": float("nan")}, "nan"),
        ({**VE, "num_train_timesteps": 1}, "T ≥ 2"),
        # the corrector
        ({**VE, "corrector_steps": -1}, "corrector_steps must be an integer of at least 0, .*-1"),
        ({**VE, "corrector_steps": 1.5}, r"corrector_steps must be an integer of at least 0, .*1\.5"),
        ({**VE, "corrector_steps": True}, "corrector_steps.*True"),
        ({**VE, "corrector_steps": 1, "corrector_snr": 0.0}, r"corrector_snr must be positive, not 0\.0"),
        ({**VE, "corrector_steps": 1, "corrector_snr": -0.1}, r"corrector_snr must be positive, not -0\.1"),
        ({**VE, "corrector_steps": 1, "corrector_snr": float("nan")}, "corrector_snr.*nan"),
        ({**VE, "corrector_steps": 1, "corrector_snr": "0.1"}, "corrector_snr.*'0.1'"),
        # predictions
        ({"prediction_type": "velocity"}, "unknown prediction_type 'velocity': use one of epsilon"),
    ],
    ids=str,
)
def test_settings(config, message):
    with pytest.raises(ValueError, match=message):
        GeneralizedDDIMScheduler(**config)


@pytest.mark.parametrize("cls", [MultistepDDIMScheduler, InverseDDIMScheduler])
def test_only_the_generalized_scheduler_has_a_corrector(cls):
    with pytest.raises(ValueError, match="corrector_steps"):
        cls(**VE, corrector_steps=1)


@pytest.mark.parametrize("cls", OURS)
@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        (FLOW, {"sigmas": [0.9, 0.5, 0.6]}, r"sigmas must fall .* not \[0\.9, 0\.5, 0\.6\]"),
        (FLOW, {"sigmas": [0.9, 0.5, 0.5]}, "sigmas must fall"),
        (FLOW, {"sigmas": [0.9, 0.0, 0.5]}, "only the last of several may be 0"),
        (FLOW, {"sigmas": [1.2, 0.5]}, r"lie in \(0, 1\].* not \[1\.2, 0\.5\]"),
        (FLOW, {"sigmas": [0.5, -0.1]}, r"not \[0\.5, -0\.1\]"),
        (FLOW, {"sigmas": [float("nan"), 0.5]}, "not .nan"),
        (FLOW, {"sigmas": []}, r"sigmas must fall .* not \[\]"),
        (FLOW, {"sigmas": [0.0]}, "sigma|σ"),
        (FLOW, {"num_inference_steps": 3, "sigmas": [0.9, 0.5]}, "same length|num_inference_steps"),
        (FLOW, {"num_inference_steps": 0}, "integer of at least 1, not 0"),
        (FLOW, {"num_inference_steps": 2.5}, r"integer of at least 1, not 2\.5"),
        (FLOW, {}, "either num_inference_steps or timesteps"),
        ({**FLOW, "use_dynamic_shifting": True}, {"num_inference_steps": 4}, "`mu` must be passed"),
        (FLOW, {"timesteps": [900.0, 950.0]}, "descending order"),
        (FLOW, {"timesteps": [1100.0, 950.0]}, "1100"),
        (FLOW, {"timesteps": [900.0, -1.0]}, "-1"),
        (FLOW, {"timesteps": [900.0, 0.0]}, "0"),
        (FLOW, {"timesteps": [900.0, 900.0]}, "repeated|descending"),
        (FLOW, {"timesteps": [float("nan")]}, "nan"),
        ({}, {"sigmas": [0.9, 0.5]}, "sigmas and mu are for flow matching, and this scheduler is not"),
        ({}, {"num_inference_steps": 4, "mu": 0.5}, "sigmas and mu are for flow"),
        (VE, {"sigmas": [10.0, 0.5]}, "sigmas and mu are for flow"),
        (VE, {"timesteps": [60.0, 1.0]}, "60"),
        (VE, {"timesteps": [1.0, 0.001]}, r"0\.001"),
        (VE, {"timesteps": [1.0, 2.0]}, "descending order"),
        (VE, {"num_inference_steps": 1001}, "from 1 to 1000"),
    ],
    ids=str,
)
def test_arguments_of_set_timesteps(cls, config, given, message):
    """The plan that was made before is kept."""
    scheduler = cls(**config)
    first = {"mu": 0.5} if config.get("use_dynamic_shifting") else {}
    scheduler.set_timesteps(5, **first)
    before, state = scheduler.timesteps.clone(), scheduler.num_inference_steps
    with pytest.raises(ValueError, match=message):
        scheduler.set_timesteps(**given)
    assert torch.equal(scheduler.timesteps, before)
    assert scheduler.num_inference_steps == state
    x = torch.randn(1, 1, 2, 2)
    assert scheduler.step(x, scheduler.timesteps[0], x).prev_sample.isfinite().all()


def test_pure_noise_says_nothing_about_the_image_through_epsilon():
    """At σ = 1 of flow matching, a = 0: the first step of most grids."""
    for kind in ("epsilon", "score"):
        scheduler = GeneralizedDDIMScheduler(prediction_type=kind, use_flow_sigmas=True)
        with pytest.raises(
            ValueError, match=f"prediction_type='{kind}' divides by zero at .*σ = 1.*use timesteps below"
        ):
            scheduler.set_timesteps(4)
        scheduler.set_timesteps(timesteps=[999.0, 500.0])
        assert scheduler.timesteps.tolist() == [999, 500]


def test_noise_that_is_too_large_for_a_step():
    scheduler = GeneralizedDDIMScheduler(**FLOW)
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match=r"eta=3 is too large for the step from time .*: use at most"):
        scheduler.set_timesteps(10, eta=3.0)
    assert len(scheduler.timesteps) == 10
    with pytest.raises(ValueError, match="many x_t lead to one x_s"):
        InverseDDIMScheduler(**FLOW, eta=0.5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"stochastic_sampling": True}, "stochastic_sampling=True .*eta"),
        ({"use_karras_sigmas": True, "use_beta_sigmas": True}, "use_karras_sigmas"),
        ({"use_exponential_sigmas": True, "use_karras_sigmas": True}, "use_karras_sigmas"),
        ({"time_shift_type": "cubic"}, "time_shift_type|cubic"),
    ],
    ids=str,
)
def test_configs_of_the_stock_scheduler(config, message):
    """Refused when they are converted, or at the latest before the first step."""
    settings = {**FlowMatchEulerDiscreteScheduler().config, **config}
    settings["_use_default_values"] = [key for key in settings["_use_default_values"] if key not in config]
    with pytest.raises(ValueError, match=message):
        GeneralizedDDIMScheduler.from_config(settings).set_timesteps(4)


def test_steps_outside_the_path():
    for config, timestep in ((FLOW, 1000.5), (FLOW, -1.0), (VE, 51.0), (VE, 0.001), (VE, float("nan"))):
        scheduler, x = GeneralizedDDIMScheduler(**config), torch.randn(1, 1, 2, 2)
        scheduler.set_timesteps(4)
        with pytest.raises(ValueError, match="timestep .* is outside|nan"):
            scheduler.step(x, timestep, x)
        with pytest.raises(ValueError, match="is outside"):
            scheduler.add_noise(x, x, torch.tensor(timestep))


def test_the_corrector_needs_its_plan():
    scheduler, x = GeneralizedDDIMScheduler(**VE, corrector_steps=1), torch.randn(2, 1, 2, 2)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="corrector_steps need the timesteps of the plan"):
        scheduler.step(x, scheduler.timesteps[[0, 2]], x)
    with pytest.raises(ValueError, match="corrector_steps need the timesteps of the plan"):
        scheduler.step(x, 3.3, x)


def test_alphas_and_sigmas_exist_on_their_paths_only():
    with pytest.raises(AttributeError, match="ᾱ|alphas_cumprod"):
        _ = GeneralizedDDIMScheduler(**FLOW).alphas_cumprod
    with pytest.raises(AttributeError, match="sigmas"):
        _ = GeneralizedDDIMScheduler().sigmas
