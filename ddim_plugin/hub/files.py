"""Write files and folders completely, or not at all."""

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


def write_file(path: str | Path, content: str | bytes) -> None:
    """Write a file, replacing one that exists only when the new one is complete."""
    path = Path(path)
    aside = path.with_name(f"{path.name}.part")
    try:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def replace_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `path` at the end.

    The folder that is at `path` is deleted only then. If an exception is raised, it stays as it is.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as scratch:
        new = Path(scratch) / path.name
        new.mkdir()
        yield new
        put(new, path)


def put(new: Path, path: Path) -> None:
    """Move a complete file or folder to `path`. What is there is moved beside `new`, and back if that fails."""
    old = new.with_name(f"{new.name}.old")
    if path.is_dir():
        path.rename(old)
    try:
        new.replace(path)
    except BaseException:
        if old.exists():
            old.rename(path)
        raise


def read_object(path: str | Path) -> dict[str, Any]:
    """Read a JSON object. Raises ValueError for any other content."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} contains no JSON object: replace or remove it")
    return content


def weights_digest(*modules: torch.nn.Module) -> str:
    """Return the SHA-256 of the names, types, shapes and bytes of all weights."""
    found = hashlib.sha256()
    for module in modules:
        for name, value in module.state_dict().items():
            found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
