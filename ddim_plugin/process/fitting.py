"""Fit a multistep solver to the trajectories of a model, by least squares.

On every Gaussian path y = x/√(a² + b²) at the angle φ with tan φ = b/a obeys dy/dφ = v = cos φ·ε̂ − sin φ·x̂0, from
φ = π/2 (noise) to φ = 0 (data), with the same x̂0 and ε̂. A step of the solver is a linear combination of x̂0, ε̂ and
earlier ε̂. Its distance from a trajectory depends on mean products of y and v only, computed once for all times.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from .spacings import Array

RIDGE = 1e-6  # weight of the distance to the prior weights, relative to the mean squares of the values
SPREADS = (4.0, 1.5, 0.5)  # deviations of the data, for which the search assumes how errors travel to the data


def least_squares(products: Array, right: Array, prior: Array) -> Array:
    """Solve for the weights of values with these mean `products`, and `right` with the target, near the prior."""
    scale = np.sqrt(np.maximum(np.diag(products), 1e-30))  # conditions the system
    matrix = products / np.outer(scale, scale) + RIDGE * np.eye(len(scale))
    return prior + np.linalg.lstsq(matrix, (right - products @ prior) / scale, rcond=1e-12)[0] / scale


@dataclass(frozen=True)
class Curve:
    """Mean products of y and v at M descending angles, down to the data: `products` is (2M, 2M), y before v."""

    angles: Array
    products: Array

    def at(self, phi: float) -> tuple[Array, Array]:
        """Return the weights of all y and v, (2M,), that interpolate y (cubic) and v (linear) at an angle."""
        M, i = len(self.angles), int(np.clip(np.searchsorted(-self.angles, -phi) - 1, 0, len(self.angles) - 2))
        gap = self.angles[i + 1] - self.angles[i]
        u, (y, v) = (phi - self.angles[i]) / gap, np.zeros((2, 2 * M))
        y[[i, i + 1]] = 1 - u * u * (3 - 2 * u), u * u * (3 - 2 * u)
        y[[M + i, M + i + 1]] = gap * u * (1 - u) ** 2, -gap * u * u * (1 - u)
        v[[M + i, M + i + 1]] = 1 - u, u
        return y, v

    def error(self, angles: Sequence[float], order: int, spread: float) -> float:
        """Estimate the root mean square error at the data of a solver with the best weights.

        The first sample is at the first angle of the curve, the network is evaluated at `angles`. The error of a step
        travels to the data as for Gaussian data of deviation `spread`, and errors add up half of the way.
        """
        top, bottom = self.angles[[0, -1]]
        known, values, residuals = [self.at(each) for each in (*angles, bottom)], [], []
        for phi, end, (y, v), (goal, _) in zip(angles, (*angles[1:], bottom), known[:-1], known[1:], strict=True):
            x0, eps = math.cos(phi) * y - math.sin(phi) * v, math.sin(phi) * y + math.cos(phi) * v
            eps = eps if values or top == phi else (self.at(top)[0] - math.cos(top) * x0) / math.sin(top)
            values = [eps, *values][:order]
            basis, prior = np.array([x0, *values]), np.array([math.cos(end), math.sin(end), *[0] * (len(values) - 1)])
            products = basis @ self.products
            weights = least_squares(products @ basis.T, products @ goal, prior)
            residuals.append((goal - weights @ basis) * spread / math.hypot(spread * math.cos(end), math.sin(end)))
        errors = np.array(residuals) @ self.products @ np.array(residuals).T
        return math.sqrt(max(0.0, (errors.sum() + np.trace(errors)) / 2))


def descend(times: Sequence[float], cost: Callable[[Sequence[float]], float], step: float, least: float) -> list[float]:
    """Move descending times but the first one by one to a lower cost, by `step` and then less, down to `least`."""
    best, lowest = list(times), cost(times)
    while step >= least and len(best) > 1:
        moved = False
        for i, change in product(range(1, len(best)), (-step, step)):
            trial = [*best[:i], best[i] + change, *best[i + 1 :]]
            apart = all(high - low >= least for high, low in zip(trial, (*trial[1:], 0), strict=True))
            if apart and (found := cost(trial)) < lowest:
                best, lowest, moved = trial, found, True
        step = step if moved else step / 2 if least < 1 else step // 2
    return best


def refine(theta: Array, steps: Array, residual: Callable[[Array], Array], deadline: float) -> Array:
    """Reduce the mean square of `residual`, a vector, by Gauss–Newton steps with finite differences and damping.

    `steps` are the differences of the parameters. A round takes one call of `residual` for each parameter, and one or
    more for the step. It ends at the `deadline`, of `time.monotonic`, or where a round gains less than 1%.
    """
    best, damping = residual(theta), 1e-3
    while True:
        slopes = []
        for change in np.diag(steps):
            if time.monotonic() > deadline:
                return theta
            slopes.append((residual(theta + change) - best) / change.sum())
        slopes, before = np.array(slopes), np.square(best).mean()
        matrix, right = slopes @ slopes.T, slopes @ best
        for _ in range(4):
            change = np.linalg.solve(matrix + damping * np.diag(np.diag(matrix) + 1e-12), right)
            found = residual(theta - change)
            if np.square(found).mean() < np.square(best).mean():
                theta, best, damping = theta - change, found, damping / 4
                break
            damping *= 10
        if not np.square(best).mean() < 0.98 * before:
            return theta
