"""Pipelines of diffusers for flow matching, one for each family, tiny and randomly initialised.

`FLOW_FAMILIES` maps a name to a function (scheduler, dtype) → (pipeline, arguments of its call). Prompts are passed as
embeddings, so that no tokenizer is needed. `STOCK` has the scheduler of each family, with the settings of its models.
"""

import functools
from contextlib import contextmanager, nullcontext
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

SIZE = {"height": 16, "width": 16}
FLOW_FAMILIES: dict[str, Any] = {}
STOCK: dict[str, Any] = {}
IN_SIGMA = tuple(getattr(diffusers, f"{name}Pipeline") for name in ("Flux", "FluxImg2Img", "QwenImage", "ZImage"))
"""Pipelines whose networks take σ, not 1000·σ."""


def family(name, stock=FlowMatchEulerDiscreteScheduler, **settings):
    """Register a function under a name, with its stock scheduler."""

    def register(build):
        FLOW_FAMILIES[name], STOCK[name] = build, functools.partial(stock, **settings)
        return build

    return register


def normal(*shape, seed=5, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@functools.cache
def network(cls, dtype, **settings):
    """A network with random weights, of which none is zero: those that are until trained would hide the input."""
    torch.manual_seed(1)
    net = getattr(diffusers, cls)(**{key: list(v) if isinstance(v, tuple) else v for key, v in settings.items()})
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return torch.nn.Module.to(net.eval(), dtype)  # the method of diffusers warns of modules kept in float32


def kl(dtype):
    return network(
        "AutoencoderKL",
        dtype,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        shift_factor=0.1,
        scaling_factor=1.5,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def causal(cls, dtype, **settings):
    """The autoencoders of video models."""
    statistics = {"latents_mean": (0.1,) * 4, "latents_std": (1.2,) * 4}
    shape = {"base_dim": 8, "z_dim": 4, "dim_mult": (1, 2), "num_res_blocks": 1, "temperal_downsample": (False,)}
    return network(cls, dtype, **shape, **statistics, **settings)


def words(dtype, *shape, seed=7):
    return normal(*shape, seed=seed, dtype=dtype)


@family("Stable Diffusion 3", shift=3.0)
def stable_diffusion_3(scheduler, dtype):
    transformer = network(
        "SD3Transformer2DModel",
        dtype,
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
    )
    parts = dict.fromkeys([f"{what}{n}" for what in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")])
    pipe = diffusers.StableDiffusion3Pipeline(transformer, scheduler, kl(dtype), **parts)
    prompts = {"prompt_embeds": words(dtype, 1, 5, 16), "pooled_prompt_embeds": words(dtype, 1, 16)}
    prompts |= {f"negative_{key}": -value for key, value in prompts.items()}
    return pipe, {"guidance_scale": 3.0, **prompts, **SIZE}


@family("Stable Diffusion 3, dynamic shift", shift=3.0, use_dynamic_shifting=True, time_shift_type="linear")
def stable_diffusion_3_dynamic(scheduler, dtype):
    return stable_diffusion_3(scheduler, dtype)


def flux_parts(scheduler, dtype, **settings):
    transformer = network(
        "FluxTransformer2DModel",
        dtype,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        **settings,
    )
    texts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    prompts = {"prompt_embeds": words(dtype, 1, 5, 16), "pooled_prompt_embeds": words(dtype, 1, 16)}
    return {"scheduler": scheduler, "vae": kl(dtype), "transformer": transformer, **texts}, prompts | SIZE


DEV = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}


@family("Flux", **DEV)
def flux(scheduler, dtype):
    parts, call = flux_parts(scheduler, dtype, guidance_embeds=True)
    return diffusers.FluxPipeline(**parts), call


@family("Flux, distilled", shift=1.0)
def flux_schnell(scheduler, dtype):
    parts, call = flux_parts(scheduler, dtype)
    return diffusers.FluxPipeline(**parts), call


def picture(seed=3):
    return torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


@family("Flux, image to image", **DEV)
def flux_image_to_image(scheduler, dtype):
    parts, call = flux_parts(scheduler, dtype)
    return diffusers.FluxImg2ImgPipeline(**parts), call | {"image": picture().to(dtype), "strength": 0.6}


@family("Flux, inpainting", **DEV)
def flux_inpainting(scheduler, dtype):
    parts, call = flux_parts(scheduler, dtype)
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1
    call |= {"image": picture().to(dtype), "mask_image": mask, "strength": 0.8}
    return diffusers.FluxInpaintPipeline(**parts), call


def wan_parts(scheduler, dtype):
    transformer = network(
        "WanTransformer3DModel",
        dtype,
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=32,
    )
    vae = causal("AutoencoderKLWan", torch.float32, scale_factor_temporal=4, scale_factor_spatial=2)
    pipe = diffusers.WanPipeline(None, None, vae, scheduler, transformer)
    prompts = {"prompt_embeds": words(dtype, 1, 5, 16), "negative_prompt_embeds": words(dtype, 1, 5, 16, seed=8)}
    return pipe, {"num_frames": 1, "guidance_scale": 3.0, **prompts, **SIZE}


@family("Wan", UniPCMultistepScheduler, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
def wan(scheduler, dtype):
    return wan_parts(scheduler, dtype)


@family("Wan, Euler", shift=5.0)
def wan_euler(scheduler, dtype):
    return wan_parts(scheduler, dtype)


@family("Qwen-Image", **DEV | {"base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02})
def qwen_image(scheduler, dtype):
    transformer = network(
        "QwenImageTransformer2DModel",
        dtype,
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    pipe = diffusers.QwenImagePipeline(scheduler, causal("AutoencoderKLQwenImage", dtype), None, None, transformer)
    call = {"true_cfg_scale": 2.0}
    for sign, name in ((1, ""), (-1, "negative_")):
        call |= {f"{name}prompt_embeds": sign * words(dtype, 1, 5, 16)}
        call |= {f"{name}prompt_embeds_mask": torch.ones(1, 5, dtype=torch.long)}
    return pipe, call | SIZE


@family("Z-Image", shift=3.0)
def z_image(scheduler, dtype):
    transformer = network(
        "ZImageTransformer2DModel",
        dtype,
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=(8, 4, 4),
        axes_lens=(256, 32, 32),
    )
    pipe = diffusers.ZImagePipeline(scheduler, kl(dtype), None, None, transformer)
    return pipe, {"prompt_embeds": [words(dtype, 5, 16)], "guidance_scale": 0.0, **SIZE}


@contextmanager
def flow_denoiser(pipe, share=0.3):
    """Make the random network a part of a denoiser: the velocity of N(0, 1) data, plus `share` of its output."""

    def mixed(module, args, kwargs, output):
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        t = (kwargs["timestep"] if "timestep" in kwargs else args[1]).float().flatten()[0]
        out, sign = output[0], 1
        if isinstance(pipe, diffusers.ZImagePipeline):  # its time and its output are turned around, and x is a list
            t, sign = 1 - t, -1
        σ = t if isinstance(pipe, IN_SIGMA) else t / 1000
        slope = (2 * σ - 1) / ((1 - σ) ** 2 + σ**2)
        if isinstance(out, list):
            return ([sign * slope.to(o) * each + share * o for each, o in zip(x, out, strict=True)],)
        return (slope.to(out) * x + share * out,)

    hook = pipe.transformer.register_forward_hook(mixed, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def run_flow(name, scheduler, dtype=torch.float32, steps=6, seed=11, within=lambda pipe: nullcontext(), **more):
    """Call a pipeline within a context, and return the timesteps and samples of its steps, and its picture."""
    pipe, call = FLOW_FAMILIES[name](scheduler, dtype)
    pipe.set_progress_bar_config(disable=True)
    times, samples, step = [], [], scheduler.step

    @functools.wraps(step)  # pipelines read the signature
    def recorded(model_output, timestep, sample, *args, **kwargs):
        result = step(model_output, timestep, sample, *args, **kwargs)
        times.append(float(timestep))
        samples.append(result[0].clone())
        return result

    scheduler.step = recorded
    call |= {"num_inference_steps": steps, "generator": torch.Generator().manual_seed(seed), "output_type": "pt"}
    try:
        with within(pipe):
            made = pipe(**call | more)
    finally:
        del scheduler.step
    return times, samples, torch.as_tensor(made[0] if hasattr(made, "frames") else made.images)
