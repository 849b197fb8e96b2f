"""Times fitted to a model: what they are worth, what the script writes, and what is refused."""

import itertools
import json

import fit
import numpy as np
import pytest
import torch
from exact import exact_pipe
from measure.comparison.fitting import Fitted, descend, fit_timesteps, spread_labels
from oracle import Mixture
from trainer.settings import build

from ddim_plugin import (
    GeneralizedDDIMPipeline,
    GeneralizedDDIMScheduler,
    MultistepDDIMScheduler,
)

ALPHA = GeneralizedDDIMScheduler().alpha_bar
DATA = Mixture((0.3, 0.7), (-0.6, 0.5), (0.01, 0.02), ALPHA)
OTHER_PATHS = {
    "flow": {"prediction_type": "flow_prediction", "shift": 3.0},
    "exploding": {"prediction_type": "score", "sigma_max": 50.0},
    "ε": {"prediction_type": "epsilon", "sigma_max": 50.0},
}
FEW = {"num_images": 16, "teacher_steps": 60}


def distance(scheduler, S, seeds=range(100, 140)):
    """To the converged solution, from draws that were not seen before."""
    x = torch.stack([torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(i)) for i in seeds]).double()
    made = []
    for each, steps in ((scheduler, S), (MultistepDDIMScheduler(timestep_spacing="linear"), 500)):
        made.append(exact_pipe(DATA, each)(latents=x, num_inference_steps=steps, output_type="pt").images)
    return float((made[0] - made[1]).flatten(1).square().mean(1).sqrt().mean())


def test_it_is_nearer_on_other_draws():
    pipe = exact_pipe(DATA, GeneralizedDDIMScheduler(eta=1.0))
    found = fit_timesteps(pipe, [8, 5], num_images=64, teacher_steps=100)
    assert list(found) == [5, 8]
    assert isinstance(pipe.scheduler, MultistepDDIMScheduler)
    for S, fitted in found.items():
        pipe.scheduler.set_timesteps(S)
        assert pipe.scheduler.timesteps.tolist() == fitted.timesteps
        assert fitted.error < 0.95 * fitted.default_error
        assert distance(pipe.scheduler, S) < 0.95 * distance(MultistepDDIMScheduler(), S)


def test_it_depends_on_the_seed_and_on_nothing_else():
    def found(**settings):
        return fit_timesteps(exact_pipe(DATA, MultistepDDIMScheduler()), [5], **FEW | settings)[5]

    first = found()
    assert isinstance(first, Fitted)
    other = found(batch_size=3)
    assert first.timesteps == other.timesteps
    assert first.error == pytest.approx(other.error, rel=1e-9)
    assert found(seed=50).error != first.error


def test_what_was_fitted_before_stays():
    pipe = exact_pipe(DATA, MultistepDDIMScheduler(fitted_timesteps={"3": [900, 400, 30], "4": [950, 700, 300, 20]}))
    found = fit_timesteps(pipe, [4], **FEW)
    kept = pipe.scheduler.config.fitted_timesteps
    assert kept["3"] == [900, 400, 30]
    assert kept["4"] == found[4].timesteps


def test_the_settings_of_the_solver_are_kept():
    pipe = exact_pipe(DATA, MultistepDDIMScheduler(solver_order=2, clip_sample=True))
    fit_timesteps(pipe, [4], **FEW)
    config = pipe.scheduler.config
    assert (config.solver_order, config.clip_sample) == (2, True)


@pytest.mark.parametrize("order", [1, 2])
def test_the_error_is_the_distance_to_the_true_solution(order):
    """Whatever the solver of the model."""
    pipe = exact_pipe(DATA, MultistepDDIMScheduler(solver_order=order))
    found = fit_timesteps(pipe, [5], num_images=32, teacher_steps=100)
    assert found[5].error <= found[5].default_error
    assert found[5].error == pytest.approx(2 * distance(pipe.scheduler, 5, range(16, 32)), rel=0.1)  # on −1..1


@pytest.mark.parametrize("settings", OTHER_PATHS.values(), ids=OTHER_PATHS)
def test_the_error_on_other_paths(make_unet, settings):
    unet = make_unet(time_embedding_type="positional" if "shift" in settings else "fourier")
    torch.nn.init.normal_(unet.conv_out.weight, std=0.01, generator=torch.Generator().manual_seed(0))
    pipe = GeneralizedDDIMPipeline(unet, GeneralizedDDIMScheduler(**settings))
    pipe.set_progress_bar_config(disable=True)
    found = fit_timesteps(pipe, [3], num_images=8, teacher_steps=100)[3]
    assert found.error <= found.default_error
    assert type(pipe.scheduler) is MultistepDDIMScheduler
    low, high = pipe.scheduler.image_range
    z = torch.cat([torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(4, 8)])
    few, solution = (pipe.decode(z, S, output_type="latent").clamp(low, high) for S in (3, 500))
    assert float((few - solution).flatten(1).square().mean(1).sqrt().mean()) == pytest.approx(found.error, abs=0.01)


def test_zero_terminal_snr():
    alpha = GeneralizedDDIMScheduler(rescale_betas_zero_snr=True).alpha_bar
    scheduler = MultistepDDIMScheduler(rescale_betas_zero_snr=True, prediction_type="sample")
    data = Mixture((0.3, 0.7), (-0.6, 0.5), (0.01, 0.02), alpha)

    class X0:
        alpha = data.alpha

        def eps(self, x, t):  # what the network gives is x̂0
            a = alpha[t]
            return (x - np.sqrt(1 - a) * data.eps(x, t)) / np.sqrt(a) if a > 0 else np.full_like(x, 0.17)

    found = fit_timesteps(exact_pipe(X0(), scheduler), [4], **FEW)
    assert found[4].error <= found[4].default_error < 0.3


def test_images_that_are_not_finite():
    pipe = exact_pipe(DATA, before := GeneralizedDDIMScheduler())
    pipe._predict = lambda x, t, condition: torch.full_like(x, torch.nan)
    with pytest.raises(ValueError, match="not finite, nor are the images"):
        fit_timesteps(pipe, [3], **FEW)
    assert pipe.scheduler is before


def test_a_learned_variance_and_an_earlier_tau(make_unet):
    pipe = GeneralizedDDIMPipeline(
        make_unet(out_channels=2), GeneralizedDDIMScheduler(variance_type="learned_range", timestep_spacing="quadratic")
    )
    pipe.set_progress_bar_config(disable=True)
    first = fit_timesteps(pipe, [3], **FEW)[3]
    assert pipe.scheduler.config.variance_type == "learned_range"
    images = [pipe(2, 3, latents=torch.ones(2, 1, 8, 8), output_type="np").images for _ in range(2)]
    assert np.array_equal(*images)  # without noise
    again = fit_timesteps(pipe, [3], **FEW)[3]
    assert again.error <= first.error * (1 + 1e-6)


def test_labels_and_guidance():
    """Data moved by 0.1·label: the evaluations are counted twice where guidance is on."""
    pipe = exact_pipe(DATA, MultistepDDIMScheduler(), num_class_embeds=3)
    with torch.no_grad():
        pipe.unet.data = DATA
    calls = []
    original = pipe._predict
    pipe._predict = lambda x, t, condition: calls.append(condition) or original(x, t, condition)
    fit_timesteps(pipe, [3], **FEW | {"teacher_steps": 10})
    assert calls[0].labels[0].tolist() == [i % 3 for i in range(16)]
    assert spread_labels(1000, 4, 1.0, None) == [0, 250, 500, 750]
    assert spread_labels(3, 4, 2.0, 0) == [1, 2, 1, 2]
    calls.clear()
    fit_timesteps(pipe, [3], **FEW | {"teacher_steps": 10}, guidance_scale=2.0)
    assert calls[0].labels[0].tolist() == [i % 2 for i in range(16)]
    assert set(calls[0].labels[1].tolist()) == {2}


def test_small_T():
    pipe = exact_pipe(
        Mixture((1.0,), (0.2,), (0.1,), ALPHA[[0, 99, 299, 499, 699, 899, 999]]),
        MultistepDDIMScheduler(
            6, trained_betas=list(1 - ALPHA[[99, 299, 499, 699, 899, 999]] / ALPHA[[0, 99, 299, 499, 699, 899]])
        ),
    )
    found = fit_timesteps(pipe, [1, 2, 3], **FEW)
    assert [len(each.timesteps) for each in found.values()] == [1, 2, 3]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"steps": []}, r"steps must be a list of integers from 1 to 100, half .*, not \[\]"),
        ({"steps": [5, 0]}, r"not \[5, 0\]"),
        ({"steps": [5], "batch_size": 0}, "batch_size must be an integer of at least 1, not 0"),
        ({"steps": [5, 50], "teacher_steps": 99}, "from 1 to 49, half of teacher_steps=99"),
        ({"steps": [600], "teacher_steps": 2000}, "from 1 to 500, .* of the 1000 timesteps"),
    ],
)
def test_bad_input(settings, said):
    pipe = exact_pipe(DATA, before := GeneralizedDDIMScheduler())
    with pytest.raises(ValueError, match=said):
        fit_timesteps(pipe, **settings)
    assert pipe.unet.evaluated == 0
    assert pipe.scheduler is before


def test_noise_is_refused_and_an_interrupt_leaves_the_scheduler():
    pipe = exact_pipe(DATA, before := MultistepDDIMScheduler(eta=0.5))
    with pytest.raises(ValueError, match="latents need a deterministic, invertible process"):
        fit_timesteps(pipe, [5])
    assert pipe.scheduler is before
    pipe = exact_pipe(DATA, before := GeneralizedDDIMScheduler())
    pipe._predict = lambda *args: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        fit_timesteps(pipe, [5])
    assert pipe.scheduler is before


def test_half_precision():
    pipe = exact_pipe(DATA, MultistepDDIMScheduler(), dtype=torch.bfloat16)
    found = fit_timesteps(pipe, [4], **FEW)
    assert np.isfinite(found[4].error)


def test_the_descent_goes_down_and_stays_in_order():
    goal, seen = np.array([40, 300, 620, 990]), []

    def cost(tau):
        seen.append(tau)
        assert all(low < high for low, high in itertools.pairwise([0, *tau, 1001]))
        return float(np.square(np.array(tau) - goal).sum())

    tau = descend((100, 400, 700, 1000), 1000, cost, rounds=8)
    assert cost(tau) == min(map(cost, list(seen)))
    assert np.abs(np.array(tau) - goal).max() <= 10
    assert descend((1,), 1, lambda tau: 0.0) == (1,)


# ---- the script ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(make_unet, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit") / "model"
    GeneralizedDDIMPipeline(make_unet(), GeneralizedDDIMScheduler(eta=1.0)).save_pretrained(folder)
    return folder


def run(model, output, **settings):
    quick = {"steps": (2, 3), "images": 4, "teacher_steps": 12, "batch_size": 4}
    return fit.main(build(fit.FitConfig, quick | {"model": str(model), "output": str(output)} | settings))


def test_the_model_has_the_times_of_the_record(model, tmp_path, capsys):
    done = run(model, tmp_path)
    assert "S = 3: distance to the solution" in capsys.readouterr().err
    result = json.loads((tmp_path / "fit.json").read_text())
    assert result == json.loads(json.dumps(done))
    words = result["command"].split()
    assert words[:6] == ["python", "training/fit.py", "--model", str(model), "--output", str(tmp_path)]
    pipe = GeneralizedDDIMPipeline.from_pretrained(tmp_path / "model")
    assert isinstance(pipe.scheduler, MultistepDDIMScheduler)
    for S in (2, 3):
        pipe.scheduler.set_timesteps(S)
        assert pipe.scheduler.timesteps.tolist() == result["fitted"][str(S)]["timesteps"]
    assert str(model) not in "".join(file.read_text() for file in (tmp_path / "model").rglob("*.json"))


def test_an_earlier_fit_is_replaced_if_asked(model, tmp_path):
    run(model, tmp_path)
    with pytest.raises(ValueError, match="model exists: choose another output, or pass --overwrite"):
        run(model, tmp_path, steps=(2,))
    run(model, tmp_path, steps=(2,), overwrite=True)
    assert list(json.loads((tmp_path / "fit.json").read_text())["fitted"]) == ["2"]
    with pytest.raises(ValueError, match="by the fitted model: choose another"):
        run(tmp_path / "model", tmp_path, overwrite=True)
    (tmp_path / "other" / "model").mkdir(parents=True)
    (tmp_path / "other" / "model" / "thesis.txt").write_text("all of it")
    with pytest.raises(ValueError, match="--overwrite replaces models only, not"):
        run(model, tmp_path / "other", overwrite=True)
    assert (tmp_path / "other" / "model" / "thesis.txt").exists()


def test_weights_are_saved_as_they_were_loaded(model, tmp_path):
    run(model, tmp_path, dtype="bfloat16")
    folders = (model, tmp_path / "model")
    assert torch.equal(*(GeneralizedDDIMPipeline.from_pretrained(each).unet.conv_in.weight for each in folders))


def test_labels_and_guidance_of_the_script(make_unet, tmp_path):
    pipe = GeneralizedDDIMPipeline(make_unet(num_class_embeds=3), GeneralizedDDIMScheduler())
    pipe.save_pretrained(tmp_path / "model")
    for i, labels in enumerate([(), (1,), (0, 1, 0, 1)]):
        run(tmp_path / "model", tmp_path / str(i), steps=(2,), class_label=labels, guidance_scale=2.0)
    with pytest.raises(ValueError, match="2 class labels for 4 images: give one or all"):
        run(tmp_path / "model", tmp_path / "bad", class_label=(0, 1))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"steps": (0,)}, r"steps must be a list of integers from 1 to 6, half .*, not \[0\]"),
        ({"images": 1}, "images must be at least 2, not 1"),
        ({"teacher_steps": 1}, "teacher_steps must be at least 2, not 1"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"seed": 2**63 - 4}, "a seed must fit 64 bits with its sign, not"),
        ({"class_label": (1,)}, "unconditional"),
        ({"dtype": "float64"}, "unknown dtype 'float64': use one of float32"),
    ],
)
def test_bad_settings_leave_nothing(model, tmp_path, settings, said):
    with pytest.raises(ValueError, match=said):
        run(model, tmp_path / "out", **settings)
    assert list(tmp_path.iterdir()) == []
