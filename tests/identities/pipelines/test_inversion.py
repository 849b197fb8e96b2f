"""Encoding is the inverse of sampling: of each move, of the whole, and of the ODE as S grows."""

import itertools
import math

import numpy as np
import pytest
import torch
from exact import exact_pipe
from hypothesis import assume, given
from hypothesis import strategies as st
from oracle import Gaussian, Mixture, alphas, linear_betas

from ddim_plugin import GeneralizedDDIMScheduler, InverseDDIMScheduler
from ddim_plugin.process import inversion
from ddim_plugin.process.moves import FLAT, fold, prediction

ALPHA = alphas(linear_betas())
GAUSSIAN = Gaussian(0.1, 0.05, ALPHA)
MIXTURE = Mixture((0.3, 0.7), (-0.6, 0.5), (0.02, 0.03), ALPHA)


def pictures(B=3, seed=0, size=4):
    return 0.2 + 0.6 * torch.rand(B, 1, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---- one move --------------------------------------------------------------------------------------------------


@given(st.integers(1, 1000), st.data())
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_a_move_and_its_inverse_are_the_identity(prediction_type, t, data):
    """For the same output of the network, at any pair (t, s); where x_s hardly depends on x_t, see the next test."""
    s = data.draw(st.integers(0, t - 1))
    times = [t - 1] if s == 0 else [t - 1, s - 1]
    down = GeneralizedDDIMScheduler(prediction_type=prediction_type)
    up = InverseDDIMScheduler(prediction_type=prediction_type, refinement_steps=None)
    down.set_timesteps(timesteps=times)
    up.set_timesteps(timesteps=times)
    slope, _ = fold(prediction(prediction_type, down.path.level(t)), down.move(0))
    assume(slope >= FLAT)
    x_t, output = torch.randn(2, 2, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(t)).unbind(0)
    step = down.step(output, t - 1, x_t)
    back = up.step(output, t - 1, step.prev_sample)
    bound = 1e-12 * max(1.0, 1 / slope)
    assert torch.allclose(back.prev_sample, x_t, rtol=0, atol=bound)
    assert torch.allclose(back.pred_original_sample, step.pred_original_sample, rtol=1e-9, atol=1e3 * bound)
    assert torch.allclose(back.pred_epsilon, step.pred_epsilon, rtol=1e-9, atol=1e3 * bound)
    again = down.step(output, t - 1, back.prev_sample).prev_sample
    assert torch.allclose(again, step.prev_sample, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("prediction_type", "t", "s"), [("sample", 200, 0), ("sample", 700, 1), ("v_prediction", 1000, 0)]
)
def test_a_flat_move_takes_its_noise_from_x_s(prediction_type, t, s):
    """Dividing by a slope of almost 0 would blow up any error of the network; Eq. 13 with ε̂ at x_s does not."""
    up = InverseDDIMScheduler(prediction_type=prediction_type, refinement_steps=None)
    up.set_timesteps(timesteps=[t - 1] if s == 0 else [t - 1, s - 1])
    x_s, output = torch.randn(2, 2, 1, 3, 3, dtype=torch.float64).unbind(0)
    a, b = ALPHA[t], ALPHA[s]
    noise = math.sqrt(a) * output + math.sqrt(1 - a) * x_s
    if prediction_type == "sample":
        noise = (x_s - math.sqrt(a) * output) / math.sqrt(1 - a)
    x0 = (x_s - math.sqrt(1 - b) * noise) / math.sqrt(b)
    expected = math.sqrt(a) * x0 + math.sqrt(1 - a) * noise
    assert torch.allclose(up.step(output, t - 1, x_s).prev_sample, expected, atol=1e-9)


@pytest.mark.parametrize("spacing", ["linear", "quadratic", "leading", "trailing", "linspace", "paper_quadratic"])
@pytest.mark.parametrize("S", [1, 7, 50, 999, 1000])
def test_the_same_tau_the_other_way(spacing, S):
    down = GeneralizedDDIMScheduler(timestep_spacing=spacing)
    up = InverseDDIMScheduler.from_config(down.config, refinement_steps=None)
    down.set_timesteps(S)
    up.set_timesteps(S)
    assert up.timesteps.tolist() == down.timesteps.tolist()[::-1]
    assert [(up.move(i).t, up.move(i).s) for i in range(len(up.timesteps))] == [
        (down.move(i).t, down.move(i).s) for i in reversed(range(len(down.timesteps)))
    ]


# ---- the whole way ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])
def test_encode_and_decode_are_inverse_at_five_steps(data):
    pipe = exact_pipe(data, GeneralizedDDIMScheduler())
    images = pictures()
    z, report = pipe.encode(images, num_inference_steps=5, refinement_steps=60, tolerance=1e-13, return_report=True)
    assert z.dtype == torch.float64
    again = pipe.decode(z, num_inference_steps=5, output_type="latent")
    assert (again / 2 + 0.5 - images).abs().max() < 1e-10, str(report)
    naive = pipe.reconstruct(images, num_inference_steps=5, refinement_steps=None, output_type="pt")
    assert (naive - images).abs().max() > 1e-2


def test_decode_and_encode_are_inverse_at_five_steps():
    """The other way round: latents come back, while their images stay inside the range of images."""
    pipe = exact_pipe(GAUSSIAN, GeneralizedDDIMScheduler())
    z = torch.randn(3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x0 = pipe.decode(z, num_inference_steps=5, output_type="latent")
    assert x0.abs().max() < 1
    found = pipe.encode(x0 / 2 + 0.5, num_inference_steps=5, refinement_steps=60, tolerance=1e-14)
    assert (found - z).abs().max() < 1e-10


def encoded(S, x0):
    """The naive latents of `x0`, in float64."""
    scheduler = InverseDDIMScheduler(refinement_steps=None)
    scheduler.set_timesteps(S)
    x = torch.tensor(x0)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.as_tensor(GAUSSIAN.eps(x.numpy(), int(t) + 1)), t, x).prev_sample
    return x.numpy()


def test_the_naive_inverse_has_order_1():
    """Latents against the exact solution of the ODE (Eq. 14) from the data upwards."""
    x0 = GAUSSIAN.mean + np.linspace(-0.5, 0.5, 11)
    exact = GAUSSIAN.solution(x0, 0, 1000)
    errors = [np.abs(encoded(S, x0) - exact).max() for S in (125, 250, 500, 1000)]
    measured = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert measured[-1] == pytest.approx(1, abs=0.1)
    assert measured[-2] == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("refinement_steps", [None, 6])
def test_the_round_trip_error_falls_with_S_or_not_at_all(refinement_steps):
    """Naive: order 1 (Table 2). Refined: closed at any S."""
    pipe = exact_pipe(GAUSSIAN, GeneralizedDDIMScheduler())
    images = pictures()
    errors = []
    for S in (20, 40, 80, 160, 320):
        again = pipe.reconstruct(images, S, refinement_steps, tolerance=1e-12, output_type="pt")
        errors.append((again - images).pow(2).mean().sqrt().item())
    if refinement_steps:
        assert max(errors) < 1e-9
    else:
        assert all(a > b for a, b in itertools.pairwise(errors))
        assert math.log2(errors[-2] / errors[-1]) == pytest.approx(1, abs=0.2)


def test_latents_of_gaussian_data_are_gaussian():
    """The shell: with the exact ε̂ the latents of data are noise."""
    pipe = exact_pipe(GAUSSIAN, GeneralizedDDIMScheduler(), sample_size=16)
    x0 = 0.1 + math.sqrt(0.05) * torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    images = (x0 / 2 + 0.5).clamp(0, 1)
    _, report = pipe.encode(images, 300, refinement_steps=3, return_report=True)
    assert report.latent_std.mean() == pytest.approx(1, abs=0.05)
    assert report.latent_mean.mean() == pytest.approx(0, abs=0.05)


# ---- the search ------------------------------------------------------------------------------------------------


def linear_problem(eigenvalues, B=2, seed=0):
    """residual(x) = b − A·x with A symmetric of these eigenvalues, and the solution."""
    generator = torch.Generator().manual_seed(seed)
    n = len(eigenvalues)
    Q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))[0]
    A = Q @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ Q.T
    x = torch.randn(B, 1, 1, n, dtype=torch.float64, generator=generator)
    b = x @ A
    return lambda y: b - y @ A, x


def search(residual, x, step, evaluations):
    """The x after so many evaluations, and the smallest norm of the residuals of each sample."""
    found = inversion.Search(step)
    for _ in range(evaluations):
        x = found.next(x, residual(x))
    return x, found.best[0].flatten().sqrt()


def test_acceleration_is_exact_after_as_many_steps_as_eigenvalues():
    """On a linear problem Anderson acceleration is GMRES (Walker & Ni 2011, Theorem 2.2)."""
    residual, x = linear_problem([0.2] * 4 + [0.7] * 4 + [1.3] * 4)
    assert torch.allclose(search(residual, torch.zeros_like(x), 1.0, 4)[0], x, atol=1e-9)
    assert not torch.allclose(search(residual, torch.zeros_like(x), 1.0, 3)[0], x, atol=1e-3)


def test_it_converges_where_the_plain_iteration_diverges():
    residual, x = linear_problem([-0.5, 0.3, 0.8, 2.5, 4.0])
    y = torch.zeros_like(x)
    for _ in range(30):
        y = y + residual(y)
    assert (y - x).abs().max() > 1e3
    assert torch.allclose(search(residual, torch.zeros_like(x), 1.0, 30)[0], x, atol=1e-7)


def test_a_growing_iteration_is_taken_back_with_half_the_step():
    """x ← x + 1.9·sign-flipping slope: without halving the steps grow for ever."""
    guess = torch.tensor([0.3, 0.5], dtype=torch.float64).view(2, 1, 1, 1)
    _, size = search(lambda y: -y * 3 * (1 + torch.tanh(y) ** 2), guess, 1.9, 40)
    assert (size <= 1e-8).all()


def test_the_smallest_residual_is_kept():
    """x² = −1 has no solution: the residual is 1 at best. The other sample has one."""
    guess = torch.tensor([0.1, 1.5], dtype=torch.float64).view(2, 1, 1, 1)
    wanted = torch.tensor([-1.0, 4.0], dtype=torch.float64).view(2, 1, 1, 1)
    x, size = search(lambda y: wanted - y**2, guess, 0.1, 50)
    assert 1 <= size[0] < 1.02
    assert size[1] < 1e-9
    assert x.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_image_without_finite_residuals_spoils_no_other(bad):
    """It returns to its best x with half the step, and the others are as if they were alone."""
    residual, x = linear_problem(np.linspace(0.2, 1.2, 6).tolist(), B=3)
    calls = iter(range(30))

    def broken(y):
        r = residual(y)
        r[1] = bad if next(calls) else 1.0
        return r

    found, size = search(broken, torch.zeros_like(x), 1.0, 30)
    assert torch.allclose(found[1], torch.full_like(found[1], 0.5**29))
    assert torch.equal(size[1], torch.tensor(6.0, dtype=torch.float64).sqrt())
    assert (size[[0, 2]] <= 1e-9).all()
    for i in (0, 2):
        alone = search(lambda y, i=i: residual(y.expand(3, 1, 1, 6))[i : i + 1], torch.zeros_like(x[:1]), 1.0, 30)[0]
        assert torch.allclose(alone[0], found[i], atol=1e-12)


def test_a_known_direction_makes_no_division_by_zero():
    """In float32, with a residual that never gets below 0.2, and one that does not change."""
    for residual in (lambda y: torch.sin(50 * y) * 0.1 + 0.3, lambda y: torch.full_like(y, 0.5)):
        x, size = search(residual, torch.rand(4, 1, 3, 3, generator=torch.Generator().manual_seed(0)), 1.0, 40)
        assert x.isfinite().all()
        assert size.isfinite().all()
    problem, x = linear_problem([0.2, 0.5, 0.9, 1.4])
    found, _ = search(lambda y: problem(y.double()).float(), x.float() * 0, 1.0, 12)
    assert torch.allclose(found.double(), x, atol=1e-4)


def test_images_stop_on_their_own():
    """Encoded together or alone, an image takes as many evaluations, and has the same latent."""
    pipe = exact_pipe(MIXTURE, GeneralizedDDIMScheduler())
    images = pictures()
    images[1] = 0.5 + 0.5 * GAUSSIAN.mean  # an easy one
    settings = {"num_inference_steps": 10, "refinement_steps": 12, "tolerance": 1e-9, "return_report": True}
    z, report = pipe.encode(images, **settings)
    assert len(set(report.total_evaluations.tolist())) > 1
    for i in range(3):
        alone, own = pipe.encode(images[i : i + 1], **settings)
        assert torch.allclose(alone[0], z[i], atol=1e-12)
        assert own.evaluations[:, 0].tolist() == report.evaluations[:, i].tolist()
