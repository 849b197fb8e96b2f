"""The subsequence τ with the smallest variational bound, by dynamic programming (Watson et al. 2021)."""

import numpy as np
from numpy.typing import NDArray

from ddim_plugin.process import moves as process
from ddim_plugin.process.gaussian import BITS
from ddim_plugin.process.search import Array, Found

from .bound import Errors, prior_nats, transition_nats


def best_paths(costs: Array, start: Array, largest: int) -> list[Found]:
    """The best τ of S = 1..`largest` moves.

    Args:
        costs: costs[t, s] of a move from t down to s < t, (T + 1, T + 1); infinite where there is none.
        start: start[t] of beginning at t, (T + 1,).
        largest: the largest S, at most T.

    Raises:
        ValueError: where no path of that many moves exists.
    """
    T = len(costs) - 1
    if not 1 <= largest <= T:
        raise ValueError(f"a path over {T} times has 1..{T} moves, not {largest}")
    costs = np.where(np.tri(T + 1, k=-1, dtype=bool), costs, np.inf)
    costs = np.where(np.isnan(costs), np.inf, costs)
    best = np.asarray(start, dtype=np.float64)
    best = np.where(np.arange(T + 1) == 0, np.inf, best)
    came: list[NDArray[np.int64]] = []
    found = []
    for _ in range(largest):
        total = best[:, None] + costs
        came.append(total.argmin(axis=0))
        best = total.min(axis=0)
        if not np.isfinite(best[0]):
            raise ValueError(f"there is no path of {len(came)} moves with finite costs")
        times, t = [], 0
        for back in reversed(came):
            t = int(back[t])
            times.append(t)
        found.append(Found(np.array(times, dtype=np.int64), float(best[0])))
    return found


def bound_costs(
    alpha_bar: Array, errors: Errors, variance_type: str = "fixed_small", eta: float = 1.0
) -> tuple[Array, Array]:
    """Costs of all moves, (T + 1, T + 1), and of beginning at each time, (T + 1,), in bits per dimension.

    Their sum over a path is the variational bound of the sampler along it, with the decoder `errors` found best.
    """
    T = len(alpha_bar) - 1
    t, s = np.arange(1, T + 1)[:, None], np.arange(T + 1)[None, :]
    costs = np.full((T + 1, T + 1), np.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        nats = transition_nats(alpha_bar, t, s, errors.x0[1:, None], variance_type, eta, errors.eps_mean_square)
        costs[1:] = np.where((s < t) & (s > 0), nats, np.inf)
        costs[1:, 0] = errors.decoder[1:]
        start = prior_nats(np.asarray(alpha_bar), errors.x0_mean_square)
    return costs * BITS, start * BITS


def bound_of(alpha_bar: Array, tau: NDArray[np.int64], costs: Array, start: Array) -> float:
    """The bound along τ, in bits per dimension, from `bound_costs`."""
    pairs = process.downwards(np.asarray(tau))
    return float(start[pairs[0][0]] + sum(costs[t, s] for t, s in pairs))


def search_bound(
    alpha_bar: Array, errors: Errors, largest: int, variance_type: str = "fixed_small", eta: float = 1.0
) -> list[Found]:
    """For S = 1..`largest`, the τ with the smallest variational bound, and the bound in bits per dimension."""
    return best_paths(*bound_costs(alpha_bar, errors, variance_type, eta), largest)
