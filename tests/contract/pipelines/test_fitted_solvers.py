"""Fitted solvers of a config: their steps, where they are used and kept, and what is refused or ignored."""

import json
import warnings

import diffusers
import pytest
import tiny_pipelines as tiny
import torch
from diffusers import DDIMScheduler
from exact import exact_pipe, weighed
from oracle import Mixture
from tiny_pipelines import SD

from ddim_plugin import (
    GeneralizedDDIMPipeline,
    GeneralizedDDIMScheduler,
    InverseMultistepDDIMScheduler,
    MultistepDDIMScheduler,
    invert,
)
from ddim_plugin.pipelines.fit import fit_solver

ALPHA = GeneralizedDDIMScheduler().alpha_bar
FLOW = {"prediction_type": "flow_prediction", "shift": 3.0}


def solver(timesteps=(900, 600, 300, 50), *, guidance_scale=None, **settings):
    """The default's weights at other times, a little changed."""
    scheduler = MultistepDDIMScheduler(**settings, fitted_solvers={len(timesteps): {"timesteps": timesteps}})
    scheduler.set_timesteps(len(timesteps))
    rows = [[1.01 * weight for weight in row] for row in weighed(scheduler).values()]
    noise = [scheduler.path.level(t).noise for t, _ in scheduler._pairs]
    known = {"solver_order": 3, "prediction_type": scheduler.config.prediction_type, "guidance_scale": guidance_scale}
    return {"timesteps": [*timesteps], "noise": noise, "weights": rows} | known


def fitted(timesteps=(900, 600, 300, 50), **settings):
    guidance = {key: settings.pop(key) for key in ("guidance_scale",) if key in settings}
    found = solver(timesteps, **settings, **guidance)
    return MultistepDDIMScheduler(**settings, fitted_solvers={str(len(timesteps)): found})


def times(scheduler, S=4, **plan):
    scheduler.set_timesteps(S, **plan)
    return scheduler.timesteps.tolist()


def said(act):
    """The warnings of this package in a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    return [str(each.message) for each in caught if "the solver for" in str(each.message)]


# ---- the steps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"prediction_type": "v_prediction"}, FLOW])
def test_a_step_is_the_sum_of_the_config(network, settings):
    """Of x̂0, ε̂ and earlier ε̂, which for the first step is that of x_T."""
    scheduler = fitted(**settings)
    assert said(lambda: times(scheduler)) == []
    rows, known = scheduler.config.fitted_solvers["4"]["weights"], []
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    top = scheduler.path.level(scheduler.path.T)
    for t, row in zip(scheduler.timesteps, rows, strict=True):
        out = scheduler.step(network(x, t), t, x)
        eps = out.pred_epsilon
        if not known:
            assert torch.allclose(top.signal * out.pred_original_sample + top.noise * eps, x)
        known = [eps, *known]
        values = [out.pred_original_sample, *known][: len(row)]
        assert torch.allclose(out.prev_sample, sum(w * v for w, v in zip(row, values, strict=True)), rtol=1e-12)
        x = out.prev_sample


def test_a_step_in_half_precision_is_rounded_once(network):
    x, found = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)).bfloat16(), []
    for dtype in (torch.bfloat16, torch.float64):
        scheduler = fitted()
        scheduler.set_timesteps(4)
        out = [network(x.float(), t).bfloat16() for t in scheduler.timesteps[:3]]
        for t, each in zip(scheduler.timesteps, out, strict=False):
            made = scheduler.step(each.to(dtype), t, x.to(dtype)).prev_sample
        found.append(made.double())
        assert made.dtype == dtype
    assert torch.allclose(*found, rtol=2**-8, atol=2**-9)


def test_it_is_for_the_deterministic_process(network):
    scheduler, usual = fitted(), MultistepDDIMScheduler()
    assert times(scheduler, eta=0.3) == times(usual, eta=0.3)
    assert times(scheduler, eta=1.0) == times(usual, eta=1.0)
    assert times(MultistepDDIMScheduler.from_config(scheduler.config, eta=0.3)) == times(usual)
    assert times(MultistepDDIMScheduler.from_config(scheduler.config, timestep_spacing="linear")) == [
        999,
        749,
        499,
        249,
    ]
    assert times(scheduler, None, timesteps=[900, 600, 300, 50]) == [900, 600, 300, 50]
    assert scheduler._solver == {}
    assert times(scheduler) == [900, 600, 300, 50]


# ---- saved and converted --------------------------------------------------------------------------------------------


def test_it_is_saved_converted_and_read(make_unet, tmp_path):
    scheduler = fitted()
    GeneralizedDDIMPipeline(make_unet(), scheduler).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    assert saved["_class_name"] == "DDIMScheduler"
    loaded = GeneralizedDDIMPipeline.from_pretrained(tmp_path).scheduler
    stock = DDIMScheduler.from_config(loaded.config)
    by_stock = diffusers.DDIMPipeline.from_pretrained(tmp_path).scheduler
    for each in (loaded, stock, by_stock, saved):
        again = MultistepDDIMScheduler.from_config(each if each is saved else each.config)
        assert again.config.fitted_solvers == scheduler.config.fitted_solvers
        assert times(again) == [900, 600, 300, 50]
    by_number = MultistepDDIMScheduler.from_config(stock.config, fitted_solvers={4: solver()})
    assert times(by_number) == [900, 600, 300, 50]
    assert times(MultistepDDIMScheduler.from_config(stock.config, fitted_solvers=None)) == times(
        MultistepDDIMScheduler()
    )
    assert not hasattr(GeneralizedDDIMScheduler.from_config(loaded.config), "_solvers")


def test_it_is_saved_and_read_on_the_path_of_flow_matching(tmp_path):
    scheduler = fitted(**FLOW)
    scheduler.save_pretrained(tmp_path)
    again = MultistepDDIMScheduler.from_pretrained(tmp_path)
    assert again.config.fitted_solvers == scheduler.config.fitted_solvers
    assert said(lambda: times(again)) == []
    assert again.timesteps.tolist() == [900, 600, 300, 50]


@pytest.mark.parametrize(
    "change",
    [
        {"timesteps": [900, 600, 300]},
        {"noise": [0.9]},
        {"weights": [[1.0, 0.0]] * 3},
        {"weights": [[1.0, 0.0], [1.0], [1.0, 0.0], [1.0, 0.0]]},
        {"weights": [[1.0, 0.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]},
        {"weights": [[float("nan"), 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]},
        {"weights": None},
        {"weights": [["a", "b"]] * 4},
        "solver_order",
        "guidance_scale",
    ],
)
def test_bad_solvers(change):
    known = solver()
    known = {k: v for k, v in known.items() if k != change} if isinstance(change, str) else known | change
    with pytest.raises(ValueError, match=r"fitted_solvers\['4'\] is no solver that fit_solver wrote"):
        MultistepDDIMScheduler(fitted_solvers={"4": known})


BAD = [[solver()], {"four": solver()}, {"5": solver()}, {"0": {"timesteps": []}}, {"4": None}, {"4": [1.0]}, "4"]


@pytest.mark.parametrize("solvers", BAD)
def test_bad_dictionaries(solvers):
    with pytest.raises(ValueError, match=r"fitted_solvers(\[.*\] is no solver| must be a dictionary)"):
        MultistepDDIMScheduler(fitted_solvers=solvers)


# ---- ignored with a warning -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"solver_order": 2}, "solver_order=3, not 2"),
        ({"solver_order": 1}, "solver_order=3, not 1"),
        ({"prediction_type": "v_prediction"}, "prediction_type='epsilon', not 'v_prediction'"),
        ({"beta_schedule": "scaled_linear"}, "other noise levels"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "other noise levels"),
        ({"num_train_timesteps": 500}, "other timesteps"),
        ({"use_flow_sigmas": True}, "other noise levels"),
        ({"sigma_max": 50.0, "prediction_type": "epsilon"}, "other timesteps"),
    ],
)
def test_another_scheduler_does_without(settings, reason):
    """It warns once, and its plan is the default's."""
    scheduler, usual = (
        MultistepDDIMScheduler(**settings, fitted_solvers={"4": solver()}),
        MultistepDDIMScheduler(**settings),
    )
    text = f"the solver for 4 steps was fitted for {reason}: the default is used"
    assert said(lambda: times(scheduler)) == [text]
    assert times(usual) == scheduler.timesteps.tolist()
    assert scheduler._cache == usual._cache
    assert said(lambda: times(scheduler, 5)) == []


def test_an_order_that_is_the_default_is_no_other():
    assert said(lambda: times(MultistepDDIMScheduler(solver_order=3, fitted_solvers={"4": solver()}))) == []


def test_another_guidance_scale_in_our_pipeline(make_unet):
    pipe = GeneralizedDDIMPipeline(make_unet(num_class_embeds=3), fitted(guidance_scale=2.0))
    pipe.set_progress_bar_config(disable=True)
    usual = times(MultistepDDIMScheduler())
    text = "the solver for 4 steps was fitted for guidance_scale=2.0, not {}: the default is used"
    for scale, heard, planned in ((2, [], [900, 600, 300, 50]), (1.0, [text.format(1.0)], usual)):
        call = {"class_labels": 1, "guidance_scale": scale}
        assert said(lambda call=call: pipe(1, 4, **call)) == heard
        assert pipe.scheduler.timesteps.tolist() == planned
        assert said(lambda call=call: pipe(1, 5, **call)) == []
        z = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        assert said(lambda call=call, z=z: pipe.decode(z, 4, **call)) == heard
    assert said(lambda: times(pipe.scheduler)) == []  # outside of a pipeline


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return tiny.Parts(tmp_path_factory.mktemp("tokenizer"))


SCALED = {key: SD[key] for key in ("beta_schedule", "beta_start", "beta_end", "set_alpha_to_one", "steps_offset")}


def test_another_guidance_scale_in_a_stock_pipeline(parts):
    pipe, call = tiny.text_to_image(parts, fitted(guidance_scale=7.5, **SCALED))
    pipe.set_progress_bar_config(disable=True)
    call["num_inference_steps"] = 4
    assert said(lambda: pipe(**call)) == []  # 7.5 is its default
    assert pipe.scheduler.timesteps.tolist() == [900, 600, 300, 50]
    text = "the solver for 4 steps was fitted for guidance_scale=7.5, not 5.0: the default is used"
    assert said(lambda: pipe(**call, guidance_scale=5.0)) == [text]
    assert pipe.scheduler.timesteps.tolist() == times(MultistepDDIMScheduler(**SCALED))


# ---- other loops ----------------------------------------------------------------------------------------------------


def test_image_to_image_begins_between(parts, network):
    """The first step there is that of the default: the sample is not x_T. Later ones have the weights again."""
    pipe, call = tiny.image_to_image(parts, fitted(guidance_scale=7.5, **SCALED))
    pipe.set_progress_bar_config(disable=True)
    for strength in (0.5, 1.0):
        images = pipe(**call | {"num_inference_steps": 4, "strength": strength}).images
        assert images.isfinite().all()
        assert pipe.scheduler.timesteps.tolist() == [900, 600, 300, 50]
    scheduler, usual = fitted(), MultistepDDIMScheduler(fitted_solvers={4: {"timesteps": [900, 600, 300, 50]}})
    made = []
    for each in (scheduler, usual):
        each.set_timesteps(4)
        x0 = torch.full((1, 1, 4, 4), 0.5)
        x = each.add_noise(x0, torch.ones_like(x0), each.timesteps[:1])
        first = each.step(network(x, each.timesteps[0]), each.timesteps[0], x).prev_sample
        made += [first, each.step(network(first, each.timesteps[1]), each.timesteps[1], first).prev_sample]
    assert torch.equal(made[0], made[2])
    assert torch.allclose(made[1], 1.01 * made[3])


@pytest.mark.parametrize("part", [{"denoising_start": 0.5}, {"denoising_end": 0.5}])
def test_a_part_of_the_process(part, network):
    scheduler = MultistepDDIMScheduler.from_config(fitted().config, **part)
    scheduler.set_timesteps(4)
    usual = times(MultistepDDIMScheduler(**part))
    assert scheduler.timesteps.tolist() == (usual if "denoising_start" in part else [900, 600])
    x = torch.ones(1, 1, 4, 4)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x).prev_sample
    assert x.isfinite().all()


def test_encoding_and_decoding():
    """The inverse goes up along the fitted times, and down with the fitted weights."""
    pipe = exact_pipe(Mixture((1.0,), (0.2,), (0.1,), ALPHA), MultistepDDIMScheduler())
    found = fit_solver(pipe, [7], num_images=16, teacher_steps=50)[7]
    images = pipe(2, 50, generator=torch.Generator().manual_seed(0), output_type="pt").images
    for strength in (1.0, 0.5):
        again = pipe.reconstruct(images, 7, 20, strength=strength, tolerance=1e-9, output_type="pt")
        assert (again - images).abs().max() < 1e-7
        assert pipe.scheduler.timesteps.tolist() == found["timesteps"]
    inverse = InverseMultistepDDIMScheduler.from_config(pipe.scheduler.config, refinement_steps=2)
    x = torch.ones(1, 1, 4, 4)
    for t in times(inverse, 7):
        x = inverse.step(0.1 * x, t, x).prev_sample
    assert [row for place, row in weighed(inverse).items() if 7 <= place < 14] == found["weights"]


def test_inverting_in_a_stock_pipeline(parts):
    pipe, _ = tiny.text_to_image(parts, fitted(guidance_scale=1.0, **SCALED))
    pipe.set_progress_bar_config(disable=True)
    with tiny.denoiser(pipe, share=0.05), torch.no_grad():
        picture = tiny.uniform(1, 3, 16, 16)
        found = invert(pipe, picture, "a cat", refinement_steps=60, num_inference_steps=4, guidance_scale=1.0)
        z = pipe.vae.encode(2 * picture - 1).latent_dist.mode() * pipe.vae.config.scaling_factor
        again = found.decode(pipe, output_type="latent")[0]
    assert (again - z).abs().max() < 1e-2 * z.abs().max()
