"""Small models and pictures for the commands."""

import functools

import diffusers
import numpy as np
import pytest
import tiny_flow_pipelines
import tiny_stable_diffusion
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler


@pytest.fixture(scope="session")
def model(make_unet, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "model"
    unet = make_unet(channels=3)
    torch.nn.init.normal_(unet.conv_out.weight, std=0.01, generator=torch.Generator().manual_seed(0))
    GeneralizedDDIMPipeline(unet, GeneralizedDDIMScheduler(timestep_spacing="leading")).save_pretrained(folder)
    return folder


def small_output(pipe):
    """Make the network change little, so that no step folds."""
    network = getattr(pipe, "unet", None) or pipe.transformer
    last = network.conv_out if hasattr(network, "conv_out") else network.proj_out
    torch.nn.init.normal_(last.weight, std=0.01, generator=torch.Generator().manual_seed(0))
    return pipe


def stable_diffusion(parts):
    scheduler = GeneralizedDDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    return diffusers.StableDiffusionPipeline(scheduler=scheduler, **parts)


def with_projection(parts):
    """The second text encoder of Stable Diffusion XL and 3, and its tokenizer."""
    torch.manual_seed(3)
    config = CLIPTextConfig.from_dict(parts["text_encoder"].config.to_dict() | {"projection_dim": 16})
    return CLIPTextModelWithProjection(config).eval(), parts["tokenizer"]


def t5(parts):
    """A text encoder, with the tokenizer of the other."""
    torch.manual_seed(4)
    config = T5Config(d_model=32, d_ff=16, d_kv=8, num_layers=1, num_heads=2, vocab_size=len(parts["tokenizer"]))
    return T5EncoderModel(config).eval(), parts["tokenizer"]


def stable_diffusion_xl(parts):
    names = {"cross_attention_dim": 32, "addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    names |= {"projection_class_embeddings_input_dim": 16 + 6 * 4}
    torch.manual_seed(1)
    unet = UNet2DConditionModel.from_config(parts["unet"].config, **names).eval()
    second = dict(zip(("text_encoder_2", "tokenizer_2"), with_projection(parts), strict=True))
    first = {name: parts[name] for name in ("vae", "text_encoder", "tokenizer")}
    scheduler = diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    return diffusers.StableDiffusionXLPipeline(unet=unet, scheduler=scheduler, **first, **second)


def stable_diffusion_3(parts):
    encoder, tokenizer = with_projection(parts)
    shape = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 1}
    shape |= {"attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 32, "pos_embed_max_size": 8}
    shape |= {"caption_projection_dim": 16, "pooled_projection_dim": 32}
    torch.manual_seed(1)
    transformer = diffusers.SD3Transformer2DModel(**shape).eval()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    vae, texts = tiny_flow_pipelines.kl(torch.float32), [encoder, tokenizer] * 2
    return diffusers.StableDiffusion3Pipeline(transformer, scheduler, vae, *texts, *t5(parts))


def flux(parts):
    torch.manual_seed(1)
    shape = {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16}
    shape |= {"num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 16}
    transformer = diffusers.FluxTransformer2DModel(**shape, axes_dims_rope=(4, 4, 8), guidance_embeds=True).eval()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**tiny_flow_pipelines.DEV)
    texts = [parts["text_encoder"], parts["tokenizer"], *t5(parts)]
    return diffusers.FluxPipeline(scheduler, tiny_flow_pipelines.kl(torch.float32), *texts, transformer)


TEXT_MODELS = {"SD": stable_diffusion, "SDXL": stable_diffusion_xl, "SD3": stable_diffusion_3, "Flux": flux}


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A function that saves a text-to-image model, once, and returns its folder."""
    folder = tmp_path_factory.mktemp("text_to_image")
    parts = tiny_stable_diffusion.parts(folder / "tokenizer")

    @functools.cache
    def save(name):
        small_output(TEXT_MODELS[name](parts)).save_pretrained(folder / name)
        return folder / name

    return save


@pytest.fixture(scope="session")
def text_model(saved):
    return saved("SD")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Four files, as a shell lists them."""
    folder = tmp_path_factory.mktemp("pictures")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    files = [folder / f"{i}.png" for i in range(len(pixels))]
    for file, each in zip(files, pixels, strict=True):
        Image.fromarray(each).save(file)
    return files
