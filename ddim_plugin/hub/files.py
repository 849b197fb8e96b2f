"""Move files into place, and read JSON."""

import json
from pathlib import Path
from typing import Any


def put(new: Path, path: Path) -> None:
    """Move a complete file or folder to `path`. What is there is moved beside `new`, and back if that fails."""
    old = new.with_name(f"{new.name}.old")
    try:
        if path.is_dir():
            path.rename(old)
        new.replace(path)
    except BaseException:
        if old.exists() and not path.exists():
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
