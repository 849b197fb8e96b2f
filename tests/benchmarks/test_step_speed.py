"""The cost of one step, against the stock scheduler's on the same tensors. Nothing is asserted on time.

make bench
"""

from functools import partial

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from timing import ROUNDS, keep, ratios

from ddim_plugin import GeneralizedDDIMScheduler, MultistepDDIMScheduler

SHAPES = [(1, 1, 28, 28), (64, 3, 32, 32), (16, 3, 256, 256)]
IS_TEST = ROUNDS < 5  # only that it runs
if IS_TEST:
    SHAPES = SHAPES[:1]


@pytest.mark.parametrize("clip", [False, True], ids=["free", "clipped"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_step(benchmark, capsys, shape, eta, clip):
    """Seconds of our step as pytest-benchmark takes them; then, from alternating runs, how often ours fits into theirs.

    The stock step always makes x̂0, ours when it is asked for: both are shown. torch.add is the floor, two reads and a
    write.
    """
    x, out = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    ours, stock = GeneralizedDDIMScheduler(clip_sample=clip), DDIMScheduler(clip_sample=clip)
    for scheduler in (ours, stock):
        scheduler.set_timesteps(10)
    t = stock.timesteps[3]

    def step(scheduler):
        return scheduler.step(out, t, x, eta=eta)

    with torch.no_grad():
        assert benchmark(step, ours).prev_sample.shape == x.shape
        taken = ratios(
            {
                "ours": lambda: step(ours),
                "ours with x0": lambda: step(ours).pred_original_sample,
                "stock": lambda: step(stock),
                "torch.add": lambda: torch.add(x, out, alpha=-0.1),
            },
            base="ours",
            rounds=1 if IS_TEST else 20 * ROUNDS,
        )
    keep("step", taken, shape=shape, eta=eta, clip=clip)
    with capsys.disabled():
        print(f"\n{shape} eta={eta:g} {'clipped' if clip else 'free'}: ", end="")
        print(", ".join(f"{name} {ratio:.2f}" for name, ratio in taken.items()), "(ours = 1)")


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_multistep(benchmark, capsys, shape, prediction_type):
    """Plan and steps of a loop of ten, and those of diffusers' methods of order 3, over the ones of order 1."""
    x, out = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))

    def walk(scheduler):
        scheduler.set_timesteps(10)
        for t in scheduler.timesteps:
            last = scheduler.step(out, t, x).prev_sample
        return last

    kinds = {
        "generalized": GeneralizedDDIMScheduler(prediction_type=prediction_type),
        **{
            f"order {order}": MultistepDDIMScheduler(prediction_type=prediction_type, solver_order=order)
            for order in (1, 2, 3, 4)
        },
        "DPM-Solver++ 3M": DPMSolverMultistepScheduler(prediction_type=prediction_type, solver_order=3),
        "UniPC 3": UniPCMultistepScheduler(prediction_type=prediction_type, solver_order=3),
    }
    with torch.no_grad():
        walks = {name: partial(walk, scheduler) for name, scheduler in kinds.items()}
        assert benchmark(walks["order 3"]).shape == x.shape
        taken = ratios(walks, base="generalized", rounds=1 if IS_TEST else 2 * ROUNDS)
    keep("multistep", taken, shape=shape, prediction_type=prediction_type)
    with capsys.disabled():
        print(f"\n{shape} {prediction_type}: ", end="")
        print(", ".join(f"{name} {ratio:.2f}" for name, ratio in taken.items()))
