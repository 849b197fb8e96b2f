"""Train an image classifier whose features stand in for Inception's where that does not fit: digits, other channels.

python training/classifier.py --data my/labelled --output my/classifier
python training/evaluate.py --extractors my/classifier …

It is a `ResNetForImageClassification` of transformers, saved with its preprocessing: a folder for `--extractors`.
"""

import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from config import command, parse, record, write_json
from data import Feed, Frame, Share, as_dataset, find_frame, has_splits, held_out, in_memory, open_pictures
from torch import Tensor, nn
from tqdm.auto import tqdm

from ddim_plugin.hub import weights_digest


@dataclass(frozen=True)
class ClassifierConfig:
    """Train a small ResNet on labelled pictures."""

    data: str = field(
        metadata={"help": "digits, a folder with a subfolder for each class, parquet or arrow, or a Hub id"}
    )
    output: str = field(metadata={"help": "folder for the classifier"})
    resolution: int | None = field(default=None, metadata={"help": "side of the pictures; by default the first's"})
    label_column: str | None = field(default=None, metadata={"help": "column of the labels; by default found"})
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
    for name in ("layers", "steps", "batch_size", "learning_rate"):
        if not getattr(config, name) > 0:
            raise ValueError(f"{name} must be positive, not {getattr(config, name)}")
    if min(config.hidden_sizes) < 1:
        raise ValueError(f"hidden_sizes must be positive, not {config.hidden_sizes}")
    if config.shift < 0:
        raise ValueError(f"shift must not be negative, as {config.shift} is")
    if Path(config.output).exists() and not config.overwrite:
        raise ValueError(f"{config.output} is there already: name another folder, or pass --overwrite")


def main(config: ClassifierConfig) -> dict[str, Any]:
    """Write the classifier and training.json, whose figures it returns."""
    check(config)
    try:
        from transformers import ResNetConfig, ResNetForImageClassification
    except ImportError as error:
        raise ValueError(f"a classifier needs transformers ({error}): pip install transformers") from error
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    pictures = open_pictures(config.data, label_column=config.label_column, labelled=True)
    size = None if config.resolution is None else (config.resolution, config.resolution)
    frame = find_frame(pictures, None, size)
    images = in_memory(pictures, frame, size is not None, 2, False)
    assert images is not None  # cropped at the centre they are of one size
    some = images[:: 1 + len(images) // 10_000].double() / 255
    mean, std = (found(some, dim=(0, 2, 3)).tolist() for found in (torch.mean, torch.std))
    if min(std) == 0:
        raise ValueError(f"the pictures of {config.data} are all of one colour: there is nothing to tell apart")

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
    network.to(device)
    centre, scale = (torch.tensor(each, device=device).view(1, -1, 1, 1) for each in (mean, std))

    def logits(batch: Tensor) -> Tensor:
        return network(pixel_values=(batch.to(device).float() / 255 - centre) / scale).logits

    feed = Feed(pictures, frame, Share(config.batch_size, 1), config.seed, config.flip, 2, device, images)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=config.steps + 1)
    generator = np.random.default_rng([config.seed, 2])
    started = time.perf_counter()
    bar = tqdm(range(config.steps), desc="training", disable=not sys.stderr.isatty())
    loss = torch.tensor(math.nan)
    for _, (batch, labels) in zip(bar, feed.batches(0), strict=False):
        assert labels is not None
        found = logits(shifted(batch, config.shift, generator))
        loss = nn.functional.cross_entropy(found, labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    if not bool(loss.isfinite()):
        raise ValueError(f"the loss is {loss.item()} at the end: lower --learning_rate")
    network.eval()
    said = {"command": command(config), "seconds": time.perf_counter() - started, "loss": loss.item()}
    said |= {"parameters": sum(each.numel() for each in network.parameters()), "sha256": weights_digest(network)}
    said |= {"dataset": as_dataset(config.data, "train"), "images": pictures.count}
    if has_splits(config.data):
        said["accuracy"] = accuracy(logits, config, frame, pictures.classes)
    sides = dict(zip(("height", "width"), frame.size, strict=True))
    kept = {"do_resize": True, "size": sides, "do_normalize": True, "image_mean": mean, "image_std": std}
    save(network, record(config) | said, kept, Path(config.output))
    return said


def shifted(batch: Tensor, shift: int, generator: np.random.Generator) -> Tensor:
    """A batch (B, C, H, W), moved by up to so many pixels, what comes in being black."""
    down, right = generator.integers(0, 2 * shift + 1, 2)
    height, width = batch.shape[2:]
    return nn.functional.pad(batch, [shift] * 4)[:, :, down : down + height, right : right + width]


@torch.no_grad()
def accuracy(
    logits: Callable[[Tensor], Tensor], config: ClassifierConfig, frame: Frame, classes: tuple[str, ...]
) -> float:
    """The share of the test split that is told right."""
    images, labels = held_out(
        open_pictures(config.data, "test", None, config.label_column, True), frame, sys.maxsize, classes
    )
    assert labels is not None
    right = [
        logits(part).argmax(1).cpu() == told for part, told in zip(images.split(500), labels.split(500), strict=True)
    ]
    return float(torch.cat(right).double().mean())


def save(network: Any, said: dict[str, Any], preprocessing: dict[str, Any], output: Path) -> None:
    """Written aside, and moved into its place when all is there."""
    aside = output.with_name(output.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    network.save_pretrained(aside)
    write_json(aside / "preprocessor_config.json", preprocessing)
    write_json(aside / "training.json", said)
    output.mkdir(parents=True, exist_ok=True)
    for file in aside.iterdir():
        file.replace(output / file.name)
    aside.rmdir()


if __name__ == "__main__":
    try:
        print(json.dumps(main(parse(ClassifierConfig)), indent=2))
    except (ValueError, OSError) as error:
        sys.exit(f"classifier.py: {error}")
