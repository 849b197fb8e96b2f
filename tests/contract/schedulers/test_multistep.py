"""MultistepDDIMScheduler: what its steps are, and the loops it runs in."""

import itertools

import diffusers
import numpy as np
import oracle
import pytest
import torch
from plans import draws, run

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler, MultistepDDIMScheduler
from ddim_plugin.process.moves import mean_weights

ALPHA = GeneralizedDDIMScheduler().alpha_bar
RATIO = np.sqrt(1 / ALPHA - 1)


def by_hand(x, outputs, times, prediction_type, order, eta=0.0, factor=1.0, lower_order_final=False, noise=0.0):
    """The method written out again: ε̂ is held as a polynomial, or x̂0 with noise; the first step starts at T."""
    known, of_eps, before = [], eta == 0, 0
    for (t, s), output in zip(itertools.pairwise([*times, 0]), outputs, strict=True):
        x0, eps = predicted(x, output, t, prediction_type)
        if of_eps and not known and order > 1:
            eps = (x - np.sqrt(ALPHA[-1]) * x0) / np.sqrt(1 - ALPHA[-1])
            x = np.sqrt(ALPHA[t]) * x0 + np.sqrt(1 - ALPHA[t]) * eps
        known = [(t, eps if of_eps else x0), *known][:order]
        last = s == 0 and (not of_eps or lower_order_final)
        reach = factor if len(known) > 1 and t - s + 1 >= 0.9 * (before - t) else 1.0
        x = moved(x, t, s, known[:1] if last else known, eta, reach) + oracle.sigma(ALPHA, t, s, eta) * noise
        before = t
    return x


def predicted(x, output, t, prediction_type):
    a, b = np.sqrt(ALPHA[t]), np.sqrt(1 - ALPHA[t])
    return {
        "epsilon": ((x - b * output) / a, output),
        "sample": (output, (x - a * output) / b),
        "v_prediction": (a * x - b * output, b * x + a * output),
    }[prediction_type]


def moved(x, t, s, known, eta, factor):
    """DDIM from t to s with the mean of ε̂, or of x̂0 with noise, in place of its value, or so far towards it."""
    a, b = np.sqrt(ALPHA[t]), np.sqrt(1 - ALPHA[t])
    weights = np.ones(1)
    if len(known) > 1:
        weights = mean_weights(eta > 0, RATIO[t], RATIO[s], [RATIO[time] for time, _ in known], eta)
    mean = sum(w * g for w, (_, g) in zip(weights.tolist(), known, strict=True))
    mean = known[0][1] + factor * (mean - known[0][1])
    x0, eps = (mean, (x - a * mean) / b) if eta else ((x - b * mean) / a, mean)
    return np.sqrt(ALPHA[s]) * x0 + np.sqrt(1 - ALPHA[s] - oracle.sigma(ALPHA, t, s, eta) ** 2) * eps


TIMES = [930, 700, 610, 333, 120, 0]


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("lower_order_final", [True, False])
def test_a_step_is_ddims_with_the_mean(prediction_type, order, lower_order_final):
    config = {"prediction_type": prediction_type, "solver_order": order, "lower_order_final": lower_order_final}
    scheduler = MultistepDDIMScheduler(**config, fitted_solvers={6: {"timesteps": TIMES}})
    scheduler.set_timesteps(6)
    x, *outputs = draws(6)
    found = run(scheduler, outputs, x)
    expected = by_hand(x, outputs, [t + 1 for t in TIMES], prediction_type, order, 0.0, 1.0, lower_order_final)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)
    assert torch.allclose(run(scheduler, outputs, x), expected, rtol=1e-9, atol=1e-9)  # begins anew


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("planned", "eta", "factor"), [(0.3, 0.3, 1.0), (0.0, 0.8, 1.0), (0.5, 0.5, 1.5), (1.0, 1.0, 1.5)]
)
def test_with_noise_a_step_has_the_mean_of_x0(prediction_type, order, planned, eta, factor):
    """Of the SDE; and 1.5 times as far towards it where τ was planned for much noise."""
    scheduler = MultistepDDIMScheduler(prediction_type=prediction_type, solver_order=order, eta=planned)
    times = [*TIMES[:-1], 60]  # to 0, a step in log-SNR would be too long for two values
    scheduler.set_timesteps(timesteps=times)
    x, *outputs, z = draws(7)
    expected = by_hand(x, outputs, [t + 1 for t in times], prediction_type, order, eta, factor, noise=z)
    for _ in range(2):
        found = run(scheduler, outputs, x, eta=eta, variance_noise=z)
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)


SETTINGS = [
    {},
    {"eta": 0.7},
    {"clip_sample": True},
    {"clip_sample": True, "use_clipped_model_output": True, "eta": 1.0},
    {"thresholding": True, "sample_max_value": 1.5},
    {"variance_type": "fixed_large"},
    {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    {"timestep_spacing": "paper_quadratic"},
    {"timestep_spacing": "paper_quadratic", "eta": 0.7},
    {"set_alpha_to_one": False, "timestep_spacing": "leading", "steps_offset": 1},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_order_1_is_the_generalized_scheduler(settings):
    one = GeneralizedDDIMScheduler(**settings)
    other = MultistepDDIMScheduler(**{"timestep_spacing": "linear"} | settings, solver_order=1)
    results = []
    for scheduler in (one, other):
        scheduler.set_timesteps(50)
        x, *outputs = draws(50, dtype=torch.float32)
        results.append(run(scheduler, outputs, x, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(*results)


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_constant_is_its_own_mean(settings):
    """Where g does not change, every order makes DDIM's moves: with noise, clipping and repeated times too."""
    noisy = "eta" in settings or "variance_type" in settings
    data_x0, data_eps = (
        torch.rand(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (0, 1)
    )
    results = []
    for cls, own in ((GeneralizedDDIMScheduler, {}), (MultistepDDIMScheduler, {"solver_order": 4})):
        scheduler = cls(**{"timestep_spacing": "linear"} | settings, **own)
        scheduler.set_timesteps(60)
        if not noisy and scheduler.timesteps[0] < 999:  # the first step would start at T
            scheduler.set_timesteps(timesteps=[999, *sorted(set(scheduler.timesteps.tolist()), reverse=True)])
        x, generator = data_eps.clone(), torch.Generator().manual_seed(1)
        for t in scheduler.timesteps:
            a = scheduler.alpha_bar[int(t) + 1]
            eps = (x - a**0.5 * data_x0) / (1 - a) ** 0.5 if noisy else data_eps
            if scheduler.config.prediction_type == "v_prediction":
                output = (data_eps - (1 - a) ** 0.5 * x) / a**0.5 if a > 0 else -data_x0
            else:
                output = eps
            x = scheduler.step(output, t, x, generator=generator).prev_sample
        results.append(x)
    assert torch.allclose(*results, rtol=1e-9, atol=1e-9)


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
@pytest.mark.parametrize("eta", [0.0, 0.4])
def test_half_precision_is_rounded_once(dtype, eta):
    scheduler = MultistepDDIMScheduler(eta=eta)
    scheduler.set_timesteps(10)
    x, *outputs = draws(3, dtype=torch.float32)
    x, outputs = x.to(dtype), [output.to(dtype) for output in outputs]
    noise = {"variance_noise": torch.zeros_like(x)}
    for output, t in zip(outputs[:2], scheduler.timesteps, strict=False):
        scheduler.step(output, t, x, **noise)
    found = scheduler.step(outputs[2], scheduler.timesteps[2], x, **noise).prev_sample
    assert found.dtype == dtype
    scheduler.set_begin_index(0)
    for output, t in zip(outputs[:2], scheduler.timesteps, strict=False):
        scheduler.step(output.double(), t, x.double(), **noise)
    exact = scheduler.step(outputs[2].double(), scheduler.timesteps[2], x.double(), **noise).prev_sample
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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver_order": 0}, "solver_order must be 1, 2, 3 or 4, or None, not 0"),
        ({"solver_order": 5}, "not 5"),
        ({"solver_order": 2.0}, "not 2.0"),
        ({"timestep_spacing": "x"}, "unknown timestep_spacing"),
    ],
)
def test_bad_solver_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        MultistepDDIMScheduler(**settings)


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


def test_a_learned_variance_without_noise():
    """The process is the deterministic one unless η = 1 is asked for, in the config or in the call."""
    settings = {"variance_type": "learned_range", "timestep_spacing": "trailing"}
    plain, noisy = (MultistepDDIMScheduler(eta=eta, **settings) for eta in (0.0, 1.0))
    x, *outputs = draws(4)
    outputs = [torch.cat([output, output], dim=1) for output in outputs]
    for scheduler in (plain, noisy):
        scheduler.set_timesteps(4)
    silent = run(plain, outputs, x)
    assert torch.equal(silent, run(plain, outputs, x))
    plain.set_timesteps(4, eta=1.0)
    made = [
        run(each, outputs, x, generator=torch.Generator().manual_seed(0), **step)
        for each, step in ((noisy, {}), (plain, {"eta": 1.0}))
    ]
    assert torch.equal(*made)
    assert not torch.equal(made[0], silent)


@pytest.mark.parametrize("settings", [{}, {"clip_sample": True, "use_clipped_model_output": True}])
def test_the_first_move_is_made_from_the_top(settings):
    """What the network tells of x_T at a lower time is an x̂0: with the exact one the start costs nothing."""
    x0 = torch.rand(2, 3, 4, 4, dtype=torch.float64) - 0.5
    x, _ = draws(1)
    scheduler = MultistepDDIMScheduler(
        prediction_type="sample", fitted_solvers={2: {"timesteps": [700, 300]}}, **settings
    )
    plain = GeneralizedDDIMScheduler(prediction_type="sample", **settings)
    scheduler.set_timesteps(2)
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
    """Where τ is planned for it: a loop that gives η to `step` alone takes the mean as it is."""
    x, *outputs = draws(4)
    results = []
    for planned in (1.0, 0.5, None):
        scheduler = MultistepDDIMScheduler()
        scheduler.set_timesteps(timesteps=[800, 600, 400, 200], eta=planned)
        results.append(run(scheduler, outputs, x, eta=1.0, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(*results[:2])
    assert not torch.allclose(*results[1:])


@pytest.mark.parametrize("planned", [0.0, 0.2])
def test_not_where_times_were_not_planned_for_noise(planned):
    """A stock pipeline tells η to `step` alone; and a little noise is no reason to end far from the data."""
    x, *outputs, z = draws(5)
    usual, scheduler = MultistepDDIMScheduler(), MultistepDDIMScheduler(eta=planned)
    usual.set_timesteps(4)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == usual.timesteps.tolist()
    found = run(scheduler, outputs, x, eta=1.0, variance_noise=z)
    expected = by_hand(x, outputs, (usual.timesteps + 1).tolist(), "epsilon", 2, 1.0, noise=z)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)


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


def test_with_noise_the_first_move_is_made_where_the_network_is_called():
    x, output, z = draws(2)
    steps = []
    for cls in (MultistepDDIMScheduler, GeneralizedDDIMScheduler):
        scheduler = cls()
        scheduler.set_timesteps(timesteps=[700, 300])
        steps.append(scheduler.step(output, 700, x, eta=0.4, variance_noise=z).prev_sample)
    assert torch.equal(*steps)


def test_what_is_held():
    """Three values of ε̂ if nothing is random, four from 8 steps on, and two of x̂0 with noise."""
    x, *outputs = draws(10)
    for S, noise, order, other in ((7, 0.0, 3, 4), (8, 0.0, 4, 3), (10, 0.8, 2, 4)):
        results = []
        for settings in ({}, {"solver_order": order}, {"solver_order": other}):
            scheduler = MultistepDDIMScheduler(**settings)
            scheduler.set_timesteps(S)
            results.append(run(scheduler, outputs[:S], x, eta=noise, generator=torch.Generator().manual_seed(2)))
        assert torch.equal(*results[:2])
        assert not torch.allclose(*results[1:])
    scheduler = MultistepDDIMScheduler()
    scheduler.set_timesteps(10)
    first = MultistepDDIMScheduler(solver_order=1)
    first.set_timesteps(10)
    scheduler.step(outputs[0], scheduler.timesteps[0], x)
    changed = scheduler.step(outputs[1], scheduler.timesteps[1], x, eta=0.5, variance_noise=x)
    assert torch.equal(
        changed.prev_sample, first.step(outputs[1], first.timesteps[1], x, eta=0.5, variance_noise=x).prev_sample
    )
