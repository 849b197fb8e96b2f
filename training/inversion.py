"""Measure round trips x_0 → x_T → x_0: our inverse with k refinements of a step, beside those of diffusers.

python training/inversion.py --model model_cards/sd-mnist-32 --data my/mnist --pad --output out/inversion
python training/inversion.py --model model_cards/ddim-mnist-28 --data my/mnist --spacing linear --output out/pixels

Stable Diffusion is measured on latents, in the loop of StableDiffusionPipeline, with prompts and guidance, and a
pipeline of ours on pixels, by `encode` and `decode`. All inverses run on the same held-out pictures.
"""

import guard

if __name__ == "__main__":
    guard.start()  # before the imports that take seconds

import math
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from guard.progress import Progress
from guard.writing import write_file
from measure.inversion.tables import plot, table
from measure.inversion.trips import Latents, Pixels, inverses, kind_of, prompts_of, read_images, read_prompts, summary
from measure.reconstructions import Bench
from pictures import Pictures, Reading, choose_split, open_pictures
from trainer.settings import command, parse, record, write_json

from ddim_plugin.process.paths import FlowMatching, VarianceExploding

WRITTEN = ("inversion.json", "inversion.md", "inversion.png")
DEFAULTS = {
    "latents": {"guidance": (1.0, 3.0, 7.5), "tolerance": 1e-3, "failure": 0.05},
    "pixels": {"guidance": (), "tolerance": 1e-5, "failure": 1e-3},
}


@dataclass(frozen=True)
class InversionConfig(Reading):
    """Measure round trips x_0 → x_T → x_0 with our inverse and with those of diffusers, on the same pictures."""

    model: str = field(metadata={"help": "a folder of StableDiffusionPipeline or of a pipeline of ours, or a Hub id"})
    output: str = field(default="out/inversion", metadata={"help": "folder for the results"})
    data: str = field(default="digits", metadata={"help": "digits, a folder of images, parquet or arrow, or a Hub id"})
    split: str | None = field(default=None, metadata={"help": "its split; by default test, validation or train"})
    images: int = field(default=8, metadata={"help": "images to encode and decode, the first of the set"})
    pad: bool = field(default=False, metadata={"help": "frame small images with black, instead of enlarging them"})
    steps: tuple[int, ...] = field(default=(10, 20, 50), metadata={"help": "numbers of steps, S"})
    refinement: tuple[int, ...] = field(default=(0, 1, 2, 4, 8), metadata={"help": "refinements of a step, k"})
    guidance: tuple[float, ...] = field(default=(), metadata={"help": "guidance scales; by default 1, 3 and 7.5"})
    prompts: str | None = field(
        default=None, metadata={"help": "file with a prompt a line, for each image or for all; by default from labels"}
    )
    prompt: str = field(default="a {}", metadata={"help": "prompt for labels: {} is the name of the class"})
    spacing: str | None = field(default=None, metadata={"help": "τ by name; by default the model's"})
    tolerance: float | None = field(
        default=None, metadata={"help": "residual of a converged step; by default 1e-3 for latents, 1e-5 for pixels"}
    )
    failure: float | None = field(
        default=None,
        metadata={"help": "error above which an image fails; by default 0.05 for latents, 1e-3 for pixels"},
    )
    batch_size: int = field(default=8, metadata={"help": "images at a time"})
    class_label: int | None = field(default=None, metadata={"help": "label of all images, for a conditional network"})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, …; by default an accelerator if any"})
    overwrite: bool = field(default=False, metadata={"help": "replace the results of an earlier run"})


def check(config: InversionConfig) -> None:
    """Raise ValueError for settings out of range, before anything is loaded."""
    for name, lowest in {"images": 1, "batch_size": 1, "steps": 1, "refinement": 0}.items():
        given = getattr(config, name)
        values = given if isinstance(given, tuple) else (given,)
        if min(values, default=-1) < lowest or len(set(values)) < len(values):
            raise ValueError(f"{name} must be distinct numbers from {lowest} on, not {given}")
    for name in ("guidance", "tolerance", "failure"):
        given = getattr(config, name)
        values = given if isinstance(given, tuple) else () if given is None else (given,)
        lowest = 1 if name == "guidance" else 0
        if not all(lowest <= value < math.inf for value in values) or len(set(values)) < len(values):
            raise ValueError(f"{name} must be distinct finite numbers from {lowest} on, not {given}")
    there = [name for name in WRITTEN if (Path(config.output) / name).exists()]
    if there and not config.overwrite:
        raise ValueError(f"{Path(config.output) / there[0]} exists: choose another output, or pass --overwrite")


def complete(config: InversionConfig, kind: str) -> InversionConfig:
    """Return the config with the defaults of its kind of model. Raises ValueError for settings of the other kind."""
    other = ("class_label",) if kind == "latents" else ("guidance", "prompts")
    for name in other:
        if getattr(config, name) not in (None, ()):
            raise ValueError(f"{name} is not used for a model of {kind}: leave out {name}={getattr(config, name)}")
    given = {name: getattr(config, name) for name in DEFAULTS[kind] if getattr(config, name) not in (None, ())}
    split = choose_split(config.data, config.split, config.data_config)
    return replace(config, split=split, **DEFAULTS[kind] | given)


def prepare(config: InversionConfig, kind: str) -> tuple[Latents | Pixels, bool]:
    """Load the model and the pictures. Returns the round trips, and whether diffusers has inverses for the model."""
    assert config.tolerance is not None
    if kind == "pixels":
        bench = Bench(
            config.model,
            config.steps,
            config.spacing,
            config.class_label,
            config.batch_size,
            config.tolerance,
            config.device,
        )
        pictures = open_pictures(config.data, config.split, **config.reading)
        images = read_images(pictures, *Pixels.size_of(bench), config.images, config.pad)
        stock = not isinstance(bench.pipe.scheduler.path, FlowMatching | VarianceExploding)
        return Pixels(bench, images), stock
    prompts = None if config.prompts is None else read_prompts(config.prompts, config.images)
    pictures = _labelled(config) if prompts is None else open_pictures(config.data, config.split, **config.reading)
    pipe = Latents.load(config.model, config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    images = read_images(pictures, *Latents.size_of(pipe), config.images, config.pad)
    prompts = prompts[: len(images)] if prompts else prompts_of(pictures, config.prompt, len(images))
    made = Latents(pipe, images, prompts, config.spacing, config.tolerance, config.batch_size)
    for S in config.steps:
        made.sampler.set_timesteps(S)
    return made, True


def _labelled(config: InversionConfig) -> Pictures:
    try:
        return open_pictures(config.data, config.split, labelled=True, **config.reading)
    except ValueError as error:
        if "label" not in str(error):
            raise
        raise ValueError(f"{config.data} has no labels to make prompts of: pass --prompts FILE") from error


@guard.output(alone=True)
def main(config: InversionConfig) -> dict[str, Any]:
    """Write `inversion.json` and `inversion.md` after each row, then the plot. Returns the content of the first."""
    check(config)
    kind = kind_of(config.model)
    config = complete(config, kind)
    assert config.failure is not None
    trips, stock = prepare(config, kind)
    count = len(trips.latents if isinstance(trips, Latents) else trips.images)
    if count < config.images:
        print(f"note: {config.data} has {count} images, not {config.images}", file=sys.stderr)
    output = Path(config.output)
    result = record(config) | {"command": command(config), "kind": kind, "images": count, "spacing": trips.spacing}
    result |= {"model": {"sha256": trips.digest}, "rows": []}
    if isinstance(trips, Latents):
        result["prompts"] = trips.prompts
    chosen = [each for each in inverses(config.refinement) if stock or not each.stock]
    work = [(guidance, S) for guidance in config.guidance or (None,) for S in config.steps]
    total = count * sum(each.cost(*settings) for settings in work for each in chosen)
    with Progress(total, "inversion") as bar, bar.counting(trips.pipe.unet):
        for guidance, S in work:
            for each in chosen:
                start = time.perf_counter()
                with bar.part(count * each.cost(guidance, S)):
                    found = summary(trips.trip(each, S, guidance or 1.0), config.failure, kind == "latents")
                row = {"guidance": guidance, "S": S, "inverse": each.name, "refinement_steps": each.refinement_steps}
                if not result["rows"]:
                    for name in WRITTEN:
                        (output / name).unlink(missing_ok=True)  # nothing stays beside results of another run
                result["rows"].append(row | found | {"seconds": time.perf_counter() - start})
                shown = "not finite" if found["error"] is None else f"{found['error']:.2e}"
                bar.print(f"w = {guidance}  S = {S:3d}  {each.name:24s} {shown}  {found['evaluations']:.0f}")
            write(result, output)
    plot(result, output / "inversion.png")
    return result


def write(result: dict[str, Any], output: Path) -> None:
    """Write the record, and the table made from it."""
    write_json(output / "inversion.json", result)
    write_file(output / "inversion.md", table(result))


if __name__ == "__main__":
    with guard.program():
        done = main(parse(InversionConfig))
        for name in WRITTEN:
            print(Path(done["config"]["output"]) / name)
