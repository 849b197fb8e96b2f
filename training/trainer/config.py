"""The settings of training, and the checks that need nothing else."""

import inspect
import math
from dataclasses import dataclass, field
from typing import Any

from diffusers import UNet2DModel
from pictures import Reading

from ddim_plugin import DiscreteDDIMScheduler, GeneralizedDDIMScheduler

from .objective import TIMES

SCHEDULES = ("constant", "cosine", "linear")
OPTIMIZERS = ("adam", "adamw")

POSITIVE = ("steps", "batch_size", "gradient_accumulation_steps", "log_every", "keep_checkpoints", "resolution")
POSITIVE += ("resize", "preview_images", "preview_steps", "eval_images")
NOT_NEGATIVE = ("workers", "memory_gb", "warmup_steps", "weight_decay", "max_grad_norm", "adam_epsilon", "seed")
NOT_NEGATIVE += ("checkpoint_every", "preview_every", "eval_every")
BELOW_ONE = ("ema_decay", "label_dropout", "adam_beta1", "adam_beta2")

FREE = (
    "output",
    "init_from",
    "resume",
    "overwrite",
    "workers",
    "memory_gb",
    "trackers",
    "project",
    "log_every",
    "preview_every",
)
FREE += ("preview_images", "preview_steps", "eval_every", "eval_images", "eval_split", "eval_data", "checkpoint_every")
FREE += ("keep_checkpoints", "push_to_hub", "hub_private", "hub_revision", "hub_create_pr", "hub_license")
"""Settings that may change on resuming, without a note."""

BOUND = ("unet", "scheduler", "resolution", "channels", "class_conditional", "label_dropout", "loss", "times")
BOUND += ("self_conditioning",)
"""Settings that must not change on resuming."""


def setting(default: Any, help: str) -> Any:
    """Declare a setting with its default and the text of its flag."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainConfig(Reading):
    """Train a UNet2DModel on pictures and save it as a GeneralizedDDIMPipeline.

    Start it with `accelerate launch`; settings come from flags, then from --config FILE.toml, then from the defaults.
    """

    output: str = field(metadata={"help": "folder of the run, which becomes the pipeline"})
    data: str = setting("digits", "digits, a folder, parquet or arrow files, or a Hub id")
    split: str = setting("train", "split of the data set")
    label_column: str | None = setting(None, "column of the labels; by default found by its type")
    streaming: bool = setting(False, "read the data set as it arrives, never whole")
    resolution: int | None = setting(None, "side of the pictures; by default as they are")
    channels: int | None = setting(None, "1 or 3; by default 3 if a picture has colours")
    resize: int | None = setting(None, "shorter side before the crop; by default no larger")
    crop: str = setting("center", "center or random")
    flip: bool = setting(False, "mirror half of the pictures")
    workers: int = setting(4, "threads that read and decode pictures")
    memory_gb: float = setting(4.0, "sets up to this size are held in memory, as bytes")
    class_conditional: bool = setting(False, "train with the labels of the set")
    label_dropout: float = setting(0.1, "share trained without label, for guidance")
    self_conditioning: bool = setting(False, "give the network its last x̂0 too")

    unet: dict = field(default_factory=dict)
    scheduler: dict = field(default_factory=dict)
    loss: str = setting(
        "simple", "simple, theorem1, min_snr, soft_min_snr, edm, bound, hybrid; cross_entropy of tokens"
    )
    loss_eta: float = setting(1.0, "η of the process that theorem1, bound and hybrid refer to")
    snr_gamma: float = setting(5.0, "γ of min_snr and soft_min_snr")
    bound_weight: float = setting(1e-3, "weight of the bound in hybrid")
    times: str = setting("antithetic", "antithetic, uniform, importance, logit_normal or log_normal")

    steps: int = setting(2000, "optimiser steps")
    batch_size: int = setting(64, "images a step, over all processes and accumulation")
    gradient_accumulation_steps: int = setting(1, "parts in which a batch is computed")
    optimizer: str = setting("adam", "adam or adamw")
    learning_rate: float = setting(2e-4, "peak learning rate")
    lr_schedule: str = setting("constant", "constant, cosine or linear, after the warm-up")
    warmup_steps: int = setting(500, "steps of linear warm-up")
    adam_beta1: float = setting(0.9, "decay of the mean of gradients")
    adam_beta2: float = setting(0.999, "decay of the mean of their squares")
    adam_epsilon: float = setting(1e-8, "ε of Adam")
    weight_decay: float = setting(0.0, "weight decay")
    max_grad_norm: float = setting(1.0, "gradient clipping; 0 for none")
    ema_decay: float = setting(0.9999, "largest decay of the averaged weights")
    ema_warmup: bool = setting(True, "let that decay rise from 0")
    mixed_precision: str | None = setting(None, "no, fp16 or bf16; by default the setting of `accelerate launch`")
    compile: bool = setting(False, "compile the network by torch.compile")
    channels_last: bool = setting(False, "keep tensors in the order channels-last")
    seed: int = setting(0, "seed of the weights, the data order and the noise")

    log_every: int = setting(50, "steps between lines of the log")
    trackers: tuple[str, ...] = setting(("tensorboard",), "tensorboard, wandb, … of Accelerate, or none")
    project: str = setting("ddim", "name of the project in the trackers")
    checkpoint_every: int = setting(5000, "steps between checkpoints; 0 for none")
    keep_checkpoints: int = setting(2, "checkpoints to keep")
    preview_every: int = setting(5000, "steps between previews; 0 for none")
    preview_images: int = setting(36, "pictures in a preview")
    preview_steps: int = setting(50, "S of the previews")
    eval_every: int = setting(0, "steps between losses on held-out pictures; 0 for none")
    eval_images: int = setting(1024, "held-out pictures, the first of their split")
    eval_data: str | None = setting(None, "data set of those pictures, if it is another one")
    eval_split: str | None = setting(None, "their split; test, or train of eval_data")
    init_from: str | None = setting(None, "start from the averaged weights of a pipeline, Hub id or checkpoint")
    resume: str | None = setting(None, "latest, or the folder of a checkpoint")
    overwrite: bool = setting(False, "replace the output of an earlier run")

    push_to_hub: str | None = setting(None, "repo to push the finished pipeline to: user/model")
    hub_private: bool = setting(False, "make that repo private")
    hub_revision: str | None = setting(None, "its branch; main by default")
    hub_create_pr: bool = setting(False, "open a pull request instead")
    hub_license: str | None = setting(None, "licence of the weights, as the Hub names it")


def check(config: TrainConfig, processes: int) -> None:
    """Raise ValueError for settings that cannot work with this number of processes."""
    for name in POSITIVE:
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise ValueError(f"{name} must be positive, not {getattr(config, name)}")
    for name in NOT_NEGATIVE:
        if not getattr(config, name) >= 0:
            raise ValueError(f"{name} must not be negative, not {getattr(config, name)}")
    for name in BELOW_ONE:
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name} must be in [0, 1), not {getattr(config, name)}")
    if not 0 < config.learning_rate < math.inf:
        raise ValueError(f"learning_rate must be positive, not {config.learning_rate}")
    for name, known in (("lr_schedule", SCHEDULES), ("optimizer", OPTIMIZERS), ("times", TIMES)):
        if getattr(config, name) not in known:
            raise ValueError(f"unknown {name} {getattr(config, name)!r}: use {', '.join(known)}")
    parts = processes * config.gradient_accumulation_steps
    if config.batch_size % parts:
        raise ValueError(
            f"batch_size={config.batch_size} cannot be shared by {processes} processes and "
            f"gradient_accumulation_steps={config.gradient_accumulation_steps}: it must be a multiple of {parts}"
        )
    if config.scheduler.get("variance_type") == "optimal":
        raise ValueError("variance_type 'optimal' is measured on a trained network: train with 'fixed_small'")
    if scheduler_class(config.scheduler) is DiscreteDDIMScheduler and (config.push_to_hub or config.self_conditioning):
        raise ValueError("categorical data has no push_to_hub, nor self_conditioning: leave them out, or num_classes")
    if config.label_column is not None and not config.class_conditional:
        raise ValueError("label_column is used with class_conditional alone: add --class_conditional")
    if config.resume is not None and config.overwrite:
        raise ValueError("--resume continues a run and --overwrite replaces it: choose one")
    check_table("unet", config.unet, UNet2DModel)
    check_table("scheduler", config.scheduler, scheduler_class(config.scheduler))


def scheduler_class(table: dict[str, Any]) -> type[DiscreteDDIMScheduler] | type[GeneralizedDDIMScheduler]:
    """Return the class that the settings of [scheduler] belong to: with `num_classes` that for categorical data."""
    return DiscreteDDIMScheduler if "num_classes" in table else GeneralizedDDIMScheduler


def check_table(name: str, table: dict[str, Any], cls: type) -> None:
    """Raise ValueError for keys of a table that are not settings of `cls`."""
    known = set(inspect.signature(cls.__init__).parameters) - {"self"}
    unknown = sorted(table.keys() - known)
    if unknown:
        raise ValueError(f"unknown settings in [{name}]: {', '.join(unknown)}. Known: {', '.join(sorted(known))}")


def learning_rate(step: int, config: TrainConfig) -> float:
    """Return the learning rate of optimiser step 1, 2, …: linear warm-up, then the schedule's decay towards 0."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    done = (step - 1 - config.warmup_steps) / (config.steps - config.warmup_steps)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return config.learning_rate * factor[config.lr_schedule]
