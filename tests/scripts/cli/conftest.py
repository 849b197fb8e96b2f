"""Small models and pictures for the commands."""

import numpy as np
import pytest
import tiny_stable_diffusion
import torch
from PIL import Image

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler


@pytest.fixture(scope="session")
def model(make_unet, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "model"
    unet = make_unet(channels=3)
    torch.nn.init.normal_(unet.conv_out.weight, std=0.01, generator=torch.Generator().manual_seed(0))
    GeneralizedDDIMPipeline(unet, GeneralizedDDIMScheduler(timestep_spacing="leading")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text_to_image")
    scheduler = GeneralizedDDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    pipe = tiny_stable_diffusion.build(folder / "tokenizer", scheduler)
    torch.nn.init.normal_(pipe.unet.conv_out.weight, std=0.01, generator=torch.Generator().manual_seed(0))
    pipe.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Four files, as a shell lists them."""
    folder = tmp_path_factory.mktemp("pictures")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    files = [folder / f"{i}.png" for i in range(len(pixels))]
    for file, each in zip(files, pixels, strict=True):
        Image.fromarray(each).save(file)
    return files
