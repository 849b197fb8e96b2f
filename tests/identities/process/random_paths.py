"""Random Gaussian paths, times on them, and η: what theorems are tested on."""

import numpy as np
from hypothesis import strategies as st

from ddim_plugin.process import betas, moves
from ddim_plugin.process.paths import Level, Path, flow_matching, square_root, variance_exploding, variance_preserving

KINDS = ("variance preserving", "flow", "variance exploding", "square root", "monotone", "any")


@st.composite
def paths(draw, kinds=KINDS, max_T=40):
    """A path of one of these kinds.

    "monotone" has any decreasing a and increasing b, from any first level. "any" has any positive a, and any increasing
    ς = b/a, which is all that the process needs.
    """
    kind, T = draw(st.sampled_from(kinds)), draw(st.integers(1, max_T))
    if kind == "variance preserving":
        return variance_preserving(betas.alpha_bar(np.array(draw(numbers(1e-5, 0.7, T)))))
    if kind == "flow":
        return flow_matching(T)
    if kind == "variance exploding":
        sigma_min = draw(st.floats(1e-3, 1))
        return variance_exploding(T, sigma_min, sigma_min * draw(st.floats(2, 1e4)))
    if kind == "square root":
        return square_root(T)
    if kind == "monotone":
        first = draw(st.sampled_from([(1.0, 0.0), (0.9, 0.1)]))
        signal = np.cumprod([first[0], *draw(numbers(0.5, 1, T))])
        return Path(Level(signal, np.cumsum([first[1], *draw(numbers(1e-3, 2, T))])))
    signal = np.array([1.0, *draw(numbers(0.1, 10, T))])
    return Path(Level(signal, signal * np.cumsum([0.0, *draw(numbers(1e-3, 2, T))])))


def numbers(low, high, count):
    return st.lists(st.floats(low, high), min_size=count, max_size=count)


@st.composite
def pairs(draw, path, max_size=12):
    """Steps (t, s) down to the data along a random subsequence: of real times on the flow path."""
    T = path.T
    if isinstance(path, type(flow_matching(1))):
        times = [T * k / 500 for k in draw(st.sets(st.integers(1, 500), min_size=1, max_size=max_size))]
    else:
        times = draw(st.sets(st.integers(1, T), min_size=1, max_size=max_size))
    return moves.downwards(np.array(sorted(times)))


@st.composite
def chains(draw, kinds=KINDS):
    """(path, steps, η): any η that every one of these steps allows."""
    path = draw(paths(kinds))
    steps = draw(pairs(path))
    limit = min(moves.max_eta(path.level(t), path.level(s)) for t, s in steps)
    return path, steps, draw(st.floats(0, 1)) * min(limit, 2.0)
