"""Train a small Stable Diffusion of handwritten digits, and save it as a StableDiffusionPipeline.

python training/digits.py --data data/mnist --output out/sd-mnist
"""

import guard

if __name__ == "__main__":
    guard.start()  # before the imports that take seconds

import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cards.weights import weights_digest
from diffusers import StableDiffusionPipeline
from guard.writing import share
from latent.captions import NAMES, caption, find_styles
from latent.fitting import Schedule, fit
from latent.networks import SIZE, build
from measure.extractors import Extractor, open_extractor
from pictures import Order, Reading, as_dataset, find_frame, in_memory, open_pictures
from pictures.grids import grid
from torch import Tensor, nn
from trainer.settings import command, parse, record, write_json

FREE = ("output", "save_every", "steps", "test_split", "extractor", "samples")
"""Settings that may change when a run continues."""


@dataclass(frozen=True)
class DigitsConfig(Reading):
    """Train an autoencoder on labelled digits, then a text encoder and a U-Net on its latents."""

    data: str = field(metadata={"help": "pictures of at most 32×32 with labels 0 to 9: digits, a folder, parquet, …"})
    output: str = field(metadata={"help": "folder for the pipeline; the same command continues a run that has ended"})
    test_split: str | None = field(default=None, metadata={"help": "split to measure the autoencoder on, such as test"})
    extractor: str | None = field(
        default=None, metadata={"help": "classifier of gray 28×28 digits, to count the right"}
    )
    samples: int = field(default=20, metadata={"help": "pictures of each digit to count right ones in"})
    autoencoder_channels: tuple[int, ...] = field(default=(8, 24, 48), metadata={"help": "of its three levels"})
    autoencoder_steps: int = field(default=2000, metadata={"help": "optimizer steps of the autoencoder"})
    autoencoder_batch: int = field(default=16, metadata={"help": "pictures in a step of the autoencoder"})
    kl_weight: float = field(default=1e-3, metadata={"help": "of the KL divergence for a latent dimension"})
    channels: tuple[int, ...] = field(default=(48, 96), metadata={"help": "of the two levels of the U-Net"})
    steps: int = field(default=3000, metadata={"help": "optimizer steps of the U-Net and the text encoder"})
    batch_size: int = field(default=64, metadata={"help": "latents in a step of the U-Net"})
    learning_rate: float = field(default=1e-3, metadata={"help": "of AdamW at its highest; it falls as a cosine"})
    no_prompt: float = field(default=0.12, metadata={"help": "share of empty prompts, for classifier-free guidance"})
    ema_decay: float = field(default=0.998, metadata={"help": "of the averaged weights, which are saved"})
    save_every: int = field(default=500, metadata={"help": "steps between checkpoints"})
    seed: int = field(default=0, metadata={"help": "of weights, order, prompts and noise"})


def check(config: DigitsConfig) -> None:
    """Raise ValueError for numbers out of range, and for an output that is finished."""
    positive = (
        "autoencoder_steps",
        "autoencoder_batch",
        "steps",
        "batch_size",
        "learning_rate",
        "save_every",
        "samples",
    )
    for name in positive:
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name} must be positive, not {getattr(config, name)}")
    for name in ("no_prompt", "ema_decay"):
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name} must be in [0, 1], not {getattr(config, name)}")
    for name, count, word, unit in (("autoencoder_channels", 3, "three", 4), ("channels", 2, "two", 8)):
        given = getattr(config, name)
        if len(given) != count or min(given) < 1 or any(each % unit for each in given):
            raise ValueError(f"{name} must be {word} multiples of {unit}, not {given}")
    if (Path(config.output) / "model_index.json").exists():
        raise ValueError(f"{config.output} holds a finished pipeline. Choose another output")


@guard.output(alone=True)
def main(config: DigitsConfig) -> dict[str, Any]:
    """Train, save the pipeline and `training.json` into `config.output`, and return the content of the latter."""
    check(config)
    output = Path(config.output)
    judge = None if config.extractor is None else open_extractor(config.extractor, "cpu", (1, 28, 28))
    images, labels = read(config, "train")
    tested = None if config.test_split is None else read(config, config.test_split)[0]
    torch.manual_seed(config.seed)
    pipeline = build(config.autoencoder_channels, config.channels, output / "tokenizer")
    vae, unet, text_encoder, order = pipeline.vae, pipeline.unet, pipeline.text_encoder, Order(len(images), config.seed)

    def reconstruct(step: int, generator: torch.Generator) -> Tensor:
        x = to_model(images[order(step * config.autoencoder_batch, config.autoencoder_batch)])
        posterior = vae.encode(x).latent_dist
        error = vae.decode(posterior.sample(generator)).sample - x
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return error.abs().mean() + error.square().mean() + config.kl_weight * kl

    schedule = Schedule(config.autoencoder_steps, 2e-3, config.ema_decay, config.save_every, config.seed)
    settings = {name: value for name, value in asdict(config).items() if name not in FREE}
    first = fit(output / "autoencoder.pt", settings, [vae], schedule, reconstruct)
    with torch.no_grad():
        latents = torch.cat([vae.encode(to_model(part)).latent_dist.mode() for part in images.split(500)])
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    latents, styles = latents * vae.config.scaling_factor, find_styles(images, labels)

    def denoise(step: int, generator: torch.Generator) -> Tensor:
        numbers = order(step * config.batch_size, config.batch_size)
        x, rng = latents[numbers], np.random.default_rng([config.seed, 1, step])
        captions = [caption(labels[i], styles[i], rng) if rng.random() >= config.no_prompt else "" for i in numbers]
        tokens = pipeline.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        places = torch.arange(len(x)) + torch.rand(len(x), generator=generator)  # spread evenly over the times
        t, noise = (places * 1000 / len(x)).long(), torch.randn(x.shape, generator=generator)
        noisy = pipeline.scheduler.add_noise(x, noise, t)
        return nn.functional.mse_loss(unet(noisy, t, text_encoder(tokens).last_hidden_state).sample, noise)

    schedule = replace(schedule, steps=config.steps, learning_rate=config.learning_rate)
    second = fit(output / "denoiser.pt", settings, [unet, text_encoder], schedule, denoise)
    result = record(config) | {
        "command": command(config, ("save_every",)),
        "dataset": as_dataset(config.data, "train", config.data_config),
        "images": len(images),
        "parameters": {net.__class__.__name__: net.num_parameters() for net in (vae, unet, text_encoder)},
        "autoencoder": first | {"pictures_seen": config.autoencoder_steps * config.autoencoder_batch},
        "denoiser": second | {"pictures_seen": config.steps * config.batch_size},
    }
    if tested is not None:
        result["autoencoder"]["rms_error"] = rms_error(vae, tested)
    grid(sample(pipeline, 3.0, 10).reshape(10, 10, SIZE, SIZE, 3), NAMES).save(output / "samples.png")
    if judge is not None:
        result["right"] = {str(w): right(sample(pipeline, w, config.samples), judge) for w in (1.0, 3.0, 7.5)}
    for net in (vae, unet):
        net.half()  # not the text encoder: transformers would load it so, and diffusers the others in float32
    pipeline.save_pretrained(output)
    share(output)
    result["sha256"] = weights_digest(vae, unet, text_encoder)
    write_json(output / "training.json", result)
    for name in ("autoencoder.pt", "denoiser.pt"):
        (output / name).unlink()
    return result


def read(config: DigitsConfig, split: str) -> tuple[Tensor, np.ndarray]:
    """Read a split as uint8 (N, 1, 32, 32), padded with black, and their labels."""
    pictures = open_pictures(config.data, split, labelled=True, **config.reading)
    frame, labels = find_frame(pictures, 1, None), pictures.labels
    if len(pictures.classes) != 10 or labels is None or max(frame.size) > SIZE:
        raise ValueError(f"{config.data} has no digits of at most {SIZE}×{SIZE} in ten classes. Choose other data")
    images = in_memory(pictures, frame, False, 1, True)
    assert images is not None  # pictures cropped at the centre have one size
    room = [(SIZE - each + side) // 2 for each in frame.size[::-1] for side in (0, 1)]
    return nn.functional.pad(images, room), labels


def to_model(images: Tensor) -> Tensor:
    """Map uint8 (B, 1, H, W) to three equal channels in [-1, 1]."""
    return (images.float() / 127.5 - 1).expand(-1, 3, -1, -1)


@torch.no_grad()
def rms_error(vae: Any, images: Tensor) -> float:
    """Return the root mean squared error of decoded latents, for a pixel in [0, 1]."""
    errors = [vae.decode(vae.encode(x).latent_dist.mode()).sample - x for x in map(to_model, images.split(500))]
    return torch.cat(errors).square().mean().sqrt().item() / 2


def sample(pipeline: StableDiffusionPipeline, guidance: float, each: int) -> np.ndarray:
    """Sample pictures (10·each, 32, 32, 3) in [0, 1] of "a zero" to "a nine", with a seed for each picture."""
    pipeline.set_progress_bar_config(disable=True)
    prompts = [f"a {name}" for name in NAMES for _ in range(each)]
    seeds = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    return pipeline(prompts, guidance_scale=guidance, generator=seeds, output_type="np").images


def right(pictures: np.ndarray, judge: Extractor) -> float:
    """Return the share of pictures, as many of each digit in turn, that a classifier recognizes."""
    gray = torch.from_numpy((pictures[:, 2:30, 2:30, :1] * 255).round().astype(np.uint8)).permute(0, 3, 1, 2)
    logits = judge(gray).logits
    assert logits is not None
    return float((logits.argmax(1) == np.arange(10).repeat(len(pictures) // 10)).mean())


if __name__ == "__main__":
    with guard.program("The same command continues"):
        found = main(parse(DigitsConfig))
        print(f"{found['parameters']}; right: {found.get('right')}")
        print(f"{found['config']['output']}: the pipeline, training.json and samples.png")
