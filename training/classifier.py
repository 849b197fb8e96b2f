"""Train an image classifier: its features replace Inception's for digits and the like, or it guides a model.

python training/classifier.py --data my/labelled --output my/classifier
python training/classifier.py --data my/labelled --noisy my/model --output my/guide
"""

import guard

if __name__ == "__main__":
    guard.start()  # before the imports that take seconds

import json
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cards.weights import weights_digest
from classifiers.clean import Classifier, moments
from classifiers.noisy import Guide
from guard.reading import read_object
from guard.writing import replace_folder
from measure.parts import start_processes
from pictures import Feed, Frame, Pictures, Reading, Share, as_dataset, find_frame, held_out, in_memory, open_pictures
from torch import Tensor, nn
from tqdm.auto import tqdm
from trainer.settings import MACHINES, command, parse, record, write_json

TRAINING, MODEL = "training.json", "config.json"


@dataclass(frozen=True)
class ClassifierConfig(Reading):
    """Train a small ResNet on labelled pictures, or with --noisy a network for x_t whose gradient guides a model."""

    data: str = field(metadata={"help": "digits, a folder with one subfolder a class, parquet or arrow, or a Hub id"})
    output: str = field(metadata={"help": "folder for the classifier"})
    resolution: int | None = field(default=None, metadata={"help": "side of the pictures; by default the first's"})
    channels: int | None = field(default=None, metadata={"help": "1 or 3, those of the model; by default found"})
    label_column: str | None = field(default=None, metadata={"help": "column of the labels; by default found"})
    test_split: str | None = field(default=None, metadata={"help": "split to measure the accuracy on, such as test"})
    hidden_sizes: tuple[int, ...] = field(default=(32, 64, 128), metadata={"help": "channels a stage; last: features"})
    noisy: str | None = field(default=None, metadata={"help": "the model to guide, whose noise is added to pictures"})
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
    """Raise ValueError for numbers out of range, and for an output that must not be replaced."""
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
    if output.exists() and not config.overwrite:
        raise ValueError(f"{output} exists: choose another folder, or pass --overwrite")
    ours = output.is_dir() and all((output / name).is_file() for name in (TRAINING, MODEL))
    saved = read_object(output / MODEL) if ours else {}
    if output.exists() and saved.get("model_type") != "resnet" and saved.get("_class_name") != "NoisyClassifier":
        raise ValueError(f"{output} is no classifier that was made here, so --overwrite keeps it: choose another")


@guard.output(alone=True, whole=True)
def main(config: ClassifierConfig) -> dict[str, Any]:
    """Write the classifier and `training.json`, and return the figures of the latter."""
    check(config)
    device = start_processes(config.device).device
    pictures, frame = to_train_on(config)
    split = None if config.test_split is None else labelled(config, config.test_split)
    tested = None if split is None else held_out(split, frame, split.count, pictures.classes)
    share = (config, frame, pictures.classes)
    guide = Guide(*share) if config.noisy else None  # a model that does not fit fails before pictures are read
    images = in_memory(pictures, frame, config.resolution is not None, 2, not sys.stderr.isatty())
    assert images is not None  # pictures cropped at the centre have one size
    scale = moments(images, config.data)
    model = (guide or Classifier(*share, *scale)).to(device)
    with replace_folder(Path(config.output).resolve()) as folder:
        started = time.perf_counter()
        feed = Feed(pictures, frame, Share(config.batch_size, 1), config.seed, config.flip, 2, device, images)
        loss = train(model, feed, config)
        model.eval()
        known = {
            "command": command(config, tuple(name for name in MACHINES if name != "batch_size")),
            "seconds": time.perf_counter() - started,
            "loss": loss,
            "parameters": sum(each.numel() for each in model.parameters()),
            "sha256": weights_digest(model.network),
            "dataset": as_dataset(config.data, pictures.split, config.data_config),
            "images": pictures.count,
        } | ({} if tested is None else {"accuracy": accuracy(model, *tested)})
        if config.noisy and tested is not None:
            known["accuracy_at"] = {
                f"{share:g}·T": accuracy(model.at(share), *tested) for share in (0.1, 0.3, 0.5, 0.7)
            }
        model.save(folder)
        write_json(folder / TRAINING, record(config) | known)
        check(config)  # another program may have written to the output by now
    return known


def labelled(config: ClassifierConfig, split: str) -> Pictures:
    """Open a split with its labels."""
    return open_pictures(config.data, split, label_column=config.label_column, labelled=True, **config.reading)


def to_train_on(config: ClassifierConfig) -> tuple[Pictures, Frame]:
    """Open the pictures to train on, and choose their frame. Raises ValueError if they do not suit a classifier."""
    pictures = labelled(config, "train")
    if len(pictures.classes) < 2:
        raise ValueError(f"{config.data} has the classes {', '.join(pictures.classes)}: a classifier needs two or more")
    frame = find_frame(pictures, config.channels, None if config.resolution is None else (config.resolution,) * 2)
    if config.shift >= min(frame.size):
        raise ValueError(f"shift={config.shift} moves pictures of {frame.size[0]}×{frame.size[1]} out of sight")
    return pictures, frame


def train(model: Classifier | Guide, feed: Feed, config: ClassifierConfig) -> float:
    """Train a classifier and return the loss of the last step. Raises ValueError if it is not finite."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=config.steps + 1)
    generator = np.random.default_rng([config.seed, 2])
    bar = tqdm(range(config.steps), desc="training", disable=not sys.stderr.isatty())
    for step, (batch, labels) in zip(bar, feed.batches(0), strict=False):
        loss = nn.functional.cross_entropy(
            model(shifted(batch, config.shift, generator)), labels, label_smoothing=model.smoothing
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step % 100 == 99 or step == config.steps - 1) and not bool(loss.isfinite()):
            raise ValueError(f"the loss is {loss.item()} at step {step + 1}: lower --learning_rate")
    return loss.item()


def shifted(batch: Tensor, shift: int, generator: np.random.Generator) -> Tensor:
    """Move a batch (B, C, H, W) by up to `shift` pixels in each direction, and fill with black."""
    down, right = generator.integers(0, 2 * shift + 1, 2)
    return nn.functional.pad(batch, [shift] * 4)[:, :, down : down + batch.shape[2], right : right + batch.shape[3]]


@torch.no_grad()
def accuracy(model: Classifier | Guide, images: Tensor, labels: Tensor) -> float:
    """Return the share of pictures that are classified correctly."""
    parts = zip(images.split(500), labels.split(500), strict=True)
    return float(torch.cat([model(part).argmax(1).cpu() == known for part, known in parts]).double().mean())


if __name__ == "__main__":
    with guard.program():
        given = parse(ClassifierConfig)
        print(json.dumps(main(given), indent=2))
        print(f"{given.output}: the classifier")
