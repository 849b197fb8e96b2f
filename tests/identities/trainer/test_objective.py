"""The losses of training against the paper's equations, written out again."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import outputs
from pictures.bits import discretized_log_likelihood, kl
from torch.distributions import Normal, kl_divergence
from trainer.objective import ImportanceTimes, Objective, draw_times, log_normal_times

from ddim_plugin import GeneralizedDDIMScheduler
from ddim_plugin.process.paths import flow_matching, variance_exploding, variance_preserving

T = 50
ALPHA = np.concatenate([[1.0], np.cumprod(1 - np.linspace(1e-3, 0.2, T))])
PATH = variance_preserving(ALPHA)
LEVELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1


def images(B=6, seed=0):
    """8-bit pictures, noise and times in 1..T, the first of them 1 and the last T."""
    rng = np.random.default_rng(seed)
    x0 = torch.from_numpy(rng.integers(0, 256, (B, 2, 4, 4)) / 127.5 - 1).float()
    t = torch.from_numpy(rng.integers(1, T + 1, B))
    t[0], t[-1] = 1, T
    return x0, torch.from_numpy(rng.standard_normal(x0.shape)).float(), t


def output_for(kind, x0, noise, t, wrong):
    """A network's output whose x̂0 is x0 + `wrong`, as each kind of prediction says it."""
    a = torch.from_numpy(ALPHA)[t].view(-1, 1, 1, 1)
    x = a.sqrt() * x0.double() + (1 - a).sqrt() * noise.double()
    guess = x0.double() + wrong
    eps = (x - a.sqrt() * guess) / (1 - a).sqrt()
    return {"epsilon": eps, "sample": guess, "v_prediction": a.sqrt() * eps - (1 - a).sqrt() * guess}[kind].float()


def gamma(t, eta):
    """γ_t of Theorem 1 with the erratum, from Eqs. 7 and 16 alone."""
    a, b = ALPHA[t], ALPHA[t - 1]
    t_sigma = max(t, 2)  # σ_1 is 0: Ho's code takes the next
    sigma2 = eta**2 * (1 - ALPHA[t_sigma - 1]) / (1 - ALPHA[t_sigma]) * (1 - ALPHA[t_sigma] / ALPHA[t_sigma - 1])
    own = eta**2 * (1 - b) / (1 - a) * (1 - a / b)
    c = math.sqrt(b) - math.sqrt(1 - b - own) * math.sqrt(a) / math.sqrt(1 - a)
    return c**2 * (1 - a) / (2 * sigma2 * a)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_theorem_1(eta):
    x0, noise, t = images()
    objective = Objective(PATH, loss="theorem1", eta=eta)
    output = noise + 0.1 * torch.sin(noise)
    losses = objective(output, objective.noised(x0, noise, t))
    expected = [
        gamma(int(time), eta) * float((n - o).square().mean()) for time, n, o in zip(t, noise, output, strict=True)
    ]
    assert losses.tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("loss", ["theorem1", "min_snr", "soft_min_snr", "bound"])
@given(seed=st.integers(0, 50))
def test_a_loss_of_the_image_is_one_for_all_predictions(loss, seed):
    x0, noise, t = images(seed=seed)
    wrong = 0.05 * torch.cos(7 * x0.double() + noise.double())
    made = []
    for kind in ("epsilon", "sample", "v_prediction"):
        objective = Objective(PATH, kind, loss)
        made.append(objective(output_for(kind, x0, noise, t, wrong), objective.noised(x0, noise, t)))
    assert torch.allclose(made[0], made[1], rtol=2e-3, atol=1e-5)
    assert torch.allclose(made[0], made[2], rtol=2e-3, atol=1e-5)


def test_snr_weights():
    x0, noise, t = images()
    wrong = torch.full(x0.shape, 0.1, dtype=torch.float64)
    snr = ALPHA[t] / (1 - ALPHA[t])
    for loss, weight in (("min_snr", np.minimum(snr, 5)), ("soft_min_snr", snr * 5 / (snr + 5))):
        objective = Objective(PATH, "sample", loss)
        losses = objective(output_for("sample", x0, noise, t, wrong), objective.noised(x0, noise, t))
        assert losses.tolist() == pytest.approx((0.01 * weight).tolist(), rel=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_simple_is_the_error_of_the_prediction(kind):
    x0, noise, t = images()
    objective = Objective(PATH, kind)
    target = output_for(kind, x0, noise, t, 0.0)
    losses = objective(target + 0.2, objective.noised(x0, noise, t))
    assert losses.tolist() == pytest.approx([0.04] * len(t), rel=1e-3)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
def test_the_bound_is_that_of_the_scheduler(variance_type):
    """Each term by torch's own distributions, with the mean and the deviation of a step of the scheduler."""
    x0, noise, _ = images(B=T)
    t = torch.arange(1, T + 1)
    betas = (1 - ALPHA[1:] / ALPHA[:-1]).tolist()
    scheduler = GeneralizedDDIMScheduler(T, trained_betas=betas, variance_type=variance_type, eta=1.0)
    scheduler.set_timesteps(T)
    learned = variance_type == "learned_range"
    objective = Objective(scheduler.path, loss="bound", variance_type=variance_type)
    batch = objective.noised(x0, noise, t)
    output = noise + 0.3 * torch.sin(3 * noise)
    if learned:
        output = torch.cat([output, torch.cos(2 * noise)], 1)
    prior = kl_divergence(Normal(math.sqrt(ALPHA[T]) * x0.double(), math.sqrt(1 - ALPHA[T])), Normal(0.0, 1.0))
    expected = []
    for i, time in enumerate(t.tolist()):
        x, one = batch.x[i : i + 1].double(), x0[i : i + 1].double()
        step = scheduler.step(output[i : i + 1].double(), time - 1, x, generator=torch.Generator().manual_seed(0))
        b = ALPHA[time - 1]
        if time == 1:
            tilde = float((1 - ALPHA[1]) / (1 - ALPHA[2]) * (1 - ALPHA[2] / ALPHA[1]))
            std = torch.tensor(math.sqrt(tilde))
            if learned:
                share = (output[i : i + 1, 2:].double() + 1) / 2
                std = torch.exp(0.5 * (share * math.log(1 - ALPHA[1]) + (1 - share) * math.log(tilde)))
            mean = step.pred_original_sample
            upper = Normal(mean, std).cdf(one + 1 / 255).where(one < 0.999, torch.ones(()))
            lower = Normal(mean, std).cdf(one - 1 / 255).where(one > -0.999, torch.zeros(()))
            term = -torch.log(upper - lower)
        else:
            a = ALPHA[time]
            mean = math.sqrt(b) * (1 - a / b) / (1 - a) * one + math.sqrt(a / b) * (1 - b) / (1 - a) * x
            q = Normal(mean, math.sqrt((1 - b) / (1 - a) * (1 - a / b)))
            term = kl_divergence(q, Normal(step.mean, step.std.expand_as(mean)))
        expected.append(float((T * term.mean() + prior[i].mean()) / math.log(2)))
    losses = objective(output, batch)
    assert math.isinf(expected[0]) or losses[0].item() == pytest.approx(expected[0], rel=1e-3)
    assert losses[1:].tolist() == pytest.approx(expected[1:], rel=2e-3, abs=1e-4)


PATHS = {
    "flow": (flow_matching(T), ("sample", "v_prediction", "flow_prediction")),
    "exploding": (variance_exploding(T, 0.01, 9.0), ("epsilon", "sample", "v_prediction", "flow_prediction", "score")),
    "preserving": (PATH, ("epsilon", "score", "flow_prediction")),
}


def output_on(path, kind, x0, noise, t, wrong):
    """A network's output whose x̂0 is x0 + `wrong`, on any path, from x = a·x̂0 + b·ε̂ alone."""
    a, b = (torch.from_numpy(np.asarray(each))[t].view(-1, 1, 1, 1) for each in path.levels)
    guess = x0.double() + wrong
    eps = (a * x0.double() + b * noise.double() - a * guess) / b
    return outputs((a, b), guess, eps)[kind].float()


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("loss", ["theorem1", "min_snr", "soft_min_snr", "bound"])
def test_a_loss_of_the_image_is_one_on_every_path(name, loss):
    (path, kinds), (x0, noise, t) = PATHS[name], images()
    wrong = 0.05 * torch.cos(7 * x0.double() + noise.double())
    if (name, loss) in (("flow", "min_snr"), ("flow", "soft_min_snr"), ("exploding", "bound")):
        with pytest.raises(ValueError, match=r"weight 0 at zero terminal SNR|has the prior N\(0, 1\), and this path"):
            Objective(path, kinds[1], loss)
        return
    made = []
    for kind in kinds:
        objective = Objective(path, kind, loss)
        made.append(objective(output_on(path, kind, x0, noise, t, wrong), objective.noised(x0, noise, t)))
    assert all(torch.allclose(each, made[0], rtol=5e-3, atol=1e-5) for each in made)
    if loss == "min_snr":
        a, b = (np.asarray(each)[t] for each in path.levels)
        weights = np.minimum((a / b) ** 2, 5) * wrong.square().mean((1, 2, 3)).numpy()
        assert made[0].tolist() == pytest.approx(weights.tolist(), rel=5e-3)


@pytest.mark.parametrize("name", PATHS)
def test_simple_on_every_path(name):
    """The error of the prediction, and of a score σ times that: E‖b·out + ε‖²."""
    (path, kinds), (x0, noise, t) = PATHS[name], images()
    b = torch.from_numpy(np.asarray(path.levels.noise))[t].float()
    for kind in kinds:
        objective = Objective(path, kind)
        batch = objective.noised(x0, noise, t)
        losses = objective(output_on(path, kind, x0, noise, t, 0.0) + 0.2, batch)
        assert losses.tolist() == pytest.approx((0.04 * (b**2 if kind == "score" else 1 + 0 * b)).tolist(), rel=2e-3)
        assert objective.timesteps(t).tolist() == pytest.approx([path.timestep(int(time)) for time in t])
    assert torch.equal(batch.x[-1], noise[-1]) == (name == "flow")


@pytest.mark.parametrize("kind", ["edm", "v_prediction"])
def test_the_weights_of_edm_are_the_error_of_the_output(kind):
    """λ(σ)·c_out² = 1, and x̂0 of the right output is x_0 (Karras et al. 2022, Eqs. 7 and 8)."""
    path, (x0, noise, t) = variance_exploding(T, 0.01, 9.0, 0.5), images()
    weighted, simple = Objective(path, kind, "edm"), Objective(path, kind)
    batch = weighted.noised(x0, noise, t)
    sigma = torch.tensor([path.level(int(each)).noise for each in t]).view(-1, 1, 1, 1)
    root = (sigma**2 + 0.25).sqrt()
    assert torch.allclose(weighted.seen(batch.x, t), batch.x / root)
    right = (sigma * x0 / 0.5 - 0.5 * noise) / root * (1 if kind == "edm" else -1)
    assert weighted(right, batch).max() < 1e-8
    losses = weighted(right + 0.1 * torch.cos(noise), batch)
    assert torch.allclose(losses, simple(right + 0.1 * torch.cos(noise), batch), rtol=1e-4)
    guess = 0.25 / root**2 * batch.x + (1 if kind == "edm" else -1) * sigma * 0.5 / root * (
        right + 0.1 * torch.cos(noise)
    )
    error = (guess - x0).square() * (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    assert torch.allclose(losses, error.mean((1, 2, 3)), rtol=1e-2)
    assert torch.equal(Objective(PATH).seen(batch.x, t), batch.x)


def test_log_normal_times():
    path = variance_exploding(1000, 0.002, 80.0, 0.5)
    times = log_normal_times(20_000, path, np.random.default_rng(0))
    logs = np.log([path.level(int(t)).noise for t in times])
    assert (logs.mean(), logs.std()) == pytest.approx((-1.2, 1.2), abs=0.03)
    assert (times.min() >= 1, times.max() <= 1000) == (True, True)
    assert {*log_normal_times(99, variance_exploding(3, 1e3, 1e4), np.random.default_rng(0))} == {1}


def test_hybrid_moves_the_mean_by_the_simple_loss_alone():
    x0, noise, t = images()
    hybrid = Objective(PATH, loss="hybrid", variance_type="learned_range", bound_weight=0.5)
    bound = Objective(PATH, loss="bound", variance_type="learned_range")
    simple = Objective(PATH)
    gradients, values = [], []
    for objective in (hybrid, bound, simple):
        output = torch.cat([noise * 0.9, torch.sin(noise)], 1).requires_grad_()
        given_ = output[:, :2] if objective is simple else output
        losses = objective(given_, objective.noised(x0, noise, t))
        losses.sum().backward()
        gradients.append(output.grad)
        values.append(losses.detach())
    assert torch.allclose(values[0], values[2] + 0.5 * values[1], rtol=1e-5)
    assert torch.allclose(gradients[0][:, :2], gradients[2][:, :2])
    assert torch.allclose(gradients[0][:, 2:], 0.5 * gradients[1][:, 2:])
    assert gradients[0][:, 2:].abs().min() > 0


def test_zero_terminal_snr():
    path = GeneralizedDDIMScheduler(T, rescale_betas_zero_snr=True, prediction_type="v_prediction").path
    x0, noise, t = images()
    for loss in ("simple", "bound"):
        objective = Objective(path, "v_prediction", loss)
        batch = objective.noised(x0, noise, t)
        assert torch.equal(batch.x[-1], noise[-1])
        assert objective(noise * 0.9, batch).isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "l1"}, "unknown loss 'l1': use one of simple"),
        ({"prediction_type": "x"}, "unknown prediction_type"),
        ({"loss": "hybrid"}, "needs variance_type 'learned_range'"),
        ({"variance_type": "learned_range"}, "a learned variance needs 'hybrid'"),
        ({"loss": "bound", "eta": 0.0}, "infinite at eta=0.0"),
        ({"loss": "theorem1", "eta": 9.0}, "eta=9.0 is too large"),
        ({"loss": "bound", "eta": 0.5, "variance_type": "fixed_large"}, "requires eta = 1"),
        ({"loss": "bound", "variance_type": "optimal"}, "cannot be trained"),
        ({"loss": "min_snr", "snr_gamma": 0.0}, "must be positive"),
        ({"path": variance_preserving(np.append(ALPHA[:-1], 0.0))}, "ε does not determine x0 at zero terminal SNR"),
        (
            {"path": variance_preserving(np.append(ALPHA[:-1], 0.0)), "prediction_type": "sample", "loss": "min_snr"},
            "weight 0 at zero",
        ),
        ({"path": variance_preserving(ALPHA[:2]), "loss": "bound"}, "at least 2"),
        ({"loss": "edm"}, "weights by sigma_data: set it"),
        ({"prediction_type": "edm"}, "needs sigma_data"),
    ],
)
def test_objectives_that_do_not_exist(settings, message):
    with pytest.raises(ValueError, match=message):
        Objective(**{"path": PATH} | settings)


@given(st.floats(-2, 2), st.floats(-6, 1), st.floats(-2, 2), st.floats(-6, 1))
def test_kl(m, v, n, w):
    made = kl(*(torch.tensor(value, dtype=torch.float64) for value in (m, v, n, w)))
    expected = kl_divergence(Normal(m, math.exp(v / 2)), Normal(n, math.exp(w / 2)))
    assert made.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("std", [1e-3, 1e-2, 0.3, 10.0])
@pytest.mark.parametrize("mean", [-7.0, -1.0, -0.004, 0.0, 0.37, 1.0, 3.0])
def test_256_bins_hold_the_whole_mass(mean, std, dtype):
    levels = LEVELS.to(dtype)
    logs = discretized_log_likelihood(levels, torch.full_like(levels, mean), torch.full_like(levels, std))
    assert logs.isfinite().all()
    assert logs.double().exp().sum().item() == pytest.approx(1, abs=1e-12 if dtype == torch.float64 else 1e-4)


def test_far_from_the_mean_there_is_still_a_slope():
    mean = torch.tensor([0.9, -0.9], requires_grad=True)
    discretized_log_likelihood(torch.tensor([-0.5, 1.0]), mean, torch.tensor(1e-2)).sum().backward()
    assert mean.grad[0] < -1e3
    assert mean.grad[1] > 1e3


def test_times():
    rng = np.random.default_rng(0)
    pairs = draw_times("antithetic", 7, 1000, rng)
    assert (pairs[:3] + pairs[4:]).tolist() == [1001] * 3
    for kind in ("antithetic", "uniform"):
        many = draw_times(kind, 20001, 10, rng)
        assert many.shape == (20001,)
        assert np.bincount(many, minlength=11)[1:] == pytest.approx(np.full(10, 2000.1), rel=0.1)


def test_times_of_flow_matching():
    """Normal logits, and the shift of σ: of its quantiles, with every time drawn."""
    rng = np.random.default_rng(0)
    for kind in ("uniform", "antithetic", "logit_normal"):
        plain, shifted = (np.sort(draw_times(kind, 40_001, 200, rng, shift)) / 200 for shift in (1.0, 3.0))
        assert np.allclose(shifted, 3 * plain / (1 + 2 * plain), atol=0.03)
        assert (plain > 0).all()
        assert (shifted <= 1).all()
        if kind == "logit_normal":
            logit = np.log(plain / (1 - plain + 1 / 400))
            assert (np.median(logit), np.std(logit)) == pytest.approx((0, 1), abs=0.05)
        else:
            assert len(np.unique(shifted)) == 200


def test_importance_follows_the_losses_and_stays_unbiased():
    times, rng = ImportanceTimes(4), np.random.default_rng(0)
    assert times.probabilities().tolist() == [0.25] * 4
    for repeat in range(times.HISTORY):
        assert not times.warm
        times.record(torch.arange(1, 5), torch.tensor([1.0, 2.0, 3.0, 4.0]) + 0 * repeat)
    assert times.warm
    assert times.probabilities() == pytest.approx(np.array([0.1, 0.2, 0.3, 0.4]), rel=2e-2)
    drawn, weights = times.draw(40000, rng)
    assert np.bincount(drawn)[1:] / 40000 == pytest.approx(times.probabilities(), abs=0.01)
    losses = np.array([1.0, 2.0, 3.0, 4.0])
    assert (losses[drawn - 1] * weights).mean() == pytest.approx(losses.mean(), rel=0.01)
    times.record(torch.tensor([1] * times.HISTORY), torch.full((times.HISTORY,), 9.0))  # the oldest are forgotten
    other = ImportanceTimes(4)
    other.load_state_dict(times.state_dict())
    assert other.probabilities().tolist() == times.probabilities().tolist()
    assert other.probabilities()[0] == pytest.approx(0.5, rel=2e-2)
