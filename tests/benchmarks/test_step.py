"""The cost of one step, against the stock scheduler's on the same tensors. Nothing is asserted on time.

make bench      prints each group with its ratios: (1.0) is the fastest of the group
"""

import pytest
import torch
from diffusers import DDIMScheduler

from ddim_plugin import GeneralizedDDIMScheduler

SHAPES = {"1x1x28x28": (1, 1, 28, 28), "64x3x32x32": (64, 3, 32, 32), "16x3x256x256": (16, 3, 256, 256)}
SCHEDULERS = {"ours": GeneralizedDDIMScheduler, "stock": DDIMScheduler}


@pytest.mark.parametrize("name", ["ours", "ours and x0", "stock", "floor"])
@pytest.mark.parametrize("clip", [False, True], ids=["free", "clipped"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_step(benchmark, shape, eta, clip, name):
    """The stock step always makes x̂0, "ours and x0" asks for it too; "floor" is torch.add: two reads, one write."""
    benchmark.group = f"step {shape} eta={eta:g} {'clipped' if clip else 'free'}"
    x, out = torch.randn(2, *SHAPES[shape], generator=torch.Generator().manual_seed(0))
    if name == "floor":
        result = benchmark(torch.add, x, out, alpha=-0.1)
        assert result.shape == x.shape
        return
    scheduler = SCHEDULERS[name.split()[0]](clip_sample=clip)
    scheduler.set_timesteps(10)
    t = scheduler.timesteps[3]

    def step():
        result = scheduler.step(out, t, x, eta=eta)
        return (result.prev_sample, result.pred_original_sample) if name == "ours and x0" else result.prev_sample

    with torch.no_grad():
        result = benchmark(step)
    assert (result[0] if isinstance(result, tuple) else result).shape == x.shape
