"""Variance exploding, x = x_0 + σ·ε: the paper's process after scaling, Score-SDE's samplers, and the random walk."""

import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import ScoreSdeVeScheduler

from ddim_plugin import GeneralizedDDIMScheduler, InverseDDIMScheduler, MultistepDDIMScheduler

T = 100
VE = {"num_train_timesteps": T, "sigma_min": 0.02, "sigma_max": 20.0}
SCORE = {**VE, "prediction_type": "score"}


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape or (2, 3, 4, 4), generator=torch.Generator().manual_seed(seed), dtype=dtype)


def planned(cls, config, S=None, **given):
    scheduler = cls(**config)
    scheduler.set_timesteps(S, **given)
    return scheduler


def run(scheduler, x, network, **step):
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x, **step).prev_sample
    return x


class Gaussian:
    """Pixels N(mean, variance), their exact ε = −σ·∇ln p, and the exact solution of the probability-flow ODE."""

    def __init__(self, mean=0.5, variance=0.0625):
        self.mean, self.variance = mean, variance

    def deviation(self, sigma):
        return (self.variance + sigma**2) ** 0.5

    def score(self, x, sigma):
        return -(x - self.mean) / self.deviation(float(sigma)) ** 2

    def eps(self, x, sigma):
        return -float(sigma) * self.score(x, sigma)

    def solution(self, x, sigma, to=0.0):
        return self.mean + (x - self.mean) * self.deviation(to) / self.deviation(sigma)


DATA = Gaussian()


# ---- the paper's process, scaled ------------------------------------------------------------------------------------


def paper(sigmas, **settings):
    """The paper's scheduler with ᾱ = 1/(1 + σ²)."""
    alpha_bar = 1 / (1 + np.append(0.0, sigmas) ** 2)
    betas = (1 - alpha_bar[1:] / alpha_bar[:-1]).tolist()
    return GeneralizedDDIMScheduler(len(betas), trained_betas=betas, **settings), alpha_bar


@pytest.mark.parametrize("spacing", ["linear", "quadratic", "trailing"])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_trajectories_are_those_of_the_paper_times_a_number(spacing, eta):
    """Proposition 1: x/√ᾱ of the paper's process is x of this one, for the same ε̂ and noise."""
    exploding = planned(GeneralizedDDIMScheduler, {**VE, "eta": eta, "timestep_spacing": spacing}, 17)
    preserving, alpha_bar = paper(exploding.path.levels.noise[1:], eta=eta, timestep_spacing=spacing)
    preserving.set_timesteps(17)
    times = [int(t) + 1 for t in preserving.timesteps]
    assert exploding.timesteps.tolist() == pytest.approx([exploding.path.level(t).noise for t in times], rel=1e-6)
    x = noise()
    y = x / alpha_bar[times[0]] ** 0.5
    for i, (t, s) in enumerate(itertools.pairwise([*times, 0])):
        eps, z = torch.tanh(0.8 * x + 0.01 * t), noise(seed=i + 1)
        x = preserving.step(eps, t - 1, x, variance_noise=z).prev_sample
        y = exploding.step(eps, exploding.timesteps[i], y, variance_noise=z).prev_sample
        assert torch.allclose(y * alpha_bar[s] ** 0.5, x, rtol=1e-9, atol=1e-9)


def test_multistep_trajectories_are_those_of_the_paper_too():
    exploding = planned(MultistepDDIMScheduler, {**VE, "timestep_spacing": "linear"}, 12)
    _, alpha_bar = paper(exploding.path.levels.noise[1:])
    betas = (1 - alpha_bar[1:] / alpha_bar[:-1]).tolist()
    settings = {"trained_betas": betas, "timestep_spacing": "linear"}
    preserving = planned(MultistepDDIMScheduler, {"num_train_timesteps": T, **settings}, 12)
    x = noise()
    y = x / alpha_bar[-1] ** 0.5
    for t, sigma in zip(preserving.timesteps, exploding.timesteps, strict=True):
        eps = torch.tanh(0.8 * x + 0.01 * t)
        x = preserving.step(eps, t, x).prev_sample
        y = exploding.step(eps, sigma, y).prev_sample
    assert torch.allclose(x, y, atol=1e-9)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction", "score"])
def test_all_predictions_make_the_same_trajectory(prediction_type):
    found = []
    for kind in ("epsilon", prediction_type):
        scheduler = planned(GeneralizedDDIMScheduler, {**VE, "prediction_type": kind, "eta": 0.5}, 10)
        x = 20 * noise()
        for i, t in enumerate(scheduler.timesteps):
            sigma = scheduler.path.level(T - 10 * i).noise
            eps = DATA.eps(x, sigma)
            x0 = x - sigma * eps
            output = {"epsilon": eps, "sample": x0, "v_prediction": eps - sigma * x0, "score": -eps / sigma}[kind]
            x = scheduler.step(output, t, x, variance_noise=noise(seed=i)).prev_sample
        found.append(x)
    assert torch.allclose(*found, atol=1e-9)


def test_levels_and_timesteps():
    """The network is evaluated at σ, geometric from σ_max, and x_T is σ_max times noise."""
    scheduler = planned(GeneralizedDDIMScheduler, SCORE, 10)
    assert scheduler.init_noise_sigma == 20
    assert scheduler.timesteps.dtype == torch.float32
    assert float(scheduler.timesteps[0]) == pytest.approx(20)
    ratios = scheduler.timesteps[1:] / scheduler.timesteps[:-1]
    assert ratios.tolist() == pytest.approx([float(ratios[0])] * 9, rel=1e-5)
    assert scheduler.alpha_bar[1:] == pytest.approx(1 / (1 + scheduler.path.levels.noise[1:] ** 2))
    x0, eps = noise(), noise(seed=1)
    for t in scheduler.timesteps[[0, 4, 9]]:
        assert torch.allclose(scheduler.add_noise(x0, eps, t), x0 + float(t) * eps, rtol=1e-6)
    per_sample = scheduler.add_noise(x0, eps, scheduler.timesteps[[2, 7]])
    assert torch.allclose(per_sample[1], x0[1] + float(scheduler.timesteps[7]) * eps[1], rtol=1e-6)


# ---- Gaussian data --------------------------------------------------------------------------------------------------


def law(scheduler, network):
    """Mean and deviation of x_0, for x_T = σ_max·noise: each step is affine, with noise of a known deviation."""
    mean, variance = 0.0, scheduler.init_noise_sigma**2
    probe = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    for t in scheduler.timesteps:
        out = scheduler.step(network(probe, t), t, probe, variance_noise=torch.zeros_like(probe))
        at, gain = float(out.mean[0]), float(out.mean[1] - out.mean[0])
        mean, variance = at + gain * mean, gain**2 * variance + float(out.std) ** 2
    return mean, variance**0.5


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_mean_and_deviation_tend_to_those_of_the_data(eta, variance_type):
    eta = 1.0 if variance_type == "fixed_large" else eta
    off = []
    for S in (25, 100, 400):
        config = {**SCORE, "num_train_timesteps": 400, "sigma_min": 0.005, "variance_type": variance_type, "eta": eta}
        mean, deviation = law(planned(GeneralizedDDIMScheduler, config, S), DATA.score)
        off.append(abs(deviation - DATA.variance**0.5))
        assert abs(mean - DATA.mean) < 0.02  # σ_max·noise has not the mean of x_T, which matters by its share
    assert off[2] < 0.01
    assert off[0] / off[2] > 8


def test_few_steps_of_the_multistep_scheduler():
    """At 12 evaluations nearer to the exact solution than DDIM."""
    x = 20 * torch.linspace(-2.5, 2.5, 101, dtype=torch.float64)[None]
    exact, off = DATA.solution(x, 20.0), []
    for cls in (GeneralizedDDIMScheduler, MultistepDDIMScheduler):
        scheduler = planned(cls, {**SCORE, "num_train_timesteps": 1000}, 12)
        assert len(scheduler.timesteps) == 12
        off.append(float((run(scheduler, x, DATA.score) - exact).pow(2).mean().sqrt()))
    assert off[0] > 4 * off[1]


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_orders_of_the_scheduler(order):
    """From σ = 4 to .4 on a mixture, with exact values at the start: the error falls as S^−order."""
    parts = ((0.35, Gaussian(-0.7, 0.3)), (0.65, Gaussian(0.6, 0.4)))

    def eps(x, sigma):
        logs = [math.log(w / g.deviation(sigma)) - 0.5 * ((x - g.mean) / g.deviation(sigma)) ** 2 for w, g in parts]
        shares = torch.softmax(torch.stack(logs), 0)
        return sum(share * g.eps(x, sigma) for share, (_, g) in zip(shares, parts, strict=True))

    errors = []
    for S in (80, 160):
        sigmas, h = np.geomspace(4, 0.4, S + 1), math.log(0.1) / S
        exact = [torch.linspace(-6, 6, 9, dtype=torch.float64)[None]]
        for log in np.log(sigmas[:-1]):  # dx = σ·ε̂ d ln σ, by the classical Runge-Kutta method in small steps
            x = exact[-1]
            for i in range(8):
                at = [math.exp(log + h * (i + part) / 8) for part in (0, 0.5, 1)]
                k1 = at[0] * eps(x, at[0])
                k2 = at[1] * eps(x + h / 16 * k1, at[1])
                k3 = at[1] * eps(x + h / 16 * k2, at[1])
                k4 = at[2] * eps(x + h / 8 * k3, at[2])
                x = x + h / 48 * (k1 + 2 * k2 + 2 * k3 + k4)
            exact.append(x)
        scheduler = MultistepDDIMScheduler(**VE, solver_order=order)
        scheduler.set_timesteps(timesteps=sigmas.tolist())
        for i, t in enumerate(scheduler.timesteps[:-1]):
            x = exact[i] if i < order else x
            x = scheduler.step(eps(x, float(sigmas[i])), t, x).prev_sample
        errors.append(float((x - exact[-1]).abs().max()))
    assert errors[1] < 1e-2
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.4)


def test_the_inverse_scheduler_is_the_sampler_backwards():
    sampler = planned(GeneralizedDDIMScheduler, SCORE, 20)
    inverse = planned(InverseDDIMScheduler, {**SCORE, "refinement_steps": None}, 20)
    assert inverse.timesteps.tolist() == sampler.timesteps.tolist()[::-1]
    x = 20 * noise()
    for i, t in enumerate(sampler.timesteps):
        out = noise(seed=i)
        below = sampler.step(out, t, x).prev_sample
        assert torch.allclose(inverse.step(out, float(t), below).prev_sample, x, atol=1e-8)


# ---- the samplers of Score-SDE --------------------------------------------------------------------------------------


def generator():
    return torch.Generator().manual_seed(4)


def test_large_noise_is_the_predictor_of_the_stock_scheduler():
    """Their "reverse diffusion" step, on the full chain. Their last step adds noise to the image, and ours none."""
    stock = ScoreSdeVeScheduler(num_train_timesteps=20, sigma_min=0.02, sigma_max=20.0)
    config = {**SCORE, "num_train_timesteps": 20, "variance_type": "fixed_large"}
    ours, x = planned(GeneralizedDDIMScheduler, config, 20), 20 * noise(dtype=torch.float32)
    for i, (t, sigma) in enumerate(zip(stock.timesteps, ours.timesteps, strict=True)):
        score = DATA.score(x, sigma)
        expected = stock.step_pred(score, t, x, generator=generator())
        found = ours.step(score, sigma, x, generator=generator())
        tolerance = 1e-5 * float(sigma) + 1e-5
        assert torch.allclose(found.mean, expected.prev_sample_mean, rtol=1e-4, atol=tolerance)
        if i < 19:
            assert torch.allclose(found.prev_sample, expected.prev_sample, rtol=1e-4, atol=tolerance)
        else:
            assert torch.equal(found.prev_sample, found.mean)
        x = found.prev_sample


def test_eta_1_is_their_ancestral_sampler():
    """Song et al. 2021, Eq. 47: x + (σ_t² − σ_s²)·∇ln p + σ_s/σ_t·√(σ_t² − σ_s²)·z."""
    ours, x = planned(GeneralizedDDIMScheduler, {**SCORE, "eta": 1.0}, 10), 20 * noise()
    sigmas = [ours.path.level(t).noise for t in range(T, -1, -10)]
    for t, (sigma, lower) in zip(ours.timesteps, itertools.pairwise(sigmas), strict=True):
        score, z, beta = DATA.score(x, sigma), noise(seed=int(10 * t)), sigma**2 - lower**2
        expected = x + beta * score + lower / sigma * beta**0.5 * z
        x = ours.step(score, t, x, variance_noise=z).prev_sample
        assert torch.allclose(x, expected, rtol=1e-9, atol=1e-9)


def test_the_corrector_is_that_of_the_stock_scheduler():
    """A Langevin step with h = 2·(r·‖z‖/‖∇ln p‖)². Ours has √d for ‖z‖, and a norm of the score for each sample."""
    stock = ScoreSdeVeScheduler(num_train_timesteps=T, sigma_min=0.02, sigma_max=20.0, snr=0.15)
    ours = planned(GeneralizedDDIMScheduler, {**SCORE, "corrector_steps": 1, "corrector_snr": 0.15}, 10)
    assert ours.timesteps.tolist() == [t for t in ours.timesteps[::2].tolist() for _ in range(2)]
    x = 20 * noise(1, 3, 32, 32, dtype=torch.float32)
    for t in ours.timesteps[::2]:
        score, z = DATA.score(x, t), noise(1, 3, 32, 32, seed=9, dtype=torch.float32)
        out = ours.step(score, t, x, variance_noise=z)
        h = 2 * 0.15**2 * z.numel() / score.square().sum()
        assert torch.allclose(out.prev_sample, x + h * score + (2 * h) ** 0.5 * z, rtol=1e-4, atol=1e-4)
        near = stock.step_correct(score, x, generator=generator()).prev_sample
        mine = planned(GeneralizedDDIMScheduler, ours_config(ours), 10).step(score, t, x, generator=generator())
        assert (mine.prev_sample - near).abs().max() <= 0.05 * (near - x).abs().max()
        x = ours.step(DATA.score(out.prev_sample, t), t, out.prev_sample).prev_sample  # the move


def ours_config(scheduler):
    return {key: scheduler.config[key] for key in (*SCORE, "corrector_steps", "corrector_snr")}


def test_samples_are_corrected_each_by_itself():
    scheduler = planned(GeneralizedDDIMScheduler, {**SCORE, "corrector_steps": 1}, 5)
    score, x, z = noise() * torch.tensor([1.0, 5.0], dtype=torch.float64).view(2, 1, 1, 1), noise(seed=1), noise(seed=2)
    t = scheduler.timesteps[0]
    whole = scheduler.step(score, t, x, variance_noise=z).prev_sample
    for i in range(2):
        alone = planned(GeneralizedDDIMScheduler, {**SCORE, "corrector_steps": 1}, 5)
        one = slice(i, i + 1)
        assert torch.allclose(alone.step(score[one], t, x[one], variance_noise=z[one]).prev_sample, whole[one])


@pytest.mark.parametrize(("r", "sigma"), [(0.16, 10.0), (0.05, 0.5), (0.16, 0.05)])
def test_the_corrector_keeps_the_law_of_its_level(sigma, r):
    """On N(mean, V), V = v + σ², h/V = 2r²: the variance tends to V/(1 − r²), from V and from elsewhere.

    A step multiplies what is off in the mean by 1 − 2r², and in the variance by its square.
    """
    V, steps = DATA.variance + sigma**2, 60
    scheduler = planned(
        GeneralizedDDIMScheduler, {**SCORE, "corrector_steps": steps, "corrector_snr": r}, timesteps=[sigma]
    )
    assert scheduler.timesteps.tolist() == pytest.approx([sigma] * (steps + 1))
    torch.manual_seed(123)
    kept = DATA.mean + V**0.5 * noise(4, 1, 256, 256)
    stray = DATA.mean + 1.5 * V**0.5 * noise(4, 1, 256, 256, seed=1)
    for which, x in (("kept", kept), ("stray", stray)):
        scheduler.set_timesteps(timesteps=[sigma])
        before = float(x.var()) / V
        for t in scheduler.timesteps[:steps]:
            x = scheduler.step(DATA.score(x, sigma), t, x).prev_sample
        after = float(x.var()) / V
        assert float(x.mean()) == pytest.approx(DATA.mean, abs=0.02 * V**0.5)
        if which == "kept":
            assert 0.985 < after < 1 / (1 - r**2) + 0.015
        else:
            assert abs(after - 1) < (0.95 if r == 0.05 else 0.06) * abs(before - 1)


@pytest.mark.parametrize(("S", "corrector_steps"), [(5, 2), (10, 1), (20, 1)])
def test_the_corrector_improves_a_poor_predictor(S, corrector_steps):
    """Few DDIM steps on a wide range of σ shrink the deviation of x; Langevin steps restore it on the way."""
    off = []
    for steps in (0, corrector_steps):
        torch.manual_seed(123)
        config = {**SCORE, "corrector_steps": steps, "corrector_snr": 0.3, "variance_type": "fixed_large"}
        x = run(planned(GeneralizedDDIMScheduler, config, S), 20 * noise(8, 1, 64, 64), DATA.score)
        off.append(abs(float(x.std()) - DATA.variance**0.5))
    assert off[1] < 0.9 * off[0]


def test_without_corrector_steps_nothing_changes():
    plain, none = ({**SCORE, "eta": 0.5} | extra for extra in ({}, {"corrector_steps": 0, "corrector_snr": 0.3}))
    found = []
    for config in (plain, none):
        torch.manual_seed(0)
        scheduler = planned(GeneralizedDDIMScheduler, config, 10)
        assert len(scheduler.timesteps) == 10
        found.append(run(scheduler, 20 * noise(), DATA.score))
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "config", [{}, {"prediction_type": "flow_prediction", "shift": 2.0}, {"prediction_type": "v_prediction"}]
)
def test_the_corrector_serves_every_path(config):
    """Of the law of x_t on Gaussian data: the paper's path and flow matching."""
    scheduler = GeneralizedDDIMScheduler(**config, corrector_steps=40)
    time = 600 if config.get("shift") else 599
    scheduler.set_timesteps(timesteps=[time])
    a, b = scheduler.path.level(600)
    V, mean = a**2 * DATA.variance + b**2, a * DATA.mean
    torch.manual_seed(123)
    x = mean + V**0.5 * noise(4, 1, 128, 128)
    for t in scheduler.timesteps[:-1]:
        share = (x - mean) / V
        eps, x0 = b * share, DATA.mean + a * DATA.variance * share
        output = {"flow_prediction": eps - x0, "v_prediction": a * eps - b * x0}.get(config.get("prediction_type"), eps)
        x = scheduler.step(output, t, x).prev_sample
    assert 0.98 < float(x.var()) / V < 1.05
    assert float(x.mean()) == pytest.approx(mean, abs=0.02)


# ---- the random walk x_t = x_0 + √t·ε -------------------------------------------------------------------------------


WALK = {"beta_schedule": "sqrt"}


def test_the_random_walk_by_name():
    """Sampling(1): x − ε̂/√t with noise of variance (t − 1)/t. Sampling(2): x − (√t − √(t − 1))·ε̂."""
    for eta in (1.0, 0.0):
        scheduler = planned(
            GeneralizedDDIMScheduler, {"num_train_timesteps": 50, "beta_schedule": "sqrt", "eta": eta}, 50
        )
        assert scheduler.timesteps.tolist() == list(range(49, -1, -1))
        assert scheduler.init_noise_sigma == pytest.approx(50**0.5)
        x = 50**0.5 * noise()
        for timestep in scheduler.timesteps:
            t, eps = int(timestep) + 1, torch.tanh(x)
            z = noise(seed=t)
            expected = x - (t**0.5 - (t - 1) ** 0.5) * eps
            if eta:
                expected = x - eps / t**0.5 + ((t - 1) / t) ** 0.5 * z
            x = scheduler.step(eps, timestep, x, variance_noise=z).prev_sample
            assert torch.allclose(x, expected, atol=1e-9)
    x0, eps = noise(), noise(seed=1)
    assert torch.allclose(scheduler.add_noise(x0, eps, 8), x0 + 3 * eps, atol=1e-6)


def test_the_random_walk_reaches_its_data():
    """But for the last step, from noise of variance 1 to x̂0, of which v²/(v + 1) of the data's variance v is left."""
    scheduler = planned(GeneralizedDDIMScheduler, {**WALK, "num_train_timesteps": 2000, "eta": 1.0}, 2000)
    data = Gaussian(0.5, 16.0)
    mean, deviation = law(scheduler, lambda x, t: data.eps(x, (int(t) + 1) ** 0.5))
    assert mean == pytest.approx(0.5, abs=0.02)
    assert deviation == pytest.approx(16 / 17**0.5, abs=0.2)  # steps of size 1 are coarse near the data
