"""Settings of other solvers, and plans after a change of settings."""

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from ddim_plugin import GeneralizedDDIMScheduler, MultistepDDIMScheduler

FLOW = {"prediction_type": "flow_prediction"}
VE = {"prediction_type": "score"}


def test_solver_settings_of_a_stock_class_are_not_ours():
    stock = UniPCMultistepScheduler(**FLOW, use_flow_sigmas=True, flow_shift=5.0)
    ours = MultistepDDIMScheduler.from_config(GeneralizedDDIMScheduler.from_config(stock.config).config)
    assert (ours.config.solver_order, ours.config.timestep_spacing) == (None, "few_steps")
    stock = DPMSolverMultistepScheduler(**FLOW, use_flow_sigmas=True, solver_order=3, lower_order_final=False)
    back = DPMSolverMultistepScheduler.from_config(GeneralizedDDIMScheduler.from_config(stock.config).config)
    assert (back.config.solver_order, back.config.lower_order_final) == (3, False)


def test_a_plan_of_exploding_variance_follows_its_settings():
    scheduler = GeneralizedDDIMScheduler(sigma_max=50.0, **VE)
    scheduler.set_timesteps(timesteps=[20.0, 1.0])
    scheduler.register_to_config(eta=0.5)
    assert scheduler.init_noise_sigma == pytest.approx(20)
    scheduler.register_to_config(sigma_max=10.0)  # the plan is outside its levels
    with pytest.raises(ValueError, match="call set_timesteps"):
        scheduler.step(torch.ones(1, 1, 2, 2), 1.0, torch.zeros(1, 1, 2, 2))


@pytest.mark.parametrize("ends", [{"sigma_min": 15.0, "sigma_max": 20.0}, {"sigma_max": 0.15}])
@pytest.mark.parametrize("S", [1, 2, 7])
def test_few_steps_of_a_narrow_range(ends, S):
    scheduler = MultistepDDIMScheduler(**ends, **VE)
    scheduler.set_timesteps(S)
    assert len(scheduler.timesteps) == S


def test_a_density_that_does_not_exist_is_no_nan():
    scheduler = GeneralizedDDIMScheduler(eta=1.0)
    scheduler.set_timesteps(5)
    x = torch.randn(2, 3, 4, 4)
    out = scheduler.step(x, torch.stack([scheduler.timesteps[-1], scheduler.timesteps[1]]), x)
    with pytest.raises(ValueError, match="a step without noise has no density"):
        out.log_prob(x)


def test_bad_arguments_name_their_value():
    with pytest.raises(ValueError, match=r"integer of at least 1, not \[1\]"):
        MultistepDDIMScheduler(**FLOW).set_timesteps([1])
    stock = FlowMatchEulerDiscreteScheduler(shift_terminal=0.02)
    with pytest.raises(ValueError, match="not .nan"), pytest.warns(RuntimeWarning):
        GeneralizedDDIMScheduler.from_config(stock.config).set_timesteps(1)
    with pytest.raises(ValueError, match="set_shift takes a positive number"):
        GeneralizedDDIMScheduler().set_shift(3.0)
