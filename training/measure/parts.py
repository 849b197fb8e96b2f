"""Work that several processes share: it is cut into parts, each saved as one file, so that a kill loses little."""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import InitProcessGroupKwargs
from guard import check_processes
from guard.writing import write_file
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save
from tqdm.auto import tqdm

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Types that a network can have, by the names used in settings."""

Arrays = dict[str, np.ndarray]
Notes = dict[str, Any]


def start_processes(device: str | None) -> PartialState:
    """Start Accelerate and return the state of its processes. One that is alone works on `device`.

    The others may wait up to two days for the main process, which computes metrics on its own.

    Raises:
        ValueError: if processes were launched that Accelerate does not connect. Each would do all the work.
    """
    patience = InitProcessGroupKwargs(timeout=timedelta(days=2))
    Accelerator(cpu=device == "cpu", kwargs_handlers=[patience])
    state = PartialState()
    check_processes(state.num_processes)
    if device is not None and state.num_processes == 1:
        state.device = torch.device(device)  # Accelerate knows no other than the first of its kind
    return state


def digest(value: Any) -> str:
    """Return the SHA-256 of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def is_missing_folder(name: str) -> bool:
    """Test whether a name can only be a folder, not a Hub id, and does not exist."""
    return (name.startswith((".", "/", "~")) or name.count("/") > 1) and not Path(name).is_dir()


def cut(count: int, size: int) -> list[range]:
    """Cut 0..count − 1 into ranges of `size` numbers. The last one may be shorter."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def join(found: Iterable[Arrays]) -> Arrays:
    """Concatenate arrays of the same names."""
    found = list(found)
    return {key: np.concatenate([each[key] for each in found]) for key in found[0]}


def save_arrays(file: Path, arrays: Arrays, notes: Notes | None = None) -> None:
    """Save arrays as safetensors, with notes as metadata."""
    metadata = {key: json.dumps(value) for key, value in (notes or {}).items()}
    write_file(file, save({key: np.ascontiguousarray(array) for key, array in arrays.items()}, metadata))


def read_arrays(file: Path) -> tuple[Arrays, Notes]:
    """Read what `save_arrays` saved. Raises ValueError if the file is damaged."""
    try:
        with safe_open(file, "np") as opened:
            notes = {key: json.loads(value) for key, value in (opened.metadata() or {}).items()}
        return load_file(file), notes
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"cannot read {file} ({error}): remove it, and start the same command again") from error


@dataclass(frozen=True)
class Parts:
    """The numbers 0..count − 1 in parts of `size`, with one file in `folder` for each part."""

    folder: Path
    count: int
    size: int

    @property
    def files(self) -> dict[Path, range]:
        """The numbers in each file."""
        return {
            self.folder / f"{part.start:07d}-{part.stop:07d}.safetensors": part for part in cut(self.count, self.size)
        }

    def make(self, compute: Callable[[range], tuple[Arrays, Notes]], label: str) -> None:
        """Save what `compute` returns for each part that has no file yet.

        The processes share the parts, and return when all of them are saved.
        """
        state = PartialState()
        self.folder.mkdir(parents=True, exist_ok=True)
        missing = [(file, part) for file, part in self.files.items() if not file.exists()]
        state.wait_for_everyone()  # all have looked before anyone writes
        mine = missing[state.process_index :: state.num_processes]
        quiet = not state.is_main_process
        for file, part in tqdm(mine, label, unit="part", leave=False, disable=quiet or None):
            save_arrays(file, *compute(part))
        state.wait_for_everyone()

    def read(self) -> tuple[Arrays, list[Notes]]:
        """Return the arrays of all parts, joined in order, and the notes of each part."""
        arrays, notes = zip(*map(read_arrays, self.files), strict=True)
        return join(arrays), list(notes)
