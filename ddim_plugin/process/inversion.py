"""Exact inversion: for each step x_s = f(x_t) of the sampler, find the x_t that gives a known x_s.

The naive inverse evaluates the network at the known end, and its error is the paper's Table 2. Here f(x_t) = x_s is
solved by a fixed-point iteration x ← x + γ(x_s − f(x)) with Anderson acceleration (Walker & Ni 2011), for each image
separately. f includes the rounding of the sampler's step, so that sampling reproduces x_s. In the step to the data, f
ends with the clamp to −1..1 that turns x_0 into an image: a black pixel needs x̂0 ≤ −1, not exactly −1. An inverse may
not exist there, because an image need not be a value of x̂0(·, τ_1). The lower τ_1, the nearer the values.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .gaussian import precise
from .paths import Level

MEMORY = 5  # number of earlier iterates that Anderson acceleration uses
PATIENCE = 6  # number of evaluations in which the residual must fall by `PROGRESS`, or the search for an image ends
SETTLED = 3  # the same number for `at_floor`, after a search of at most `PATIENCE` evaluations
PROGRESS = 0.9  # factor by which the smallest residual must fall to count as progress
GROWTH = 2.0  # an iteration restarts from its best iterate with half the step above this multiple of the best residual
VARIANCE = 100.0  # largest variance of the data in any direction for which the plain iteration converges
Residual = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Maps (x, rows) to (x_s − f(x), the network's output at x) for the images `rows`, indices into the batch."""


class Solution(NamedTuple):
    """Hold x_t of one step, the iterate with the smallest residual. Arrays are (B,)."""

    x: Tensor
    output: Tensor  # the network's, at x
    residual: NDArray[np.float64]  # root mean square of x_s − f(x_t)
    evaluations: NDArray[np.int64]
    at_floor: NDArray[np.bool_]  # the residual made no progress at the end


def step_size(t: Level, s: Level) -> float:
    """Compute γ = 2/(m + M) with f′ in [m, M] for Gaussian data of variance 0 to `VARIANCE` and the exact ε̂."""
    slopes = [(s.signal * t.signal * v + s.noise * t.noise) / (t.signal**2 * v + t.noise**2) for v in (0.0, VARIANCE)]
    return float(2 / (sum(slopes) or 2))


def solve(residual: Residual, guess: Tensor, step: float, tolerance: float, evaluations: int) -> Solution:
    """Find the x with the smallest residual of each image.

    An image is finished when the root mean square of its residual is at most `tolerance`, or stops falling. If a
    residual grows, the iteration restarts from its best iterate with half the step and no history. The result is never
    worse than the guess, and does not depend on other images. `guess` is (B, C, H, W), `step` γ, and `evaluations` ≥ 1
    the largest number of calls of `residual`.
    """
    B = len(guess)
    best, best_residual, best_output = guess.clone(), torch.zeros_like(guess), torch.empty(0)
    smallest, spent = np.full(B, np.inf), np.zeros(B, np.int64)
    falls: list[NDArray[np.float64]] = []  # the smallest residuals after each evaluation
    born, gamma = np.zeros(B, np.int64), np.full(B, step)  # first evaluation of the history, and γ
    active, x = np.arange(B), guess
    history: list[tuple[Tensor, Tensor]] = []  # (x, residual) of the active images, the newest last
    for i in range(evaluations):
        rows = torch.as_tensor(active, device=guess.device)
        r, output = residual(x, rows)
        best_output = best_output if i else output.clone()
        size = r.to(precise(r)).flatten(1).pow(2).mean(1).sqrt().cpu().numpy().astype(np.float64)
        spent[active] += 1
        grown = ~(size <= GROWTH * smallest[active])  # NaN has grown
        better = size < smallest[active]
        smallest[active] = np.where(better, size, smallest[active])
        falls.append(smallest.copy())
        keep = torch.as_tensor(better, device=guess.device)
        kept = rows[keep]
        best[kept], best_residual[kept], best_output[kept] = x[keep], r[keep], output[keep]

        born[active[grown]] = i
        gamma[active[grown]] /= 2
        back = torch.as_tensor(grown, device=guess.device).view(-1, *[1] * (x.ndim - 1))
        history.append((torch.where(back, best[rows], x), torch.where(back, best_residual[rows], r)))
        going = (smallest[active] > tolerance) & ~_settled(falls, spent, PATIENCE)[active]
        if not going.any():
            break
        if not going.all():
            left = torch.as_tensor(going, device=guess.device)
            history, active = [(x[left], r[left]) for x, r in history], active[going]
        history = history[-MEMORY - 1 :]
        first = i + 1 - len(history)
        known = np.arange(first, i)[None, :] >= born[active][:, None]
        x = _next(history, gamma[active], known)
    settled = _settled(falls, spent, np.where(spent > PATIENCE, PATIENCE, SETTLED))
    return Solution(best, best_output, smallest, spent, settled & ~(smallest <= tolerance))


def _settled(
    falls: list[NDArray[np.float64]], spent: NDArray[np.int64], window: int | NDArray[np.int64]
) -> NDArray[np.bool_]:
    images, before = np.arange(len(spent)), spent - 1 - window
    earlier = np.stack(falls)[np.maximum(before, 0), images]
    return (before >= 0) & ~(falls[-1] < PROGRESS * earlier)


def _next(history: list[tuple[Tensor, Tensor]], gamma: NDArray[np.float64], known: NDArray[np.bool_]) -> Tensor:
    """Compute x̄ + γ·r̄, with x̄ the combination of iterates of the smallest linearised residual r̄.

    `known`, (B, len(history) − 1), marks the earlier iterates that each image uses.
    """
    *earlier, (x, r) = history
    work, ones = precise(x), [1] * (x.ndim - 1)
    new, mean_r = x.to(work), r.to(work)
    if known.any():
        used = torch.as_tensor(known, device=x.device).view(*known.shape, *ones)
        pairs = zip(zip(*earlier, strict=True), (x, r), strict=True)
        dx, dr = (torch.where(used, torch.stack(past, 1) - now[:, None], 0) for past, now in pairs)
        changes = dr.flatten(2).to(work)
        gram, right = changes @ changes.mT, changes @ mean_r.flatten(1)[..., None]
        diagonal = gram.diagonal(dim1=1, dim2=2)
        ridge = torch.where(diagonal > 0, max(1e-10, 10 * torch.finfo(work).eps) * diagonal, 1)
        gram = (gram + torch.diag_embed(ridge)).cpu().double()
        weights = -torch.linalg.solve(gram, right.cpu().double()).to(work).to(x.device).view(used.shape)
        for j in range(len(earlier)):
            new, mean_r = new + weights[:, j] * dx[:, j], mean_r + weights[:, j] * dr[:, j]
    step = torch.as_tensor(gamma).to(work).to(x.device).view(-1, *ones)
    return (new + step * mean_r).to(x.dtype)


@dataclass(frozen=True)
class InversionReport:
    """Report the residuals and evaluations of each step. Arrays are (steps, B).

    Attributes:
        timesteps: the network timestep at the upper end of each step, (steps,).
        residual: root mean square of (x_s − f(x_t))/a_s in units of the network's images (−1..1). It is NaN for a
            naive step, which does not measure it.
        evaluations: network evaluations. A guided one counts twice.
        converged: whether the residual reached `tolerance`.
        at_floor: whether the residual stopped above `tolerance`, with less than 10 % progress in the last evaluations.
        tolerance: the largest residual of a converged step.
        latent_mean, latent_std: mean and standard deviation of each latent, (B,). Those of noise are 0 and 1.
    """

    timesteps: NDArray[np.int64]
    residual: NDArray[np.float64]
    evaluations: NDArray[np.int64]
    converged: NDArray[np.bool_]
    at_floor: NDArray[np.bool_]
    tolerance: float
    latent_mean: NDArray[np.float64]
    latent_std: NDArray[np.float64]

    @property
    def total_evaluations(self) -> NDArray[np.int64]:
        """Sum the network evaluations of each image, (B,)."""
        return self.evaluations.sum(0)

    def where(self, flags: NDArray[np.bool_]) -> list[int]:
        """List the network timesteps of the steps at which any image has this flag."""
        return self.timesteps[flags.any(1)].tolist()

    def to_dict(self) -> dict[str, Any]:
        """Convert to numbers and lists for JSON. Values that are not finite become None."""
        known = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in asdict(self).items()}
        known["residual"] = [[r if np.isfinite(r) else None for r in row] for row in known["residual"]]
        return known

    def __str__(self) -> str:
        """Format a table with a line for each step, with the largest residual and evaluations of any image."""
        lines = ["timestep  residual  evaluations"]
        for i, t in enumerate(self.timesteps):
            notes = {"not converged": ~self.converged[i], "at its floor": self.at_floor[i]}
            marks = [f"{note} ({flags.sum()} of {len(flags)})" for note, flags in notes.items() if flags.any()]
            is_naive, residual = np.isnan(self.residual[i]).any(), f"{self.residual[i].max():8.1e}"
            residual, marks = ("       –", []) if is_naive else (residual, marks)
            lines.append(f"{t:8g}  {residual}  {self.evaluations[i].max():11d}  {', '.join(marks)}".rstrip())
        latents = f"mean {self.latent_mean.mean():.3f}, standard deviation {self.latent_std.mean():.3f}"
        evaluations = f"evaluations for an image: {self.total_evaluations.mean():.1f}"
        return "\n".join([*lines, f"{evaluations}; tolerance {self.tolerance:g}; latents: {latents}"])
