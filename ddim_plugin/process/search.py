"""The subsequence τ along which a multistep method errs least, by dynamic programming (Watson et al. 2021).

Costs of steps add up, so the best path of S steps down to t is the best of S − 1 steps down to some u > t and one more.
The cost of a step is the error of the multistep method along known solutions of the ODE, and depends on the steps
before it too.
"""

from collections.abc import Callable, Sequence
from itertools import combinations, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import multistep as ode

Array = NDArray[np.float64]


class Found(NamedTuple):
    """The best τ, S increasing times in 1..T, and its cost."""

    tau: NDArray[np.int64]
    cost: float


# ---- few steps -----------------------------------------------------------------------------------------------------

VARIANCE = 10.0  # variance of Gaussian data that weights an error at time t by its remainder in the image


class Trajectories(NamedTuple):
    """Solutions of the ODE (Eq. 14) at n decreasing times, all pixels of all images in one row."""

    times: NDArray[np.int64]  # (n,), 1..T
    x: Tensor  # (n, d)
    eps: Tensor  # ε̂ at those, (n, d)
    start: Tensor  # x_T, (d,)
    end: Tensor  # x_0, (d,)


def search_trajectories(alpha_bar: Array, path: Trajectories, largest: int, noise: float) -> list[Found]:
    """Find, for S = 1..`largest`, the τ along which the multistep method of order 3 errs least.

    The method approximates ε̂ in the coordinate "bounded" and starts from T (see `MultistepDDIMScheduler`). The cost of
    a step is the mean square of its error along the solutions, weighted by its remainder at the data.

    τ is chosen among `path.times`, and ends at a time with ᾱ ≤ `noise` or at the highest one. Raises ValueError for
    more steps than times.
    """
    n, alpha_bar = len(path.times), np.asarray(alpha_bar)
    if not 1 <= largest <= n:
        raise ValueError(f"a path over {n} times has 1..{n} moves, not {largest}")
    levels = alpha_bar[path.times]
    nsr = np.append(np.sqrt(1 / levels - 1), 0.0)
    left = 1 / np.sqrt(1 + nsr**2 / VARIANCE)
    scaled = path.x.double() / torch.tensor(np.sqrt(levels)).to(path.x.device)[:, None]
    basis = torch.cat([path.eps.double(), scaled, path.end.double()[None], path.start.double()[None]])
    gram = (basis @ basis.T / basis.shape[1]).cpu().numpy()
    ends, known = [*levels.tolist(), 1.0], {}

    def costs(values: int, from_top: bool) -> Array:
        """Compute the costs of steps that use the last `values` values, shape (n, …, n + 1)."""
        each_path = list(combinations(range(n + 1), values + 1))
        table = np.full((n,) * values + (n + 1,), np.inf)
        if not each_path:
            return table
        for each in each_path:
            if each not in known:
                *values_at, t, s = [ends[node] for node in (*each[:-1], *each[-2:])]
                known[each] = ode.mean_weights("epsilon", "bounded", t, s, values_at[::-1])[::-1]
        paths, weights = np.array(each_path), np.array([known[each] for each in each_path])
        step = nsr[paths[:, -1]] - nsr[paths[:, -2]]
        terms = np.concatenate([paths[:, :-1], n + paths[:, -2:]], axis=1)
        if from_top:
            terms[:, 0] = 2 * n + 1
        factors = np.concatenate([weights * step[:, None], np.ones((len(paths), 1)), -np.ones((len(paths), 1))], axis=1)
        squares = np.einsum("ki,kij,kj->k", factors, gram[terms[:, :, None], terms[:, None, :]], factors)
        table[tuple(paths.T)] = np.maximum(squares, 0) * left[paths[:, -1]] ** 2
        return table

    # For x_T the network predicts ε̂ ≈ x_T at the first time, and the solution has another ε̂.
    start = gram[2 * n + 1, 2 * n + 1] + np.diag(gram)[:n] - 2 * gram[2 * n + 1, :n]
    first = np.maximum(start, 0) * (nsr[:n] * left[:n]) ** 2
    first[1:][levels[1:] > noise] = np.inf

    found: list[Found] = []
    best, came = first, []
    later = costs(3, False) if largest > 3 else None
    for S in range(1, largest + 1):
        total = best[..., None] + (costs(S, True) if S <= 3 else later)
        last = total[..., n]
        place = np.unravel_index(int(last.argmin()), last.shape)
        found.append(Found(_trace(path.times, place, came), float(last[place])))
        best = total[..., :n]
        if S >= 3:  # the last three nodes are all that matters from here on
            came.append(best.argmin(axis=0))
            best = best.min(axis=0)
    return found


def _trace(times: NDArray[np.int64], place: Sequence[Any], came: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Trace the increasing τ that ends with the nodes `place` through the earlier choices."""
    nodes = [int(i) for i in place]
    for back in reversed(came):
        nodes.insert(0, int(back[tuple(nodes[:3])]))
    return np.array(sorted(times[nodes]), dtype=np.int64)


def descend(tau: Sequence[int], T: int, cost: Callable[[list[int]], float], rounds: int = 3) -> tuple[list[int], float]:
    """Move the times of τ one by one to a lower `cost`, by a third of a gap and then less.

    Each of `rounds` evaluates `cost` at most twice for each time of τ.

    Returns:
        τ and its cost.
    """
    best, tau = cost(list(tau)), list(tau)
    step = max(1, (tau[-1] - tau[0]) // (3 * max(1, len(tau) - 1)))
    for _ in range(rounds):
        for i in reversed(range(len(tau))):
            for change in (-step, step):
                moved = [*tau[:i], tau[i] + change, *tau[i + 1 :]]
                if not 1 <= moved[i] <= T or any(low >= high for low, high in pairwise(moved)):
                    continue
                found = cost(moved)
                if found < best:
                    best, tau = found, moved
                    break
        step = max(1, step // 2)
    return tau, best
