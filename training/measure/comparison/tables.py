"""Tables, entries and a plot of a comparison at few steps, from its record `few_steps.json`."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pictures import as_dataset

from ..extractors import slug
from .bench import SOLUTIONS
from .samplers import FAMILIES, PLAIN, is_stock

Entry = dict[str, Any]


def relative_errors(result: dict[str, Any]) -> tuple[float, float] | None:
    """Return the relative standard errors of a mean Fréchet distance, and of the ratio of two of them.

    They are pooled over samplers and numbers of evaluations, since a few draws show little of their own spread. A ratio
    at one number of evaluations is better known than its parts: samplers share x_T, and some sets are worse for all of
    them. None if there is only one draw.
    """
    draws = result["config"].get("draws", 1)
    if draws < 2:
        return None
    means, ratios = [], []
    for row in result["rows"]:
        if not row["frechet"]:
            continue
        logs = np.log([entry["draws"] for entry in row["frechet"]])
        apart = logs - logs.mean(1, keepdims=True)
        means.append(np.square(apart).sum() / (len(logs) * (draws - 1)))
        if len(logs) > 1:
            ratios.append(np.square(apart - apart.mean(0)).sum() / ((len(logs) - 1) * (draws - 1)))
    if not means:
        return None
    return math.sqrt(np.mean(means) / draws), math.sqrt(2 * np.mean(ratios or means) / draws)


def best(entries: list[Entry], measure: str, families: Callable[[str], bool]) -> Entry | None:
    """Return the entry of these families with the lowest value."""
    return min((each for each in entries if families(each["family"])), key=lambda each: each[measure], default=None)


def measures(result: dict[str, Any]) -> dict[str, list[str]]:
    """Return, for each measure, those of our families that were measured by it."""
    found = {}
    for measure in ("rms", "frechet"):
        measured = {entry["family"] for row in result["rows"] for entry in row[measure]}
        found[measure] = [each for each in FAMILIES if each in measured]
    return found


def entries(result: dict[str, Any]) -> list[Entry]:
    """Return ours, the best of `PLAIN`, diffusers' best, 1000 steps and straightness, as entries of `results.json`."""
    config, found, errors = result["config"], [], relative_errors(result)
    extractor = slug(config["extractor"])
    of_measure = {
        "rms": {"metric": "rms_to_solution", "name": "Few steps: RMS distance to the solution of the ODE"}
        | {"dataset": {"name": "the ODE's solution"}},
        "frechet": {"metric": f"fd_{extractor}", "name": f"Few steps: FD, {extractor}"}
        | {"dataset": as_dataset(config["reference"], "train", config.get("data_config"))},
    }

    def listed(each: Entry, scheduler: str) -> Entry:
        measure = "rms" if "rms" in each else "frechet"
        same = {"value": each[measure], "nfe": each["nfe"], "num_inference_steps": each["nfe"], "scheduler": scheduler}
        same |= {"sampler": each["sampler"], "images": each["images"], "seed": config["seed"]}
        if "draws" in each:
            same |= {"draws": len(each["draws"])}
            same |= {} if errors is None else {"standard_error": errors[0] * each[measure]}
        return of_measure[measure] | same

    for measure, ours in measures(result).items():
        kinds = {"the best of diffusers": is_stock} | {name: name.__eq__ for name in (*PLAIN, *ours)}
        for row in result["rows"]:
            chosen = {kind: best(row[measure], measure, families) for kind, families in kinds.items()}
            found += [
                listed(each, kind) | ({} if measure == "frechet" and kind in ours else {"listed": False})
                for kind, each in chosen.items()
                if each
            ]
    found += [listed(each, each["sampler"]) for each in result["thousand"]]
    if values := result.get("straightness"):
        mean, error = _mean(values)
        line = {"metric": "straightness", "name": "Few steps: straightness of the ODE's trajectories, 0 for lines"}
        line |= {"value": mean, "standard_error": error, "nfe": SOLUTIONS[0], "num_inference_steps": SOLUTIONS[0]}
        dataset = {"name": "the ODE's solution"}
        found.append(line | {"dataset": dataset, "images": len(values), "seed": config["seed"], "listed": False})
    return found


def table(result: dict[str, Any]) -> str:
    """Return, in Markdown, the best of diffusers and ours by both measures, with the ratio of the two."""
    families = measures(result)
    head = ["NFE", "RMS, best of diffusers", "by", *families["rms"]]
    head += ["Fréchet, best of diffusers", "by", *families["frechet"]]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in result["rows"]:
        cells = [str(row["nfe"])]
        for measure, ours in families.items():
            theirs = best(row[measure], measure, is_stock)
            cells += [f"{theirs[measure]:.4g}", theirs["sampler"]] if theirs else ["", ""]
            for family in ours:
                found = best(row[measure], measure, family.__eq__)
                ratio = f" ({found[measure] / theirs[measure]:.2f})" if found and theirs else ""
                cells.append(f"{found[measure]:.4g}{ratio}" if found else "")
        lines.append("| " + " | ".join(cells) + " |")
    for entry in result["thousand"]:
        lines += ["", f"Fréchet distance of {entry['sampler']}: {entry['frechet']:.4g}"]
    if errors := relative_errors(result):
        sets = f"{result['config']['draws']} sets of {result['config']['images']:,} images"
        known = f"{errors[0]:.0%} of a mean, {errors[1]:.0%} of a ratio"
        lines += ["", f"Fréchet distances are means over {sets}, which all samplers share. Standard errors: {known}."]
    if "straightness" in result:
        value = _told(result["straightness"])
        lines += ["", f"Straightness of the ODE's trajectories (0 for lines): {value} for a dimension."]
    if "beside" in result:
        lines += ["", *_beside(result)]
    return "\n".join(lines) + "\n"


def _mean(values: list[float]) -> tuple[float, float | None]:
    """Return the mean of images and its standard error, which a single one does not have."""
    count = len(values)
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(count)) if count > 1 else None


def _told(values: list[float]) -> str:
    """Write the mean of images with its standard error."""
    mean, error = _mean(values)
    return f"{mean:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _beside(result: dict[str, Any]) -> list[str]:
    """Return the lines of a table with ours on this model and on the one beside it, from the same x_T."""
    families, other = measures(result)["frechet"], result["beside"]
    theirs = {row["nfe"]: row["frechet"] for row in other["rows"]}
    lines = ["| NFE | " + " | ".join(families) + " |", "|---" * (len(families) + 1) + "|"]
    variances = []
    for row in result["rows"]:
        cells = [str(row["nfe"])]
        for family in families:
            pair = [best(each, "frechet", family.__eq__) for each in (row["frechet"], theirs.get(row["nfe"], []))]
            if not all(pair):
                cells.append("")
                continue
            ours, its = (np.array(each["draws"]) for each in pair if each)
            cells.append(f"{ours.mean():.4g} / {its.mean():.4g} = {ours.mean() / its.mean():.2f}")
            variances += [np.log(ours / its).var(ddof=1) / len(ours)] if len(ours) > 1 else []
        lines.append("| " + " | ".join(cells) + " |")
    error = f" Standard error of a ratio: {math.sqrt(np.mean(variances)):.0%}." if variances else ""
    straight = f"Straightness there: {_told(other['straightness'])}."
    return [f"Fréchet distances of this model and of {other['name']}, from the same x_T.{error} {straight}", "", *lines]


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw both measures against evaluations: ours, the best of diffusers and of `PLAIN`, and 1000 steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axis, (measure, ours) in zip(figure.subplots(1, 2), measures(result).items(), strict=True):
        names = {name: name.__eq__ for name in PLAIN} | {"best of diffusers": is_stock}
        names |= {family: family.__eq__ for family in ours}
        for name, families in names.items():
            found = [(row["nfe"], best(row[measure], measure, families)) for row in result["rows"]]
            points = sorted((nfe, entry[measure]) for nfe, entry in found if entry)
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        for entry in result["thousand"] if measure == "frechet" else []:
            axis.axhline(entry["frechet"], linestyle=":", linewidth=1, color="black")
            axis.annotate(entry["sampler"], (result["rows"][0]["nfe"], entry["frechet"]), fontsize=7, va="bottom")
        label = {"rms": "RMS distance to the solution", "frechet": "Fréchet distance"}[measure]
        axis.set(xlabel="network evaluations", ylabel=label, yscale="log", xscale="log")
        numbers = [row["nfe"] for row in result["rows"]]
        axis.set_xticks(numbers, labels=map(str, numbers))
        axis.set_xticks([], minor=True)
        axis.yaxis.set_major_formatter("{x:g}")
        low, high = axis.get_ylim()
        axis.yaxis.set_minor_formatter("{x:g}" if high < 10 * low else "")  # labels of two decades overlap
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
