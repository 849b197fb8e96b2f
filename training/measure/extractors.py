"""Extractors: networks that map pictures to features, from torch-fidelity or an image classifier of transformers."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from cards.weights import weights_digest
from huggingface_hub.errors import EntryNotFoundError
from torch import Tensor, nn

from .metrics import Features, library
from .parts import Arrays, digest, is_missing_folder

FIDELITY = {"inception-v3-compat": ("2048", "logits_unbiased")} | {
    f"dinov2-vit-{size}-14": ("dinov2",) for size in "sblg"
}
"""Extractors of torch-fidelity, with the names of their features and logits. The first is that of the FID."""

INCEPTION = next(iter(FIDELITY))


@dataclass(frozen=True)
class Extractor:
    """A network that maps uint8 pictures (B, C, H, W) to features (B, D), and to logits (B, K) if it classifies."""

    name: str
    channels: int
    dimension: int
    classes: int | None
    preprocessing: dict[str, Any]
    fingerprint: str
    call: Callable[[Tensor], tuple[Tensor, Tensor | None]]

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Features:
        return Features(*(None if each is None else each.float().cpu().numpy() for each in self.call(pictures)))

    @property
    def slug(self) -> str:
        """The name as part of a metric's id."""
        return slug(self.name)

    def record(self) -> dict[str, Any]:
        """Return the entry of `results.json` that describes this extractor."""
        kept = ("name", "channels", "dimension", "classes", "preprocessing", "fingerprint")
        return {key: getattr(self, key) for key in kept}


def slug(name: str) -> str:
    """Return the name of an extractor as part of a metric's id."""
    return re.sub(r"[^A-Za-z0-9]+", "-", Path(name).name).strip("-").lower()


def extract(extractors: list[Extractor], pictures: Tensor) -> Arrays:
    """Return the features and logits of all extractors, as "features-k" and "logits-k" for extractor k."""
    found = {}
    for k, extractor in enumerate(extractors):
        seen = extractor(pictures)
        found |= {f"features-{k}": seen.features} | ({} if seen.logits is None else {f"logits-{k}": seen.logits})
    return found


def open_extractor(name: str, device: str | torch.device, shape: tuple[int, int, int]) -> Extractor:
    """Open an extractor of torch-fidelity by name, or a classifier of transformers from a folder or the Hub.

    Args:
        shape: shape (C, H, W) of the pictures it will be given.

    Raises:
        ValueError: if it does not exist, cannot be downloaded, or takes pictures with another number of channels.
    """
    found = _fidelity(name, device) if name in FIDELITY else _classifier(name, device, shape)
    if found.channels != shape[0]:
        raise ValueError(
            f"the extractor {name} takes pictures with {found.channels} channels, the model makes {shape[0]}: pass as "
            f"--extractors a classifier trained on pictures with {shape[0]}"
        )
    return found


def _fidelity(name: str, device: str | torch.device) -> Extractor:
    package, layers = library(f"the extractor {name}"), list(FIDELITY[name])
    try:
        network = package.utils.create_feature_extractor(name, layers, cuda=False, verbose=False).to(device)
    except (OSError, RuntimeError) as error:  # urllib's errors are OSErrors
        raise ValueError(
            f"the weights of {name} cannot be downloaded ({error}): pass --extractors FOLDER, an image classifier of "
            "transformers, or put the file that torch-fidelity downloads, from a machine with a network, into "
            f"{torch.hub.get_dir()}/checkpoints"
        ) from error

    def call(pictures: Tensor) -> tuple[Tensor, Tensor | None]:
        found = network(pictures.to(device))
        return found[0], found[1] if len(found) > 1 else None

    with torch.no_grad():
        features, logits = call(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    preprocessing = {"library": f"torch-fidelity {package.__version__}", "layers": layers}
    fingerprint = digest([weights_digest(network), preprocessing])
    classes = None if logits is None else logits.shape[1]
    return Extractor(name, 3, features.shape[1], classes, preprocessing, fingerprint, call)


def _classifier(name: str, device: str | torch.device, shape: tuple[int, int, int]) -> Extractor:
    """Make an extractor of a classifier: its features are the inputs of its last linear layer."""
    network = _open_classifier(name).to(device)
    classes, channels = network.config.num_labels, getattr(network.config, "num_channels", 3)
    heads = [part for part in network.modules() if isinstance(part, nn.Linear) and part.out_features == classes]
    if not heads:
        raise ValueError(f"the classifier {name} ends in no linear layer of {classes} classes")
    head, taken = heads[-1], []
    head.register_forward_pre_hook(lambda layer, inputs: taken.append(inputs[0]))
    preprocessing = _preprocessing(name, network.config, shape[1:])
    mean, std = (torch.tensor(preprocessing[key], device=device).view(1, -1, 1, 1) for key in ("mean", "std"))

    def call(pictures: Tensor) -> tuple[Tensor, Tensor | None]:
        x = pictures.to(device).float() / 255
        if x.shape[2:] != tuple(preprocessing["size"]):
            x = nn.functional.interpolate(x, preprocessing["size"], mode="bilinear", antialias=True).clamp(0, 1)
        taken.clear()
        logits = network(pixel_values=(x - mean) / std).logits
        return taken[-1].flatten(1), logits

    with torch.no_grad():
        features, logits = call(torch.zeros(2, channels, *shape[1:], dtype=torch.uint8))
        again = head(features) if features.shape[1] == head.in_features else None
    if logits is None or again is None or again.shape != logits.shape or not torch.allclose(again, logits, atol=1e-4):
        raise ValueError(f"the classifier {name} does not end in a linear layer of one vector a picture")
    fingerprint = digest([weights_digest(network), type(network).__name__, preprocessing])
    return Extractor(name, channels, features.shape[1], logits.shape[1], preprocessing, fingerprint, call)


def _open_classifier(name: str) -> nn.Module:
    try:
        from transformers import AutoModelForImageClassification
    except ImportError as error:
        raise ValueError(f"the extractor {name} needs transformers ({error}): pip install transformers") from error
    known = f"an extractor is one of {', '.join(FIDELITY)}, or a folder or Hub id of an image classifier"
    if is_missing_folder(name):
        raise ValueError(f"there is no folder {name}: {known}")
    try:
        network, info = AutoModelForImageClassification.from_pretrained(name, output_loading_info=True)
    except (OSError, ValueError) as error:
        offline = f"hf download {name} --local-dir FOLDER` on a machine with a network, then --extractors FOLDER"
        remedy = known if Path(name).is_dir() else f"{known}. Without a network: `{offline}"
        raise ValueError(f"cannot open the extractor {name}: {error}\n{remedy}") from error
    missing = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if missing:
        raise ValueError(f"{name} does not hold all the weights of a classifier: {', '.join(missing[:4])} are missing")
    return network.float().eval().requires_grad_(False)


def _preprocessing(name: str, config: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Return the size, mean and deviation of a classifier's pictures, from `preprocessor_config.json` if it has one.

    Pictures are stretched to the size, bilinearly with antialiasing. Nothing is cropped.
    """
    saved, channels = _processor(name), getattr(config, "num_channels", 3)
    sides = saved.get("crop_size") if saved.get("do_center_crop") else saved.get("size")
    sides = sides or getattr(config, "image_size", None) or size
    if isinstance(sides, dict):
        edge = sides.get("shortest_edge")
        sides = (sides.get("height", edge), sides.get("width", edge))
    if isinstance(sides, int):
        sides = (sides, sides)
    found = {"range": [0, 1], "size": [int(side) for side in sides], "resize": "bilinear, antialias"}
    for key, default in (("mean", 0.0), ("std", 1.0)):
        values = saved.get(f"image_{key}") if saved.get("do_normalize", True) else None
        values = default if values is None else values
        found[key] = list(values) if isinstance(values, list | tuple) else [values]
        if len(found[key]) not in (1, channels):
            count = len(found[key])
            raise ValueError(
                f"{name} takes {channels} channels, its preprocessor_config.json has {count} values of {key}"
            )
    return found


def _processor(name: str) -> dict[str, Any]:
    """Return the content of `preprocessor_config.json`, empty if there is none."""
    if Path(name).is_dir():
        file = Path(name) / "preprocessor_config.json"
        return json.loads(file.read_text()) if file.is_file() else {}
    try:
        return json.loads(Path(huggingface_hub.hf_hub_download(name, "preprocessor_config.json")).read_text())
    except EntryNotFoundError:
        return {}
    except OSError as error:
        raise ValueError(f"cannot read the preprocessor_config.json of {name}: {error}") from error
