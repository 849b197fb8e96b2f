"""The settings of a script: one frozen dataclass whose fields become flags, with a TOML file beneath."""

import argparse
import dataclasses
import json
import os
import platform
import shlex
import subprocess
import sys
import types
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from guard.writing import write_file

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Config = TypeVar("Config")

MACHINES = ("device", "batch_size", "workers", "part", "cache", "overwrite")
"""Settings that change where and how fast a script runs, not its results."""


def parse(cls: type[Config], argv: Sequence[str] | None = None) -> Config:
    """Build `cls` from the command line.

    Flags override the file given as `--config`, which overrides the defaults. Unknown or missing keys and values of
    the wrong type end the program with a message that names them.
    """
    parser = argparse.ArgumentParser(
        description=(cls.__doc__ or "").strip(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", metavar="FILE.toml", help="settings as TOML; flags override them")
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        kind = _base_type(hints[field.name])
        if kind is dict:
            continue  # tables are set in the file only
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": field.metadata.get("help", "")}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(kind) is tuple:
            options |= {"nargs": "+", "type": get_args(kind)[0]}
        else:
            options["type"] = kind
        parser.add_argument("--" + field.name, **options)
    flags = vars(parser.parse_args(argv))
    path = flags.pop("config", None)
    try:
        return build(cls, (read_toml(path) if path else {}) | flags)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML file. Raises ValueError, with the file's name, if it is not TOML."""
    with open(path, "rb") as file:
        try:
            return tomllib.load(file)
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{path} is not valid TOML: {error}") from error


def build(cls: type[Config], values: dict[str, Any]) -> Config:
    """Build `cls(**values)`, with tuples for lists. Raises ValueError for unknown, missing or mistyped keys."""
    hints = get_type_hints(cls)
    unknown = sorted(values.keys() - hints.keys())
    if unknown:
        raise ValueError(f"unknown settings: {', '.join(unknown)}. Known: {', '.join(hints)}")
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    for key, value in given.items():
        kind = _base_type(hints[key])
        if value is None and kind is not hints[key]:
            continue
        kind = get_origin(kind) or kind
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            given[key] = float(value)
        elif not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ValueError(f"{key} must be of type {kind.__name__}, not {value!r}")
    missing = [
        f.name
        for f in dataclasses.fields(cls)  # type: ignore[arg-type]
        if f.name not in given and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"missing settings: {', '.join(missing)}")
    return cls(**given)


def _base_type(hint: Any) -> Any:
    """Return T of an optional `T | None`, else the hint itself."""
    if get_origin(hint) is types.UnionType:
        return next(kind for kind in get_args(hint) if kind is not type(None))
    return hint


def record(config: Any) -> dict[str, Any]:
    """Describe a run for its result: settings, revision of the code, versions, and the kind of machine."""
    return {
        "config": dataclasses.asdict(config),
        "revision": revision(),
        "machine": {"system": platform.system(), "processor": platform.machine(), "cpus": os.cpu_count()},
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("ddim-plugin", "torch", "diffusers", "accelerate")},
    }


def command(config: Any, free: tuple[str, ...] = MACHINES) -> str:
    """Return the command line that runs a script with these settings.

    It has a flag for each setting that differs from its default, except for those in `free`.
    """
    script = Path(sys.modules[type(config).__module__].__file__ or "")
    root = Path(__file__).resolve().parents[2]
    words = ["python", str(script.resolve().relative_to(root))]
    for each in dataclasses.fields(config):
        value = getattr(config, each.name)
        if each.name in free or value == each.default or value in (None, {}, ()):
            continue
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{each.name}")
        else:
            words += [f"--{each.name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return shlex.join(words)


def revision() -> str | None:
    """Return the commit of this checkout, with "+changes" if files differ from it; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if dirty.stdout.strip() else "")


def write_json(path: str | Path, result: dict[str, Any]) -> None:
    """Write `result` as JSON, completely or not at all."""
    write_file(path, json.dumps(result, indent=2) + "\n")
