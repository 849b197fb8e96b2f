"""Solvers that have timesteps alone: how they are used and kept, and what is refused."""

import pytest

from ddim_plugin import GeneralizedDDIMPipeline, InverseMultistepDDIMScheduler, MultistepDDIMScheduler


def test_they_are_used_saved_and_carried(make_unet, tmp_path):
    fitted = {"3": {"timesteps": [900, 400, 30]}, "1": {"timesteps": [700]}}
    scheduler = MultistepDDIMScheduler(fitted_solvers=fitted)

    def times(each, S):
        each.set_timesteps(S)
        return each.timesteps.tolist()

    assert times(scheduler, 3) == [900, 400, 30]
    assert times(scheduler, 1) == [700]
    assert times(scheduler, 4) == times(MultistepDDIMScheduler(), 4)
    assert times(MultistepDDIMScheduler.from_config(scheduler.config, timestep_spacing="linear"), 3) == [999, 665, 332]
    assert times(InverseMultistepDDIMScheduler.from_config(scheduler.config), 3) == [30, 30, 400]
    GeneralizedDDIMPipeline(make_unet(), scheduler).save_pretrained(tmp_path)
    loaded = GeneralizedDDIMPipeline.from_pretrained(tmp_path).scheduler
    assert times(loaded, 3) == [900, 400, 30]
    assert loaded.config.fitted_solvers == fitted


def test_they_are_for_the_deterministic_process(make_unet):
    """With noise τ is that of the spacing, whether the scheduler says so or the call."""
    fitted = {"fitted_solvers": {"3": {"timesteps": [900, 400, 30]}}}
    usual = MultistepDDIMScheduler(timestep_spacing="few_steps_noise")
    usual.set_timesteps(3)
    noisy = MultistepDDIMScheduler(eta=1.0, **fitted)
    noisy.set_timesteps(3)
    assert noisy.timesteps.tolist() == usual.timesteps.tolist()
    noisy.set_timesteps(3, eta=0.0)
    assert noisy.timesteps.tolist() == [900, 400, 30]
    pipe = GeneralizedDDIMPipeline(make_unet(), MultistepDDIMScheduler(**fitted))
    pipe.set_progress_bar_config(disable=True)
    for eta, times in ((None, [900, 400, 30]), (0.0, [900, 400, 30]), (1.0, usual.timesteps.tolist())):
        pipe(num_inference_steps=3, eta=eta, output_type="pt")
        assert pipe.scheduler.timesteps.tolist() == times
    with pytest.raises(ValueError, match="eta"):
        noisy.set_timesteps(3, eta=-1.0)


@pytest.mark.parametrize(
    "fitted",
    [
        {"two": {"timesteps": [500]}},
        {2.5: {"timesteps": [500, 5]}},
        {"2": [500, 5]},
        {"2": {"timesteps": [500]}},
        {"1": {"timesteps": [500], "noise": [0.5]}},
    ],
)
def test_bad_times(fitted):
    with pytest.raises(ValueError, match="is no solver that fit_solver wrote"):
        MultistepDDIMScheduler(fitted_solvers=fitted)


@pytest.mark.parametrize("times", [[5, 500], [1000, 5]])
def test_times_of_another_process_are_not_used(times):
    scheduler, usual = MultistepDDIMScheduler(fitted_solvers={2: {"timesteps": times}}), MultistepDDIMScheduler()
    with pytest.warns(UserWarning, match="was fitted for other timesteps: the default is used"):
        scheduler.set_timesteps(2)
    usual.set_timesteps(2)
    assert scheduler.timesteps.tolist() == usual.timesteps.tolist()
