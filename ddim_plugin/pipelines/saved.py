"""The folder of a network as it is saved."""

import json
from pathlib import Path


def finish(folder: Path) -> None:
    """Remove the path of this machine from the config of a saved network, and give all its files one mode.

    diffusers writes the path that a network was loaded from. safetensors writes files of mode 0600, the config has the
    mode that the umask allows.
    """
    config = folder / "config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings.pop("_name_or_path", None)
    config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for file in folder.glob("*.safetensors"):
        file.chmod(config.stat().st_mode & 0o777)
