"""Cells of a grid: each is a number of steps with a variance, a spacing of τ, a guidance and a scheduler."""

import inspect
import json
import math
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import diffusers
from diffusers import SchedulerMixin

import ddim_plugin
from ddim_plugin import GeneralizedDDIMScheduler
from ddim_plugin.process.moves import VARIANCES
from ddim_plugin.schedulers import STOCK_SPACINGS, keep_learned

from .settings import SAVED, EvaluateConfig


class Noise(NamedTuple):
    """The variance type and η of a cell. Both are None for those that the model was saved with."""

    kind: str | None
    eta: float | None


@dataclass(frozen=True)
class Cell:
    """An entry of the table. `variance` is a number (η), a variance type, "optimal:η" or "saved"."""

    scheduler: str
    variance: str
    spacing: str
    steps: int
    guidance: float | None = None

    @property
    def noise(self) -> Noise:
        """The variance, parsed. Raises ValueError if it is unknown."""
        if self.variance == SAVED:
            return Noise(None, None)
        kind, _, eta = self.variance.partition(":")
        if kind not in VARIANCES:
            kind, eta = "fixed_small", self.variance
        try:
            number = float(eta) if eta else 0.0 if kind == "optimal" else 1.0
        except ValueError:
            number = math.nan
        if not 0 <= number < math.inf or (eta and kind in ("fixed_large", "learned_range")):
            raise ValueError(
                f"unknown variance {self.variance!r}: use a number (η), {', '.join(VARIANCES)}, optimal:η, {SAVED}"
            )
        return Noise(kind, number)

    def label(self, plain: bool = False) -> str:
        """Return the variance and the guidance as the label of a row, in ASCII if `plain`."""
        kind, eta = self.noise
        text = {None: self.variance, "fixed_large": "σ̂", "learned_range": "learned"}.get(kind)
        if text is None:
            text = f"optimal, η = {eta:g}" if kind == "optimal" else f"η = {eta:g}"
        text += "" if self.guidance is None else f", w = {self.guidance:g}"
        return text.replace("η", "eta").replace("σ̂", "sigma-hat") if plain else text


def cells(config: EvaluateConfig) -> list[Cell]:
    """Return the cells of a grid, the cheapest first."""
    found = []
    for named in config.schedulers:
        name, _, suffix = named.partition(":")
        if suffix not in ("", SAVED):
            raise ValueError(f"unknown scheduler {named!r}: only :{SAVED} may follow the name")
        variances, spacings = ((SAVED,), (SAVED,)) if suffix else (config.variances, config.spacings)
        lines = product(spacings, variances, config.guidance or (None,), config.steps)
        found += [Cell(name, variance, spacing, S, w) for spacing, variance, w, S in lines]
    return sorted(found, key=lambda cell: cell.steps)


def find_scheduler(name: str, saved: SchedulerMixin) -> type[SchedulerMixin]:
    """Return the class of that name, of this package or of diffusers."""
    if name == SAVED:
        return type(saved)
    found = getattr(ddim_plugin, name, None) or getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, SchedulerMixin)):
        raise ValueError(f"unknown scheduler {name!r}: use {SAVED}, or a class such as GeneralizedDDIMScheduler")
    return found


def make_scheduler(cell: Cell, saved: SchedulerMixin, clip: str) -> tuple[SchedulerMixin, float | None]:
    """Make the scheduler of a cell from the saved one, and set its timesteps.

    Returns:
        The scheduler, and the η to call the pipeline with.

    Raises:
        ValueError: if this scheduler cannot do what the cell asks for.
    """
    cls = find_scheduler(cell.scheduler, saved)
    config = dict(saved.config) if cls is type(saved) else json.loads(saved.to_json_string())
    noise, eta = _noise(cell, cls, config)
    changes = _spacing(cell, cls) | noise | _clipping(cell, cls, clip)
    try:
        made = cls.from_config(config, **changes)
        T = made.config.get("num_train_timesteps")
        if T is not None and cell.steps > T:
            raise ValueError(f"S={cell.steps} is more than T={T}")
        made.set_timesteps(cell.steps, **({"eta": eta} if isinstance(made, GeneralizedDDIMScheduler) else {}))
    except (ValueError, TypeError, NotImplementedError, ImportError, AssertionError, IndexError) as error:
        spacing = "" if cell.spacing == SAVED else f", spacing {cell.spacing}"
        raise ValueError(f"{cls.__name__}, variance {cell.variance}, S={cell.steps}{spacing}: {error}") from error
    return made, eta


def _spacing(cell: Cell, cls: type[SchedulerMixin]) -> dict[str, Any]:
    if cell.spacing == SAVED:
        return {}
    ours = issubclass(cls, GeneralizedDDIMScheduler)
    if "timestep_spacing" not in _settings(cls) or not (ours or cell.spacing in STOCK_SPACINGS):
        raise ValueError(f"{cls.__name__} knows no spacing {cell.spacing!r}: measure {cell.scheduler}:{SAVED}")
    return {"timestep_spacing": cell.spacing}


def _noise(cell: Cell, cls: type[SchedulerMixin], config: dict[str, Any]) -> tuple[dict[str, Any], float | None]:
    """Return the changes to a config that give a cell its variance, and the η to call the pipeline with."""
    kind, eta = cell.noise
    if kind is None:
        return {}, None
    if issubclass(cls, GeneralizedDDIMScheduler):
        changes = keep_learned(config, {"variance_type": kind, "eta": eta})
        # A network that learned its variance keeps its type, and the pipeline alone gets η.
        return (changes if "variance_type" in changes else {}), eta
    if cell.variance in VARIANCES and "variance_type" in _settings(cls):
        return {"variance_type": kind}, None
    if kind == "fixed_small" and "eta" in inspect.signature(cls.step).parameters:
        return {}, eta
    raise ValueError(f"{cls.__name__} knows no variance {cell.variance!r}: measure {cell.scheduler}:{SAVED}")


def _clipping(cell: Cell, cls: type[SchedulerMixin], clip: str) -> dict[str, Any]:
    if clip == SAVED or cell.variance == SAVED:
        return {}
    known = _settings(cls)
    clipped = clip == "always" or (clip == "fixed_large" and cell.noise.kind == "fixed_large")
    if "clip_sample" not in known:
        if clipped:
            raise ValueError(f"{cls.__name__} does not clip: measure {cell.scheduler}:{SAVED}")
        return {}
    changes = {"clip_sample": clipped}
    if clipped and clip == "fixed_large" and "use_clipped_model_output" in known:
        changes["use_clipped_model_output"] = True  # the authors' σ̂ is Ho's sampler: ε̂ from the clipped x̂0
    return changes


def _settings(cls: type[SchedulerMixin]) -> set[str]:
    return set(inspect.signature(cls.__init__).parameters)
