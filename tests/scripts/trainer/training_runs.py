"""Short runs of training on digits, and their comparison."""

import torch
import train
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file
from trainer.config import TrainConfig
from trainer.report import read_log
from trainer.settings import build

UNET = {
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
    "attention_head_dim": 8,
    "dropout": 0.1,
}
SMALL = {
    "unet": UNET,
    "steps": 6,
    "batch_size": 8,
    "warmup_steps": 3,
    "learning_rate": 1e-3,
    "log_every": 1,
    "trackers": ["none"],
    "preview_every": 0,
    "checkpoint_every": 3,
}
WEIGHTS = ("unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.non_ema.safetensors")


def forget_accelerate():
    """Accelerate keeps its settings for the whole process."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def fit(output, **settings):
    return train.main(build(TrainConfig, SMALL | {"output": str(output)} | settings))


def same_weights(one, other):
    for name in WEIGHTS:
        first, second = load_file(one / name), load_file(other / name)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first), name


def losses(folder):
    return {line["step"]: line["loss"] for line in read_log(folder / "log.jsonl") if "loss" in line}


def fit_whole_and_resumed(folder, **settings):
    """A run of six steps, and one that goes on after three, which end alike; the folder of the first."""
    fit(folder / "whole", **settings)
    fit(folder / "part", **settings | {"steps": 3})
    fit(folder / "part", resume="latest", **settings)
    same_weights(folder / "whole", folder / "part")
    assert losses(folder / "whole") == losses(folder / "part")
    return folder / "whole"
