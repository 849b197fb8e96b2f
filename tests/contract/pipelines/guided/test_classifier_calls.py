"""Calls with a classifier: batches, half precision, refusals before the network runs."""

import warnings

import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

from ddim_plugin import fit_solver


class Small(nn.Module):
    """Logits of three classes, each image by itself."""

    def __init__(self, channels=1):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 3))

    def forward(self, x, t):
        return self.net(x) * (1 + 0.001 * t[:, None].to(x.dtype))


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_an_image_depends_on_no_other(make_pipe, eta):
    pipe, call = make_pipe(), {"classifier": Small(), "classifier_scale": 30.0, "eta": eta, "output_type": "latent"}
    together = pipe(2, 4, class_labels=[1, 2], generator=seeds(1, 2), **call).images
    alone = [pipe(1, 4, class_labels=k, generator=seeds(k), **call).images for k in (1, 2)]
    assert torch.allclose(together, torch.cat(alone), rtol=1e-5, atol=1e-3)
    other = pipe(2, 4, class_labels=0, generator=seeds(1, 2), **call).images
    assert (other - together).abs().max() > 0.01
    assert all(parameter.grad is None for parameter in call["classifier"].parameters())


def test_labels_of_network_and_classifier_are_the_same(make_pipe):
    """Also with classifier-free guidance, whose scale is that of the network alone."""
    pipe = make_pipe(num_class_embeds=4)
    call = {"generator": seeds(5), "guidance_scale": 2.0, "output_type": "latent", "class_labels": [2]}
    free = pipe(1, 1, timesteps=None, **call).images
    call["generator"] = seeds(5)
    x = torch.randn(1, 1, 8, 8, generator=seeds(5)[0])
    pipe.scheduler.set_timesteps(1)
    level = pipe.scheduler.path.level(int(pipe.scheduler.timesteps[0]) + 1)
    guided, classifier = x.clone().requires_grad_(), Small()
    log = classifier(guided, pipe.scheduler.timesteps).log_softmax(1)[0, 2]
    (gradient,) = torch.autograd.grad(log, guided)
    both = pipe(1, 1, classifier=classifier, classifier_scale=3.0, **call).images
    assert torch.allclose(both, free + level.noise**2 / level.signal * 3 * gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_half_precision_of_either(make_pipe, dtype, eta):
    call = {"classifier_scale": 5.0, "eta": eta, "class_labels": 1, "output_type": "latent"}
    whole = make_pipe()(1, 3, classifier=Small(), generator=seeds(1), **call).images
    half = make_pipe()(1, 3, classifier=Small().to(dtype), generator=seeds(1), **call).images
    assert half.dtype == torch.float32
    assert torch.allclose(half, whole, atol=0.02 * float(whole.abs().max()))
    network = make_pipe().to(dtype)
    assert network(1, 3, classifier=Small(), generator=seeds(1), **call).images.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_any_integers(make_pipe, dtype):
    pipe, call = make_pipe(num_class_embeds=4), {"classifier": Small(), "output_type": "latent"}
    made = [
        pipe(2, 3, generator=seeds(1, 2), class_labels=labels, **call).images
        for labels in ([1, 2], torch.tensor([1, 2], dtype=dtype))
    ]
    assert torch.equal(*made)


def test_in_inference_mode(make_pipe):
    call = {"class_labels": 1, "classifier": Small(), "output_type": "latent", "classifier_scale": 9.0}
    plain = make_pipe()(1, 3, generator=seeds(1), **call).images
    with torch.inference_mode():
        assert torch.equal(make_pipe()(1, 3, generator=seeds(1), **call).images, plain)


CALL = {"classifier": Small(), "class_labels": 1}


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"classifier_scale": 2.0}, "classifier_scale=2.0 has no effect without a classifier"),
        ({"classifier": Small()}, "a classifier needs integers as class_labels, not None"),
        ({"classifier": Small(), "class_labels": 0.5}, "integers as class_labels, not 0.5"),
        ({"classifier": Small(), "class_labels": [1, 3]}, r"class_labels must lie in 0..2, not \[1, 3\]"),
        ({"classifier": Small(), "class_labels": -1}, r"class_labels must lie in 0..2, not \[-1, -1\]"),
        ({"classifier": Small(), "class_labels": [1]}, "1 class_labels for a batch of 2"),
        (CALL | {"classifier_scale": float("nan")}, "classifier_scale must be a finite number, not nan"),
        (CALL | {"classifier_scale": "2"}, "classifier_scale must be a finite number, not '2'"),
        (CALL | {"guidance_scale": None}, "guidance_scale must be a finite number, not None"),
        ({"guidance_scale": float("inf")}, "guidance_scale must be a finite number, not inf"),
        ({"classifier": lambda x, t: x.mean(), "class_labels": 1}, r"logits \(2, K\), not Tensor of shape \(\)"),
        ({"classifier": lambda x, t: x[:1, :, 0, 0], "class_labels": 0}, r"not Tensor of shape \(1, 1\)"),
        (
            {"classifier": lambda x, t: x.detach()[:, 0, 0], "class_labels": 0},
            r"shape \(2, 8\) with requires_grad=False",
        ),
        ({"classifier": lambda x, t: {"logits": x}, "class_labels": 0}, "not dict of shape"),
    ],
)
def test_bad_calls_fail_before_the_network_runs(make_pipe, call, message, eta):
    pipe = make_pipe()
    pipe.unet.forward = lambda *args, **kwargs: pytest.fail("the network was evaluated")
    with pytest.raises(ValueError, match=message):
        pipe(2, 3, eta=eta, **call)
    with pytest.raises(ValueError, match=message):
        pipe.decode(torch.zeros(2, 1, 8, 8), 3, **call)


def test_schedulers_of_diffusers_are_refused(make_pipe):
    pipe = make_pipe(DDIMScheduler())
    with pytest.raises(
        ValueError,
        match="a classifier and self-conditioning need a GeneralizedDDIMScheduler of ddim_plugin, not diffusers",
    ):
        pipe(1, 3, class_labels=0, classifier=Small())


def test_solvers_that_were_fitted_without_a_classifier(make_pipe):
    """They are not used with one, and none is fitted with one."""
    pipe = make_pipe()
    with pytest.raises(ValueError, match="classifier cannot be passed on"):
        fit_solver(pipe, [3], 4, classifier=Small(), class_labels=0)
    fit_solver(pipe, [3], 8, teacher_steps=10)
    assert "3" in pipe.scheduler.config.fitted_solvers
    with pytest.warns(UserWarning, match="fitted for guidance_scale=1.0, not inf"):
        pipe(1, 3, class_labels=0, classifier=Small())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe(1, 3)
