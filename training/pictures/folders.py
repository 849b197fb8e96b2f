"""Folders of pictures or rows: which files count, which splits and classes their paths name, and their metadata.

Keywords of splits and suffixes of pictures are those of `datasets`, and so are the rules for hidden files, links,
classes and metadata. Its loader "imagefolder" itself is not used, because it

- reads names such as `[1].png` as patterns, and searches the disk once for each file;
- does not follow linked folders, and skips files in silence;
- puts a file that two keywords match into two splits, and knows no `Train` or `TEST`;
- labels pictures at one depth only, and not those of a split with a single class;
- loses metadata beside the folders of splits.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas
from datasets.data_files import NON_WORDS_CHARS, SPLIT_KEYWORDS
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

FORMATS = {".parquet": "parquet", ".arrow": "arrow"}
"""The loader of `datasets` for each suffix of a file of rows."""

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Names of files that hold columns for the pictures beside and below them."""

SYSTEM = ("@eaDir", "$RECYCLE.BIN", "lost+found")
"""Folders of storage systems, which may hold previews or deleted pictures."""

INTEGER, FRACTION = re.compile("0|-?[1-9][0-9]{0,17}"), re.compile("-?[0-9]*[.]?[0-9]+(e[-+]?[0-9]+)?")
"""Text that is read as a number in metadata.csv: integers of 64 bits, and fractions if a column has any."""

SHARD = re.compile(r"(?P<split>\w+)-\d{5}-of-\d{5}\b.*")
"""Names of shards as the Hub writes them."""


@dataclass
class Folder:
    """The files of a folder, relative to it: pictures or rows, and those that are skipped, by their kind.

    `listed` holds the pictures that metadata files list, with their other columns; None without such files.
    """

    path: Path
    files: list[Path]
    pictures: list[Path] = field(default_factory=list)
    rows: list[Path] = field(default_factory=list)
    listed: list[tuple[Path, dict[str, Any]]] | None = None
    skipped: dict[str, list[Path]] = field(default_factory=dict)

    def skip(self, kind: str, files: Iterable[Path]) -> None:
        self.skipped.setdefault(kind, []).extend(files)

    def note(self) -> str | None:
        """Return a sentence about the files that were skipped, if there are any."""
        parts = []
        for kind, files in self.skipped.items():
            if files:
                names = ", ".join(map(str, files[:3])) + (", …" if len(files) > 3 else "")
                parts.append(f"{len(files)} {kind} ({names})")
        return f"files skipped in {self.path}: {', '.join(parts)}" if parts else None


def scan(path: Path) -> Folder:
    """Find the files of a data set in a folder. Raises ValueError if it mixes pictures and rows, or kinds of rows."""
    files, hidden = walk(path)
    suffixes = {file: file.suffix.lower() for file in files}
    pictures = [file for file in files if suffixes[file] in ImageFolder.EXTENSIONS]
    rows = [file for file in files if suffixes[file] in FORMATS and not (pictures and file.name in METADATA)]
    if rows and pictures:
        raise ValueError(
            f"{path} mixes pictures and rows, such as {pictures[0]} and {rows[0]}: keep one kind, or name the rows by "
            "a pattern"
        )
    if len({suffixes[file] for file in rows}) > 1:
        raise ValueError(f"{path} mixes {' and '.join(sorted({suffixes[file] for file in rows}))} files: keep one kind")
    found = Folder(path, files, pictures, rows)
    metadata = [] if rows else [file for file in files if file.name in METADATA]
    used = {*pictures, *rows, *metadata}
    if metadata:
        found.listed = sorted(_listed(path, files, metadata), key=lambda row: row[0].parts)
        found.pictures = list(dict.fromkeys(file for file, _ in found.listed))
        used |= {*found.pictures}
        found.skip("in no metadata file", sorted({*pictures} - {*found.pictures}))
    found.skip("hidden or linked to nothing", hidden)
    found.skip("of other kinds", [file for file in files if file not in used])
    return found


def walk(path: Path) -> tuple[list[Path], list[Path]]:
    """Return the files at any depth in the order of their paths, and what is hidden or leads nowhere.

    Links are followed, but not to a folder around them.
    """
    files: list[Path] = []
    left: list[Path] = []

    def visit(at: Path, around: tuple[str, ...]) -> None:
        for entry in sorted(os.scandir(path / at), key=lambda entry: entry.name):
            inside = at / entry.name
            special = entry.name in SYSTEM or entry.name.startswith("__")
            if entry.name.startswith(".") or (special and entry.is_dir()):
                left.append(inside)
            elif entry.is_dir():
                real = os.path.realpath(entry.path)
                if real in around:
                    left.append(inside)
                else:
                    visit(inside, (*around, real))
            else:
                (files if entry.is_file() else left).append(inside)

    visit(Path(), (os.path.realpath(path),))
    return files, left


# ---- splits --------------------------------------------------------------------------------------------------------


@lru_cache(1000)
def split_named(part: str) -> str | None:
    """Return the split that a folder or file names as `datasets` has it, such as validation for my-val_2; or None."""
    for split, keywords in SPLIT_KEYWORDS.items():
        for word in keywords:
            if re.fullmatch(f"(.*[{NON_WORDS_CHARS}])?{word}([{NON_WORDS_CHARS}].*)?", part, re.IGNORECASE):
                return str(split)
    return None


def splits(folder: Folder) -> dict[str, list[Path]]:
    """Return the files of each split, which is "train" if no path names one. Files of no split count as skipped."""
    if folder.rows:
        named = {file: _split_of_rows(file) for file in folder.rows}
    else:
        named = {file: _split_folder(file)[0] for file in folder.pictures}
        if _is_class(folder.pictures):
            named = dict.fromkeys(folder.pictures)
        if not any(named.values()) and all(split_named(file.name) for file in named):  # "1.png" names no split
            names = {file: split_named(file.name) for file in named}
            named = names if len(set(names.values())) > 1 else named
    if not any(map(split_named, filter(None, set(named.values())))) and len(set(named.values())) <= 1:
        return {"train": list(named)}
    found: dict[str, list[Path]] = {}
    for file, split in named.items():
        if split is not None:
            found.setdefault(split, []).append(file)
    folder.skip(f"outside the splits {', '.join(sorted(found))}", [file for file in named if not named[file]])
    known = [split for split in map(str, SPLIT_KEYWORDS) if split in found]
    return {split: found[split] for split in (*known, *sorted(found.keys() - set(known)))}


def _split_of_rows(file: Path) -> str | None:
    shard = SHARD.fullmatch(file.name)
    return next(filter(None, map(split_named, file.parts)), shard and shard["split"])


def _split_folder(file: Path) -> tuple[str | None, int]:
    """Return the split that the first folder on the way to a file names, and its place on that way."""
    for place, part in enumerate(file.parts[:-1]):
        if split := split_named(part):
            return split, place
    return None, -1


def _is_class(pictures: list[Path]) -> bool:
    """Test whether the only folder that names a split is a class among others, as the trains beside cars and buses."""
    found = {(file.parts[: place + 1]) for file in pictures for split, place in [_split_folder(file)] if split}
    if len(found) != 1:
        return False
    [folder] = found
    depth, beside = len(folder), {file.parts[:-1] for file in pictures}
    return all(len(parts) == depth and parts[:-1] == folder[:-1] for parts in beside) and len(beside) > 2


# ---- classes -------------------------------------------------------------------------------------------------------


def classes(folder: Folder, files: Sequence[Path]) -> list[str]:
    """Return the class of each picture of a split: the folder it is in, or the first folder that differs.

    The second holds for pictures at several depths, or in folders of one name, such as `images`. Raises ValueError for
    a picture without a class.
    """
    ways, whole = [], _is_class(folder.pictures)
    for file in files:
        place = -1 if whole else _split_folder(file)[1]
        ways.append(tuple(part for k, part in enumerate(file.parts[:-1]) if k != place))
    same_depth, last = len(set(map(len, ways))) == 1, {way[-1:] for way in ways}
    pairs = list(zip(min(ways), max(ways), strict=False))
    start = next((k for k, (one, other) in enumerate(pairs) if one != other), len(pairs))
    if same_depth and (len(last) > 1 or len(set(ways)) == 1):
        start = len(ways[0]) - 1
    for file, way in zip(files, ways, strict=True):
        if not 0 <= start < len(way):
            raise ValueError(
                f"{folder.path / file} has no label: for class-conditional training a folder holds one subfolder for "
                "each class, or a metadata file with labels"
            )
    return [way[start] for way in ways]


# ---- metadata ------------------------------------------------------------------------------------------------------


def columns(folder: Folder, files: list[Path], labelled: bool) -> dict[str, list[Any]]:
    """Return the columns of the pictures of a split: image, and the label or the columns of metadata files."""
    if folder.listed is None:
        found: dict[str, list[Any]] = {"image": _paths(folder, files)}
        return found | ({"label": classes(folder, files)} if labelled else {})
    chosen = set(files)
    rows = [(file, values) for file, values in folder.listed if file in chosen]
    found = {"image": _paths(folder, [file for file, _ in rows])}
    names = dict.fromkeys(name for _, values in folder.listed for name in values if name != "image") if labelled else ()
    return found | {name: _column([values.get(name) for _, values in rows]) for name in names}


def _column(values: list[Any]) -> list[Any]:
    """Return a column as text if it holds integers of more than 64 bits, which Arrow does not have."""
    if any(isinstance(value, int) and not -(2**63) <= value < 2**63 for value in values):
        return [None if value is None else str(value) for value in values]
    return values


def _paths(folder: Folder, files: list[Path]) -> list[str]:
    """Return the paths of files. Raises ValueError for one that is not UTF-8, as Arrow holds no such text."""
    found = [str(folder.path / file) for file in files]
    for path in found:
        try:
            path.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the path {path!r} is not UTF-8: rename it") from error
    return found


def _listed(path: Path, files: list[Path], metadata: list[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """Return the pictures that metadata files list, with their other columns."""
    twice = [at for at, count in Counter(file.parent for file in metadata).items() if count > 1]
    if twice:
        raise ValueError(f"{path / twice[0]} has several metadata files: keep one of them")
    known, found, tables = set(files), [], {file: _read(path / file) for file in metadata}
    for file, table in tables.items():
        for row in table:
            key = "file_name" if "file_name" in row else next((name for name in row if name.endswith("_file_name")), "")
            if not isinstance(row.get(key), str):
                raise ValueError(f"{path / file} must name a picture as file_name in each row: one has {row}")
            target = Path(os.path.normpath(file.parent / row.pop(key)))
            if target not in known:
                raise ValueError(f"{path / file} lists {target}, which {path} does not hold, or which is hidden")
            found.append((target, row))
    _as_numbers([row for file, table in tables.items() if file.suffix == ".csv" for row in table])
    return found


def _read(file: Path) -> list[dict[str, Any]]:
    """Read the rows of a metadata file; missing values are None, and values that are no scalars become text."""
    try:
        if file.suffix == ".jsonl":
            lines = enumerate(file.read_text(encoding="utf-8").split("\n"), 1)  # strings may hold other ends of lines
            rows = [_object(line, number) for number, line in lines if line.strip()]
        else:
            csv = {"dtype": str, "keep_default_na": False, "na_values": [""]}  # so that "None", "NA" and "01" are names
            table = pandas.read_csv(file, **csv) if file.suffix == ".csv" else pandas.read_parquet(file)
            rows = table.to_dict("records")
    except Exception as error:  # pandas and Arrow raise many kinds
        raise ValueError(f"cannot read {file}: {error}") from error
    return [{str(key): _scalar(value) for key, value in row.items()} for row in rows]


def _object(line: str, number: int) -> dict[str, Any]:
    """Read a row of JSON. Raises ValueError, with its number, if it is no object."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"row {number} is no JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f'row {number} is {line.strip()[:40]}, no object such as {{"file_name": "0.png", "label": 1}}')
    return row


def _as_numbers(rows: list[dict[str, Any]]) -> None:
    """Make numbers of the columns of text that hold nothing else: integers written in one way, or fractions.

    Others stay text, so that 01 and 1 are two classes, and classes with numbers for names have the order of these.
    """
    for name in {name for row in rows for name in row}:
        texts = [row[name].strip() for row in rows if isinstance(row.get(name), str)]
        whole = all(map(INTEGER.fullmatch, texts))
        if whole or (all(map(FRACTION.fullmatch, texts)) and any("." in text for text in texts)):
            for row in rows:
                if row.get(name) is not None:
                    row[name] = (int if whole else float)(row[name])


def _scalar(value: Any) -> Any:
    if isinstance(value, float) and value != value:
        return None
    return value if value is None or isinstance(value, str | int | float) else json.dumps(value, default=str)
