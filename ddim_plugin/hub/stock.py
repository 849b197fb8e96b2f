"""Stock pipelines with a scheduler of this package: saved so that they load without it."""

import json
from functools import wraps

from diffusers import DDIMScheduler, DiffusionPipeline

from ..schedulers.config import StockConfig


def save_stock_index() -> None:
    """Let every pipeline of diffusers name a stock scheduler in `model_index.json` in place of one of ours.

    The scheduler's config is that of a stock `DDIMScheduler`, and keeps our settings for `restore_scheduler`. diffusers
    derives the entry of a component from its class, and writes it in `DiffusionPipeline.to_json_string`: that method
    is wrapped, once. Pipelines without a scheduler of this package are saved as before.
    """
    inner = DiffusionPipeline.to_json_string
    if hasattr(inner, "of_ddim_plugin"):
        return

    @wraps(inner)
    def to_json_string(self: DiffusionPipeline) -> str:
        text = inner(self)
        index = json.loads(text)
        components = [name for name, entry in index.items() if isinstance(entry, list)]
        ours = [name for name in components if isinstance(getattr(self, name, None), StockConfig)]
        entries = {name: ["diffusers", DDIMScheduler.__name__] for name in ours}
        return json.dumps(index | entries, indent=2, sort_keys=True) + "\n" if ours else text

    to_json_string.of_ddim_plugin = True
    DiffusionPipeline.to_json_string = to_json_string
