"""Freeze folders as this version saves them, once, and commit them: python tests/golden/freeze.py VERSION"""

import json
import sys
from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler, UNet2DModel

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler

SAVED = Path(__file__).parent / "saved"
CALL = {"num_inference_steps": 5, "class_labels": [0, 2]}


def draw(pipe):
    """Two images of a frozen model, as nested lists in [0, 1]."""
    pipe.set_progress_bar_config(disable=True)
    seeds = [torch.Generator().manual_seed(i) for i in range(2)]
    return pipe(batch_size=2, generator=seeds, output_type="np", **CALL).images


def main(version):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "layers_per_block": 1}
    unet = UNet2DModel(
        4, 1, 1, block_out_channels=(4, 4), norm_num_groups=2, num_class_embeds=4, attention_head_dim=2, **blocks
    )
    settings = {"timestep_spacing": "quadratic", "beta_schedule": "sigmoid", "eta": 0.3}
    for kind, scheduler in {
        "ours": GeneralizedDDIMScheduler(prediction_type="v_prediction", **settings),
        "stock": DPMSolverMultistepScheduler(prediction_type="v_prediction"),
    }.items():
        folder = SAVED / f"{version}-{kind}"
        pipe = GeneralizedDDIMPipeline(unet, scheduler)
        pipe.save_pretrained(folder)
        (folder / "images.json").write_text(json.dumps(draw(pipe).tolist()) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
