"""From pictures to features: extractors (of torch-fidelity, and classifiers of `transformers`), and references.

What takes long is cut into parts, which processes share and a kill does not lose.
"""

import glob
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from huggingface_hub.errors import EntryNotFoundError
from pictures.sources import Frame, Pictures, as_dataset, origin
from safetensors import safe_open
from safetensors.numpy import load_file, save
from torch import Tensor, nn
from trainer.settings import write_json

from ddim_plugin.hub.reading import weights_digest
from ddim_plugin.pipelines.images import MODES
from measure.metrics import Features, Gaussian, fit, gaussian, library

FIDELITY = {"inception-v3-compat": ("2048", "logits_unbiased")} | {
    f"dinov2-vit-{size}-14": ("dinov2", None) for size in "sblg"
}
"""Extractors of torch-fidelity: the names of their features and logits. The first is that of the FID."""

INCEPTION = next(iter(FIDELITY))

CHUNK = 1000
"""Pictures of a reference between saves, and under one checksum."""


@dataclass(frozen=True)
class Extractor:
    """A network that maps uint8 pictures (B, C, H, W) to (features (B, D), logits (B, K) or None)."""

    name: str
    channels: int
    dimension: int
    classes: int | None
    preprocessing: dict[str, Any]
    fingerprint: str
    call: Callable[[Tensor], tuple[Tensor, Tensor | None]]

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Features:
        found = [None if each is None else each.float().cpu().numpy() for each in self.call(pictures)]
        return Features(*found)

    @property
    def slug(self) -> str:
        """The name as part of a metric's id."""
        return slug(self.name)

    def record(self) -> dict[str, Any]:
        """What is written beside results."""
        kept = ("name", "channels", "dimension", "classes", "preprocessing", "fingerprint")
        return {key: getattr(self, key) for key in kept}


def open_extractor(name: str, device: str | torch.device, shape: tuple[int, int, int]) -> Extractor:
    """The extractor of that name, of torch-fidelity, or a folder or Hub id of `transformers`, for pictures (C, H, W).

    Raises ValueError where it is not there, cannot be downloaded, or takes pictures with other channels.
    """
    made = _fidelity(name, device) if name in FIDELITY else _classifier(name, device, shape)
    if made.channels != shape[0]:
        raise ValueError(
            f"the extractor {name} takes pictures with {made.channels} channels, the model makes {shape[0]}: pass as "
            f"--extractors a classifier trained on pictures with {shape[0]}"
        )
    return made


def slug(name: str) -> str:
    """The name of an extractor as part of a metric's id."""
    return re.sub(r"[^A-Za-z0-9]+", "-", Path(name).name).strip("-").lower()


def digest(value: Any) -> str:
    """SHA-256 of a value of JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


# ---- torch-fidelity ------------------------------------------------------------------------------------------------


def _fidelity(name: str, device: str | torch.device) -> Extractor:
    package = library(f"the extractor {name}")
    layers = [layer for layer in FIDELITY[name] if layer is not None]
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


# ---- transformers --------------------------------------------------------------------------------------------------


def _classifier(name: str, device: str | torch.device, shape: tuple[int, int, int]) -> Extractor:
    """An image classifier: its features are what its last linear layer takes, its logits what that makes."""
    network = _open_classifier(name).to(device)
    config = network.config
    heads = [
        part for part in network.modules() if isinstance(part, nn.Linear) and part.out_features == config.num_labels
    ]
    if not heads:
        raise ValueError(f"the classifier {name} ends in no linear layer of {config.num_labels} classes")
    taken: list[Tensor] = []
    heads[-1].register_forward_pre_hook(lambda layer, inputs: taken.append(inputs[0]))
    channels = getattr(config, "num_channels", 3)
    preprocessing = _preprocessing(name, config, shape[1:])
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
        again = heads[-1](features) if features.shape[1] == heads[-1].in_features else None
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
    if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ValueError(f"there is no folder {name}: {known}")
    try:
        network, info = AutoModelForImageClassification.from_pretrained(name, output_loading_info=True)
    except (OSError, ValueError) as error:
        remedy = known
        if not Path(name).is_dir():
            remedy += f". Without a network: `hf download {name} --local-dir FOLDER` where there is one, then "
            remedy += "--extractors FOLDER"
        raise ValueError(f"cannot open the extractor {name}: {error}\n{remedy}") from error
    if info["missing_keys"] or info["mismatched_keys"]:
        wrong = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        raise ValueError(f"{name} does not hold all the weights of a classifier: {', '.join(wrong[:4])} are not in it")
    return network.float().eval().requires_grad_(False)


def _preprocessing(name: str, config: Any, size: tuple[int, int]) -> dict[str, Any]:
    """The size, mean and deviation that a classifier's pictures have, by `preprocessor_config.json` where there is one.

    Pictures are stretched to the size, bilinearly with antialiasing; nothing is cropped.
    """
    said = _processor(name)
    sides = said.get("crop_size") if said.get("do_center_crop") else said.get("size")
    sides = sides or getattr(config, "image_size", None) or size
    if isinstance(sides, dict):
        edge = sides.get("shortest_edge")
        sides = (sides.get("height", edge), sides.get("width", edge))
    if isinstance(sides, int):
        sides = (sides, sides)
    channels = getattr(config, "num_channels", 3)
    normal = said.get("do_normalize", True)
    statistics = {"mean": said.get("image_mean") if normal else None, "std": said.get("image_std") if normal else None}
    for key, plain in (("mean", 0.0), ("std", 1.0)):
        values = statistics[key] if statistics[key] is not None else plain
        values = list(values) if isinstance(values, list | tuple) else [values]
        if len(values) not in (1, channels):
            raise ValueError(f"{name} takes {channels} channels, its preprocessor_config.json has {len(values)} means")
        statistics[key] = values
    return {"range": [0, 1], "size": [int(side) for side in sides], "resize": "bilinear, antialias"} | statistics


def _processor(name: str) -> dict[str, Any]:
    """What `preprocessor_config.json` says; nothing where there is none."""
    if Path(name).is_dir():
        file = Path(name) / "preprocessor_config.json"
        return json.loads(file.read_text()) if file.is_file() else {}
    try:
        return json.loads(Path(huggingface_hub.hf_hub_download(name, "preprocessor_config.json")).read_text())
    except EntryNotFoundError:
        return {}
    except OSError as error:
        raise ValueError(f"cannot read the preprocessor_config.json of {name}: {error}") from error


# ---- parts ---------------------------------------------------------------------------------------------------------


def work(folder: Path, count: int, size: int, make: Callable[[range], tuple[dict, dict]], what: str) -> None:
    """Save make(numbers) → (arrays, what to say of them) for each `size` of 0..count − 1; processes share them out.

    What is there already is not made again, whichever process made it. Returns when all processes have done.
    """
    state = PartialState()
    folder.mkdir(parents=True, exist_ok=True)
    missing = [part for part in parts(count, size) if not part_file(folder, part).exists()]
    state.wait_for_everyone()  # all have looked before anyone writes
    mine = missing[state.process_index :: state.num_processes]
    for i, part in enumerate(mine):
        arrays, said = make(part)
        save_whole(arrays, part_file(folder, part), {key: json.dumps(value) for key, value in said.items()})
        if state.is_main_process and sys.stderr.isatty():
            print(f"\r{what}: part {i + 1} of {len(mine)}", end="\n" if i + 1 == len(mine) else "", file=sys.stderr)
    state.wait_for_everyone()


def parts(count: int, size: int) -> list[range]:
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def part_file(folder: Path, part: range) -> Path:
    return folder / f"{part.start:07d}-{part.stop:07d}.safetensors"


def save_whole(arrays: dict[str, np.ndarray], file: Path, said: dict[str, str] | None = None) -> None:
    """Arrays as a file, written aside and renamed."""
    aside = file.with_name(file.name + ".part")
    aside.write_bytes(save({key: np.ascontiguousarray(array) for key, array in arrays.items()}, said))
    aside.replace(file)


def read_parts(folder: Path, count: int, size: int) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
    """The arrays of all parts in the order of their numbers, and what was said of each."""
    files = [part_file(folder, part) for part in parts(count, size)]
    said = []
    for file in files:
        with safe_open(file, "np") as opened:
            said.append({key: json.loads(value) for key, value in (opened.metadata() or {}).items()})
    return join(map(load_file, files)), said


def read_features(files: list[Path]) -> Iterator[np.ndarray]:
    """The features of one part after the other."""
    return (load_file(file)["features"] for file in files)


def join(found: Iterable[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Arrays of the same names, one after the other."""
    found = list(found)
    return {key: np.concatenate([each[key] for each in found]) for key in found[0]}


def extract(extractors: list[Extractor], pictures: Tensor) -> dict[str, np.ndarray]:
    """Features and logits of all extractors, by the number of the extractor."""
    found = {}
    for k, extractor in enumerate(extractors):
        features, logits = extractor(pictures)
        found |= {f"features-{k}": features} | ({} if logits is None else {f"logits-{k}": logits})
    return found


# ---- references ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """A split of the data set that is measured against, as uint8 pictures of the model's shape."""

    name: str
    split: str
    pictures: Pictures
    frame: Frame
    workers: int
    contents: str

    def record(self) -> dict[str, Any]:
        size = "×".join(map(str, self.frame.size))
        return as_dataset(self.name, self.split) | {
            "images": self.pictures.count,
            "sha256_of_pictures": self.contents,
            "preprocessing": f"{MODES[self.frame.channels]}, cropped at the centre to the shape of {size}, then "
            "resized to it by Lanczos",
        }


class Statistics(NamedTuple):
    """A reference as an extractor sees it: fitted by a Gaussian, and its features; None where no metric needs them."""

    gaussian: Gaussian | None
    features: Features | None


def open_reference(
    pictures: Pictures, split: str, frame: Frame, name: str, cache: Path, column: str | None, workers: int
) -> Reference:
    """A split with the SHA-256 of its pictures as extractors will see them; processes share the reading.

    It is kept in the cache by the names, sizes and times of the files it was made from; a set of the Hub is read again.
    """
    stamp = digest([stamps(name), split, column, frame.channels, frame.size, CHUNK])
    kept = cache / f"contents-{stamp[:32]}.json"
    state, files = PartialState(), origin(name) == "files"
    there = files and kept.exists()
    state.wait_for_everyone()
    if there:
        return Reference(name, split, pictures, frame, workers, json.loads(kept.read_text())["sha256"])
    mine = []
    for k, numbers in list(enumerate(parts(pictures.count, CHUNK)))[state.process_index :: state.num_processes]:
        mine.append((k, hashlib.sha256(read(pictures, frame, numbers, workers).tobytes()).hexdigest()))
    found = digest([each for _, each in sorted(gather_object(mine))])
    if state.is_main_process and files:
        cache.mkdir(parents=True, exist_ok=True)
        write_json(kept, {"reference": name, "split": split, "sha256": found})
    return Reference(name, split, pictures, frame, workers, found)


def stamps(name: str) -> list[tuple[str, int, int]]:
    """Name, size and time of change of the files of a data set."""
    path = Path(name)
    files = sorted(path.rglob("*")) if path.is_dir() else [Path(file) for file in sorted(glob.glob(name))]
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]


def read(pictures: Pictures, frame: Frame, numbers: range, workers: int) -> np.ndarray:
    """Pictures as uint8 (B, C, H, W)."""
    with ThreadPoolExecutor(workers) as pool:
        name = f"image {{}} of {pictures.name}"
        return np.stack(list(pool.map(lambda i: frame.canvas(pictures.picture(i), name.format(i)), numbers)))


def statistics(
    reference: Reference, extractor: Extractor, cache: Path, batch_size: int, fitted: bool, whole: bool
) -> Statistics:
    """A reference seen by an extractor: its Gaussian where `fitted`, its features where `whole`.

    From the cache, or computed by all processes and put there. The main process alone gets them.
    """
    key = digest([reference.contents, reference.pictures.count, extractor.fingerprint])[:32]
    file = cache / f"{key}{'-features' if whole else ''}.safetensors"
    state = PartialState()
    there = file.exists()
    state.wait_for_everyone()
    if not there:

        def make(numbers: range) -> tuple[dict, dict]:
            batches = [numbers[i : i + batch_size] for i in range(0, len(numbers), batch_size)]
            pictures = (read(reference.pictures, reference.frame, batch, reference.workers) for batch in batches)
            return {"features": np.concatenate([extractor(torch.from_numpy(x)).features for x in pictures])}, {}

        folder = cache / file.stem
        work(folder, reference.pictures.count, CHUNK, make, f"{reference.split} pictures of {reference.name}")
        if state.is_main_process:
            files = [part_file(folder, part) for part in parts(reference.pictures.count, CHUNK)]
            arrays = join(map(load_file, files)) if whole else fit(lambda: read_features(files))._asdict()
            save_whole(arrays, file)
            shutil.rmtree(folder)
        state.wait_for_everyone()
    if not state.is_main_process:
        return Statistics(None, None)
    arrays = load_file(file)
    if not whole:
        return Statistics(Gaussian(**arrays) if fitted else None, None)
    return Statistics(gaussian(arrays["features"]) if fitted else None, Features(arrays["features"]))
