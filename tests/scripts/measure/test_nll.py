"""training/nll.py: bits per dimension as a command, continued where it was stopped, saved with the model."""

import json

import numpy as np
import pytest
import torch
from cards.records import read_results
from measure.likelihood import Bench, summary, table
from measure.ode import ode_log_density
from nll import NLLConfig, main
from trainer.settings import build

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler
from ddim_plugin.process.paths import variance_preserving

T = 30
NOT_FINITE = "the network's output is not finite: measure other weights"


@pytest.fixture(scope="module")
def model(make_unet, tmp_path_factory):
    """A tiny network that is a little like one of digits: its output is small, and grows with x."""
    folder = tmp_path_factory.mktemp("nll") / "model"
    unet = make_unet()
    torch.nn.init.normal_(unet.conv_out.weight, std=0.05, generator=torch.Generator().manual_seed(0))
    scheduler = GeneralizedDDIMScheduler(num_train_timesteps=T, beta_start=0.003, beta_end=0.4)
    GeneralizedDDIMPipeline(unet, scheduler).save_pretrained(folder)
    return folder


def run(model, output, **settings):
    small = {"images": 6, "steps": [3, T], "fit_images": 4, "ode": False, "batch_size": 4}
    return main(build(NLLConfig, small | {"model": str(model), "output": str(output)} | settings))


def test_bits_and_their_terms(model, tmp_path):
    result = run(model, tmp_path, ode=True, ode_images=2, tolerance=1e-3)
    cells = result["cells"]
    assert list(cells) == [f"S = {S}, {v}" for S in (3, T) for v in ("fixed_small", "fixed_large", "optimal")] + ["ODE"]
    for cell in (cell for name, cell in cells.items() if name != "ODE"):
        assert cell["bits"] == pytest.approx(cell["prior"] + cell["transitions"] + cell["decoder"])
        assert (cell["nfe"], cell["images"], cell["eta"]) == (cell["S"], 6, 1.0)
        assert cell["standard_error"] > 0
    entries = read_results(tmp_path / "results.json")
    assert [entry["value"] for entry in entries] == [cell["bits"] for cell in cells.values()]
    assert entries[0]["dataset"] == {"name": "digits", "split": "test"}
    assert entries[-1]["variance_type"] == "ODE"
    written = (tmp_path / "nll.md").read_text()
    assert f"{cells['S = 3, optimal']['bits']:.4f} ±" in written
    assert "Ho et al." not in written
    assert "at most 3.75 for test" in table(result | {"config": result["config"] | {"data": "my/CIFAR-10"}})


def test_the_batch_does_not_matter(model, tmp_path):
    one, other = (run(model, tmp_path / str(size), batch_size=size, images=3, steps=[3]) for size in (1, 3))
    for name, cell in one["cells"].items():
        assert cell["bits"] == pytest.approx(other["cells"][name]["bits"], rel=1e-5)


def test_a_stopped_run_goes_on(model, tmp_path, monkeypatch):
    whole = run(model, tmp_path / "whole", steps=[3, 4])
    measured = []
    import nll

    bound = nll.Bench.bound

    def stop(self, images, along, *rest):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append((len(along), along.variance_type))
        return bound(self, images, along, *rest)

    monkeypatch.setattr(nll.Bench, "bound", stop)
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "run", steps=[3, 4])
    measured.append("later")
    again = run(model, tmp_path / "run", steps=[3, 4])
    assert measured == [
        (3, "fixed_small"),
        (3, "fixed_large"),
        "later",
        (3, "optimal"),
        *[(4, v) for v in ("fixed_small", "fixed_large", "optimal")],
    ]
    for name, cell in whole["cells"].items():
        assert again["cells"][name]["bits"] == cell["bits"]
    with pytest.raises(ValueError, match="has results with another seed"):
        run(model, tmp_path / "run", steps=[3, 4], seed=1)


def test_the_searched_tau_is_not_worse_where_it_was_fitted(model, tmp_path):
    result = run(model, tmp_path, searched=True, steps=[2, 5], variances=["fixed_small", "optimal"])
    searched = [cell for name, cell in result["cells"].items() if "searched" in name]
    assert len(searched) == 4
    for cell in searched:
        assert cell["predicted"] <= cell["predicted_spacing"] + 1e-12
        assert len(cell["times"]) == cell["S"]


def test_optimal_with_the_fitted_errors_is_never_worse(model, tmp_path):
    """On the images that it was fitted to, in expectation over the noise, which is drawn alike for both."""
    settings = {
        "fit_split": "test",
        "images": 200,
        "fit_images": 200,
        "estimator": "error",
        "steps": [5],
        "batch_size": 200,
    }
    result = run(model, tmp_path, variances=["fixed_small", "optimal"], **settings)
    small, best = (result["cells"][f"S = 5, {v}"] for v in ("fixed_small", "optimal"))
    assert best["bits"] < small["bits"] + 0.01


def test_the_table_is_saved_with_the_model(model, tmp_path):
    run(model, tmp_path / "run", save_model=str(tmp_path / "model"), variances=["optimal"], steps=[4])
    pipe = GeneralizedDDIMPipeline.from_pretrained(tmp_path / "model")
    known = pipe.scheduler.config.eps_mean_square
    fitted = json.loads((tmp_path / "run" / "errors.json").read_text())
    assert np.allclose(known, fitted["eps_mean_square"][1:])
    pipe.scheduler = GeneralizedDDIMScheduler.from_config(pipe.scheduler.config, variance_type="optimal", eta=1.0)
    pipe.set_progress_bar_config(disable=True)
    assert torch.isfinite(pipe(2, 5, output_type="pt", generator=torch.Generator().manual_seed(0)).images).all()
    again = run(tmp_path / "model", tmp_path / "again", variances=["optimal"], steps=[4], decoder="next")
    assert not (tmp_path / "again" / "errors.json").exists()  # nothing had to be measured again
    assert again["cells"]["S = 4, optimal"]["bits"] > 0


def test_own_samples_and_drawn_terms(model, tmp_path):
    result = run(model, tmp_path, fit_data="own", draws=2, variances=["optimal"], steps=[T])
    assert result["cells"][f"S = {T}, optimal"]["nfe"] == 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"eta": 0.0}, "infinite at eta=0"),
        ({"steps": [T + 1]}, "31"),
        ({"steps": [0]}, "distinct positive"),
        ({"variances": ["best"]}, "unknown variances best"),
        ({"variances": ["learned_range"]}, "no variance of its own"),
        ({"images": 0}, "images must be positive"),
        ({"decoder": "best"}, "unknown decoder 'best'"),
        ({"decoder": "next", "searched": True}, "best with the fitted decoder"),
        ({"estimator": "best"}, "unknown estimator"),
        ({"class_label": 1}, "is unconditional"),
        ({"data": "nowhere.parquet"}, "there is no file"),
        ({"spacing": "cubic"}, "cubic"),
        ({"model": "nowhere/at/all"}, "there is no folder|neither a valid local path"),
    ],
)
def test_bad_input(model, tmp_path, settings, said):
    with pytest.raises((ValueError, OSError), match=said):
        run(settings.pop("model", model), tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


# ---- other paths ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flow(make_unet, tmp_path_factory):
    folder = tmp_path_factory.mktemp("flow") / "model"
    scheduler = GeneralizedDDIMScheduler(T, prediction_type="flow_prediction", shift=2.0)
    GeneralizedDDIMPipeline(make_unet(), scheduler).save_pretrained(folder)
    return folder


def test_flow_matching(flow, tmp_path):
    """Along the grid of the sampler, with its shift, and along a searched one."""
    settings = {"variances": ["fixed_small", "fixed_large"], "ode": True, "ode_images": 2, "tolerance": 1e-3}
    cells = run(flow, tmp_path, searched=True, **settings)["cells"]
    assert len(cells) == 7
    assert all(np.isfinite(cell["bits"]) and cell["bits"] > 0 for cell in cells.values())
    assert cells["S = 3, fixed_small"]["prior"] == pytest.approx(0, abs=1e-12)  # σ = 1 is noise alone
    bench = Bench(str(flow), None, 4, 0, "cpu")
    scheduler = GeneralizedDDIMScheduler(T, prediction_type="flow_prediction", shift=2.0)
    scheduler.set_timesteps(3)
    assert bench.times("linear", 3).tolist() == scheduler.timesteps.round().int().tolist()[::-1] == [4, 21, 30]
    assert bench.times("quadratic", 3).tolist() != [4, 21, 30]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "optimal is undefined at pure noise, where this path begins: pass --variances fixed_small"),
        ({"variances": ["fixed_small"], "save_model": "x"}, "which flow matching lacks"),
    ],
)
def test_what_flow_matching_does_not_have(flow, tmp_path, settings, said):
    with pytest.raises(ValueError, match=said):
        run(flow, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_variance_exploding_is_refused(make_unet, tmp_path):
    scheduler = GeneralizedDDIMScheduler(prediction_type="score", sigma_max=20.0)
    GeneralizedDDIMPipeline(make_unet(time_embedding_type="fourier"), scheduler).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"ends at x_0 \+ 20·ε, and likelihoods are measured on paths that end near"):
        run(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def broken(make_unet, tmp_path_factory):
    """A model after a training that diverged."""
    folder, unet = tmp_path_factory.mktemp("broken") / "model", make_unet()
    torch.nn.init.constant_(unet.conv_out.weight, float("nan"))
    scheduler = GeneralizedDDIMScheduler(num_train_timesteps=T, beta_start=0.003, beta_end=0.4)
    GeneralizedDDIMPipeline(unet, scheduler).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {"variances": ["fixed_small"], "steps": [3]},
        {"draws": 1, "variances": ["fixed_large"]},
        {"variances": ["optimal"]},  # measures E‖ε̂‖² first
        {"variances": [], "ode": True},
        {"variances": [], "ode": True, "exact_trace": True, "ode_images": 1},
    ],
)
def test_a_network_that_is_not_finite(broken, tmp_path, settings):
    with pytest.raises(ValueError, match=NOT_FINITE):
        run(broken, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_an_ode_that_is_not_finite():
    """Also if only its gradient is not."""
    path, x0 = variance_preserving(np.linspace(1, 0.01, 5)), torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match=NOT_FINITE):
        ode_log_density(lambda x, t: x / 0, x0, path)
    with pytest.raises(ValueError, match="the network's gradient is not finite"):
        ode_log_density(lambda x, t: (x - x.detach()).abs().sqrt(), x0, path)


def test_a_likelihood_that_is_not_finite():
    with pytest.raises(ValueError, match="the likelihood is not finite"):
        summary(torch.tensor([1.0, float("inf")]))
