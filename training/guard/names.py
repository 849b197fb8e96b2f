"""Names of models: errors for those that lead nowhere."""

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
    on_hub = r"(?:hf://|(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/+)([\w.-]+/[\w.-]+)"
    if (address := re.match(on_hub, name)) or "://" in name:
        known = f"its id, {address[1]}" if address else "an id such as user/model"
        raise ValueError(f"{name} is an address: pass {known}, or a folder")
    path = Path(name)
    if path.is_file():
        raise ValueError(f"{name} is a file: pass the folder of a saved pipeline, or an id on the Hub")
    local = not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) or ("/" in name and path.parent.is_dir())
    if local and not path.exists():
        raise ValueError(f"there is no folder {name}: pass the folder of a saved pipeline, or an id on the Hub")
