"""The parts of a small Stable Diffusion, with random weights."""

from pathlib import Path

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from .captions import LENGTH, write_tokenizer

SIZE, WIDTH = 32, 64
"""Side of the pictures, and width of the text encoder. Latents have a quarter of the side, in 4 channels."""

NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
NOISE |= {"set_alpha_to_one": False, "steps_offset": 1}
"""The schedule of Stable Diffusion."""


def build(autoencoder: tuple[int, ...], channels: tuple[int, ...], tokenizer: Path) -> StableDiffusionPipeline:
    """Build a pipeline, and write its vocabulary.

    Args:
        autoencoder: channels of the three levels of the autoencoder, multiples of 4.
        channels: channels of the two levels of the U-Net, multiples of 8.
        tokenizer: folder for the vocabulary.
    """
    vae = AutoencoderKL(
        block_out_channels=autoencoder,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIZE,
    )
    words = write_tokenizer(tokenizer)
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
        pad_token_id=len(words) - 1,
    )
    unet = UNet2DConditionModel(
        sample_size=SIZE // 4,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    parts = (vae, CLIPTextModel(text), words, unet, DDIMScheduler(**NOISE), None, None)
    return StableDiffusionPipeline(*parts, requires_safety_checker=False)
