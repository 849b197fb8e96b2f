"""Alternating runs: A, B, A, B, …, so that a comparison holds while the machine's speed drifts."""

import os
import time
from collections.abc import Callable
from statistics import median

ROUNDS = int(os.environ.get("DDIM_BENCH_ROUNDS", "1"))
"""Times each function is run by a benchmark; `make bench` sets it, the tests only see that the benchmarks work."""


def ratios(functions: dict[str, Callable[[], object]], base: str, rounds: int) -> dict[str, float]:
    """Each function's seconds over those of `base`: the median over rounds, each compared within the round."""
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            taken[name].append(time.perf_counter() - start)
    return {
        name: median(mine / other for mine, other in zip(seconds, taken[base], strict=True))
        for name, seconds in taken.items()
    }
