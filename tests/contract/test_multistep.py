"""MultistepDDIMScheduler: what its steps are, its config, and the loops it runs in."""

import itertools
import json

import diffusers
import numpy as np
import pytest
import torch
from exact import exact_pipe
from oracle import Gaussian, Mixture

from ddim_plugin import (
    GeneralizedDDIMPipeline,
    GeneralizedDDIMScheduler,
    InverseDDIMScheduler,
    InverseMultistepDDIMScheduler,
    MultistepDDIMScheduler,
)
from ddim_plugin.process.multistep import COORDINATES, QUANTITIES, mean_weights

ALPHA = GeneralizedDDIMScheduler().alpha_bar


def run(scheduler, outputs, x, **step):
    for t, output in zip(scheduler.timesteps, outputs, strict=True):
        x = scheduler.step(output, t, x, **step).prev_sample
    return x


def draws(S, *shape, dtype=torch.float64, seed=0):
    """x_T and S outputs."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(S + 1, *(shape or (2, 3, 4, 4)), generator=generator, dtype=dtype).unbind(0)


def by_hand(
    x,
    outputs,
    times,
    prediction_type,
    quantity,
    coordinate,
    order,
    start_from_top,
    corrector=None,
    factor=1.0,
    lower_order_final=False,
):
    known, before, place = [], None, -1
    outputs = list(outputs)
    for t, s in itertools.pairwise([*times, 0]):
        output, place = outputs.pop(0), place + 1
        x0, eps = predicted(x, output, t, prediction_type)
        if not known and start_from_top:
            a, b = np.sqrt(ALPHA[t]), np.sqrt(1 - ALPHA[t])
            eps = (x - np.sqrt(ALPHA[-1]) * x0) / np.sqrt(1 - ALPHA[-1])
            x = a * x0 + b * eps
        value = lambda x0, eps: (ALPHA[t], eps if quantity == "epsilon" else x0)  # noqa: B023, E731
        known = [value(x0, eps), *known][: max(2, order)]
        if corrector and before and not (place == 1 and start_from_top):
            x = moved(*before, t, known, quantity, coordinate)
            if corrector == "pece":
                output = outputs.pop(0)
                known[0] = value(*predicted(x, output, t, prediction_type))
        before = x, t
        last = s == 0 and (quantity == "sample" or lower_order_final)
        x = moved(x, t, s, known[:1] if last else known[:order], quantity, coordinate, factor)
    return x


def predicted(x, output, t, prediction_type):
    a, b = np.sqrt(ALPHA[t]), np.sqrt(1 - ALPHA[t])
    return {
        "epsilon": ((x - b * output) / a, output),
        "sample": (output, (x - a * output) / b),
        "v_prediction": (a * x - b * output, b * x + a * output),
    }[prediction_type]


def moved(x, t, s, known, quantity, coordinate, factor=1.0):
    """DDIM from t to s with the mean of g in place of its value, or so far towards it."""
    a, b = np.sqrt(ALPHA[t]), np.sqrt(1 - ALPHA[t])
    weights = mean_weights(quantity, coordinate, ALPHA[t], ALPHA[s], [alpha for alpha, _ in known])
    mean = sum(w * g for w, (_, g) in zip(weights.tolist(), known, strict=True))
    mean = known[0][1] + factor * (mean - known[0][1])
    x0, eps = ((x - b * mean) / a, mean) if quantity == "epsilon" else (mean, (x - a * mean) / b)
    return np.sqrt(ALPHA[s]) * x0 + np.sqrt(1 - ALPHA[s]) * eps


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize(
    ("start_from_top", "factor", "lower_order_final"), [(True, 1, True), (False, 1, False), (True, 1.5, False)]
)
def test_a_step_is_ddims_with_the_mean(prediction_type, quantity, order, start_from_top, factor, lower_order_final):
    for coordinate in COORDINATES:
        scheduler = MultistepDDIMScheduler(
            prediction_type=prediction_type,
            solver_order=order,
            solver_quantity=quantity,
            solver_coordinate=coordinate,
            solver_extrapolation=factor,
            lower_order_final=lower_order_final,
            start_from_top=start_from_top,
        )
        scheduler.set_timesteps(timesteps=[930, 700, 610, 333, 120, 0])
        x, *outputs = draws(6)
        found = run(scheduler, outputs, x)
        settings = (prediction_type, quantity, coordinate, order, start_from_top, None, factor, lower_order_final)
        expected = by_hand(x, outputs, [931, 701, 611, 334, 121, 1], *settings)
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)
        assert torch.allclose(run(scheduler, outputs, x), expected, rtol=1e-9, atol=1e-9)  # begins anew


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("corrector", "start_from_top", "factor"), [("pec", True, 1), ("pec", False, 1.5), ("pece", False, 1.5)]
)
def test_a_corrector_makes_the_last_move_again(prediction_type, quantity, order, corrector, start_from_top, factor):
    for coordinate in COORDINATES:
        settings = {"solver_quantity": quantity, "solver_coordinate": coordinate, "solver_corrector": corrector}
        settings["solver_extrapolation"] = factor
        scheduler = MultistepDDIMScheduler(
            prediction_type=prediction_type, solver_order=order, start_from_top=start_from_top, **settings
        )
        scheduler.set_timesteps(timesteps=[930, 700, 610, 333, 120, 0])
        times = [931, 701, 611, 334, 121, 1]
        if corrector == "pece":
            assert scheduler.timesteps.tolist() == [930, *(t for t in (700, 610, 333, 120, 0) for _ in "ab")]
        x, *outputs = draws(len(scheduler.timesteps))
        given = (prediction_type, quantity, coordinate, order, start_from_top and order > 1, corrector, factor)
        expected = by_hand(x, outputs, times, *given)
        for _ in range(2):
            found = run(scheduler, outputs, x)
            assert torch.allclose(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("order", "corrector", "reached"), [(1, None, 1), (2, None, 2), (1, "pec", 2), (1, "pece", 2), (2, "pec", 2)]
)
@pytest.mark.parametrize(("quantity", "coordinate"), [("epsilon", "bounded"), ("sample", "log_snr")])
@pytest.mark.parametrize("even", [True, False])
def test_orders_of_the_scheduler(order, corrector, reached, quantity, coordinate, even):
    """On Gaussian data, from one time to another, on even and uneven grids: the error falls as S^−order."""
    T, errors = 16_000, []
    settings = {"solver_order": order, "solver_corrector": corrector, "solver_quantity": quantity}
    for S in (40, 80, 160):
        scheduler = MultistepDDIMScheduler(
            T, 1e-4 * 1000 / T, 0.02 * 1000 / T, **settings, solver_coordinate=coordinate, start_from_top=False
        )
        data = Gaussian(0.3, 0.25, scheduler.alpha_bar)
        grid = np.linspace(12_000, 1_000, S + 1) if even else np.geomspace(12_000, 1_000, S + 1)
        scheduler.set_timesteps(timesteps=[int(t) for t in grid])
        x = start = torch.linspace(-2, 2, 4, dtype=torch.float64).view(1, 1, 2, 2)
        largest = 0.0
        for t, s in itertools.pairwise(scheduler.timesteps):
            x = scheduler.step(data.eps(x, int(t) + 1), t, x).prev_sample
            if corrector != "pece" or s == t:
                largest = max(largest, float((x - data.solution(start, int(grid[0]) + 1, int(s) + 1)).abs().max()))
        errors.append(largest)
    found = np.log2(errors[0] / errors[2]) / 2
    assert found > reached - 0.25
    assert found < reached + 0.4 or (order, corrector) == (2, "pec")  # whose second-order error may be small


SETTINGS = [
    {},
    {"eta": 0.7},
    {"clip_sample": True},
    {"clip_sample": True, "use_clipped_model_output": True, "eta": 1.0},
    {"thresholding": True, "sample_max_value": 1.5},
    {"variance_type": "fixed_large"},
    {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    {"timestep_spacing": "paper_quadratic"},
    {"set_alpha_to_one": False, "timestep_spacing": "leading", "steps_offset": 1},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_order_1_is_the_generalized_scheduler(settings, quantity):
    one = GeneralizedDDIMScheduler(**settings)
    other = MultistepDDIMScheduler(
        **{"timestep_spacing": "linear"} | settings, solver_order=1, solver_quantity=quantity
    )
    results = []
    for scheduler in (one, other):
        scheduler.set_timesteps(50)
        x, *outputs = draws(50, dtype=torch.float32)
        results.append(run(scheduler, outputs, x, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(*results)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_a_constant_is_its_own_mean(settings, quantity):
    if ("eta" in settings or "variance_type" in settings) and quantity == "epsilon":
        with pytest.raises(ValueError, match="ε̂ changes with every draw and is no polynomial: take solver_quantity='s"):
            MultistepDDIMScheduler(**settings, solver_quantity=quantity).set_timesteps(12)
        return
    """Where g does not change, every order makes DDIM's moves: with noise, clipping and repeated times too."""
    data_x0, data_eps = (
        torch.rand(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (0, 1)
    )
    results = []
    for cls, own in (
        (GeneralizedDDIMScheduler, {}),
        (MultistepDDIMScheduler, {"solver_quantity": quantity, "solver_order": 4, "start_from_top": False}),
    ):
        scheduler = cls(**{"timestep_spacing": "linear"} | settings, **own)
        scheduler.set_timesteps(12)
        x, generator = data_eps.clone(), torch.Generator().manual_seed(1)
        for t in scheduler.timesteps:
            a = scheduler.alpha_bar[int(t) + 1]
            output = {"v_prediction": a**0.5 * data_eps - (1 - a) ** 0.5 * data_x0}.get(
                scheduler.config.prediction_type
            )
            if output is None:
                output = data_eps if quantity == "epsilon" else (x - a**0.5 * data_x0) / (1 - a) ** 0.5
            elif quantity == "epsilon" and a > 0:
                output = (data_eps - (1 - a) ** 0.5 * x) / a**0.5
            elif quantity == "sample":
                output = (a**0.5 * x - data_x0) / (1 - a) ** 0.5
            x = scheduler.step(output, t, x, generator=generator).prev_sample
        results.append(x)
    assert torch.allclose(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("quantity", "coordinate"), [("epsilon", "bounded"), ("sample", "log_snr")])
def test_higher_orders_are_nearer(quantity, coordinate):
    data = Mixture((0.3, 0.7), (-0.6, 0.8), (0.1, 0.3), ALPHA)
    x = torch.linspace(-2, 2, 16, dtype=torch.float64).view(1, 1, 4, 4)

    def images(scheduler, S):  # τ quadratic: of x̂0 the last move is of order 1
        return exact_pipe(data, scheduler)(latents=x, num_inference_steps=S, output_type="pt").images

    exact = images(MultistepDDIMScheduler(timestep_spacing="quadratic"), 500)
    errors = []
    for order in (1, 2, 3):
        settings = {"solver_quantity": quantity, "solver_coordinate": coordinate, "timestep_spacing": "quadratic"}
        scheduler = MultistepDDIMScheduler(solver_order=order, **settings)
        errors.append(float((images(scheduler, 25) - exact).abs().max()))
    assert errors[0] > 2 * errors[1]
    assert errors[1] > 1.2 * errors[2]


def test_a_step_that_does_not_follow_begins_anew():
    one, first = MultistepDDIMScheduler(), MultistepDDIMScheduler(solver_order=1)
    x, a, b, c = draws(3)
    for scheduler in (one, first):
        scheduler.set_timesteps(10)
    one.step(a, one.timesteps[3], x)
    skipped = one.step(b, one.timesteps[5], x).prev_sample
    assert torch.equal(skipped, first.step(b, first.timesteps[5], x).prev_sample)
    followed = one.step(c, one.timesteps[6], x).prev_sample
    assert not torch.equal(followed, first.step(c, first.timesteps[6], x).prev_sample)
    repeated = one.step(c, one.timesteps[6], x).prev_sample
    assert torch.equal(repeated, first.step(c, first.timesteps[6], x).prev_sample)
    other = one.step(c[:1], one.timesteps[7], x[:1]).prev_sample
    assert torch.equal(other, first.step(c[:1], first.timesteps[7], x[:1]).prev_sample)
    off = one.step(c, 555, x).prev_sample
    assert torch.equal(off, first.step(c, 555, x).prev_sample)
    each = torch.tensor([100, 200])
    assert torch.equal(one.step(c, each, x).prev_sample, first.step(c, each, x).prev_sample)


@pytest.mark.parametrize("by_number", [False, True])
def test_times_by_place_and_by_number(by_number):
    scheduler = MultistepDDIMScheduler(timestep_spacing="paper_quadratic")
    scheduler.set_timesteps(50)
    x, *outputs = draws(50)
    expected = run(scheduler, outputs, x)
    for t, output in zip(scheduler.timesteps, outputs, strict=True):
        x = scheduler.step(output, int(t) if by_number else t, x).prev_sample
    assert torch.equal(x, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_half_precision_is_rounded_once(dtype, quantity):
    scheduler = MultistepDDIMScheduler(solver_quantity=quantity)
    scheduler.set_timesteps(10)
    x, *outputs = draws(3, dtype=torch.float32)
    x, outputs = x.to(dtype), [output.to(dtype) for output in outputs]
    for output, t in zip(outputs[:2], scheduler.timesteps, strict=False):
        scheduler.step(output, t, x)
    found = scheduler.step(outputs[2], scheduler.timesteps[2], x).prev_sample
    assert found.dtype == dtype
    for output, t in zip(outputs[:2], scheduler.timesteps, strict=False):
        scheduler.step(output.double(), t, x.double())
    exact = scheduler.step(outputs[2].double(), scheduler.timesteps[2], x.double()).prev_sample
    assert torch.allclose(found.double(), exact, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps * 0.5)


def test_what_a_step_tells():
    """x̂0 and ε̂ are the network's own; the mean is what x_s is drawn around."""
    scheduler = MultistepDDIMScheduler(eta=0.5)
    plain = GeneralizedDDIMScheduler(eta=0.5, timestep_spacing="few_steps_noise")
    x, *outputs = draws(2)
    for each in (scheduler, plain):
        each.set_timesteps(10)
    scheduler.step(outputs[0], scheduler.timesteps[0], x, generator=torch.Generator())
    found = scheduler.step(outputs[1], scheduler.timesteps[1], x, variance_noise=torch.zeros_like(x))
    known = plain.step(outputs[1], plain.timesteps[1], x, variance_noise=torch.zeros_like(x))
    assert torch.equal(found.pred_original_sample, known.pred_original_sample)
    assert torch.equal(found.pred_epsilon, known.pred_epsilon)
    assert torch.equal(found.std, known.std)
    assert torch.equal(found.prev_sample, found.mean)
    assert not torch.equal(found.mean, known.mean)


# ---- config --------------------------------------------------------------------------------------------------------


def test_from_any_sampler():
    own = MultistepDDIMScheduler()
    for config in (
        GeneralizedDDIMScheduler(timestep_spacing="quadratic", eta=1.0, beta_end=0.013).config,
        GeneralizedDDIMScheduler(variance_type="fixed_large", beta_end=0.013).config,
        diffusers.DDIMScheduler(timestep_spacing="trailing", beta_end=0.013, clip_sample=False).config,
        diffusers.UniPCMultistepScheduler(beta_end=0.013).config,
        diffusers.DDPMScheduler(variance_type="fixed_large", beta_end=0.013).config,
    ):
        made = MultistepDDIMScheduler.from_config(config)
        assert made.config.beta_end == 0.013
        for key in ("timestep_spacing", "eta", "variance_type", "steps_offset", "solver_order", "clip_sample"):
            assert made.config[key] == own.config[key], key
    clipping = diffusers.DDIMScheduler().config
    for cls in (InverseDDIMScheduler, InverseMultistepDDIMScheduler):
        back = MultistepDDIMScheduler.from_config(cls.from_config(clipping).config)
        assert (back.config.clip_sample, back.config.timestep_spacing) == (False, "few_steps")
    learned = GeneralizedDDIMScheduler(variance_type="learned_range")
    assert MultistepDDIMScheduler.from_config(learned.config).config.variance_type == "learned_range"
    asked = MultistepDDIMScheduler.from_config(learned.config, timestep_spacing="trailing", solver_order=2)
    assert (asked.config.timestep_spacing, asked.config.solver_order) == ("trailing", 2)


def test_on_disk_and_through_others(tmp_path, quiet_diffusers):
    own = MultistepDDIMScheduler(timestep_spacing="quadratic", solver_order=2, solver_quantity="sample", eta=0.2)

    def settings(scheduler):
        return {key: value for key, value in scheduler.config.items() if not key.startswith("_")}

    own.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"] == "MultistepDDIMScheduler"
    assert settings(MultistepDDIMScheduler.from_pretrained(tmp_path)) == settings(own)
    stock = diffusers.DPMSolverMultistepScheduler.from_config(own.config)
    assert settings(MultistepDDIMScheduler.from_config(stock.config)) == settings(own)
    assert GeneralizedDDIMScheduler.from_config(own.config).config.timestep_spacing == "quadratic"
    default = GeneralizedDDIMScheduler.from_config(MultistepDDIMScheduler().config)
    assert default.config.timestep_spacing == "linear"  # few_steps is for the multistep method
    theirs = diffusers.DPMSolverMultistepScheduler(solver_order=1).config
    assert MultistepDDIMScheduler.from_config(theirs).config.solver_order is None
    assert diffusers.DDIMScheduler.from_pretrained(tmp_path).config.beta_end == 0.02
    assert quiet_diffusers == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"solver_order": 0}, "solver_order must be 1, 2, 3 or 4, or None, not 0"),
        ({"solver_order": 5}, "not 5"),
        ({"solver_order": 2.0}, "not 2.0"),
        ({"solver_quantity": "v_prediction"}, "unknown quantity 'v_prediction'"),
        ({"solver_coordinate": "t"}, "unknown coordinate 't': use one of nsr"),
        ({"solver_corrector": "heun"}, "unknown solver_corrector 'heun': use pec, pece or None"),
        ({"solver_extrapolation": -1}, "solver_extrapolation must be a number from 0 on, or None, not -1"),
        ({"solver_extrapolation": "far"}, "solver_extrapolation must be a number from 0 on, or None, not 'far'"),
        ({"timestep_spacing": "x"}, "unknown timestep_spacing"),
    ],
)
def test_bad_settings(settings, said):
    with pytest.raises(ValueError, match=said):
        MultistepDDIMScheduler(**settings)


# ---- loops ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("S", [1, 2, 7, 999, 1000])
def test_any_number_of_steps(S):
    scheduler = MultistepDDIMScheduler()
    scheduler.set_timesteps(S)
    x = draws(1, 1, 1, 2, 2)[0]
    for t in scheduler.timesteps:
        x = scheduler.step(torch.tanh(x), t, x).prev_sample
    assert len(scheduler.timesteps) == S
    assert x.isfinite().all()


def test_in_our_pipeline_and_in_a_stock_one(make_unet, tmp_path):
    unet = make_unet()
    pipe = GeneralizedDDIMPipeline(unet, MultistepDDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    images = pipe(2, 6, generator=torch.Generator().manual_seed(3), output_type="np").images
    pipe.save_pretrained(tmp_path)
    loaded = GeneralizedDDIMPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is MultistepDDIMScheduler
    loaded.set_progress_bar_config(disable=True)
    assert np.array_equal(loaded(2, 6, generator=torch.Generator().manual_seed(3), output_type="np").images, images)
    stock = diffusers.DDPMPipeline(unet, pipe.scheduler)
    stock.set_progress_bar_config(disable=True)
    again = stock(2, num_inference_steps=6, generator=torch.Generator().manual_seed(3), output_type="np").images
    assert np.allclose(again, images, atol=1e-6)


def test_decoding_is_the_call(make_unet):
    pipe = GeneralizedDDIMPipeline(make_unet(), MultistepDDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    z = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    decoded = pipe.decode(z, num_inference_steps=5, output_type="pt")
    assert torch.equal(decoded, pipe(latents=z, num_inference_steps=5, output_type="pt").images)


LATENTS = [
    {},
    {"solver_order": 1},
    {"solver_order": 2, "solver_corrector": "pec", "timestep_spacing": "quadratic"},
    {"solver_order": 1, "solver_corrector": "pece", "timestep_spacing": "linear"},
    {"solver_quantity": "sample", "timestep_spacing": "linear"},
    {"solver_order": 4, "start_from_top": False},
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
            assert (report.total_evaluations <= S * max(1, refinement)).all()
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
            decoded = pipe.reconstruct(images, num_inference_steps=S, output_type="pt")
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
    times = sorted({int(t) for t in scheduler.timesteps})
    assert report.timesteps.tolist() == [times[4]]
    assert torch.allclose(pipe.encode(images, batch_size=1, **given), z, atol=1e-9)


def test_the_way_up_by_hand():
    """In the stock loop: from the data with the network at τ_1, then at the lower end of each move, and to T."""
    up = InverseMultistepDDIMScheduler(solver_order=2)
    up.set_timesteps(timesteps=[700, 300, 100])
    assert up.timesteps.tolist() == [100, 100, 300]
    x, *outputs = draws(3)
    found = run(up, outputs, x)
    nsr = np.sqrt(1 / ALPHA - 1)
    bar = x + nsr[101] * outputs[0]
    known = [(0, outputs[0]), (101, outputs[1])]
    for (t, s), new in zip([(101, 301), (301, 1000)], [None, (301, outputs[2])], strict=True):
        known = [known[-1], new] if new else known
        weights = mean_weights("epsilon", "bounded", ALPHA[t], ALPHA[s], [ALPHA[time] for time, _ in known[::-1]])
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


def test_up_and_down_again():
    down = MultistepDDIMScheduler(solver_order=2, clip_sample=True, timestep_spacing="log_snr")
    up = InverseMultistepDDIMScheduler.from_config(down.config)
    assert (up.config.solver_order, up.config.timestep_spacing, up.config.clip_sample) == (2, "log_snr", False)
    again = MultistepDDIMScheduler.from_config(up.config)
    assert (again.config.clip_sample, again.config.timestep_spacing) == (True, "log_snr")
    with pytest.raises(ValueError, match="encoding needs the deterministic process"):
        InverseMultistepDDIMScheduler.from_config(down.config, eta=0.5)


def test_a_learned_variance_without_noise(make_unet):
    """The process is the deterministic one unless η = 1 is asked for, in the config or in the call."""
    settings = {"variance_type": "learned_range", "timestep_spacing": "trailing", "solver_extrapolation": 1.0}
    plain, noisy = (MultistepDDIMScheduler(eta=eta, **settings) for eta in (0.0, 1.0))
    x, *outputs = draws(4)
    outputs = [torch.cat([output, output], dim=1) for output in outputs]
    for scheduler in (plain, noisy):
        scheduler.set_timesteps(4)
    assert torch.equal(run(plain, outputs, x), run(plain, outputs, x))
    made = [
        run(each, outputs, x, generator=torch.Generator().manual_seed(0), **step)
        for each, step in ((noisy, {}), (plain, {"eta": 1.0}))
    ]
    assert torch.equal(*made)
    assert not torch.equal(made[0], run(plain, outputs, x))


def test_heun_counts_two_times_a_step():
    scheduler = MultistepDDIMScheduler(solver_order=1, solver_corrector="pece")
    assert scheduler.order == 2
    scheduler.set_timesteps(10)
    assert len(scheduler.timesteps) == 19
    for k in range(1, 10):  # where image to image begins: at the second call, from a sample that needs no correction
        assert scheduler._pairs[2 * k][0] != scheduler._pairs[2 * k][1]
    assert MultistepDDIMScheduler().order == 1


def test_zero_terminal_snr(make_unet):
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
    assert (report.evaluations <= 4 * 2 * 6).all()
    assert (report.evaluations >= 4 * 2 * 2).all()


@pytest.mark.parametrize("settings", [{}, {"clip_sample": True, "use_clipped_model_output": True}])
def test_the_first_move_is_made_from_the_top(settings):
    """What the network tells of x_T at a lower time is an x̂0: with the exact one the start costs nothing."""
    x0 = torch.rand(2, 3, 4, 4, dtype=torch.float64) - 0.5
    x, _ = draws(1)
    scheduler = MultistepDDIMScheduler(prediction_type="sample", **settings)
    plain = GeneralizedDDIMScheduler(prediction_type="sample", **settings)
    scheduler.set_timesteps(timesteps=[700, 300])
    plain.set_timesteps(timesteps=[999, 300])
    found = scheduler.step(x0, scheduler.timesteps[0], x)
    expected = plain.step(x0, plain.timesteps[0], x)
    assert torch.allclose(found.prev_sample, expected.prev_sample)
    assert torch.equal(found.pred_original_sample, expected.pred_original_sample)
    later = MultistepDDIMScheduler(prediction_type="sample", **settings)
    later.set_timesteps(timesteps=[900, 700, 300])
    from_between = later.step(x0, later.timesteps[1], x).prev_sample
    assert not torch.allclose(from_between, found.prev_sample)


def test_with_noise_a_move_goes_further():
    x, *outputs = draws(4)
    results = []
    for settings in ({}, {"solver_extrapolation": 1.5}, {"solver_extrapolation": 1.0}):
        scheduler = MultistepDDIMScheduler(**settings)
        scheduler.set_timesteps(4, eta=1.0)
        results.append(run(scheduler, outputs, x, eta=1.0, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(*results[:2])
    assert not torch.allclose(*results[1:])


@pytest.mark.parametrize("planned", [0.0, 0.2])
def test_not_where_times_were_not_planned_for_noise(planned):
    """A stock pipeline tells η to `step` alone; and a little noise is no reason to end far from the data."""
    x, *outputs = draws(4)
    results, usual = [], MultistepDDIMScheduler()
    usual.set_timesteps(4)
    for settings in ({}, {"solver_extrapolation": 1.0}):
        scheduler = MultistepDDIMScheduler(eta=planned, **settings)
        scheduler.set_timesteps(4)
        assert scheduler.timesteps.tolist() == usual.timesteps.tolist()
        results.append(run(scheduler, outputs, x, eta=1.0, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(*results)


def test_with_noise_the_mean_is_that_of_the_sde():
    """Second order: what x̂0 that is linear in log-SNR leads to in one move, and in many small ones of order 1."""
    alpha_bar = MultistepDDIMScheduler().alpha_bar
    lam = np.log(alpha_bar[1:] / (1 - alpha_bar[1:]))
    x, z = torch.zeros(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)

    def x0(t):
        return torch.full_like(x, lam[t] / 10)

    def mean(scheduler, times, given):
        scheduler.set_timesteps(timesteps=times)
        y = given
        for t in scheduler.timesteps[:-1]:
            y = scheduler.step(x0(int(t)), t, y, variance_noise=z).prev_sample
        return y

    settings = {"prediction_type": "sample", "eta": 1.0}
    small = mean(GeneralizedDDIMScheduler(**settings), list(range(600, 399, -1)), x)
    scheduler = MultistepDDIMScheduler(solver_extrapolation=1.0, **settings)
    scheduler.set_timesteps(timesteps=[700, 600, 400, 100])
    scheduler.step(x0(700), scheduler.timesteps[0], x, variance_noise=z)
    found = scheduler.step(x0(600), scheduler.timesteps[1], x, variance_noise=z).prev_sample
    assert found.item() == pytest.approx(small.item(), rel=0.02)
    first = GeneralizedDDIMScheduler(**settings)
    first.set_timesteps(timesteps=[600, 400, 100])
    assert first.step(x0(600), 600, x, variance_noise=z).prev_sample.item() != pytest.approx(small.item(), rel=0.2)


def test_the_last_move_is_of_order_1_where_alpha_bar_is_not_1():
    x, *outputs = draws(3)
    results = []
    for settings in ({"lower_order_final": True}, {"lower_order_final": False}):
        scheduler = MultistepDDIMScheduler(set_alpha_to_one=False, **settings)
        scheduler.set_timesteps(3)
        before = run_to_the_last(scheduler, outputs, x)
        results.append(scheduler.step(outputs[-1], scheduler.timesteps[-1], before).prev_sample)
    first = GeneralizedDDIMScheduler(set_alpha_to_one=False)
    first.set_timesteps(timesteps=scheduler.timesteps)
    assert torch.allclose(results[0], first.step(outputs[-1], scheduler.timesteps[-1], before).prev_sample)
    assert not torch.allclose(*results)


def run_to_the_last(scheduler, outputs, x):
    for t, output in zip(scheduler.timesteps[:-1], outputs[:-1], strict=True):
        x = scheduler.step(output, t, x).prev_sample
    return x


def test_a_move_of_another_kind_is_not_corrected():
    """Noise that begins after the first move: that was one of the ODE, and stays as it was."""
    x, *outputs = draws(3)
    results = []
    for corrector in ("pec", None):
        settings = {"solver_quantity": "sample", "solver_order": 2, "solver_corrector": corrector}
        scheduler = MultistepDDIMScheduler(**settings)
        scheduler.set_timesteps(timesteps=[700, 400, 100])
        y = scheduler.step(outputs[0], scheduler.timesteps[0], x, eta=0.0).prev_sample
        results.append(scheduler.step(outputs[1], scheduler.timesteps[1], y, eta=1.0, variance_noise=x).prev_sample)
    assert torch.equal(*results)


def test_with_noise_the_first_move_is_made_where_the_network_is_called():
    x, output, z = draws(2)
    steps = []
    for cls in (MultistepDDIMScheduler, GeneralizedDDIMScheduler):
        scheduler = cls()
        scheduler.set_timesteps(timesteps=[700, 300])
        steps.append(scheduler.step(output, 700, x, eta=0.4, variance_noise=z).prev_sample)
    assert torch.equal(*steps)


def test_what_is_held():
    """Three values of ε̂ where nothing is random, two of x̂0 with noise; each in its own coordinate."""
    x, *outputs = draws(10)
    for noise, quantity, coordinate, order in ((0.0, "epsilon", "bounded", 3), (0.8, "sample", "log_snr", 2)):
        results = []
        for settings in ({}, {"solver_quantity": quantity, "solver_coordinate": coordinate, "solver_order": order}):
            scheduler = MultistepDDIMScheduler(**settings)
            scheduler.set_timesteps(10)
            results.append(run(scheduler, outputs, x, eta=noise, generator=torch.Generator().manual_seed(2)))
        assert torch.equal(*results)
    scheduler = MultistepDDIMScheduler()
    scheduler.set_timesteps(10)
    first = MultistepDDIMScheduler(solver_order=1)
    first.set_timesteps(10)
    scheduler.step(outputs[0], scheduler.timesteps[0], x)
    changed = scheduler.step(outputs[1], scheduler.timesteps[1], x, eta=0.5, variance_noise=x)
    assert torch.equal(
        changed.prev_sample, first.step(outputs[1], first.timesteps[1], x, eta=0.5, variance_noise=x).prev_sample
    )
