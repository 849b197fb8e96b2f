"""Denoising Diffusion Implicit Models (Song, Meng, Ermon, ICLR 2021) for Hugging Face diffusers."""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

from .version import __version__

__all__ = ["GeneralizedDDIMPipeline", "GeneralizedDDIMScheduler", "GeneralizedDDIMSchedulerOutput"]
__all__ += ["InverseDDIMScheduler", "InverseMultistepDDIMScheduler", "Inverted", "ModelMixin", "MultistepDDIMScheduler"]
__all__ += ["DiscreteDDIMScheduler", "SchedulerMixin", "__version__", "fit_solver", "invert", "restore_scheduler"]

# Folders of version 0.1 name this package for components, and diffusers looks for its base classes here too.
_SOURCES = ("diffusers", ".schedulers", ".pipelines.generation", ".pipelines.invert", ".pipelines.fit")  # last counts
_PARTS = ("process", "schedulers", "pipelines", "hub")


class _Package(ModuleType):
    """Import public names when they are first used, so that `ddim-plugin --help` does not import torch."""

    def __getattr__(self, name: str) -> Any:
        if name not in (*__all__, *_PARTS):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        for module in [import_module(source, __name__) for source in _SOURCES]:
            if name in __all__ and hasattr(module, name):
                setattr(self, name, getattr(module, name))
        return vars(self)[name]

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in _PARTS[1:]:  # called before the modules of the sub-package are imported: complete our classes
            import_module(".hub.push", __name__)

    def __dir__(self) -> list[str]:
        return sorted({*vars(self), *__all__, *_PARTS})


sys.modules[__name__].__class__ = _Package
