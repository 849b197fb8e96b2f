"""Likelihoods of a saved model in bits per dimension: its bounds, its ODE, and the errors that bounds follow from."""

import math
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path as Folder
from typing import Any, NamedTuple

import numpy as np
import torch
from cards.records import TRAINING
from guard.reading import read_object
from numpy.typing import NDArray
from pictures import as_dataset, load_images, to_model
from pictures.bits import BIN, discretized_log_likelihood
from torch import Generator, Tensor
from trainer.settings import record, write_json

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler
from ddim_plugin.process import spacings
from ddim_plugin.process.moves import prediction
from ddim_plugin.process.paths import FlowMatching, Path

from .bound import Array, Errors, Generators, Network, VariationalBound, best_paths, bound_costs, bound_of, draw
from .labels import check_label, check_memory
from .ode import finite, ode_bits

OF_SEEDS = (
    "Known for CIFAR-10, in bits per dimension, with a network of 35.7M parameters: at most 3.75 for test and 3.72 for "
    "train (Ho et al. 2020, S = 1000); 3.28 for the ODE (Song et al. 2021); at most 3.59 for the optimal variance at "
    "S = 1000, and 4.11 and 3.68 at S = 10 and 25 on a searched τ (Bao et al. 2022)."
)


@torch.no_grad()
def measure_errors(
    network: Network,
    x0: Tensor,
    path: Path,
    prediction_type: str,
    generator: Generators,
) -> Errors:
    """Measure `Errors` over a batch of images, with T evaluations an image; average them over several batches.

    `x0` are 8-bit images in −1..1, of the data or the model's own.
    """
    T = path.T
    errors, squares = np.zeros(T + 1), np.ones(T + 1)
    variances = np.geomspace(BIN**2 / 10, np.maximum(np.asarray(path.levels.noise) ** 2, BIN**2), 12, axis=1)
    decoders = np.zeros_like(variances)
    for t in range(1, T + 1):
        level = path.level(t)
        predicted = prediction(prediction_type, level)
        noise = draw(generator, len(x0), lambda size, one: torch.randn(*size, *x0.shape[1:], generator=one)).to(x0)
        x = level.signal * x0 + level.noise * noise
        output = network(x, torch.full((len(x0),), t, device=x0.device))[:, : x0.shape[1]].to(x0.dtype)
        guess = predicted.x0_x * x + predicted.x0_out * output
        errors[t] = float((x0 - guess).double().square().mean())
        squares[t] = float((predicted.eps_x * x + predicted.eps_out * output).double().square().mean())
        for k, variance in enumerate(variances[t]):
            deviation = torch.tensor(math.sqrt(variance)).to(x0)
            decoders[t, k] = -float(discretized_log_likelihood(x0, guess, deviation).double().mean())
    return Errors(errors, squares, variances, decoders, float(x0.double().square().mean()))


OF_ODE = 150
"""About the evaluations of the network for the likelihood of an image by the ODE, to estimate the time left."""

FREE = ("output", "device", "batch_size", "save_model", "overwrite")
"""Settings that may change when a run is resumed."""


class Bench:
    """Measure likelihoods of a saved model, image by image, with a generator for each.

    Args:
        model: a folder written by `save_pretrained`, or a Hub id.
        class_label: label of all images, for a class-conditional network.
        batch_size: images at a time.
        seed: the noise of image i comes from seed + i.
        device: name of a device; an accelerator by default, if there is one.

    Raises:
        ValueError: if the label does not fit the network, or the path does not end near N(0, I).
    """

    def __init__(self, model: str, class_label: int | None, batch_size: int, seed: int, device: str | None):
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.pipe = GeneralizedDDIMPipeline.from_pretrained(model).to(self.device)
        self.pipe.set_progress_bar_config(disable=True)
        if not isinstance(self.pipe.scheduler, GeneralizedDDIMScheduler):
            self.pipe.scheduler = GeneralizedDDIMScheduler.from_config(self.pipe.scheduler.config)
        self.class_label, self.batch_size, self.seed = class_label, batch_size, seed
        self.model, unet = model, self.pipe.unet
        check_label(model, unet, class_label)
        check_memory(model, unet)
        self.learned = unet.config.out_channels == 2 * unet.config.in_channels
        self.path = self.pipe.scheduler.path
        self.T, top = self.path.T, self.path.level(self.path.T)
        if top.noise > 1 + 1e-9:
            raise ValueError(
                f"{model} ends at x_0 + {top.noise:.4g}·ε, and likelihoods are measured on paths that end near N(0, "
                "I): measure a model of the paper's process or of flow matching"
            )
        self.prediction_type = self.pipe.scheduler.config.prediction_type

    def check(self, variances: tuple[str, ...], save_model: str | None) -> None:
        """Raise ValueError for variances that this model does not have, and for a folder that could not be saved."""
        if not self.learned and "learned_range" in variances:
            raise ValueError("the network has no variance of its own: leave learned_range out of variances")
        if "optimal" in variances and self.path.level(self.T).signal == 0:
            raise ValueError(
                "variance optimal is undefined at pure noise, where this path begins: pass --variances fixed_small "
                "fixed_large"
            )
        if save_model is not None and isinstance(self.path, FlowMatching):
            raise ValueError("--save_model saves E‖ε̂‖² for variance optimal, which flow matching lacks: leave it out")

    def times(self, spacing: str, S: int) -> NDArray[np.int64]:
        """Return the distinct whole times of a spacing: a repeated time is no move."""
        scheduler = self.pipe.scheduler
        if isinstance(self.path, FlowMatching) and spacing == scheduler.config.timestep_spacing:
            scheduler.set_timesteps(S)  # with its shift
            return np.unique(np.rint([self.path.time(t) for t in scheduler.timesteps.tolist()]).astype(np.int64))
        return np.unique(spacings.tau(spacing, S, self.T, alpha_bar=self.pipe.scheduler.alpha_bar))

    def network(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the output at the time t, (B,), whole or real. Raises ValueError if it is not finite."""
        label = self.class_label
        labels = None if label is None else torch.full((len(x),), label, device=x.device)
        timesteps: Any = self.path.timestep(t.to(x.device))  # type: ignore[arg-type]
        return finite(self.pipe.unet(x, timesteps.clamp(min=0), class_labels=labels).sample)

    def costs(self, config: Any, along: dict[int, NDArray[np.int64]]) -> dict[str, float]:
        """Estimate the evaluations of the network for an image, in each part of what `nll.py` measures."""
        bounds = config.images * len(config.variances) * (1 + config.searched)
        found: dict[str, float] = {"errors": self.T * config.fit_images}
        found |= {f"S = {S}": bounds * (config.draws or len(times)) for S, times in along.items()}
        return found | ({"ODE": OF_ODE * min(config.ode_images, config.images)} if config.ode else {})

    def batches(self, images: Tensor) -> Iterable[tuple[Tensor, list[Generator]]]:
        """Yield bytes in batches, (B, C, H, W), and a generator for each image."""
        for start in range(0, len(images), self.batch_size):
            part = images[start : start + self.batch_size].to(self.device)
            yield part, [Generator().manual_seed(self.seed + start + k) for k in range(len(part))]

    def bound(self, images: Tensor, bound: VariationalBound, draws: int = 0) -> dict[str, Any]:
        """Measure a variational bound over the images: mean, standard error, terms; 0 `draws` take every term."""

        def network(x: Tensor, t: Tensor) -> Tensor:
            output = self.network(x, t)
            return output if bound.learned else output[:, : x.shape[1]]

        totals, priors, decoders = [], [], []
        for part, generators in self.batches(images):
            if draws:
                totals.append(bound.sampled(network, to_model(part), generators, draws))
                continue
            terms = bound.exact(network, to_model(part), generators)
            totals.append(terms.total)
            priors.append(terms.prior)
            decoders.append(terms.decoder)
        result = summary(torch.cat(totals)) | {"eta": bound.eta, "nfe": draws or len(bound)}
        if priors:
            prior, decoder = float(torch.cat(priors).mean()), float(torch.cat(decoders).mean())
            result |= {"prior": prior, "transitions": result["bits"] - prior - decoder, "decoder": decoder}
        return result

    def ode(self, images: Tensor, exact_trace: bool, tolerance: float) -> dict[str, Any]:
        """Measure the likelihood of the ODE over the images: mean, standard error, evaluations."""
        found = [
            ode_bits(self.network, part, self.path, self.prediction_type, generators, exact_trace, tolerance)
            for part, generators in self.batches(images)
        ]
        nfe = sum(each.evaluations for each in found) / len(found)
        return summary(torch.cat([each.bits for each in found])) | {"eta": 0.0, "nfe": nfe}

    def errors(self, images: Tensor) -> Errors:
        """Measure the errors of x̂0 and E‖ε̂‖² at every time on these images."""
        found, counts = [], []
        for part, generators in self.batches(images):
            x0 = to_model(part)
            found.append(measure_errors(self.network, x0, self.path, self.prediction_type, generators))
            counts.append(len(part))
        return Errors(*(np.average(each, axis=0, weights=counts) for each in zip(*found, strict=True)))

    def samples(self, count: int) -> Tensor:
        """Draw images of the model itself as bytes, (count, C, H, W)."""
        generators = [Generator().manual_seed(self.seed + i) for i in range(count)]
        labels = {} if self.class_label is None else {"class_labels": self.class_label}
        settings = {"eta": 1.0, "generator": generators, "output_type": "pt", **labels}
        made = self.pipe(count, min(50, self.T), **settings).images
        return (made.float().cpu() * 255).round().to(torch.uint8)

    def load(self, data: str, split: str, count: int, **reading: Any) -> Tensor:
        """Read the first images of a data set as bytes, (N, C, H, W), and note on stderr if there are fewer."""
        channels, size = self.pipe.image_channels, self.pipe.image_size
        images = load_images(data, split, channels, size, count, **reading)
        if len(images) < count:
            print(f"note: {data} has {len(images)} images in {split}, not {count}", file=sys.stderr)
        return images

    def save(self, folder: str, eps_mean_square: Array) -> None:
        """Save the pipeline with E‖ε̂‖²/d in its scheduler, as variance_type="optimal" needs it."""
        before = self.pipe.scheduler
        table = {"eps_mean_square": eps_mean_square[1:].tolist()}
        self.pipe.scheduler = GeneralizedDDIMScheduler.from_config(before.config, **table)
        self.pipe.save_pretrained(folder)
        if (Folder(self.model) / TRAINING).is_file():  # it holds the names of the classes
            shutil.copyfile(Folder(self.model) / TRAINING, Folder(folder) / TRAINING)
        self.pipe.scheduler = before


def summary(bits: Tensor) -> dict[str, Any]:
    """Return mean and standard error over the images. Raises ValueError if one is not finite."""
    finite(bits, "the likelihood is")
    error = float(bits.std() / len(bits) ** 0.5) if len(bits) > 1 else None
    return {"bits": float(bits.mean()), "standard_error": error, "images": len(bits)}


def earlier_cells(output: Folder, config: Any) -> dict[str, Any]:
    """Read the cells of a run with the same settings. Raises ValueError if its settings differ."""
    file = output / "nll.json"
    if config.overwrite or not file.is_file():
        return {}
    before, now = read_object(file), record(config)["config"]
    known = {key: list(value) if isinstance(value, tuple) else value for key, value in now.items() if key not in FREE}
    changed = [key for key, value in known.items() if before.get("config", {}).get(key) != value]
    if changed:
        raise ValueError(f"{output} has results with another {', '.join(changed)}: choose another, or pass --overwrite")
    return before.get("cells", {})


def kept_errors(file: Folder, settings: dict[str, Any], measure: Callable[[], Errors], overwrite: bool) -> Errors:
    """Read the errors that `file` keeps, or measure them and write it if its settings differ."""
    known = read_object(file) if file.is_file() and not overwrite else {}
    if known.get("settings") == settings:
        errors = Errors(**{key: np.array(known[key]) for key in Errors._fields})
    else:
        errors = measure()
    write_json(
        file, {"settings": settings} | {key: np.asarray(each).tolist() for key, each in errors._asdict().items()}
    )
    return errors


class Searched(NamedTuple):
    """The τ with the smallest bound, and what the tables predict of it and of the τ that it is compared with."""

    times: NDArray[np.int64]
    predicted: float
    predicted_spacing: float


def search(
    path: Path, errors: Errors, variance: str, eta: float, along: dict[int, NDArray[np.int64]]
) -> dict[int, Searched]:
    """Find the τ with the smallest bound for each S of `along`, a τ by its S, with fewer steps than T."""
    costs = bound_costs(path, errors, variance, eta)
    found = best_paths(*costs, max(along))
    return {S: Searched(*found[S - 1], bound_of(times, *costs)) for S, times in along.items() if S < path.T}


def entry(cell: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """Return a cell of `nll.json` as an entry of `results.json`."""
    config = result["config"]
    known = {
        "metric": "bits_per_dim",
        "name": "bits/dim" if cell["S"] is None else "bits/dim, bound",
        "value": cell["bits"],
        "standard_error": cell["standard_error"],
        "nfe": cell["nfe"],
        "dataset": as_dataset(config["data"], config["split"], config.get("data_config")),
        "num_inference_steps": cell["S"],
        "eta": cell["eta"],
        "variance_type": cell["variance"],
        "timestep_spacing": cell["tau"],
        "images": cell["images"],
        "seed": config["seed"],
    }
    return {key: value for key, value in known.items() if value is not None}


def table(result: dict[str, Any]) -> str:
    """Return bits per dimension in Markdown, a row for each cell of `nll.json`."""
    lines = [
        "| S | variance | η | τ | bits/dim | prior | transitions | decoder | images | evaluations |",
        "|---" * 10 + "|",
    ]
    for cell in result["cells"].values():
        error = "" if cell["standard_error"] is None else f" ± {cell['standard_error']:.4f}"
        parts = [f"{cell[key]:.4f}" if key in cell else "" for key in ("prior", "transitions", "decoder")]
        known = [cell["S"] or "", cell["variance"], f"{cell['eta']:g}", cell["tau"] or "", f"{cell['bits']:.4f}{error}"]
        lines.append("| " + " | ".join(map(str, [*known, *parts, cell["images"], f"{cell['nfe']:.0f}"])) + " |")
    data = Folder(result["config"]["data"]).name
    known = f"\n\n{OF_SEEDS}" if "cifar10" in data.lower().replace("-", "") else ""
    return f"Bits per dimension of {data}, {result['config']['split']}.\n\n" + "\n".join(lines) + f"{known}\n"
