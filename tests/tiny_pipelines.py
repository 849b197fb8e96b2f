"""Pipelines of diffusers, one for each family, tiny and randomly initialised.

`FAMILIES` maps a name to a function (parts, scheduler) → (pipeline, arguments of its call).
"""

import functools
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any

import diffusers
import tiny_stable_diffusion
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel
from transformers import GPT2Config, GPT2LMHeadModel, SpeechT5HifiGan, SpeechT5HifiGanConfig, T5Config, T5EncoderModel

from ddim_plugin import GeneralizedDDIMPipeline

SIZE = {"height": 16, "width": 16}
SD = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
FAMILIES: dict[str, Any] = {}


def family(name):
    """Register a function under the name that the table of the reference uses."""

    def register(build):
        FAMILIES[name] = build
        return build

    return register


def uniform(*shape, seed=3):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def normal(*shape, seed=5):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small_transformer(cls, **settings):
    """A transformer of one layer, with random weights of which none is zero."""
    torch.manual_seed(2)
    shape = {"sample_size": 8, "num_layers": 1, "patch_size": 2, "num_attention_heads": 2, "attention_head_dim": 8}
    net = cls(in_channels=4, out_channels=8, **shape, **settings).eval()
    for weight in net.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    return net


class Parts:
    """The networks of all families. Each is built when it is first used, and shared."""

    def __init__(self, folder):
        self.stable_diffusion = tiny_stable_diffusion.parts(folder)

    def conditional_unet(self, **config):
        torch.manual_seed(1)
        settings = {k: v for k, v in self.stable_diffusion["unet"].config.items() if not k.startswith("_")}
        return UNet2DConditionModel(**settings | config).eval()

    @cached_property
    def edit(self):
        """A network that also reads the latents of a picture."""
        return self.conditional_unet(in_channels=8)

    @cached_property
    def upscale(self):
        return self.conditional_unet(in_channels=7, num_class_embeds=8)

    @cached_property
    def inpaint(self):
        """A network that also reads a mask and the latents of the masked picture."""
        return self.conditional_unet(in_channels=9)

    @cached_property
    def adapter(self):
        """Features of a picture, for `adapted`."""
        torch.manual_seed(2)
        return diffusers.T2IAdapter(in_channels=3, channels=[8, 16], num_res_blocks=1, downscale_factor=2).eval()

    @cached_property
    def adapted(self):
        cross = {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2}
        return self.conditional_unet(**cross)

    @cached_property
    def pixart(self):
        return small_transformer(diffusers.PixArtTransformer2DModel, cross_attention_dim=16, caption_channels=16)

    @cached_property
    def learned(self):
        """A network with a learned variance."""
        return self.conditional_unet(out_channels=8)

    @cached_property
    def xl(self):
        return self.conditional_unet(
            addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=16 + 24
        )

    @cached_property
    def controlnet(self):
        torch.manual_seed(2)
        unet = self.stable_diffusion["unet"]
        net = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16)).eval()
        for block in [*net.controlnet_down_blocks, net.controlnet_mid_block]:  # zero until trained
            torch.nn.init.normal_(block.weight, std=0.2)
        return net

    @cached_property
    def motion(self):
        torch.manual_seed(2)
        return diffusers.MotionAdapter(
            block_out_channels=(8, 16),
            motion_layers_per_block=1,
            motion_num_attention_heads=2,
            motion_norm_num_groups=4,
        ).eval()

    @cached_property
    def audio(self):
        torch.manual_seed(2)
        unet = diffusers.AudioLDM2UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=2,
        )
        vae = AutoencoderKL(
            in_channels=1,
            out_channels=1,
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
        )
        voice = SpeechT5HifiGanConfig(
            model_in_dim=8,
            upsample_initial_channel=8,
            upsample_rates=[2, 2],
            upsample_kernel_sizes=[4, 4],
            resblock_kernel_sizes=[3],
            resblock_dilation_sizes=[[1, 3]],
            normalize_before=False,
        )
        text = {"num_layers": 1, "num_heads": 2, "vocab_size": 8}
        text = T5EncoderModel(T5Config(d_model=16, d_ff=16, d_kv=8, **text))
        language = GPT2LMHeadModel(GPT2Config(n_embd=16, n_head=2, n_layer=1, vocab_size=8, n_positions=8))
        absent = ("text_encoder", "tokenizer", "tokenizer_2", "feature_extractor", "projection_model")
        networks = {"unet": unet, "vae": vae, "vocoder": SpeechT5HifiGan(voice)}
        networks |= {"text_encoder_2": text, "language_model": language}
        return dict.fromkeys(absent) | {name: network.eval() for name, network in networks.items()}

    @cached_property
    def transformer(self):
        return small_transformer(diffusers.DiTTransformer2DModel, norm_num_groups=4)

    @cached_property
    def unconditional(self):
        return self.unconditional_unet()

    @cached_property
    def unconditional_learned(self):
        return self.unconditional_unet(out_channels=6)

    @staticmethod
    def unconditional_unet(out_channels=3):
        torch.manual_seed(4)
        return UNet2DModel(
            sample_size=8,
            in_channels=3,
            out_channels=out_channels,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
        ).eval()


@family("Stable Diffusion, text to image")
def text_to_image(parts, scheduler, unet=None):
    networks = parts.stable_diffusion | ({} if unet is None else {"unet": unet})
    pipe = diffusers.StableDiffusionPipeline(scheduler=scheduler, **networks)
    return pipe, {"prompt": "a cat", "output_type": "latent", **SIZE}


@family("Stable Diffusion, image to image")
def image_to_image(parts, scheduler, unet=None):
    networks = parts.stable_diffusion | ({} if unet is None else {"unet": unet})
    pipe = diffusers.StableDiffusionImg2ImgPipeline(scheduler=scheduler, **networks)
    return pipe, {"prompt": "a cat", "image": uniform(1, 3, 16, 16), "strength": 0.7, "output_type": "latent"}


@family("Stable Diffusion, inpainting")
def inpainting(parts, scheduler):
    """With a network of four channels, the pipeline replaces the known region by `add_noise` after each step."""
    pipe = diffusers.StableDiffusionInpaintPipeline(scheduler=scheduler, **parts.stable_diffusion)
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1
    pictures = {"image": uniform(1, 3, 16, 16), "mask_image": mask}
    return pipe, {"prompt": "a cat", "strength": 0.8, "output_type": "latent", **pictures, **SIZE}


@family("Stable Diffusion, inpainting with 9 channels")
def inpainting_9(parts, scheduler):
    """The network reads the mask and the masked picture, and the pipeline replaces nothing."""
    networks = parts.stable_diffusion | {"unet": parts.inpaint}
    pipe = diffusers.StableDiffusionInpaintPipeline(scheduler=scheduler, **networks)
    return pipe, inpainting(parts, scheduler)[1] | {"strength": 1.0}


@family("InstructPix2Pix")
def instruct_pix2pix(parts, scheduler):
    parts, unet = parts.stable_diffusion, parts.edit
    pipe = diffusers.StableDiffusionInstructPix2PixPipeline(scheduler=scheduler, **parts | {"unet": unet})
    return pipe, {"prompt": "a cat", "image": uniform(1, 3, 16, 16), "output_type": "latent"}


def _xl(parts):
    texts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    return texts | {"unet": parts.xl, "vae": parts.stable_diffusion["vae"], "add_watermarker": False}


def _xl_prompt():
    names = ("prompt_embeds", "negative_prompt_embeds")
    pooled = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    prompts = {name: normal(1, 7, 16, seed=i) for i, name in enumerate(names)}
    return prompts | {name: normal(1, 16, seed=i) for i, name in enumerate(pooled)}


@family("Stable Diffusion XL")
def stable_diffusion_xl(parts, scheduler):
    pipe = diffusers.StableDiffusionXLPipeline(scheduler=scheduler, **_xl(parts))
    return pipe, {"output_type": "latent", **_xl_prompt(), **SIZE}


def refiner(parts, scheduler):
    """The image-to-image pipeline that finishes what `stable_diffusion_xl` began."""
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline(scheduler=scheduler, **_xl(parts))
    return pipe, {"output_type": "latent", **_xl_prompt()}


@family("Stable Diffusion XL, image to image")
def xl_image_to_image(parts, scheduler):
    pipe, call = refiner(parts, scheduler)
    return pipe, call | {"image": uniform(1, 3, 16, 16), "strength": 0.7}


@family("ControlNet")
def controlnet(parts, scheduler):
    pipe = diffusers.StableDiffusionControlNetPipeline(
        scheduler=scheduler, controlnet=parts.controlnet, **parts.stable_diffusion
    )
    return pipe, {"prompt": "a cat", "image": uniform(1, 3, 16, 16), "output_type": "latent", **SIZE}


@family("T2I-Adapter")
def t2i_adapter(parts, scheduler):
    networks = {**parts.stable_diffusion, "unet": parts.adapted, "adapter": parts.adapter}
    pipe = diffusers.StableDiffusionAdapterPipeline(scheduler=scheduler, **networks)
    return pipe, {"prompt": "a cat", "image": uniform(1, 3, 16, 16), "output_type": "latent", **SIZE}


@family("PAG")
def perturbed_attention(parts, scheduler):
    networks = parts.stable_diffusion
    pipe = diffusers.StableDiffusionPAGPipeline(scheduler=scheduler, pag_applied_layers=["mid"], **networks)
    return pipe, {"prompt": "a cat", "pag_scale": 2.0, "output_type": "latent", **SIZE}


@family("Upscaling")
def upscaling(parts, scheduler):
    names = ("vae", "text_encoder", "tokenizer")
    networks = {name: parts.stable_diffusion[name] for name in names} | {"unet": parts.upscale}
    pipe = diffusers.StableDiffusionUpscalePipeline(
        scheduler=scheduler, low_res_scheduler=diffusers.DDPMScheduler(), max_noise_level=8, **networks
    )
    return pipe, {"prompt": "a cat", "image": uniform(1, 3, 8, 8), "noise_level": 5, "output_type": "latent"}


@family("AnimateDiff")
def animatediff(parts, scheduler):
    names = ("unet", "vae", "text_encoder", "tokenizer")
    networks = {name: parts.stable_diffusion[name] for name in names}
    pipe = diffusers.AnimateDiffPipeline(scheduler=scheduler, motion_adapter=parts.motion, **networks)
    return pipe, {"prompt": "a cat", "num_frames": 3, "output_type": "latent", **SIZE}


@family("AudioLDM2")
def audioldm2(parts, scheduler):
    """The prompt is given as embeddings, with a mask."""
    pipe = diffusers.AudioLDM2Pipeline(scheduler=scheduler, **parts.audio)
    names = ("prompt_embeds", "generated_prompt_embeds", "negative_prompt_embeds", "negative_generated_prompt_embeds")
    prompts = {name: normal(1, 7, 16, seed=i) for i, name in enumerate(names)}
    masks = dict.fromkeys(("attention_mask", "negative_attention_mask"), torch.ones(1, 7))
    return pipe, {"output_type": "latent", **prompts, **masks}


@family("Marigold")
def marigold(parts, scheduler):
    names = ("vae", "text_encoder", "tokenizer")
    networks = {name: parts.stable_diffusion[name] for name in names}
    pipe = diffusers.MarigoldDepthPipeline(scheduler=scheduler, unet=parts.edit, prediction_type="depth", **networks)
    return pipe, {"image": uniform(1, 3, 16, 16), "processing_resolution": 0, "output_type": "pt"}


@family("PixArt-Σ")
def pixart(parts, scheduler):
    """The network also predicts a variance, which the pipeline drops."""
    vae = parts.stable_diffusion["vae"]
    pipe = diffusers.PixArtSigmaPipeline(None, None, vae, parts.pixart, scheduler)
    names = ("", "negative_")
    prompts = {f"{name}prompt_embeds": normal(1, 7, 16, seed=i) for i, name in enumerate(names)}
    masks = {f"{name}prompt_attention_mask": torch.ones(1, 7) for name in names}
    call = {"negative_prompt": None, "use_resolution_binning": False, "output_type": "latent"}
    return pipe, call | prompts | masks | SIZE


@family("DiT")
def dit(parts, scheduler):
    pipe = diffusers.DiTPipeline(transformer=parts.transformer, vae=parts.stable_diffusion["vae"], scheduler=scheduler)
    return pipe, {"class_labels": [3, 5], "output_type": "pt"}


@family("DDIMPipeline")
def ddim(parts, scheduler, unet=None):
    """The stock pipeline replaces its scheduler: ours is assigned afterwards."""
    pipe = diffusers.DDIMPipeline(unet or parts.unconditional, scheduler)
    pipe.scheduler = scheduler
    return pipe, {"batch_size": 2, "output_type": "np"}


@family("DDPMPipeline")
def ddpm(parts, scheduler, unet=None):
    return diffusers.DDPMPipeline(unet or parts.unconditional, scheduler), {"batch_size": 2, "output_type": "np"}


@family("LEDITS++")
def ledits(parts, scheduler):
    return diffusers.LEditsPPPipelineStableDiffusion(scheduler=scheduler, **parts.stable_diffusion), {}


def unconditional(parts, scheduler):
    """The pipeline of this package, with images of the network as latents."""
    return GeneralizedDDIMPipeline(parts.unconditional, scheduler), {"output_type": "latent"}


def panorama(parts, scheduler, views=1):
    """All views are the whole picture: their mean is what one view gives."""
    pipe = diffusers.StableDiffusionPanoramaPipeline(scheduler=scheduler, **parts.stable_diffusion)
    pipe.get_views = lambda *args, **kwargs: [(0, 8, 0, 8)] * views
    return pipe, {"prompt": "a cat", "output_type": "latent", **SIZE}


def audio(parts, scheduler):
    """The pipeline makes the timesteps floating point."""
    torch.manual_seed(2)
    unet = diffusers.UNet1DModel(
        sample_size=64,
        sample_rate=64,
        extra_in_channels=16,
        block_out_channels=(8, 8, 32),
        down_block_types=("DownBlock1DNoSkip", "DownBlock1D", "DownBlock1D"),
        up_block_types=("UpBlock1D", "UpBlock1D", "UpBlock1DNoSkip"),
    ).eval()
    return diffusers.DanceDiffusionPipeline(unet, scheduler), {}


INVERTED = {
    "Stable Diffusion, text to image": {},
    "Stable Diffusion, image to image": {"strength": 1.0},
    "Stable Diffusion, inpainting with 9 channels": {},
    "InstructPix2Pix": {},
    "Stable Diffusion XL": {},
    "Stable Diffusion XL, image to image": {"strength": 1.0},
    "ControlNet": {},
    "T2I-Adapter": {},
    "PAG": {},
    "Upscaling": {},
    "AnimateDiff": {"num_frames": 2},
    "AudioLDM2": {},
    "Marigold": {"generator": None},
    "PixArt-Σ": {},
}
"""Families whose loop encodes latents, with arguments of the call that it needs."""

DECODED_BY = {
    "Stable Diffusion, image to image": "Stable Diffusion, text to image",
    "Stable Diffusion XL, image to image": "Stable Diffusion XL",
}
"""An image-to-image pipeline takes x_0 as its image, and would add noise to x_T: the pipeline of text decodes it."""

LATENTS = {"AnimateDiff": (1, 4, 2, 8, 8), "AudioLDM2": (1, 4, 8, 4)}


@contextmanager
def denoiser(pipe, share=0.3):
    """Make the random network a part of a denoiser: ε̂ (or v̂) of N(0, 1) data, plus `share` of its output.

    A network that is random only removes the noise of no picture: x_t grows or shrinks, and no inverse is hard.
    """
    net = getattr(pipe, "unet", None) or pipe.transformer
    slope = (1 - pipe.scheduler.alphas_cumprod).sqrt()  # of ε̂; v̂ is 0
    slope = slope * (pipe.scheduler.config.prediction_type == "epsilon")

    def mixed(module, args, kwargs, output):
        x, t = (*args, *kwargs.values())[:2] if len(args) != 1 else (args[0], kwargs["timestep"])
        x = x[:, -4:] if isinstance(pipe, diffusers.MarigoldDepthPipeline) else x[:, :4]  # others of the input follow
        out = output[0]
        base = (slope[int(torch.as_tensor(t).flatten()[0])] * x).to(out.dtype)
        made = torch.cat([base + share * out[:, :4], out[:, 4:]], 1)
        return (made,) if isinstance(output, tuple) else type(output)(sample=made)

    hook = net.register_forward_hook(mixed, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


class Recorder:
    """Record the timesteps and results of a scheduler's steps."""

    def __init__(self, scheduler):
        self.times, self.samples = [], []
        step = scheduler.step

        @functools.wraps(step)  # pipelines read the signature
        def recorded(model_output, timestep, sample, *args, **kwargs):
            result = step(model_output, timestep, sample, *args, **kwargs)
            self.times.append(int(timestep))
            self.samples.append(result[0].clone())
            return result

        scheduler.step = recorded


def run(build, parts, scheduler, steps=6, seed=11, within=lambda pipe: nullcontext(), **more):
    """Call a pipeline within a context, and return the timesteps of its steps and its last sample."""
    pipe, call = build(parts, scheduler)
    pipe.set_progress_bar_config(disable=True)
    record = Recorder(scheduler)
    try:
        with within(pipe):
            pipe(**call | {"num_inference_steps": steps, "generator": torch.Generator().manual_seed(seed)} | more)
    finally:
        del scheduler.step
    return record.times, record.samples[-1]
