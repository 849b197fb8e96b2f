"""Write files and folders completely, or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_file(path: str | Path, content: str | bytes) -> None:
    """Write a file, replacing one that exists only when the new one is complete."""
    path = Path(path)
    aside = path.with_name(f"{path.name}.part")
    try:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)
        aside.replace(path)
    except OSError as error:
        if error.errno:
            error.filename = error.filename or str(path)  # a disk that fills up while writing names no file
        raise
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
        share(new)
        put(new, path)


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


def share(folder: Path) -> None:
    """Give files that safetensors wrote, as readable by their owner only, the mode of other new files."""
    mask = os.umask(0)
    os.umask(mask)
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o666 & ~mask)
