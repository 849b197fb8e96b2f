"""Measure samplers on one model, from the same x_T."""

import copy
import hashlib
import inspect
import json
import statistics
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from cards.weights import weights_digest
from diffusers.utils.torch_utils import randn_tensor
from guard.writing import write_file
from pictures import Frame, Reading, open_pictures
from torch import Generator, Tensor

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler
from ddim_plugin.process.paths import VarianceExploding

from ..extractors import open_extractor
from ..labels import check_memory, count_classes, in_turn
from ..metrics import Gaussian, check_count, fit, frechet
from ..parts import DTYPES, digest, start_processes
from ..references import open_reference
from ..references import statistics as statistics_of
from .samplers import SIGMAS, Sampler, Unfit, make_scheduler

FAILURES = (
    RuntimeError,
    ValueError,
    IndexError,
    TypeError,
    AttributeError,
    AssertionError,
    NotImplementedError,
)
"""Exceptions with which diffusers' schedulers fail at settings that they do not support."""


ENTRY, MEASURES = {"key", "settings", "family", "sampler", "noisy", "nfe", "images"}, {"rms", "frechet", "unfit"}
"""What each entry of a journal has, and of what it has one or more."""


@dataclass(frozen=True)
class BenchSettings(Reading):
    """A model, what it is measured with, and the images."""

    model: str = field(metadata={"help": "a folder written by save_pretrained, or a Hub id"})
    reference: str = field(metadata={"help": "data set: digits, a folder, parquet or arrow, or a Hub id"})
    extractor: str = field(metadata={"help": "of torch-fidelity by name, or a folder or Hub id of a classifier"})
    output: str = field(default="out/few_steps", metadata={"help": "folder for the results"})
    near: int = field(default=64, metadata={"help": "images for the distance to the solution, of every sampler"})
    screen: int = field(default=256, metadata={"help": "images for a first Fréchet distance"})
    images: int = field(default=5000, metadata={"help": "images in a set, to measure the best samplers with"})
    draws: int = field(default=1, metadata={"help": "such sets, whose distances are averaged"})
    dtype: str = field(default="float32", metadata={"help": "of the network, for the Fréchet distance"})
    batch_size: int = field(default=125, metadata={"help": "images at a time"})
    classes: int | None = field(
        default=None, metadata={"help": "classes of the model; by default those of its training.json, else all labels"}
    )
    seed: int = field(default=0, metadata={"help": "x_T of image i comes from seed + i"})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, …"})
    overwrite: bool = field(default=False, metadata={"help": "delete what was measured before"})


SOLUTIONS = (250, 500)
"""Steps of a rough and of a fine solution of the ODE, whose distance is recorded."""

TEACHER = Sampler("ours", "MultistepDDIMScheduler", {"timestep_spacing": "linear", "solver_order": 3})
"""What solves the ODE."""


class Journal:
    """Measurements of runs with the same settings, one line of JSON each, so that a run can be resumed.

    `known` holds entries by their key, `alike` by what determines their value.
    """

    def __init__(self, file: Path, settings: dict[str, Any]):
        self.file, self.settings = file, settings
        self.known: dict[str, dict[str, Any]] = {}
        self.alike: dict[str, dict[str, Any]] = {}
        *lines, torn = (file.read_text(errors="replace") if file.exists() else "").split("\n")
        if torn:  # by a kill
            write_file(file, "".join(line + "\n" for line in lines))
        for line in lines:
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"cannot read {file}: {error}; remove the file, or pass --overwrite") from error
            if not (isinstance(entry, dict) and entry.keys() >= ENTRY and entry.keys() & MEASURES):
                raise ValueError(f"{file} has the line {line[:40]!r}, no measurement: remove it, or pass --overwrite")
            if entry["settings"] == settings:
                self.known[entry["key"]] = entry
                self.alike[entry.get("alike", "")] = entry

    def add(self, entry: dict[str, Any]) -> dict[str, Any]:
        """Append an entry, and return it."""
        entry |= {"settings": self.settings}
        self.known[entry["key"]] = entry
        if "alike" in entry:
            self.alike.setdefault(entry["alike"], entry)
        with open(self.file, "a") as file:
            file.write(json.dumps(entry) + "\n")
        return entry


class Bench:
    """Sample from a model with any sampler, and measure the images. `journal` keeps what was measured."""

    def __init__(self, config: BenchSettings):
        self.config, self.output = config, Path(config.output)
        self.device = start_processes(config.device).device
        self.pipe = GeneralizedDDIMPipeline.from_pretrained(config.model).to(self.device)
        self.unet = self.pipe.unet.eval()
        self.fast = copy.deepcopy(self.unet).to(DTYPES[config.dtype])
        check_memory(config.model, self.unet)
        self.classes = count_classes(config.model, self.unet, config.classes)
        self.shape = (self.unet.config.in_channels, *self.pipe.image_size)
        self.saved = self.pipe.scheduler.config
        if not isinstance(self.pipe.scheduler, GeneralizedDDIMScheduler):
            kind = type(self.pipe.scheduler).__name__
            raise ValueError(f"{config.model} has a {kind}: few_steps.py compares samplers of Gaussian noise only")
        if isinstance(path := self.pipe.scheduler.path, VarianceExploding):
            raise ValueError(
                f"{config.model} has {path.levels.noise[-1]:g}·ε at the top, and diffusers' samplers at few steps are "
                "for tables of β and for flow matching: use evaluate.py"
            )
        self.extractor = open_extractor(config.extractor, self.device, self.shape)
        for name in ("screen", "images"):
            check_count(getattr(config, name), self.extractor.dimension, f"--{name}")
        self.output.mkdir(parents=True, exist_ok=True)
        self.reference, contents = self._reference()
        self.settings = {
            "model": weights_digest(self.unet),
            "scheduler": digest(dict(self.saved)),
            "extractor": self.extractor.fingerprint,
            "reference": contents,
            "dtype": config.dtype,
            "seed": config.seed,
        } | ({"classes": self.classes} if self.classes else {})
        file = self.output / "measured.jsonl"
        if config.overwrite:
            for each in (file, self.output / "solution.pt"):
                each.unlink(missing_ok=True)
        self.journal = Journal(file, self.settings)

    def _reference(self) -> tuple[Gaussian | None, str]:
        """Return the Gaussian of the training pictures' features, and the SHA-256 of the pictures."""
        config = self.config
        frame, cache = Frame(self.shape[0], self.shape[1:]), self.output / "references"
        pictures = open_pictures(config.reference, **config.reading)
        reference = open_reference(pictures, frame, cache, config.reading, 2)
        found = statistics_of(reference, self.extractor, cache, config.batch_size, True, False)
        return found.gaussian, reference.contents

    def generators(self, numbers: range, first: int = 0) -> list[Generator]:
        """Return a generator for each image, so that the size of a batch changes nothing."""
        return [Generator().manual_seed(first + self.config.seed + i) for i in numbers]

    @torch.inference_mode()
    def trajectory(self, unet: Any, scheduler: Any, numbers: range) -> Iterator[Tensor]:
        """Yield x_T of these images, and x after each step."""
        noise = randn_tensor((len(numbers), *self.shape), generator=self.generators(numbers), device=self.device)
        x = noise * float(getattr(scheduler, "init_noise_sigma", 1.0))
        scale = getattr(scheduler, "scale_model_input", lambda x, t: x)  # schedulers of flow models have none
        drawn, labels = {}, None
        if self.classes:
            labels = torch.tensor(in_turn(numbers, self.classes), device=self.device)
        if "generator" in inspect.signature(scheduler.step).parameters:  # not the seeds of x_T; 32 bits count
            drawn["generator"] = self.generators(numbers, 2**31)
        yield x
        for t in scheduler.timesteps:
            output = unet(scale(x, t).to(unet.dtype), t, class_labels=labels).sample.to(x.dtype)
            yield (x := scheduler.step(output, t, x, **drawn).prev_sample)

    def sample(self, unet: Any, scheduler: Any, numbers: range) -> Tensor:
        """Sample these images, in −1..1. Raises Unfit if they are not finite."""
        [x] = deque(self.trajectory(unet, scheduler, numbers), 1)
        return finished(x)

    def make(self, unet: Any, sampler: Sampler, nfe: int, numbers: range) -> Iterator[Tensor]:
        """Yield these images of a sampler in batches."""
        for start in range(0, len(numbers), self.config.batch_size):
            part = numbers[start : start + self.config.batch_size]
            try:
                yield self.sample(unet, make_scheduler(sampler, nfe, self.saved), part)
            except FAILURES as error:
                raise Unfit(f"{type(error).__name__}: {error}") from error

    @cached_property
    def solution(self) -> tuple[Tensor, list[float]]:
        """The converged solution of the ODE for the first images, and their straightness; a file keeps both.

        Raises ValueError if the file cannot be read, or the model has no solution.
        """
        file, near = self.output / "solution.pt", self.config.near
        if file.exists():
            try:
                kept = torch.load(file, map_location="cpu", weights_only=True)
                images, straight, known = kept["images"], kept["straightness"], kept["settings"] == self.settings
                enough = images.shape[1:] == self.shape and len(images) == len(straight) >= near
            except Exception as error:  # torch raises many kinds
                problem = f"{type(error).__name__}: {error}"[:200]
                raise ValueError(f"cannot read {file} ({problem}): remove it, or pass --overwrite") from error
            if known and enough:
                return images[:near].to(self.device), straight[:near]
        try:
            fine = torch.cat(list(self.make(self.unet, TEACHER, SOLUTIONS[1], range(near))))
            rough, straight = self.straightness()
        except Unfit as reason:
            raise ValueError(f"cannot solve the ODE of {self.config.model} ({reason}): check its weights") from reason
        kept = {"settings": self.settings, "images": fine.cpu(), "straightness": straight}
        torch.save(kept | {"converged_to": rms(rough, fine)}, file.with_suffix(".part"))
        file.with_suffix(".part").replace(file)
        print(f"the solution at 250 and 500 steps differs by {rms(rough, fine):.2g}")
        return fine, straight

    def straightness(self) -> tuple[Tensor, list[float]]:
        """Solve the ODE roughly for the first images, and measure how far their trajectories are from straight lines.

        The number for each image is ∫ ‖x_1 − x_0 − dx/dσ‖² dσ over the dimension (Liu et al. 2023, Flow Straight and
        Fast): 0 for a line that is passed at constant speed. All models are compared on the path of flow matching:
        x/(a + b) at σ = b/(a + b). There, networks without error on two paths have the same trajectories.
        """
        scheduler = make_scheduler(TEACHER, SOLUTIONS[0], self.saved)
        path, moved = scheduler.path, 0.0
        levels = [path.level(path.time(t)) for t in scheduler.timesteps.tolist()] + [path.level(0)]
        sums = [level.signal + level.noise for level in levels]
        sigmas = [level.noise / total for level, total in zip(levels, sums, strict=True)]
        drawn = self.trajectory(self.unet, scheduler, range(self.config.near))
        x = next(drawn)
        first = last = x.double().flatten(1) / sums[0]
        for (high, low), total, x in zip(pairwise(sigmas), sums[1:], drawn, strict=True):
            point = x.double().flatten(1) / total
            moved += (point - last).square().mean(1) / (high - low)
            last = point
        return finished(x), (moved - (last - first).square().mean(1) / (sigmas[0] - sigmas[-1])).tolist()

    def distance(self, sampler: Sampler, nfe: int) -> dict[str, Any]:
        """Measure the root mean square distance of the first images to the solution."""

        def measured() -> float:
            return rms(torch.cat(list(self.make(self.unet, sampler, nfe, numbers))), self.solution[0])

        numbers = range(self.config.near)
        return self._entry("rms", sampler, nfe, numbers, measured)

    def frechet(self, sampler: Sampler, nfe: int, numbers: range) -> dict[str, Any]:
        """Measure the Fréchet distance of these images."""

        def measured() -> float:
            batches = self.make(self.fast, sampler, nfe, numbers)
            features = [self.extractor(((made + 1) * 127.5).round().to(torch.uint8)).features for made in batches]
            return frechet(fit(lambda: iter(features)), self.reference)

        return self._entry("frechet", sampler, nfe, numbers, measured)

    def quality(self, sampler: Sampler, nfe: int) -> dict[str, Any]:
        """Measure the mean Fréchet distance of several sets of images; the first set is that of evaluate.py."""
        images, entry, values = self.config.images, {}, []
        for draw in range(self.config.draws):
            entry = self.frechet(sampler, nfe, range(draw * images, (draw + 1) * images))
            if "unfit" in entry:
                return entry
            values.append(entry["frechet"])
        return entry | {"frechet": statistics.fmean(values), "draws": values}

    def moves(self, sampler: Sampler, nfe: int) -> str:
        """Return a digest of the moves: several grids of diffusers are the same at some settings."""
        made = make_scheduler(sampler, nfe, self.saved)
        settings = {key: value for key, value in sampler.settings.items() if key not in ("timestep_spacing", *SIGMAS)}
        grid = [torch.as_tensor(each).tolist() for each in (made.timesteps, getattr(made, "sigmas", ()))]
        more = float(getattr(made, "init_noise_sigma", 1.0)), getattr(made, "_solver", ())  # fitted weights
        text = json.dumps([sampler.scheduler, settings, *grid, *more])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _entry(
        self, measure: str, sampler: Sampler, nfe: int, numbers: range, measured: Callable[[], float]
    ) -> dict[str, Any]:
        """Return the entry of a measurement, which is made only if the journal has none."""
        images = f"{numbers.start} to {numbers.stop}"
        key = f"{measure} of {sampler.name}, {nfe} evaluations, images {images}"
        if key in self.journal.known:
            return self.journal.known[key]
        entry = {"key": key, "family": sampler.family, "sampler": sampler.name}
        entry |= {"noisy": sampler.noisy, "nfe": nfe, "images": len(numbers)}
        try:
            alike = f"{measure} {nfe} {images} {self.moves(sampler, nfe)}"
            found = self.journal.alike.get(alike)
            entry |= {measure: measured() if found is None else found[measure], "alike": alike}
        except Unfit as reason:
            entry["unfit"] = str(reason)[:200]
        return self.journal.add(entry)


def finished(x: Tensor) -> Tensor:
    """Return images in −1..1. Raises Unfit if they are not finite."""
    if not bool(x.isfinite().all()):
        raise Unfit("images that are not finite")
    return x.clamp(-1, 1)


def rms(x: Tensor, y: Tensor) -> float:
    """Return the root mean square of a difference."""
    return float((x - y).double().square().mean().sqrt())
