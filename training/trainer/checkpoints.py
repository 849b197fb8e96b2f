"""Checkpoints that a killed process cannot spoil: written aside, listed in a manifest, renamed."""

import json
import os
import shutil
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError

MANIFEST = "manifest.json"


class Checkpoints:
    """The checkpoints of a run, `folder`/step-00001000 and so on, of which the last `keep` stay.

    All processes call each method; they share the folder.
    """

    def __init__(self, folder: Path, keep: int, accelerator: Accelerator):
        self.folder, self.keep, self.accelerator = folder, keep, accelerator

    def save(self, step: int, write: Callable[[Path], None]) -> str | None:
        """Write a checkpoint with `write(folder)` in each process. Returns what went wrong, if anything did.

        Where it fails (a full disk) nothing is left of it, and the ones before stay.
        """
        accelerator = self.accelerator
        final = self.folder / f"step-{step:08d}"
        aside = final.with_suffix(".part")
        error = None
        if accelerator.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
        accelerator.wait_for_everyone()
        try:
            aside.mkdir(parents=True, exist_ok=True)
            write(aside)
        except (OSError, RuntimeError, SafetensorError) as problem:
            if not is_disk_error(problem):
                raise
            error = f"{type(problem).__name__}: {problem}"
        error = next((each for each in gather_object([error]) if each), None)
        if accelerator.is_main_process:
            if error is None:
                try:
                    _seal(aside, step)
                    shutil.rmtree(final, ignore_errors=True)
                    aside.rename(final)
                    _flush(self.folder)
                    self._rotate()
                except OSError as problem:
                    error = f"{type(problem).__name__}: {problem}"
            if error is not None:
                shutil.rmtree(aside, ignore_errors=True)
        return broadcast_object_list([error])[0]

    def latest(self) -> Path | None:
        """The newest whole checkpoint, with a warning for each damaged one after it; None where there is none.

        Raises ValueError where there are some and all are damaged.
        """
        found = [None, None]
        if self.accelerator.is_main_process:
            for folder in self.all():
                found[1] = damage(folder)
                if found[1] is None:
                    found[0] = str(folder)
                    break
                print(f"warning: {folder} is damaged ({found[1]}): taking the one before", file=sys.stderr)
        path, problem = broadcast_object_list(found)
        if problem is not None:
            raise ValueError(f"all checkpoints in {self.folder} are damaged: repair one, or begin in another folder")
        return None if path is None else Path(path)

    def all(self) -> list[Path]:
        """Folders of checkpoints, the newest first."""
        return sorted((each for each in self.folder.glob("step-*") if not each.suffix), reverse=True)

    def forget_after(self, step: int) -> None:
        """Set checkpoints of later steps aside, as "….later": those of a branch that is left, or damaged ones."""
        if self.accelerator.is_main_process:
            for folder in self.all():
                if int(folder.name.removeprefix("step-")) > step:
                    aside = folder.with_suffix(".later")
                    shutil.rmtree(aside, ignore_errors=True)
                    folder.rename(aside)
        self.accelerator.wait_for_everyone()

    def _rotate(self) -> None:
        for stale in self.folder.glob("step-*.part"):
            shutil.rmtree(stale, ignore_errors=True)
        for old in self.all()[self.keep :]:
            gone = old.with_suffix(".part")  # so that a kill in between never leaves half a checkpoint
            old.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)


def is_disk_error(problem: Exception) -> bool:
    """Whether writing failed: torch and safetensors say it in words."""
    words = ("PytorchStreamWriter", "unexpected pos", "No space", "File too large", "I/O error")
    return isinstance(problem, OSError) or any(word in str(problem) for word in words)


def _seal(folder: Path, step: int) -> None:
    """Write every byte through to the disk, then the list of files with their sizes and checksums."""
    files = {}
    for file in sorted(each for each in folder.rglob("*") if each.is_file()):
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
        files[str(file.relative_to(folder))] = [file.stat().st_size, _checksum(file)]
    with open(folder / MANIFEST, "w") as opened:
        json.dump({"step": step, "files": files}, opened, indent=1)
        opened.flush()
        os.fsync(opened.fileno())
    _flush(folder)


def _flush(folder: Path) -> None:
    """Make renames in a folder last, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def _checksum(file: Path) -> int:
    value = 0
    with open(file, "rb") as opened:
        while block := opened.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {MANIFEST} cannot be read: {error}"
    for name, (size, checksum) in files.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, not {size}"
        if _checksum(file) != checksum:
            return f"{name} has changed"
    return None
