"""Few steps: every training-free sampler of diffusers and ours, on the same weights and from the same x_T.

python tests/benchmarks/few_steps.py --model out/mnist --reference my/mnist --extractor my/classifier --output out/few

Each sampler of diffusers has its own best of its grids, for each number of network evaluations and each measure: the
root mean square distance to the converged solution of the ODE, over the pixels of images in −1..1, and the Fréchet
distance. Of every sampler the first is measured, on `near` images in float32. Those within `margin` of the best of
diffusers, and those that add noise, are screened by the second on `screen` images (not those with noise that were
screened at the number before, and beyond `margin` of the best); the best of theirs, DDIM's best and ours are then
measured on `draws` sets of `images` others, which did not choose them; told is the mean, and the standard error of such
a mean, pooled over all samplers. (What is then the best of theirs is chosen by these means, and so a little too low.)
If asked for, 1000 steps too. Interrupted, it goes on where it was; after a change of our own code say --overwrite. A
model that knows its own times (`ddim-plugin fit`, with a seed far from this one) is also measured with them.
"""

import copy
import hashlib
import inspect
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2] / "training"))

import diffusers
import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from measure.extractors import open_extractor, slug
from measure.metrics import check_count, fit, frechet
from measure.parts import DTYPES, digest, start_processes
from measure.references import open_reference
from measure.references import statistics as features_of
from pictures.sources import Frame, as_dataset, open_pictures
from torch import Generator, Tensor
from tqdm.auto import tqdm
from trainer.settings import command, parse, record, write_json

import ddim_plugin
from ddim_plugin import GeneralizedDDIMPipeline
from ddim_plugin.hub.reading import weights_digest, write_whole
from ddim_plugin.pipelines.fit import TEACHER

SPACINGS = ("leading", "trailing", "linspace")
SIGMAS = ("", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
KINDS = (
    ("dpmsolver++", "zero"),
    ("dpmsolver++", "sigma_min"),
    ("dpmsolver", "sigma_min"),
    ("sde-dpmsolver++", "zero"),
    ("sde-dpmsolver++", "sigma_min"),
)
OURS, FITTED, NOISY = "ours", "ours, fitted τ", "ours, η = 1"
FAMILIES = (OURS, FITTED, NOISY)
"""The default, the same with the times that were fitted to the model, and the default at η = 1."""

SCREENED = 2**24
"""Number of the first image of the screening: they are not among those that are measured on."""

NOISELESS = {"tau_func": 0}
"""SA-Solver without noise."""


@dataclass(frozen=True)
class FewStepsConfig:
    """Compare samplers at few evaluations of the network."""

    model: str = field(metadata={"help": "a folder written by save_pretrained, or a Hub id"})
    reference: str = field(metadata={"help": "data set: digits, a folder, parquet or arrow, or a Hub id"})
    extractor: str = field(metadata={"help": "of torch-fidelity by name, or a folder or Hub id of a classifier"})
    output: str = field(default="out/few_steps", metadata={"help": "folder for the results"})
    nfe: tuple[int, ...] = field(default=(5, 6, 8, 10, 12, 15, 20), metadata={"help": "network evaluations"})
    near: int = field(default=64, metadata={"help": "images for the distance to the solution, of every sampler"})
    screen: int = field(default=256, metadata={"help": "images for a first Fréchet distance"})
    images: int = field(default=5000, metadata={"help": "images in a set, to measure the best by it"})
    draws: int = field(default=1, metadata={"help": "such sets, whose distances are averaged"})
    shortlist: int = field(default=6, metadata={"help": "samplers of diffusers that are measured on them"})
    margin: float = field(default=2.0, metadata={"help": "times the best of diffusers: what is worse is left out"})
    thousand: tuple[float, ...] = field(default=(), metadata={"help": "η of 1000 steps to compare with, as 0 1"})
    dtype: str = field(default="float32", metadata={"help": "of the network, for the Fréchet distance"})
    families: tuple[str, ...] = field(default=(), metadata={"help": "only samplers whose family begins so; all"})
    batch_size: int = field(default=125, metadata={"help": "images at a time"})
    seed: int = field(default=0, metadata={"help": "x_T of image i comes from seed + i"})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, …"})
    overwrite: bool = field(default=False, metadata={"help": "forget what was measured before"})


class Sampler(NamedTuple):
    """A scheduler and its settings; `settings` are told in its name."""

    family: str
    scheduler: str
    settings: dict[str, Any]

    @property
    def noisy(self) -> bool:
        stock = self.scheduler == "DDPMScheduler" or self.family.startswith("sde-")
        solver = self.scheduler == "SASolverScheduler" and "tau_func" not in self.settings
        return stock or solver or self.settings.get("eta", 0.0) > 0

    @property
    def name(self) -> str:
        said = (k.removeprefix("use_") if v is True else str(v) for k, v in self.settings.items() if v is not False)
        return " ".join([self.family, *said])


def samplers() -> Iterator[Sampler]:
    """Ours, and what diffusers has without training, each with its grids and kinds of prediction."""
    yield Sampler(OURS, "MultistepDDIMScheduler", {})
    yield Sampler(FITTED, "MultistepDDIMScheduler", {})
    yield Sampler(NOISY, "MultistepDDIMScheduler", {"eta": 1.0})
    for spacing in SPACINGS:
        grid = {"timestep_spacing": spacing}
        yield Sampler("DDIM", "DDIMScheduler", grid)
        yield Sampler("DDPM", "DDPMScheduler", grid)
        yield Sampler("PNDM", "PNDMScheduler", grid | {"skip_prk_steps": True})
        for order in (2, 3):
            yield Sampler(f"SA-Solver {order}", "SASolverScheduler", grid | {"predictor_order": order})
            yield Sampler(f"SA-Solver {order} ODE", "SASolverScheduler", grid | {"predictor_order": order} | NOISELESS)
        for sigmas in SIGMAS:
            grid = {"timestep_spacing": spacing} | ({sigmas: True} if sigmas else {})
            for family, name in (
                ("Euler", "EulerDiscreteScheduler"),
                ("LMS", "LMSDiscreteScheduler"),
                ("Heun", "HeunDiscreteScheduler"),
                ("KDPM2", "KDPM2DiscreteScheduler"),
            ):
                yield Sampler(family, name, grid)
            for order in (2, 3):
                own = grid | {"solver_order": order}
                yield Sampler(f"DEIS {order}", "DEISMultistepScheduler", own)
                for kind, last in KINDS:
                    more = {"algorithm_type": kind, "final_sigmas_type": last}
                    yield Sampler(f"{kind} {order}M", "DPMSolverMultistepScheduler", own | more)
                    if spacing == SPACINGS[0]:  # the single-step one has no spacing
                        single = {key: value for key, value in (own | more).items() if key != "timestep_spacing"}
                        yield Sampler(f"{kind} {order}S", "DPMSolverSinglestepScheduler", single)
                for kind, data in product(("bh1", "bh2"), (True, False)):
                    more = {"solver_type": kind, "predict_x0": data}
                    yield Sampler(f"UniPC {order}", "UniPCMultistepScheduler", own | more)
    yield Sampler("iPNDM", "IPNDMScheduler", {})


class Unfit(Exception):
    """A sampler that cannot be run with this model, or at this number of evaluations."""


class Bench:
    """A model, its data, and what was measured."""

    def __init__(self, config: FewStepsConfig):
        self.config, self.output = config, Path(config.output)
        self.device = start_processes(config.device).device
        self.pipe = GeneralizedDDIMPipeline.from_pretrained(config.model).to(self.device)
        self.unet = self.pipe.unet.eval()
        self.fast = copy.deepcopy(self.unet).to(DTYPES[config.dtype])
        self.shape = (self.unet.config.in_channels, *self.pipe.image_size)
        self.saved = self.pipe.scheduler.config
        self.extractor = open_extractor(config.extractor, self.device, self.shape)
        for name in ("screen", "images"):
            check_count(getattr(config, name), self.extractor.dimension, f"--{name}")
        self.file = self.output / "measured.jsonl"
        self.output.mkdir(parents=True, exist_ok=True)
        self.reference, contents = self._reference()
        self.settings = {
            "model": weights_digest(self.unet),
            "scheduler": digest(dict(self.saved)),
            "extractor": self.extractor.fingerprint,
            "reference": contents,
            "dtype": config.dtype,
            "seed": config.seed,
        }
        if config.overwrite:
            for file in (self.file, self.output / "solution.pt"):
                file.unlink(missing_ok=True)
        self.known: dict[str, dict[str, Any]] = {}
        self.alike: dict[str, dict[str, Any]] = {}
        *lines, torn = (self.file.read_text() if self.file.exists() else "").split("\n")
        if torn:  # by a kill
            write_whole(self.file, "".join(line + "\n" for line in lines))
        for line in lines:
            entry = json.loads(line)
            if entry["settings"] == self.settings:
                self.known[entry["key"]] = entry
                self.alike[entry.get("alike", "")] = entry

    def _reference(self) -> tuple[Any, str]:
        """The Gaussian of the training pictures as the extractor sees them, and the SHA-256 of the pictures."""
        config = self.config
        frame, cache = Frame(self.shape[0], self.shape[1:]), self.output / "references"
        pictures = open_pictures(config.reference)
        reference = open_reference(pictures, "train", frame, config.reference, cache, None, 2)
        found = features_of(reference, self.extractor, cache, config.batch_size, True, False)
        return found.gaussian, reference.contents

    def generators(self, numbers: range, first: int = 0) -> list[Generator]:
        """One for each of these images, so that a batch's size changes nothing."""
        return [Generator().manual_seed(first + self.config.seed + i) for i in numbers]

    def scheduler(self, sampler: Sampler, nfe: int) -> Any:
        """The sampler's scheduler with times set for exactly `nfe` evaluations. Raises Unfit where there is none."""
        ours = getattr(ddim_plugin, sampler.scheduler, None)
        cls = ours or getattr(diffusers, sampler.scheduler)
        known = inspect.signature(cls.__init__).parameters
        unknown = [key for key in sampler.settings if key not in known]
        if unknown:
            raise Unfit(f"knows no {unknown[0]}")
        changes = dict(sampler.settings) | {key: False for key in ("clip_sample", "thresholding") if key in known}
        if sampler.family == FITTED:
            times = (self.saved.get("fitted_timesteps") or {}).get(str(nfe))
            if times is None:
                raise Unfit(f"no times were fitted to the model for {nfe} steps")
            changes |= {"fitted_timesteps": {str(nfe): times}}
        elif sampler.scheduler == "MultistepDDIMScheduler":
            changes |= {"fitted_timesteps": None}
        if sampler.scheduler == "SASolverScheduler":
            changes |= {"corrector_order": sampler.settings["predictor_order"]}
            changes |= {"tau_func": lambda t: 0} if "tau_func" in sampler.settings else {}
        prediction = self.saved["prediction_type"]
        if "prediction_type" not in known and prediction != "epsilon":
            raise Unfit(f"knows no prediction_type {prediction}")
        reason = ""
        for S in sorted(range(1, nfe + 3), key=lambda S: abs(S - nfe)):
            try:
                made = cls.from_config(dict(self.saved), **changes)
                made.set_timesteps(S)
            except Exception as error:  # diffusers' own refusals are of many kinds
                reason = reason or f"{type(error).__name__}: {error}"
                continue
            if len(made.timesteps) == nfe:
                return made
            reason = reason or f"makes {len(made.timesteps)} evaluations of {S} steps"
        raise Unfit(reason)

    @torch.inference_mode()
    def sample(self, unet: Any, scheduler: Any, numbers: range) -> Tensor:
        """These images, in −1..1. Raises Unfit where they are not finite."""
        noise = randn_tensor((len(numbers), *self.shape), generator=self.generators(numbers), device=self.device)
        x = noise * float(scheduler.init_noise_sigma)
        drawn = {}
        if "generator" in inspect.signature(scheduler.step).parameters:  # apart from those of x_T
            drawn["generator"] = self.generators(numbers, 2**31)  # 32 bits count
        for t in scheduler.timesteps:
            output = unet(scheduler.scale_model_input(x, t).to(unet.dtype), t).sample.to(x.dtype)
            x = scheduler.step(output, t, x, **drawn).prev_sample
        if not bool(x.isfinite().all()):
            raise Unfit("images that are not finite")
        return x.clamp(-1, 1)

    def make(self, unet: Any, sampler: Sampler, nfe: int, numbers: range) -> Iterator[Tensor]:
        """These images of a sampler, in batches."""
        for start in range(0, len(numbers), self.config.batch_size):
            try:
                yield self.sample(unet, self.scheduler(sampler, nfe), numbers[start : start + self.config.batch_size])
            except (
                RuntimeError,
                ValueError,
                IndexError,
                TypeError,
                AttributeError,
                AssertionError,
                NotImplementedError,
            ) as error:
                raise Unfit(f"{type(error).__name__}: {error}") from error

    @cached_property
    def solution(self) -> Tensor:
        """The converged solution of the ODE for the first images, and a note of how converged it is."""
        file, near = self.output / "solution.pt", self.config.near
        if file.exists():
            kept = torch.load(file)
            if kept["settings"] == self.settings and len(kept["images"]) >= near:
                return kept["images"][:near].to(self.device)
        made = []
        for S in (250, 500):
            scheduler = Sampler("ours", "MultistepDDIMScheduler", {"timestep_spacing": "linear"} | TEACHER)
            made.append(torch.cat(list(self.make(self.unet, scheduler, S, range(near)))))
        kept = {"settings": self.settings, "images": made[1].cpu(), "converged_to": rms(*made)}
        torch.save(kept, file.with_suffix(".part"))
        file.with_suffix(".part").replace(file)
        print(f"the solution at 250 and 500 steps differs by {rms(*made):.2g}")
        return made[1]

    def distance(self, sampler: Sampler, nfe: int) -> dict[str, Any]:
        """Of the first images, the root mean square distance to the solution."""

        def measured() -> float:
            return rms(torch.cat(list(self.make(self.unet, sampler, nfe, numbers))), self.solution)

        numbers = range(self.config.near)
        return self._entry("rms", sampler, nfe, numbers, measured)

    def quality(self, sampler: Sampler, nfe: int) -> dict[str, Any]:
        """The Fréchet distance, the mean of several sets of images; the first are those of evaluate.py."""
        images, entry, values = self.config.images, {}, []
        for draw in range(self.config.draws):
            entry = self.frechet(sampler, nfe, range(draw * images, (draw + 1) * images))
            if "unfit" in entry:
                return entry
            values.append(entry["frechet"])
        return entry | {"frechet": statistics.fmean(values), "draws": values}

    def frechet(self, sampler: Sampler, nfe: int, numbers: range) -> dict[str, Any]:
        """The Fréchet distance of these images."""

        def measured() -> float:
            batches = self.make(self.fast, sampler, nfe, numbers)
            features = [self.extractor(((made + 1) * 127.5).round().to(torch.uint8)).features for made in batches]
            return frechet(fit(lambda: iter(features)), self.reference)

        return self._entry("frechet", sampler, nfe, numbers, measured)

    def moves(self, sampler: Sampler, nfe: int) -> str:
        """The same for samplers that make the same moves: several grids of diffusers are one at some settings."""
        made = self.scheduler(sampler, nfe)
        settings = {key: value for key, value in sampler.settings.items() if key not in ("timestep_spacing", *SIGMAS)}
        grid = [torch.as_tensor(each).tolist() for each in (made.timesteps, getattr(made, "sigmas", ()))]
        said = json.dumps([sampler.scheduler, settings, *grid, float(made.init_noise_sigma)])
        return hashlib.sha256(said.encode()).hexdigest()[:16]

    def _entry(
        self, measure: str, sampler: Sampler, nfe: int, numbers: range, measured: Callable[[], float]
    ) -> dict[str, Any]:
        images = f"{numbers.start} to {numbers.stop}"
        key = f"{measure} of {sampler.name}, {nfe} evaluations, images {images}"
        if key not in self.known:
            entry = {"key": key, "settings": self.settings, "family": sampler.family, "sampler": sampler.name}
            entry |= {"noisy": sampler.noisy, "nfe": nfe, "images": len(numbers)}
            try:
                alike = f"{measure} {nfe} {images} {self.moves(sampler, nfe)}"
                found = self.alike.get(alike)
                entry |= {"alike": alike} | ({measure: measured()} if found is None else {measure: found[measure]})
                self.alike.setdefault(alike, entry)
            except Unfit as reason:
                entry["unfit"] = str(reason)[:200]
            self.known[key] = entry
            with open(self.file, "a") as file:
                file.write(json.dumps(entry) + "\n")
        return self.known[key]


def rms(x: Tensor, y: Tensor) -> float:
    return float((x - y).double().square().mean().sqrt())


def check(config: FewStepsConfig) -> None:
    """Raise ValueError for settings that cannot be."""
    if config.dtype not in DTYPES:
        raise ValueError(f"unknown dtype {config.dtype!r}: use one of {', '.join(DTYPES)}")
    for name in ("near", "draws", "batch_size", "shortlist"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be 1 at least, not {getattr(config, name)}")
    if wrong := [nfe for nfe in config.nfe if nfe < 1]:
        raise ValueError(f"nfe must be 1 at least, not {wrong[0]}")
    if not config.margin >= 1:
        raise ValueError(f"margin must be 1 at least, not {config.margin}: it is in terms of the best")


def main(config: FewStepsConfig) -> dict[str, Any]:
    """Write few_steps.json, few_steps.md, few_steps.png and results.json."""
    check(config)
    every = [each for each in samplers() if not config.families or each.family.startswith(config.families)]
    if not every:
        raise ValueError(f"no family of samplers begins with {' or '.join(config.families)}")
    bench = Bench(config)
    print(f"{len(every)} samplers; the solution first", flush=True)
    bench.solution  # noqa: B018
    result = record(config) | {
        "status": "running",
        "command": command(config),
        "model": bench.settings,
        "rows": [],
        "thousand": [],
        "unfit": {},
    }
    dropped: set[str] = set()
    for nfe in config.nfe:
        still = [each for each in every if not each.noisy]
        found = [bench.distance(each, nfe) for each in tqdm(still, desc=f"{nfe}, RMS", leave=False)]
        near = {entry["sampler"]: entry["rms"] for entry in found if "rms" in entry}
        theirs = [near[each.name] for each in still if each.name in near and stock(each.family)]
        near_enough = {name for name, value in near.items() if value <= config.margin * min(theirs, default=math.inf)}
        near_enough |= {each.name for each in every if each.noisy} - dropped
        near_enough |= {each.name for each in still if each.name in near and each.family in (*FAMILIES, "DDIM")}
        left = [each for each in every if each.name in near_enough]
        apart = range(SCREENED, SCREENED + config.screen)
        found += [bench.frechet(each, nfe, apart) for each in tqdm(left, desc=f"{nfe}, Fréchet", leave=False)]
        result["unfit"] |= {f"{entry['sampler']}, {nfe}": entry["unfit"] for entry in found if "unfit" in entry}
        screened = {entry["sampler"]: entry for entry in found if "frechet" in entry}
        ranks = sorted((entry["frechet"], name) for name, entry in screened.items() if stock(entry["family"]))
        dropped = {name for value, name in ranks if value > config.margin * ranks[0][0] and screened[name]["noisy"]}
        chosen = [name for _, name in ranks[: config.shortlist]]
        chosen += [name for _, name in ranks if screened[name]["family"] == "DDIM"][:1]
        chosen += [name for name, entry in screened.items() if not stock(entry["family"])]
        left = [each for each in left if each.name in chosen]
        measured = [bench.quality(each, nfe) for each in tqdm(left, desc=f"{nfe}, all images", leave=False)]
        result["unfit"] |= {f"{entry['sampler']}, {nfe}": entry["unfit"] for entry in measured if "unfit" in entry}
        measured = [entry for entry in measured if "frechet" in entry]
        distances = [entry for entry in found if "rms" in entry]
        row = {"rms": distances, "screened": list(screened.values()), "frechet": measured}
        result["rows"].append({"nfe": nfe} | {name: list(map(told, entries)) for name, entries in row.items()})
        write(result, bench.output)
        print(table(result).splitlines()[-1], flush=True)
    for eta in config.thousand:
        settings = {"eta": eta, "timestep_spacing": "linear"}
        sampler = Sampler("1000 steps", "GeneralizedDDIMScheduler", settings)
        result["thousand"] += [told(each) for each in [bench.quality(sampler, 1000)] if "frechet" in each]
        write(result, bench.output)
    result["status"] = "finished"
    write(result, bench.output)
    return result


def told(entry: dict[str, Any]) -> dict[str, Any]:
    """What a result keeps of an entry."""
    return {key: value for key, value in entry.items() if key not in ("key", "settings", "alike")}


def relative_errors(result: dict[str, Any]) -> tuple[float, float] | None:
    """The standard errors of a mean of Fréchet distances, and of the ratio of two of them at one number of evaluations,
    in terms of either. None where there is one draw.

    They are pooled over samplers and numbers of evaluations, since a few draws tell little of their own spread. A ratio
    is better known than its parts: samplers share x_T, and some sets are worse than others for all of them.
    """
    draws = result["config"].get("draws", 1)
    if draws < 2:
        return None
    means, ratios = [], []
    for row in result["rows"]:
        if not row["frechet"]:
            continue
        logs = np.log([entry["draws"] for entry in row["frechet"]])
        apart = logs - logs.mean(1, keepdims=True)
        means.append(np.square(apart).sum() / (len(logs) * (draws - 1)))
        if len(logs) > 1:
            ratios.append(np.square(apart - apart.mean(0)).sum() / ((len(logs) - 1) * (draws - 1)))
    if not means:
        return None
    return math.sqrt(np.mean(means) / draws), math.sqrt(2 * np.mean(ratios or means) / draws)


def write(result: dict[str, Any], output: Path) -> None:
    result["relative_errors"] = relative_errors(result)
    write_json(output / "few_steps.json", result)
    write_whole(output / "few_steps.md", table(result))
    plot(result, output / "few_steps.png")
    pictures = {"few_steps.png": "Few steps: ours, the best of all samplers of diffusers at each number, and DDIM."}
    sha256 = result["model"]["model"]
    joined = {"model": {"sha256": sha256}, "status": result["status"], "results": entries(result), "pictures": pictures}
    write_json(output / "results.json", joined)


def entries(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Ours, DDIM's best, the best of all of diffusers, and 1000 steps, as entries of `results.json`."""
    config, found, errors = result["config"], [], relative_errors(result)
    extractor = slug(config["extractor"])

    def listed(each: dict[str, Any], scheduler: str) -> dict[str, Any]:
        """An entry of either measure, as `results.json` has it."""
        measure = "rms" if "rms" in each else "frechet"
        same = {"value": each[measure], "nfe": each["nfe"], "num_inference_steps": each["nfe"], "scheduler": scheduler}
        same |= {"sampler": each["sampler"], "images": each["images"], "seed": config["seed"]}
        if "draws" in each:
            same |= {"draws": len(each["draws"])}
            same |= {} if errors is None else {"standard_error": errors[0] * each[measure]}
        return known[measure] | same

    known = {
        "rms": {"metric": "rms_to_solution", "name": "Few steps: RMS distance to the solution of the ODE"}
        | {"dataset": {"name": "the ODE's solution"}},
        "frechet": {"metric": f"fd_{extractor}", "name": f"Few steps: FD, {extractor}"}
        | {"dataset": as_dataset(config["reference"], "train")},
    }
    for measure, ours in measures(result).items():
        kinds = {"the best of diffusers": stock, "DDIM": "DDIM".__eq__} | {name: name.__eq__ for name in ours}
        for row in result["rows"]:
            chosen = {kind: best(row[measure], measure, families) for kind, families in kinds.items()}
            found += [
                listed(each, kind) | ({} if measure == "frechet" and kind in ours else {"listed": False})
                for kind, each in chosen.items()
                if each
            ]
    return found + [listed(each, each["sampler"]) for each in result["thousand"]]


def best(entries: list[dict[str, Any]], measure: str, families: Callable[[str], bool]) -> dict[str, Any] | None:
    """The lowest of the entries of these families."""
    return min((each for each in entries if families(each["family"])), key=lambda each: each[measure], default=None)


def stock(family: str) -> bool:
    return family not in FAMILIES


def measures(result: dict[str, Any]) -> dict[str, list[str]]:
    """For each measure, those of our families that were measured; the distance to the solution only without noise."""
    found = {}
    for measure in ("rms", "frechet"):
        there = {entry["family"] for row in result["rows"] for entry in row[measure]}
        found[measure] = [each for each in FAMILIES if each in there]
    return found


def table(result: dict[str, Any]) -> str:
    """For each number of evaluations, the best of theirs and ours by both measures, and the ratio to theirs."""
    families = measures(result)
    head = ["NFE", "RMS, best of diffusers", "by", *families["rms"]]
    head += ["Fréchet, best of diffusers", "by", *families["frechet"]]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in result["rows"]:
        cells = [str(row["nfe"])]
        for measure, ours in families.items():
            theirs = best(row[measure], measure, stock)
            cells += [f"{theirs[measure]:.4g}", theirs["sampler"]] if theirs else ["", ""]
            for family in ours:
                found = best(row[measure], measure, family.__eq__)
                ratio = f" ({found[measure] / theirs[measure]:.2f})" if found and theirs else ""
                cells.append(f"{found[measure]:.4g}{ratio}" if found else "")
        lines.append("| " + " | ".join(cells) + " |")
    for entry in result["thousand"]:
        lines += ["", f"Fréchet distance of {entry['sampler']}: {entry['frechet']:.4g}"]
    if errors := relative_errors(result):
        sets = f"{result['config']['draws']} sets of {result['config']['images']:,} images"
        errors = f"{errors[0]:.0%} of a mean, {errors[1]:.0%} of a ratio"
        lines += ["", f"Fréchet distances are means over {sets}, which all samplers share. Standard errors: {errors}."]
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    """Both measures against evaluations: ours, the best of diffusers at each, DDIM, and 1000 steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axis, (measure, ours) in zip(figure.subplots(1, 2), measures(result).items(), strict=True):
        names = {"DDIM": "DDIM".__eq__, "best of diffusers": stock} | {family: family.__eq__ for family in ours}
        for name, families in names.items():
            found = [(row["nfe"], best(row[measure], measure, families)) for row in result["rows"]]
            points = sorted((nfe, entry[measure]) for nfe, entry in found if entry)
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        for entry in result["thousand"] if measure == "frechet" else []:
            axis.axhline(entry["frechet"], linestyle=":", linewidth=1, color="black")
            axis.annotate(entry["sampler"], (result["rows"][0]["nfe"], entry["frechet"]), fontsize=7, va="bottom")
        label = {"rms": "RMS distance to the solution", "frechet": "Fréchet distance"}[measure]
        axis.set(xlabel="network evaluations", ylabel=label, yscale="log", xscale="log")
        numbers = [row["nfe"] for row in result["rows"]]
        axis.set_xticks(numbers, labels=map(str, numbers))
        axis.set_xticks([], minor=True)
        for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            ticks("{x:g}")
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    try:
        main(parse(FewStepsConfig))
    except (ValueError, OSError) as error:
        sys.exit(f"few_steps.py: {error}")
