"""Names of data sets: where they come from, and which splits they have."""

import glob
from pathlib import Path
from typing import Any

import datasets
from guard.names import check_address
from guard.reading import read_object

from .folders import FORMATS, scan, split_named, splits

DECLARED = ("README.md", ".huggingface.yaml")
"""Files that may declare configurations, as those of a data set on the Hub do."""


def origin(name: str) -> str:
    """Return where a data set comes from: "digits" (scikit-learn), "files" or "hub"."""
    if name == "digits":
        return name
    return "files" if Path(name).exists() or glob.has_magic(name) else "hub"


def as_dataset(name: str, split: str, config: str | None = None) -> dict[str, str]:
    """Describe a data set as the entries of `results.json` do."""
    known = {"name": Path(name).name, "split": split} | ({"config": config} if config else {})
    return known | ({"id": name} if origin(name) == "hub" else {})


def split_names(name: str, config: str | None = None) -> tuple[str, ...]:
    """Return the splits of a data set. One that is not divided has the split "train" alone."""
    path = Path(name)
    if is_loaded(name):
        return tuple(map(str, loaded(name, lambda: datasets.get_dataset_split_names(address(name), config), config)))
    if config is not None:
        raise ValueError(f"{name} has no configurations: leave out data_config={config!r}")
    if name == "digits":
        return ("train", "test")
    if (path / "dataset_dict.json").is_file():
        return tuple(read_object(path / "dataset_dict.json")["splits"])
    return tuple(splits(scan(path))) if path.is_dir() and not is_saved(path) else ("train",)


def choose_split(name: str, split: str | None, config: str | None = None) -> str:
    """Return the split that a name such as val means; None means test, validation or train, the first that exists.

    Raises ValueError for a split that does not exist.
    """
    if split is not None and origin(name) == "hub" and is_loaded(name):
        return split  # also parts such as train[:1000], which `datasets` checks
    known = split_names(name, config)
    wanted = next(each for each in ("test", "validation", *known) if each in known) if split is None else split
    for found in (wanted, split_named(wanted)):
        if found in known:
            return found
    raise ValueError(f"{name} has no split {split!r}: it has {', '.join(known)}")


def is_loaded(name: str) -> bool:
    """Return whether `datasets` finds the files: those of the Hub, or of a folder that declares configurations."""
    path = Path(name)
    if path.is_dir():
        return any(_declares(path / each) for each in DECLARED) and not is_saved(path)
    return name != "digits" and not row_files(name)


def address(name: str) -> str:
    """Return the name that `datasets` takes: the whole path of a folder, so that it is no id of the Hub."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def loaded(name: str, load: Any, config: str | None) -> Any:
    """Return load(). Raises ValueError, with a remedy if a configuration is missing."""
    try:
        return load()
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        hint = " (name it by --data_config)" if config is None and "config" in str(error).lower() else ""
        raise ValueError(f"cannot read the data set {name}: {error}{hint}") from error


def _declares(file: Path) -> bool:
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    head = text.split("\n---", 1)[0] if file.suffix == ".md" and text.startswith("---") else text
    return "configs:" in head.splitlines() and (file.suffix != ".md" or text.startswith("---"))


def is_saved(folder: Path) -> bool:
    """Return whether `save_to_disk` wrote a folder."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def row_files(name: str) -> list[Path]:
    """List the files of rows that a path or a pattern names; none if it is the id of a data set on the Hub."""
    path = Path(name)
    if not path.exists():
        check_address(name, "user/data")
    files = [path] if path.is_file() else [Path(file) for file in sorted(glob.glob(name))]
    suffixes = {file.suffix.lower() for file in files}
    if len(suffixes) > 1 or not suffixes <= FORMATS.keys():
        raise ValueError(f"{name} is no data set: use a folder of images, or {' or '.join(FORMATS)} files")
    unlike = path.suffix.lower() in FORMATS or path.is_absolute() or name.startswith(".") or glob.has_magic(name)
    if not files and unlike:
        raise ValueError(f"there is no file {name}: check the path")
    return files
