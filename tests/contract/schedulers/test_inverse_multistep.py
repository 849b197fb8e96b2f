"""InverseMultistepDDIMScheduler: its steps, and the latents it gives in the pipeline."""

import numpy as np
import pytest
import torch
from exact import exact_pipe
from oracle import Mixture
from plans import draws, run

from ddim_plugin import (
    GeneralizedDDIMPipeline,
    GeneralizedDDIMScheduler,
    InverseMultistepDDIMScheduler,
    MultistepDDIMScheduler,
)
from ddim_plugin.process.moves import mean_weights

ALPHA = GeneralizedDDIMScheduler().alpha_bar
RATIO = np.sqrt(1 / ALPHA - 1)


def test_the_way_up_by_hand():
    """In the stock loop: from the data with the network at τ_1, then at the lower end of each move, and to T."""
    up = InverseMultistepDDIMScheduler(solver_order=2, fitted_solvers={3: {"timesteps": [700, 300, 100]}})
    up.set_timesteps(3)
    assert up.timesteps.tolist() == [100, 100, 300]
    x, *outputs = draws(3)
    found = run(up, outputs, x)
    nsr = np.sqrt(1 / ALPHA - 1)
    bar = x + nsr[101] * outputs[0]
    known = [(0, outputs[0]), (101, outputs[1])]
    for (t, s), new in zip([(101, 301), (301, 1000)], [None, (301, outputs[2])], strict=True):
        known = [known[-1], new] if new else known
        weights = mean_weights(False, RATIO[t], RATIO[s], [RATIO[time] for time, _ in known[::-1]])
        mean = sum(w * g for w, (_, g) in zip(weights.tolist(), known[::-1], strict=True))
        bar = bar + (nsr[s] - nsr[t]) * mean
    assert torch.allclose(found, np.sqrt(ALPHA[1000]) * bar)
    for bad in (555, torch.tensor([100, 300])):
        with pytest.raises(ValueError, match="is not in the plan, or not the same for all samples"):
            up.step(outputs[0], bad, x)
    up.set_timesteps(1)
    assert up.timesteps.tolist() == [738]
    with pytest.raises(ValueError, match="encoding is deterministic"):
        up.step(outputs[0], up.timesteps[0], x, eta=0.3)


def test_upwards_the_default_is_three_values():
    """The mean of four is far off there: encoding the solution, its error is mostly twice that of three, or more."""
    made = []
    for order in (None, 3, 4):
        up = InverseMultistepDDIMScheduler(solver_order=order)
        up.set_timesteps(12)
        x, *outputs = draws(12)
        made.append(run(up, outputs, x))
    assert torch.equal(made[0], made[1])
    assert not torch.allclose(made[0], made[2])


def test_up_and_down_again():
    down = MultistepDDIMScheduler(solver_order=2, clip_sample=True, timestep_spacing="quadratic")
    up = InverseMultistepDDIMScheduler.from_config(down.config)
    assert (up.config.solver_order, up.config.timestep_spacing, up.config.clip_sample) == (2, "quadratic", False)
    again = MultistepDDIMScheduler.from_config(up.config)
    assert (again.config.clip_sample, again.config.timestep_spacing) == (False, "quadratic")
    with pytest.raises(ValueError, match="many x_t lead to one x_s"):
        InverseMultistepDDIMScheduler.from_config(down.config, eta=0.5)


def test_decoding_is_the_call(make_unet):
    pipe = GeneralizedDDIMPipeline(make_unet(), MultistepDDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    z = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    decoded = pipe.decode(z, num_inference_steps=5, output_type="pt")
    assert torch.equal(decoded, pipe(latents=z, num_inference_steps=5, output_type="pt").images)


LATENTS = [
    {},
    {"solver_order": 1},
    {"solver_order": 2, "timestep_spacing": "quadratic"},
    {"timestep_spacing": "linear"},
    {"solver_order": 4},
]


@pytest.mark.parametrize("settings", LATENTS)
def test_encoding_and_back(settings):
    """Mixture data: the naive inverse is nearer with more steps, and refined it is there."""
    scheduler = MultistepDDIMScheduler(**settings)
    pipe = exact_pipe(Mixture((0.3, 0.7), (-0.6, 0.5), (0.1, 0.2), ALPHA), scheduler)
    images = torch.linspace(0.1, 0.9, 32, dtype=torch.float64).view(2, 1, 4, 4)
    errors = {}
    for S in (8, 32):
        for refinement in (0, 24):
            z, report = pipe.encode(images, num_inference_steps=S, refinement_steps=refinement, return_report=True)
            decoded = pipe.decode(z, num_inference_steps=S, output_type="pt")
            errors[S, refinement] = float((decoded - images).square().mean().sqrt())
            assert report.evaluations.shape == (1, 2)
            assert (report.total_evaluations <= S * (1 + refinement)).all()
            assert np.isnan(report.residual).all() == (refinement == 0)
            assert report.timesteps.tolist() == [scheduler.timesteps[0]]
    assert errors[32, 0] < errors[8, 0] / 2
    assert errors[32, 24] < 2e-5
    assert errors[8, 24] < errors[8, 0] / 20


def test_encoding_is_nearer_than_at_order_1():
    data = Mixture((0.3, 0.7), (-0.6, 0.5), (0.1, 0.2), ALPHA)
    images = torch.linspace(0.1, 0.9, 32, dtype=torch.float64).view(2, 1, 4, 4)
    for S in (8, 16, 32):
        errors = []
        for cls in (MultistepDDIMScheduler, GeneralizedDDIMScheduler):
            pipe = exact_pipe(data, cls())
            decoded = pipe.reconstruct(images, num_inference_steps=S, refinement_steps=None, output_type="pt")
            errors.append(float((decoded - images).square().mean().sqrt()))
        assert errors[0] < errors[1] / 2


@pytest.mark.parametrize("settings", LATENTS)
def test_part_of_the_way(settings, make_unet):
    """strength < 1: x at a time of τ, and back; images on their own are as in a batch."""
    data = Mixture((0.3, 0.7), (-0.6, 0.5), (0.1, 0.2), ALPHA)
    scheduler = MultistepDDIMScheduler(**settings)
    pipe = exact_pipe(data, scheduler)
    images = torch.linspace(0.1, 0.9, 32, dtype=torch.float64).view(2, 1, 4, 4)
    given = {"num_inference_steps": 10, "strength": 0.5, "refinement_steps": 20}
    z, report = pipe.encode(images, return_report=True, **given)
    decoded = pipe.decode(z, num_inference_steps=10, strength=0.5, output_type="pt")
    assert float((decoded - images).abs().max()) < 1e-4
    assert report.timesteps.shape == (1,)
    assert torch.allclose(pipe.encode(images, batch_size=1, **given), z, atol=1e-9)


def test_latents_with_zero_terminal_snr(make_unet):
    scheduler = MultistepDDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    pipe = GeneralizedDDIMPipeline(make_unet(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    for given in ({"num_inference_steps": 6}, {"timesteps": [999, 500, 100]}):
        z = pipe.encode(images, **given)
        assert z.isfinite().all()
        assert pipe.decode(z, output_type="pt", **given).isfinite().all()


def test_guided_encoding(make_unet):
    pipe = GeneralizedDDIMPipeline(make_unet(num_class_embeds=3), MultistepDDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    _, report = pipe.encode(
        images, 4, class_labels=[0, 1], guidance_scale=2.0, refinement_steps=6, return_report=True, tolerance=0.0
    )
    assert (report.evaluations == 4 * 2 * (1 + 6)).all()


def test_recomputed_noise_is_refused():
    with pytest.raises(ValueError, match="needs x_t, which an inverse step computes"):
        InverseMultistepDDIMScheduler(clip_sample=True, use_clipped_model_output=True)
    up, x = InverseMultistepDDIMScheduler(clip_sample=True), torch.ones(1, 1, 2, 2)
    up.set_timesteps(3)
    for t in up.timesteps[:2]:
        with pytest.raises(ValueError, match="needs x_t, which an inverse step computes: leave it out"):
            up.step(x, t, x, use_clipped_model_output=True)
        assert up.step(x, t, x).prev_sample.isfinite().all()
