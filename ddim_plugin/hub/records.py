"""Records of a model: what the scripts that trained and measured it wrote beside it.

`results.json` holds a list under "results". An entry has
    metric: its id ("fid"), and optionally name ("FID") and standard_error;
    value, and nfe: evaluations of the network for an image;
    dataset: {"name", and optionally "id" on the Hub and "split"}, which the value was measured against;
and optionally the settings of the measurement: num_inference_steps, eta, variance_type, timestep_spacing, scheduler,
images, draws (number of sets of images, whose values were averaged), seed. An entry with `"listed": false` is in the
tables of the card, and not in the metadata that the Hub lists. "pictures" names pictures beside the file, as a list or
with captions. "model" may hold the digest of the weights. `training.json` is written by the training script.
"""

import re
from dataclasses import dataclass
from numbers import Real
from pathlib import Path, PureWindowsPath
from typing import Any

from .files import read_object

README, RESULTS, TRAINING, CONVERSION = "README.md", "results.json", "training.json", "conversion.json"
GRID, LOSS = "samples.png", "loss.png"
PICTURE = re.compile(r"[\w-]+\.png")

PATH = re.compile(
    r"(?:^|(?<=[\s\"'=:]))(?!//)(?:file://[^/\s]*)?(?:~|[A-Za-z]:)?[\\/](?:[^\s\"'\\/]+[\\/])+([^\s\"'\\/,;:)]*)"
)
"""A path within a text: two parts or more, from the root or the home."""


@dataclass(frozen=True)
class Records:
    """What is known of a model, without paths of this machine.

    Args:
        results: entries of `results.json`.
        files: `results.json`, `training.json` and `conversion.json` by name, as far as they exist.
        pictures: paths of the pictures to publish, by name.
        captions: captions of those that `results.json` names.
        caption: caption of the sample grid.
        digest: of the weights that the results were measured on, if it was recorded.
    """

    results: list[dict[str, Any]]
    files: dict[str, dict[str, Any]]
    pictures: dict[str, Path]
    captions: dict[str, str]
    caption: str
    digest: str | None

    @property
    def training(self) -> dict[str, Any]:
        return self.files.get(TRAINING, {})


def read_records(folder: Path) -> Records:
    """Read the records in a folder. Raises ValueError for records that are not as the scripts write them."""
    found = {each: read_object(folder / each) for each in (RESULTS, TRAINING, CONVERSION) if (folder / each).is_file()}
    results = found.get(RESULTS, {"results": []})
    listed = listed_pictures(results.get("pictures", {}), folder / RESULTS)
    names = [GRID, LOSS, *listed]
    pictures = {name: folder / name for name in names if (folder / name).is_file()}
    previews = sorted(folder.glob("previews/*.png"))
    if GRID not in pictures and previews:
        pictures[GRID] = previews[-1]
    model = results.get("model")
    return Records(
        results=public(_checked(results, folder / RESULTS)),
        files={name: public(content) for name, content in found.items()},
        pictures=pictures,
        captions={name: public(text) for name, text in listed.items() if text and name in pictures},
        caption=_caption(folder, found.get(TRAINING, {})) if GRID in pictures else "",
        digest=model.get("sha256") if isinstance(model, dict) else None,
    )


def read_results(file: str | Path) -> list[dict[str, Any]]:
    """Read the entries of a `results.json`. Raises ValueError naming the entry that is not valid."""
    return _checked(read_object(file), file)


def _checked(content: dict[str, Any], file: str | Path) -> list[dict[str, Any]]:
    entries = content.get("results")
    if not isinstance(entries, list):
        raise ValueError(f'{file} holds no list under "results"')
    for i, entry in enumerate(entries):
        if problem := _problem(entry):
            raise ValueError(f"{file}: entry {i} of results {problem}")
    return entries


def _problem(entry: Any) -> str | None:
    if not isinstance(entry, dict):
        return f"is no object: {entry!r}"
    for key in ("metric", "value", "nfe", "dataset"):
        if key not in entry:
            return f"has no {key}"
    if not isinstance(entry["metric"], str) or not entry["metric"]:
        return f"has the metric {entry['metric']!r}: give its id, such as fid"
    for key in ("value", "nfe", "standard_error"):
        value = entry.get(key)
        if not (key == "standard_error" and value is None) and not is_finite(value):
            return f"has {key}={value!r}: it must be a finite number"
    if entry["nfe"] <= 0:
        return f"has nfe={entry['nfe']!r}: it must be positive"
    dataset = entry["dataset"]
    texts = isinstance(dataset, dict) and all(isinstance(dataset.get(key, ""), str) for key in ("name", "id", "split"))
    if not texts or not dataset.get("name"):
        return f"has the dataset {dataset!r}: give at least its name; name, id and split are texts"
    return None


def is_finite(value: Any) -> bool:
    """Test for a number that JSON and tables can hold."""
    return isinstance(value, Real) and not isinstance(value, bool) and abs(value) < 1e300


def listed_pictures(listed: Any, file: Path) -> dict[str, str]:
    """Return the pictures that `results.json` names, with their captions. Raises ValueError."""
    named = {str(name): "" for name in listed} if isinstance(listed, list) else listed
    if not isinstance(named, dict) or not all(
        isinstance(text, str) and PICTURE.fullmatch(name) for name, text in named.items()
    ):
        raise ValueError(
            f'{file} must list names such as figure4.png under "pictures", or captions by name: {listed!r}'
        )
    return named


def _caption(folder: Path, training: dict[str, Any]) -> str:
    """Return how the sample grid was made: by the command line, or as a preview of the training."""
    if not (folder / GRID).is_file():
        return f"Samples at S = {(training.get('config') or {}).get('preview_steps')}, η = 0."
    settings = read_object(folder / "sample.json").get("settings", {}) if (folder / "sample.json").is_file() else {}
    known = {"S": settings.get("steps"), "η": settings.get("eta"), "the first seed": settings.get("seed")}
    return ", ".join(["Samples", *(f"{name} = {value}" for name, value in known.items() if value is not None)]) + "."


def public(value: Any) -> Any:
    """Return a record with each path of this machine cut to its last part."""
    if isinstance(value, dict):
        return {public(key): public(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [public(each) for each in value]
    if not isinstance(value, str):
        return value
    if Path(value).is_absolute() or value.startswith(("~/", "../", "./")):
        return Path(value).name
    if PureWindowsPath(value).is_absolute():
        return PureWindowsPath(value).name
    return PATH.sub(r"\1", value)
