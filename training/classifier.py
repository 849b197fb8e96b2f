"""Train an image classifier whose features stand in for Inception's where that does not fit: digits, other channels.

python training/classifier.py --data my/labelled --output my/classifier
python training/evaluate.py --extractors my/classifier …

It is a `ResNetForImageClassification` of transformers, saved with its preprocessing: a folder for `--extractors`.
"""

import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure.parts import start_processes
from pictures.sources import (
    SPLITS,
    Feed,
    Frame,
    Pictures,
    Share,
    as_dataset,
    find_frame,
    held_out,
    in_memory,
    open_pictures,
)
from torch import Tensor, nn
from tqdm.auto import tqdm
from trainer.settings import MACHINES, command, parse, put_in_place, record, write_json

from ddim_plugin.hub.card import read_object
from ddim_plugin.hub.reading import weights_digest

TRAINING, MODEL = "training.json", "config.json"


@dataclass(frozen=True)
class ClassifierConfig:
    """Train a small ResNet on labelled pictures."""

    data: str = field(metadata={"help": "digits, a folder with one subfolder a class, parquet or arrow, or a Hub id"})
    output: str = field(metadata={"help": "folder for the classifier"})
    resolution: int | None = field(default=None, metadata={"help": "side of the pictures; by default the first's"})
    channels: int | None = field(default=None, metadata={"help": "1 or 3, those of the model; by default the first's"})
    label_column: str | None = field(default=None, metadata={"help": "column of the labels; by default found"})
    test_split: str | None = field(default=None, metadata={"help": "split to tell the accuracy on, as test"})
    hidden_sizes: tuple[int, ...] = field(
        default=(32, 64, 128), metadata={"help": "channels of the stages; the last is the number of features"}
    )
    layers: int = field(default=2, metadata={"help": "blocks in each stage"})
    steps: int = field(default=3000, metadata={"help": "steps of the optimizer"})
    batch_size: int = field(default=128, metadata={"help": "pictures in a step"})
    learning_rate: float = field(default=2e-3, metadata={"help": "of AdamW at its highest; it rises and falls once"})
    shift: int = field(default=2, metadata={"help": "pixels that pictures are moved by, at most"})
    flip: bool = field(default=False, metadata={"help": "mirror half of the pictures"})
    seed: int = field(default=0, metadata={"help": "of weights, order, shifts and flips"})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, …; by default an accelerator if any"})
    overwrite: bool = field(default=False, metadata={"help": "replace an earlier classifier"})


def check(config: ClassifierConfig) -> None:
    """Raise ValueError for numbers that cannot be, and for an output that must not be replaced."""
    for name in ("layers", "steps", "learning_rate"):
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name} must be positive, not {getattr(config, name)}")
    if config.batch_size < 2:
        raise ValueError(f"batch_size must be 2 at least, for batch norm, not {config.batch_size}")
    if min(config.hidden_sizes, default=0) < 1:
        raise ValueError(f"hidden_sizes must be positive, not {config.hidden_sizes}")
    if min(config.shift, config.seed) < 0:
        raise ValueError(f"shift and seed must not be negative, as one of {config.shift} and {config.seed} is")
    output = Path(config.output)
    if not output.exists():
        return
    if not config.overwrite:
        raise ValueError(f"{output} is there already: name another folder, or pass --overwrite")
    ours = output.is_dir() and all((output / name).is_file() for name in (TRAINING, MODEL))
    if not ours or read_object(output / MODEL).get("model_type") != "resnet":
        raise ValueError(f"{output} is no classifier that was made here, for --overwrite to replace: choose another")


def main(config: ClassifierConfig) -> dict[str, Any]:
    """Write the classifier and training.json, whose figures it returns."""
    check(config)
    try:
        from transformers import ResNetConfig, ResNetForImageClassification
    except ImportError as error:
        raise ValueError(f"a classifier needs transformers ({error}): pip install transformers") from error
    state = start_processes(config.device)
    if state.num_processes > 1:
        raise ValueError(f"a classifier is trained by one process, not by {state.num_processes}")
    pictures = open_pictures(config.data, label_column=config.label_column, labelled=True)
    if len(pictures.classes) < 2 or {name.lower() for name in pictures.classes} <= set(SPLITS):
        raise ValueError(
            f"the classes of {config.data} are {', '.join(pictures.classes)}: a classifier tells two at least apart. "
            "Of a folder name the part that holds one subfolder for each class"
        )
    size = None if config.resolution is None else (config.resolution, config.resolution)
    frame = find_frame(pictures, config.channels, size)
    if config.shift >= min(frame.size):
        raise ValueError(f"shift={config.shift} moves pictures of {frame.size[0]}×{frame.size[1]} out of sight")
    tested = _tested(config, frame, pictures)
    images = in_memory(pictures, frame, size is not None, 2, not sys.stderr.isatty())
    assert images is not None  # cropped at the centre they are of one size
    some = images[:: 1 + len(images) // 10_000].double() / 255
    mean, std = (found(some, dim=(0, 2, 3)).tolist() for found in (torch.mean, torch.std))
    if max(std) < 1e-6:
        raise ValueError(f"the pictures of {config.data} are all of one colour: there is nothing to tell apart")
    std = [each if each > 1e-6 else 1.0 for each in std]

    torch.manual_seed(config.seed)
    network: Any = ResNetForImageClassification(
        ResNetConfig(
            num_channels=frame.channels,
            embedding_size=config.hidden_sizes[0],
            hidden_sizes=list(config.hidden_sizes),
            depths=[config.layers] * len(config.hidden_sizes),
            layer_type="basic",
            id2label=dict(enumerate(pictures.classes)),
            label2id={name: i for i, name in enumerate(pictures.classes)},
        )
    )
    device = state.device
    network.to(device)
    centre, scale = (torch.tensor(each, device=device).view(1, -1, 1, 1) for each in (mean, std))

    def logits(batch: Tensor) -> Tensor:
        return network(pixel_values=(batch.to(device).float() / 255 - centre) / scale).logits

    output = Path(config.output).resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        started = time.perf_counter()
        feed = Feed(pictures, frame, Share(config.batch_size, 1), config.seed, config.flip, 2, device, images)
        loss = train(network, logits, feed, config)
        network.eval()
        free = tuple(name for name in MACHINES if name != "batch_size")
        said = {"command": command(config, free), "seconds": time.perf_counter() - started, "loss": loss}
        said |= {"parameters": sum(each.numel() for each in network.parameters()), "sha256": weights_digest(network)}
        said |= {"dataset": as_dataset(config.data, "train"), "images": pictures.count}
        if tested is not None:
            said["accuracy"] = accuracy(logits, *tested)
        aside = Path(scratch) / output.name
        network.save_pretrained(aside)
        sides = dict(zip(("height", "width"), frame.size, strict=True))
        processor = {"image_processor_type": "ViTImageProcessor", "do_resize": True, "size": sides, "resample": 2}
        processor |= {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
        write_json(aside / "preprocessor_config.json", processor | {"image_mean": mean, "image_std": std})
        write_json(aside / TRAINING, record(config) | said)
        put_in_place(aside, output, config.overwrite)
    return said


def _tested(config: ClassifierConfig, frame: Frame, pictures: Pictures) -> tuple[Tensor, Tensor] | None:
    """The pictures that the accuracy is told on, and their labels."""
    if config.test_split is None:
        return None
    split = open_pictures(config.data, config.test_split, None, config.label_column, True)
    images, labels = held_out(split, frame, sys.maxsize, pictures.classes)
    assert labels is not None
    return images, labels


def train(network: nn.Module, logits: Callable[[Tensor], Tensor], feed: Feed, config: ClassifierConfig) -> float:
    """The loss of the last step. Raises ValueError where it is not finite."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=config.steps + 1)
    generator = np.random.default_rng([config.seed, 2])
    loss = torch.tensor(math.nan)
    bar = tqdm(range(config.steps), desc="training", disable=not sys.stderr.isatty())
    for step, (batch, labels) in zip(bar, feed.batches(0), strict=False):
        found = logits(shifted(batch, config.shift, generator))
        loss = nn.functional.cross_entropy(found, labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step % 100 == 99 or step == config.steps - 1) and not bool(loss.isfinite()):
            raise ValueError(f"the loss is {loss.item()} at step {step + 1}: lower --learning_rate")
    return loss.item()


def shifted(batch: Tensor, shift: int, generator: np.random.Generator) -> Tensor:
    """A batch (B, C, H, W), moved by up to so many pixels, what comes in being black."""
    down, right = generator.integers(0, 2 * shift + 1, 2)
    height, width = batch.shape[2:]
    return nn.functional.pad(batch, [shift] * 4)[:, :, down : down + height, right : right + width]


@torch.no_grad()
def accuracy(logits: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> float:
    """The share of pictures that are told right."""
    parts = zip(images.split(500), labels.split(500), strict=True)
    return float(torch.cat([logits(part).argmax(1).cpu() == told for part, told in parts]).double().mean())


if __name__ == "__main__":
    try:
        print(json.dumps(main(parse(ClassifierConfig)), indent=2))
    except (ValueError, OSError) as error:
        sys.exit(f"classifier.py: {error}")
