"""Denoising Diffusion Implicit Models (Song, Meng, Ermon, ICLR 2021) for Hugging Face diffusers."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from diffusers import ModelMixin, SchedulerMixin

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

__all__ = ["GeneralizedDDIMPipeline", "GeneralizedDDIMScheduler", "GeneralizedDDIMSchedulerOutput"]
__all__ += ["InverseDDIMScheduler", "InverseMultistepDDIMScheduler", "ModelMixin", "MultistepDDIMScheduler"]
__all__ += ["SchedulerMixin", "__version__", "fit_timesteps", "restore_scheduler"]

# Folders of version 0.1 name this package for components, and diffusers looks for its base classes here too.
_SOURCES = (".schedulers", ".pipelines.generation", ".pipelines.fit", "diffusers")
_PARTS = ("process", "schedulers", "pipelines", "hub")


class _Package(ModuleType):
    """Load `hub.push`, which completes our classes, with the first sub-package that has some of them."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)  # called by the import of a sub-package, before its modules are imported
        if name in _PARTS[1:]:
            import_module(".hub.push", __name__)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `ddim-plugin --help` does not import torch."""
    if name not in (*__all__, *_PARTS):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    modules = [import_module(source, __name__) for source in _SOURCES]
    if name in __all__:
        globals()[name] = next(getattr(module, name) for module in modules if hasattr(module, name))
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PARTS})
