"""References: the splits of a data set that pictures are measured against, as extractors see them."""

import glob
import hashlib
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from guard.reading import read_object
from pictures import Frame, Pictures, as_dataset, origin
from pictures.folders import walk
from trainer.settings import write_json

from ddim_plugin.pipelines.images import MODES

from .extractors import Extractor
from .metrics import Features, Gaussian, Statistics, fit, gaussian
from .parts import Arrays, Notes, Parts, cut, digest, read_arrays, save_arrays

CHUNK = 1000
"""Pictures in a saved part of a reference, and under one checksum."""


@dataclass(frozen=True)
class Reference:
    """A split of a data set, as uint8 pictures of the model's shape. `contents` is the SHA-256 of them all."""

    pictures: Pictures
    frame: Frame
    workers: int
    contents: str
    config: str | None

    def read(self, numbers: range) -> np.ndarray:
        """Read pictures as uint8 (B, C, H, W)."""
        return read(self.pictures, self.frame, numbers, self.workers)

    def dataset(self) -> dict[str, str]:
        """Describe the split as the entries of `results.json` do."""
        return as_dataset(self.pictures.name, self.pictures.split, self.config)

    def record(self) -> dict[str, Any]:
        """Return the entry of `results.json` that describes this reference."""
        size = "×".join(map(str, self.frame.size))
        return self.dataset() | {
            "images": self.pictures.count,
            "sha256_of_pictures": self.contents,
            "preprocessing": f"{MODES[self.frame.channels]}, cropped at the centre to the shape of {size}, then "
            "resized to it by Lanczos",
        }


def open_reference(pictures: Pictures, frame: Frame, cache: Path, reading: dict[str, Any], workers: int) -> Reference:
    """Open a split of a data set and compute the SHA-256 of its pictures.

    The processes share the reading. The cache keeps the SHA-256 by the names, sizes and times of the files of the
    data set, and by the settings `reading` of `open_pictures`. A data set of the Hub is read each time.
    """
    name, split, config = pictures.name, pictures.split, reading["data_config"]
    stamp = digest([stamps(name), split, *reading.values(), frame.channels, frame.size, CHUNK])
    kept = cache / f"contents-{stamp[:32]}.json"
    state, files = PartialState(), origin(name) == "files"
    cached = read_object(kept).get("sha256") if files and kept.exists() else None
    state.wait_for_everyone()  # all have looked before anyone writes
    if cached is not None:
        return Reference(pictures, frame, workers, cached, config)
    mine = []
    for k, numbers in list(enumerate(cut(pictures.count, CHUNK)))[state.process_index :: state.num_processes]:
        mine.append((k, hashlib.sha256(read(pictures, frame, numbers, workers).tobytes()).hexdigest()))
    contents = digest([each for _, each in sorted(gather_object(mine))])
    if state.is_main_process and files:
        cache.mkdir(parents=True, exist_ok=True)
        write_json(kept, {"reference": name, "split": split, "sha256": contents})
    return Reference(pictures, frame, workers, contents, config)


def stamps(name: str) -> list[tuple[str, int, int]]:
    """Return the name, size and time of change of each file of a data set."""
    path = Path(name)
    files = [path / file for file in walk(path)[0]] if path.is_dir() else map(Path, sorted(glob.glob(name)))
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]


def read(pictures: Pictures, frame: Frame, numbers: range, workers: int) -> np.ndarray:
    """Read pictures as uint8 (B, C, H, W), in several threads."""
    with ThreadPoolExecutor(workers) as pool:
        return np.stack(list(pool.map(partial(frame.read, pictures), numbers)))


def statistics(
    reference: Reference, extractor: Extractor, cache: Path, batch_size: int, fitted: bool, whole: bool
) -> Statistics:
    """Return the Gaussian of a reference if `fitted`, and its features if `whole`.

    They come from the cache, or all processes compute them for it. Only the main process receives them.
    """
    key = digest([reference.contents, reference.pictures.count, extractor.fingerprint])[:32]
    file = cache / f"{key}{'-features' if whole else ''}.safetensors"
    state = PartialState()
    cached = file.exists()
    state.wait_for_everyone()  # all have looked before anyone writes
    if not cached:
        _extract(reference, extractor, file, batch_size, whole)
    if not state.is_main_process:
        return Statistics(None, None)
    arrays = read_arrays(file)[0]
    if not whole:
        return Statistics(Gaussian(**arrays) if fitted else None, None)
    return Statistics(gaussian(arrays["features"]) if fitted else None, Features(arrays["features"]))


def _extract(reference: Reference, extractor: Extractor, file: Path, batch_size: int, whole: bool) -> None:
    """Save the features of a reference if `whole`, else the Gaussian fitted to them."""

    def compute(numbers: range) -> tuple[Arrays, Notes]:
        batches = [numbers[i : i + batch_size] for i in range(0, len(numbers), batch_size)]
        seen = [extractor(torch.from_numpy(reference.read(batch))).features for batch in batches]
        return {"features": np.concatenate(seen)}, {}

    def blocks() -> Iterator[np.ndarray]:
        return (read_arrays(part)[0]["features"] for part in parts.files)

    parts = Parts(file.with_suffix(""), reference.pictures.count, CHUNK)
    parts.make(compute, f"{reference.pictures.split} pictures of {reference.pictures.name}")
    state = PartialState()
    if state.is_main_process:
        save_arrays(file, parts.read()[0] if whole else fit(blocks)._asdict())
        shutil.rmtree(parts.folder)
    state.wait_for_everyone()
