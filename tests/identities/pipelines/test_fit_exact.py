"""Solvers fitted to networks that know their data in closed form: exact for Gaussian data, better for others."""

import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from exact import ExactNetwork
from oracle import Mixture, outputs

from ddim_plugin import GeneralizedDDIMPipeline, MultistepDDIMScheduler
from ddim_plugin.pipelines.fit import fit_solver
from ddim_plugin.process.fitting import Curve, descend, least_squares, refine

PATHS = {
    "variance preserving": {},
    "flow": {"prediction_type": "flow_prediction", "shift": 3.0},
    "exploding": {"prediction_type": "score", "sigma_max": 50.0},
}
each_path = pytest.mark.parametrize("settings", PATHS.values(), ids=PATHS)


class Exact(ExactNetwork):
    """The prediction of Σ w_k N(m_k, v_k), on any path and of any type."""

    def forward(self, x, t, class_labels=None):
        self.evaluated += len(x)
        path, kind = self.scheduler.path, self.scheduler.config.prediction_type
        a, b = path.level(path.time(float(t) if path.continuous else int(t)))
        size = np.hypot(a, b)  # a sample of the paper's path at α = a²/(a² + b²)
        y = x.detach().double().cpu().numpy()
        eps = self.data.eps_at(y / size, (a / size) ** 2)
        x0 = (y - b * eps) / a if a else np.full_like(y, sum(w * m for w, m, _ in self.data.parts))
        return UNet2DOutput(sample=torch.as_tensor(outputs((a, b), x0, eps)[kind]).to(x))


def exact(data, settings, dtype=torch.float64):
    network = torch.nn.Module.to(Exact(), dtype)
    network.data, network.scheduler = data, MultistepDDIMScheduler(**settings)
    pipe = GeneralizedDDIMPipeline(network, network.scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


GAUSSIAN = Mixture((1.0,), (0.3,), (0.04,), None)
MIXTURE = Mixture((0.3, 0.7), (-0.6, 0.5), (0.01, 0.02), None)


def images(pipe, S, seeds=range(1000, 1032), **call):
    generators = [torch.Generator().manual_seed(i) for i in seeds]
    return pipe(len(generators), S, generator=generators, output_type="latent", **call).images.double()


def rms(x, y):
    return float((x - y).square().mean().sqrt())


@each_path
def test_for_gaussian_data_it_finds_the_exact_solver(settings):
    """Any trajectory is linear in x_T then, and two values that a step uses are enough for its end."""
    pipe = exact(GAUSSIAN, settings)
    for found in fit_solver(pipe, [1, 2, 5, 9], num_images=16, teacher_steps=60).values():
        assert found["error"] < 1e-6 < 1e-3 * found["default_error"]


@each_path
def test_for_a_mixture_it_is_nearer_on_other_draws(settings):
    pipe = exact(MIXTURE, settings)
    before = exact(MIXTURE, settings)
    found = fit_solver(pipe, [5, 9], num_images=32, teacher_steps=60)
    truth = images(before, 120)
    for S, fitted in found.items():
        assert fitted["error"] < 0.7 * fitted["default_error"]
        usual, better = (rms(images(each, S), truth) for each in (before, pipe))
        assert better < 0.8 * usual
        one = torch.cat([images(pipe, S, [i]) for i in range(1000, 1004)])
        assert torch.allclose(one, images(pipe, S)[:4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    pipe, before = exact(MIXTURE, {}, dtype), exact(MIXTURE, {}, torch.float32)
    found = fit_solver(pipe, [5], num_images=32, teacher_steps=50)[5]
    assert found["error"] < found["default_error"]
    truth = images(before, 120)
    assert rms(images(pipe, 5), truth) < 0.9 * rms(images(before, 5), truth)


def test_a_zero_terminal_snr():
    settings = {"rescale_betas_zero_snr": True, "prediction_type": "sample"}
    found = fit_solver(exact(MIXTURE, settings), [4], num_images=16, teacher_steps=50)[4]
    assert found["error"] < found["default_error"] < 0.3


@pytest.mark.parametrize("settings", [{}, PATHS["flow"]], ids=["variance preserving", "flow"])
@pytest.mark.parametrize("S", [1, 3])
def test_with_time_it_is_not_worse_on_its_images(settings, S):
    """Its images are the first 24 draws: the others judge."""
    few, long = (exact(MIXTURE, settings) for _ in range(2))
    for pipe, minutes in ((few, 0.0), (long, 0.02)):
        fit_solver(pipe, [S], num_images=32, teacher_steps=40, minutes=minutes)
    truth = images(exact(MIXTURE, settings), 40, range(24))
    plain, refined = (rms(images(pipe, S, range(24)), truth) for pipe in (few, long))
    assert refined < 1.001 * plain  # in float32
    assert long.unet.evaluated > few.unet.evaluated


def test_a_small_T():
    betas = np.linspace(0.1, 0.6, 8).tolist()
    pipe = exact(MIXTURE, {"num_train_timesteps": 8, "trained_betas": betas})
    found = fit_solver(pipe, [1, 2, 3, 4], num_images=16, teacher_steps=8, minutes=0.005)
    assert all(each["error"] <= each["default_error"] for each in found.values())
    with pytest.raises(ValueError, match="from 1 to 8"):
        fit_solver(pipe, [2], teacher_steps=9)


# ---- the numerics ---------------------------------------------------------------------------------------------------


def test_the_weights_are_those_of_the_target_or_the_prior():
    values = np.random.default_rng(0).normal(size=(3, 50))
    weights = np.array([0.5, -2.0, 3.0])
    products, right = values @ values.T / 50, values @ (weights @ values) / 50
    assert np.allclose(least_squares(products, right, np.zeros(3)), weights, rtol=1e-5)
    same = np.ones((2, 2))  # what two equal values do not determine is that of the prior
    assert np.allclose(least_squares(same, np.array([3.0, 3.0]), np.array([2.0, 0.0])), [2.5, 0.5], atol=1e-5)


def test_a_curve_interpolates_trajectories():
    """y = cos φ·x_0 + sin φ·ε has v = −sin φ·x_0 + cos φ·ε, and its means are those of the products."""
    angles = np.append(np.linspace(1.5, 0.02, 40), 0.0)
    x0, eps = np.random.default_rng(0).normal(size=(2, 200))
    y = np.outer(np.cos(angles), x0) + np.outer(np.sin(angles), eps)
    nodes = np.vstack([y, np.outer(np.cos(angles), eps) - np.outer(np.sin(angles), x0)])
    curve = Curve(angles, nodes @ nodes.T / 200)
    for phi in (1.5, 1.234, 0.5, 0.01, 0.0):
        at_y, at_v = (weights @ nodes for weights in curve.at(phi))
        assert np.allclose(at_y, np.cos(phi) * x0 + np.sin(phi) * eps, atol=1e-5)
        assert np.allclose(at_v, np.cos(phi) * eps - np.sin(phi) * x0, atol=1e-3)
    assert curve.error([1.5, 0.7], 2, 1.0) < 1e-3  # a single Gaussian point is solved exactly


def test_the_descent_goes_down_and_stays_in_order():
    goal, seen = np.array([990, 620, 300, 40]), []

    def cost(times):
        seen.append(times)
        assert all(high > low for high, low in zip(times, (*times[1:], 0), strict=True))
        return float(np.square(np.array(times) - goal).sum())

    found = descend((990, 700, 400, 100), cost, 60, 1)
    assert cost(found) == min(map(cost, list(seen)))
    assert np.abs(np.array(found) - goal).max() <= 1
    assert descend((5,), lambda times: 0.0, 0, 0) == [5]


def test_refinement_solves_a_curved_problem_and_keeps_to_its_time():
    def residual(theta):
        return np.array([theta[0] ** 2 - 2, 10 * (theta[1] - theta[0])])

    start, steps = np.array([1.0, 3.0]), np.full(2, 1e-4)
    assert np.allclose(refine(start, steps, residual, np.inf), np.sqrt(2), atol=1e-2)
    assert refine(start, steps, residual, -np.inf) is start
    stuck = refine(start, steps, lambda theta: np.full(3, np.nan), np.inf)
    assert np.array_equal(stuck, start)
