"""Compare, at few steps, every training-free sampler of diffusers with ours, on the same weights and x_T.

python training/few_steps.py --model out/mnist --reference my/mnist --extractor my/classifier --output out/few

Each sampler of diffusers has its own best of its grids, for each number of network evaluations and each measure. The
measures are the root mean square distance to the converged solution of the ODE, over pixels in −1..1, and the Fréchet
distance.

1. Every sampler without noise is measured by the first, on `near` images in float32.
2. Those within `margin` of diffusers' best, and those that add noise, are screened by the second on `screen` images.
   Noisy samplers beyond `margin` of the best are not screened again at the next number.
3. Diffusers' `shortlist` best, the best of DDIM (or of flow matching's Euler) and ours are measured on `draws` sets of
   `images` others, which did not choose them. The table shows the mean, and its standard error, pooled over all
   samplers. Diffusers' best is chosen by these means, so its value is a little too low.

With --thousand, 1000 steps are measured too. With --beside, ours are compared with ours on another model, such as the
same network on another path. The same command resumes a run that was stopped. After a change of our own code pass
--overwrite. A model with fitted solvers (`ddim-plugin fit`, with a seed far from this one) is also measured with them.
"""

import guard

if __name__ == "__main__":
    guard.start()  # before the imports that take seconds

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guard.progress import Progress
from guard.reading import read_object
from guard.writing import write_file
from measure.comparison.bench import SOLUTIONS, Bench, BenchSettings
from measure.comparison.samplers import FAMILIES, PLAIN, Sampler, is_flow, is_stock, samplers
from measure.comparison.tables import entries, plot, relative_errors, table
from measure.parts import DTYPES
from trainer.settings import command, parse, record, write_json

SCREENED = 2**24
"""Number of the first image of the screening, far from those that the best are measured on."""


@dataclass(frozen=True)
class FewStepsConfig(BenchSettings):
    """Compare samplers at few evaluations of the network."""

    nfe: tuple[int, ...] = field(default=(5, 6, 8, 10, 12, 15, 20), metadata={"help": "network evaluations"})
    shortlist: int = field(default=6, metadata={"help": "samplers of diffusers that are measured on all images"})
    margin: float = field(default=2.0, metadata={"help": "times diffusers' best, beyond which samplers are left out"})
    thousand: tuple[float, ...] = field(default=(), metadata={"help": "η of 1000 steps to compare with, as 0 1"})
    families: tuple[str, ...] = field(default=(), metadata={"help": "only samplers whose family begins so; all"})
    beside: str | None = field(default=None, metadata={"help": "few_steps.json of another model, to compare with"})


def check(config: FewStepsConfig) -> None:
    """Check the settings. Raises ValueError for those that cannot work."""
    if config.dtype not in DTYPES:
        raise ValueError(f"unknown dtype {config.dtype!r}: use one of {', '.join(DTYPES)}")
    for name in ("near", "draws", "batch_size", "shortlist"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be 1 at least, not {getattr(config, name)}")
    if wrong := [nfe for nfe in config.nfe if nfe < 1]:
        raise ValueError(f"nfe must be 1 at least, not {wrong[0]}")
    if not config.margin >= 1:
        raise ValueError(f"margin must be 1 at least, not {config.margin}: it multiplies the best")


@guard.output(alone=True, results="few_steps")
def main(config: FewStepsConfig) -> dict[str, Any]:
    """Write few_steps.json, few_steps.md, few_steps.png and results.json. Returns the content of the first."""
    check(config)
    bench = Bench(config)
    beside = {} if config.beside is None else {"beside": compared(config, bench.settings)}
    every = [s for s in samplers(is_flow(bench.saved)) if not config.families or s.family.startswith(config.families)]
    if not every:
        raise ValueError(f"no family of samplers begins with {' or '.join(config.families)}")
    print(f"{len(every)} samplers; the solution first", flush=True)
    result = record(config) | {"status": "running", "command": command(config), "model": bench.settings}
    result |= {"rows": [], "thousand": [], "unfit": {}} | beside
    dropped: set[str] = set()
    whole, solution = config.images * config.draws, config.near * sum(SOLUTIONS)
    costs = {nfe: cost(config, every, nfe) for nfe in config.nfe}
    work = solution + sum(costs.values()) + 1000 * whole * len(config.thousand)
    with Progress(work, "few steps") as bar, bar.counting(bench.unet), bar.counting(bench.fast):
        with bar.part(solution):
            _, result["straightness"] = bench.solution
        for nfe in config.nfe:
            with bar.part(costs[nfe]):
                row, unfit, dropped = compare(bench, config, every, nfe, dropped)
            result["rows"].append({"nfe": nfe} | {name: list(map(public, found)) for name, found in row.items()})
            result["unfit"] |= unfit
            write(result, bench.output)
            bar.print(table(result).splitlines()[1 + len(result["rows"])])
        for eta in config.thousand:
            sampler = Sampler("1000 steps", "GeneralizedDDIMScheduler", {"eta": eta, "timestep_spacing": "linear"})
            with bar.part(1000 * whole):
                found = bench.quality(sampler, 1000)
            result["thousand"] += [public(found)] if "frechet" in found else []
            write(result, bench.output)
    result["status"] = "finished"
    write(result, bench.output)
    return result


def compared(config: FewStepsConfig, settings: dict[str, Any]) -> dict[str, Any]:
    """Return what is taken of the record of another model.

    Raises:
        ValueError: if it was measured with other images, or by an earlier version.
    """
    other = read_object(Path(str(config.beside)))
    if not other.keys() >= {"config", "model", "rows", "straightness"}:
        raise ValueError(f"{config.beside} is no record of this version: measure that model again")
    alike = settings | {name: getattr(config, name) for name in ("near", "images", "draws")}
    theirs = {**other["config"], **other["model"]}
    for name in ("reference", "extractor", "dtype", "seed", "near", "images", "draws"):
        if theirs[name] != alike[name]:
            raise ValueError(f"{config.beside} has {name}={theirs[name]!r}, not {alike[name]!r}: measure both alike")
    rows = [
        {"nfe": row["nfe"], "frechet": [each for each in row["frechet"] if not is_stock(each["family"])]}
        for row in other["rows"]
    ]
    kept = {"model": theirs["model"], "name": Path(other["config"]["model"]).name}
    return kept | {"rows": rows, "straightness": other["straightness"]}


def cost(config: FewStepsConfig, every: list[Sampler], nfe: int) -> int:
    """Return about the evaluations of the network for an image, to compare samplers at one number of evaluations.

    Some half of the samplers are expected to be screened.
    """
    near = config.near * sum(not each.noisy for each in every)
    ours = sum(not is_stock(each.family) for each in every)
    screened, best = len(every) // 2, min(config.shortlist + 1 + ours, len(every))
    return nfe * (near + config.screen * screened + config.images * config.draws * best)


def compare(
    bench: Bench, config: FewStepsConfig, every: list[Sampler], nfe: int, dropped: set[str]
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str], set[str]]:
    """Measure the samplers at one number of evaluations, noisy ones only if not `dropped`.

    Returns:
        entries by measure; the reasons of samplers that cannot run; noisy samplers to drop at the next number.
    """
    still = [each for each in every if not each.noisy]
    found = [bench.distance(each, nfe) for each in still]
    distances = [entry for entry in found if "rms" in entry]
    limit = config.margin * min((each["rms"] for each in distances if is_stock(each["family"])), default=math.inf)
    near = {each["sampler"] for each in distances if each["rms"] <= limit or each["family"] in (*FAMILIES, *PLAIN)}
    near |= {each.name for each in every if each.noisy} - dropped
    left = [each for each in every if each.name in near]

    apart = range(SCREENED, SCREENED + config.screen)
    found += [bench.frechet(each, nfe, apart) for each in left]
    screened = {entry["sampler"]: entry for entry in found if "frechet" in entry}
    ranks = sorted((entry["frechet"], name) for name, entry in screened.items() if is_stock(entry["family"]))
    dropped = {name for value, name in ranks if value > config.margin * ranks[0][0] and screened[name]["noisy"]}
    chosen = [name for _, name in ranks[: config.shortlist]]
    chosen += [name for _, name in ranks if screened[name]["family"] in PLAIN][:1]
    chosen += [name for name, entry in screened.items() if not is_stock(entry["family"])]
    left = [each for each in left if each.name in chosen]

    measured = [bench.quality(each, nfe) for each in left]
    unfit = {f"{entry['sampler']}, {nfe}": entry["unfit"] for entry in found + measured if "unfit" in entry}
    best = [entry for entry in measured if "frechet" in entry]
    return {"rms": distances, "screened": list(screened.values()), "frechet": best}, unfit, dropped


def public(entry: dict[str, Any]) -> dict[str, Any]:
    """Return what a result keeps of an entry of the journal."""
    return {key: value for key, value in entry.items() if key not in ("key", "settings", "alike")}


def write(result: dict[str, Any], output: Path) -> None:
    """Write the record, its table and plot, and `results.json`."""
    result["relative_errors"] = relative_errors(result)
    write_json(output / "few_steps.json", result)
    write_file(output / "few_steps.md", table(result))
    plot(result, output / "few_steps.png")
    pictures = {
        "few_steps.png": "Few steps: ours, the best of all samplers of diffusers at each number, and its DDIM or Euler."
    }
    known = {"script": "few_steps", "model": {"sha256": result["model"]["model"]}, "status": result["status"]}
    write_json(output / "results.json", known | {"results": entries(result), "pictures": pictures})


if __name__ == "__main__":
    with guard.program("The same command resumes the run"):
        done = main(parse(FewStepsConfig))
        for name in ("few_steps.json", "few_steps.md", "few_steps.png", "results.json"):
            print(Path(done["config"]["output"]) / name)
