"""Names of models, checked before anything asks the Hub for them."""

import re
from pathlib import Path


def check_model(name: str) -> None:
    """Check the name of a model. Raises ValueError for an address, a file, or a path that leads nowhere."""
    if address := re.match(r"(?:https?|hf)://(?:[^/]*huggingface\.co/|[^/]*hf\.co/|[^/]*/)?([^?#]*)", name):
        words = address[1].strip("/").split("/")
        known = f"its id, {'/'.join(words[:2])}" if len(words) > 1 else "an id, user/model"
        raise ValueError(f"{name} is an address: pass {known}, or a folder")
    path = Path(name).expanduser()
    if path.is_file():
        raise ValueError(f"{name} is a file: pass the folder of a saved pipeline, or an id on the Hub")
    local = name.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)
    if not path.exists() and (local or ("/" in name and path.parent.is_dir())):
        raise ValueError(f"there is no folder {name}: pass the folder of a saved pipeline, or an id on the Hub")
