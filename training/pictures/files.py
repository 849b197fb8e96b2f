"""Names of data sets: which files they mean, and which splits these have."""

import glob
import re
from pathlib import Path

from ddim_plugin.pipelines.images import SUFFIXES

FORMATS = {".parquet": "parquet", ".arrow": "arrow"}
"""The loader of `datasets` for each suffix of a file of rows."""

SPLITS = ("train", "test", "validation", "val", "dev", "eval")
"""Words in the path of a file that name its split."""


def origin(name: str) -> str:
    """Return where a data set comes from: "digits" (scikit-learn), "files" or "hub"."""
    if name == "digits":
        return name
    return "files" if Path(name).exists() or glob.has_magic(name) else "hub"


def as_dataset(name: str, split: str) -> dict[str, str]:
    """Describe a data set as the entries of `results.json` do."""
    return {"name": Path(name).name, "split": split} | ({"id": name} if origin(name) == "hub" else {})


def has_splits(name: str) -> bool:
    """Return whether a data set separates pictures for training from others."""
    path = Path(name)
    if path.is_dir():
        named = any(_words(file, path) & set(SPLITS) for file in folder_files(path)[1])
        return (path / "dataset_dict.json").is_file() or (named and not (path / "state.json").is_file())
    return not (path.is_file() or glob.has_magic(name))


def is_saved(folder: Path) -> bool:
    """Return whether `save_to_disk` wrote a folder."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def folder_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Find (image files, files of rows) in a folder at any depth, sorted. At most one of the lists has entries.

    Images come before parquet files, and these before arrow files.
    """
    files = sorted(
        file for file in folder.rglob("*") if file.suffix.lower() in (*SUFFIXES, *FORMATS) and file.is_file()
    )
    if images := [file for file in files if file.suffix.lower() in SUFFIXES]:
        return images, []
    for suffix in FORMATS:
        if found := [file for file in files if file.suffix == suffix]:
            return [], found
    return [], []


def split_files(folder: Path, files: list[Path], split: str) -> list[Path]:
    """Choose the files of a split by the words in their paths; all files if no path names a split."""
    if not has_splits(str(folder)):
        return files
    found = [file for file in files if split.lower() in _words(file, folder)]
    if not found:
        names = ", ".join(str(file.relative_to(folder)) for file in files)
        raise ValueError(f"{folder} has no split {split!r}: its files are {names}")
    return found


def row_files(name: str) -> list[Path]:
    """List the files of rows that a path or a pattern names; none if it is the id of a data set on the Hub."""
    path = Path(name)
    files = [path] if path.is_file() else [Path(file) for file in sorted(glob.glob(name))]
    suffixes = {file.suffix for file in files}
    if len(suffixes) > 1 or not suffixes <= FORMATS.keys():
        raise ValueError(f"{name} is no data set: use a folder of images, or {' or '.join(FORMATS)} files")
    if not files and (path.suffix in FORMATS or path.is_absolute() or name.startswith(".") or glob.has_magic(name)):
        raise ValueError(f"there is no file {name}: check the path")
    return files


def _words(file: Path, folder: Path) -> set[str]:
    return set(re.split(r"[^a-z0-9]+", str(file.relative_to(folder)).lower()))
