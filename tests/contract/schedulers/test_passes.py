"""A step is few passes over memory, and reads nothing on the host."""

import math

import pytest
import torch
from exact import weighed
from plans import SHAPE, planned, tensors
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddim_plugin import (
    GeneralizedDDIMScheduler,
    InverseDDIMScheduler,
    InverseMultistepDDIMScheduler,
    MultistepDDIMScheduler,
)

CLASSES = [GeneralizedDDIMScheduler, InverseDDIMScheduler, MultistepDDIMScheduler, InverseMultistepDDIMScheduler]


class CountPasses(TorchDispatchMode):
    """Counts the kernels that write a tensor as large as the sample, or read one and write something else."""

    VIEWS = ("view", "_unsafe_view", "expand", "slice", "split", "t", "unsqueeze", "alias", "detach", "as_strided")

    def __init__(self, size):
        super().__init__()
        self.size, self.kernels = size, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        name = func.name().removeprefix("aten::").split(".")[0]
        if name not in self.VIEWS:
            large = [each for each in tree_leaves((args, kwargs, made)) if isinstance(each, torch.Tensor)]
            self.kernels += [name] if any(each.numel() >= self.size for each in large) else []
        return made


def passes(scheduler, *, clipped=False, plain=True, learned=False, **step):
    """The kernels of each step of a plan, with a new sample and output each."""
    counts = []
    for i, t in enumerate(scheduler.timesteps):
        out, x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(i))
        out = torch.cat([out, out], dim=1) if learned else out
        with CountPasses(math.prod(SHAPE)) as count:
            scheduler.step(out, t, x, return_dict=plain, **step)
        counts.append(count.kernels)
    return counts


def test_the_count_counts():
    x = torch.ones(SHAPE)
    with CountPasses(x.numel()) as count:
        y = x * 2 + x
        y.view(-1)[:3].add_(1)
        y.sum()
        torch.ones(3) + 1
    assert count.kernels == ["mul", "add", "sum"]


@pytest.mark.parametrize("plain", [True, False], ids=["output", "tuple"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("cls", CLASSES)
def test_a_free_step_is_two_passes(cls, prediction_type, plain):
    """And one more for each earlier value that a multistep method adds, and to keep a copy of the output."""
    config = {"refinement_steps": None} if cls is InverseDDIMScheduler else {}
    found = passes(planned(6, cls, prediction_type=prediction_type, **config), plain=plain)
    earlier = [0] * 6
    if issubclass(cls, MultistepDDIMScheduler):
        earlier = [0, 1, 2, 2, 2, 2]
        if prediction_type != "epsilon":  # its values are ε̂, which has to be made
            earlier = [each + 2 for each in earlier]
        else:
            earlier = [each + 1 for each in earlier]
            earlier[0] += cls is MultistepDDIMScheduler  # the first one has to be made, from T
    for kernels, more in zip(found, earlier, strict=True):
        assert len(kernels) <= 2 + more, kernels


def test_a_fitted_step_is_as_many_passes(refuse_host_reads):
    """Its weights are numbers of the plan: two passes, one for each earlier value, and one to keep ε̂."""
    usual = planned(6, MultistepDDIMScheduler)
    rows = [[1.01 * weight for weight in row] for row in weighed(usual).values()]
    known = {"noise": [usual.path.level(t).noise for t, _ in usual._pairs], "weights": rows, "solver_order": 3}
    known |= {"timesteps": usual.timesteps.tolist(), "prediction_type": "epsilon", "guidance_scale": None}
    scheduler = planned(6, MultistepDDIMScheduler, fitted_solvers={"6": known})
    assert [*scheduler._solver.values()] == rows
    assert [len(kernels) for kernels in passes(scheduler)] == [4, 4, 5, 5, 5, 4]
    assert [len(kernels) for kernels in passes(usual)] == [4, 4, 5, 5, 5, 4]
    out, x = tensors()
    with refuse_host_reads:
        for t in scheduler.timesteps:
            x = scheduler.step(out, t, x).prev_sample


@pytest.mark.parametrize("plain", [True, False], ids=["output", "tuple"])
@pytest.mark.parametrize("cls", [GeneralizedDDIMScheduler, MultistepDDIMScheduler])
def test_noise_is_one_pass_more(cls, plain):
    found = passes(
        planned(6, cls, solver_order=1, eta=0.3) if cls is not GeneralizedDDIMScheduler else planned(6, eta=1.0),
        plain=plain,
        variance_noise=tensors()[0],
    )
    assert [len(kernels) for kernels in found] == [3] * 5 + [2]


@pytest.mark.parametrize("plain", [True, False], ids=["output", "tuple"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_a_clipped_step_is_at_most_six_passes(prediction_type, recompute, plain):
    scheduler = planned(6, prediction_type=prediction_type, clip_sample=True, use_clipped_model_output=recompute)
    for kernels in passes(scheduler, plain=plain):
        assert {"clamp", "clamp_"} & set(kernels)
        assert len(kernels) <= 6, kernels


@pytest.mark.parametrize("config", [{"clip_sample": True}, {"thresholding": True}])
def test_a_tuple_computes_x0_when_it_is_read(config):
    for each in ({}, config):
        scheduler = planned(6, **each)
        out, x = tensors()
        result = scheduler.step(out, scheduler.timesteps[2], x)
        pair = scheduler.step(out, scheduler.timesteps[2], x, return_dict=False)
        prev_sample, x0 = pair
        assert torch.equal(prev_sample, result.prev_sample)
        assert torch.equal(x0, result.pred_original_sample)
        assert pair[0] is prev_sample
        assert torch.equal(pair[1], x0)
        assert torch.equal(pair[:2][1], x0)
        assert torch.equal(pair[-1], x0)


# ---- nothing is read on the host -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"eta": 1.0},
        {"clip_sample": True, "eta": 0.5},
        {"variance_type": "fixed_large"},
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        {"variance_type": "learned_range"},
        {"thresholding": True},
    ],
)
@pytest.mark.parametrize("cls", CLASSES)
def test_a_step_reads_nothing_on_the_host(refuse_host_reads, cls, config):
    if issubclass(cls, InverseDDIMScheduler | InverseMultistepDDIMScheduler):
        config = {key: value for key, value in config.items() if key != "eta" and value != "fixed_large"}
    scheduler = planned(10, cls, **config)
    out, x = tensors()
    if config.get("variance_type") == "learned_range":
        out = torch.cat([out, out], dim=1)
    recompute = None if issubclass(cls, InverseDDIMScheduler | InverseMultistepDDIMScheduler) else True
    with refuse_host_reads:
        for t in scheduler.timesteps:
            result = scheduler.step(out, t, x, use_clipped_model_output=recompute)
            x, _, _, _, _ = result.to_tuple()
    with pytest.raises(AssertionError, match="_local_scalar_dense"), refuse_host_reads:
        scheduler.step(out, scheduler.timesteps[0].clone(), x)  # the guard itself works


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("cls", CLASSES)
def test_a_loop_on_tensors_without_values(cls, dtype):
    """The loop of a stock pipeline, with guidance, where a tensor's value cannot be read."""
    scheduler = planned(7, cls, **({"refinement_steps": 2} if "Inverse" in cls.__name__ else {}))
    times = scheduler.timesteps.tolist()
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.randn(2, 4, 16, 16, dtype=dtype)
        for t in times:
            seen = scheduler.scale_model_input(torch.cat([x] * 2), t)
            text, free = torch.tanh(seen).chunk(2)
            x = scheduler.step(free + 2.0 * (text - free), t, x, return_dict=False)[0]
        assert (x.dtype, x.shape) == (dtype, (2, 4, 16, 16))
        with pytest.raises(DataDependentOutputException):
            bool((x > 0).all())


@pytest.mark.parametrize("cls", CLASSES)
def test_timesteps_on_a_device_are_never_read(cls):
    """On the meta device no tensor has values, so that whatever would read one fails."""
    scheduler = cls(clip_sample=True)
    scheduler.set_timesteps(10, device="meta")
    x = torch.empty(SHAPE, device="meta")
    times = torch.empty(3, dtype=torch.int64, device="meta")
    for t in scheduler.timesteps:
        assert scheduler.step(x, t, x).prev_sample.shape == SHAPE
    assert scheduler.add_noise(x, x, times).shape == SHAPE
    assert scheduler.get_velocity(x, x, times).shape == SHAPE


def test_times_for_each_sample_on_a_device_are_never_read():
    scheduler = GeneralizedDDIMScheduler(eta=0.5, clip_sample=True)
    scheduler.set_timesteps(10, device="meta")
    x = torch.empty(SHAPE, device="meta")
    times = torch.empty(3, dtype=torch.int64, device="meta")
    assert scheduler.step(x, times, x).prev_sample.shape == SHAPE
