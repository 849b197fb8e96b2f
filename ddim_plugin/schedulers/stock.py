"""Stock pipelines with a scheduler of this package: saved so that they load without it."""

import json
from collections.abc import Callable
from functools import wraps

from diffusers import DiffusionPipeline

from .config import StockConfig


def _stock_index(written: Callable[[DiffusionPipeline], str]) -> Callable[[DiffusionPipeline], str]:
    """Let `model_index.json` name the stock class in a scheduler's config in place of a class of this package.

    diffusers derives the entry of a component from its class. Pipelines without a scheduler of this package are saved
    as before. `restore_scheduler` brings ours back.
    """

    @wraps(written)
    def to_json_string(self: DiffusionPipeline) -> str:
        text = written(self)
        components = {
            name: getattr(self, name, None) for name, each in json.loads(text).items() if isinstance(each, list)
        }
        ours = {name: each for name, each in components.items() if isinstance(each, StockConfig)}
        entries = {name: ["diffusers", each.config["_class_name"]] for name, each in ours.items()}
        return json.dumps(json.loads(text) | entries, indent=2, sort_keys=True) + "\n" if ours else text

    return to_json_string


DiffusionPipeline.to_json_string = _stock_index(DiffusionPipeline.to_json_string)
