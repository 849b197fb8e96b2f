"""Exact inversion: for each step x_s = f(x_t) of the sampler, find the x_t that gives a known x_s.

The plain inverse evaluates the network at the known end, and its error is the paper's Table 2. Here f(x_t) = x_s is
solved by a fixed-point iteration x ← x + γ(x_s − f(x)) with Anderson acceleration (Walker & Ni 2011), for each image
separately. An inverse may not exist: f folds, for guided networks above all.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .paths import Level

MEMORY = 5  # number of earlier iterates that Anderson acceleration uses
GROWTH = 2.0  # an iteration restarts from its best iterate with half the step above this multiple of the best residual
VARIANCE = 100.0  # largest variance of the data in any direction for which the plain iteration converges
TOLERANCE = 1e-5  # residual of a solved step, in units of the network's images
MOST_ROUNDS = 8  # at most so many times as many evaluations for a step that is harder than others


def step_size(t: Level, s: Level) -> float:
    """Compute γ = 2/(m + M) with f′ in [m, M] for Gaussian data of variance 0 to `VARIANCE` and the exact ε̂."""
    if t == s:  # nothing to solve
        return 1.0
    slopes = [(s.signal * t.signal * v + s.noise * t.noise) / (t.signal**2 * v + t.noise**2) for v in (0.0, VARIANCE)]
    return float(2 / (sum(slopes) or 2))


def rounds(t: Level, s: Level) -> int:
    """Compute how many times as many evaluations a step takes as an easy one, from how fast the iteration contracts."""
    contraction = 0.0 if t == s else abs(1 - step_size(t, s) * s.noise / t.noise)
    return max(1, min(MOST_ROUNDS, round(1.5 / max(1e-3, -math.log(max(1e-9, contraction))))))


class Search:
    """Find x with r(x) = 0 from one value of r at a time, for each sample on its own, without a read on the host."""

    def __init__(self, step: float):
        self.gamma: float | Tensor = step
        self.changes: list[tuple[Tensor, ...]] = []  # of x, and of r: orthonormal, so the best mix takes inner products
        self.best: tuple[Tensor, ...] = ()  # ‖r‖², x and r; `last` has x and r

    def next(self, x: Tensor, r: Tensor, kept: Tensor | None = None) -> Tensor:
        """Return the next x to evaluate, given r at x, both (B, …). Where `kept` is true, r is not used."""
        r = r if kept is None else torch.where(kept, torch.nan, r)
        size = inner(r, r)
        if not self.best:
            self.best = size, x, r
        else:
            dx, dr = x - self.last[0], r - self.last[1]
            whole, (dx, dr) = inner(dr, dr), self._free(dx, dr)
            left = inner(dr, dr)
            scale = torch.where(left > 1e-10 * whole, left, torch.inf).rsqrt()  # 0 for a direction that is known
            self.changes = [*self.changes, (scale * dx, scale * dr)][-MEMORY:]
            better, grown = size < self.best[0], ~(size <= GROWTH**2 * self.best[0])  # NaN has grown
            self.best = tuple(torch.where(better, *each) for each in zip((size, x, r), self.best, strict=True))
            x, r = torch.where(grown, self.best[1], x), torch.where(grown, self.best[2], r)
            self.gamma = self.gamma * torch.where(grown, 0.5, 1.0)
            self.changes = [tuple(torch.where(grown, 0, each) for each in change) for change in self.changes]
        self.last = x, r
        x, r = self._free(x, r)
        return x + self.gamma * r

    def _free(self, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """Subtract the changes that x and r contain."""
        for dx, dr in self.changes:
            weight = inner(dr, r)
            x, r = x - weight * dx, r - weight * dr
        return x, r


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Compute the inner product of each sample, (B, 1, …)."""
    return (a * b).flatten(1).sum(1).view(-1, *[1] * (a.ndim - 1))


@dataclass(frozen=True)
class InversionReport:
    """Report the residuals and evaluations of each step. Arrays are (steps, B).

    A residual is the root mean square of (x_s − f(x_t))/a_s, the smallest of the evaluated x_t, in units of the
    network's images (−1..1). The latent is one iteration further. It is NaN for a plain step, which measures none.
    """

    timesteps: NDArray[np.float64]  # of the network, at the upper end of each step, (steps,)
    residual: NDArray[np.float64]
    evaluations: NDArray[np.int64]  # of the network; a guided one counts twice in `GeneralizedDDIMPipeline.encode`
    converged: NDArray[np.bool_]  # the residual is at most the tolerance
    tolerance: float
    latent_mean: NDArray[np.float64]  # of each latent, (B,): 0 for noise
    latent_std: NDArray[np.float64]  # its standard deviation, (B,): 1 for noise

    @classmethod
    def of(cls, timesteps: Any, residual: Any, evaluations: Any, tolerance: float, z: Tensor) -> "InversionReport":
        """Report on latents z, (B, …)."""
        residual, z = np.asarray(residual, np.float64), z.detach().cpu().double().flatten(1)
        counts, moments = np.broadcast_to(evaluations, residual.shape), (z.mean(1).numpy(), z.std(1, False).numpy())
        return cls(np.asarray(timesteps), residual, counts, residual <= tolerance, tolerance, *moments)

    @property
    def total_evaluations(self) -> NDArray[np.int64]:
        """Sum the network evaluations of each image, (B,)."""
        return self.evaluations.sum(0)

    def to_dict(self) -> dict[str, Any]:
        """Convert to numbers and lists for JSON. Residuals that are not finite become None."""
        finite = np.where(np.isfinite(self.residual), self.residual, np.array(None))
        return {key: np.asarray(value).tolist() for key, value in (asdict(self) | {"residual": finite}).items()}

    def __str__(self) -> str:
        """Format a table with a line for each step, with the largest residual and evaluations of any image."""
        lines = ["timestep  residual  evaluations"]
        for t, found, spent in zip(self.timesteps, self.residual, self.evaluations, strict=True):
            left = (found > self.tolerance).sum()  # NaN of a plain step is not
            mark = f"  not converged ({left} of {len(found)})" if left else ""
            lines.append(f"{t:8g}  {found.max():8.1e}  {spent.max():11d}{mark}")
        total = f"evaluations for an image: {self.total_evaluations.mean():.1f}; tolerance {self.tolerance:g}; latents:"
        spread = f"mean {self.latent_mean.mean():.3f}, standard deviation {self.latent_std.mean():.3f}"
        return "\n".join([*lines, f"{total} {spread}"])
