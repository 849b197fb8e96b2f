"""Train a UNet2DModel on pictures and save it as a GeneralizedDDIMPipeline.

accelerate launch training/train.py --config training/configs/digits.toml --output out/digits
"""

import ctypes
import dataclasses
import inspect
import json
import math
import platform
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration, broadcast_object_list, set_seed
from diffusers import UNet2DModel
from huggingface_hub import HfApi
from pictures.sources import (
    Feed,
    Pictures,
    Share,
    Stream,
    find_frame,
    held_out,
    in_memory,
    open_pictures,
    open_stream,
    origin,
    to_model,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from trainer.checkpoints import Checkpoints, damage
from trainer.ema import EMA
from trainer.objective import TIMES, ImportanceTimes, Objective, draw_times
from trainer.report import Clock, Log, Spikes, Window, plot_loss, preview, read_log
from trainer.settings import code_files, move_in, parse, record, write_json

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler
from ddim_plugin.hub.card import check_license
from ddim_plugin.hub.code import code
from ddim_plugin.hub.push import open_repo, push_folder

SKIPS = 50
"""Steps in a row that fp16's scaler may skip; each halves its scale."""

SCHEDULES = ("constant", "cosine", "linear")
OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}

POSITIVE = ("steps", "batch_size", "gradient_accumulation_steps", "log_every", "keep_checkpoints", "resolution")
POSITIVE += ("resize", "preview_images", "preview_steps", "eval_images")
NOT_NEGATIVE = ("workers", "memory_gb", "warmup_steps", "weight_decay", "max_grad_norm", "adam_epsilon", "seed")
NOT_NEGATIVE += ("checkpoint_every", "preview_every", "eval_every")

FREE = ("output", "resume", "overwrite", "workers", "memory_gb", "trackers", "project", "log_every", "preview_every")
FREE += ("preview_images", "preview_steps", "eval_every", "eval_images", "eval_split", "eval_data", "checkpoint_every")
FREE += ("keep_checkpoints", "push_to_hub", "hub_private", "hub_revision", "hub_create_pr", "hub_license")
"""Settings that may change when a run is resumed, without a word."""

BOUND = ("unet", "scheduler", "resolution", "channels", "class_conditional", "label_dropout", "loss", "times")
"""Settings that may not."""

WRITTEN = ("model_index.json", "unet", "scheduler", "training.json", "loss.png", "log.jsonl", "previews", "checkpoints")
WRITTEN += ("trackers", "pipeline.part", "results.json", "samples.png", "sample.json")
"""What a run writes into its folder, or others of its pipeline, and alone replaces or removes there."""

EARLIER = ".earlier"
"""Where it keeps the run that it replaces, until it is finished."""


@dataclass(frozen=True)
class TrainConfig:
    """Train a UNet2DModel on pictures and save it as a GeneralizedDDIMPipeline.

    Start it with `accelerate launch`; settings come from flags, then from --config FILE.toml, then from the defaults.
    """

    output: str = field(metadata={"help": "folder of the run, which becomes the pipeline"})
    data: str = field(default="digits", metadata={"help": "digits, a folder, parquet or arrow files, or a Hub id"})
    split: str = field(default="train", metadata={"help": "split of the data set"})
    image_column: str | None = field(default=None, metadata={"help": "column of the pictures; found by its type"})
    label_column: str | None = field(default=None, metadata={"help": "column of the labels; found by its type"})
    streaming: bool = field(default=False, metadata={"help": "read the data set as it arrives, never whole"})
    resolution: int | None = field(default=None, metadata={"help": "side of the pictures; by default as they are"})
    channels: int | None = field(default=None, metadata={"help": "1 or 3; by default as the first picture has"})
    resize: int | None = field(default=None, metadata={"help": "shorter side before the crop; by default no larger"})
    crop: str = field(default="center", metadata={"help": "center or random"})
    flip: bool = field(default=False, metadata={"help": "mirror half of the pictures"})
    workers: int = field(default=4, metadata={"help": "threads that read and decode pictures"})
    memory_gb: float = field(default=4.0, metadata={"help": "sets up to this size are held in memory, as bytes"})
    class_conditional: bool = field(default=False, metadata={"help": "train with the labels of the set"})
    label_dropout: float = field(default=0.1, metadata={"help": "share trained without label, for guidance"})

    unet: dict = field(default_factory=dict)
    scheduler: dict = field(default_factory=dict)
    loss: str = field(default="simple", metadata={"help": "simple, theorem1, min_snr, soft_min_snr, bound, or hybrid"})
    loss_eta: float = field(default=1.0, metadata={"help": "η of the process whose bound is meant"})
    snr_gamma: float = field(default=5.0, metadata={"help": "γ of min_snr and soft_min_snr"})
    bound_weight: float = field(default=1e-3, metadata={"help": "weight of the bound in hybrid"})
    times: str = field(default="antithetic", metadata={"help": "antithetic, uniform or importance"})

    steps: int = field(default=2000, metadata={"help": "optimiser steps"})
    batch_size: int = field(default=64, metadata={"help": "images a step, over all processes and accumulation"})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "parts in which a batch is computed"})
    optimizer: str = field(default="adam", metadata={"help": "adam or adamw"})
    learning_rate: float = field(default=2e-4, metadata={"help": "peak learning rate"})
    lr_schedule: str = field(default="constant", metadata={"help": "constant, cosine or linear, after the warm-up"})
    warmup_steps: int = field(default=500, metadata={"help": "steps of linear warm-up"})
    adam_beta1: float = field(default=0.9, metadata={"help": "decay of the mean of gradients"})
    adam_beta2: float = field(default=0.999, metadata={"help": "decay of the mean of their squares"})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "ε of Adam"})
    weight_decay: float = field(default=0.0, metadata={"help": "weight decay"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradient clipping; 0 for none"})
    ema_decay: float = field(default=0.9999, metadata={"help": "largest decay of the averaged weights"})
    ema_warmup: bool = field(default=True, metadata={"help": "let that decay rise from 0"})
    mixed_precision: str | None = field(
        default=None, metadata={"help": "no, fp16 or bf16; by default as `accelerate launch` says"}
    )
    compile: bool = field(default=False, metadata={"help": "compile the network by torch.compile"})
    channels_last: bool = field(default=False, metadata={"help": "keep tensors in the order channels-last"})
    seed: int = field(default=0, metadata={"help": "seed of the weights, the data order and the noise"})

    log_every: int = field(default=50, metadata={"help": "steps between lines of the log"})
    trackers: tuple[str, ...] = field(
        default=("tensorboard",), metadata={"help": "tensorboard, wandb, … of Accelerate, or none"}
    )
    project: str = field(default="ddim", metadata={"help": "name of the project in the trackers"})
    checkpoint_every: int = field(default=5000, metadata={"help": "steps between checkpoints; 0 for none"})
    keep_checkpoints: int = field(default=2, metadata={"help": "checkpoints to keep"})
    preview_every: int = field(default=5000, metadata={"help": "steps between previews; 0 for none"})
    preview_images: int = field(default=36, metadata={"help": "pictures in a preview"})
    preview_steps: int = field(default=50, metadata={"help": "S of the previews"})
    eval_every: int = field(default=0, metadata={"help": "steps between losses on held-out pictures; 0 for none"})
    eval_images: int = field(default=1024, metadata={"help": "held-out pictures, the first of their split"})
    eval_data: str | None = field(default=None, metadata={"help": "data set of those pictures, if it is another one"})
    eval_split: str | None = field(default=None, metadata={"help": "their split; test, or train of eval_data"})
    resume: str | None = field(default=None, metadata={"help": "latest, or the folder of a checkpoint"})
    overwrite: bool = field(default=False, metadata={"help": "replace the output of an earlier run"})

    push_to_hub: str | None = field(
        default=None, metadata={"help": "repo to push the finished pipeline to: user/model"}
    )
    hub_private: bool = field(default=False, metadata={"help": "make that repo private"})
    hub_revision: str | None = field(default=None, metadata={"help": "its branch; main by default"})
    hub_create_pr: bool = field(default=False, metadata={"help": "open a pull request instead"})
    hub_license: str | None = field(default=None, metadata={"help": "licence of the weights, as the Hub names it"})


# ---- refusals ------------------------------------------------------------------------------------------------------


def check(config: TrainConfig, processes: int) -> None:
    """Raise ValueError for settings that cannot work, before anything is read."""
    for name in POSITIVE:
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise ValueError(f"{name} must be positive, not {getattr(config, name)}")
    for name in NOT_NEGATIVE:
        if not getattr(config, name) >= 0:
            raise ValueError(f"{name} must not be negative, not {getattr(config, name)}")
    parts = processes * config.gradient_accumulation_steps
    if config.batch_size % parts:
        raise ValueError(
            f"batch_size={config.batch_size} cannot be shared by {processes} processes and "
            f"gradient_accumulation_steps={config.gradient_accumulation_steps}: it must be a multiple of {parts}"
        )
    for name, known in (("lr_schedule", SCHEDULES), ("optimizer", OPTIMIZERS), ("times", TIMES)):
        if getattr(config, name) not in known:
            raise ValueError(f"unknown {name} {getattr(config, name)!r}: use {', '.join(known)}")
    for name in ("ema_decay", "label_dropout", "adam_beta1", "adam_beta2"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name} must be in [0, 1), not {getattr(config, name)}")
    if not 0 < config.learning_rate < math.inf:
        raise ValueError(f"learning_rate must be positive, not {config.learning_rate}")
    if config.scheduler.get("variance_type") == "optimal":
        raise ValueError("variance_type 'optimal' is measured on a trained network: train with 'fixed_small'")
    if config.label_column is not None and not config.class_conditional:
        raise ValueError("label_column is of use with class_conditional alone: add --class_conditional")
    if config.resume is not None and config.overwrite:
        raise ValueError("--resume goes on with a run, --overwrite replaces it: choose one")
    check_table("unet", config.unet, UNet2DModel)
    check_table("scheduler", config.scheduler, GeneralizedDDIMScheduler)
    check_output(config)


def check_output(config: TrainConfig) -> None:
    """Raise ValueError where the output folder holds something that is not to be touched."""
    output, data = Path(config.output).resolve(), Path(config.data).resolve()
    if data.exists() and (output.is_relative_to(data) or data.is_relative_to(output)):
        raise ValueError(f"the output {config.output} and the data {config.data} lie in one another: keep them apart")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / "training.json").is_file():
        raise ValueError(
            f"the output {config.output} holds something else than a run: choose another folder"
            if not config.overwrite
            else f"--overwrite replaces the folder of an earlier run only, and {config.output} is none"
        )
    if config.resume is None and not config.overwrite:
        raise ValueError(
            f"the output {config.output} holds another run: choose another folder, go on with it by --resume latest, "
            "or pass --overwrite"
        )
    if config.resume not in (None, "latest") and not Path(config.resume).resolve().is_relative_to(output):
        raise ValueError(
            f"the output {config.output} is another run than {config.resume}: to go on from there choose a new folder"
        )
    without = not any((output / "checkpoints").glob("step-*"))
    if config.resume == "latest" and without and (output / "model_index.json").is_file():
        raise ValueError(f"the run in {config.output} is finished, and has no checkpoint to go on from")


def check_table(name: str, table: dict[str, Any], cls: type) -> None:
    """Raise ValueError for keys of a table that are not settings of `cls`."""
    known = set(inspect.signature(cls.__init__).parameters) - {"self"}
    unknown = sorted(table.keys() - known)
    if unknown:
        raise ValueError(f"unknown settings in [{name}]: {', '.join(unknown)}. Known: {', '.join(sorted(known))}")


def make_accelerator(config: TrainConfig, output: Path) -> Accelerator:
    """Accelerate's view of the machine. Raises ValueError for a precision that the device does not have."""
    if config.mixed_precision not in (None, "no", "fp16", "bf16"):
        raise ValueError(f"unknown mixed_precision {config.mixed_precision!r}: use no, fp16 or bf16")
    trackers = check_trackers(config.trackers)
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=config.gradient_accumulation_steps, sync_with_dataloader=False
            ),
            log_with=trackers or None,
            project_config=ProjectConfiguration(project_dir=str(output), logging_dir=str(output / "trackers")),
        )
    except ValueError as error:
        raise ValueError(f"{error} Use mixed_precision bf16 or no") from error
    device = accelerator.device
    if accelerator.mixed_precision == "fp16" and device.type == "cpu":
        raise ValueError("mixed_precision fp16 needs an accelerator, and the device is the CPU: use bf16 or no")
    if device.type == "cpu":
        keep_memory()
    without_bf16 = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    if accelerator.mixed_precision == "bf16" and without_bf16:
        raise ValueError(f"{torch.cuda.get_device_name(device)} has no bf16: use mixed_precision fp16 or no")
    return accelerator


def keep_memory() -> None:
    """Let the process keep what it frees, where its C library is glibc.

    A step on the CPU frees and asks for the same large tensors again; by default each of them goes back to the system
    and comes back page by page, 3 to 10 % of a step.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def check_trackers(trackers: tuple[str, ...]) -> list[str]:
    """The names of trackers, without "none". Raises ValueError for one that is unknown or not installed."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    names = [name for name in trackers if name != "none"]
    known = [str(name) for name in LOGGER_TYPE_TO_CLASS]
    available = [str(name) for name in get_available_trackers()]
    for name in names:
        if name not in known:
            raise ValueError(f"unknown tracker {name!r}: use {', '.join(known)}, or none")
        if name not in available:
            raise ValueError(f"the tracker {name!r} is not installed: pip install {name}, or pass --trackers none")
    return names


def check_fit(unet: UNet2DModel, size: tuple[int, int], channels: int, learned: bool, classes: int) -> None:
    """Raise ValueError where network and pictures do not go together."""
    config = unet.config
    square = isinstance(config.sample_size, int)
    sample = config.sample_size if square else tuple(config.sample_size)
    made = (config.in_channels, config.out_channels, sample)
    needed = (channels, channels * (1 + learned), size[0] if square and size[0] == size[1] else size)
    if made != needed:
        raise ValueError(
            f"[unet] has in_channels, out_channels, sample_size {made}; the images"
            f"{' with a learned variance' if learned else ''} need {needed}"
        )
    halvings = len(config.down_block_types) - 1
    if size[0] % 2**halvings or size[1] % 2**halvings:
        raise ValueError(
            f"pictures of {size[0]}×{size[1]} cannot be halved {halvings} times, as a U-Net of {halvings + 1} levels "
            f"does: take a resolution that is a multiple of {2**halvings}, or fewer blocks in [unet]"
        )
    if config.num_class_embeds != (classes or None):
        raise ValueError(
            f"[unet] has num_class_embeds = {config.num_class_embeds}; this training needs {classes or None}"
        )


def check_space(folder: Path, parameters: int, config: TrainConfig) -> None:
    """Raise OSError where the disk cannot hold the checkpoints and the pipeline: averages, Adam's two, raw weights."""
    copies = (4 * (config.keep_checkpoints + 1) if config.checkpoint_every else 0) + 2
    there = sum(file.stat().st_size for file in (folder / "checkpoints").rglob("*") if file.is_file())
    needed = copies * parameters * 4 - (there if config.resume else 0)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"the disk of {config.output} has {free / 1e6:.0f} MB free; the run needs {needed / 1e6:.0f} MB, for "
            f"{config.keep_checkpoints} checkpoints and one being written"
        )


# ---- the pieces of a run -------------------------------------------------------------------------------------------


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of optimiser step 1, 2, …: linear warm-up, then the schedule's decay towards 0."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    done = (step - 1 - config.warmup_steps) / (config.steps - config.warmup_steps)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return config.learning_rate * factor[config.lr_schedule]


class Signals:
    """SIGTERM and SIGINT, noted for the end of a step. Again `PATIENCE` seconds later, they end the process at once."""

    PATIENCE = 5.0  # launchers and schedulers deliver one signal more than once

    def __init__(self) -> None:
        self.received: int | None = None

    @contextmanager
    def noted(self) -> Iterator[None]:
        def note(number: int, frame: Any) -> None:
            if self.received is None:
                self.received, self._when = number, time.monotonic()
            elif time.monotonic() > self._when + self.PATIENCE:
                signal.signal(number, before[number])
                signal.raise_signal(number)

        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            for number in before:
                signal.signal(number, note)
        except ValueError:  # not in the main thread, where signals do not arrive
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def anywhere(self, accelerator: Accelerator, step: int) -> int:
        """The signal that any process received, or 0. On accelerators they ask each other every ten steps."""
        if accelerator.num_processes == 1:
            return self.received or 0
        if step % 10 and accelerator.device.type != "cpu":
            return 0
        flag = torch.tensor([self.received or 0], device=accelerator.device)
        return int(accelerator.gather(flag).max())


@dataclass
class Run:
    """Everything a training run is made of."""

    config: TrainConfig
    accelerator: Accelerator
    feed: Feed
    share: Share
    scheduler: GeneralizedDDIMScheduler
    objective: Objective
    unet: UNet2DModel
    network: torch.nn.Module
    optimizer: Any
    ema: EMA
    importance: ImportanceTimes | None
    classes: tuple[str, ...]
    eval_set: tuple[Tensor, Tensor | None] | None
    dtype: torch.dtype
    skipped: int = 0
    skipped_in_a_row: int = 0

    # ---- one step ------------------------------------------------------------------------------------------------

    def step(self, step: int, batches: Iterator, clock: Clock) -> tuple[Tensor, Tensor]:
        """Optimiser step 1, 2, …: (loss, norm of the gradient), on the device."""
        config, accelerator = self.config, self.accelerator
        rng = np.random.default_rng([config.seed, 2, step])
        times, weights = self._draw_times(rng)
        dropped = rng.random(config.batch_size) < config.label_dropout
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        total, norm = torch.zeros((), device=accelerator.device), torch.zeros((), device=accelerator.device)
        for part in range(self.share.parts):
            before = time.perf_counter()
            images, labels = next(batches)
            clock.waited += time.perf_counter() - before
            if labels is not None:
                without = torch.from_numpy(self.share.of(dropped, part)).to(labels.device, non_blocking=True)
                labels = torch.where(without, len(self.classes), labels)
            t = torch.from_numpy(self.share.of(times, part)).to(images.device, non_blocking=True)
            if part == 0:
                noise = self._noise((self.share.size * self.share.parts, *images.shape[1:]), step).chunk(
                    self.share.parts
                )
            batch = self.objective.noised(to_model(images), noise[part], t)
            with accelerator.accumulate(self.network):
                losses = self.objective(self._predict(self.network, batch.x, t, labels), batch)
                loss = losses
                if weights is not None:
                    self._record(t, losses)
                    loss = losses * torch.from_numpy(self.share.of(weights, part)).to(losses)
                loss = loss.mean()
                accelerator.backward(loss)
                total += loss.detach() / self.share.parts
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.network.parameters(), config.max_grad_norm or math.inf)
                self.optimizer.step()
                self.optimizer.zero_grad()
        if accelerator.optimizer_step_was_skipped:  # fp16 alone: the scaler saw an overflow, and lowers its scale
            self.skipped += 1
            self.skipped_in_a_row += 1
            if self.skipped_in_a_row == SKIPS:
                raise FloatingPointError(f"gradients overflow in fp16, {SKIPS} times in a row, up to step {step}")
            norm = torch.zeros_like(total)
        else:
            self.skipped_in_a_row = 0
        self.ema.update(step)
        if hasattr(norm, "full_tensor"):  # of a gradient in shards (FSDP)
            norm = norm.full_tensor()
        return total, torch.as_tensor(0.0 if norm is None else norm, device=total.device)

    def _draw_times(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray | None]:
        if self.importance is not None:
            return self.importance.draw(self.config.batch_size, rng)
        return draw_times(self.config.times, self.config.batch_size, self.objective.T, rng), None

    def _record(self, t: Tensor, losses: Tensor) -> None:
        gather = self.accelerator.gather
        self.importance.record(gather(t), gather(losses.detach()))

    def _noise(self, shape: tuple[int, ...], step: int) -> Tensor:
        """Standard normal noise that depends on (seed, step, process) alone."""
        seed = np.random.SeedSequence([self.config.seed, 3, step, self.share.rank]).generate_state(1, np.uint64)
        device = self.accelerator.device
        generator = torch.Generator(device).manual_seed(int(seed[0] >> np.uint64(1)))
        return torch.randn(shape, generator=generator, device=device)

    def _predict(self, network: torch.nn.Module, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        x = x.to(self.dtype)
        if self.config.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        return network(x, t - 1, class_labels=labels).sample  # in autocast, which Accelerate has put around the network

    # ---- what happens between steps --------------------------------------------------------------------------------

    def pipeline(self) -> GeneralizedDDIMPipeline:
        """The averaged weights as a pipeline. All processes call it."""
        pipe = GeneralizedDDIMPipeline(self.ema.gather(), GeneralizedDDIMScheduler.from_config(self.scheduler.config))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def preview(self, step: int, log: Log) -> None:
        config, folder = self.config, Path(self.config.output) / "previews"
        steps = min(config.preview_steps, self.objective.T)
        picture = preview(
            self.accelerator,
            self.pipeline(),
            config.preview_images,
            steps,
            len(self.classes),
            config.seed,
            self.share.size,
        )
        if picture is not None:
            folder.mkdir(parents=True, exist_ok=True)
            picture.save(folder / f"step-{step:08d}.png")
            log.picture(step, picture)

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """The loss of the averaged weights on held-out pictures, at the same times and with the same noise always."""
        images, labels = self.eval_set
        unet, device, count = self.ema.gather(), self.accelerator.device, len(images)
        times = 1 + (np.arange(count) * self.objective.T) // count  # evenly over 1..T
        times = torch.from_numpy(np.random.default_rng(self.config.seed).permutation(times))
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(self.config.seed))
        total = torch.zeros((), device=device)
        for rows in torch.arange(self.share.rank, count, self.share.processes).split(self.share.size):
            t = times[rows].to(device)
            batch = self.objective.noised(to_model(images[rows].to(device)), noise[rows].to(device), t)
            given = None if labels is None else labels[rows].to(device)
            with self.accelerator.autocast():
                output = unet(batch.x, t - 1, class_labels=given).sample
            total += self.objective(output, batch).sum()
        return float(self.accelerator.reduce(total, "sum")) / count

    def write(self, folder: Path, step: int) -> None:
        """The whole state, into a folder. All processes call it."""
        self.accelerator.save_state(str(folder))
        if isinstance(self.feed.pictures, Stream):
            write_json(folder / f"stream-{self.share.rank}.json", {"epochs": self.feed.epochs})
        weights = self.ema.gather().state_dict()
        if self.accelerator.is_main_process:
            save_file({name: value.contiguous() for name, value in weights.items()}, folder / "ema.safetensors")
            if self.importance is not None:
                save_file(self.importance.state_dict(), folder / "times.safetensors")
            state = {"step": step, "processes": self.share.processes, "skipped": self.skipped, "data": self.data_set()}
            write_json(folder / "run.json", state | {"config": dataclasses.asdict(self.config)})

    def data_set(self) -> dict[str, Any]:
        """What the data set is known by."""
        pictures = self.feed.pictures
        count = pictures.count if isinstance(pictures, Pictures) else None
        return {"images": count, "classes": list(self.classes)}

    def read(self, folder: Path) -> int:
        """Take over the state of a checkpoint, and return its step."""
        state = json.loads((folder / "run.json").read_text())
        if state["data"] != self.data_set():
            raise ValueError(f"the data set is not the one of {folder}: {state['data']}, now {self.data_set()}")
        if self.share.processes != state["processes"]:
            change = f"{state['processes']} processes, now {self.share.processes}"
            self.accelerator.print(f"note: this run had {change}: other noise from here on")
        self.accelerator.load_state(str(folder))
        self.accelerator.step = 0  # it counts parts of a batch, and every step begins with the first
        epochs = folder / f"stream-{self.share.rank}.json"
        if isinstance(self.feed.pictures, Stream) and self.share.processes == state["processes"]:
            self.feed.epochs = json.loads(epochs.read_text())["epochs"]
        self.ema.load(load_file(folder / "ema.safetensors"))
        if self.importance is not None:
            self.importance.load_state_dict(load_file(folder / "times.safetensors"))
        self.skipped = state["skipped"]
        return state["step"]


def build(config: TrainConfig) -> Run:
    """Check everything, and make all that a run needs. Raises ValueError or OSError before anything is written."""
    output = Path(config.output).resolve()
    code()  # as it is now, not as the checkout is when the pipeline is saved
    accelerator = make_accelerator(config, output)
    check(config, accelerator.num_processes)
    share = Share(
        config.batch_size // accelerator.num_processes // config.gradient_accumulation_steps,
        config.gradient_accumulation_steps,
        accelerator.process_index,
        accelerator.num_processes,
    )
    scheduler = GeneralizedDDIMScheduler(**config.scheduler)
    objective = Objective(
        scheduler.alpha_bar,
        scheduler.config.prediction_type,
        config.loss,
        scheduler.config.variance_type,
        config.loss_eta,
        config.snr_gamma,
        config.bound_weight,
        accelerator.device,
    )

    opened = (config.image_column, config.label_column, config.class_conditional)
    with accelerator.main_process_first():  # one process reads the Hub, the others its cache
        pictures = (open_stream if config.streaming else open_pictures)(config.data, config.split, *opened)
        frame = find_frame(pictures, config.channels, wanted_size(config), config.resize, config.crop)
        fits = isinstance(pictures, Pictures) and memory_needed(pictures, frame) <= config.memory_gb * 1e9
        if not fits and wanted_size(config) is None:
            raise ValueError(f"{config.data} is not held in memory (see --memory_gb): say --resolution")
    labelled = pictures.classes if config.class_conditional else ()
    classes = len(labelled) + (config.label_dropout > 0) if labelled else 0
    learned = scheduler.config.variance_type == "learned_range"
    set_seed(config.seed)  # the same weights on every process
    made_for = {
        "sample_size": frame.size[0] if frame.size[0] == frame.size[1] else frame.size,
        "in_channels": frame.channels,
        "out_channels": frame.channels * (1 + learned),
    } | ({"num_class_embeds": classes} if classes else {})
    unet = UNet2DModel(**made_for | {key: None if value == "none" else value for key, value in config.unet.items()})
    check_fit(unet, frame.size, frame.channels, learned, classes)
    check_space(output, unet.num_parameters(), config)
    GeneralizedDDIMScheduler.from_config(scheduler.config).set_timesteps(min(config.preview_steps, objective.T))
    eval_set = None
    if config.eval_every:
        split = config.eval_split or ("test" if config.eval_data is None else "train")
        others = open_pictures(config.eval_data or config.data, split, *opened)
        eval_set = held_out(others, frame, config.eval_images, labelled)
    images = None
    if fits:
        quiet = not accelerator.is_main_process
        images = in_memory(pictures, frame, wanted_size(config) is not None, config.workers, quiet)
    feed = Feed(pictures, frame, share, config.seed, config.flip, config.workers, accelerator.device, images)

    unet.to(accelerator.device)
    if config.channels_last:
        unet.to(memory_format=torch.channels_last)
    ema = EMA(unet, config.ema_decay, config.ema_warmup)
    if config.compile:
        unet.compile()
    fused = accelerator.device.type in ("cpu", "cuda", "mps", "xpu")
    fused &= accelerator.mixed_precision != "fp16"  # there Accelerate would not see that the scaler skipped a step
    optimizer = OPTIMIZERS[config.optimizer](
        unet.parameters(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        fused=fused,
    )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:  # it asks the data loader, and there is none
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = share.size
    network, optimizer = accelerator.prepare(unet, optimizer)
    ema.follow(network)
    network.train()
    set_seed(config.seed + 1 + share.rank)  # dropout differs between processes
    return Run(
        config,
        accelerator,
        feed,
        share,
        scheduler,
        objective,
        accelerator.unwrap_model(network),
        network,
        optimizer,
        ema,
        ImportanceTimes(objective.T) if config.times == "importance" else None,
        labelled,
        eval_set,
        next(network.parameters()).dtype,
    )


def wanted_size(config: TrainConfig) -> tuple[int, int] | None:
    """(H, W) where the settings say it: by `resolution`, or by [unet] sample_size."""
    size = config.resolution or config.unet.get("sample_size")
    if size is None or isinstance(size, int):
        return None if size is None else (size, size)
    if not (isinstance(size, list | tuple) and len(size) == 2 and all(isinstance(side, int) for side in size)):
        raise ValueError(f"sample_size in [unet] must be a side, or [height, width], not {size!r}")
    return (size[0], size[1])


def memory_needed(pictures: Pictures, frame: Any) -> int:
    """Bytes of the whole set, judged by its first picture."""
    return pictures.count * frame.canvas(pictures.first(), f"image 0 of {pictures.name}").size


# ---- the run -------------------------------------------------------------------------------------------------------


def main(config: TrainConfig) -> dict[str, Any]:
    """Train, save the pipeline and `training.json` into `config.output`, and return what the latter holds."""
    run = build(config)
    if config.push_to_hub is not None:
        open_repo_first(config, run.accelerator)
    accelerator, output = run.accelerator, Path(config.output).resolve()
    checkpoints = Checkpoints(output / "checkpoints", config.keep_checkpoints, accelerator)
    step = resume(run, checkpoints)
    result = record(config) | run.data_set()
    result |= {
        "data_from": origin(config.data),
        "status": "running",
        "parameters": run.ema.unet.num_parameters(),
        "in_memory": run.feed.images is not None,
        "processes": run.share.processes,
        "device": device_name(accelerator),
        "mixed_precision": accelerator.mixed_precision,
    }
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        if config.overwrite:
            set_aside(output)
        write_json(output / "training.json", result)
    accelerator.wait_for_everyone()
    if accelerator.log_with:
        flat = {key: str(value) for key, value in dataclasses.asdict(config).items()}
        again = {"tensorboard": {"purge_step": step + 1}} if step else {}  # what will be done again goes
        accelerator.init_trackers(config.project, config=flat, init_kwargs=again)
    log = Log(output / "log.jsonl", accelerator, step, config.steps)
    signals = Signals()
    try:
        with signals.noted():
            step, saved = loop(run, checkpoints, log, signals, step)
    except FloatingPointError as error:
        last = checkpoints.all()[:1]
        where = f"the checkpoint {last[0]} is from before" if last else "there is no checkpoint from before"
        raise FloatingPointError(f"{error}: stopped; {where}. Lower learning_rate, or look at the data") from error
    finally:
        log.close()
        for tracker in accelerator.trackers:  # accelerator.end_training would end the process group too
            tracker.finish()
    lines = read_log(output / "log.jsonl")
    timed = [line for line in lines if "images_per_second" in line]
    seconds = sum(line["seconds"] for line in timed)
    last = timed[-max(1, len(timed) // 10) :]
    finished = step == config.steps
    result |= {
        "status": "finished" if finished else f"stopped at step {step}",
        "step": step,
        "checkpoint": saved,
        "loss": sum(line["loss"] for line in last) / len(last) if last else None,
        "seconds": seconds,
        "images_per_second": sum(line["images"] for line in timed) / seconds if seconds else None,
        "loader_share": sum(line["loader_share"] * line["seconds"] for line in timed) / seconds if seconds else None,
        "spikes": sum(len(line.get("spikes", ())) for line in lines),
        "skipped_steps": run.skipped,
        "signal": None if finished else signals.received,
    }
    if accelerator.device.type == "cuda":
        result["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    if finished:
        pipe, raw = run.pipeline(), accelerator.get_state_dict(run.network)
        if accelerator.is_main_process:
            save(pipe, raw, result, lines, config)
            if config.push_to_hub is not None:
                result["not_pushed"] = push(config, pipe)
    elif accelerator.is_main_process:
        write_json(output / "training.json", result)
    accelerator.wait_for_everyone()
    return result


def loop(run: Run, checkpoints: Checkpoints, log: Log, signals: Signals, step: int) -> tuple[int, int]:
    """Steps until the last one or a signal; returns the last that was done, and the last that a checkpoint holds."""
    config, accelerator = run.config, run.accelerator
    window, clock, spikes, saved = Window(accelerator), Clock(), Spikes(), step
    losses: list[float] = []
    norms: list[float] = []

    def due(every: int) -> bool:
        return every > 0 and (step % every == 0 or step == config.steps)

    def read_window() -> None:
        found = window.read(step)
        losses.extend(found[0])
        norms.extend(found[1])

    def report() -> None:
        read_window()
        if not losses:
            return
        seconds, waited = clock.read()
        images = len(losses) * config.batch_size
        mean = sum(losses) / len(losses)
        values = {
            "loss": mean,
            "grad_norm": sum(norms) / len(norms),
            "learning_rate": learning_rate(step, config),
            "ema_decay": run.ema.decay_at(step),
            "images": images,
            "seconds": seconds,
            "images_per_second": images / seconds,
            "loader_share": waited / seconds,
            "skipped_steps": run.skipped,
        }
        found = spikes.find(losses, norms, step)
        log.write(step, **values, **({"spikes": found} if found else {}))
        log.bar.set_postfix(loss=f"{mean:.4f}", **{"images/s": f"{images / seconds:.0f}"})
        losses.clear()
        norms.clear()

    def save_checkpoint() -> None:
        nonlocal saved
        read_window()  # nothing is saved after a step that was not finite
        problem = checkpoints.save(step, lambda folder: run.write(folder, step))
        if problem is None:
            saved = step
        elif accelerator.is_main_process:
            log.write(step, no_checkpoint=problem)
            print(f"warning: no checkpoint at step {step} ({problem}); the last is of step {saved}", file=sys.stderr)

    def evaluate() -> None:
        log.write(step, held_out_loss=run.held_out_loss())

    batches = run.feed.batches(step)
    clock.read()
    while step < config.steps:
        try:
            loss, norm = run.step(step + 1, batches, clock)
        except (ValueError, OSError):  # a picture that cannot be read
            read_window()
            if accelerator.num_processes == 1 and config.checkpoint_every and saved != step:
                save_checkpoint()
            raise
        step += 1
        window.add(loss, norm)
        log.bar.update()
        if step % config.log_every == 0 or step == config.steps:
            report()
        if due(config.checkpoint_every):
            clock.pause(save_checkpoint)
        if due(config.eval_every):
            clock.pause(evaluate)
        if due(config.preview_every):
            clock.pause(run.preview, step, log)
        number = signals.anywhere(accelerator, step)
        if number and step < config.steps:
            signals.received = number
            report()
            if saved != step:
                save_checkpoint()
            break
    batches.close()
    return step, saved


def resume(run: Run, checkpoints: Checkpoints) -> int:
    """Take over the checkpoint that the settings name, and return its step; 0 where a run begins."""
    config, accelerator = run.config, run.accelerator
    if config.resume is None:
        return 0
    if config.resume == "latest":
        folder = checkpoints.latest()
        if folder is None:
            accelerator.print(f"note: {config.output} has no checkpoint yet: starting at step 0")
            return 0
    else:
        folder = Path(config.resume)
        problem = damage(folder)
        if problem is not None:
            raise ValueError(
                f"cannot resume from {folder}: {problem}. Say latest, or such as OUTPUT/checkpoints/step-00005000"
            )
    before = json.loads((folder / "run.json").read_text())["config"]
    now = json.loads(json.dumps(dataclasses.asdict(config)))  # with lists for tuples, as it was written
    changed = [key for key in now if key not in FREE and now[key] != before.get(key)]
    for key in changed:
        if key in BOUND:
            raise ValueError(
                f"cannot resume {folder} with another {key}: it was {before.get(key)!r}, now {now[key]!r}. Start a new "
                "run in another folder"
            )
        accelerator.print(f"note: {key} was {before.get(key)!r}, from here on {now[key]!r}")
    step = run.read(folder)
    if step > config.steps:
        raise ValueError(f"{folder} is of step {step}, beyond steps={config.steps}: raise it")
    checkpoints.forget_after(step)
    accelerator.print(f"resuming after step {step} from {folder}")
    return step


def set_aside(output: Path) -> None:
    """Move what a finished run wrote aside until the new one is finished too; one that never was makes room."""
    earlier, finished = output / EARLIER, (output / "model_index.json").is_file()
    if finished:
        shutil.rmtree(earlier, ignore_errors=True)
        earlier.mkdir()
    for part in (*(output / name for name in WRITTEN), *code_files(output)):
        if finished and part.exists():
            part.rename(earlier / part.name)
        elif part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink(missing_ok=True)


def save(
    pipe: GeneralizedDDIMPipeline, raw: dict, result: dict[str, Any], lines: list[dict], config: TrainConfig
) -> None:
    """The pipeline with the averaged weights, and beside them the raw ones as the variant "non_ema".

    It is written aside and moved into place.
    """
    output = Path(config.output).resolve()
    aside = output / "pipeline.part"
    shutil.rmtree(aside, ignore_errors=True)
    pipe.unet.to(memory_format=torch.contiguous_format)
    name = "diffusion_pytorch_model.non_ema.safetensors"
    raw = {key.removeprefix("_orig_mod."): value.float().contiguous().cpu() for key, value in raw.items()}
    try:
        pipe.save_pretrained(aside)
        save_file(raw, aside / "unet" / name)
    except (SafetensorError, OSError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise OSError(f"cannot save the pipeline: {error}. Make room, and go on with --resume latest") from error
    write_json(output / "training.json", result)
    plot_loss(lines, output / "loss.png")
    move_in(aside, output)
    shutil.rmtree(output / EARLIER, ignore_errors=True)


def open_repo_first(config: TrainConfig, accelerator: Accelerator) -> None:
    """Raise ValueError or OSError, on all processes, where the pipeline could not be pushed once it is trained."""
    problem: list[Exception | None] = [None]
    if accelerator.is_main_process:
        try:
            check_license(config.hub_license)
            open_repo(HfApi(), config.push_to_hub, config.hub_private or None)
        except (ValueError, OSError) as error:
            problem = [error]
    broadcast_object_list(problem)
    if problem[0] is not None:
        raise problem[0]


def push(config: TrainConfig, pipe: GeneralizedDDIMPipeline) -> str | None:
    """Push the finished pipeline. What is in the way is printed, and returned: the pipeline is saved all the same."""
    try:
        commit = push_folder(
            config.output,
            config.push_to_hub,
            private=config.hub_private or None,
            revision=config.hub_revision,
            create_pr=config.hub_create_pr,
            license=config.hub_license,
            sampler=lambda: pipe,
        )
    except (ValueError, OSError) as error:
        flags = {"--private": config.hub_private, "--create-pr": config.hub_create_pr}
        named = {"--revision": config.hub_revision, "--license": config.hub_license}
        again = ["ddim-plugin push", config.output, config.push_to_hub, *(flag for flag, on in flags.items() if on)]
        again += [f"{flag} {value}" for flag, value in named.items() if value]
        print(f"train.py: not pushed: {error}. The pipeline is saved: {' '.join(again)}", file=sys.stderr)
        return str(error)
    print(f"pushed: {commit.pr_url or commit.commit_url}")
    return None


def device_name(accelerator: Accelerator) -> str:
    """The devices, in words."""
    device = accelerator.device
    if device.type == "cuda":
        return f"{accelerator.num_processes} × {torch.cuda.get_device_name(device)}"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = "CPU"
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'' if threads == 1 else 's'}" if device.type == "cpu" else str(device)


if __name__ == "__main__":
    arguments = parse(TrainConfig)
    try:
        done = main(arguments)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"train.py: {error}")
    main_process, code = PartialState().is_main_process, 0
    if done["status"] != "finished":
        code = 128 + done["signal"]
        if main_process:
            name = signal.Signals(done["signal"]).name
            saved = done["step"] == done["checkpoint"]
            kept = "which is saved" if saved else f"which could not be saved: the last is step {done['checkpoint']}"
            print(f"{name}: {done['status']}, {kept}. Go on with --resume latest", file=sys.stderr)
    elif done.get("not_pushed"):
        code = 1
    if main_process and done["status"] == "finished" and done["seconds"]:
        speed = f"{done['images_per_second']:.0f} images/s"
        print(f"trained {arguments.steps} steps in {done['seconds']:.0f} s ({speed}), loss {done['loss']:.4f}")
    PartialState().destroy_process_group()  # only here, where nothing that communicates is left
    sys.exit(code)
