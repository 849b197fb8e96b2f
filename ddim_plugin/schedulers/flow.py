"""The noise levels of flow matching: from diffusers' own schedulers, with their shifts and grids."""

from collections.abc import Sequence
from numbers import Real
from typing import Any

import diffusers
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .config import defaults

SHIFTS = ("shift", "flow_shift")  # names of one setting
Sigmas = Sequence[float] | NDArray[np.floating]


def grid(
    config: dict[str, Any], stock: str, shift: float | None, S: int | None, sigmas: Sigmas | None, **given: Any
) -> tuple[NDArray[np.float64], list[float]]:
    """Return σ, descending, and the network's timesteps that a stock flow scheduler computes from a config.

    `stock` is the name of its class, `shift` one from `set_shift`. S, `sigmas` and `given` (`mu`, `timesteps`) are
    arguments of its `set_timesteps`. Raises ValueError for σ that do not fall, and what that raises.
    """
    sigmas = None if sigmas is None else check(sigmas.tolist() if isinstance(sigmas, Tensor) else sigmas)
    cls = getattr(diffusers, stock)
    scheduler = cls.from_config(config, **{key: shift_of(config) for key in SHIFTS if key in defaults(cls)})
    if shift is not None:
        scheduler.set_shift(shift)
    given |= {"sigmas": sigmas} if config["use_dynamic_shifting"] else {"sigmas": sigmas, "mu": None}  # given to all
    scheduler.set_timesteps(S, device="cpu", **{key: value for key, value in given.items() if value is not None})
    levels = scheduler.sigmas.double().numpy()[: len(scheduler.timesteps)]
    return check(1 - levels if config.get("invert_sigmas") else levels), scheduler.timesteps.tolist()


def shift_of(config: dict[str, Any]) -> float:
    """Return the shift of the noise levels, a setting with two names. Raises ValueError if they disagree."""
    shifts = [config[key] for key in SHIFTS if config[key] != 1] or [1.0]
    if len({*shifts}) > 1 or not all(isinstance(value, Real) and value > 0 for value in shifts):
        raise ValueError(f"shift and flow_shift must be one positive number, not {shifts}")
    return shifts[0]


def check(sigmas: Sigmas) -> NDArray[np.float64]:
    """Convert σ to a float64 array, and check that they fall and lie in (0, 1]. The last of several may be 0."""
    levels = np.asarray(sigmas, dtype=np.float64)
    falls = levels.ndim == 1 and len(levels) > 0 and bool((np.diff(levels) < 0).all())
    if not falls or not 0 < levels[0] <= 1 or levels[-1] < 0:
        raise ValueError(f"sigmas must fall and lie in (0, 1], only the last of several may be 0, not {sigmas}")
    return levels
