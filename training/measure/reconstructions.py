"""Encode, decode and interpolate images, and measure how well that works (Table 2, Figs. 5 and 6 of the paper)."""

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pictures import as_dataset
from torch import Generator, Tensor

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler
from ddim_plugin.process.inversion import InversionReport
from ddim_plugin.schedulers import DETERMINISTIC, keep_learned

from .labels import check_label, check_memory

PAPER = {10: 0.014, 20: 0.0065, 50: 0.0023, 100: 0.0009, 200: 0.0004, 500: 0.0001, 1000: 0.0001}
"""Table 2: errors on CIFAR-10's test set, with the paper's network of 35.7M parameters."""

EXACT = 3
"""About the evaluations of the network for a step of the exact inverse, by which the time left is estimated."""


class Bench:
    """A model with η = 0 that encodes and decodes images in batches, with its results on the CPU.

    It shows no progress: scripts count the evaluations of `pipe.unet` (`guard.progress`).

    Args:
        model: a folder written by `save_pretrained`, or a Hub id.
        steps: all numbers of steps S that will be used.
        spacing: spacing of the timesteps; None keeps the model's.
        class_label: label of all images, for a conditional network.
        batch_size: images at a time.
        tolerance: residual at which a move is solved.
        device: None takes a GPU if there is one.

    Raises:
        ValueError: an S does not fit the model, or the network needs another `class_label` or a `sample_size`.
    """

    def __init__(
        self,
        model: str,
        steps: Iterable[int],
        spacing: str | None,
        class_label: int | None,
        batch_size: int,
        tolerance: float,
        device: str | None,
    ):
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.pipe = GeneralizedDDIMPipeline.from_pretrained(model).to(self.device)
        self.pipe.set_progress_bar_config(disable=True)
        before = self.pipe.scheduler.config
        changes = DETERMINISTIC if spacing is None else DETERMINISTIC | {"timestep_spacing": spacing}
        self.pipe.scheduler = GeneralizedDDIMScheduler.from_config(before, **keep_learned(before, changes))
        for S in steps:
            self.pipe.scheduler.set_timesteps(S)
        check_label(model, self.pipe.unet, class_label)
        check_memory(model, self.pipe.unet)
        if self.pipe.image_size is None:
            raise ValueError("the network's config has no sample_size: set it there")
        self.tolerance, self.shared = tolerance, {"batch_size": batch_size, "class_labels": class_label}

    def encode(self, images: Tensor, S: int, refinement_steps: int | None) -> tuple[Tensor, InversionReport]:
        """Return latents, and the report of the inversion."""
        settings = {"refinement_steps": refinement_steps, "tolerance": self.tolerance, "return_report": True}
        z, report = self.pipe.encode(images, S, **settings, **self.shared)
        return z.cpu(), report

    def decode(self, z: Tensor, S: int) -> Tensor:
        """Return images in [0, 1]."""
        return self.pipe.decode(z, S, output_type="pt", **self.shared).float().cpu()

    def interpolate(self, z0: Tensor, z1: Tensor, S: int, points: int) -> Tensor:
        """Return the images of paths between latents, (pairs, points, C, H, W)."""
        made = self.pipe.interpolate(z0, z1, points, num_inference_steps=S, output_type="pt", **self.shared)
        return made.float().cpu().view(len(z0), points, *z0.shape[1:])

    def interpolate_grid(self, z: Tensor, S: int, points: int) -> Tensor:
        """Return the images of a grid between four latents, (points, points, C, H, W)."""
        made = self.pipe.interpolate_grid(z, points, num_inference_steps=S, output_type="pt", **self.shared)
        return made.float().cpu().view(points, points, *z.shape[1:])

    def noise(self, count: int, seed: int) -> Tensor:
        """Draw latents, number i from the seed `seed` + i."""
        shape = (1, self.pipe.unet.config.in_channels, *self.pipe.image_size)
        return torch.cat([torch.randn(shape, generator=Generator().manual_seed(seed + i)) for i in range(count)])


def cost(images: int, config: Any) -> float:
    """Estimate the evaluations of the network for an image, in all measurements of `reconstruct.py`."""
    table = images * sum(config.steps) * (3 + EXACT)
    pairs = min(config.paths, images // 2)
    made = max(2 * pairs, 4) * EXACT + pairs * config.points + config.points**2 if pairs else 0
    return table + config.columns * sum(config.figure_steps) + config.interpolation_steps * made


# ---- measurements --------------------------------------------------------------------------------------------------


def round_trip(bench: Bench, images: Tensor, S: int, refinement_steps: int | None) -> tuple[dict[str, Any], Tensor]:
    """Encode and decode images; return a row of Table 2, and the reconstructions in [0, 1].

    `refinement_steps` is None for the plain inverse of the paper.
    """
    start = time.perf_counter()
    z, report = bench.encode(images, S, refinement_steps)
    again = bench.decode(z, S)
    seconds = time.perf_counter() - start
    errors = (again - images.float() / 255).pow(2).flatten(1).mean(1).double()
    row = {
        "S": S,
        "refinement_steps": refinement_steps,
        "mean_squared_error": float(errors.mean()),
        "standard_error": float(errors.std() / len(errors) ** 0.5) if len(errors) > 1 else None,
        "largest_error": float(errors.max()),
        "evaluations_encoding": float(report.total_evaluations.mean()),
        "evaluations_decoding": len(bench.pipe.scheduler.timesteps),
        "largest_evaluations_a_move": int(report.evaluations.max()),
        "latent_std": float(report.latent_std.mean()),
        "latent_mean": float(report.latent_mean.mean()),
        "seconds": seconds,
    }
    if refinement_steps:
        row["not_converged"] = report.timesteps[~report.converged.all(1)].tolist()
        row["largest_residual"] = float(report.residual.max())
    return row, again


def same_latent(bench: Bench, steps: Sequence[int], count: int, seed: int) -> tuple[dict[str, Any], list[Tensor]]:
    """Decode the same `count` latents at several S (Fig. 5).

    Returns root mean square distances on [0, 1], and the images at each S. The distances are, for each S but the last,
    those from the last S, and those between images of different latents at the last S.
    """
    z = bench.noise(count, seed)
    rows = [bench.decode(z, S) for S in steps]
    last = rows[-1]
    other = rms(last - last.roll(1, 0)) if len(last) > 1 else None
    same = {S: rms(row - last) for S, row in zip(steps[:-1], rows[:-1], strict=True)}
    return {"reference_S": steps[-1], "same_latent": same, "different_latents": other}, rows


def paths(bench: Bench, images: Tensor, z: Tensor, S: int, points: int) -> tuple[dict[str, Any], Tensor]:
    """Interpolate between pairs of images and measure the steps of each path (Fig. 6).

    Args:
        images: uint8 (2·pairs, C, H, W); a pair is two images in succession.
        z: their latents.
        S: number of steps.
        points: number of images on a path.

    Returns:
        The largest step over the mean one, and the error of the ends; and the paths (pairs, points, C, H, W).
    """
    made = bench.interpolate(z[0::2], z[1::2], S, points)
    steps = (made[:, 1:] - made[:, :-1]).flatten(2).pow(2).mean(2).sqrt()
    ratio = steps.max(1).values / steps.mean(1)
    error = (torch.stack([made[:, 0], made[:, -1]], 1).flatten(0, 1) - images.float() / 255).pow(2).mean()
    result = {
        "S": S,
        "points": points,
        "paths": len(made),
        "largest_over_mean_step": {
            "mean": float(ratio.mean()),
            "largest": float(ratio.max()),
            "share_above_3": float((ratio > 3).float().mean()),
        },
        "mean_squared_error_of_the_ends": float(error),
    }
    return result, made


def rms(x: Tensor) -> float:
    """Return the root mean square."""
    return float(x.pow(2).mean().sqrt())


# ---- tables and figures --------------------------------------------------------------------------------------------


def entries(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Convert the rows of a record to entries of `results.json`."""
    config, found = result["config"], []
    for row in result["table"]:
        kind = "refined" if row["refinement_steps"] else "naive"
        known = {
            "metric": f"reconstruction_error_{kind}",
            "name": f"Reconstruction error for a dimension on [0, 1] (Table 2), {kind}",
            "value": row["mean_squared_error"],
            "standard_error": row["standard_error"],
            "nfe": row["evaluations_encoding"] + row["evaluations_decoding"],
            "dataset": as_dataset(config["data"], config["split"], config.get("data_config")),
            "num_inference_steps": row["S"],
            "eta": 0.0,
            "timestep_spacing": result["spacing"],
            "images": result["images"],
        }
        found.append({key: value for key, value in known.items() if value is not None})
    return found


def table(result: dict[str, Any]) -> str:
    """Format the record as Table 2, in Markdown."""
    cells = ("error", "evaluations", "seconds", "latents' σ")
    heads = [f"{kind} {cell}" for kind in ("naive", "refined") for cell in cells]
    lines = [
        f"Error for a dimension on [0, 1] images, {result['images']} images of {Path(result['config']['data']).name}, "
        f"τ {result['spacing']}. Evaluations of the network to encode one image; seconds for all, there and back.",
        "",
        "| S | paper, CIFAR-10 | " + " | ".join(heads) + " |",
        "|---" * 10 + "|",
    ]
    for S in dict.fromkeys(row["S"] for row in result["table"]):
        line = [str(S), f"{PAPER[S]:.4f}" if S in PAPER else ""]
        for row in (row for row in result["table"] if row["S"] == S):
            line += [f"{row['mean_squared_error']:.1e}", f"{row['evaluations_encoding']:.0f}"]
            line += [f"{row['seconds']:.1f}", f"{row['latent_std']:.3f}"]
        lines.append("| " + " | ".join(line + [""] * (10 - len(line))) + " |")
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    """Plot the error against S, and against the evaluations of the network for encoding."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    by_steps, by_evaluations = figure.subplots(1, 2, sharey=True)
    for refined in (False, True):
        rows = [row for row in result["table"] if bool(row["refinement_steps"]) is refined]
        errors = [row["mean_squared_error"] for row in rows]
        style = {"marker": "o", "label": "refined" if refined else "naive"}
        by_steps.plot([row["S"] for row in rows], errors, **style)
        by_evaluations.plot([row["evaluations_encoding"] for row in rows], errors, **style)
    paper = {S: PAPER[S] for S in sorted({row["S"] for row in result["table"]} & PAPER.keys())}
    by_steps.plot(list(paper), list(paper.values()), "--", color="gray", label="paper, CIFAR-10")
    for axes, label in ((by_steps, "S"), (by_evaluations, "network evaluations for encoding an image")):
        axes.set(xscale="log", yscale="log", xlabel=label)
        axes.grid(alpha=0.3)
        axes.legend()
    by_steps.set_ylabel("mean squared error on [0, 1]")
    figure.savefig(path, dpi=110)


def arrays(rows: Iterable[Tensor]) -> list[np.ndarray]:
    """Convert rows of images (N, C, H, W) to arrays (N, H, W, C)."""
    return [row.permute(0, 2, 3, 1).numpy() for row in rows]
