"""Training networks for categorical data, and their variational bound."""

import math

import convert_checkpoint
import pytest
import sample
import tokens
import torch
from discrete import DiscreteObjective, bound_bits, quantize
from discrete.objective import Corrupted, prior_nats, step_nats
from trainer.config import TrainConfig
from trainer.settings import build
from trainer.setup import build_run
from training_runs import SMALL, fit, fit_whole_and_resumed

from ddim_plugin import DiscreteDDIMScheduler, GeneralizedDDIMPipeline

TOKENS = {"scheduler": {"num_classes": 4, "num_train_timesteps": 20}, "loss": "cross_entropy"}


def test_a_run_previews_resumes_and_samples(tmp_path):
    settings = TOKENS | {"loss": "bound", "class_conditional": True, "preview_every": 6, "preview_images": 2}
    settings |= {"preview_steps": 3, "eval_every": 6, "eval_images": 16, "times": "importance"}
    whole = fit_whole_and_resumed(tmp_path, **settings)
    assert (whole / "previews" / "step-00000006.png").is_file()
    pipe = GeneralizedDDIMPipeline.from_pretrained(whole)
    assert type(pipe.scheduler) is DiscreteDDIMScheduler
    assert pipe.unet.config.out_channels == 4
    checkpoint = {"checkpoint": str(tmp_path / "whole" / "checkpoints" / "step-00000006")}
    convert_checkpoint.main(build(convert_checkpoint.ConvertConfig, checkpoint | {"output": str(tmp_path / "made")}))
    made = GeneralizedDDIMPipeline.from_pretrained(tmp_path / "made")
    assert made.scheduler.config.num_classes == 4
    assert torch.equal(made.unet.conv_in.weight, pipe.unet.conv_in.weight)
    drawn = {"model": str(tmp_path / "whole"), "output": str(tmp_path / "drawn"), "steps": [2], "eta_steps": [2]}
    drawn |= {"columns": 2, "etas": [1.0], "class_label": [1]}
    assert len(sample.main(build(sample.SampleConfig, drawn))["pictures"]) == 2


def test_a_network_is_measured_by_steps_and_eta(tmp_path):
    fit(tmp_path / "model", **TOKENS)
    settings = {"model": str(tmp_path / "model"), "data": "digits", "output": str(tmp_path / "out"), "steps": [2, 5]}
    settings |= {"bound_images": 3, "images": 4, "batch_size": 2, "split": "train"}
    result = tokens.main(build(tokens.TokensConfig, settings))
    assert [(row["S"], row["eta"]) for row in result["results"]] == [(2, 0), (2, 1), (5, 0), (5, 1)]
    assert all(1 < row["bits"] < 20 for row in result["results"])
    table = (tmp_path / "out" / "tokens.md").read_text().splitlines()
    assert len(table) == 6
    assert all((tmp_path / "out" / name).is_file() for name in result["pictures"])
    with pytest.raises(ValueError, match="--overwrite"):
        tokens.main(build(tokens.TokensConfig, settings))
    with pytest.raises(ValueError, match=r"eta must lie in \[0, 1\], not 2"):
        tokens.main(build(tokens.TokensConfig, settings | {"output": str(tmp_path / "other"), "etas": [2.0]}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"loss": "simple"}, "'simple' is not for num_classes"),
        ({"scheduler": {"num_classes": 257}}, "257"),
        ({"scheduler": {"num_classes": 4, "prediction_type": "sample"}}, "prediction_type"),
        ({"scheduler": {}}, "'cross_entropy'"),
        ({"times": "logit_normal"}, "flow matching"),
        ({"loss": "bound", "loss_eta": 2.0}, r"\[0, 1\], not 2"),
        ({"push_to_hub": "user/model"}, "no push_to_hub"),
        ({"self_conditioning": True}, "nor self_conditioning"),
    ],
)
def test_impossible_settings_are_refused(tmp_path, change, words):
    settings = SMALL | TOKENS | {"output": str(tmp_path / "x")} | change
    with pytest.raises(ValueError, match=words):
        build_run(build(TrainConfig, settings))


def test_pictures_are_divided_into_equal_levels():
    images = torch.arange(256) / 127.5 - 1
    for K in (2, 3, 8, 256):
        assert torch.equal(quantize(images, K), torch.arange(256) * K // 256)


def test_a_batch_has_the_noise_of_its_times():
    scheduler = DiscreteDDIMScheduler(8)
    objective = DiscreteObjective(scheduler, "cross_entropy")
    images, t = torch.rand(2, 1, 8, 8) * 2 - 1, torch.tensor([3, 900])
    noise = torch.randn(images.shape)
    batch = objective.noised(images, noise, t)
    assert torch.equal(batch.x0, quantize(images, 8))
    assert torch.equal(batch.tokens, scheduler.add_noise(batch.x0, noise, objective.timesteps(t)))
    assert torch.equal(batch.x, scheduler.scale_model_input(batch.tokens))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_the_bound_is_tight_for_the_best_network(eta):
    """The data is one token, uniform over two of three: one bit. Its x_0 and x_t are enumerated.

    The bound is tight if x_T, …, x_0 is a Markov chain, which holds for the posterior of η = 1 alone.
    """
    K, T, data = 3, 6, torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)
    scheduler = DiscreteDDIMScheduler(K, T, beta_schedule="jsd")
    alpha, one = torch.from_numpy(scheduler.alpha_bar), torch.eye(K, dtype=torch.float64)
    objective = DiscreteObjective(scheduler, "bound", eta)
    x0, x = torch.arange(K)[:, None].expand(K, K), torch.arange(K).expand(K, K)
    nats, bits = prior_nats(alpha[T].item(), K), 0.0
    for t in range(1, T + 1):
        of_x = alpha[t] * one + (1 - alpha[t]) / K  # q(x_t|x_0), rows x_0
        logits = (of_x * data[:, None]).log().T  # of x_0, rows x_t
        weights = data[:, None] * of_x
        wide = logits[x].movedim(-1, 1)
        mean = weights * step_nats(wide, x, x0, scheduler.posterior(t, t - 1, eta))
        nats += float(mean.nansum())
        batch = Corrupted(x0.reshape(-1, 1, 1, 1), x.reshape(-1, 1, 1, 1), x.float(), torch.full((K * K,), t))
        found = objective(logits[x.flatten()].view(-1, K, 1, 1), batch).view(K, K)
        bits += float((weights * found).nansum()) / T
    assert bits == pytest.approx(nats / math.log(2), abs=1e-4)
    assert abs(bits - 1) < 1e-6 if eta == 1 else 1 + 1e-3 < bits < 2, bits


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("noisiest", ["bayes", "independent"])
def test_the_cross_entropy_bounds_the_divergence_of_each_step(noisiest, eta):
    """KL ≤ (α_s − σ·α_t)·(−ln p̂(x_0)) by convexity (Appendix A), and without the weight for any q."""
    scheduler, t, s = DiscreteDDIMScheduler(5, noisiest=noisiest), 600, 400
    torch.manual_seed(0)
    logits, x0, x = 3 * torch.randn(50, 5, 5, 5), torch.randint(5, (50, 5, 5)), torch.randint(5, (50, 5, 5))
    nats = step_nats(logits, x, x0, scheduler.posterior(t, s, eta))
    entropy = torch.nn.functional.cross_entropy(logits, x0, reduction="none")
    alpha_t, alpha_s = scheduler.alpha_bar[[t, s]]
    sigma = (1 - eta) * (1 - alpha_s) / (1 - alpha_t)
    weight = alpha_s - sigma * alpha_t if noisiest == "independent" else 1.0
    assert (nats <= weight * entropy + 1e-6).all()
    assert nats.max() > 0.1


def test_the_bound_of_a_plan_sums_its_steps():
    """A network that knows nothing predicts one of K tokens, whatever the plan."""
    scheduler = DiscreteDDIMScheduler(4, 20)
    tokens = torch.randint(4, (3, 1, 5, 5))
    for S in (1, 4, 20):
        scheduler.set_timesteps(S)
        generator = torch.Generator().manual_seed(0)
        bits = bound_bits(lambda x, t: torch.zeros(3, 4, 5, 5), tokens, scheduler, generator, 1.0)
        assert bits.shape == (3,)
        assert (bits > 1.99).all() if S > 1 else bits == pytest.approx(2.0, abs=1e-3)
