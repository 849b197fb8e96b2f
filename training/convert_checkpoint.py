"""Convert a checkpoint of a run, of the authors' code, or of pesser's port of Ho's weights, into a pipeline folder.

python training/convert_checkpoint.py --checkpoint ema_diffusion_cifar10_model/model-790000.ckpt --output out/cifar10
python training/convert_checkpoint.py --checkpoint out/digits/checkpoints/step-00001000 --output out/digits-1000
"""

import guard

if __name__ == "__main__":
    guard.start()  # before the imports that take seconds

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cards.card import write_card
from diffusers import SchedulerMixin, UNet2DModel
from trainer.checkpoints import damage
from trainer.config import scheduler_class
from trainer.convert import check_values, choose, fingerprint, network, read, sets
from trainer.output import PART, replace_pipeline
from trainer.run import read_network, read_state
from trainer.settings import parse, record, write_json

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler

WEIGHTS, RECORD = ("auto", "ema", "raw"), "conversion.json"
BETAS = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end")


@dataclass(frozen=True)
class ConvertConfig:
    """Convert a checkpoint of train.py, or of the authors' network (CIFAR-10, CelebA, LSUN), into a pipeline.

    The network's layout is found from its tensors. Only tensors, numbers and lists of them are ever unpickled.
    """

    checkpoint: str = field(metadata={"help": "step-… of train.py, or a file of the authors or of pesser"})
    output: str = field(metadata={"help": "folder for the pipeline"})
    weights: str = field(
        default="auto", metadata={"help": "ema, raw, or auto: the averaged ones if the file has two sets"}
    )
    resolution: int | None = field(
        default=None, metadata={"help": "side of the pictures; by default the one at which attention is at 16×16"}
    )
    dropout: float = field(default=0.0, metadata={"help": "for training on; the authors have 0.1, for LSUN 0"})
    num_train_timesteps: int = field(default=1000, metadata={"help": "T"})
    beta_schedule: str = field(default="linear", metadata={"help": "β by name; linear in all published networks"})
    beta_start: float = field(default=1e-4, metadata={"help": "the first β"})
    beta_end: float = field(default=0.02, metadata={"help": "the last β"})
    overwrite: bool = field(default=False, metadata={"help": "replace an earlier conversion"})


def check(config: ConvertConfig) -> None:
    """Raise ValueError for settings that cannot work, before anything is read."""
    if config.weights not in WEIGHTS:
        raise ValueError(f"unknown weights {config.weights!r}: use {', '.join(WEIGHTS)}")
    if config.resolution is not None and config.resolution < 1:
        raise ValueError(f"resolution must be positive, not {config.resolution}")
    if not 0 <= config.dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), not {config.dropout}")
    output = Path(config.output)
    if Path(config.checkpoint).resolve().is_relative_to(output.resolve()):
        raise ValueError(f"the checkpoint {config.checkpoint} lies in the output {config.output}: keep them apart")
    there = {part.name for part in output.iterdir()} - {PART, guard.LOCK} if output.exists() else set()
    if there and RECORD not in there:
        raise ValueError(f"the output {config.output} holds something else than a conversion: choose another folder")
    if there and not config.overwrite:
        raise ValueError(f"the output {config.output} holds a conversion: choose another folder, or pass --overwrite")


@guard.output(alone=True)
def main(config: ConvertConfig) -> dict[str, Any]:
    """Write the pipeline and `conversion.json`, and return the content of the latter."""
    check(config)
    path = Path(config.checkpoint)
    unet, scheduler, result = (convert_run if path.is_dir() else convert_file)(config, path)
    settings = {key: value for key, value in unet.config.items() if not key.startswith("_")}
    result = record(config) | result | {"parameters": unet.num_parameters(), "unet": settings}
    with replace_pipeline(Path(config.output)) as aside:
        GeneralizedDDIMPipeline(unet, scheduler).save_pretrained(aside)
        write_json(aside / RECORD, result)
        write_card(aside, f"user/{Path(config.output).resolve().name}")
    return result


Converted = tuple[UNet2DModel, SchedulerMixin, dict[str, Any]]
"""A network, its scheduler, and what `conversion.json` says of their source."""


def convert_file(config: ConvertConfig, path: Path) -> Converted:
    """Convert a file of the authors. Raises ValueError, with its name, if it is none."""
    scheduler = GeneralizedDDIMScheduler(**{key: getattr(config, key) for key in BETAS})
    source = fingerprint(path)
    try:
        content = read(path)
        kind, weights = choose(sets(content, source["published"]), config.weights)
        check_values(weights)
        unet = network(weights, config.resolution, config.dropout)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    trained = {"epoch": content[2], "step": content[3]} if isinstance(content, list) else {}
    source |= {key: value for key, value in trained.items() if type(value) is int}
    return unet, scheduler, {"source": source, "weights": kind, "tensors": len(weights)}


def convert_run(config: ConvertConfig, folder: Path) -> Converted:
    """Convert a checkpoint of `train.py`. Raises ValueError if it is none, or is damaged."""
    for name in ("resolution", "dropout", *BETAS):
        if getattr(config, name) != getattr(ConvertConfig, name):
            raise ValueError(f"{name} has no effect on a checkpoint of train.py, which knows its own: leave it out")
    if problem := damage(folder):
        raise ValueError(f"{folder} is no checkpoint: {problem}. Pass such as OUTPUT/checkpoints/step-00005000")
    state, kind = read_state(folder), "ema" if config.weights == "auto" else config.weights
    settings, weights = read_network(folder, kind)
    try:
        unet = UNet2DModel(**settings)
        unet.load_state_dict(weights)
        made, table = scheduler_class(state["scheduler"]), state["scheduler"]
        scheduler = made(**table) if made is GeneralizedDDIMScheduler else made.from_config(table)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{folder / 'run.json'} does not describe the network and scheduler ({reason})") from error
    source = {"file": folder.name, "step": state["step"], "training": state["config"]}
    return unet.eval(), scheduler, {"source": source, "weights": kind, "tensors": len(weights)}


if __name__ == "__main__":
    with guard.program():
        arguments = parse(ConvertConfig)
        done = main(arguments)
        side, parameters = done["unet"]["sample_size"], f"{done['parameters']:,} parameters"
        print(f"{arguments.output}: {done['weights']} weights, {parameters}, pictures of {side}×{side}")
