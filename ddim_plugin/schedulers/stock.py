"""Stock pipelines with a scheduler of this package: saved so that they load without it."""

import json

from diffusers import DiffusionPipeline

from .config import StockConfig

_written = DiffusionPipeline.to_json_string


def to_json_string(self: DiffusionPipeline) -> str:
    """Write `model_index.json` with the stock class of our scheduler, which `restore_scheduler` brings back."""
    index = json.loads(_written(self))
    for name, each in index.items():
        component = getattr(self, name, None) if isinstance(each, list) else None
        if isinstance(component, StockConfig):
            index[name] = ["diffusers", component.config["_class_name"]]
    return json.dumps(index, indent=2, sort_keys=True) + "\n"


DiffusionPipeline.to_json_string = to_json_string
