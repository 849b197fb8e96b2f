"""Plans of the scheduler: which step a timestep names, and which plans and timesteps are refused."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from plans import planned, tensors

from ddim_plugin import GeneralizedDDIMScheduler
from ddim_plugin.schedulers.step import Step


def test_set_timesteps():
    scheduler = planned(10)
    assert scheduler.timesteps.tolist() == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    assert scheduler.timesteps.dtype == torch.int64
    assert scheduler.num_inference_steps == 10
    for times in ([999, 500, 3, 0], torch.tensor([999, 500, 3, 0]), np.array([999, 500, 3, 0])):
        scheduler.set_timesteps(timesteps=times)
        assert scheduler.timesteps.tolist() == [999, 500, 3, 0]
        assert scheduler.num_inference_steps == 4
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [999]
    scheduler.set_timesteps(1000, device="cpu")
    assert scheduler.timesteps.tolist() == list(range(999, -1, -1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, "from 1 to 1000, not 0"),
        ({"num_inference_steps": 1001}, "not 1001"),
        ({"num_inference_steps": 10.0}, r"not 10\.0"),
        ({}, "either num_inference_steps or timesteps"),
        ({"num_inference_steps": 2, "timesteps": [5, 1]}, "either num_inference_steps or timesteps"),
        ({"timesteps": [5, 5]}, r"distinct, .*not \[5, 5\]"),
        ({"timesteps": [1, 5]}, r"in descending order .*not \[1, 5\]"),
        ({"timesteps": [1000, 5]}, r"timestep 1000 is outside 0\.\.999"),
        ({"timesteps": [5, -1]}, "timestep -1 is outside"),
        ({"timesteps": [5.5, 1]}, r"a list of integers, not \[5.5, 1\]"),
        ({"timesteps": torch.tensor([5.0, 1.0])}, "a list of integers"),
        ({"timesteps": []}, r"a list of integers, not \[\]"),
        ({"timesteps": 5}, "must be a list of integers, not 5"),
        ({"timesteps": torch.tensor(5)}, "must be a list of integers, not 5"),
    ],
)
def test_bad_plans_leave_the_old_one(arguments, message):
    scheduler = planned(4)
    with pytest.raises(ValueError, match=message):
        scheduler.set_timesteps(**arguments)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]
    out, x = tensors()
    assert torch.isfinite(scheduler.step(out, scheduler.timesteps[3], x).prev_sample).all()


def test_step_before_set_timesteps():
    out, x = tensors()
    with pytest.raises(ValueError, match="call set_timesteps before step"):
        GeneralizedDDIMScheduler().step(out, 10, x)
    for change in ({}, {"num_train_timesteps": 500, "trained_betas": [0.02] * 500}):  # a plan for another T is none
        scheduler = planned(10) if change else GeneralizedDDIMScheduler()
        scheduler.register_to_config(**change)
        scheduler.num_inference_steps = 10
        with pytest.raises(ValueError, match="call set_timesteps before step"):
            scheduler.step(out, 10, x)


def test_a_time_outside_the_plan_moves_to_the_next_below():
    scheduler = planned(10)
    out, x = tensors(dtype=torch.float64)
    direct = GeneralizedDDIMScheduler()
    direct.set_timesteps(timesteps=[850, 799])
    assert torch.equal(scheduler.step(out, 850, x).prev_sample, direct.step(out, 850, x).prev_sample)
    last = scheduler.step(out, 42, x)  # below every time of the plan: to the data
    assert torch.allclose(last.prev_sample, last.pred_original_sample)


def test_ints_and_tensors_name_the_same_step():
    scheduler = planned(10)
    out, x = tensors()
    expected = scheduler.step(out, scheduler.timesteps[3], x).prev_sample
    for t in (699, np.int64(699), torch.tensor(699), torch.tensor([699]), torch.tensor(699, dtype=torch.int32)):
        assert torch.equal(scheduler.step(out, t, x).prev_sample, expected)
    assert torch.equal(scheduler.step(out, scheduler.timesteps[2:][1], x).prev_sample, expected)
    scheduler.timesteps = torch.tensor([0, 699])  # an unrelated tensor in its place is read by value
    assert torch.equal(scheduler.step(out, scheduler.timesteps[1], x).prev_sample, expected)


def test_a_time_for_each_sample():
    scheduler = planned(10, eta=0.5)
    out, x, z = tensors(3, dtype=torch.float64)
    times = torch.tensor([999, 99, 512])
    together = scheduler.step(out, times, x, variance_noise=z)
    for i, t in enumerate(times.tolist()):
        part = slice(i, i + 1)
        alone = scheduler.step(out[part], t, x[part], variance_noise=z[part])
        for name in ("prev_sample", "pred_original_sample", "mean", "pred_epsilon"):
            assert torch.allclose(getattr(together, name)[part], getattr(alone, name), atol=1e-12), name
        assert together.std[i].item() == pytest.approx(alone.std.item())


@pytest.mark.parametrize("config", [{"clip_sample": True}, {"thresholding": True}, {"prediction_type": "v_prediction"}])
def test_a_time_for_each_sample_with_constraints(config):
    scheduler = planned(10, **config)
    out, x = tensors(dtype=torch.float64)
    times = torch.tensor([999, 99, 512])
    together = scheduler.step(out, times, x, use_clipped_model_output=True).prev_sample
    for i, t in enumerate(times.tolist()):
        alone = scheduler.step(out[i : i + 1], t, x[i : i + 1], use_clipped_model_output=True).prev_sample
        assert torch.allclose(together[i : i + 1], alone, atol=1e-12)


@pytest.mark.parametrize("config", [{}, {"clip_sample": True, "use_clipped_model_output": True}, {"eta": 1.0}])
@pytest.mark.parametrize("timestep", [0, 1, 500, 999])
def test_a_time_for_each_sample_is_as_exact_as_one_for_all(config, timestep):
    """Coefficients are rounded to float32 once, after they were made in float64."""
    scheduler = planned(1000, **config)
    out, x, z = tensors(3, dtype=torch.float64)
    noise = z if config.get("eta") else None
    exact = scheduler.step(out, timestep, x, variance_noise=noise)
    noise = None if noise is None else noise.float()
    single = scheduler.step(out.float(), torch.full((3,), timestep), x.float(), variance_noise=noise)
    for name in ("prev_sample", "pred_epsilon", "pred_original_sample"):
        wanted = getattr(exact, name)
        error = (getattr(single, name) - wanted).abs().max().item()
        assert error < 2e-5 * max(1, wanted.abs().max().item()), name


def test_a_silent_step_draws_nothing():
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    out, x = tensors()
    for timestep in (599, torch.tensor([599, 3, 999])):
        planned(10).step(out, timestep, x, generator=generator)
    assert torch.equal(generator.get_state(), before)


def test_the_table_for_devices_holds_every_step():
    """On an accelerator the times of single samples are looked up in a table; here it is read on the CPU."""
    scheduler = planned(10, variance_type="learned_range")
    kind = ("learned_range", 1.0)
    table = scheduler._all_steps(kind, torch.float64, torch.device("cpu"))
    assert table.shape == (1000, len(Step._fields))
    for t in (0, 57, 99, 512, 999):
        assert table[t].tolist() == pytest.approx(list(scheduler._step_at(t, kind)))


@pytest.mark.parametrize(
    ("timestep", "message"),
    [
        (1000, r"timestep 1000 is outside 0\.\.999"),
        (-1, "timestep -1 is outside"),
        (5.5, "must be an integer, not 5.5"),
        (True, "must be an integer, not True"),
        (torch.tensor(5.5), r"must be an integer, not tensor\(5.5"),
        (torch.tensor(5.0, dtype=torch.bfloat16), r"must be an integer, not tensor\(5., dtype=torch.bfloat16"),
        (torch.tensor(True), r"must be an integer, not tensor\(True"),
        (torch.tensor([5.0, 6.5, 7.0]), "must be integers"),
        (torch.tensor([[5, 6]] * 3), r"shape \(3, 2\): give one, or one for each of 3 samples"),
        (torch.tensor([5, 6]), r"shape \(2,\): give one, or one for each of 3 samples"),
        (torch.tensor([5, 6, 1000]), "timestep 1000 is outside"),
        ("5", "must be an integer, not '5'"),
    ],
)
def test_bad_timesteps(timestep, message):
    out, x = tensors()
    with pytest.raises(ValueError, match=message):
        planned().step(out, timestep, x)


def test_eps_prediction_with_zero_terminal_snr():
    scheduler = GeneralizedDDIMScheduler(rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="'epsilon' divides by zero at ᾱ = 0"):
        scheduler.set_timesteps(10)
    scheduler.set_timesteps(timesteps=[998, 500])  # below the top it is sound
    out, x = tensors()
    assert torch.isfinite(scheduler.step(out, 998, x).prev_sample).all()
    with pytest.raises(ValueError, match="divides by zero"):
        scheduler.step(out, 999, x)
    with pytest.raises(ValueError, match="divides by zero"):
        scheduler.step(out, torch.tensor([1, 999, 2]), x)


def test_eta_too_large_names_the_move():
    with pytest.raises(
        ValueError, match=r"eta=1.5 is too large for the step from time 1000 to 900, .*use at most 1\.0"
    ):
        planned(10, eta=1.5)
    scheduler = planned(10)
    out, x = tensors()
    with pytest.raises(ValueError, match="eta=1.5 is too large for the step from time 1000"):
        scheduler.step(out, 599, x, eta=1.5)
    with pytest.raises(ValueError, match="eta must be a non-negative number, not -1"):
        scheduler.step(out, 599, x, eta=-1)
    assert planned(1000, eta=1.0).num_inference_steps == 1000
    wide = GeneralizedDDIMScheduler(eta=2.5)  # moves near the data allow more than 1
    wide.set_timesteps(timesteps=[10, 9])


def test_a_device_that_does_not_exist_leaves_the_old_plan():
    scheduler = GeneralizedDDIMScheduler()
    scheduler.set_timesteps(5)
    x = torch.randn(1, 1, 4, 4)
    before, timesteps = scheduler.step(x, scheduler.timesteps[1], x).prev_sample, scheduler.timesteps
    with pytest.raises(RuntimeError):
        scheduler.set_timesteps(50, device="nowhere")
    assert (scheduler.num_inference_steps, scheduler.timesteps) == (5, timesteps)
    assert torch.equal(scheduler.step(x, timesteps[1], x).prev_sample, before)


def test_outputs_are_told_apart_by_identity():
    scheduler = GeneralizedDDIMScheduler()
    scheduler.set_timesteps(5)
    x = torch.randn(1, 1, 4, 4)
    first, second = (scheduler.step(x, 799, x) for _ in range(2))
    assert first == first
    assert first != second
    assert len({first, second}) == 2


def test_timesteps_of_an_inverted_flow_ascend():
    """They are T·(1 − σ): the first is nearest to noise."""
    scheduler = GeneralizedDDIMScheduler.from_config(FlowMatchEulerDiscreteScheduler(invert_sigmas=True).config)
    scheduler.set_timesteps(timesteps=[0.0, 500.0, 900.0])
    assert scheduler.timesteps.tolist() == [0.0, 500.0, 900.0]
    assert scheduler.sigmas.tolist() == pytest.approx([1.0, 0.5, 0.1, 0.0])
    for bad in ([900.0, 500.0], [500.0, 1000.0], [-1.0, 500.0], [], 500.0, ["500"]):
        with pytest.raises(ValueError, match="ascending and above the data|is outside 0|must be a list of numbers"):
            scheduler.set_timesteps(timesteps=bad)
