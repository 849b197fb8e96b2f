"""Gaussian paths x_t = a·x_0 + b·ε: variance preserving (the paper), flow matching and variance exploding.

Times run from 0, the data, to T. A network's timestep is t − 1 for a table of levels, T·σ for flow matching, else σ.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar, NamedTuple

import numpy as np

from .spacings import Array, Times, is_integer

Number = Any  # a float, a float64 array or a tensor


class Level(NamedTuple):
    """Noise level x = signal·x_0 + noise·ε: two numbers, or two float64 arrays of one shape."""

    signal: Number
    noise: Number

    @property
    def ratio(self) -> Number:
        """Compute ς = noise/signal (Eq. 14), which is infinite for pure noise."""
        with np.errstate(divide="ignore"):
            return np.divide(self.noise, self.signal)


@dataclass(frozen=True, eq=False)
class Path:
    """A path given by its levels at the times 0..T. Networks are evaluated at t − 1."""

    levels: Level  # arrays, (T + 1,)
    output_sign: int = 1  # factor on the network's output
    sigma_data: float | None = None  # deviation of the data for which the network is preconditioned
    image_range: tuple[float, float] = (-1.0, 1.0)  # black and white in x_0
    continuous: ClassVar[bool] = False  # timesteps are real numbers
    first: ClassVar[int] = 1  # lowest time at which networks are evaluated

    @property
    def T(self) -> int:
        return len(self.levels.signal) - 1

    @property
    def explodes(self) -> bool:
        """Whether the noise is added to x_0 itself, so that x_t has no fixed scale."""
        return bool(self.levels.signal[-1] == 1)

    @property
    def bounds(self) -> tuple[float, float]:
        """Return the lowest and the highest timestep."""
        ends = self.timestep(self.first), self.timestep(self.T)
        return min(ends), max(ends)

    def level(self, time: float) -> Level:
        """Return the level at a time 0..T."""
        return Level(float(self.levels.signal[time]), float(self.levels.noise[time]))

    def timestep(self, time: Number) -> Number:
        return time - 1

    def time(self, timestep: Number) -> Number:
        return timestep + 1

    def check(self, *timesteps: float) -> None:
        """Raise ValueError for timesteps outside `bounds`. Real ones may be rounded to float32."""
        low, high = self.bounds
        for value in timesteps:
            if not low - 1e-6 * abs(low) <= value <= high + 1e-6 * abs(high):
                raise ValueError(f"timestep {value:g} is outside {low:g}..{high:g}: pass timesteps in that range")

    def times(self, timesteps: Iterable[Number]) -> Array | Times:
        """Convert timesteps, from noise to data, to increasing times.

        Raises ValueError unless they are numbers (integers for a table of levels) within `bounds`, each below the last.
        """
        values = list(timesteps) if isinstance(timesteps, Iterable) else []
        if not values or not all(is_integer(each) or (self.continuous and isinstance(each, Real)) for each in values):
            kind = "numbers" if self.continuous else "integers"
            raise ValueError(f"timesteps must be a list of {kind}, not {timesteps!r}")
        self.check(*values)
        times = np.array([self.time(value) for value in values])
        if (np.diff(times) >= 0).any() or times[-1] == 0:
            order = "ascending" if self.output_sign < 0 else "in descending order"
            raise ValueError(f"timesteps must be distinct, {order} and above the data, not {values}")
        return times[::-1]


class FlowMatching(Path):
    """x_t = (1 − σ)·x_0 + σ·ε with σ = t/T, for real t (Lipman et al. 2023). Networks are evaluated at T·σ."""

    continuous = True
    first = 0

    def level(self, time: float) -> Level:
        return Level(1 - time / self.T, time / self.T)

    def timestep(self, time: Number) -> Number:
        return time if self.output_sign > 0 else self.T - time  # networks at T·(1 − σ) predict x_0 − ε

    def time(self, timestep: Number) -> Number:
        return self.timestep(timestep)  # its own inverse


class VarianceExploding(Path):
    """x_t = x_0 + σ_t·ε with ln σ_t linear on 1 ≤ t ≤ T (Song et al. 2021)."""

    continuous = True

    def level(self, time: float) -> Level:
        low, high = self.levels.noise[[1, -1]].tolist()
        return Level(1.0, low * (high / low) ** ((time - 1) / max(1, self.T - 1)) if time else 0.0)

    def at(self, sigma: Number) -> Number:
        """Return the time at which the noise is σ."""
        low, high = self.levels.noise[[1, -1]]
        return 1 + (self.T - 1) * np.log(sigma / low) / np.log(high / low)

    def sigma(self, timestep: Number) -> Number:
        """Return σ at a timestep."""
        return timestep if self.sigma_data is None else math.e ** (4 * timestep)

    def timestep(self, time: Number) -> Number:
        """Return σ_t for the network, or with `sigma_data` c_noise = ln(σ_t)/4 (Karras et al. 2022, Table 1)."""
        return self.level(time).noise if self.sigma_data is None else math.log(self.level(time).noise) / 4

    def time(self, timestep: Number) -> Number:
        return float(self.at(self.sigma(timestep)))


def variance_preserving(alpha_bar: Array) -> Path:
    """Build the paper's path from ᾱ_0..ᾱ_T: a = √ᾱ, b = √(1 − ᾱ)."""
    return Path(Level(np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)))


def flow_matching(T: int, inverted: bool = False) -> FlowMatching:
    """Build the path of flow matching."""
    noise = np.arange(T + 1) / T
    return FlowMatching(Level(1 - noise, noise), -1 if inverted else 1)


def variance_exploding(T: int, sigma_min: float, sigma_max: float, sigma_data: float | None = None) -> Path:
    """Build the path of NCSN++, with images in 0..1, or of EDM, σ from `sigma_min` at time 1 to `sigma_max` at T."""
    levels = Level(np.ones(T + 1), np.append(0.0, np.geomspace(sigma_max, sigma_min, T)[::-1]))
    return VarianceExploding(levels, sigma_data=sigma_data, image_range=(-1.0 if sigma_data else 0.0, 1.0))


def square_root(T: int) -> Path:
    """Build the path x_t = x_0 + √t·ε of random walks. Networks are evaluated at t − 1."""
    return Path(Level(np.ones(T + 1), np.sqrt(np.arange(T + 1.0))))
