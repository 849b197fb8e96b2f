"""What loops that are not ours do with a scheduler: buffers, turns, patches, transforms, times of every type."""

import copy
import pickle
import threading

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from plans import SHAPE, draws, planned, run, tensors

from ddim_plugin import (
    GeneralizedDDIMScheduler,
    InverseDDIMScheduler,
    InverseMultistepDDIMScheduler,
    MultistepDDIMScheduler,
)

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
CLASSES = [GeneralizedDDIMScheduler, InverseDDIMScheduler, MultistepDDIMScheduler, InverseMultistepDDIMScheduler]


def of_gaussian(scheduler, t, x):
    """The true ε̂ of data N(0, 0.25)."""
    a = float(scheduler.alphas_cumprod[t])
    return (1 - a) ** 0.5 * x / (0.25 * a + 1 - a)


def deviation(scheduler):
    """The standard deviation of samples of N(0, 0.25)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 1, 1, 1, generator=generator, dtype=torch.float64)
    for t in scheduler.timesteps:
        x = scheduler.step(of_gaussian(scheduler, t, x), t, x, generator=generator).prev_sample
    return float(x.std())


# ---- extrapolation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha_to_one", [True, False])
@pytest.mark.parametrize("spacing", ["few_steps", "leading", "linspace", "trailing", "paper_linear"])
def test_noise_near_the_data_is_not_extrapolated(spacing, alpha_to_one):
    scheduler = MultistepDDIMScheduler(**SD, eta=1.0, timestep_spacing=spacing, set_alpha_to_one=alpha_to_one)
    scheduler.set_timesteps(10)
    assert deviation(scheduler) == pytest.approx(0.44, abs=0.025)


@pytest.mark.parametrize("spacing", ["quadratic", "paper_quadratic"])
@pytest.mark.parametrize("S", [5, 7, 10, 20, 50])
def test_noise_on_steps_that_grow_short(spacing, S):
    scheduler = MultistepDDIMScheduler(**SD, eta=1.0, timestep_spacing=spacing)
    scheduler.set_timesteps(S)
    assert 0.4 < deviation(scheduler) < 0.77


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("times", [[999, 998, 20, 19, 18], [999, 700, 400, 399, 2, 1]])
def test_a_long_step_upwards(times, order):
    scheduler = InverseMultistepDDIMScheduler(**SD, solver_order=order)
    scheduler.set_timesteps(timesteps=times)
    x = 0.5 * torch.randn(2000, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t in scheduler.timesteps:
        x = scheduler.step(of_gaussian(scheduler, t, x), t, x).prev_sample
    assert float(x.std()) < 2.1


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("times", [[999, 500, 499, 1], [999, 700, 400, 399, 2, 1], [800, 799, 798, 797, 5]])
def test_a_step_much_longer_than_the_one_before(times, order, eta):
    scheduler = MultistepDDIMScheduler(**SD, eta=eta, solver_order=order)
    scheduler.set_timesteps(timesteps=times)
    assert deviation(scheduler) < 0.6


# ---- timesteps -----------------------------------------------------------------------------------------------------


def same(t):
    """The same timestep in every form that a loop may hold it in."""
    buffer = torch.zeros(4, dtype=torch.int64)[1:2]
    buffer[0] = t
    forms = [int(t), float(t), t.numpy(), t[None].numpy(), np.int32(t), np.float64(t), t.clone(), t[None], t.float()]
    return [*forms, t.double()[None], t.to(torch.int32), torch.Tensor([t]), buffer]


@pytest.mark.parametrize("cls", CLASSES)
def test_a_timestep_is_the_same_in_every_form(cls):
    scheduler = planned(7, cls)
    x, *outputs = draws(7)
    expected = run(scheduler, outputs, x)
    for form in range(len(same(scheduler.timesteps[0]))):
        scheduler.set_timesteps(7)
        found = x
        for t, output in zip(scheduler.timesteps, outputs, strict=True):
            found = scheduler.step(output, same(t)[form], found).prev_sample
        assert torch.equal(found, expected), form


def test_a_static_buffer_within_the_timesteps():
    """A graph that was captured reads its timestep from one place, which the loop fills."""
    scheduler = planned(10)
    out, x = tensors()
    times, buffer = scheduler.timesteps.tolist(), scheduler.timesteps[:1]
    for t in times:
        buffer.fill_(t)
        expected = planned(10).step(out, t, x).prev_sample
        assert torch.equal(scheduler.step(out, buffer, x).prev_sample, expected)


def test_timesteps_that_are_edited_in_place():
    scheduler = planned(10)
    out, x = tensors()
    scheduler.timesteps[3] = 655
    expected = planned(10).step(out, 655, x).prev_sample
    assert torch.equal(scheduler.step(out, scheduler.timesteps[3], x).prev_sample, expected)
    with torch.inference_mode():
        scheduler.timesteps[4] = 199
        expected = planned(10).step(out, 199, x).prev_sample
        assert torch.equal(scheduler.step(out, scheduler.timesteps[4], x).prev_sample, expected)


def test_a_loop_on_a_device_follows_the_index():
    """All tensors on the meta device share one address, and none has a value."""
    on_meta = MultistepDDIMScheduler(timestep_spacing="linear")
    on_meta.set_timesteps(5, device="meta")
    x = torch.empty(SHAPE, device="meta")
    for given in (list(on_meta.timesteps), [t.clone() for t in on_meta.timesteps]):
        places = []
        for t in given:
            on_meta.step(x, t, x)
            places.append(on_meta._place)
        assert places == [0, 1, 2, 3, 4]


def test_a_loop_may_begin_at_a_repeated_timestep():
    """The first two steps upwards are both evaluated at τ_1."""
    scheduler = planned(5, InverseMultistepDDIMScheduler)
    x, *outputs = draws(5)
    assert scheduler.timesteps[0] == scheduler.timesteps[1]
    results = []
    for form in (lambda t: t, int, torch.clone):
        scheduler.set_begin_index(1)
        results.append(scheduler.step(outputs[0], form(scheduler.timesteps[1]), x).prev_sample)
    scheduler.set_begin_index(0)
    first = scheduler.step(outputs[0], int(scheduler.timesteps[0]), x).prev_sample
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], first)


@pytest.mark.parametrize("config", [{}, {"eta": 0.5}, {"clip_sample": True}])
def test_a_time_for_each_frame(config):
    """(B, T) times, one for each frame of (B, T, D)."""
    scheduler = planned(10, **config)
    out, x, z = tensors(3, shape=(2, 3, 4), dtype=torch.float64)
    times = torch.tensor([[999, 599, 12], [0, 500, 899]])
    noise = {"variance_noise": z} if config.get("eta") else {}
    together = scheduler.step(out, times, x, **noise).prev_sample
    for b in range(2):
        for frame in range(3):
            part = (slice(b, b + 1), slice(frame, frame + 1))
            noise = {"variance_noise": z[part]} if config.get("eta") else {}
            alone = scheduler.step(out[part], int(times[b, frame]), x[part], **noise).prev_sample
            assert torch.allclose(together[part], alone, atol=1e-12)
    noisy = scheduler.add_noise(x, z, times)
    assert torch.allclose(noisy[1, 2], scheduler.add_noise(x[1:, 2], z[1:, 2], 899)[0])


@pytest.mark.parametrize("shapes", [((1,), (5,), (5,)), ((1,), (1,), (5,)), ((1,), (5,), (1,)), ((5,), (1,), (1,))])
@pytest.mark.parametrize("name", ["add_noise", "get_velocity"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_one_image_at_several_times_or_with_several_noises(shapes, name, dtype):
    x, noise = (torch.randn(*shape, 2, 4, 4, generator=torch.Generator().manual_seed(0)) for shape in shapes[:2])
    times = torch.arange(100, 100 + 7 * shapes[2][0], 7)
    scheduler = GeneralizedDDIMScheduler()
    found = getattr(scheduler, name)(x.to(dtype), noise.to(dtype), times)
    stock = getattr(DDIMScheduler(), name)(x.expand(5, -1, -1, -1), noise.expand(5, -1, -1, -1), times.expand(5))
    assert found.shape == (5, 2, 4, 4)
    assert found.dtype == dtype
    assert torch.allclose(found.float(), stock, atol=1e-6 if dtype == torch.float32 else 2e-2)


# ---- randomness ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(("rows", "count"), [(8, 1), (8, 2), (1, 4), (2, 3)])
def test_generators_are_not_checked_where_nothing_is_drawn(cls, rows, count):
    """Pipelines pass those of the prompts with the batch of the frames."""
    scheduler = planned(5, cls)
    x = torch.randn(rows, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    generators = [torch.Generator() for _ in range(count)]
    expected = planned(5, cls).step(x, scheduler.timesteps[0], x).prev_sample
    found = scheduler.step(x, scheduler.timesteps[0], x, eta=0.0, generator=generators).prev_sample
    assert torch.equal(found, expected)


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("cls", [GeneralizedDDIMScheduler, MultistepDDIMScheduler])
def test_a_list_of_one_generator_serves_any_batch(cls, eta):
    x = torch.randn(8, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    made = []
    for generator in (torch.Generator().manual_seed(1), [torch.Generator().manual_seed(1)]):
        scheduler = planned(5, cls, eta=eta)
        made.append(scheduler.step(x, scheduler.timesteps[0], x, generator=generator).prev_sample)
    assert torch.equal(*made)


@pytest.mark.parametrize(
    "config",
    [
        {"eta": 1.0},
        {"eta": 0.3},
        {"variance_type": "fixed_large"},
        {"variance_type": "optimal", "eps_mean_square": [0.6] * 1000},
        {"variance_type": "learned_range"},
    ],
)
def test_a_zero_through_step_is_not_said(config):
    """Stock pipelines pass eta=0.0 whether or not the user did. Another number wins, and so does the plan's."""
    scheduler = planned(10, **config)
    out, x, z = tensors(3, dtype=torch.float64)
    out = torch.cat([out, out], dim=1) if "learned" in str(config) else out
    own = scheduler.step(out, 599, x, variance_noise=z)
    assert own.std.max() > 0
    for zero in (0.0, 0, None):
        assert torch.equal(scheduler.step(out, 599, x, eta=zero, variance_noise=z).prev_sample, own.prev_sample)
    silent = planned(10, **config)
    silent.set_timesteps(10, eta=0.0)
    assert silent.step(out, 599, x, eta=0.0).std.max() == planned(10).step(x, 599, x).std + (
        own.std.min() * 0 if "optimal" not in str(config) else silent.step(out, 599, x).std
    )
    if "eta" in config:
        assert scheduler.step(out, 599, x, eta=0.7, variance_noise=z).std > own.std * (0.7 / config["eta"]) * 0.999


# ---- values that are kept or read later ----------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("cls", [MultistepDDIMScheduler, InverseMultistepDDIMScheduler])
def test_a_network_that_writes_into_one_buffer(cls, prediction_type):
    x, *outputs = draws(6)
    expected = run(planned(6, cls, prediction_type=prediction_type), outputs, x)
    scheduler, buffer, sample = planned(6, cls, prediction_type=prediction_type), torch.empty_like(x), x.clone()
    for t, output in zip(scheduler.timesteps, outputs, strict=True):
        buffer.copy_(output)
        sample.copy_(scheduler.step(buffer, t, sample, return_dict=False)[0])
        buffer.fill_(torch.nan)
    assert torch.equal(sample, expected)


@pytest.mark.parametrize("name", ["pred_original_sample", "pred_epsilon", "mean"])
@pytest.mark.parametrize("changed", ["sample", "model_output"])
@pytest.mark.parametrize("cls", CLASSES)
def test_a_tensor_that_was_changed_since_is_noticed(cls, changed, name):
    scheduler = planned(5, cls)
    out, x = tensors()
    first, later = (planned(5, cls).step(out, scheduler.timesteps[0], x) for _ in range(2))
    pair = planned(5, cls).step(out, scheduler.timesteps[0], x, return_dict=False)
    value = getattr(first, name).clone()
    (x if changed == "sample" else out).copy_(first.prev_sample)
    assert torch.equal(getattr(first, name), value)  # it was read before
    for read in (lambda: getattr(later, name), lambda: pair[1]):
        with pytest.raises(RuntimeError, match="read it before, or pass clones to step"):
            read()


def test_in_inference_mode_changes_are_not_counted_and_values_are_right():
    with torch.inference_mode():
        scheduler = planned(5)
        out, x = tensors()
        expected = planned(5).step(out.clone(), 599, x.clone()).pred_original_sample.clone()
        result = scheduler.step(out, 599, x)
        pair = scheduler.step(out, 599, x, return_dict=False)
        x.copy_(result.prev_sample)
        out.fill_(0)
        assert torch.equal(result.pred_original_sample, expected)
        assert torch.equal(pair[1], expected)


# ---- one scheduler in several loops --------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.8])
def test_loops_that_take_turns(eta):
    """Tiles: the values of one loop would enter the other's picture."""
    scheduler = planned(5, MultistepDDIMScheduler, eta=eta)
    x, *outputs = draws(5)
    scheduler.step(outputs[0], scheduler.timesteps[0], x, variance_noise=x)
    with pytest.raises(ValueError, match=r"a second step at timestep \d+: .*one scheduler for each loop"):
        scheduler.step(outputs[1], scheduler.timesteps[0], x, variance_noise=x)
    scheduler.set_timesteps(5)
    for t in scheduler.timesteps[:3]:
        scheduler.step(outputs[0], t, x, variance_noise=x)
    with pytest.raises(ValueError, match="a second step"):  # the other loop begins later
        scheduler.step(outputs[0], int(scheduler.timesteps[0]), x, variance_noise=x)


def test_a_step_that_failed_may_be_made_again():
    scheduler, x = planned(4, MultistepDDIMScheduler, eta=1.0), torch.randn(3, 1, 2, 2)
    for bad in ({"generator": [torch.Generator()] * 2}, {"variance_noise": x[:1]}):
        with pytest.raises(ValueError, match="generators for a batch|variance_noise has shape"):
            scheduler.step(x, scheduler.timesteps[0], x, **bad)
    assert scheduler.step(x, scheduler.timesteps[0], x).prev_sample.isfinite().all()


def test_threads_that_share_a_scheduler_are_told():
    scheduler = planned(4, MultistepDDIMScheduler)
    x, *outputs = draws(4)
    turns, errors = [threading.Semaphore(1), threading.Semaphore(0)], []

    def loop(number):
        for t in scheduler.timesteps:
            turns[number].acquire()
            try:
                scheduler.step(outputs[number], t, x)
            except ValueError as error:
                errors.append(str(error))
            turns[1 - number].release()

    threads = [threading.Thread(target=loop, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors
    assert "a second step" in errors[0]


@pytest.mark.parametrize(
    ("cls", "config"), [(GeneralizedDDIMScheduler, {}), (InverseDDIMScheduler, {"refinement_steps": None})]
)
def test_one_call_schedulers_serve_loops_that_take_turns(cls, config):
    shared, x, *outputs = planned(4, cls, **config), *draws(4)
    first, second = x, -x
    for t, output in zip(shared.timesteps, outputs, strict=True):
        first, second = (shared.step(output, t, each).prev_sample for each in (first, second))
    assert torch.equal(first, run(planned(4, cls, **config), outputs, x))
    assert torch.equal(second, run(planned(4, cls, **config), outputs, -x))


def test_a_new_loop_after_a_whole_one_or_a_new_plan():
    scheduler = planned(5, MultistepDDIMScheduler)
    x, *outputs = draws(5)
    expected = run(scheduler, outputs, x)
    assert torch.equal(run(scheduler, outputs, x), expected)
    scheduler.step(outputs[0], scheduler.timesteps[0], x)  # a loop that is given up
    scheduler.set_begin_index(0)
    assert torch.equal(run(scheduler, outputs, x), expected)


# ---- where a loop begins -------------------------------------------------------------------------------------------


def from_a_picture(scheduler, places=None, **plan):
    """The error of a loop from the middle, on points whose true trajectory is known."""
    scheduler.set_timesteps(**plan)
    times = scheduler.timesteps if places is None else scheduler.timesteps[places]
    x0 = 0.5 * torch.randn(500, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = scheduler.add_noise(x0, z, times[:1])
    a = float(scheduler.alphas_cumprod[times[0]])
    truth = x * (0.25 / (0.25 * a + 1 - a)) ** 0.5
    for t in times:
        x = scheduler.step(of_gaussian(scheduler, t, x), t, x).prev_sample
    return float((x - truth).square().mean().sqrt())


@pytest.mark.parametrize(
    ("places", "plan"),
    [
        (None, {"timesteps": [600, 500, 400, 300, 200, 150, 100, 60, 30, 10]}),
        (None, {"num_inference_steps": 12}),  # img2img at full strength
        (slice(5, None), {"num_inference_steps": 20}),
    ],
)
def test_a_loop_that_begins_with_a_picture(places, plan):
    error = from_a_picture(MultistepDDIMScheduler(**SD), places, **plan)
    assert error < 0.01


def test_a_plan_that_fails_changes_nothing():
    scheduler = planned(10, MultistepDDIMScheduler)
    before = {key: value for key, value in scheduler.__dict__.items() if key != "_internal_dict"}
    for bad in ({"num_inference_steps": 0, "eta": 1.0}, {"timesteps": [3, 5]}, {"num_inference_steps": 5, "eta": 9.0}):
        with pytest.raises(ValueError, match=r"must|order|too large"):
            scheduler.set_timesteps(**bad)
        assert all(scheduler.__dict__[key] is value for key, value in before.items())


# ---- patches -------------------------------------------------------------------------------------------------------


def zero_snr(alphas_cumprod):
    """What trainers write into schedulers: ᾱ_T = 0."""
    root = alphas_cumprod.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


@pytest.mark.parametrize("how", ["alphas_cumprod", "betas", "alphas", "in place", "all three"])
@pytest.mark.parametrize("cls", [GeneralizedDDIMScheduler, MultistepDDIMScheduler])
def test_tables_that_are_replaced_take_effect(cls, how):
    scheduler = planned(10, cls, prediction_type="v_prediction", timestep_spacing="trailing")
    alphas_cumprod = zero_snr(DDIMScheduler().alphas_cumprod.double())
    alphas = torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
    if how in ("betas", "all three"):
        scheduler.betas = 1 - alphas
    if how in ("alphas", "all three"):
        scheduler.alphas = alphas
    if how in ("alphas_cumprod", "all three"):
        scheduler.alphas_cumprod = alphas_cumprod
    if how == "in place":
        scheduler.alphas_cumprod.copy_(alphas_cumprod)
    out, x = tensors(dtype=torch.float64)
    assert scheduler.add_noise(torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), 999).item() == 0
    exact = planned(10, cls, prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True)
    for t in exact.timesteps[:3]:
        found = scheduler.step(out, t, x).prev_sample
        assert torch.allclose(found, exact.step(out, t, x).prev_sample, atol=1e-4)
    again = cls.from_config(scheduler.config)  # it is saved, and serves the inverse
    assert torch.allclose(again.alphas_cumprod, alphas_cumprod.float(), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_tables_that_are_moved_stay_exact(dtype):
    scheduler = GeneralizedDDIMScheduler()
    before = scheduler.alpha_bar
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to("cpu", dtype, copy=True)
    assert np.array_equal(scheduler.alpha_bar, before)
    assert scheduler.config.trained_betas is None


def test_a_table_that_is_none_is_refused():
    scheduler = planned(5)
    before = scheduler.alpha_bar
    for name, value in (("betas", torch.full((1000,), 2.0)), ("alphas_cumprod", torch.ones(10)), ("betas", [0.1])):
        with pytest.raises(ValueError, match=r"β must lie in|trained_betas has"):
            setattr(scheduler, name, value)
    with pytest.raises(AttributeError):  # it follows set_alpha_to_one
        scheduler.final_alpha_cumprod = 0.5
    assert np.array_equal(scheduler.alpha_bar, before)


@pytest.mark.parametrize(
    "change",
    [
        {"prediction_type": "v_prediction"},
        {"beta_end": 0.03},
        {"beta_schedule": "sigmoid"},
        {"rescale_betas_zero_snr": True, "prediction_type": "sample"},
        {"set_alpha_to_one": False},
        {"trained_betas": [0.01] * 1000},
    ],
)
@pytest.mark.parametrize("start", [{}, {"beta_schedule": "laplace"}])
def test_settings_that_are_registered_later_take_effect(change, start):
    if "trained_betas" not in change and "beta_schedule" not in change:
        start = {}
    scheduler = planned(7, MultistepDDIMScheduler, timestep_spacing="trailing", **start)
    scheduler.register_to_config(**change)
    fresh = planned(7, MultistepDDIMScheduler, timestep_spacing="trailing", **start | change)
    x, *outputs = draws(7)
    assert torch.equal(run(scheduler, outputs, x), run(fresh, outputs, x))
    with pytest.raises(ValueError, match="unknown prediction_type"):
        scheduler.register_to_config(prediction_type="noise")
    assert scheduler.config.prediction_type == fresh.config.prediction_type


def test_a_solver_that_is_registered_later():
    scheduler = planned(7, MultistepDDIMScheduler)
    scheduler.register_to_config(solver_order=1)
    x, *outputs = draws(7)
    expected = run(planned(7, MultistepDDIMScheduler, solver_order=1), outputs, x)
    assert torch.equal(run(scheduler, outputs, x), expected)  # also on the plan that was made before
    scheduler.set_timesteps(7)
    assert torch.equal(run(scheduler, outputs, x), expected)


def test_a_new_plan_keeps_the_tables_of_the_marginals():
    scheduler, x = planned(7, MultistepDDIMScheduler), torch.ones(1, 1, 2, 2)
    noisy = scheduler.add_noise(x, x, 500)
    kept = dict(scheduler._tables)
    scheduler.set_timesteps(5)
    scheduler.add_noise(x, x, int(scheduler.timesteps[0]))
    assert kept
    assert all(scheduler._tables[key] is table for key, table in kept.items())
    scheduler.register_to_config(beta_end=0.03)
    assert not torch.equal(scheduler.add_noise(x, x, 500), noisy)


# ---- transforms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES)
def test_gradients_of_functions(cls):
    x = tensors()[0].double()

    def by_function(sample):
        scheduler = planned(3, cls)
        for t in scheduler.timesteps:
            sample = scheduler.step(torch.tanh(sample), t, sample, return_dict=False)[0]
        return sample.square().sum()

    found = torch.func.grad(by_function)(x)
    x.requires_grad_()
    by_function(x).backward()
    assert torch.allclose(found, x.grad)


def test_a_map_over_a_batch_of_samples():
    scheduler = planned(5)
    out, x = tensors()
    t = scheduler.timesteps[1]
    expected = scheduler.step(out, t, x, return_dict=False)
    found = torch.vmap(lambda o, s: scheduler.step(o[None], t, s[None], return_dict=False))(out, x)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one[:, 0], other)


@pytest.mark.parametrize("cls", CLASSES)
def test_copies_in_inference_mode(cls):
    """As the panorama pipeline copies the state of its scheduler."""
    scheduler = planned(5, cls)
    out, x = tensors()
    expected = planned(5, cls).step(out, scheduler.timesteps[0], x).prev_sample
    with torch.inference_mode():
        for other in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
            assert torch.equal(other.step(out, other.timesteps[0], x).prev_sample, expected)
            assert other.add_noise(x, out, 5).isfinite().all()
        learned = planned(5, variance_type="learned_range")
        output = torch.cat([out, out], dim=1)
        result = learned.step(output, 599, x, variance_noise=x)
        std = learned.step(output.clone(), 599, x.clone(), variance_noise=x).std
        output.fill_(0)
        assert torch.equal(result.std, std)


@pytest.mark.parametrize(("by_number", "plain"), [(False, False), (True, True)])
@pytest.mark.parametrize("cls", [MultistepDDIMScheduler, InverseDDIMScheduler])
def test_a_compiled_step(cls, plain, by_number):
    torch._dynamo.reset()
    scheduler, known = planned(4, cls), planned(4, cls)
    compiled = torch.compile(scheduler.step, backend="eager")
    out, x = tensors()
    for t in known.timesteps[:3]:
        expected = known.step(out, t, x)
        result = compiled(out, int(t) if by_number else t, x, return_dict=plain)
        assert torch.allclose(result[0], expected.prev_sample, atol=1e-6)
        assert torch.allclose(result[1], expected.pred_original_sample, atol=1e-6)


@pytest.mark.parametrize("default", [torch.float64, torch.float32])
def test_another_default_device_or_type(default):
    """A step on the CPU does not depend on where tensors are made by default."""
    out, x = tensors()
    expected = planned(5, clip_sample=True).step(out, 599, x).prev_sample
    torch.set_default_dtype(default)
    try:
        with torch.device("meta"):
            scheduler = GeneralizedDDIMScheduler(clip_sample=True)
            scheduler.set_timesteps(5, device="cpu")
            assert torch.equal(scheduler.step(out, 599, x).prev_sample, expected)
            each = torch.tensor([599, 599, 599], device="cpu")
            assert torch.allclose(scheduler.step(out, each, x).prev_sample, expected, atol=1e-6)
            assert torch.isfinite(scheduler.add_noise(x, out, each)).all()
    finally:
        torch.set_default_dtype(torch.float32)
