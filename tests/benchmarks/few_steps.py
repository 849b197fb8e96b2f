"""Few steps: every training-free sampler of diffusers and ours, on the same weights and from the same x_T.

python tests/benchmarks/few_steps.py --model out/mnist --reference my/mnist --extractor my/classifier --output out/few

Each sampler of diffusers has its own best of its grids, for each number of network evaluations and each measure: the
root mean square distance to the converged solution of the ODE, over the pixels of images in −1..1, and the Fréchet
distance. All are screened on `screen` images; the best of theirs and all of ours are then measured on `images`.
Interrupted, it goes on where it was.
"""

import inspect
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2] / "training"))

import diffusers
import torch
from config import parse, record, write_json
from data import Frame, open_pictures
from diffusers.utils.torch_utils import randn_tensor
from evaluate import start_processes
from features import open_extractor, open_reference, statistics
from metrics import check_count, fit, frechet
from torch import Generator, Tensor
from tqdm.auto import tqdm

import ddim_plugin
from ddim_plugin import GeneralizedDDIMPipeline
from ddim_plugin.hub import weights_digest, write_whole

SPACINGS = ("leading", "trailing", "linspace")
SIGMAS = ("", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
KINDS = (
    ("dpmsolver++", "zero"),
    ("dpmsolver++", "sigma_min"),
    ("dpmsolver", "sigma_min"),
    ("sde-dpmsolver++", "zero"),
    ("sde-dpmsolver++", "sigma_min"),
)
OURS = ("ours", "ours with noise")
"""The default, and the default at η = 1: what a table compares with theirs."""

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
    screen: int = field(default=256, metadata={"help": "images that every sampler makes"})
    images: int = field(default=5000, metadata={"help": "images of the best by Fréchet distance"})
    shortlist: int = field(
        default=3, metadata={"help": "samplers of diffusers that are measured on them, for each nfe"}
    )
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
    def name(self) -> str:
        said = (k.removeprefix("use_") if v is True else str(v) for k, v in self.settings.items() if v is not False)
        return " ".join([self.family, *said])


def samplers() -> Iterator[Sampler]:
    """Ours, and what diffusers has without training, each with its grids and kinds of prediction."""
    yield Sampler(OURS[0], "MultistepDDIMScheduler", {})
    yield Sampler(OURS[1], "MultistepDDIMScheduler", {"eta": 1.0})
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
        self.shape = (self.unet.config.in_channels, *self.pipe.image_size)
        self.saved = self.pipe.scheduler.config
        self.extractor = open_extractor(config.extractor, self.device, self.shape)
        check_count(config.screen, self.extractor.dimension, "screened images")
        self.file = self.output / "measured.jsonl"
        self.settings = {
            "model": weights_digest(self.unet),
            "extractor": self.extractor.fingerprint,
            "seed": config.seed,
        }
        self.output.mkdir(parents=True, exist_ok=True)
        if config.overwrite:
            self.file.unlink(missing_ok=True)
        self.known: dict[str, dict[str, Any]] = {}
        for line in self.file.read_text().splitlines() if self.file.exists() else []:
            entry = json.loads(line)
            if entry["settings"] == self.settings:
                self.known[entry["key"]] = entry

    @cached_property
    def reference(self) -> Any:
        """The Gaussian of the training pictures as the extractor sees them."""
        config = self.config
        frame, cache = Frame(self.shape[0], self.shape[1:]), self.output / "references"
        pictures = open_pictures(config.reference)
        reference = open_reference(pictures, "train", frame, config.reference, cache, None, 2)
        return statistics(reference, self.extractor, cache, config.batch_size, True, False).gaussian

    def noise(self, numbers: range) -> Tensor:
        """x_T of these images."""
        generators = [Generator().manual_seed(self.config.seed + i) for i in numbers]
        return randn_tensor((len(numbers), *self.shape), generator=generators, device=self.device)

    def scheduler(self, sampler: Sampler, nfe: int) -> Any:
        """The sampler's scheduler with times set for exactly `nfe` evaluations. Raises Unfit where there is none."""
        ours = getattr(ddim_plugin, sampler.scheduler, None)
        cls = ours or getattr(diffusers, sampler.scheduler)
        known = inspect.signature(cls.__init__).parameters
        unknown = [key for key in sampler.settings if key not in known]
        if unknown:
            raise Unfit(f"knows no {unknown[0]}")
        changes = dict(sampler.settings) | {key: False for key in ("clip_sample", "thresholding") if key in known}
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
    def sample(self, scheduler: Any, numbers: range) -> Tensor:
        """These images, in −1..1. Raises Unfit where they are not finite."""
        x = self.noise(numbers) * float(scheduler.init_noise_sigma)
        drawn = {}
        if "generator" in inspect.signature(scheduler.step).parameters:  # apart from those of x_T
            drawn["generator"] = Generator().manual_seed(2**40 + self.config.seed + numbers.start)
        for t in scheduler.timesteps:
            output = self.unet(scheduler.scale_model_input(x, t), t).sample
            x = scheduler.step(output, t, x, **drawn).prev_sample
        if not bool(x.isfinite().all()):
            raise Unfit("images that are not finite")
        return x.clamp(-1, 1)

    def make(self, sampler: Sampler, nfe: int, images: int) -> Iterator[Tensor]:
        """The first images of a sampler, in batches."""
        for start in range(0, images, self.config.batch_size):
            numbers = range(start, min(start + self.config.batch_size, images))
            try:
                yield self.sample(self.scheduler(sampler, nfe), numbers)
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
        """The converged solution of the ODE for the screened images, and a note of how converged it is."""
        file = self.output / "solution.pt"
        if file.exists():
            kept = torch.load(file)
            if kept["settings"] == self.settings and len(kept["images"]) >= self.config.screen:
                return kept["images"][: self.config.screen].to(self.device)
        made = []
        for S in (250, 500):
            scheduler = Sampler("ours", "MultistepDDIMScheduler", {"timestep_spacing": "linear", "solver_order": 3})
            made.append(torch.cat(list(self.make(scheduler, S, self.config.screen))))
        torch.save({"settings": self.settings, "images": made[1].cpu(), "converged_to": rms(*made)}, file)
        print(f"the solution at 250 and 500 steps differs by {rms(*made):.2g}")
        return made[1]

    def measure(self, sampler: Sampler, nfe: int, images: int) -> dict[str, Any]:
        """Fréchet distance of `images` images, and of the screened ones also the distance to the solution."""
        key = f"{sampler.name}, {nfe} evaluations, {images} images"
        if key in self.known:
            return self.known[key]
        entry: dict[str, Any] = {
            "key": key,
            "settings": self.settings,
            "family": sampler.family,
            "sampler": sampler.name,
        }
        entry |= {"nfe": nfe, "images": images}
        try:
            features, squares = [], 0.0
            for i, made in enumerate(self.make(sampler, nfe, images)):
                features.append(self.extractor(((made + 1) * 127.5).round().to(torch.uint8)).features)
                start = i * self.config.batch_size
                known = self.solution[start : start + len(made)]
                squares += float((made[: len(known)] - known).double().square().mean((1, 2, 3)).sum())
            entry["frechet"] = frechet(fit(lambda: iter(features)), self.reference)
            entry["rms"] = (squares / min(images, len(self.solution))) ** 0.5
        except Unfit as reason:
            entry["unfit"] = str(reason)[:200]
        self.known[key] = entry
        with open(self.file, "a") as file:
            file.write(json.dumps(entry) + "\n")
        return entry


def rms(x: Tensor, y: Tensor) -> float:
    return float((x - y).double().square().mean().sqrt())


def main(config: FewStepsConfig) -> dict[str, Any]:
    """Write few_steps.json, few_steps.md and few_steps.png."""
    bench = Bench(config)
    every = [each for each in samplers() if not config.families or each.family.startswith(config.families)]
    print(f"{len(every)} samplers; the reference and the solution first", flush=True)
    bench.reference, bench.solution  # noqa: B018
    rows, unfit = [], {}
    for nfe in config.nfe:
        screened = []
        for sampler in tqdm(every, desc=f"{nfe} evaluations", leave=False):
            found = bench.measure(sampler, nfe, config.screen)
            if "unfit" in found:
                unfit[f"{sampler.name}, {nfe}"] = found["unfit"]
            else:
                screened.append((sampler, found))
        theirs = [pair for pair in screened if pair[0].family not in OURS]
        ours = [pair for pair in screened if pair[0].family in OURS]
        chosen = sorted(theirs, key=lambda pair: pair[1]["frechet"])[: config.shortlist] + ours
        whole = {sampler.name: bench.measure(sampler, nfe, config.images) for sampler, _ in chosen}
        row = {"nfe": nfe, "screened": [found for _, found in screened], "measured": list(whole.values())}
        rows.append(row)
        result = record(config) | {"model": bench.settings, "rows": rows, "unfit": unfit}
        write_json(bench.output / "few_steps.json", result)
        write_whole(bench.output / "few_steps.md", table(result))
        print(table(result).splitlines()[-1], flush=True)
    plot(result, bench.output / "few_steps.png")
    return result


def table(result: dict[str, Any]) -> str:
    """For each number of evaluations, the best of theirs and ours by both measures, and the ratio to theirs."""
    head = ["NFE", "RMS, best of diffusers", "by", *OURS[:1], "Fréchet, best of diffusers", "by", *OURS]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in result["rows"]:
        cells = [str(row["nfe"])]
        for measure, entries, ours in (("rms", row["screened"], OURS[:1]), ("frechet", row["measured"], OURS)):
            theirs = [entry for entry in entries if entry["family"] not in OURS]
            best = min(theirs, key=lambda entry: entry[measure], default=None)
            cells += [f"{best[measure]:.4g}", best["sampler"]] if best else ["", ""]
            for family in ours:
                found = next((entry[measure] for entry in entries if entry["family"] == family), None)
                ratio = f" ({found / best[measure]:.2f})" if found and best else ""
                cells.append("" if found is None else f"{found:.4g}{ratio}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    """Both measures against evaluations: the best of each family."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, measure in zip(axes, ("rms", "frechet"), strict=True):
        families: dict[str, dict[int, float]] = {}
        for row in result["rows"]:
            for entry in row["screened"]:
                points = families.setdefault(entry["family"], {})
                points[row["nfe"]] = min(entry[measure], points.get(row["nfe"], float("inf")))
        for family, points in sorted(families.items()):
            width = 3 if family in OURS else 1
            axis.plot(list(points), list(points.values()), marker="o", markersize=3, linewidth=width, label=family)
        axis.set(
            xlabel="network evaluations", yscale="log", ylabel={"rms": "RMS to the solution"}.get(measure, "Fréchet")
        )
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=6, ncol=2)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    try:
        main(parse(FewStepsConfig))
    except (ValueError, OSError) as error:
        sys.exit(f"few_steps.py: {error}")
