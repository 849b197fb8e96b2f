"""Records that scripts wrote beside the model that they trained or measured (`model_cards/README.md`)."""

import re
from dataclasses import dataclass
from numbers import Real
from pathlib import Path, PureWindowsPath
from typing import Any

from guard.reading import read_object

from ddim_plugin.hub.push import GRID, RECORDS

RESULTS, TRAINING, CONVERSION = RECORDS
LOSS, SAMPLE = "loss.png", "sample.json"
TYPES = {"model": dict, "config": dict, "classes": list, "source": dict, "settings": dict}  # of entries in the records
PICTURE = re.compile(r"[\w-]+\.png")

PATH = re.compile(
    r"(?:^|(?<=[\s\"'=:]))(?!//)(?:file://[^/\s]*)?(?:~|[A-Za-z]:)?[\\/](?:[^\s\"'\\/]+[\\/])+([^\s\"'\\/,;:)]*)"
)
"""A path within a text: two parts or more, from the root or the home."""


@dataclass(frozen=True)
class Records:
    """Hold the records of a model, without paths of this machine."""

    results: list[dict[str, Any]]
    files: dict[str, dict[str, Any]]  # contents of the three JSON files, as far as they exist
    pictures: dict[str, Path]  # to publish, by name
    captions: dict[str, str]  # of the sample grid, and of the pictures that `results.json` names
    digest: str | None = None  # of the weights that the results were measured on, if it was recorded


def read_records(folder: Path) -> Records:
    """Read the records in a folder. Raises ValueError for records that are not as the scripts write them."""
    names = (RESULTS, TRAINING, CONVERSION, SAMPLE)
    found = {name: read_object(folder / name) for name in names if (folder / name).is_file()}
    for name, content in found.items():
        for key in content.keys() & TYPES:
            if not isinstance(content[key], TYPES[key]):
                kind = TYPES[key].__name__
                raise ValueError(f"{folder / name} has {key}={content[key]!r}: remove it, or write a {kind}")
    made, results = found.pop(SAMPLE, {}).get("settings", {}), found.get(RESULTS, {})
    listed = listed_pictures(results.get("pictures", {}), folder / RESULTS)
    pictures = {name: folder / name for name in (GRID, LOSS, *listed) if (folder / name).is_file()}
    if GRID not in pictures and (previews := sorted(folder.glob("previews/*.png"))):
        made = {"steps": found.get(TRAINING, {}).get("config", {}).get("preview_steps"), "eta": 0}
        pictures[GRID] = previews[-1]
    words = {"S": "steps", "η": "eta", "w": "guidance_scale", "the first seed": "seed"}
    words = {name: made.get(key) for name, key in words.items()}
    words = ["Samples", *(f"{name} = {value}" for name, value in words.items() if value is not None)]
    captions = {GRID: f"{', '.join(words)}."} | {name: public(text) for name, text in listed.items() if text}
    return Records(
        results=public(read_results(folder / RESULTS)) if RESULTS in found else [],
        files={name: public(content) for name, content in found.items()},
        pictures=pictures,
        captions={name: text for name, text in captions.items() if name in pictures},
        digest=results.get("model", {}).get("sha256"),
    )


def read_results(file: str | Path) -> list[dict[str, Any]]:
    """Read the entries of a `results.json`. Raises ValueError naming the entry that is not valid."""
    entries = read_object(file).get("results")
    if not isinstance(entries, list):
        raise ValueError(f'{file} has no list under "results": write one, or remove the file')
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise ValueError(f"{file}: entry {i} of results is no object: {entry!r}")
        for key, (is_valid, meaning) in ENTRY.items():
            if not is_valid(entry.get(key)):
                raise ValueError(f"{file}: entry {i} of results has {key}={entry.get(key)!r}: it must be {meaning}")
    return entries


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and abs(value) < 1e300


def _is_dataset(value: Any) -> bool:
    return isinstance(value, dict) and bool(value.get("name")) and all(isinstance(each, str) for each in value.values())


ENTRY = {
    "metric": (lambda value: isinstance(value, str) and value != "", "an id such as fid"),
    "value": (_is_number, "a finite number"),
    "nfe": (lambda value: _is_number(value) and value > 0, "a positive number"),
    "num_inference_steps": (lambda value: value is None or _is_number(value), "a number"),
    "standard_error": (lambda value: value is None or _is_number(value), "a finite number"),
    "dataset": (_is_dataset, "an object of texts, at least its name"),
}
"""What an entry must have, else the Hub would refuse the card."""


def listed_pictures(listed: Any, file: Path) -> dict[str, str]:
    """Return the pictures that `results.json` names, with their captions. Raises ValueError."""
    named = {str(name): "" for name in listed} if isinstance(listed, list) else listed
    if not isinstance(named, dict) or not all(PICTURE.fullmatch(name) for name in named):
        raise ValueError(f'{file} must list names such as figure4.png under "pictures": {listed!r}')
    return {name: str(caption or "") for name, caption in named.items()}


def public(value: Any) -> Any:
    """Return a record with each path of this machine cut to its last part."""
    if isinstance(value, dict):
        return {public(key): public(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [public(each) for each in value]
    if not isinstance(value, str):
        return value
    if any(kind(value).is_absolute() for kind in (Path, PureWindowsPath)) or value.startswith(("~/", "../", "./")):
        return PureWindowsPath(value).name
    return PATH.sub(r"\1", value)
