"""Likelihood of a model in bits per dimension: the bound of its sampler for any τ and variance, and the ODE's value.

python training/nll.py --model user/model --data pictures --output out/nll
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure.bound import DECODERS, Errors, VariationalBound, measure_errors, ode_bits
from measure.search import bound_costs, bound_of, search_bound
from pictures.sources import as_dataset, load_images
from torch import Generator, Tensor
from tqdm.auto import tqdm
from trainer.settings import parse, record, write_json

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler
from ddim_plugin.hub.card import read_object
from ddim_plugin.hub.reading import weights_digest, write_whole
from ddim_plugin.process import spacings as tau
from ddim_plugin.process.moves import ETA_FREE, VARIANCES

ESTIMATORS = ("second_moment", "error")
FREE = ("output", "device", "batch_size", "save_model")
"""Settings that may change when a run is continued."""


@dataclass(frozen=True)
class NLLConfig:
    """Measure bits per dimension of 8-bit images under a model.

    For each S and variance the variational bound of the sampler, by terms; by --ode the likelihood of the ODE (η = 0).
    Ho's computation is --steps 1000 --variances fixed_large --clip 1. A run that was stopped goes on where it was.
    """

    model: str = field(metadata={"help": "a folder written by save_pretrained, or a Hub id"})
    output: str = field(default="out/nll", metadata={"help": "folder for the results"})
    data: str = field(default="digits", metadata={"help": "digits, a folder of images, parquet or arrow, or a Hub id"})
    split: str = field(default="test", metadata={"help": "split of a data set of the Hub, or of digits"})
    images: int = field(default=256, metadata={"help": "images to measure, the first of the set"})
    steps: tuple[int, ...] = field(default=(10, 50, 1000), metadata={"help": "S of the bounds"})
    variances: tuple[str, ...] = field(
        default=("fixed_small", "fixed_large", "optimal"),
        metadata={"help": "β̃ (times η²), β, optimal, or learned_range of a network that has one"},
    )
    eta: float = field(default=1.0, metadata={"help": "η of fixed_small and optimal"})
    spacing: str | None = field(default=None, metadata={"help": "τ by name; by default the model's"})
    searched: bool = field(default=False, metadata={"help": "also along the τ that minimises the bound"})
    decoder: str | None = field(
        default=None, metadata={"help": "its variance: next (Ho), beta, or fitted (if E‖ε̂‖² is measured too)"}
    )
    clip: float | None = field(default=None, metadata={"help": "clip x̂0 to ± this (Ho: 1)"})
    draws: int = field(default=0, metadata={"help": "terms drawn for each image; 0 takes all of them"})
    ode: bool = field(default=True, metadata={"help": "also the likelihood of the ODE"})
    ode_images: int = field(default=64, metadata={"help": "images of it"})
    exact_trace: bool = field(default=False, metadata={"help": "not by Hutchinson's estimate: d evaluations for one"})
    tolerance: float = field(default=1e-5, metadata={"help": "of the ODE's solver"})
    fit_images: int = field(default=64, metadata={"help": "images that E‖ε̂‖² is measured on, T evaluations each"})
    fit_data: str | None = field(default=None, metadata={"help": "their data set; own for the model's own samples"})
    fit_split: str = field(default="train", metadata={"help": "its split"})
    estimator: str = field(
        default="second_moment", metadata={"help": "E‖ε̂‖² (Analytic-DPM), or error: 1 − E‖ε − ε̂‖², best for the bound"}
    )
    save_model: str | None = field(
        default=None, metadata={"help": "folder for the model with E‖ε̂‖², for variance_type='optimal'"}
    )
    class_label: int | None = field(default=None, metadata={"help": "label of all images, for a conditional network"})
    batch_size: int = field(default=64, metadata={"help": "images at a time"})
    seed: int = field(default=0, metadata={"help": "the noise of image i comes from seed + i"})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, …; by default an accelerator if any"})
    overwrite: bool = field(default=False, metadata={"help": "replace the results of an earlier run"})


def check(config: NLLConfig) -> None:
    """Raise ValueError for settings that cannot work, before anything is loaded."""
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
        raise ValueError(f"the searched τ is the best with the fitted decoder: leave out decoder={config.decoder!r}")
    if config.estimator not in ESTIMATORS:
        raise ValueError(f"unknown estimator {config.estimator!r}: use one of {', '.join(ESTIMATORS)}")
    if not config.tolerance > 0:
        raise ValueError(f"tolerance must be positive, not {config.tolerance}")
    if config.spacing is not None:
        tau.check_spacing(config.spacing)


class Bench:
    """A model with its network as a function of the paper's time."""

    def __init__(self, config: NLLConfig):
        self.config = config
        self.device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.pipe = GeneralizedDDIMPipeline.from_pretrained(config.model).to(self.device)
        if not isinstance(self.pipe.scheduler, GeneralizedDDIMScheduler):
            self.pipe.scheduler = GeneralizedDDIMScheduler.from_config(self.pipe.scheduler.config)
        scheduler, unet = self.pipe.scheduler, self.pipe.unet
        if (unet.class_embedding is not None) != (config.class_label is not None):
            known = "is unconditional: leave class_label out" if config.class_label is not None else "needs class_label"
            raise ValueError(f"the network {known}")
        if unet.class_embedding is not None and not 0 <= config.class_label < (
            unet.config.num_class_embeds or math.inf
        ):
            raise ValueError(f"class_label must be in 0..{unet.config.num_class_embeds - 1}, not {config.class_label}")
        learned = unet.config.out_channels == 2 * unet.config.in_channels
        if not learned and "learned_range" in config.variances:
            raise ValueError("the network has no variance of its own: leave learned_range out of variances")
        self.alpha_bar = scheduler.alpha_bar
        self.T = len(self.alpha_bar) - 1
        self.prediction_type = scheduler.config.prediction_type
        spacing = config.spacing or scheduler.config.timestep_spacing
        self.spacing = spacing
        # A repeated time is no move.
        self.tau = {S: np.unique(tau.tau(spacing, S, self.T, alpha_bar=self.alpha_bar)) for S in config.steps}

    def network(self, x: Tensor, t: Tensor) -> Tensor:
        """The output at the paper's time t, (B,), whole or real."""
        label = self.config.class_label
        labels = None if label is None else torch.full((len(x),), label, device=x.device)
        return self.pipe.unet(x, (t.to(x.device) - 1).clamp(min=0), class_labels=labels).sample

    def batches(self, images: Tensor) -> list[tuple[Tensor, list[Generator]]]:
        """Images in −1..1, and a generator for each, seeded with seed + i."""
        size, parts = self.config.batch_size, []
        for i in range(0, len(images), size):
            part = (images[i : i + size].float() / 127.5 - 1).to(self.device)
            parts.append((part, [Generator().manual_seed(self.config.seed + i + k) for k in range(len(part))]))
        return parts

    def bound(
        self,
        images: Tensor,
        times: np.ndarray,
        variance: str,
        eps: np.ndarray | None,
        decoder: str | np.ndarray,
    ) -> dict[str, Any]:
        """The variational bound along `times`, over the images: mean, standard error, terms."""
        config = self.config
        eta = 1.0 if variance in ETA_FREE else config.eta
        bound = VariationalBound(self.alpha_bar, times, self.prediction_type, variance, eta, eps, config.clip, decoder)

        def network(x: Tensor, t: Tensor) -> Tensor:
            output = self.network(x, t)
            return output if variance == "learned_range" else output[:, : x.shape[1]]

        totals, priors, decoders = [], [], []
        for x0, generators in tqdm(self.batches(images), desc=f"S = {len(times)}, {variance}", leave=False):
            if config.draws:
                totals.append(bound.sampled(network, x0, generators, config.draws))
                continue
            terms = bound.exact(network, x0, generators)
            totals.append(terms.total)
            priors.append(terms.prior)
            decoders.append(terms.decoder)
        result = summary(torch.cat(totals)) | {"eta": eta, "nfe": config.draws or len(times)}
        if priors:
            prior, decoder = float(torch.cat(priors).mean()), float(torch.cat(decoders).mean())
            result |= {"prior": prior, "transitions": result["bits"] - prior - decoder, "decoder": decoder}
        return result

    def ode(self, images: Tensor) -> dict[str, Any]:
        """The likelihood of the ODE over the first `ode_images`."""
        config, bits, evaluations = self.config, [], []
        for i, (x0, generators) in enumerate(tqdm(self.batches(images[: config.ode_images]), desc="ODE", leave=False)):
            part = images[i * config.batch_size :][: len(x0)].to(self.device)
            found = ode_bits(
                self.network,
                part,
                self.alpha_bar,
                self.prediction_type,
                generators,
                config.exact_trace,
                config.tolerance,
            )
            bits.append(found.bits)
            evaluations.append(found.evaluations)
        return summary(torch.cat(bits)) | {"eta": 0.0, "nfe": sum(evaluations) / len(evaluations)}

    def errors(self) -> Errors:
        """The errors of x̂0 and E‖ε̂‖² at every time, on the images they are fitted to."""
        config = self.config
        if config.fit_data == "own":
            generators = [Generator().manual_seed(config.seed + i) for i in range(config.fit_images)]
            labels = {} if config.class_label is None else {"class_labels": config.class_label}
            self.pipe.set_progress_bar_config(desc="samples", leave=False)
            steps = min(50, self.T)
            made = self.pipe(config.fit_images, steps, eta=1.0, generator=generators, output_type="pt", **labels).images
            images = (made.float().cpu() * 255).round().to(torch.uint8)
        else:
            images = self.load(config.fit_data or config.data, config.fit_split, config.fit_images)
        times = partial(tqdm, desc="E‖ε̂‖²", leave=False)
        parts, counts = [], []
        for x0, generators in self.batches(images):
            parts.append(measure_errors(self.network, x0, self.alpha_bar, self.prediction_type, generators, times))
            counts.append(len(x0))
        return Errors(*(np.average(each, axis=0, weights=counts) for each in zip(*parts, strict=True)))

    def load(self, data: str, split: str, count: int) -> Tensor:
        images = load_images(data, split, self.pipe.unet.config.in_channels, self.pipe.image_size, count)
        if len(images) < count:
            print(f"note: {data} has {len(images)} images in {split}, not {count}", file=sys.stderr)
        return images


def summary(bits: Tensor) -> dict[str, Any]:
    """Mean and standard error over the images."""
    error = float(bits.std() / len(bits) ** 0.5) if len(bits) > 1 else None
    return {"bits": float(bits.mean()), "standard_error": error, "images": len(bits)}


def main(config: NLLConfig) -> dict[str, Any]:
    """Write nll.json and results.json after each measurement, and nll.md; return what the first holds."""
    check(config)
    output = Path(config.output)
    earlier = earlier_cells(output, config)
    bench = Bench(config)
    images = bench.load(config.data, config.split, config.images)
    output.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = record(config) | {"device": bench.device, "spacing": bench.spacing, "cells": earlier}
    result["model"] = {"sha256": weights_digest(bench.pipe.unet)}

    eps, errors = model_table(bench), None
    needed = config.searched or config.save_model is not None or config.decoder == "fitted"
    if needed or (eps is None and "optimal" in config.variances):
        stored = output / "errors.json"
        errors = read_errors(stored, config) or bench.errors()
        write_json(
            stored, {"settings": fitted(config), **{key: np.asarray(v).tolist() for key, v in errors._asdict().items()}}
        )
        eps = errors.eps_mean_square if config.estimator == "second_moment" else errors.explained(bench.alpha_bar)
    if config.save_model is not None:
        save_model(bench.pipe, eps, config.save_model)

    def cell(key: str, measure: Callable[[], dict[str, Any]], **known: Any) -> None:
        if key not in result["cells"]:
            start = time.perf_counter()
            result["cells"][key] = known | measure() | {"seconds": time.perf_counter() - start}
        write_json(output / "nll.json", result)
        entries = [entry(each, result) for each in result["cells"].values()]
        write_json(output / "results.json", {"model": result["model"], "results": entries})
        write_whole(output / "nll.md", table(result))
        made = result["cells"][key]
        print(f"{key:42s} {made['bits']:.4f} ± {made['standard_error'] or math.nan:.4f} bits/dim")

    decoder: str | np.ndarray = "next" if config.decoder is None else config.decoder
    if errors is not None and config.decoder in (None, "fitted"):
        decoder = errors.decoder_variance
    result["decoder"] = decoder if isinstance(decoder, str) else "fitted"
    found = {}
    if config.searched:
        for variance in (each for each in config.variances if each != "learned_range"):
            known, eta = errors._replace(eps_mean_square=eps), 1.0 if variance in ETA_FREE else config.eta
            costs = bound_costs(bench.alpha_bar, known, variance, eta)
            paths = search_bound(bench.alpha_bar, known, max(config.steps), variance, eta)
            for S, times in bench.tau.items():
                found[S, variance] = paths[S - 1].tau, paths[S - 1].cost, bound_of(bench.alpha_bar, times, *costs)
    for S, times in bench.tau.items():
        for variance in config.variances:
            known = {"S": S, "variance": variance, "tau": bench.spacing}
            cell(f"S = {S}, {variance}", partial(bench.bound, images, times, variance, eps, decoder), **known)
            if (S, variance) in found and S < bench.T:
                best, predicted, before = found[S, variance]
                known |= {
                    "tau": "searched",
                    "times": best.tolist(),
                    "predicted": predicted,
                    "predicted_spacing": before,
                }
                cell(
                    f"S = {S}, {variance}, searched",
                    partial(bench.bound, images, best, variance, eps, decoder),
                    **known,
                )
    if config.ode:
        cell("ODE", partial(bench.ode, images), S=None, variance="ODE", tau=None)
    return result


# ---- what is kept --------------------------------------------------------------------------------------------------


def earlier_cells(output: Path, config: NLLConfig) -> dict[str, Any]:
    """The cells of a run with the same settings. Raises ValueError where there is one with others."""
    file = output / "nll.json"
    if config.overwrite or not file.is_file():
        return {}
    before, now = read_object(file), record(config)
    same = {key: value for key, value in now["config"].items() if key not in (*FREE, "overwrite")}
    known = {key: list(value) if isinstance(value, tuple) else value for key, value in same.items()}
    changed = [key for key, value in known.items() if before["config"].get(key) != value]
    if changed:
        raise ValueError(f"{output} has results with another {', '.join(changed)}: choose another, or pass --overwrite")
    return before["cells"]


def fitted(config: NLLConfig) -> dict[str, Any]:
    """The settings that the errors depend on."""
    keys = ("model", "fit_images", "fit_data", "fit_split", "class_label", "seed")
    return {key: getattr(config, key) for key in keys} | {"data": config.fit_data or config.data}


def read_errors(file: Path, config: NLLConfig) -> Errors | None:
    """Errors that were measured before, with the same settings."""
    known = read_object(file) if file.is_file() and not config.overwrite else {}
    if known.get("settings") != fitted(config):
        return None
    return Errors(**{key: np.array(known[key]) for key in Errors._fields})


def model_table(bench: Bench) -> np.ndarray | None:
    """E‖ε̂‖²/d for t = 0..T that was saved with the model."""
    saved = bench.pipe.scheduler.config.eps_mean_square
    return None if saved is None else np.concatenate([[0.0], saved])


def save_model(pipe: GeneralizedDDIMPipeline, eps: np.ndarray, folder: str) -> None:
    """The pipeline with the table, which `variance_type="optimal"` then needs no more."""
    kept = pipe.scheduler
    pipe.scheduler = GeneralizedDDIMScheduler.from_config(kept.config, eps_mean_square=eps[1:].tolist())
    pipe.save_pretrained(folder)
    pipe.scheduler = kept


def entry(cell: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """A cell as an entry of `results.json`."""
    config = result["config"]
    known = {
        "metric": "bits_per_dim",
        "name": "bits/dim" if cell["S"] is None else "bits/dim, bound",
        "value": cell["bits"],
        "standard_error": cell["standard_error"],
        "nfe": cell["nfe"],
        "dataset": as_dataset(config["data"], config["split"]),
        "num_inference_steps": cell["S"],
        "eta": cell["eta"],
        "variance_type": cell["variance"],
        "timestep_spacing": cell["tau"],
        "images": cell["images"],
        "seed": config["seed"],
    }
    return {key: value for key, value in known.items() if value is not None}


def table(result: dict[str, Any]) -> str:
    """Bits per dimension in Markdown."""
    lines = [
        "| S | variance | η | τ | bits/dim | prior | transitions | decoder | images | evaluations |",
        "|---" * 10 + "|",
    ]
    for cell in result["cells"].values():
        error = "" if cell["standard_error"] is None else f" ± {cell['standard_error']:.4f}"
        parts = [f"{cell[key]:.4f}" if key in cell else "" for key in ("prior", "transitions", "decoder")]
        known = [cell["S"] or "", cell["variance"], f"{cell['eta']:g}", cell["tau"] or "", f"{cell['bits']:.4f}{error}"]
        lines.append("| " + " | ".join(map(str, [*known, *parts, cell["images"], f"{cell['nfe']:.0f}"])) + " |")
    config = result["config"]
    return f"Bits per dimension of {Path(config['data']).name}, {config['split']}.\n\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    try:
        main(parse(NLLConfig))
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"nll.py: {error}")
    except KeyboardInterrupt:
        sys.exit("nll.py: interrupted; the same command goes on from what was measured")
