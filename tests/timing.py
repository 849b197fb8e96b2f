"""Alternating runs: A, B, A, B, …, so that a comparison holds while the machine's speed drifts.

DDIM_BENCH_KEEP=out/bench.jsonl make bench; python tests/timing.py out/bench.jsonl training/measured/speed
"""

import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

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


def keep(test: str, taken: dict[str, float], **settings: Any) -> None:
    """Append what was measured to the file that DDIM_BENCH_KEEP names, if it names one."""
    if file := os.environ.get("DDIM_BENCH_KEEP"):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        with open(file, "a") as lines:
            lines.write(json.dumps({"test": test, **settings, "rounds": ROUNDS, "ratios": taken}) + "\n")


def collect(lines: list[str]) -> dict[str, Any]:
    """What was kept, with the machine and versions."""
    machine = {"processor": platform.machine(), "cpus": os.cpu_count(), "threads": torch.get_num_threads()}
    return {"machine": machine, "torch": torch.__version__, "measured": [json.loads(line) for line in lines]}


def table(result: dict[str, Any]) -> str:
    """In Markdown how often our step fits into the stock one, and what the multistep one and the pipeline add."""
    steps = [each for each in result["measured"] if each["test"] == "step"]
    kinds = list(dict.fromkeys((each["eta"], each["clip"]) for each in steps))
    heads = [f"η = {eta:g}{', clipped' if clip else ''}" for eta, clip in kinds]
    lines = ["The stock step over ours:", "", "| sample | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for shape in dict.fromkeys(tuple(each["shape"]) for each in steps):
        row = {(each["eta"], each["clip"]): each["ratios"]["stock"] for each in steps if tuple(each["shape"]) == shape}
        lines.append(f"| {'×'.join(map(str, shape))} | " + " | ".join(f"{row[kind]:.1f}" for kind in kinds) + " |")
    loops = [each for each in result["measured"] if each["test"] == "multistep"]
    names = [name for name in loops[0]["ratios"] if name != "generalized"]
    lines += ["", "Plan and ten steps over those of `GeneralizedDDIMScheduler`:", ""]
    lines += ["| sample, prediction | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for each in loops:
        cells = " | ".join(f"{each['ratios'][name]:.2f}" for name in names)
        lines.append(f"| {'×'.join(map(str, each['shape']))}, {each['prediction_type']} | {cells} |")
    lines += [
        "",
        "The pipeline's own share, over the network alone:",
        "",
        "| network | ours | stock |",
        "|---|---|---|",
    ]
    for each in (each for each in result["measured"] if each["test"] == "pipeline"):
        own, stock = (each["ratios"][f"{name} without"] for name in ("ours", "stock"))
        lines.append(f"| {each['network']}, batch {each['batch']}, S = {each['steps']} | {own:.2%} | {stock:.2%} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    made = collect(Path(sys.argv[1]).read_text().splitlines())
    folder = Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "speed.json").write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n")
    (folder / "speed.md").write_text(table(made))
