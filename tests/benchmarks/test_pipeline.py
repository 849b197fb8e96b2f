"""The pipeline's wall time over S calls of the bare network, ours and the stock DDIM pipeline's, in alternating runs.

Ratios are printed; nothing is asserted on time. DDIM_BENCH_ROUNDS sets how many rounds are run (default 1; `make bench`
runs 15).
"""

import os
import time
from statistics import median

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler

ROUNDS = int(os.environ.get("DDIM_BENCH_ROUNDS", "1"))

CIFAR10 = {  # the paper's network, 35.7M parameters
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "downsample_padding": 0,
    "norm_eps": 1e-6,
    "norm_num_groups": 32,
    "attention_head_dim": None,
}
SMALL = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "norm_num_groups": 16,
}
NETWORKS = {
    "the paper's CIFAR-10 network": (CIFAR10, 1, 4),
    "8x8, 0.7M": ({**SMALL, "sample_size": 8}, 16, 50),
    "64x64, 0.7M": ({**SMALL, "sample_size": 64}, 8, 10),
}


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@pytest.mark.parametrize("name", list(NETWORKS))
def test_pipeline_over_bare_network(name, capsys):
    config, batch, steps = NETWORKS[name]
    torch.manual_seed(0)
    unet = UNet2DModel(in_channels=3, out_channels=3, **config).eval()
    if name.startswith("the paper"):
        assert sum(parameter.numel() for parameter in unet.parameters()) == 35_746_307
    ours = GeneralizedDDIMPipeline(unet, GeneralizedDDIMScheduler(clip_sample=True))
    stock = DDIMPipeline(unet, DDIMScheduler())
    for pipe in (ours, stock):
        pipe.set_progress_bar_config(disable=True)
    x = torch.randn(batch, *(3, config["sample_size"], config["sample_size"]))
    times = torch.arange(999, -1, -1000 // steps)[:steps]

    @torch.no_grad()
    def bare():
        for t in times:
            unet(x, t)

    runs = {
        "bare": bare,
        "ours": lambda: ours(batch, steps, output_type="pt"),
        "stock": lambda: stock(batch, num_inference_steps=steps, output_type="pt"),
    }
    taken = {key: [] for key in runs}
    for function in runs.values():
        function()
    for _ in range(ROUNDS):
        for key, function in runs.items():
            taken[key].append(seconds(function))
    ratios = {
        key: median(mine / other for mine, other in zip(taken[key], taken["bare"], strict=True))
        for key in ("ours", "stock")
    }
    assert all(ratio > 0 for ratio in ratios.values())
    with capsys.disabled():
        print(f"\n{name}, B = {batch}, S = {steps}: ", end="")
        print(", ".join(f"{key} {ratio:.3f} of the bare network" for key, ratio in ratios.items()))
