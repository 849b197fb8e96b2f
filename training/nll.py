"""Measure the likelihood of a model in bits per dimension: the bound of its sampler, and the ODE's value.

python training/nll.py --model user/model --data pictures --output out/nll
"""

import guard

if __name__ == "__main__":
    guard.start()  # before the imports that take seconds

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from cards.weights import weights_digest
from guard.progress import Progress
from guard.writing import write_file
from measure.bound import DECODERS, Errors, VariationalBound
from measure.likelihood import Bench, earlier_cells, entry, kept_errors, search, table
from pictures import Reading, choose_split
from trainer.settings import command, parse, record, write_json

from ddim_plugin.process import spacings
from ddim_plugin.process.moves import ETA_FREE, VARIANCES

ESTIMATORS = ("second_moment", "error")


@dataclass(frozen=True)
class NLLConfig(Reading):
    """Measure bits per dimension of 8-bit images under a model.

    Measures the variational bound of the sampler for each S and variance, and with --ode the likelihood of the ODE.
    Ho's computation is --steps 1000 --variances fixed_large --clip 1. The same command resumes a run that was stopped.
    """

    model: str = field(metadata={"help": "a folder written by save_pretrained, or a Hub id"})
    output: str = field(default="out/nll", metadata={"help": "folder for the results"})
    data: str = field(default="digits", metadata={"help": "digits, a folder of images, parquet or arrow, or a Hub id"})
    split: str | None = field(default=None, metadata={"help": "its split; by default test, validation or train"})
    images: int = field(default=256, metadata={"help": "images to measure, the first of the set"})
    steps: tuple[int, ...] = field(default=(10, 50, 1000), metadata={"help": "S of the bounds"})
    variances: tuple[str, ...] = field(
        default=("fixed_small", "fixed_large", "optimal"), metadata={"help": "β̃ (times η²), β, optimal, learned_range"}
    )
    eta: float = field(default=1.0, metadata={"help": "η of fixed_small and optimal"})
    spacing: str | None = field(default=None, metadata={"help": "τ by name; by default the model's"})
    searched: bool = field(default=False, metadata={"help": "measure the τ that minimises the bound too"})
    decoder: str | None = field(
        default=None, metadata={"help": "next (Ho), beta or fitted; by default fitted if E‖ε̂‖² is measured, else next"}
    )
    clip: float | None = field(default=None, metadata={"help": "clip x̂0 to ± this (Ho: 1)"})
    draws: int = field(default=0, metadata={"help": "terms drawn for each image; 0 takes all"})
    ode: bool = field(default=True, metadata={"help": "measure the likelihood of the ODE too"})
    ode_images: int = field(default=64, metadata={"help": "images for the ODE"})
    exact_trace: bool = field(default=False, metadata={"help": "no estimate of the trace: d evaluations for one"})
    tolerance: float = field(default=1e-5, metadata={"help": "of the ODE's solver"})
    fit_images: int = field(default=64, metadata={"help": "images to measure E‖ε̂‖² on, with T evaluations each"})
    fit_data: str | None = field(default=None, metadata={"help": "data set of these; own for samples of the model"})
    fit_split: str = field(default="train", metadata={"help": "split of fit_data"})
    estimator: str = field(
        default="second_moment", metadata={"help": "E‖ε̂‖² (Analytic-DPM), or error: 1 − E‖ε − ε̂‖², best for the bound"}
    )
    save_model: str | None = field(default=None, metadata={"help": "folder for the model with E‖ε̂‖², for optimal"})
    class_label: int | None = field(default=None, metadata={"help": "label of all images, for a conditional network"})
    batch_size: int = field(default=64, metadata={"help": "images at a time"})
    seed: int = field(default=0, metadata={"help": "the noise of image i comes from seed + i"})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, …; by default an accelerator if any"})
    overwrite: bool = field(default=False, metadata={"help": "replace the results of an earlier run"})


def check(config: NLLConfig) -> None:
    """Check the settings before anything is loaded. Raises ValueError for those that cannot work."""
    for name in ("images", "batch_size", "ode_images", "fit_images"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be positive, not {getattr(config, name)}")
    if config.draws < 0:
        raise ValueError(f"draws must not be negative, not {config.draws}")
    if any(S < 1 for S in config.steps) or len(set(config.steps)) < len(config.steps):
        raise ValueError(f"steps must be distinct positive numbers, not {config.steps}")
    unknown = set(config.variances) - set(VARIANCES)
    if unknown:
        raise ValueError(f"unknown variances {', '.join(sorted(unknown))}: use some of {', '.join(VARIANCES)}")
    if not config.eta > 0 and config.steps and config.variances:
        raise ValueError(f"the bound is infinite at eta={config.eta:g}: use a positive η, and --ode for η = 0")
    if config.decoder not in (None, "fitted", *DECODERS):
        raise ValueError(f"unknown decoder {config.decoder!r}: use fitted, {' or '.join(DECODERS)}")
    if config.searched and config.decoder in DECODERS:
        raise ValueError(f"the searched τ is best with the fitted decoder: leave out decoder={config.decoder!r}")
    if config.estimator not in ESTIMATORS:
        raise ValueError(f"unknown estimator {config.estimator!r}: use one of {', '.join(ESTIMATORS)}")
    if not config.tolerance > 0:
        raise ValueError(f"tolerance must be positive, not {config.tolerance}")
    if config.spacing is not None:
        spacings.check_name("spacing", config.spacing, spacings.SPACINGS)


@guard.output(alone=True, results="nll")
def main(config: NLLConfig) -> dict[str, Any]:
    """Write nll.json and results.json after each measurement, and nll.md. Returns the content of nll.json."""
    check(config)
    config = replace(config, split=choose_split(config.data, config.split, config.data_config))
    output = Path(config.output)
    earlier = earlier_cells(output, config)
    bench = Bench(config.model, config.class_label, config.batch_size, config.seed, config.device)
    bench.check(config.variances, config.save_model)
    spacing = config.spacing or bench.pipe.scheduler.config.timestep_spacing
    along = {S: bench.times(spacing, S) for S in config.steps}
    images = bench.load(config.data, config.split, config.images, **config.reading)
    output.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = record(config) | {"command": command(replace(config, spacing=spacing))}
    result |= {"device": bench.device, "spacing": spacing, "cells": earlier}
    result["model"] = {"sha256": weights_digest(bench.pipe.unet)}
    costs = bench.costs(config, along)
    with Progress(sum(costs.values()), "nll") as bar, bar.counting(bench.pipe.unet):
        with bar.part(costs["errors"]):
            eps, errors = tables(bench, config, output)
        if config.save_model is not None:
            bench.save(config.save_model, eps)
        fitted = errors is not None and config.decoder in (None, "fitted")
        decoder = errors.decoder_variance if fitted else config.decoder or "next"
        result["decoder"] = decoder if isinstance(decoder, str) else "fitted"

        def cell(key: str, cost: float, measure: Callable[[], dict[str, Any]], **known: Any) -> None:
            with bar.part(cost):
                if key not in result["cells"]:
                    start = time.perf_counter()
                    result["cells"][key] = known | measure() | {"seconds": time.perf_counter() - start}
            write(result, output)
            made = result["cells"][key]
            bar.print(f"{key:42s} {made['bits']:.4f} ± {made['standard_error'] or math.nan:.4f} bits/dim")

        def bound(key: str, variance: str, path: np.ndarray, **known: Any) -> None:
            settings = (variance, eta[variance], eps, config.clip, decoder)
            measured = VariationalBound(bench.path, path, bench.prediction_type, *settings)
            measure = partial(bench.bound, images, measured, config.draws)
            cell(key, costs[f"S = {known['S']}"] / bounds, measure, variance=variance, **known)

        eta = {each: 1.0 if each in ETA_FREE else config.eta for each in config.variances}
        bounds = len(config.variances) * (1 + config.searched)  # of each S
        found = {}
        if config.searched:
            given = (bench.path, errors._replace(eps_mean_square=eps))
            chosen = [each for each in config.variances if each != "learned_range"]
            found = {each: search(*given, each, eta[each], along) for each in chosen}
        for S, times in along.items():
            for variance in config.variances:
                bound(f"S = {S}, {variance}", variance, times, S=S, tau=spacing)
                if best := found.get(variance, {}).get(S):
                    known = best._asdict() | {"S": S, "tau": "searched", "times": best.times.tolist()}
                    bound(f"S = {S}, {variance}, searched", variance, best.times, **known)
        if config.ode:
            measure = partial(bench.ode, images[: config.ode_images], config.exact_trace, config.tolerance)
            cell("ODE", costs["ODE"], measure, S=None, variance="ODE", tau=None)
    return result


def write(result: dict[str, Any], output: Path) -> None:
    """Write the record, its table and `results.json`."""
    write_json(output / "nll.json", result)
    entries = [entry(each, result) for each in result["cells"].values()]
    write_json(output / "results.json", {"model": result["model"], "results": entries})
    write_file(output / "nll.md", table(result))


def tables(bench: Bench, config: NLLConfig, output: Path) -> tuple[np.ndarray | None, Errors | None]:
    """Return E‖ε̂‖²/d for t = 0..T and the errors, if the settings need them. errors.json keeps what was measured."""
    saved = bench.pipe.scheduler.config.eps_mean_square
    eps = None if saved is None else np.concatenate([[0.0], saved])
    needed = config.searched or config.save_model is not None or config.decoder == "fitted"
    if not needed and (eps is not None or "optimal" not in config.variances):
        return eps, None

    def measure() -> Errors:
        if config.fit_data == "own":
            return bench.errors(bench.samples(config.fit_images))
        reading = config.reading | ({"data_config": None} if config.fit_data else {})
        return bench.errors(bench.load(config.fit_data or config.data, config.fit_split, config.fit_images, **reading))

    keys = ("model", "fit_images", "fit_data", "fit_split", "class_label", "seed", *config.reading)
    settings = {key: getattr(config, key) for key in keys} | {"data": config.fit_data or config.data}
    errors = kept_errors(output / "errors.json", settings, measure, config.overwrite)
    return errors.eps_mean_square if config.estimator == "second_moment" else errors.explained(bench.path), errors


if __name__ == "__main__":
    with guard.program("The same command resumes the run"):
        done = main(parse(NLLConfig))
        for name in ("nll.json", "nll.md", "results.json"):
            print(Path(done["config"]["output"]) / name)
