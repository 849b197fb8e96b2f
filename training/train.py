"""Train a UNet2DModel on images and save it as a GeneralizedDDIMPipeline.

accelerate launch training/train.py --config training/configs/digits.toml --output out/digits
"""

import inspect
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from config import parse, record, write_json
from data import load, to_model
from diffusers import UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from tqdm.auto import tqdm

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler


@dataclass(frozen=True)
class TrainConfig:
    """Train a UNet2DModel on images with the paper's L_simple (γ = 1) and save it as a GeneralizedDDIMPipeline.

    Start it with `accelerate launch`; settings come from flags, then from --config FILE.toml, then from the defaults.
    """

    output: str = field(metadata={"help": "folder for the pipeline; it must not exist, or use --overwrite"})
    data: str = field(default="digits", metadata={"help": "data set"})
    unet: dict = field(default_factory=dict)
    scheduler: dict = field(default_factory=dict)
    steps: int = field(default=2000, metadata={"help": "optimiser steps"})
    batch_size: int = field(default=64, metadata={"help": "images a step, over all processes"})
    learning_rate: float = field(default=2e-4, metadata={"help": "peak learning rate of AdamW"})
    lr_schedule: str = field(default="cosine", metadata={"help": "constant, cosine or linear, after the warm-up"})
    warmup_steps: int = field(default=100, metadata={"help": "steps of linear warm-up"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradient clipping"})
    ema_decay: float = field(default=0.9999, metadata={"help": "largest decay of the averaged weights"})
    seed: int = field(default=0, metadata={"help": "seed of the weights, the data order and the noise"})
    overwrite: bool = field(default=False, metadata={"help": "replace the output folder"})


def check(config: TrainConfig, processes: int) -> None:
    """Raise ValueError for settings that cannot work, before anything is built."""
    if config.steps < 1 or config.batch_size < 1:
        raise ValueError(f"steps and batch_size must be positive, not {config.steps} and {config.batch_size}")
    if config.batch_size % processes:
        raise ValueError(f"batch_size={config.batch_size} cannot be shared by {processes} processes")
    if config.lr_schedule not in ("constant", "cosine", "linear"):
        raise ValueError(f"unknown lr_schedule {config.lr_schedule!r}: use constant, cosine or linear")
    if config.scheduler.get("variance_type", "fixed_small") == "learned_range":
        raise ValueError("variance_type='learned_range' needs the hybrid loss, which this script does not have")
    if not 0 <= config.ema_decay < 1:
        raise ValueError(f"ema_decay must be in [0, 1), not {config.ema_decay}")
    check_table("unet", config.unet, UNet2DModel)
    check_table("scheduler", config.scheduler, GeneralizedDDIMScheduler)
    output = Path(config.output).resolve()
    if output.exists() and not config.overwrite:
        raise ValueError(f"the output {config.output} exists: choose another folder, or pass --overwrite")
    if output.exists() and not (output / "training.json").is_file():
        raise ValueError(f"--overwrite replaces the folder of an earlier run only, and {config.output} is none")


def check_table(name: str, table: dict[str, Any], cls: type) -> None:
    """Raise ValueError for keys of a table that are not settings of `cls`."""
    known = set(inspect.signature(cls.__init__).parameters) - {"self"}
    unknown = sorted(table.keys() - known)
    if unknown:
        raise ValueError(f"unknown settings in [{name}]: {', '.join(unknown)}. Known: {', '.join(sorted(known))}")


def check_fit(unet: UNet2DModel, scheduler: GeneralizedDDIMScheduler, images: Tensor) -> None:
    """Raise ValueError where network, process and pictures do not go together."""
    made = (unet.config.in_channels, unet.config.out_channels, unet.config.sample_size)
    if made != (images.shape[1], images.shape[1], images.shape[-1]):
        raise ValueError(
            f"[unet] has in_channels, out_channels, sample_size {made}; the images need "
            f"{(images.shape[1], images.shape[1], images.shape[-1])}"
        )
    if scheduler.config.prediction_type == "epsilon" and scheduler.alphas_cumprod[-1] == 0:
        raise ValueError('ε prediction says nothing at zero terminal SNR: use prediction_type = "v_prediction"')


def batches(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless batches of indices, each image once an epoch, in a fresh order each epoch."""
    order = torch.empty(0, dtype=torch.int64)
    while True:
        while len(order) < batch_size:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        yield order[:batch_size]
        order = order[batch_size:]


def antithetic_times(batch_size: int, T: int, generator: torch.Generator) -> Tensor:
    """Network times in 0..T−1, in pairs t and T − 1 − t (the authors' code): uniform, with less variance."""
    half = torch.randint(0, T, ((batch_size + 1) // 2,), generator=generator)
    return torch.cat([half, T - 1 - half])[:batch_size]


def main(config: TrainConfig) -> dict[str, Any]:
    """Train, save the pipeline and `training.json` into `config.output`, and return what the latter holds."""
    accelerator = Accelerator()
    check(config, accelerator.num_processes)
    rank, processes = accelerator.process_index, accelerator.num_processes
    images, _ = load(config.data)
    scheduler = GeneralizedDDIMScheduler(**config.scheduler)
    set_seed(config.seed)  # the same weights on every process
    unet = UNet2DModel(
        **{"sample_size": images.shape[-1], "in_channels": images.shape[1], "out_channels": images.shape[1]}
        | config.unet
    )
    check_fit(unet, scheduler, images)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=config.learning_rate)
    schedule = get_scheduler(  # not prepared: it counts optimiser steps, at any number of processes
        config.lr_schedule, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=config.steps
    )
    network, optimizer = accelerator.prepare(unet, optimizer)
    unet = accelerator.unwrap_model(network)
    ema = EMAModel(unet.parameters(), decay=config.ema_decay, use_ema_warmup=True, power=0.75)

    set_seed(config.seed + 1 + rank)  # dropout differs between processes
    order = batches(len(images), config.batch_size, torch.Generator().manual_seed(config.seed))
    generator = torch.Generator().manual_seed(config.seed + 1 + rank)
    share = config.batch_size // processes
    images = images.to(accelerator.device)
    losses = torch.zeros(config.steps, device=accelerator.device)
    start = time.perf_counter()
    bar = tqdm(range(config.steps), desc="training", unit="step", disable=not accelerator.is_main_process)
    kind = scheduler.config.prediction_type
    network.train()
    for step in bar:
        mine = next(order)[rank * share : (rank + 1) * share].to(images.device)
        x0 = to_model(images[mine])
        times = antithetic_times(share, scheduler.config.num_train_timesteps, generator).to(images.device)
        noise = torch.randn(x0.shape, generator=generator).to(images.device)
        with accelerator.autocast():
            output = network(scheduler.add_noise(x0, noise, times), times).sample
        target = noise if kind == "epsilon" else x0 if kind == "sample" else scheduler.get_velocity(x0, noise, times)
        loss = torch.nn.functional.mse_loss(output.float(), target)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(network.parameters(), config.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        losses[step] = loss.detach()
        if (step + 1) % 50 == 0:
            mean = losses[step - 49 : step + 1].mean().item()
            bar.set_postfix(loss=f"{mean:.4f}")
            if not mean < float("inf"):
                raise FloatingPointError(f"the loss is not finite within the 50 steps up to {step + 1}")
    seconds = time.perf_counter() - start

    ema.copy_to(unet.parameters())
    last = losses[-max(1, config.steps // 10) :].mean()
    result = record(config) | {
        "parameters": sum(parameter.numel() for parameter in unet.parameters()),
        "loss": accelerator.reduce(last, "mean").item(),
        "seconds": seconds,
        "images_per_second": config.steps * config.batch_size / seconds,
        "processes": processes,
        "device": str(accelerator.device),
    }
    if accelerator.is_main_process:
        save(GeneralizedDDIMPipeline(unet.eval(), scheduler), result, config)
    accelerator.wait_for_everyone()
    return result


def save(pipeline: GeneralizedDDIMPipeline, result: dict[str, Any], config: TrainConfig) -> None:
    """Write the folder aside and rename it, so that a killed process never leaves half a model."""
    output = Path(config.output).resolve()
    aside = output.with_name(output.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    pipeline.save_pretrained(aside)
    write_json(aside / "training.json", result)
    earlier = output.with_name(output.name + ".old")
    if output.exists():
        output.rename(earlier)
    aside.rename(output)
    shutil.rmtree(earlier, ignore_errors=True)


if __name__ == "__main__":
    arguments = parse(TrainConfig)
    try:
        done = main(arguments)
    except ValueError as error:
        sys.exit(f"train.py: {error}")
    if PartialState().is_main_process:
        speed = f"{done['images_per_second']:.0f} images/s"
        print(f"trained {arguments.steps} steps in {done['seconds']:.0f} s ({speed}), loss {done['loss']:.4f}")
    PartialState().destroy_process_group()  # only here, where nothing that communicates is left
