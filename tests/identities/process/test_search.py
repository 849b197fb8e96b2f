"""τ for few steps: the dynamic programming against trying all, and the descent."""

import itertools

import numpy as np
import pytest
import torch
from oracle import alphas, linear_betas

from ddim_plugin.process.multistep import mean_weights
from ddim_plugin.process.search import VARIANCE, Trajectories, descend, search_trajectories

ALPHA = np.array(alphas(linear_betas()))
TIMES = np.array([1000, 900, 800, 600, 400, 150, 30])


@pytest.fixture(scope="module")
def path():
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(2 * len(TIMES) + 2, 11, generator=generator, dtype=torch.float64)
    return Trajectories(TIMES, draws[: len(TIMES)], draws[len(TIMES) : -2], draws[-2], draws[-1])


def by_definition(path, nodes):
    """The start, and each move's error along the solutions at x/√α, times what is left of it at the data."""
    nsr = np.append(np.sqrt(1 / ALPHA[TIMES] - 1), 0.0)
    bars = [x / ALPHA[t] ** 0.5 for x, t in zip(path.x, TIMES, strict=True)] + [path.end]
    left = 1 / (1 + nsr**2 / VARIANCE)
    eps = list(path.eps)
    cost = float((nsr[nodes[0]] * (path.start - eps[nodes[0]])).square().mean()) * left[nodes[0]]
    eps[nodes[0]] = path.start
    ends = [*nodes, len(TIMES)]
    for i, (t, s) in enumerate(itertools.pairwise(ends)):
        known = ends[max(0, i - 2) : i + 1][::-1]
        alpha_s = 1.0 if s == len(TIMES) else ALPHA[TIMES[s]]
        weights = mean_weights("epsilon", "bounded", ALPHA[TIMES[t]], alpha_s, [ALPHA[TIMES[k]] for k in known])
        mean = sum(w * eps[k] for w, k in zip(weights.tolist(), known, strict=True))
        error = bars[t] + (nsr[s] - nsr[t]) * mean - bars[s]
        cost += float(error.square().mean()) * left[s]
    return cost


@pytest.mark.parametrize("noise", [1e-3, 1.0])
def test_the_search_finds_what_trying_all_finds(path, noise):
    found = search_trajectories(ALPHA, path, len(TIMES), noise)
    for S, each in enumerate(found, 1):
        tried = {
            nodes: by_definition(path, nodes)
            for nodes in itertools.combinations(range(len(TIMES)), S)
            if nodes[0] == 0 or ALPHA[TIMES[nodes[0]]] <= noise
        }
        best = min(tried, key=tried.get)
        assert each.tau.tolist() == sorted(TIMES[list(best)].tolist())
        assert each.cost == pytest.approx(tried[best], rel=1e-9)


def test_more_steps_than_times(path):
    for largest in (0, 8):
        with pytest.raises(ValueError, match=f"a path over 7 times has 1..7 moves, not {largest}"):
            search_trajectories(ALPHA, path, largest, 1e-3)


def test_the_descent_goes_down_and_stays_in_order():
    goal, seen = np.array([40, 300, 620, 990]), []

    def cost(tau):
        seen.append(tau)
        assert all(low < high for low, high in itertools.pairwise([0, *tau, 1001]))
        return float(np.square(np.array(tau) - goal).sum())

    tau, reached = descend([100, 400, 700, 1000], 1000, cost, rounds=8)
    assert reached == cost(tau) == min(map(cost, list(seen)))
    assert np.abs(np.array(tau) - goal).max() <= 10
    assert descend([1], 1, lambda tau: 0.0) == ([1], 0.0)
