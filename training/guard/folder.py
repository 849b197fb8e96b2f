"""Output folders: each has one owner at a time, which holds a lock that ends with its process."""

import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from .keeping import check_data, check_results
from .names import check_device, check_folder, named
from .processes import check_processes, is_first
from .signals import warn

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
"""Name of the file in an output folder that its owner has locked. It names the owner."""

Main = TypeVar("Main", bound=Callable[..., Any])


def output(alone: bool, whole: bool = False, results: str | None = None) -> Callable[[Main], Main]:
    """Decorate a `main(config)`: the first process owns the folder `config.output` while it runs.

    Args:
        alone: whether the script works in one process. If so, several that were launched together are refused.
        whole: whether it replaces the whole folder, see `owned`.
        results: name of the script, if it writes `results.json`.

    The function raises ValueError, before anything is read or written, if `config.output` can be no folder, if another
    process owns it, if there is no `config.device`, if the data and the folder lie in one another, if the folder
    has the `results.json` of another script, or if `config.model` or `config.init_from` is no name of a model.
    """

    def decorate(main: Main) -> Main:
        @wraps(main)
        def guarded(config: Any) -> Any:
            if alone:
                check_processes()
            for each in ("output", "save_model"):
                check_folder(getattr(config, each, None))
            check_device(getattr(config, "device", None))
            check_data(config)
            models = filter(None, (getattr(config, each, None) for each in ("model", "init_from")))
            with named(*models), owned(config.output, whole) if is_first() else nullcontext():
                if results is not None:
                    check_results(config, results)
                return main(config)

        return guarded  # type: ignore[return-value]

    return decorate


@contextmanager
def owned(folder: str | Path, whole: bool = False) -> Iterator[None]:
    """Own a folder, which is created if it is missing, and deleted at the end if it was and is still empty.

    Args:
        whole: whether the folder is replaced as a whole. It is not created then, and the lock is a file beside it.

    Raises:
        ValueError: if a live process owns it, here or on another machine that shares the disk.
    """
    if fcntl is None:
        yield
        return
    folder = Path(folder).absolute()
    lock = folder.with_name(f".{folder.name}{LOCK}") if whole else folder / LOCK
    created = [each for each in lock.parents if not each.exists()]
    handle = None
    try:
        while handle is None:
            lock.parent.mkdir(parents=True, exist_ok=True)
            handle = _take(lock, folder)
        yield
    finally:
        if handle is not None:
            with suppress(OSError):
                lock.unlink()
            os.close(handle)
        for each in created:
            with suppress(OSError):
                each.rmdir()


def _take(lock: Path, folder: Path) -> int | None:
    """Lock a file and return its handle; None if it was deleted meanwhile. Raises ValueError if another process has."""
    handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if not _lock(handle):
            raise ValueError(
                f"the output {folder} is in use by {_owner(handle)}: wait for its end, or choose another folder"
            )
        if os.fstat(handle).st_nlink == 0:
            return None
        with suppress(OSError):  # a full disk holds no name, but a lock
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps({"process": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        kept, handle = handle, -1
        return kept
    finally:
        if handle >= 0:
            os.close(handle)


def _lock(handle: int) -> bool:
    """Lock an open file, if no other process has; the system unlocks it when the process ends, however it ends."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # some network disks have no locks
        warn(f"the output cannot be locked ({error}): start no second run there")
    return True


def _owner(handle: int) -> str:
    try:
        found = json.loads(os.pread(handle, 4096, 0))
        return f"process {found['process']} on {found['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
