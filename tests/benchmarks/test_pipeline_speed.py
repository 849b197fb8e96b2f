"""The pipeline's wall time over S calls of the bare network, ours and the stock DDIM pipeline's, in alternating runs.

Ratios are printed; nothing is asserted on time.
"""

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from timing import ROUNDS, keep, ratios

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler

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


@pytest.mark.parametrize("name", list(NETWORKS)[0 if ROUNDS >= 5 else 1 :])
def test_pipeline_over_bare_network(name, capsys):
    config, batch, steps = NETWORKS[name]
    if ROUNDS < 5:  # a test that it runs
        batch, steps = 1, 2
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
            output = unet(x, t)
        return output

    answer, forward = bare(), unet.forward

    def without_network(pipeline):
        """The pipeline's own share: its call with a network that answers at once."""

        def call():
            unet.forward = lambda *args, **kwargs: answer
            try:
                pipeline()
            finally:
                unet.forward = forward

        return call

    def run_ours():
        ours(batch, steps, output_type="pt")

    def run_stock():
        stock(batch, num_inference_steps=steps, output_type="pt")

    runs = {"bare": bare, "ours": run_ours, "stock": run_stock}
    runs |= {"ours without": without_network(run_ours), "stock without": without_network(run_stock)}
    taken = ratios(runs, base="bare", rounds=ROUNDS)
    keep("pipeline", taken, network=name, batch=batch, steps=steps)
    with capsys.disabled():
        print(
            f"\n{name}, B = {batch}, S = {steps}: whole calls {taken['ours']:.3f}, stock {taken['stock']:.3f}; ", end=""
        )
        own = f"{1 + taken['ours without']:.4f}, stock {1 + taken['stock without']:.4f}"
        print(f"network and the pipeline's own share {own} (bare network = 1)")
