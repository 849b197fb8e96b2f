"""A folder of a pipeline as it is pushed: its files, and its card."""

import io
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Generator

from ..pipelines.generation import GeneralizedDDIMPipeline
from ..pipelines.images import grid
from ..schedulers import KEY, InverseDDIMScheduler, sampler_class
from .card import card, eval_results, is_written_here, license_of
from .code import code
from .files import read_object, weights_digest
from .records import CONVERSION, GRID, LOSS, README, RESULTS, TRAINING, Records, public, read_records

INDEX = "model_index.json"
CONFIGS = (INDEX, "unet/config.json", "scheduler/scheduler_config.json")
STEPS = 20
"""S for the images of a card."""

SAVED = re.compile(
    "|".join([*map(re.escape, (RESULTS, TRAINING, CONVERSION, GRID, LOSS)), r"\.eval_results/[^/]+\.yaml"])
)
"""Names of what is pushed of a model's records."""

WEIGHTS = re.compile(
    r"(unet/)?diffusion_pytorch_model((\.(?P<variant>[^/]+?))?(-\d{5}-of-\d{5})?\.(safetensors|bin)"
    r"|\.(safetensors|bin)\.index(\.(?P<parts>[^/]+))?\.json)"
)
"""Names of a network's weights, and of the index of those in several files."""


def variant_of(name: str) -> str | None:
    """Return the variant of a file of weights, "" for plain ones; None for other files."""
    match = WEIGHTS.fullmatch(name)
    return None if match is None else match["variant"] or match["parts"] or ""


def is_ours(index: dict[str, Any]) -> bool:
    """Test whether a `model_index.json` was saved by the pipeline of this package, in any version."""
    name = index.get(KEY, index.get("_class_name"))
    return (name[-1] if isinstance(name, list) and name else name) == GeneralizedDDIMPipeline.__name__


class Model:
    """The files to push of a folder, by their names in the repository, and what its card is written from.

    Args:
        folder: what `save_pretrained` or the training script wrote.
        records: folder of the records; the same by default.

    Raises:
        ValueError, OSError: if the folder does not load, or its records are not valid or of other weights.
    """

    def __init__(self, folder: str | Path, records: str | Path | None = None):
        folder, source = Path(folder), Path(records or folder)
        for path in (folder, source):
            if not path.is_dir():
                raise ValueError(f"there is no folder {path}")
        self.records: Records = read_records(source)
        _check_index(folder)
        self.variants, fits = variants(folder), self.records.digest is None
        for variant in self.variants[::-1]:  # the first one is kept
            self.pipe = GeneralizedDDIMPipeline.from_pretrained(str(folder), variant=variant)
            fits = fits or weights_digest(self.pipe.unet) == self.records.digest
        if not fits:
            raise ValueError(f"{source / RESULTS} was measured on other weights than those in {folder}: measure these")
        self.pipe.set_progress_bar_config(disable=True)
        self.files: dict[str, Path | bytes] = {**_weights(folder), **_configs(self.pipe)}
        self.files[f"{code().name}.py"] = code().text.encode()
        self.files |= {name: _json(content, source / name) for name, content in self.records.files.items()}
        self.files |= self.records.pictures
        self.files |= {name: text.encode() for name, text in eval_results(self.records.results).items()}
        self.has_records = bool(self.records.files or self.records.pictures)
        text = (folder / README).read_text(encoding="utf-8", errors="replace") if (folder / README).is_file() else ""
        written = is_written_here(text)
        if text and not written:  # somebody's card
            self.files[README] = folder / README
        self.license = license_of(text) if written else None
        self.card("user/model")  # raises for records that are not valid, before anything is sent

    @property
    def classes(self) -> int | None:
        """Number of classes of the training. The network may have one label more, for none of them."""
        classes = self.records.training.get("classes")
        return len(classes) if isinstance(classes, list) and classes else None

    def card(
        self, repo_id: str, license: str | None = None, revision: str | None = None, caption: str | None = None
    ) -> str:
        """Write the card. `caption` is that of a sample grid which is not in the records."""
        has_grid = caption is not None or GRID in self.records.pictures
        unet, scheduler = self.pipe.unet, self.pipe.scheduler
        try:
            return card(
                repo_id,
                dict(unet.config),
                dict(scheduler.config) | {"_class_name": type(scheduler).__name__},
                unet.num_parameters(),
                self.records.results,
                self.records.training,
                self.records.files.get(CONVERSION),
                GRID if has_grid else None,
                self.records.caption if caption is None else caption,
                self.records.captions,
                license,
                self.variants[0],
                revision,
            )
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"the records of {repo_id} are not as the scripts write them: {error!r}") from error


def _check_index(folder: Path) -> None:
    """Raise ValueError for a folder of another pipeline, or with classes that others do not have."""
    if not (folder / INDEX).is_file():
        raise OSError(f"{folder} is no pipeline: it has no {INDEX}")
    index = read_object(folder / INDEX)
    if not is_ours(index):
        raise ValueError(
            f"{folder} is a {index.get('_class_name')}: load it with GeneralizedDDIMPipeline.from_pretrained, push that"
        )
    for name, entry in GeneralizedDDIMPipeline.load_config(folder).items():
        if isinstance(entry, list) and (name not in ("unet", "scheduler") or entry[0] != "diffusers"):
            raise ValueError(f"{folder}: {INDEX} names {entry[-1]} of {entry[0]} for {name}, which others do not have")


def variants(folder: str | Path) -> list[str | None]:
    """Return the variants of the network's weights in a folder, None for the plain ones first."""
    found = sorted({variant_of(name) or "" for name in _weights(Path(folder)) if not name.endswith(".json")})
    if not found:
        raise ValueError(f"{folder} has no weights as safetensors: load it, and save_pretrained into a new folder")
    return [variant or None for variant in found]


def same_weights(folder: str | Path, other: str | Path, variant: str | None) -> bool:
    """Test whether another folder holds the same weights of a variant, in the same files."""
    names = [name for name in _weights(Path(folder)) if variant_of(name) == (variant or "")]
    pairs = [(Path(folder) / name, Path(other) / name) for name in names]
    return all(theirs.is_file() and theirs.read_bytes() == ours.read_bytes() for ours, theirs in pairs)


def _weights(folder: Path) -> dict[str, Path | bytes]:
    """Return the files of the network's weights as safetensors, with their index."""
    names = {f"unet/{path.name}": path for path in sorted((folder / "unet").glob("diffusion_pytorch_model*"))}
    return {name: path for name, path in names.items() if variant_of(name) is not None and ".bin" not in name}


def _configs(pipe: GeneralizedDDIMPipeline) -> dict[str, Path | bytes]:
    """Return the configs of a pipeline without paths of this machine."""
    with tempfile.TemporaryDirectory() as scratch:
        pipe.save_config(scratch)
        pipe.unet.save_config(Path(scratch, "unet"))
        pipe.scheduler.save_config(Path(scratch, "scheduler"))
        return {name: _json(read_object(Path(scratch, name)), name, finite=False) for name in CONFIGS}


def _json(content: dict[str, Any], name: str | Path, finite: bool = True) -> bytes:
    """Return a JSON file without paths of this machine. Raises ValueError for numbers that JSON does not have."""
    content = {key: value for key, value in content.items() if key != "_name_or_path"}
    try:
        return (json.dumps(public(content), indent=2, allow_nan=not finite) + "\n").encode()
    except ValueError as error:
        raise ValueError(f"{name} holds a number that is not finite, which JSON does not have") from error


def draw(pipe: GeneralizedDDIMPipeline, number: int, classes: int | None = None) -> tuple[bytes, str]:
    """Generate a grid of images for a card, image i from seed i, and return it as PNG, with its caption.

    With a class-conditional network image i is of class i modulo `classes`, by default as many as it has labels.
    """
    kept = pipe.scheduler
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(kept, InverseDDIMScheduler):
        pipe.scheduler = sampler_class(kept).from_config(kept.config)
    steps = min(STEPS, pipe.scheduler.config.num_train_timesteps)
    classes = classes or pipe.unet.config.num_class_embeds
    labels = [i % classes for i in range(number)] if classes else None
    generators = [Generator().manual_seed(i) for i in range(number)]
    try:
        images = pipe(number, steps, generator=generators, class_labels=labels, output_type="np").images
        eta = getattr(pipe.scheduler.config, "eta", None)
        name = f"{type(pipe.scheduler).__name__}, S = {steps}" + ("" if eta is None else f", η = {eta:g}")
    finally:
        pipe.scheduler = kept
    file = io.BytesIO()
    sheet: Image.Image = grid([images[i : i + 8] for i in range(0, number, 8)])
    sheet.save(file, format="PNG")
    return file.getvalue(), f"{name}, seeds 0 to {number - 1}."
