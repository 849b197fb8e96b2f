"""The samplers that are compared, and their schedulers for a number of evaluations."""

import pytest
from measure.comparison.samplers import FITTED, Sampler, Unfit, is_stock, make_scheduler, samplers

from ddim_plugin import MultistepDDIMScheduler

EVERY = {each.name: each for each in samplers()}
TIMES = [700, 400, 100]
SOLVER = {
    "timesteps": TIMES,
    "noise": [float((1 - MultistepDDIMScheduler().alpha_bar[t + 1]) ** 0.5) for t in TIMES],
    "weights": [[1.0, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]],
    "solver_order": 3,
    "prediction_type": "epsilon",
    "guidance_scale": 1.0,
}
SAVED = dict(MultistepDDIMScheduler(fitted_solvers={"3": SOLVER}).config)


def test_a_name_tells_samplers_apart():
    assert len(EVERY) == len(list(samplers())) == 435
    assert [each.family for each in EVERY.values() if not is_stock(each.family)] == [
        "ours",
        "ours, fitted",
        "ours, η = 1",
    ]


def test_single_step_samplers_alone_have_no_spacing():
    without = {each.scheduler for each in EVERY.values() if "timestep_spacing" not in each.settings}
    assert without == {"MultistepDDIMScheduler", "DPMSolverSinglestepScheduler", "IPNDMScheduler"}


def test_noise_is_known_from_the_settings():
    noisy = {each.family for each in EVERY.values() if each.noisy}
    assert noisy == {"ours, η = 1", "DDPM", "SA-Solver 2", "SA-Solver 3"} | {
        f"sde-dpmsolver++ {order}{kind}" for order in (2, 3) for kind in "MS"
    }


@pytest.mark.parametrize(
    "name", ["ours", "ours, η = 1 1.0", "DDIM trailing", "UniPC 3 linspace 3 bh2 predict_x0", "Heun leading", "iPNDM"]
)
def test_a_scheduler_makes_exactly_the_evaluations(name):
    assert len(make_scheduler(EVERY[name], 5, SAVED).timesteps) == 5


def test_a_fitted_solver_is_the_models():
    assert make_scheduler(EVERY[FITTED], 3, SAVED).timesteps.tolist() == TIMES
    assert make_scheduler(EVERY["ours"], 3, SAVED).timesteps.tolist() != TIMES
    with pytest.raises(Unfit, match="no solver was fitted to the model for 4 steps"):
        make_scheduler(EVERY[FITTED], 4, SAVED)


@pytest.mark.parametrize(
    ("sampler", "nfe", "reason"),
    [
        (EVERY["Heun leading"], 4, "makes 7 evaluations of 4 steps"),
        (Sampler("DDIM", "DDIMScheduler", {"solver_order": 2}), 5, "knows no solver_order"),
        (EVERY["DDIM trailing"], 1002, "ValueError: "),
    ],
)
def test_samplers_that_cannot_run(sampler, nfe, reason):
    with pytest.raises(Unfit, match=reason):
        make_scheduler(sampler, nfe, SAVED)
