"""β schedules: what they promise, and what they refuse."""

import numpy as np
import pytest

from ddim_plugin.process import betas as schedules


@pytest.mark.parametrize("schedule", list(schedules.SCHEDULES))
@pytest.mark.parametrize("T", [1, 2, 10, 1000, 4000])
def test_schedules_are_float64_and_valid(schedule, T):
    betas = schedules.betas(schedule, T)
    assert betas.shape == (T,)
    assert betas.dtype == np.float64
    alpha_bar = schedules.alpha_bar(betas)
    assert alpha_bar.shape == (T + 1,)
    assert alpha_bar[0] == 1
    assert (np.diff(alpha_bar) < 0).all()


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"])
def test_schedules_that_diffusers_has(schedule):
    from diffusers import DDPMScheduler

    stock = DDPMScheduler(beta_schedule=schedule).betas.double().numpy()
    assert schedules.betas(schedule) == pytest.approx(stock, rel=2e-5, abs=1e-7)


def test_a_schedule_of_0_1_that_is_gone():
    with pytest.raises(ValueError, match="unknown beta_schedule 'exp'"):
        schedules.betas("exp")


def test_authors_schedules():
    """quad, const and jsd as in the authors' code, from their formulas."""
    assert schedules.betas("scaled_linear") == pytest.approx(np.linspace(1e-4**0.5, 0.02**0.5, 1000) ** 2)
    assert (schedules.betas("const", 7, 1e-4, 0.02) == 0.02).all()
    assert schedules.betas("jsd", 4).tolist() == [1 / 4, 1 / 3, 1 / 2, 1.0]


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "const"])
def test_zero_terminal_snr(schedule):
    alpha_bar = schedules.alpha_bar(schedules.betas(schedule))
    rescaled = schedules.rescale_zero_terminal_snr(alpha_bar)
    assert rescaled[-1] == 0
    assert rescaled[0] == 1
    assert rescaled[1] == pytest.approx(alpha_bar[1], rel=1e-12)
    assert (np.diff(rescaled) < 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cubic", 10), "unknown beta_schedule 'cubic': use one of linear, scaled_linear, squaredcos_cap_v2, const"),
        (("linear", 0), "num_train_timesteps must be an integer of at least 1, not 0"),
        (("linear", 2.5), "not 2.5"),
        (("linear", 10, 0.02, 0.01), "beta_start ≤ beta_end"),
        (("linear", 10, 0.0, 0.01), "0 < beta_start"),
        (("scaled_linear", 10, 0.1, 1.5), "beta_end < 1"),
    ],
)
def test_bad_schedules(arguments, message):
    with pytest.raises(ValueError, match=message):
        schedules.betas(*arguments)


def test_bad_trained_betas():
    with pytest.raises(ValueError, match=r"β_2 = .*1\.2"):
        schedules.check([0.1, 1.2, 0.3])
    with pytest.raises(ValueError, match="β_1 = .*nan"):
        schedules.check([float("nan"), 0.2])
    with pytest.raises(ValueError, match="trained_betas has 2 entries, num_train_timesteps is 1000"):
        schedules.check([0.1, 0.2], 1000)
    assert schedules.check([0.1, 1.0])[-1] == 1
