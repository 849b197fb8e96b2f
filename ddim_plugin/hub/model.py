"""A folder of a pipeline as it is pushed: its files, and its card."""

import json
import re
from pathlib import Path
from typing import Any

from ..pipelines.generation import GeneralizedDDIMPipeline
from .card import card
from .code import code

README, GRID = "README.md", "samples.png"
RECORDS = ("results.json", "training.json", "conversion.json")  # of the training scripts, pushed as they are
INDEX, UNET, SCHEDULER = CONFIGS = ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json")
WEIGHTS = re.compile(
    r"(unet/)?diffusion_pytorch_model((\.(?P<variant>[^/]+?))?(-\d{5}-of-\d{5})?\.(safetensors|bin)"
    r"|\.(safetensors|bin)\.index(\.(?P<parts>[^/]+))?\.json)"
)
"""Names of a network's weights, and of the index of those in several files."""


def variant_of(name: str) -> str | None:
    """Return the variant of a file of weights, "" for plain ones; None for other files."""
    match = WEIGHTS.fullmatch(name)
    return None if match is None else match["variant"] or match["parts"] or ""


class Model:
    """Collect the files to push of a folder that loads, and the data for its card."""

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        if not (folder / INDEX).is_file():
            raise OSError(f"{folder} has no {INDEX}: pass the folder of a saved pipeline")
        index = GeneralizedDDIMPipeline.load_config(folder)
        if (name := index["_saved_as"][0]) != GeneralizedDDIMPipeline.__name__:
            raise ValueError(f"{folder} is a {name}: load it with GeneralizedDDIMPipeline, push that")
        for name, entry in index.items():
            if isinstance(entry, list) and (name not in ("unet", "scheduler") or entry[0] != "diffusers"):
                what = f"{entry[-1]} of {entry[0]} for {name}"
                raise ValueError(f"{folder} has a {what}: only a unet and a scheduler of diffusers are pushed")
        paths = {f"unet/{path.name}": path for path in sorted((folder / "unet").glob("*"))}
        weights = {name: path for name, path in paths.items() if variant_of(name) is not None and ".bin" not in name}
        variants = sorted({variant_of(name) for name in weights if not name.endswith(".json")})
        if not variants:
            raise ValueError(f"{folder} has no weights as safetensors: load it, and save_pretrained into a new folder")
        self.variant = variants[0] or None
        for variant in reversed(variants):  # the first one is kept
            self.pipe = GeneralizedDDIMPipeline.from_pretrained(str(folder), variant=variant or None)
        self.files: dict[str, Path | bytes] = {f"{code().name}.py": code().text.encode(), **weights}
        for name, part in {INDEX: self.pipe, UNET: self.pipe.unet, SCHEDULER: self.pipe.scheduler}.items():
            config = json.loads(part.to_json_string())
            config.pop("_name_or_path", None)  # where it was loaded from
            self.files[name] = (json.dumps(config, indent=2) + "\n").encode()
        found = [folder / GRID]
        if (folder / README).is_file():  # other pictures and records belong to the card
            found += [folder / README, *folder.glob("*.png"), *(folder / name for name in RECORDS)]
        self.files |= {path.name: path for path in found if path.is_file()}

    def card(self, repo_id: str, license: str | None = None, revision: str | None = None, **details: Any) -> str:
        """Write the card, with more `details` for `card`."""
        unet, scheduler = self.pipe.unet, self.pipe.scheduler
        configs = (dict(unet.config), dict(scheduler.config) | {"_class_name": type(scheduler).__name__})
        stock = json.loads(self.files[INDEX])["_class_name"]
        details |= {"pipeline": None if stock == GeneralizedDDIMPipeline.__name__ else stock}
        return card(repo_id, *configs, unet.num_parameters(), license, self.variant, revision, **details)
