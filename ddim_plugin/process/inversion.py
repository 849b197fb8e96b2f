"""Exact inversion: for each move x_s = f(x_t) of the sampler, the x_t that gives a known x_s.

The naive inverse evaluates the network at the known end, and its error is the paper's Table 2. Here f(x_t) = x_s is
solved by a fixed-point iteration x ← x + γ(x_s − f(x)) under Anderson acceleration (Walker & Ni 2011), each image on
its own. f is the sampler's own step, rounding and all, so that what is found is what the sampler will undo. On the move
to the data f ends with the clamp to −1..1 that makes an image of x_0: a black pixel asks for x̂0 ≤ −1, not for −1.

That move is where an inverse may not exist, since a picture need not lie in the range of x̂0(·, τ_1); the lower τ_1, the
nearer it does. Where f′ is small, a small residual takes a large change of x_t. The search starts at the naive inverse
and ends when it makes no more progress; the report gives the deviation of the latents beside the residuals, since
latents that leave the shell of noise are worth less.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .gaussian import precise

MEMORY = 5
"""Earlier iterates that an accelerated one is made from."""

PATIENCE = 6
"""Evaluations over which the residual must make `PROGRESS`, or the search for an image ends."""

SETTLED = 3
"""The same, to tell whether an image is at its floor after a search of no more than `PATIENCE` evaluations."""

PROGRESS = 0.9
"""Factor by which the smallest residual must fall to count as progress."""

GROWTH = 2.0
"""Factor over the best residual at which an iteration is taken back to its best iterate, with half the step."""

VARIANCE = 100.0
"""Variance of data, along the direction it varies most, for which the plain iteration is made to converge."""

Residual = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(x, rows) ↦ (x_s − f(x), the network's output at x) for the images `rows`, indices into the batch."""


@dataclass(frozen=True)
class Solution:
    """x_t for one move: the iterate of the smallest residual of each image, and how it was come by; arrays are (B,)."""

    x: Tensor
    output: Tensor  # the network's, at x
    residual: NDArray[np.float64]  # root mean square of x_s − f(x_t)
    evaluations: NDArray[np.int64]
    at_floor: NDArray[np.bool_]  # no progress at the end
    damped: NDArray[np.bool_]  # grew at least once, and was taken back

    def report(self, tolerance: float, unit: float, cost: int, guessed: bool) -> "MoveReport":
        """The report of this move, whose residual is in multiples of `unit`; an evaluation counts `cost` times."""
        residual, evaluations = self.residual / unit, (self.evaluations + guessed) * cost
        return MoveReport(residual, evaluations, residual <= tolerance, self.at_floor, self.damped)


def step_size(alpha_bar_t: float, alpha_bar_s: float) -> float:
    """γ = 2/(m + M), where f′ lies in [m, M] for Gaussian data of variance 0 to `VARIANCE` with the exact ε̂.

    For data of variance v, f′ = (√(ᾱ_s·ᾱ_t)·v + √((1 − ᾱ_s)(1 − ᾱ_t)))/(ᾱ_t·v + 1 − ᾱ_t).
    """

    def slope(v: float) -> float:
        signal, noise = np.sqrt(alpha_bar_s * alpha_bar_t), np.sqrt((1 - alpha_bar_s) * (1 - alpha_bar_t))
        return float((signal * v + noise) / (alpha_bar_t * v + 1 - alpha_bar_t))

    return 2 / (slope(0.0) + slope(VARIANCE))


def solve(residual: Residual, guess: Tensor, step: float, tolerance: float, evaluations: int) -> Solution:
    """The x of the smallest residual found from `guess`, (B, C, H, W), with `evaluations` ≥ 1 calls at most.

    An image is done when the root mean square of its residual is at most `tolerance`, or has stopped falling. One
    whose residual grows goes on from its best iterate with half the `step` γ, and without its history; so the result
    is never worse than the guess. Images do not enter each other's iterations.
    """
    B = len(guess)
    best, best_residual, best_output = guess.clone(), torch.zeros_like(guess), torch.empty(0)
    smallest, spent = np.full(B, np.inf), np.zeros(B, np.int64)
    falls: list[NDArray[np.float64]] = []  # the smallest residuals after each evaluation
    damped, born, gamma = np.zeros(B, bool), np.zeros(B, np.int64), np.full(B, step)
    active, x = np.arange(B), guess
    history: list[tuple[Tensor, Tensor]] = []  # (x, residual) of the active images, the newest last
    for i in range(evaluations):
        rows = torch.as_tensor(active, device=guess.device)
        r, output = residual(x, rows)
        if i == 0:
            best_output = output.clone()
        size = root_mean_square(r)
        spent[active] += 1
        grown = ~(size <= GROWTH * smallest[active])  # NaN has grown
        better = size < smallest[active]
        smallest[active] = np.where(better, size, smallest[active])
        falls.append(smallest.copy())
        keep = torch.as_tensor(better, device=guess.device)
        kept = rows[keep]
        best[kept], best_residual[kept], best_output[kept] = x[keep], r[keep], output[keep]

        lost = active[grown]
        damped[lost], born[lost] = True, i
        gamma[lost] /= 2
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
    return Solution(best, best_output, smallest, spent, settled & ~(smallest <= tolerance), damped)


def _settled(
    falls: list[NDArray[np.float64]], spent: NDArray[np.int64], window: int | NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Which images' smallest residuals made no `PROGRESS` over the last `window` of their `spent` evaluations."""
    images, before = np.arange(len(spent)), spent - 1 - window
    earlier = np.stack(falls)[np.maximum(before, 0), images]
    return (before >= 0) & ~(falls[-1] < PROGRESS * earlier)


def _next(history: list[tuple[Tensor, Tensor]], gamma: NDArray[np.float64], known: NDArray[np.bool_]) -> Tensor:
    """x̄ + γ·r̄, for the combination x̄ of earlier iterates whose residual r̄ is smallest, if residuals were linear.

    `known`, (B, len(history) − 1), says which earlier iterates count.
    """
    x, r = history[-1]
    work = precise(x)
    shape = (-1, *[1] * (x.ndim - 1))
    new, mean_r = x.to(work), r.to(work)
    if known.any():
        counts = torch.as_tensor(known, device=x.device)
        changes = torch.stack([(past - r).flatten(1) for _, past in history[:-1]], 1).to(work)
        changes = torch.where(counts[..., None], changes, torch.zeros_like(changes))
        gram, right = changes @ changes.mT, changes @ mean_r.flatten(1)[..., None]
        weights = _weights(gram.cpu().double(), right.cpu().double(), torch.finfo(work).eps).to(work).to(x.device)
        for j, (past_x, past_r) in enumerate(history[:-1]):
            weight, counted = weights[:, j].view(shape), counts[:, j].view(shape)
            new = new + torch.where(counted, weight * (past_x - x), torch.zeros_like(new))
            mean_r = mean_r + torch.where(counted, weight * (past_r - r), torch.zeros_like(mean_r))
    step = torch.as_tensor(gamma).to(work).to(x.device).view(shape)
    return (new + step * mean_r).to(x.dtype)


def _weights(gram: Tensor, right: Tensor, eps: float) -> Tensor:
    """−(G + ridge)⁻¹·right of each image, (B, m): a few numbers, whose errors relative to G are `eps`."""
    diagonal = gram.diagonal(dim1=1, dim2=2)
    ridge = torch.where(diagonal > 0, max(1e-10, 10 * eps) * diagonal, torch.ones_like(diagonal))
    return -torch.linalg.solve(gram + torch.diag_embed(ridge), right)[..., 0]


def root_mean_square(x: Tensor) -> NDArray[np.float64]:
    """√mean(x²) of each image, (B,)."""
    return x.to(precise(x)).flatten(1).pow(2).mean(1).sqrt().cpu().numpy().astype(np.float64)


class MoveReport(NamedTuple):
    """How one move went, for each image; see `InversionReport`."""

    residual: NDArray[np.float64]
    evaluations: NDArray[np.int64]
    converged: NDArray[np.bool_]
    at_floor: NDArray[np.bool_]
    damped: NDArray[np.bool_]


def naive(B: int, evaluations: int) -> MoveReport:
    """The report of a move taken with the network at its lower end: its residual is not known."""
    no = np.zeros(B, bool)
    return MoveReport(np.full(B, np.nan), np.full(B, evaluations), no, no, no)


def nothing(B: int) -> MoveReport:
    """The report of a move between times of the same ᾱ, which changes nothing."""
    no = np.zeros(B, bool)
    return MoveReport(np.zeros(B), np.zeros(B, np.int64), ~no, no, no)


def report(timesteps: list[int], moves: list[MoveReport], tolerance: float, latents: Tensor) -> "InversionReport":
    """The report of an encoding from those of its moves."""
    whole = MoveReport(*(np.stack(column) for column in zip(*moves, strict=True)))
    rows = latents.cpu().double().flatten(1).numpy()
    return InversionReport(np.array(timesteps), *whole, tolerance, rows.mean(1), rows.std(1))


def join(reports: Sequence["InversionReport"]) -> "InversionReport":
    """The report of several batches encoded along the same τ with the same tolerance."""
    first = reports[0]
    images = {
        field.name: np.concatenate([getattr(each, field.name) for each in reports], axis=-1)
        for field in fields(first)
        if field.name not in ("timesteps", "tolerance")
    }
    return InversionReport(timesteps=first.timesteps, tolerance=first.tolerance, **images)


@dataclass(frozen=True)
class InversionReport:
    """How each move of an encoding went, in the order they were made; arrays are (moves, B).

    Attributes:
        timesteps: the network time each move ends at, (moves,).
        residual: root mean square of (x_s − f(x_t))/√ᾱ_s, in units of the network's images (−1..1); NaN where it was
            not measured (the naive inverse).
        evaluations: network evaluations spent; a guided one counts twice.
        converged: whether the residual reached `tolerance`.
        at_floor: whether it had stopped falling above that, by 10 % at least over the last evaluations made.
        damped: whether an iteration grew and was taken back.
        tolerance: the residual that was asked for.
        latent_mean, latent_std: of each latent, (B,): 0 and 1 for one that lies where noise does.
    """

    timesteps: NDArray[np.int64]
    residual: NDArray[np.float64]
    evaluations: NDArray[np.int64]
    converged: NDArray[np.bool_]
    at_floor: NDArray[np.bool_]
    damped: NDArray[np.bool_]
    tolerance: float
    latent_mean: NDArray[np.float64]
    latent_std: NDArray[np.float64]

    @property
    def total_evaluations(self) -> NDArray[np.int64]:
        """Network evaluations spent on each image, (B,)."""
        return self.evaluations.sum(0)

    def where(self, flags: NDArray[np.bool_]) -> list[int]:
        """The network times of the moves for which any image has this flag."""
        return self.timesteps[flags.any(1)].tolist()

    def to_dict(self) -> dict[str, Any]:
        """Everything as numbers and lists, for JSON; what is not finite as None."""
        known = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in asdict(self).items()}
        known["residual"] = [[r if np.isfinite(r) else None for r in row] for row in known["residual"]]
        return known

    def __str__(self) -> str:
        """A table with a line for each move: the worst image's residual, evaluations, and what to know of it."""
        lines = ["timestep  residual  evaluations"]
        for i, t in enumerate(self.timesteps):
            notes = {"not converged": ~self.converged[i], "at its floor": self.at_floor[i], "damped": self.damped[i]}
            said = [f"{note} ({flags.sum()} of {len(flags)})" for note, flags in notes.items() if flags.any()]
            naive = np.isnan(self.residual[i]).any()
            residual = "       –" if naive else f"{self.residual[i].max():8.1e}"
            lines.append(
                f"{t:8d}  {residual}  {self.evaluations[i].max():11d}  {'' if naive else ', '.join(said)}".rstrip()
            )
        lines.append(
            f"evaluations for an image: {self.total_evaluations.mean():.1f}; tolerance {self.tolerance:g}; latents: "
            f"mean {self.latent_mean.mean():.3f}, standard deviation {self.latent_std.mean():.3f}"
        )
        return "\n".join(lines)
