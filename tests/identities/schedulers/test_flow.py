"""Flow matching, x = (1 − σ)·x_0 + σ·ε: the stock sampler at η = 0, Gaussian data, orders, densities."""

import itertools
import math

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from ddim_plugin import GeneralizedDDIMScheduler, InverseDDIMScheduler, MultistepDDIMScheduler
from ddim_plugin.schedulers import InverseMultistepDDIMScheduler

FLOW = {"prediction_type": "flow_prediction"}
SIGMAS = [1.0, 0.93, 0.8, 0.55, 0.31, 0.1]
GRIDS = {
    "shift 1": ({}, {}),
    "shift 3": ({"shift": 3.0}, {}),
    "dynamic, exponential": ({"use_dynamic_shifting": True}, {"mu": 0.8}),
    "dynamic, linear": ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, {"mu": 1.4}),
    "terminal": ({"use_dynamic_shifting": True, "shift_terminal": 0.02}, {"mu": 0.7}),
    "Karras": ({"shift": 2.0, "use_karras_sigmas": True}, {}),
    "exponential": ({"use_exponential_sigmas": True}, {}),
    "beta": ({"shift": 3.0, "use_beta_sigmas": True}, {}),
    "own sigmas": ({"shift": 3.0}, {"sigmas": SIGMAS}),
    "own sigmas, dynamic": ({"use_dynamic_shifting": True}, {"sigmas": SIGMAS, "mu": 1.1}),
    "other T": ({"num_train_timesteps": 500, "shift": 1.7}, {}),
}


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape or (2, 3, 4, 4), generator=torch.Generator().manual_seed(seed), dtype=dtype)


def velocity(x, t):
    """A smooth function that stands in for a trained network."""
    return torch.tanh(0.7 * x + 0.2) + 0.3 * torch.sin(x.flip(-1) + 0.004 * t)


def trajectory(scheduler, x, network=velocity):
    xs = []
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x, return_dict=False)[0]
        xs.append(x)
    return torch.stack(xs)


def planned(cls, config, S=None, **given):
    scheduler = cls(**config) if type(config) is dict else cls.from_config(config)
    scheduler.set_timesteps(S, **given)
    return scheduler


# ---- the stock samplers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("S", [2, 7, 30])
@pytest.mark.parametrize("grid", GRIDS)
def test_eta_0_is_euler(grid, S):
    settings, given = GRIDS[grid]
    S = len(SIGMAS) if "sigmas" in given else S
    stock = planned(FlowMatchEulerDiscreteScheduler, settings, S, **given)
    ours = planned(GeneralizedDDIMScheduler, stock.config, S, **given)
    assert torch.equal(ours.timesteps, stock.timesteps)
    assert torch.allclose(ours.sigmas, stock.sigmas, rtol=0, atol=1e-7)
    expected, found = (trajectory(each, noise()) for each in (stock, ours))
    assert (found - expected).abs().max() <= 2e-6
    if "sigmas" in given:  # the multistep scheduler has a grid of its own
        first = MultistepDDIMScheduler.from_config(stock.config, solver_order=1)
        first.set_timesteps(S, **given)
        assert torch.equal(first.timesteps, stock.timesteps)
        assert (trajectory(first, noise()) - expected).abs().max() <= 2e-6


def test_a_shift_of_ones_own():
    stock, ours = FlowMatchEulerDiscreteScheduler(shift=3.0), GeneralizedDDIMScheduler(**FLOW, shift=3.0)
    for each in (stock, ours):
        each.set_shift(5.0)
        each.set_timesteps(10)
    assert torch.equal(ours.timesteps, stock.timesteps)
    assert (trajectory(ours, noise()) - trajectory(stock, noise())).abs().max() <= 2e-6


@pytest.mark.parametrize("given", [{"S": 8}, {"sigmas": [1.0, 0.99, 0.96, 0.8, 0.4, 0.1]}], ids=str)
def test_a_network_of_data_minus_noise(given):
    """`invert_sigmas` (Mochi): the network is evaluated at 1000·(1 − σ), and gives x_0 − ε."""
    stock = planned(FlowMatchEulerDiscreteScheduler, {"invert_sigmas": True, "shift": 2.0}, **given)
    ours = planned(GeneralizedDDIMScheduler, stock.config, **given)
    assert torch.allclose(ours.timesteps, stock.timesteps, atol=1e-4)
    expected, found = (trajectory(each, noise(), lambda x, t: -velocity(x, 1000 - t)) for each in (stock, ours))
    assert (found - expected).abs().max() <= 2e-6
    straight = planned(GeneralizedDDIMScheduler, {**FLOW, "shift": 2.0}, **given)
    assert (found - trajectory(straight, noise())).abs().max() <= 2e-5


@pytest.mark.parametrize("flow_shift", [1.0, 3.0])
@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "DPMSolverMultistepScheduler"])
def test_grids_of_other_solvers(name, flow_shift):
    """The plan is that of the class that wrote the config, and the steps are its steps of order 1."""
    first = {"UniPCMultistepScheduler": {"disable_corrector": list(range(9))}}.get(name, {})
    stock = getattr(diffusers, name)(**FLOW, use_flow_sigmas=True, flow_shift=flow_shift, solver_order=1, **first)
    stock.set_timesteps(9)
    ours = planned(GeneralizedDDIMScheduler, stock.config, 9)
    assert ours.timesteps.tolist() == pytest.approx(stock.timesteps.tolist(), rel=1e-6)
    assert torch.allclose(ours.sigmas, stock.sigmas, rtol=0, atol=1e-6)
    expected, found = (trajectory(each, noise()) for each in (stock, ours))
    assert (found - expected).abs().max() <= 2e-5


@pytest.mark.parametrize(
    "name", ["DPMSolverSinglestepScheduler", "DEISMultistepScheduler", "SASolverScheduler", "UniPCMultistepScheduler"]
)
def test_the_plan_is_that_of_the_class_of_the_config(name):
    stock = getattr(diffusers, name)(**FLOW, use_flow_sigmas=True, flow_shift=3.0)
    stock.set_timesteps(8)
    plain = InverseDDIMScheduler.from_config(stock.config, refinement_steps=None)
    for cls, config in ((GeneralizedDDIMScheduler, stock.config), (InverseDDIMScheduler, plain.config)):
        ours = planned(cls, config, 8)
        times = ours.timesteps if cls is GeneralizedDDIMScheduler else ours.timesteps.flip(0)
        assert times.tolist() == pytest.approx(stock.timesteps.tolist())


def test_timesteps_beside_sigmas():
    """CogView 4: the network is evaluated at timesteps without the shift, at levels with it."""
    settings = {"use_dynamic_shifting": True, "time_shift_type": "linear", "base_shift": 0.25, "max_shift": 0.75}
    times = np.linspace(1000, 1, 8)[:-1].astype(np.int64).astype(np.float32)
    given = {"timesteps": times, "sigmas": times / 1000, "mu": 0.6}
    stock = planned(FlowMatchEulerDiscreteScheduler, settings, **given)
    ours = planned(GeneralizedDDIMScheduler, stock.config, **given)
    assert torch.equal(ours.timesteps, stock.timesteps)
    assert torch.equal(ours.sigmas, stock.sigmas)
    assert (ours.sigmas[1:-1] * 1000 - ours.timesteps[1:]).abs().max() > 50
    x, noise_ = noise(), noise(seed=1)
    for t in stock.timesteps[[0, 3]]:
        expected = stock.scale_noise(x, t[None], noise_)
        assert torch.allclose(ours.scale_noise(x, t[None], noise_), expected, atol=1e-6)
    assert (trajectory(ours, x) - trajectory(stock, x)).abs().max() <= 2e-6


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample"])
def test_other_predictions_on_the_flow_path(prediction_type):
    settings = {"prediction_type": prediction_type, "use_flow_sigmas": True, "flow_shift": 2.0}
    stock = diffusers.UniPCMultistepScheduler(**settings, solver_order=1, disable_corrector=list(range(9)))
    stock.set_timesteps(9)
    ours = planned(GeneralizedDDIMScheduler, stock.config, 9)
    expected, found = (trajectory(each, noise()) for each in (stock, ours))
    assert (found - expected).abs().max() <= 2e-4 * expected.abs().max()


@pytest.mark.parametrize("name", ["FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"])
def test_other_flow_matching_schedulers(name):
    stock = getattr(diffusers, name)(shift=3.0)
    ours = planned(GeneralizedDDIMScheduler, stock.config, 12)
    euler = planned(FlowMatchEulerDiscreteScheduler, {"shift": 3.0}, 12)
    assert torch.equal(ours.timesteps, euler.timesteps)
    assert (trajectory(ours, noise()) - trajectory(euler, noise())).abs().max() <= 2e-6


def test_explicit_timesteps_are_levels_without_a_shift():
    ours = GeneralizedDDIMScheduler(**FLOW, shift=3.0)
    ours.set_timesteps(timesteps=[1000.0, 640.5, 12.25])
    assert ours.timesteps.tolist() == [1000, 640.5, 12.25]
    assert ours.sigmas.tolist() == pytest.approx([1, 0.6405, 0.01225, 0])
    x = noise()
    found = ours.step(velocity(x, 640.5), ours.timesteps[1], x).prev_sample
    assert torch.allclose(found, x + (0.01225 - 0.6405) * velocity(x, 640.5), atol=1e-6)


def test_a_step_outside_the_plan_goes_to_the_next_lower_level():
    ours, x = planned(GeneralizedDDIMScheduler, FLOW, 4), noise()
    lower = ours.timesteps[2]
    time = float(lower + 100)
    found = ours.step(velocity(x, time), time, x).prev_sample
    assert torch.allclose(found, x - 0.1 * velocity(x, time), atol=1e-6)


# ---- Gaussian data --------------------------------------------------------------------------------------------------


class Gaussian:
    """Pixels N(mean, variance), the exact velocity E[ε − x_0|x], and the exact solution of its ODE."""

    def __init__(self, mean=0.4, variance=0.09):
        self.mean, self.variance = mean, variance

    def deviation(self, sigma):
        return ((1 - sigma) ** 2 * self.variance + sigma**2) ** 0.5

    def velocity(self, x, sigma):
        share = (x - (1 - sigma) * self.mean) / self.deviation(sigma) ** 2
        return sigma * share - (self.mean + (1 - sigma) * self.variance * share)

    def solution(self, x, sigma, to):
        return (1 - to) * self.mean + (x - (1 - sigma) * self.mean) * self.deviation(to) / self.deviation(sigma)

    def network(self, x, t):
        return self.velocity(x, float(t) / 1000)


DATA = Gaussian()


def law(scheduler, data=DATA):
    """Mean and deviation of x_0, for x_T of unit noise: each step is affine, with noise of a known deviation."""
    mean, variance = 0.0, 1.0
    probe = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    for t in scheduler.timesteps:
        out = scheduler.step(data.network(probe, t), t, probe, variance_noise=torch.zeros_like(probe))
        at, gain = float(out.mean[0]), float(out.mean[1] - out.mean[0])
        mean, variance = at + gain * mean, gain**2 * variance + float(out.std) ** 2
    return mean, variance**0.5


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_mean_and_deviation_tend_to_those_of_the_data(eta, shift):
    """As 1/S, whatever η."""
    off = []
    for S in (50, 200, 800):
        mean, deviation = law(planned(GeneralizedDDIMScheduler, {**FLOW, "eta": eta, "shift": shift}, S))
        off.append(max(abs(mean - DATA.mean), abs(deviation - DATA.variance**0.5)))
    assert off[0] < 0.06
    assert off[2] < 0.006
    assert off[0] / off[2] > 10


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_every_level_on_the_way_has_its_own_law(eta, shift):
    """The marginals are kept: at each σ of the plan the mean is (1 − σ)·mean, the deviation that of data and noise."""
    scheduler = planned(GeneralizedDDIMScheduler, {**FLOW, "eta": eta, "shift": shift}, 400)
    mean, variance = 0.0, 1.0
    probe = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas[1:].tolist(), strict=True):
        out = scheduler.step(DATA.network(probe, t), t, probe, variance_noise=torch.zeros_like(probe))
        at, gain = float(out.mean[0]), float(out.mean[1] - out.mean[0])
        mean, variance = at + gain * mean, gain**2 * variance + float(out.std) ** 2
        assert mean == pytest.approx((1 - sigma) * DATA.mean, abs=0.01)
        assert variance**0.5 == pytest.approx(DATA.deviation(sigma), abs=0.01)


def test_pictures_of_a_random_run_have_the_law_of_the_data():
    torch.manual_seed(0)
    for eta in (0.5, 1.0):
        scheduler = planned(GeneralizedDDIMScheduler, {**FLOW, "eta": eta}, 400)
        x = trajectory(scheduler, noise(40_000, dtype=torch.float64), DATA.network)[-1]
        assert float(x.mean()) == pytest.approx(DATA.mean, abs=0.01)
        assert float(x.std()) == pytest.approx(DATA.variance**0.5, abs=0.01)


@pytest.mark.parametrize("config", [{}, {"shift": 3.0}, {"use_dynamic_shifting": True}], ids=str)
def test_the_multistep_scheduler_is_ten_times_nearer_than_euler(config):
    """At 12 evaluations, each with the grid that it makes by itself."""
    given = {"mu": 0.8} if config.get("use_dynamic_shifting") else {}
    x = torch.linspace(-2.5, 2.5, 101, dtype=torch.float64)[None]
    exact, off = DATA.solution(x, 1.0, 0.0), []
    for cls in (GeneralizedDDIMScheduler, MultistepDDIMScheduler):
        scheduler = planned(cls, {**FLOW, **config}, 12, **given)
        assert len(scheduler.timesteps) == 12
        off.append(float((trajectory(scheduler, x, DATA.network)[-1] - exact).pow(2).mean().sqrt()))
    assert off[0] > 10 * off[1]


def test_the_inverse_scheduler_is_the_sampler_backwards():
    """For one output in both directions, and for the exact velocity with an error that falls as 1/S."""
    classes = GeneralizedDDIMScheduler, InverseDDIMScheduler
    plain = {"refinement_steps": None}
    sampler, inverse = (
        planned(classes[0], {**FLOW, "shift": 3.0}, 20),
        planned(classes[1], {**FLOW, "shift": 3.0, **plain}, 20),
    )
    assert inverse.timesteps.tolist() == sampler.timesteps.tolist()[::-1]
    x = noise(dtype=torch.float64)
    for t in sampler.timesteps:
        out = noise(seed=int(t), dtype=torch.float64)
        below = sampler.step(out, t, x).prev_sample
        assert torch.allclose(inverse.step(out, float(t), below).prev_sample, x, atol=1e-9)
    off = []
    for S in (40, 160):
        sampler, inverse = planned(classes[0], FLOW, S), planned(classes[1], FLOW | plain, S)
        image = trajectory(sampler, x, DATA.network)[-1]
        off.append(float((trajectory(inverse, image, DATA.network)[-1] - x).abs().max()))
    assert off[1] < 0.35 * off[0]


def test_sigmas_that_end_at_the_data_are_inverted():
    """The step from the data to itself has nothing to solve."""
    config = FlowMatchEulerDiscreteScheduler(shift=3.0).config
    network = lambda x, t: 0.3 * torch.tanh(x) + 1e-4 * float(t)  # noqa: E731
    x0 = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    up, down = (
        InverseDDIMScheduler.from_config(config, refinement_steps=6),
        GeneralizedDDIMScheduler.from_config(config),
    )
    x = x0
    for scheduler in (up, down):
        scheduler.set_timesteps(sigmas=[1.0, 0.5, 0.0])
        for t in scheduler.timesteps:
            x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x).prev_sample
    assert torch.allclose(x, x0, atol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_inverse_multistep_scheduler_is_nearer(shift):
    """Decoding with its sampler and encoding again, at 12 evaluations each."""
    x, off = noise(dtype=torch.float64), []
    for cls, inverse in (
        (GeneralizedDDIMScheduler, InverseDDIMScheduler),
        (MultistepDDIMScheduler, InverseMultistepDDIMScheduler),
    ):
        sampler = planned(cls, {**FLOW, "shift": shift}, 12)
        image = trajectory(sampler, x, DATA.network)[-1]
        again = trajectory(planned(inverse, sampler.config, 12), image, DATA.network)[-1]
        off.append(float((again - x).abs().max()))
    assert off[1] < 0.7 * off[0]


# ---- orders ---------------------------------------------------------------------------------------------------------


class Mixture:
    """Two Gaussians: the exact velocity bends."""

    parts = ((0.35, Gaussian(-0.7, 0.2)), (0.65, Gaussian(0.6, 0.3)))

    def velocity(self, x, sigma):
        logs = [
            math.log(weight / g.deviation(sigma)) - 0.5 * ((x - (1 - sigma) * g.mean) / g.deviation(sigma)) ** 2
            for weight, g in self.parts
        ]
        shares = torch.softmax(torch.stack(logs), 0)
        return sum(share * g.velocity(x, sigma) for share, (_, g) in zip(shares, self.parts, strict=True))

    def solution(self, x, sigmas):
        """x at each of these σ, by the classical Runge-Kutta method in small steps."""
        xs = [x]
        for start, end in itertools.pairwise(sigmas):
            n, x = 3, xs[-1]
            h = (end - start) / n
            for i in range(n):
                s = start + i * h
                k1 = self.velocity(x, s)
                k2 = self.velocity(x + h / 2 * k1, s + h / 2)
                k3 = self.velocity(x + h / 2 * k2, s + h / 2)
                k4 = self.velocity(x + h * k3, s + h)
                x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            xs.append(x)
        return xs


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("even", [True, False])
def test_orders_of_the_scheduler(order, even):
    """From σ = .9 to .2, with exact values at the start: the error falls as S^−order."""
    data, errors = Mixture(), []
    for S in (80, 160):
        u = np.linspace(0, 1, S + 1)
        sigmas = 0.9 - 0.7 * (u if even else u + 0.08 * np.sin(9 * u) * (1 - u) * u)
        scheduler = MultistepDDIMScheduler(**FLOW, solver_order=order)
        scheduler.set_timesteps(timesteps=(1000 * sigmas).tolist())
        exact = data.solution(torch.linspace(-1.5, 1.5, 9, dtype=torch.float64)[None], sigmas.tolist())
        x = exact[0]
        for i, t in enumerate(scheduler.timesteps[:-1]):
            x = exact[i] if i < order else x
            x = scheduler.step(data.velocity(x, float(sigmas[i])), t, x).prev_sample
        errors.append(float((x - exact[-1]).abs().max()))
    assert errors[1] < 5e-3
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.4)


# ---- the density of a step ------------------------------------------------------------------------------------------

STOCHASTIC = [
    {**FLOW, "eta": 0.7},
    {**FLOW, "eta": 1.0, "shift": 3.0},
    {"eta": 0.5},
    {"prediction_type": "v_prediction", "variance_type": "fixed_large"},
    {"prediction_type": "score", "sigma_max": 20.0, "eta": 1.0},
]


@pytest.mark.parametrize("config", STOCHASTIC, ids=str)
def test_log_prob_is_that_of_a_normal_distribution(config):
    scheduler, x = planned(GeneralizedDDIMScheduler, config, 10), noise()
    for t in scheduler.timesteps[:-1]:
        output = velocity(x, t).requires_grad_()
        out = scheduler.step(output, t, x, generator=torch.Generator().manual_seed(int(t)))
        sample = out.prev_sample.detach()
        found = out.log_prob(sample)
        expected = torch.distributions.Normal(out.mean.double(), out.std.double()).log_prob(sample.double())
        assert found.shape == (2,)
        assert found.dtype == torch.float32
        assert torch.allclose(found.double(), expected.flatten(1).sum(1), rtol=1e-4, atol=1e-3)
        (gradient,) = torch.autograd.grad(found.sum(), output)
        (other,) = torch.autograd.grad(expected.sum(), output)
        assert gradient.abs().max() > 0
        assert torch.allclose(gradient, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))
        x = sample


def test_log_prob_of_a_learned_variance_and_of_single_timesteps():
    scheduler = planned(GeneralizedDDIMScheduler, {"variance_type": "learned_range"}, 10)
    x, t = noise(), scheduler.timesteps[3]
    output = noise(2, 6, 4, 4, seed=1).requires_grad_()
    out = scheduler.step(output, t, x)
    sample = noise(seed=2)
    expected = torch.distributions.Normal(out.mean, out.std).log_prob(sample).flatten(1).sum(1)
    assert torch.allclose(out.log_prob(sample), expected, rtol=1e-4)
    assert torch.autograd.grad(out.log_prob(sample).sum(), output)[0].flatten(1).abs().min() >= 0
    single = planned(GeneralizedDDIMScheduler, FLOW | {"eta": 0.6}, 10)
    times = single.timesteps[[2, 6]]
    out = single.step(noise(seed=3), times, x)
    each = [single.step(noise(seed=3)[i : i + 1], times[i], x[i : i + 1]).log_prob(sample[i : i + 1]) for i in range(2)]
    assert torch.allclose(out.log_prob(sample), torch.cat(each), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_log_prob_of_half_precision_is_float32(dtype):
    """x_s was rounded once; its density is that of the rounded sample under the unrounded mean."""
    scheduler, x = planned(GeneralizedDDIMScheduler, FLOW | {"eta": 0.7}, 10), noise().to(dtype)
    t = scheduler.timesteps[4]
    output = velocity(x, t)
    out = scheduler.step(output, t, x, generator=torch.Generator().manual_seed(0))
    found = out.log_prob(out.prev_sample)
    wide = scheduler.step(output.float(), t, x.float(), variance_noise=noise(seed=5))
    assert out.prev_sample.dtype == dtype
    assert found.dtype == torch.float32
    assert torch.allclose(found, wide.log_prob(out.prev_sample.float()), rtol=1e-5)


def test_a_step_without_noise_has_no_density():
    scheduler, x = planned(GeneralizedDDIMScheduler, FLOW, 4), noise()
    out = scheduler.step(x, scheduler.timesteps[1], x)
    with pytest.raises(ValueError, match="density|noise|log_prob"):
        out.log_prob(x)
    noisy = planned(GeneralizedDDIMScheduler, FLOW | {"eta": 1.0}, 4)
    with pytest.raises(ValueError, match="density|noise|log_prob"):
        noisy.step(x, noisy.timesteps[-1], x).log_prob(x)


def test_the_ratio_of_two_policies():
    """Over one stored trajectory: 1 for equal networks, and the exact ratio of densities for others."""
    scheduler = planned(GeneralizedDDIMScheduler, FLOW | {"eta": 0.7, "shift": 3.0}, 8)
    x, stored = noise(), []
    for t in scheduler.timesteps[:-1]:
        out = scheduler.step(velocity(x, t), t, x, generator=torch.Generator().manual_seed(int(t)))
        stored.append((t, x, out.prev_sample, out.log_prob(out.prev_sample)))
        x = out.prev_sample
    theta = torch.zeros((), requires_grad=True)
    logs = {"equal": 0.0, "other": 0.0}
    for t, x, following, before in stored:
        equal = scheduler.step(velocity(x, t) + theta, t, x).log_prob(following)
        other = scheduler.step(velocity(x, t) + theta + 0.05, t, x).log_prob(following)
        assert torch.equal(equal, before)
        logs["equal"], logs["other"] = logs["equal"] + equal - before, logs["other"] + other - before
    assert torch.equal(logs["equal"].exp(), torch.ones(2))
    assert (logs["other"].abs() > 0.01).all()
    (gradient,) = torch.autograd.grad(logs["equal"].exp().mean(), theta)
    assert gradient.isfinite()
    assert gradient != 0
