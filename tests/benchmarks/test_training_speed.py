"""A step of the training loop over the bare forward, backward and optimiser step of its network, in alternating runs.

Ratios are printed; nothing is asserted on time.
"""

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from timing import ROUNDS, ratios
from trainer.config import TrainConfig
from trainer.report import Clock
from trainer.settings import build
from trainer.setup import build_run

BATCH = 32 if ROUNDS >= 5 else 2  # or a test that it runs
NETWORKS = {
    "1.7M": {
        "block_out_channels": [32, 64, 96],
        "layers_per_block": 1,
        "down_block_types": ["DownBlock2D"] * 3,
        "up_block_types": ["UpBlock2D"] * 3,
        "norm_num_groups": 16,
        "attention_head_dim": 16,
    },
    "0.1M": {
        "block_out_channels": [16, 32],
        "layers_per_block": 1,
        "down_block_types": ["DownBlock2D"] * 2,
        "up_block_types": ["UpBlock2D"] * 2,
        "norm_num_groups": 8,
        "attention_head_dim": 16,
    },
}


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("name", list(NETWORKS))
def test_loop_over_bare_network(name, precision, capsys, tmp_path):
    settings = {"output": str(tmp_path / "run"), "unet": NETWORKS[name], "resolution": 32, "flip": True}
    settings |= {"mixed_precision": precision, "trackers": ["none"], "batch_size": BATCH, "warmup_steps": 0}
    run = build_run(build(TrainConfig, settings))
    batches, clock, step = run.feed.batches(0), Clock(), iter(range(1, 10**9))
    x, noise = torch.randn(2, BATCH, 1, 32, 32)
    t = torch.randint(0, 1000, (BATCH,))

    def loop():
        run.step(next(step), batches, clock)

    def bare():
        with run.accelerator.autocast():
            output = run.unet(x, t).sample
        torch.nn.functional.mse_loss(output.float(), noise).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()

    taken = ratios({"bare": bare, "loop": loop}, base="bare", rounds=ROUNDS)
    batches.close()
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    with capsys.disabled():
        print(f"\nB = {BATCH}, 1×32×32, {name}, precision {precision}: loop {taken['loop']:.3f} (bare network = 1)")
