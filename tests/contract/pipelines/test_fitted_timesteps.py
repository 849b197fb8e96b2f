"""Times that a config has for some step counts: how they are used and kept, and what is refused."""

import numpy as np
import pytest

from ddim_plugin import GeneralizedDDIMPipeline, InverseMultistepDDIMScheduler, MultistepDDIMScheduler


def test_they_are_used_saved_and_carried(make_unet, tmp_path):
    fitted = {"3": [900, 400, 30], "1": [700]}
    scheduler = MultistepDDIMScheduler(fitted_timesteps=fitted)

    def times(each, S):
        each.set_timesteps(S)
        return each.timesteps.tolist()

    assert MultistepDDIMScheduler(fitted_timesteps={3: np.array([900, 400, 30]), 1: (700,)}).config == scheduler.config
    assert times(scheduler, 3) == [900, 400, 30]
    assert times(scheduler, 1) == [700]
    assert times(scheduler, 4) == times(MultistepDDIMScheduler(), 4)
    assert times(MultistepDDIMScheduler.from_config(scheduler.config, timestep_spacing="linear"), 3) == [999, 665, 332]
    assert times(InverseMultistepDDIMScheduler.from_config(scheduler.config), 3) == [30, 30, 400]
    GeneralizedDDIMPipeline(make_unet(), scheduler).save_pretrained(tmp_path)
    loaded = GeneralizedDDIMPipeline.from_pretrained(tmp_path).scheduler
    assert times(loaded, 3) == [900, 400, 30]
    assert loaded.config.fitted_timesteps == fitted


def test_they_are_for_the_deterministic_process(make_unet):
    """With noise τ is that of the spacing, whether the scheduler says so or the call."""
    fitted = {"fitted_timesteps": {"3": [900, 400, 30]}}
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
    ("fitted", "said"),
    [
        ({"two": [500]}, "has the key 'two', which is no step count"),
        ({2.5: [500]}, r"has the key 2\.5, which is no step count"),
        ([[500]], "must be a dictionary of lists"),
        ({"2": [500]}, "fitted_timesteps has 1 timesteps for 2 steps"),
        ({"2": [5, 500]}, "descending order"),
        ({"1": [1000]}, "outside 0..999"),
    ],
)
def test_bad_times(fitted, said):
    with pytest.raises(ValueError, match=said):
        MultistepDDIMScheduler(fitted_timesteps=fitted)
