"""Stock pipelines with a scheduler of this package: saved so that they load without it."""

import json
from functools import wraps

from diffusers import DiffusionPipeline

from .config import StockConfig

_written = DiffusionPipeline.to_json_string


@wraps(_written)
def _stock_index(self: DiffusionPipeline) -> str:
    index = json.loads(_written(self))
    for name, each in index.items():
        component = getattr(self, name, None) if isinstance(each, list) else None
        if isinstance(component, StockConfig):  # diffusers names its class; `restore_scheduler` brings it back
            index[name] = ["diffusers", component.config["_class_name"]]
    return json.dumps(index, indent=2, sort_keys=True) + "\n"


DiffusionPipeline.to_json_string = _stock_index
