"""Fit the timesteps of a model at few steps, and save the model with them.

python training/fit.py --model user/model --steps 5 8 10 --output out/fitted

It needs no data: the model's own trajectories at many steps are the goal. The scheduler of the saved model is a
`MultistepDDIMScheduler` with these timesteps, which it uses for those step counts.
"""

import guard

if __name__ == "__main__":
    guard.start()  # before the imports that take seconds

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from guard.writing import replace_folder
from measure.comparison.fitting import fit_timesteps
from measure.parts import DTYPES
from trainer.settings import command, parse, record, write_json

from ddim_plugin import GeneralizedDDIMPipeline, MultistepDDIMScheduler
from ddim_plugin.hub.push import INDEX
from ddim_plugin.schedulers import keep_learned

MODEL, RECORD = "model", "fit.json"


@dataclass(frozen=True)
class FitConfig:
    """Fit the timesteps of a model at few steps, on its own trajectories, and save the model with them."""

    model: str = field(metadata={"help": "a folder written by save_pretrained, or a Hub id"})
    output: str = field(default="out/fitted", metadata={"help": "folder for model/ and fit.json"})
    steps: tuple[int, ...] = field(default=(5, 8, 10, 15, 20), metadata={"help": "numbers of steps to fit"})
    images: int = field(default=128, metadata={"help": "images to fit on; half of them choose the result"})
    teacher_steps: int = field(default=200, metadata={"help": "steps of the solutions that images are to come near"})
    class_label: tuple[int, ...] = field(
        default=(), metadata={"help": "label of all images, or one for each; by default spread over all"}
    )
    guidance_scale: float = field(default=1.0, metadata={"help": "classifier-free guidance; 1 is none"})
    null_class_label: int | None = field(default=None, metadata={"help": "label of no class; by default the last"})
    seed: int = field(default=0, metadata={"help": "x_T of image i is drawn from seed + i"})
    batch_size: int = field(default=64, metadata={"help": "images at a time"})
    dtype: str = field(default="float32", metadata={"help": "of the network while it is fitted, such as bfloat16"})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, …; by default an accelerator if any"})
    overwrite: bool = field(default=False, metadata={"help": "replace an earlier fit"})


def check(config: FitConfig) -> None:
    """Raise ValueError for settings that cannot work, and for files that must not be replaced."""
    if config.dtype not in DTYPES:
        raise ValueError(f"unknown dtype {config.dtype!r}: use one of {', '.join(DTYPES)}")
    for name, least in (("images", 2), ("teacher_steps", 2), ("batch_size", 1)):
        if getattr(config, name) < least:
            raise ValueError(f"{name} must be at least {least}, not {getattr(config, name)}")
    if not -(2**63) <= config.seed < 2**63 - config.images:
        raise ValueError(f"a seed must fit 64 bits with its sign, not {config.seed}")
    if len(config.class_label) not in (0, 1, config.images):
        raise ValueError(f"{len(config.class_label)} class labels for {config.images} images: give one or all")
    folder, model = Path(config.output) / MODEL, Path(config.model).resolve()
    if folder.resolve() in (model, *model.parents):
        raise ValueError(f"the output {config.output} would replace {config.model} by the fitted model: choose another")
    for path in (folder, folder.with_name(RECORD)):
        if path.exists() and not config.overwrite:
            raise ValueError(f"{path} exists: choose another output, or pass --overwrite")
    if folder.exists() and not (folder / INDEX).is_file():
        raise ValueError(f"--overwrite replaces models only, not {folder}: choose another output")


@guard.output(alone=True)
def main(config: FitConfig) -> dict[str, Any]:
    """Write `model/` and `fit.json`, and return the content of the latter."""
    check(config)
    pipe = GeneralizedDDIMPipeline.from_pretrained(config.model)
    stock = pipe.scheduler.config
    noiseless = keep_learned(stock, {"eta": 0.0, "variance_type": "fixed_small"})
    pipe.scheduler = MultistepDDIMScheduler.from_config(stock, **noiseless)
    pipe.to(config.device or ("cuda" if torch.cuda.is_available() else "cpu"), DTYPES[config.dtype])
    labels = list(config.class_label) * (config.images // max(1, len(config.class_label))) or None
    guidance = {"guidance_scale": config.guidance_scale, "null_class_label": config.null_class_label}
    numbers = config.images, config.teacher_steps, config.seed, config.batch_size
    found = fit_timesteps(pipe, config.steps, *numbers, class_labels=labels, **guidance)
    for S, each in found.items():
        print(f"S = {S}: distance to the solution {each.error:.3g} (default {each.default_error:.3g})", file=sys.stderr)
    if config.dtype != "float32":  # the weights are saved as they were loaded
        pipe = GeneralizedDDIMPipeline.from_pretrained(config.model, scheduler=pipe.scheduler)
    fitted = {str(S): each._asdict() for S, each in found.items()}
    result = record(config) | {"command": command(config), "fitted": fitted}
    with replace_folder(Path(config.output) / MODEL) as folder:
        pipe.save_pretrained(folder)
    write_json(Path(config.output) / RECORD, result)
    return result


if __name__ == "__main__":
    with guard.program():
        done = main(parse(FitConfig))
        print(Path(done["config"]["output"]) / MODEL)
