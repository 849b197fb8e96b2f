"""Denoising Diffusion Implicit Models (Song, Meng, Ermon, ICLR 2021) for Hugging Face diffusers."""

# Folders of version 0.1 name this package for components, and diffusers looks for the base classes in it.
from diffusers import ModelMixin, SchedulerMixin

from .hub.push import push_to_hub as _push_to_hub
from .hub.stock import save_stock_index as _save_stock_index
from .pipelines.fit import fit_timesteps
from .pipelines.generation import GeneralizedDDIMPipeline
from .schedulers import (
    GeneralizedDDIMScheduler,
    GeneralizedDDIMSchedulerOutput,
    InverseDDIMScheduler,
    InverseMultistepDDIMScheduler,
    MultistepDDIMScheduler,
    restore_scheduler,
)
from .version import __version__

__all__ = [
    "GeneralizedDDIMPipeline",
    "GeneralizedDDIMScheduler",
    "GeneralizedDDIMSchedulerOutput",
    "InverseDDIMScheduler",
    "InverseMultistepDDIMScheduler",
    "ModelMixin",
    "MultistepDDIMScheduler",
    "SchedulerMixin",
    "__version__",
    "fit_timesteps",
    "restore_scheduler",
]

GeneralizedDDIMPipeline.push_to_hub = _push_to_hub
_save_stock_index()

for _each in [each for each in globals().values() if isinstance(each, type) and each.__module__.startswith(__name__)]:
    _each.__module__ = __name__  # saved files name classes by this module
