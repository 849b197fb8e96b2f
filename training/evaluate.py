"""Measure a model: pictures at any S, variance, τ and scheduler, and their distance from a data set (Tables 1 and 3).

python training/evaluate.py --model user/model --reference user/data --table1 --output out/table1
accelerate launch training/evaluate.py --model out/mnist --reference mnist --extractors my/classifier --images 10000

Picture i comes from the seed `seed + i`, whatever the batch size and the number of processes. A run that was killed
goes on where it was.
"""

import inspect
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cached_property, wraps
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import InitProcessGroupKwargs
from diffusers import DiffusionPipeline, SchedulerMixin
from measure.extractors import (
    INCEPTION,
    Extractor,
    Reference,
    Statistics,
    digest,
    extract,
    join,
    open_extractor,
    open_reference,
    read_parts,
    save_whole,
    statistics,
    work,
)
from measure.metrics import METRICS, Features, check_count, check_metrics, frechet, gaussian
from pictures.sources import Frame, as_dataset, has_splits, open_pictures
from safetensors.numpy import load_file
from torch import Generator, Tensor
from trainer.settings import parse, record, write_json

import ddim_plugin
from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler
from ddim_plugin.hub.reading import weights_digest, write_whole
from ddim_plugin.pipelines.images import grid
from ddim_plugin.process.moves import ETA_FREE, VARIANCES
from ddim_plugin.schedulers.generalized import OWN, STOCK_SPACINGS, keep_learned

SAVED = "saved"
"""The scheduler, variance, spacing or clipping that the model was saved with."""

PRESETS: dict[str, dict[str, Any]] = {
    "": {"steps": (10, 20, 50, 100), "variances": ("0", "1"), "spacings": (SAVED,), "clip": SAVED},
    "table1": {
        "steps": (10, 20, 50, 100, 1000),
        "variances": ("0", "0.2", "0.5", "1", "fixed_large"),
        "spacings": ("quadratic",),
        "clip": "fixed_large",
    },
    "table3": {
        "steps": (10, 20, 50, 100),
        "variances": ("0", "1"),
        "spacings": ("linear",),
        "clip": "never",
    },
}
"""The paper's settings: τ quadratic for CIFAR-10, linear elsewhere (D.2); for σ̂ x̂0 is clipped and ε̂ made from that."""

PAPER: dict[str, dict[str, dict[str, tuple[float, ...]]]] = {
    "table1": {
        "CIFAR-10": {
            "0": (13.36, 6.84, 4.67, 4.16, 4.04),
            "0.2": (14.04, 7.11, 4.77, 4.25, 4.09),
            "0.5": (16.66, 8.35, 5.25, 4.46, 4.29),
            "1": (41.07, 18.36, 8.01, 5.78, 4.73),
            "fixed_large": (367.43, 133.37, 32.72, 9.99, 3.17),
        },
        "CelebA": {
            "0": (17.33, 13.73, 9.17, 6.53, 3.51),
            "0.2": (17.66, 14.11, 9.51, 6.79, 3.64),
            "0.5": (19.86, 16.06, 11.01, 8.09, 4.28),
            "1": (33.12, 26.03, 18.48, 13.93, 5.98),
            "fixed_large": (299.71, 183.83, 71.71, 45.20, 3.26),
        },
    },
    "table3": {
        "LSUN bedroom": {"0": (16.95, 8.89, 6.75, 6.62), "1": (42.78, 22.77, 10.81, 6.81)},
        "LSUN church": {"0": (19.45, 12.47, 10.84, 10.58), "1": (51.56, 23.37, 11.16, 8.27)},
    },
}
"""FID in the paper, by dataset and variance, at the preset's S."""

CLIPS = (SAVED, "always", "never", "fixed_large")
OPENED = ("GeneralizedDDIMPipeline", "DDPMPipeline", "DDIMPipeline", "PNDMPipeline")  # others as diffusers opens them
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

SHOWN = 10
"""Pictures of each cell that are kept for the grids."""

FREE = ("batch_size", "part", "workers", "device", "cache", "overwrite", "estimate", "output")
"""Settings that do not change a number."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure a model on a grid of S × variance × τ × scheduler, against a data set, and write tables and plots.

    An interrupted run goes on where it was: start it again. Finished cells are not measured again.
    """

    model: str = field(metadata={"help": "a folder written by save_pretrained, or a Hub id"})
    reference: str = field(metadata={"help": "data set: digits, a folder, a parquet or arrow file, or a Hub id"})
    output: str = field(default="out/evaluate", metadata={"help": "folder for the results"})
    splits: tuple[str, ...] | None = field(
        default=None, metadata={"help": "splits to measure against; by default train and test, where there are splits"}
    )
    image_column: str | None = field(default=None, metadata={"help": "column of pictures in the reference"})
    table1: bool = field(default=False, metadata={"help": "the settings of Table 1, where no others are given"})
    table3: bool = field(default=False, metadata={"help": "the settings of Table 3, where no others are given"})
    steps: tuple[int, ...] | None = field(default=None, metadata={"help": "S: columns of the table; 10 20 50 100"})
    variances: tuple[str, ...] | None = field(
        default=None,
        metadata={
            "help": "rows: η as a number, fixed_large (σ̂), learned_range, optimal or optimal:η, saved; by default 0 1"
        },
    )
    spacings: tuple[str, ...] | None = field(
        default=None, metadata={"help": "spacings of τ: linear, quadratic, …; by default the saved one"}
    )
    schedulers: tuple[str, ...] = field(
        default=("GeneralizedDDIMScheduler",),
        metadata={
            "help": "classes of this package or of diffusers, or saved; NAME:saved is not crossed with variances and "
            "spacings"
        },
    )
    clip: str | None = field(
        default=None,
        metadata={"help": "x̂0 clipped: saved (as the model says), never, always, fixed_large (as Ho, for σ̂ only)"},
    )
    images: int = field(default=50_000, metadata={"help": "pictures of each cell, exactly"})
    extractors: tuple[str, ...] = field(
        default=(INCEPTION,),
        metadata={"help": "of torch-fidelity by name, or folders or Hub ids of image classifiers of transformers"},
    )
    metrics: tuple[str, ...] = field(
        default=("fd",),
        metadata={"help": "fd (Fréchet distance; FID), kid, is (inception score), pr (precision, recall)"},
    )
    kid_subset_size: int = field(default=1000, metadata={"help": "pictures in a subset of KID"})
    seed: int = field(default=0, metadata={"help": "picture i comes from seed + i"})
    dtype: str = field(default="float32", metadata={"help": "of the network: float32, bfloat16, float16"})
    batch_size: int = field(default=100, metadata={"help": "pictures at a time, on each process"})
    part: int = field(default=1000, metadata={"help": "pictures between saves; processes share out whole parts"})
    workers: int = field(default=2, metadata={"help": "threads that read the reference"})
    cache: str | None = field(default=None, metadata={"help": "folder of reference statistics; OUTPUT/references"})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, …; by default as Accelerate finds"})
    estimate: bool = field(default=False, metadata={"help": "say what it would cost, and stop"})
    overwrite: bool = field(default=False, metadata={"help": "replace results.json of other settings; cells are kept"})


def settle(config: EvaluateConfig) -> EvaluateConfig:
    """The config with what a preset or the defaults say. Raises ValueError for settings that cannot work."""
    if config.table1 and config.table3:
        raise ValueError("choose one of --table1 and --table3")
    preset = PRESETS["table1" if config.table1 else "table3" if config.table3 else ""]
    config = replace(config, **{key: value for key, value in preset.items() if getattr(config, key) is None})
    for name in ("images", "batch_size", "part", "kid_subset_size", "workers"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be positive, not {getattr(config, name)}")
    for name in ("steps", "variances", "spacings", "schedulers", "extractors", "splits"):
        values = getattr(config, name)
        if values is not None and (not values or len(set(values)) < len(values)):
            raise ValueError(f"{name} must be distinct, and one at least, not {values}")
    if min(config.steps) < 1:
        raise ValueError(f"steps must be positive numbers, not {config.steps}")
    if config.clip not in CLIPS:
        raise ValueError(f"unknown clip {config.clip!r}: use one of {', '.join(CLIPS)}")
    if config.dtype not in DTYPES:
        raise ValueError(f"unknown dtype {config.dtype!r}: use one of {', '.join(DTYPES)}")
    check_metrics(config.metrics)
    return config


# ---- the grid ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One entry of the table: how pictures are made. `variance` is a number (η), a kind, or "saved"."""

    scheduler: str
    variance: str
    spacing: str
    steps: int

    @cached_property
    def noise(self) -> tuple[str | None, float | None]:
        """(variance type, η) that the variance stands for; None is what was saved, or does not apply."""
        if self.variance == SAVED:
            return None, None
        kind, _, eta = self.variance.partition(":")
        if kind not in VARIANCES:
            kind, eta = "fixed_small", self.variance
        try:
            number = float(eta) if eta else 0.0 if kind == "optimal" else 1.0
        except ValueError:
            number = math.nan
        if not 0 <= number < math.inf or (eta and kind in ("fixed_large", "learned_range")):
            raise ValueError(
                f"unknown variance {self.variance!r}: use a number (η), {', '.join(VARIANCES)}, optimal:η, {SAVED}"
            )
        return kind, number

    def label(self, plain: bool = False) -> str:
        """The variance as a row of the table; `plain` in ASCII."""
        kind, eta = self.noise
        names = {None: self.variance, "fixed_large": "σ̂", "learned_range": "learned"}
        text = names.get(kind) or ("optimal, " if kind == "optimal" else "") + f"η = {eta:g}"
        return text.replace("η", "eta").replace("σ̂", "sigma-hat") if plain else text


def cells(config: EvaluateConfig) -> list[Cell]:
    """The cells of the grid, the cheapest first."""
    found = []
    for named in config.schedulers:
        name, _, suffix = named.partition(":")
        if suffix not in ("", SAVED):
            raise ValueError(f"unknown scheduler {named!r}: after the colon stands {SAVED}, or nothing")
        variances, spacings = (config.variances, config.spacings) if not suffix else ((SAVED,), (SAVED,))
        found += [Cell(name, v, spacing, S) for spacing in spacings for v in variances for S in config.steps]
    return sorted(found, key=lambda cell: cell.steps)


def find_scheduler(name: str, saved: SchedulerMixin) -> type:
    """The class of that name, of this package or of diffusers."""
    if name == SAVED:
        return type(saved)
    found = getattr(ddim_plugin, name, None) or getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, SchedulerMixin)):
        raise ValueError(f"unknown scheduler {name!r}: use {SAVED}, or a class such as GeneralizedDDIMScheduler")
    return found


def make_scheduler(cell: Cell, saved: SchedulerMixin, clip: str) -> tuple[SchedulerMixin, float | None]:
    """The scheduler of a cell, with its S steps set, and the η that the pipeline is called with.

    Raises ValueError for what that scheduler cannot do.
    """
    cls = find_scheduler(cell.scheduler, saved)
    config = dict(saved.config) if cls is type(saved) else json.loads(saved.to_json_string())
    known = inspect.signature(cls.__init__).parameters
    ours, changes = issubclass(cls, GeneralizedDDIMScheduler), {}
    kind, eta = cell.noise
    if cell.spacing != SAVED:
        if "timestep_spacing" not in known or not (ours or cell.spacing in STOCK_SPACINGS):
            raise ValueError(f"{cls.__name__} knows no spacing {cell.spacing!r}: measure {cell.scheduler}:{SAVED}")
        changes["timestep_spacing"] = cell.spacing
    if ours and kind:
        changes |= {"variance_type": kind, "eta": eta}
        changes = keep_learned(config, changes)
        if changes.get("variance_type") is None:  # a network that learned its variance, at η = 0
            changes.pop("eta")
    elif kind and cell.variance in VARIANCES and "variance_type" in known:
        changes["variance_type"], eta = kind, None
    elif kind and (kind != "fixed_small" or "eta" not in inspect.signature(cls.step).parameters):
        raise ValueError(f"{cls.__name__} knows no variance {cell.variance!r}: measure {cell.scheduler}:{SAVED}")
    clipped = {"always": True, "never": False, "fixed_large": kind == "fixed_large"}.get(clip)
    if clipped is not None and cell.variance != SAVED:
        if clipped and "clip_sample" not in known:
            raise ValueError(f"{cls.__name__} does not clip: measure {cell.scheduler}:{SAVED}")
        changes |= {"clip_sample": clipped} if "clip_sample" in known else {}
        if clipped and clip == "fixed_large" and "use_clipped_model_output" in known:
            changes["use_clipped_model_output"] = True  # the authors' σ̂ is Ho's sampler: ε̂ from the clipped x̂0
    try:
        made = cls.from_config(config, **changes)
        T = made.config.get("num_train_timesteps")
        if T is not None and cell.steps > T:
            raise ValueError(f"S={cell.steps} is more than T={T}")
        made.set_timesteps(cell.steps)
        if ours:
            made.check_eta(eta)
    except (ValueError, TypeError, NotImplementedError, ImportError, AssertionError, IndexError) as error:
        spacing = "" if cell.spacing == SAVED else f", spacing {cell.spacing}"
        raise ValueError(f"{cls.__name__}, variance {cell.variance}, S={cell.steps}{spacing}: {error}") from error
    return made, eta


# ---- the model -----------------------------------------------------------------------------------------------------


class Enough(Exception):
    """Ends a run of a pipeline whose pace is known."""


class Model:
    """An unconditional pipeline: ours, or any of diffusers that makes pictures from a batch size and generators."""

    def __init__(self, config: EvaluateConfig, device: torch.device):
        self.config, self.device = config, device
        self.pipe = open_pipe(config.model)
        self.pipe.set_progress_bar_config(disable=True)
        modules = [part for part in self.pipe.components.values() if isinstance(part, torch.nn.Module)]
        self.fingerprint = weights_digest(*modules)
        self.pipe.to(device)
        if config.dtype != "float32":
            self.pipe.to(DTYPES[config.dtype])
        self.saved = self.pipe.scheduler
        self.ours = isinstance(self.pipe, GeneralizedDDIMPipeline)
        self.known = inspect.signature(self.pipe.__call__).parameters
        network = self.pipe.unet
        embedded = getattr(network, "class_embedding", None) is not None
        self.classes = network.config.num_class_embeds if embedded else None
        if embedded and (not self.ours or not self.classes):
            raise ValueError(f"{config.model} takes class labels, and does not say how many there are")
        self.generators: list[Generator] = []
        self.on_call: Callable[[int], None] = lambda rows: None
        network.register_forward_pre_hook(
            lambda module, args, kwargs: self.on_call(rows_of(args, kwargs)), with_kwargs=True
        )

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of its pictures."""
        if self.ours:
            if self.pipe.image_size is None:
                raise ValueError("the network's config has no sample_size: set it there")
            return (self.pipe.unet.config.in_channels, *self.pipe.image_size)
        eta = self.prepare(Cell(SAVED, SAVED, SAVED, 2))["eta"]
        return tuple(self.pictures(range(1), 2, eta).shape[1:])

    def prepare(self, cell: Cell) -> dict[str, Any]:
        """Take the cell's scheduler. Returns what pictures are made with."""
        scheduler, eta = make_scheduler(cell, self.saved, self.config.clip)
        if not self.ours and eta is not None and "eta" not in self.known and not hasattr(scheduler, "check_eta"):
            raise ValueError(f"{type(self.pipe).__name__} passes no η on: measure {cell.scheduler}:{SAVED}")
        self.pipe.scheduler = scheduler
        if self.ours:
            self.pipe._check_channels()
        else:
            self.seed(scheduler)
        kind = cell.noise[0] or scheduler.config.get("variance_type")
        said = scheduler.config.get("eta") if cell.variance == SAVED else eta
        return {
            "scheduler": type(scheduler).__name__,
            "scheduler_config": json.loads(scheduler.to_json_string()),
            "eta": eta,  # of the call
            "num_inference_steps": cell.steps,
            "timesteps": scheduler.timesteps.tolist(),
            "shown": {
                "eta": None if kind in ETA_FREE else said,
                "variance_type": scheduler.config.get("variance_type"),
                "timestep_spacing": scheduler.config.get("timestep_spacing"),
            },
        }

    def seed(self, scheduler: SchedulerMixin) -> None:
        """Make its steps take the pictures' generators where the pipeline gives them none, as several forget to."""
        step = scheduler.step
        if "generator" not in inspect.signature(step).parameters:
            return

        @wraps(step)
        def seeded(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("generator") is None:
                kwargs["generator"] = self.generators
            return step(*args, **kwargs)

        scheduler.step = seeded

    def pictures(self, numbers: range, steps: int, eta: float | None) -> Tensor:
        """Pictures of these numbers as uint8 (B, C, H, W) on the device, rounded as when saved to files."""
        self.generators = [Generator().manual_seed(self.config.seed + i) for i in numbers]
        given: dict[str, Any] = {
            "batch_size": len(numbers),
            "num_inference_steps": steps,
            "generator": self.generators,
            "output_type": "pt" if self.ours else "np",
        }
        if eta is not None and "eta" in self.known:
            given["eta"] = eta
        if self.classes:
            given["class_labels"] = [i % self.classes for i in numbers]
        before = random_state(self.device)
        images = self.pipe(**given).images
        if random_state(self.device) != before:
            raise ValueError(
                f"{type(self.pipe).__name__} with {type(self.pipe.scheduler).__name__} draws noise that no picture's "
                "seed decides: the numbers would depend on the batch size. Take another scheduler, or variance 0"
            )
        if not isinstance(images, Tensor):
            images = torch.from_numpy(np.asarray(images)).permute(0, 3, 1, 2)
        if len(images) != len(numbers):
            raise ValueError(
                f"{type(self.pipe).__name__} made {len(images)} pictures where {len(numbers)} were asked for"
            )
        if not images.isfinite().all():
            raise ValueError(
                f"the pictures hold NaN or infinity, at S={steps} with {type(self.pipe.scheduler).__name__}"
            )
        return (images.float() * 255).round().to(torch.uint8)

    @contextmanager
    def counted(self) -> Iterator[list[int]]:
        """Collects, for each call of the network, the number of its rows."""
        rows: list[int] = []
        self.on_call = rows.append
        try:
            yield rows
        finally:
            self.on_call = lambda rows: None

    def pace(self, cell: Cell) -> float:
        """Seconds from one evaluation of the network for a picture to the next, in a batch."""
        count, times = min(self.config.batch_size, self.config.part, self.config.images), []

        def tick(rows: int) -> None:
            synchronize(self.device)
            times.append(time.perf_counter())
            if len(times) == 4:
                raise Enough

        settings = self.prepare(cell)
        self.on_call = tick
        try:
            for _ in range(2):  # the first warms up
                times.clear()
                with suppress(Enough):
                    self.pictures(range(count), cell.steps, settings["eta"])
                    tick(count)
        finally:
            self.on_call = lambda rows: None
        return (times[-1] - times[0]) / (len(times) - 1) / count


def open_pipe(name: str) -> Any:
    """Our pipeline where the model fits it, else the one of diffusers that the model names."""
    try:
        named = DiffusionPipeline.load_config(name)["_class_name"]
    except OSError:
        return GeneralizedDDIMPipeline.from_pretrained(name)  # which says what is wrong
    if (named[-1] if isinstance(named, list | tuple) else named) in OPENED:
        return GeneralizedDDIMPipeline.from_pretrained(name)
    pipe = DiffusionPipeline.from_pretrained(name)
    known = inspect.signature(pipe.__call__).parameters
    missing = {"batch_size", "num_inference_steps", "generator", "output_type"} - known.keys()
    if missing or not hasattr(pipe, "unet") or not hasattr(pipe, "scheduler"):
        wanted = f"takes no {', '.join(sorted(missing))}" if missing else "has no unet and scheduler"
        raise ValueError(f"{name} is no unconditional pipeline: its {type(pipe).__name__} {wanted}")
    return pipe


def random_state(device: torch.device) -> list[bytes]:
    """Of the generators that belong to no picture."""
    states = [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])
    return [state.numpy().tobytes() for state in states]


def rows_of(args: tuple, kwargs: dict[str, Any]) -> int:
    return len(args[0] if args else kwargs["sample"])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- the run -------------------------------------------------------------------------------------------------------


class Run:
    """A model, extractors, references and a folder of finished cells."""

    def __init__(self, config: EvaluateConfig):
        self.config, self.output = config, Path(config.output)
        self.cache = Path(config.cache) if config.cache else self.output / "references"
        self.state = start_processes(config.device)
        device = torch.device(config.device) if config.device and self.state.num_processes == 1 else self.state.device
        self.grid = cells(config)
        self.model = Model(config, device)
        self.settings = {cell: self.model.prepare(cell) for cell in self.grid}  # ValueError where it cannot be
        shape = self.model.shape
        self.extractors = [open_extractor(name, device, shape) for name in config.extractors]
        if len({each.slug for each in self.extractors}) < len(self.extractors):
            raise ValueError(f"extractors must have distinct last names, not {config.extractors}")
        for each in self.extractors:
            if "is" in config.metrics and each.classes is None:
                raise ValueError(f"the metric is needs a classifier, which {each.name} is not")
            if "fd" in config.metrics:
                check_count(config.images, each.dimension)
        self.check_output()
        self.references = self.open_references(Frame(shape[0], shape[1:]))
        self.shared = {
            "model": self.model.fingerprint,
            "images": config.images,
            "seed": config.seed,
            "dtype": config.dtype,
            "classes": self.model.classes,
            "extractors": [each.fingerprint for each in self.extractors],
            "references": [each.contents for each in self.references],
            "metrics": config.metrics,
            "kid_subset_size": config.kid_subset_size if "kid" in config.metrics else None,
        }
        self.keys = {cell: self.key(settings) for cell, settings in self.settings.items()}

    def open_references(self, frame: Frame) -> list[Reference]:
        """The splits to measure against. Raises ValueError where one is not there, empty, or too small."""
        config = self.config
        known = ("train", "test") if has_splits(config.reference) else ("train",)
        sets = {each: open_pictures(config.reference, each, config.image_column) for each in config.splits or known}
        for split, pictures in sets.items():
            if pictures.count == 0:
                raise ValueError(f"the reference {config.reference} has no pictures in its split {split!r}")
            if "kid" in config.metrics and min(pictures.count, config.images) < config.kid_subset_size:
                raise ValueError(
                    f"KID takes subsets of {config.kid_subset_size}, of {config.images} pictures and of the "
                    f"{pictures.count} of the split {split!r}: say a smaller --kid_subset_size"
                )
            for each in self.extractors:
                if "fd" in config.metrics:
                    check_count(
                        pictures.count, each.dimension, f"pictures of the split {split!r} of {config.reference}"
                    )
        given = (config.reference, self.cache, config.image_column, config.workers)
        return [open_reference(pictures, split, frame, *given) for split, pictures in sets.items()]

    def against(self, extractor: Extractor) -> list[Statistics]:
        """What pictures are compared with: each reference seen by an extractor."""
        metrics = self.config.metrics
        whole = any(METRICS[name].compute is not None and METRICS[name].against for name in metrics)
        given = (extractor, self.cache, self.config.batch_size, "fd" in metrics, whole)
        if not whole and "fd" not in metrics:
            return [Statistics(None, None) for _ in self.references]
        return [statistics(reference, *given) for reference in self.references]

    def check_output(self) -> None:
        """Raise ValueError where the output holds results of other settings."""
        file = self.output / "results.json"
        if self.config.overwrite or self.config.estimate or not file.exists():
            return
        before, now = json.loads(file.read_text())["config"], json.loads(json.dumps(record(self.config)["config"]))
        changed = sorted(key for key in now if key not in FREE and before.get(key) != now[key])
        if changed:
            raise ValueError(
                f"{file} holds results of other settings ({', '.join(changed)}): choose another output, or pass "
                "--overwrite; cells measured with the same settings are kept"
            )

    def key(self, settings: dict[str, Any]) -> str:
        """Names a cell: a digest of all that its numbers depend on. At S = T our spacings are one."""
        config = settings["scheduler_config"]
        if issubclass(find_scheduler(settings["scheduler"], self.model.saved), GeneralizedDDIMScheduler):
            config = {key: value for key, value in config.items() if key not in ("timestep_spacing", OWN)}
            own = settings["scheduler_config"][OWN]
            config[OWN] = {key: value for key, value in own.items() if key != "timestep_spacing"}
        kept = {key: value for key, value in settings.items() if key != "shown"}
        return digest([self.shared, kept | {"scheduler_config": config}])[:32]

    def done(self, cell: Cell) -> Path:
        return self.output / "cells" / f"{self.keys[cell]}.json"

    def todo(self) -> dict[str, Cell]:
        """What is not finished: of cells with one key the last."""
        return {key: cell for cell, key in self.keys.items() if not self.done(cell).exists()}

    def estimate(self) -> dict[str, Any]:
        """What the cells that are not finished will cost, by the pace of a few evaluations of the network."""
        todo = self.todo()
        evaluations = self.config.images * sum(len(self.settings[cell]["timesteps"]) for cell in todo.values())
        pace = self.model.pace(next(iter(todo.values()))) if todo else 0.0
        batch = torch.zeros((min(self.config.batch_size, self.config.images), *self.model.shape), dtype=torch.uint8)
        extract(self.extractors, batch[:2])
        start = time.perf_counter()
        extract(self.extractors, batch)
        extraction = (time.perf_counter() - start) / len(batch)
        seconds = evaluations * pace + self.config.images * len(todo) * extraction
        return {
            "cells": len(self.grid),
            "finished": sum(key not in todo for key in self.keys.values()),
            "evaluations": evaluations,
            "seconds_an_evaluation": pace,
            "seconds_an_extraction": extraction,
            "hours": seconds / 3600 / self.state.num_processes,
        }

    def sample(self, cell: Cell, folder: Path) -> None:
        """The parts of a cell."""

        def make(numbers: range) -> tuple[dict, dict]:
            settings = self.model.prepare(cell)
            step, seconds, found, shown = self.config.batch_size, 0.0, [], []
            with self.model.counted() as rows:
                for batch in (numbers[i : i + step] for i in range(0, len(numbers), step)):
                    start = time.perf_counter()
                    pictures = self.model.pictures(batch, cell.steps, settings["eta"])
                    synchronize(self.model.device)
                    seconds += time.perf_counter() - start
                    found.append(extract(self.extractors, pictures))
                    shown.append(pictures[: max(0, SHOWN - batch.start)].cpu().numpy())
            return join(found) | {"pictures": np.concatenate(shown)}, {"seconds": seconds, "evaluations": sum(rows)}

        work(folder, self.config.images, self.config.part, make, f"{cell.label()}, S = {cell.steps}")

    def finished(self, cell: Cell) -> dict[str, Any]:
        """What was measured for a cell, under its own names: another with the same key may have been."""
        settings, found = self.settings[cell], json.loads(self.done(cell).read_text())
        results = [entry | settings["shown"] for entry in found["results"]]
        return found | {"cell": vars_of(cell), "settings": settings, "results": results}

    def measure(self, cell: Cell, folder: Path, against: list[list[Statistics]]) -> None:
        """Write the files of a cell from its parts."""
        settings = self.settings[cell]
        arrays, said = read_parts(folder, self.config.images, self.config.part)
        images = len(arrays["features-0"])
        nfe = sum(part["evaluations"] for part in said) / images
        entry = settings["shown"] | {
            "nfe": int(nfe) if nfe == int(nfe) else nfe,
            "num_inference_steps": cell.steps,
            "scheduler": settings["scheduler"],
            "images": images,
            "seed": self.config.seed,
            "seconds": sum(part["seconds"] for part in said),
        }
        results = []
        for k, extractor in enumerate(self.extractors):
            seen = Features(arrays[f"features-{k}"], arrays.get(f"logits-{k}"))
            fitted = gaussian(seen.features) if "fd" in self.config.metrics else None
            for name in self.config.metrics:
                metric = METRICS[name]
                for reference, stored in zip(self.references, against[k], strict=True):
                    if metric.compute is None:
                        found = {"fd": (frechet(fitted, stored.gaussian), None)}
                    else:
                        found = metric.compute(seen, stored.features, self.config.kid_subset_size)
                    for each, (value, deviation) in found.items():
                        results.append(
                            named(each, extractor)
                            | {"value": value}
                            | ({} if deviation is None else {"standard_deviation": deviation})
                            | {"dataset": dataset(reference, metric.against)}
                            | entry
                        )
                    if not metric.against:
                        break
        finished = {"cell": vars_of(cell), "settings": settings, "results": results, "versions": versions(self.config)}
        file = self.done(cell)
        file.parent.mkdir(exist_ok=True)
        save_whole({"pictures": arrays["pictures"]}, file.with_suffix(".safetensors"))
        write_json(file, finished)


def start_processes(device: str | None) -> PartialState:
    """The processes of this run. The main one computes metrics while the others wait, however long that takes."""
    patience = InitProcessGroupKwargs(timeout=timedelta(days=2))
    Accelerator(cpu=device == "cpu", kwargs_handlers=[patience])
    state = PartialState()
    check_launched(state.num_processes)
    return state


def check_launched(processes: int) -> None:
    """Raise ValueError where more processes were launched than know of each other: each would do all the work."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if processes != launched:
        raise ValueError(
            f"{launched} processes were launched that do not know of each other: on the CPU use accelerate launch "
            "--cpu, or set ACCELERATE_USE_CPU=true"
        )


def vars_of(cell: Cell) -> dict[str, Any]:
    return {name: getattr(cell, name) for name in ("scheduler", "variance", "spacing", "steps")}


def named(metric: str, extractor: Extractor) -> dict[str, str]:
    """Id and name of a metric on an extractor's features; FID, KID and IS are those of Inception."""
    name = {"fd": "FD", "kid": "KID", "is": "IS"}.get(metric, metric.capitalize())
    if extractor.name == INCEPTION:
        return {"metric": "fid", "name": "FID"} if metric == "fd" else {"metric": metric, "name": name}
    return {"metric": f"{metric}_{extractor.slug}", "name": f"{name}, {extractor.slug}"}


def dataset(reference: Reference, against: bool) -> dict[str, Any]:
    """The data set of a result, without its split where that plays no part."""
    found = as_dataset(reference.name, reference.split)
    return {key: value for key, value in found.items() if against or key != "split"}


def versions(config: EvaluateConfig) -> dict[str, str]:
    """Versions of the libraries that numbers come from."""
    found = record(config)["versions"]
    for name in ("numpy", "transformers", "torch-fidelity"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def main(config: EvaluateConfig) -> dict[str, Any]:
    """Write cells as they are finished, and after each of them results.json, tables, plots and grids."""
    config = settle(config)
    run = Run(config)
    chief, output = run.state.is_main_process, run.output
    cost = run.estimate()
    if chief:
        print(tell(cost, run.state.num_processes), flush=True)
    if config.estimate:
        return {"estimate": cost}
    output.mkdir(parents=True, exist_ok=True)
    run.cache.mkdir(parents=True, exist_ok=True)
    finished: dict[Cell, dict[str, Any]] = {}
    todo = run.todo()
    run.state.wait_for_everyone()  # all have looked before anyone writes
    against = [run.against(each) for each in run.extractors] if todo else []
    result: dict[str, Any] = {}
    for cell in sorted(run.grid, key=lambda cell: run.keys[cell] in todo):  # what is finished first
        folder = output / "parts" / run.keys[cell]
        if new := todo.pop(run.keys[cell], None) is not None:
            run.sample(cell, folder)
        if chief:
            if new:
                run.measure(cell, folder, against)
            finished[cell] = run.finished(cell)
            if new:
                print(say(finished[cell]), flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            result = summary(run, finished)
            write_json(output / "results.json", result)
        run.state.wait_for_everyone()
    if chief:
        result["pictures"] = write_pictures(run, result)
        write_json(output / "results.json", result)
        with suppress(OSError):
            (output / "parts").rmdir()
    run.state.wait_for_everyone()
    return result


def tell(cost: dict[str, Any], processes: int) -> str:
    """The estimate in a line."""
    return (
        f"{cost['cells']} cells, of which {cost['finished']} are finished; for the others {cost['evaluations']:,} "
        f"evaluations of the network of {1000 * cost['seconds_an_evaluation']:.3g} ms: about {cost['hours']:.2g} h on "
        f"{processes} process{'es' if processes > 1 else ''}, and the references where they are not cached"
    )


def say(finished: dict[str, Any]) -> str:
    """A finished cell in a line."""
    cell = Cell(**finished["cell"])
    values = []
    for each in finished["results"]:
        split = each["dataset"].get("split")
        values.append(f"{each['name']}{f' ({split})' if split else ''} {each['value']:.4g}")
    return f"{cell.scheduler}, {cell.label()}, S = {cell.steps}: " + "; ".join(values)


def summary(run: Run, finished: dict[Cell, dict[str, Any]]) -> dict[str, Any]:
    """results.json: settings, versions, what was measured against, and a list of results."""
    done = {cell: finished[cell] for cell in run.grid if cell in finished}
    result = record(run.config) | {
        "status": "finished" if len(finished) == len(run.grid) else "running",
        "model": {"name": run.config.model, "pipeline": type(run.model.pipe).__name__, "sha256": run.model.fingerprint},
        "made": {
            "shape": run.model.shape,
            "classes": run.model.classes,
            "rounded": "to 8 bits before the extractors",
        },
        "device": str(run.model.device),
        "processes": run.state.num_processes,
        "extractors": [each.record() for each in run.extractors],
        "references": [each.record() for each in run.references],
        "cells": [
            {"cell": each["cell"], "key": run.keys[cell], "versions": each["versions"]} for cell, each in done.items()
        ],
        "results": [entry for each in done.values() for entry in each["results"]],
    }
    result["versions"] = versions(run.config)
    return result


# ---- tables and pictures -------------------------------------------------------------------------------------------


def write_pictures(run: Run, result: dict[str, Any]) -> dict[str, str]:
    """table.md, quality.png, time.png and a grid of samples for each S, all from what was written before.

    Returns the captions of the pictures.
    """
    output = run.output
    write_whole(output / "table.md", table(result))
    plot_quality(result, output / "quality.png")
    plot_time(result, output / "time.png")
    captions = {
        "quality.png": "Distance from the data against S, and against the time that the pictures took.",
        "time.png": "Time against S (Fig. 4 of the paper).",
    }
    for S in sorted({cell.steps for cell in run.grid}):
        chosen = [cell for cell in run.grid if cell.steps == S]
        arrays = [load_file(run.done(cell).with_suffix(".safetensors"))["pictures"] for cell in chosen]
        rows = [array.transpose(0, 2, 3, 1) / 255 for array in arrays]
        labels = [
            " ".join(filter(None, series_name(vars_of(cell), vars_of_all(result), plain=True))) for cell in chosen
        ]
        grid(rows, labels, f"S = {S}, the same x_T in each column").save(output / f"samples-S{S:04d}.png")
        captions[f"samples-S{S:04d}.png"] = f"S = {S}, a kind of noise in each row, the same x_T in each column."
    return captions


def vars_of_all(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [each["cell"] for each in result["cells"]]


def series_name(cell: dict[str, Any], among: list[dict[str, Any]], plain: bool = False) -> list[str]:
    """What tells a line from the others: the scheduler and the spacing where there are several, and the variance."""
    found = []
    for key in ("scheduler", "spacing"):
        if len({each[key] for each in among}) > 1:
            found.append(cell[key])
    return [*found, Cell(**cell).label(plain)]


def by_cell(result: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(cell, entry) of each result."""
    count = len(result["results"]) // max(1, len(result["cells"]))
    return [(result["cells"][i // count]["cell"], entry) for i, entry in enumerate(result["results"])]


def measured(result: dict[str, Any]) -> dict[tuple[str, str, str], list[tuple[dict[str, Any], dict[str, Any]]]]:
    """(cell, entry) of each metric and split, under (name, data set, split)."""
    found: dict[tuple[str, str, str], list] = {}
    for cell, entry in by_cell(result):
        key = (entry["name"], entry["dataset"]["name"], entry["dataset"].get("split") or "")
        found.setdefault(key, []).append((cell, entry))
    return found


def table(result: dict[str, Any]) -> str:
    """Table 1 in Markdown, for each metric, split, scheduler and spacing: variances by S, and the paper's."""
    config = result["config"]
    counts = {each["split"]: each["images"] for each in result["references"]}
    preset = "table1" if config["table1"] else "table3" if config["table3"] else None
    lines = []
    for (name, data, split), pairs in measured(result).items():
        against = f", against the {counts[split]:,} pictures of {data} {split}" if split else ""
        lines += [f"**{name}** of {config['images']:,} pictures, seed {config['seed']}{against}", ""]
        kinds = dict.fromkeys((cell["scheduler"], cell["spacing"]) for cell, _ in pairs)
        columns = sorted({cell["steps"] for cell, _ in pairs})
        for scheduler, spacing in kinds:
            chosen = [pair for pair in pairs if (pair[0]["scheduler"], pair[0]["spacing"]) == (scheduler, spacing)]
            shown = chosen[0][1]
            head = shown["scheduler"] + (f", τ {shown['timestep_spacing']}" if shown["timestep_spacing"] else "")
            lines += [
                f"| {head} | " + " | ".join(f"S = {S}" for S in columns) + " |",
                "|---" * (len(columns) + 1) + "|",
            ]
            rows: dict[str, dict[int, str]] = {}
            for cell, entry in chosen:
                rows.setdefault(Cell(**cell).label(), {})[cell["steps"]] = f"{entry['value']:.4g}"
            rows["evaluations"] = {cell["steps"]: f"{entry['nfe']:g}" for cell, entry in chosen}
            if preset and shown["metric"] == "fid":
                rows |= paper_rows(preset)
            for label, values in rows.items():
                lines.append(f"| {label} | " + " | ".join(values.get(S, "") for S in columns) + " |")
            lines.append("")
    return "\n".join(lines)


def paper_rows(preset: str) -> dict[str, dict[int, str]]:
    """The paper's rows of a preset's table."""
    steps = PRESETS[preset]["steps"]
    return {
        f"paper, {data}, {Cell('', variance, '', 1).label()}": {
            S: f"{v:.2f}" for S, v in zip(steps, values, strict=True)
        }
        for data, rows in PAPER[preset].items()
        for variance, values in rows.items()
    }


def series(pairs: list, among: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Entries of each line of a plot, by growing S."""
    found: dict[str, list] = {}
    for cell, entry in sorted(pairs, key=lambda pair: pair[0]["steps"]):
        found.setdefault(", ".join(series_name(cell, among)), []).append(entry)
    return found


def plot_quality(result: dict[str, Any], path: Path) -> None:
    """Each metric against S, and against the time that the pictures took, one line for each variance."""
    from matplotlib.figure import Figure

    panels, among = measured(result), vars_of_all(result)
    figure = Figure(figsize=(11, 3.4 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 2, sharey="row", squeeze=False)
    for (by_steps, by_time), ((name, data, split), pairs) in zip(axes, panels.items(), strict=True):
        for label, entries in series(pairs, among).items():
            values = [entry["value"] for entry in entries]
            by_steps.plot([entry["num_inference_steps"] for entry in entries], values, marker="o", label=label)
            seconds = [1000 * entry["seconds"] / entry["images"] for entry in entries]
            by_time.plot(seconds, values, marker="o", label=label)
        positive = all(entry["value"] > 0 for _, entry in pairs)
        by_steps.set(xlabel="S", ylabel=f"{name}\n{data} {split}")
        by_time.set(xlabel=f"seconds for 1000 pictures, {result['device']}")
        for each in (by_steps, by_time):
            logarithmic(each, *("xy" if positive else "x"))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=110)


def plot_time(result: dict[str, Any], path: Path) -> None:
    """Fig. 4: hours for 50,000 pictures on one device against S."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for label, entries in series(next(iter(measured(result).values())), vars_of_all(result)).items():
        hours = [50_000 * entry["seconds"] / entry["images"] / 3600 for entry in entries]
        axes.plot([entry["num_inference_steps"] for entry in entries], hours, marker="o", label=label)
    axes.set(xlabel="S", ylabel=f"hours for 50,000 pictures, {result['device']}")
    figure.legend(loc="outside right upper")
    logarithmic(axes, "x", "y")
    figure.savefig(path, dpi=110)


def logarithmic(axes: Any, *names: str) -> None:
    """The x or y axis on a logarithmic scale, with plain numbers at 1, 2, 5, 10, …"""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.grid(alpha=0.3)
    for name in names:
        axes.set(**{f"{name}scale": "log"})
        axis = getattr(axes, f"{name}axis")
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())


if __name__ == "__main__":
    try:
        done = main(parse(EvaluateConfig))
    except (ValueError, OSError) as error:
        sys.exit(f"evaluate.py: {error}")
    except KeyboardInterrupt:
        sys.exit("evaluate.py: interrupted; start it again to go on")
    if PartialState().is_main_process:
        for name in ("results.json", "table.md", *done["pictures"]) if "pictures" in done else ():
            print(Path(done["config"]["output"]) / name)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
