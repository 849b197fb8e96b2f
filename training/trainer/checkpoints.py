"""Checkpoints that survive a kill: written aside, flushed, listed in a manifest, then renamed."""

import dataclasses
import json
import os
import shutil
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from guard import warn
from guard.writing import replace_folder, share
from safetensors import SafetensorError

from .config import BOUND, FREE, TrainConfig
from .run import Run, read_state

MANIFEST = "manifest.json"


class NotWritten(Exception):
    """A process could not write to the disk."""


class Checkpoints:
    """The checkpoints of a run: `folder`/step-00001000 and so on, of which the last `keep` are kept.

    All processes call each method; they share the folder.
    """

    def __init__(self, folder: Path, keep: int, accelerator: Accelerator):
        self.folder, self.keep, self.accelerator = folder, keep, accelerator

    def save(self, step: int, write: Callable[[Path], None]) -> str | None:
        """Save a checkpoint with `write(folder)` in each process.

        Returns:
            None, or what went wrong (a full disk). Nothing is then left of it, and earlier checkpoints stay.
        """
        main, final = self.accelerator.is_main_process, self.folder / f"step-{step:08d}"

        def put_in_place() -> None:
            stack.close()
            if main:
                _flush(self.folder)
                self._rotate()

        try:
            with ExitStack() as stack:
                aside = together(lambda: stack.enter_context(replace_folder(final)) if main else None)
                together(lambda: write(aside))
                together(lambda: seal(aside, step) if main else None)
                together(put_in_place)
        except NotWritten as problem:
            return str(problem)
        return None

    def latest(self) -> Path | None:
        """Return the newest intact checkpoint, or None if there is no checkpoint.

        Prints a warning for each damaged one after it. Raises ValueError if all are damaged.
        """
        found = [None, None]
        if self.accelerator.is_main_process:
            for folder in self.all():
                found[1] = damage(folder)
                if found[1] is None:
                    found[0] = str(folder)
                    break
                warn(f"{folder} is damaged ({found[1]}): trying the one before")
        path, problem = broadcast_object_list(found)
        if problem is not None:
            raise ValueError(f"all checkpoints in {self.folder} are damaged: repair one, or start in another folder")
        return None if path is None else Path(path)

    def all(self) -> list[Path]:
        """List the folders of checkpoints, the newest first."""
        return sorted((each for each in self.folder.glob("step-*") if not each.suffix), reverse=True)

    def forget_after(self, step: int) -> None:
        """Rename checkpoints of later steps to "….later": they belong to another branch, or are damaged."""
        if self.accelerator.is_main_process:
            for folder in self.all():
                if int(folder.name.removeprefix("step-")) > step:
                    aside = folder.with_suffix(".later")
                    shutil.rmtree(aside, ignore_errors=True)
                    folder.rename(aside)
        self.accelerator.wait_for_everyone()

    def _rotate(self) -> None:
        """Delete old checkpoints, and what killed processes have left."""
        for old in self.all()[self.keep :]:
            old.rename(old.with_name(f".{old.name}-old"))  # a kill while deleting never leaves half a checkpoint
        for stale in self.folder.glob(".step-*"):
            shutil.rmtree(stale, ignore_errors=True)


def resume(run: Run, checkpoints: Checkpoints) -> int:
    """Load the checkpoint that the settings name; return its step, or 0 for a new run.

    Raises ValueError for a damaged checkpoint, and for settings that cannot continue it.
    """
    config, accelerator = run.config, run.accelerator
    if config.resume is None:
        return 0
    if config.resume == "latest":
        folder = checkpoints.latest()
        if folder is None:
            accelerator.print(f"note: {config.output} has no checkpoint yet: starting at step 0")
            return 0
    else:
        folder = Path(config.resume)
        problem = damage(folder)
        if problem is not None:
            raise ValueError(
                f"cannot resume from {folder}: {problem}. Pass latest, or such as OUTPUT/checkpoints/step-00005000"
            )
    state = read_state(folder)
    _compare(config, state["config"], folder, accelerator)
    step = run.read(folder, state)
    if step > config.steps:
        raise ValueError(f"{folder} is of step {step}, beyond steps={config.steps}: raise it")
    checkpoints.forget_after(step)
    accelerator.print(f"resuming after step {step} from {folder}")
    return step


def _compare(config: TrainConfig, before: dict[str, Any], folder: Path, accelerator: Accelerator) -> None:
    """Print the settings that change on resuming. Raises ValueError for those that must not, or are not known."""
    now = json.loads(json.dumps(dataclasses.asdict(config)))  # with lists for tuples, as in the file
    if unknown := sorted(before.keys() - now.keys()):
        raise ValueError(
            f"{folder} has settings that this version does not know: {', '.join(unknown)}. Upgrade ddim-plugin, or "
            "start a new run"
        )
    defaults = json.loads(json.dumps(dataclasses.asdict(TrainConfig(""))))
    bound = [key for key in now if key not in FREE]
    if missing := [key for key in bound if key not in before]:
        accelerator.print(f"note: {folder} does not have the settings {', '.join(missing)}, so it had their defaults")
    for key in bound:
        was = before.get(key, defaults[key])
        if now[key] == was:
            continue
        if key in BOUND:
            raise ValueError(
                f"cannot resume {folder} with another {key}: it was {was!r}, now {now[key]!r}. Start a new run in "
                "another folder"
            )
        accelerator.print(f"note: {key} was {was!r}, from here on {now[key]!r}")


# ---- the disk ------------------------------------------------------------------------------------------------------


def together(work: Callable[[], Any]) -> Any:
    """Run `work` in each process and return the main process's result.

    Raises NotWritten in all of them if the disk failed in any.
    """
    result, error = None, None
    try:
        result = work()
    except (OSError, RuntimeError, SafetensorError) as problem:
        if not is_disk_error(problem):
            raise
        error = f"{type(problem).__name__}: {problem}"
    ends = gather_object([(result, error)])
    error = next((error for _, error in ends if error), None)
    if error is not None:
        raise NotWritten(error)
    return ends[0][0]


def is_disk_error(problem: Exception) -> bool:
    """Whether writing failed; torch and safetensors have no exception for it, only words."""
    words = ("PytorchStreamWriter", "unexpected pos", "No space", "File too large", "I/O error")
    return isinstance(problem, OSError) or any(word in str(problem) for word in words)


def seal(folder: Path, step: int) -> None:
    """Flush every file to the disk, then write the manifest with their sizes and checksums."""
    share(folder)
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


def damage(folder: Path) -> str | None:
    """Describe what is wrong with a checkpoint; None if it is intact."""
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


def _checksum(file: Path) -> int:
    value = 0
    with open(file, "rb") as opened:
        while block := opened.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _flush(folder: Path) -> None:
    """Make renames in a folder durable, if the system can."""
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
