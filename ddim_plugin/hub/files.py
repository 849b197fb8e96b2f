"""Move files into place."""

from pathlib import Path


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
