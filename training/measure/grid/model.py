"""The model that is measured: a pipeline that draws picture i from the seed of picture i alone."""

import inspect
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, wraps
from typing import Any

import numpy as np
import torch
from cards.weights import weights_digest
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Generator, Tensor, nn

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler
from ddim_plugin.process.moves import ETA_FREE
from ddim_plugin.schedulers import restored

from ..labels import count_classes, in_turn
from ..parts import DTYPES, is_missing_folder
from .cells import Cell, make_scheduler
from .settings import SAVED, EvaluateConfig

OPENED = ("GeneralizedDDIMPipeline", "DDPMPipeline", "DDIMPipeline", "PNDMPipeline", "ScoreSdeVePipeline")
"""Pipelines that open as ours. diffusers opens all others."""


@dataclass(frozen=True)
class Sampling:
    """All that the numbers of a cell depend on. `eta` is passed to the pipeline, and results list `shown`."""

    scheduler: str
    scheduler_config: dict[str, Any]
    eta: float | None
    guidance: float | None
    num_inference_steps: int
    timesteps: list[float]
    shown: dict[str, Any]


class Enough(Exception):
    """Ends the call of a pipeline when its pace is known."""


class Model:
    """An unconditional pipeline: ours, or one of diffusers that takes a batch size and generators."""

    def __init__(self, config: EvaluateConfig, device: torch.device):
        self.config, self.device = config, device
        self.pipe = open_pipeline(config.model)
        self.pipe.set_progress_bar_config(disable=True)
        self.fingerprint = weights_digest(*(p for p in self.pipe.components.values() if isinstance(p, nn.Module)))
        self.pipe.to(device)
        if config.dtype != "float32":
            self.pipe.to(DTYPES[config.dtype])
        self.saved = self.pipe.scheduler
        self.ours = isinstance(self.pipe, GeneralizedDDIMPipeline)
        self.arguments = inspect.signature(self.pipe.__call__).parameters
        network = self.pipe.unet
        self.classes = count_classes(config.model, network, config.classes)
        if config.guidance and not self.classes:
            raise ValueError(f"{config.model} is unconditional: leave out --guidance")
        if self.classes and not self.ours:
            raise ValueError(f"{config.model} takes class labels, which {type(self.pipe).__name__} does not pass on")
        self.generators: list[Generator] = []
        self.on_call: Callable[[int], None] = lambda rows: None
        network.register_forward_pre_hook(
            lambda module, args, kwargs: self.on_call(len(args[0] if args else kwargs["sample"])), with_kwargs=True
        )

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of its pictures."""
        if self.ours:
            if self.pipe.image_size is None:
                raise ValueError("the network's config has no sample_size: set it there")
            return (self.pipe.image_channels, *self.pipe.image_size)
        return tuple(self.pictures(range(1), self.prepare(Cell(SAVED, SAVED, SAVED, 2))).shape[1:])

    def prepare(self, cell: Cell) -> Sampling:
        """Give the pipeline the scheduler of a cell. Raises ValueError if they do not fit."""
        scheduler, eta = make_scheduler(cell, self.saved, self.config.clip)
        takes_eta = self.ours or "eta" in self.arguments or isinstance(scheduler, GeneralizedDDIMScheduler)
        if eta is not None and not takes_eta:
            raise ValueError(f"{type(self.pipe).__name__} passes no η on: measure {cell.scheduler}:{SAVED}")
        self.pipe.scheduler = scheduler
        if self.ours:
            self.pipe._check_channels()
        else:
            self.seed(scheduler)
        saved = scheduler.config
        kind, shown_eta = cell.noise.kind or saved.get("variance_type"), eta
        if cell.variance == SAVED:
            shown_eta = saved.get("eta")
        return Sampling(
            scheduler=type(scheduler).__name__,
            scheduler_config=json.loads(scheduler.to_json_string()),
            eta=eta,
            guidance=cell.guidance,
            num_inference_steps=cell.steps,
            timesteps=scheduler.timesteps.tolist(),
            shown={
                "eta": None if kind in ETA_FREE else shown_eta,
                "variance_type": saved.get("variance_type"),
                "timestep_spacing": saved.get("timestep_spacing"),
                **({} if cell.guidance is None else {"guidance_scale": cell.guidance}),
            },
        )

    def seed(self, scheduler: SchedulerMixin) -> None:
        """Make `step` use the pictures' generators if the pipeline passes none, as several forget to."""
        step = scheduler.step
        if "generator" not in inspect.signature(step).parameters:
            return

        @wraps(step)
        def seeded(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("generator") is None:
                kwargs["generator"] = self.generators
            return step(*args, **kwargs)

        scheduler.step = seeded

    def pictures(self, numbers: range, sampling: Sampling) -> Tensor:
        """Draw pictures as uint8 (B, C, H, W) on the device, rounded as when saved to files.

        Raises:
            ValueError: if they are not finite, or depend on noise that no picture's seed decides.
        """
        self.generators = [Generator().manual_seed(self.config.seed + i) for i in numbers]
        given: dict[str, Any] = {
            "batch_size": len(numbers),
            "num_inference_steps": sampling.num_inference_steps,
            "generator": self.generators,
            "output_type": "pt" if self.ours else "np",
        }
        if sampling.eta is not None and "eta" in self.arguments:
            given["eta"] = sampling.eta
        if self.classes:
            given["class_labels"] = in_turn(numbers, self.classes)
        if sampling.guidance is not None:
            given["guidance_scale"] = sampling.guidance
        before = random_state(self.device)
        images = self.pipe(**given).images
        pipeline, scheduler = type(self.pipe).__name__, type(self.pipe.scheduler).__name__
        if random_state(self.device) != before:
            raise ValueError(
                f"{pipeline} with {scheduler} draws noise that no picture's seed decides: the numbers would depend on "
                "the batch size. Take another scheduler, or variance 0"
            )
        if not isinstance(images, Tensor):
            images = torch.from_numpy(np.asarray(images)).permute(0, 3, 1, 2)
        if len(images) != len(numbers):
            raise ValueError(f"{pipeline} returned {len(images)} pictures for a batch size of {len(numbers)}")
        if not images.isfinite().all():
            steps = sampling.num_inference_steps
            raise ValueError(f"the pictures hold NaN or infinity, at S={steps} with {scheduler}")
        return (images.float() * 255).round().to(torch.uint8)

    @contextmanager
    def counted(self) -> Iterator[list[int]]:
        """Collect the number of rows in each call of the network."""
        rows: list[int] = []
        self.on_call = rows.append
        try:
            yield rows
        finally:
            self.on_call = lambda rows: None

    def pace(self, cell: Cell) -> float:
        """Measure the seconds of an evaluation of the network, for one picture of a batch."""
        count, times = min(self.config.batch_size, self.config.part, self.config.images), []

        def tick(rows: int) -> None:
            synchronize(self.device)
            times.append(time.perf_counter())
            evaluated.append(rows)
            if len(times) == 4:
                raise Enough

        sampling, evaluated = self.prepare(cell), [count]
        self.on_call = tick
        try:
            for _ in range(2):  # the first warms up
                times.clear()
                with suppress(Enough):
                    self.pictures(range(count), sampling)
                    tick(count)
        finally:
            self.on_call = lambda rows: None
        return (times[-1] - times[0]) / (len(times) - 1) / max(evaluated)


def open_pipeline(name: str) -> Any:
    """Open a model as our pipeline if it fits, else as the pipeline of diffusers that its index names."""
    if is_missing_folder(name):
        raise ValueError(f"there is no folder {name}: a model is a folder written by save_pretrained, or a Hub id")
    try:
        named = DiffusionPipeline.load_config(name)["_class_name"]
    except OSError:
        return GeneralizedDDIMPipeline.from_pretrained(name)  # whose error is clear
    if (named[-1] if isinstance(named, list | tuple) else named) in OPENED:
        return GeneralizedDDIMPipeline.from_pretrained(name)
    pipe = DiffusionPipeline.from_pretrained(name)
    missing = {"batch_size", "num_inference_steps", "generator", "output_type"}
    missing -= inspect.signature(pipe.__call__).parameters.keys()
    if missing or not hasattr(pipe, "unet") or not hasattr(pipe, "scheduler"):
        wanted = f"takes no {', '.join(sorted(missing))}" if missing else "has no unet and scheduler"
        raise ValueError(f"{name} is no unconditional pipeline: its {type(pipe).__name__} {wanted}")
    pipe.scheduler = restored(pipe.scheduler)
    return pipe


def random_state(device: torch.device) -> list[bytes]:
    """Return the states of the global generators."""
    states = [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])
    return [state.numpy().tobytes() for state in states]


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
