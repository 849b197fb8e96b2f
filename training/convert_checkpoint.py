"""Convert a checkpoint of the authors' code, or of pesser's port of Ho's weights, into a pipeline folder.

python training/convert_checkpoint.py --checkpoint ema_diffusion_cifar10_model/model-790000.ckpt --output out/cifar10
"""

import guard

if __name__ == "__main__":
    guard.start()  # before the imports that take seconds

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.convert import check_values, choose, fingerprint, network, read, sets
from trainer.output import PART, replace_pipeline
from trainer.settings import parse, record, write_json

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler

WEIGHTS, RECORD = ("auto", "ema", "raw"), "conversion.json"


@dataclass(frozen=True)
class ConvertConfig:
    """Convert a PyTorch checkpoint of the authors' network (CIFAR-10, CelebA, LSUN, or your own) into a pipeline.

    The network's layout is found from its tensors. Only tensors, numbers and lists of them are ever unpickled.
    """

    checkpoint: str = field(metadata={"help": "ckpt.pth of the authors, model-….ckpt of pesser, or .safetensors"})
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
    if output.exists() and not output.is_dir():
        raise ValueError(f"the output {config.output} is a file: choose a folder")
    there = {part.name for part in output.iterdir()} - {PART, guard.LOCK} if output.exists() else set()
    if there and RECORD not in there:
        raise ValueError(f"the output {config.output} holds something else than a conversion: choose another folder")
    if there and not config.overwrite:
        raise ValueError(f"the output {config.output} holds a conversion: choose another folder, or pass --overwrite")


@guard.output(alone=True)
def main(config: ConvertConfig) -> dict[str, Any]:
    """Write the pipeline and `conversion.json`, and return the content of the latter."""
    check(config)
    keys = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end")
    scheduler = GeneralizedDDIMScheduler(**{key: getattr(config, key) for key in keys})
    path = Path(config.checkpoint)
    source = fingerprint(path)
    try:
        content = read(path)
        kind, weights = choose(sets(content, source["published"]), config.weights)
        check_values(weights)
        unet = network(weights, config.resolution, config.dropout)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    trained = {"epoch": content[2], "step": content[3]} if isinstance(content, list) else {}
    settings = {key: value for key, value in unet.config.items() if not key.startswith("_")}
    result = record(config) | {
        "source": source | {key: value for key, value in trained.items() if type(value) is int},
        "weights": kind,
        "tensors": len(weights),
        "parameters": unet.num_parameters(),
        "unet": settings,
    }
    with replace_pipeline(Path(config.output)) as aside:
        GeneralizedDDIMPipeline(unet, scheduler).save_pretrained(aside)
        write_json(aside / RECORD, result)
    return result


if __name__ == "__main__":
    with guard.program():
        arguments = parse(ConvertConfig)
        done = main(arguments)
        side, parameters = done["unet"]["sample_size"], f"{done['parameters']:,} parameters"
        print(f"{arguments.output}: {done['weights']} weights, {parameters}, pictures of {side}×{side}")
