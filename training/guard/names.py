"""Names of models, data sets, folders and devices: errors for those that lead nowhere."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def named(*names: str) -> Iterator[None]:
    """Check names of models, and load them inside.

    Raises:
        ValueError: for an address, a file, or a path that leads nowhere.
        OSError: for a model that is on no disk here, nor on the Hub.
    """
    for name in names:
        check_model(name)
    try:
        yield
    except OSError as error:
        if not str(error).startswith("Cannot load model"):
            raise
        raise OSError(
            f"{' or '.join(names)} is no folder here, and was not found on the Hub, which may be out of reach: check "
            "the name, or log in if it is private"
        ) from error


def check_model(name: str) -> None:
    """Check the name of a model. Raises ValueError for an address, a file, or a path that leads nowhere."""
    check_address(name, "user/model")
    path = Path(name)
    if path.is_file():
        raise ValueError(f"{name} is a file: pass the folder of a saved pipeline, or an id on the Hub")
    local = not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) or ("/" in name and path.parent.is_dir())
    if local and not path.exists():
        raise ValueError(f"there is no folder {name}: pass the folder of a saved pipeline, or an id on the Hub")


def check_folder(name: str | None) -> None:
    """Check that a folder can be at a path, if one is named. Raises ValueError if it is empty or a file."""
    if name is None:
        return
    if not name.strip():
        raise ValueError(f"the output {name!r} names no folder: choose one, or pass . for the current folder")
    path = Path(name).absolute()
    for file in (each for each in (path, *path.parents) if each.exists() and not each.is_dir()):
        where = "is a file" if file == path else f"would be in {file}, which is a file"
        raise ValueError(f"the output {name} {where}: choose a folder")


def check_address(name: str, example: str) -> None:
    """Check that a name is no address. Raises ValueError, with its id on the Hub or with an `example` of one."""
    on_hub = r"(?:hf://|(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/+)(?:datasets/)?([\w.-]+/[\w.-]+)"
    if (address := re.match(on_hub, name)) or "://" in name:
        known = f"its id, {address[1]}" if address else f"an id such as {example}"
        raise ValueError(f"{name} is an address: pass {known}, or a folder")


def check_device(name: str | None) -> None:
    """Check that tensors can be on a device, if one is named. Raises ValueError if not."""
    if name is None:
        return
    import torch

    try:
        torch.zeros(1, device=name).cpu()
    except Exception as error:  # each backend raises its own kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"the device {name!r} is not available: {reason}. Pass --device cpu, or leave it out"
        ) from error
