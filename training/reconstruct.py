"""Table 2 and Figs. 5 and 6 of the paper, for any model and image set: encode, decode, interpolate.

python training/reconstruct.py --model user/model --data pictures --output out/reconstruct
"""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pictures.sources import as_dataset, load_images
from torch import Generator, Tensor
from trainer.settings import parse, record, write_json

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler
from ddim_plugin.hub.reading import weights_digest, write_whole
from ddim_plugin.pipelines.images import grid
from ddim_plugin.process.inversion import InversionReport
from ddim_plugin.schedulers.generalized import DETERMINISTIC, keep_learned

PAPER = {10: 0.014, 20: 0.0065, 50: 0.0023, 100: 0.0009, 200: 0.0004, 500: 0.0001, 1000: 0.0001}
"""Table 2: CIFAR-10's test set, the paper's 35.7M network."""

PICTURES = {
    "table2.png": "Table 2: the error of reconstructions against S.",
    "reconstructions.png": "Held-out images, encoded and decoded.",
    "figure5.png": "One latent in each column, decoded at several S (Fig. 5 of the paper).",
    "interpolations.png": "Paths between pairs of held-out images.",
    "figure6.png": "The grid between four held-out images (Fig. 6 of the paper).",
}
WRITTEN = ["reconstruct.json", "results.json", "table2.md", *PICTURES]


@dataclass(frozen=True)
class ReconstructConfig:
    """Measure how well images are reconstructed from their latents (Table 2), naively and by exact inversion.

    Also whether one latent gives one picture at any S (Fig. 5), and whether interpolations are smooth (Fig. 6).
    """

    model: str = field(metadata={"help": "a folder written by save_pretrained, or a Hub id"})
    output: str = field(default="out/reconstruct", metadata={"help": "folder for the results"})
    data: str = field(default="digits", metadata={"help": "digits, a folder of images, parquet or arrow, or a Hub id"})
    split: str = field(default="test", metadata={"help": "split of a data set of the Hub, or of digits"})
    images: int = field(default=100, metadata={"help": "images to reconstruct, the first of the set"})
    steps: tuple[int, ...] = field(default=(10, 20, 50, 100, 200, 500, 1000), metadata={"help": "rows of the table, S"})
    refinement_steps: tuple[int, ...] = field(
        default=(14, 9, 5, 5, 5, 5, 5),
        metadata={"help": "evaluations to refine a move with: one for each S, or for all"},
    )
    tolerance: float = field(default=1e-5, metadata={"help": "residual at which a move is solved"})
    spacing: str | None = field(default=None, metadata={"help": "τ by name; by default the model's"})
    strip: tuple[int, int] = field(default=(10, 100), metadata={"help": "few and many S of the strip of pictures"})
    figure_steps: tuple[int, ...] = field(default=(10, 20, 50, 100), metadata={"help": "S in the figure of one latent"})
    paths: int = field(default=8, metadata={"help": "interpolations between pairs of images to measure; 0 for none"})
    points: int = field(default=11, metadata={"help": "images on a path, and in a row of the grid"})
    interpolation_steps: int = field(default=20, metadata={"help": "S of the interpolations"})
    batch_size: int = field(default=64, metadata={"help": "images at a time"})
    columns: int = field(default=12, metadata={"help": "pictures in a row of the strip and of Fig. 5"})
    class_label: int | None = field(default=None, metadata={"help": "label of all images, for a conditional network"})
    seed: int = field(default=0, metadata={"help": "random latent i comes from seed + i"})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, …; by default an accelerator if any"})
    overwrite: bool = field(default=False, metadata={"help": "replace the results of an earlier run"})


def check(config: ReconstructConfig) -> None:
    """Raise ValueError for settings that cannot work, before anything is loaded."""
    for name in ("images", "batch_size", "columns", "interpolation_steps"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be positive, not {getattr(config, name)}")
    for name in ("steps", "refinement_steps", "strip", "figure_steps"):
        values = getattr(config, name)
        if not values or min(values) < 1:
            raise ValueError(f"{name} must be positive numbers, not {values}")
    if len(set(config.steps)) < len(config.steps):
        raise ValueError(f"steps must be distinct, not {config.steps}")
    if len(config.refinement_steps) not in (1, len(config.steps)):
        raise ValueError(f"refinement_steps has {len(config.refinement_steps)} entries for {len(config.steps)} steps")
    if len(config.strip) != 2:
        raise ValueError(f"strip takes two numbers of steps, not {len(config.strip)}")
    if config.points < 2 or config.paths < 0:
        raise ValueError(f"points must be at least 2 and paths at least 0, not {config.points} and {config.paths}")
    if not 0 <= config.tolerance < float("inf"):
        raise ValueError(f"tolerance must be a non-negative number, not {config.tolerance}")
    there = [name for name in WRITTEN if (Path(config.output) / name).exists()]
    if there and not config.overwrite:
        raise ValueError(f"{Path(config.output) / there[0]} exists: choose another output, or pass --overwrite")


class Bench:
    """A model with the settings of its runs: encodes and decodes in batches."""

    def __init__(self, config: ReconstructConfig):
        device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.pipe = GeneralizedDDIMPipeline.from_pretrained(config.model).to(device)
        before = self.pipe.scheduler.config
        changes = DETERMINISTIC if config.spacing is None else DETERMINISTIC | {"timestep_spacing": config.spacing}
        self.pipe.scheduler = GeneralizedDDIMScheduler.from_config(before, **keep_learned(before, changes))
        for S in {*config.steps, *config.strip, *config.figure_steps, config.interpolation_steps}:
            self.pipe.scheduler.set_timesteps(S)  # raises ValueError where S does not fit
        if (self.pipe.unet.class_embedding is not None) != (config.class_label is not None):
            known = "is unconditional: leave class_label out" if config.class_label is not None else "needs class_label"
            raise ValueError(f"the network {known}")
        if self.pipe.image_size is None:
            raise ValueError("the network's config has no sample_size: set it there")
        self.config, self.device = config, device
        self.shared = {"batch_size": config.batch_size, "class_labels": config.class_label}

    def encode(self, images: Tensor, S: int, refinement_steps: int) -> tuple[Tensor, InversionReport]:
        """Latents on the CPU, and the report."""
        self.pipe.set_progress_bar_config(leave=False, desc=f"S = {S}, encoding")
        settings = {"refinement_steps": refinement_steps, "tolerance": self.config.tolerance, "return_report": True}
        z, report = self.pipe.encode(images, S, **settings, **self.shared)
        return z.cpu(), report

    def decode(self, z: Tensor, S: int) -> Tensor:
        """Images in [0, 1] on the CPU."""
        self.pipe.set_progress_bar_config(leave=False, desc=f"S = {S}, decoding")
        return self.pipe.decode(z, S, output_type="pt", **self.shared).float().cpu()

    def interpolate(self, z0: Tensor, z1: Tensor) -> Tensor:
        """Images of the paths, (pairs, points, C, H, W), on the CPU."""
        S, points = self.config.interpolation_steps, self.config.points
        self.pipe.set_progress_bar_config(leave=False, desc=f"S = {S}, interpolating")
        made = self.pipe.interpolate(z0, z1, points, num_inference_steps=S, output_type="pt", **self.shared)
        return made.float().cpu().view(len(z0), points, *z0.shape[1:])

    def noise(self, count: int) -> Tensor:
        """Random latents, each from its own seed."""
        shape = (1, self.pipe.unet.config.in_channels, *self.pipe.image_size)
        seeds = range(self.config.seed, self.config.seed + count)
        return torch.cat([torch.randn(shape, generator=Generator().manual_seed(seed)) for seed in seeds])


def round_trip(bench: Bench, images: Tensor, S: int, refinement_steps: int) -> tuple[dict[str, Any], Tensor]:
    """A row of the table, and the reconstructions."""
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
        row["not_converged"] = report.where(~report.converged)
        row["at_floor"] = report.where(report.at_floor)
        row["largest_residual"] = float(report.residual.max())
    return row, again


def same_latent(bench: Bench) -> tuple[dict[str, Any], list[Tensor]]:
    """Fig. 5: latents decoded at several S. Distances are root mean squares on [0, 1] images.

    Of each S to the last: the decodings of one latent from each other, and of different latents.
    """
    config = bench.config
    z = bench.noise(config.columns)
    rows = [bench.decode(z, S) for S in config.figure_steps]
    last = rows[-1]
    other = rms(last - last.roll(1, 0)) if len(last) > 1 else None
    same = {S: rms(row - last) for S, row in zip(config.figure_steps[:-1], rows[:-1], strict=True)}
    return {"reference_S": config.figure_steps[-1], "same_latent": same, "different_latents": other}, rows


def paths(bench: Bench, images: Tensor, z: Tensor) -> tuple[dict[str, Any], Tensor]:
    """Fig. 6 measured: paths between pairs of images, and their steps: the largest over the mean one of each path.

    `z` are the latents of the first images, two for each path at least. Returns also the path of each pair, (pairs,
    points, C, H, W).
    """
    config = bench.config
    pairs = min(config.paths, len(images) // 2)
    made = bench.interpolate(z[0 : 2 * pairs : 2], z[1 : 2 * pairs : 2])
    steps = (made[:, 1:] - made[:, :-1]).flatten(2).pow(2).mean(2).sqrt()
    ratio = steps.max(1).values / steps.mean(1)
    ends = images[: 2 * pairs].float() / 255
    error = (torch.stack([made[:, 0], made[:, -1]], 1).flatten(0, 1) - ends).pow(2).mean()
    result = {
        "S": config.interpolation_steps,
        "points": config.points,
        "paths": pairs,
        "largest_over_mean_step": {
            "mean": float(ratio.mean()),
            "largest": float(ratio.max()),
            "share_above_3": float((ratio > 3).float().mean()),
        },
        "mean_squared_error_of_the_ends": float(error),
    }
    return result, made


def main(config: ReconstructConfig) -> dict[str, Any]:
    """Write reconstruct.json, results.json and table2.md after each measurement, then the plot and the pictures."""
    check(config)
    bench = Bench(config)
    unet = bench.pipe.unet.config
    images = load_images(config.data, config.split, unet.in_channels, bench.pipe.image_size, config.images)
    if len(images) < config.images:
        print(f"note: {config.data} has {len(images)} images, not {config.images}", file=sys.stderr)
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    refinements = config.refinement_steps * (len(config.steps) if len(config.refinement_steps) == 1 else 1)
    result: dict[str, Any] = record(config) | {
        "images": len(images),
        "device": bench.device,
        "spacing": bench.pipe.scheduler.config.timestep_spacing,
        "model": {"sha256": weights_digest(bench.pipe.unet)},
        "table": [],
    }
    pictures: dict[tuple[int, bool], Tensor] = {}
    for S, refinement in zip(config.steps, refinements, strict=True):
        for steps in dict.fromkeys((0, refinement)):
            row, again = round_trip(bench, images, S, steps)
            pictures[S, steps > 0] = again
            if not result["table"]:
                for name in WRITTEN:
                    (output / name).unlink(missing_ok=True)  # no result beside those of another run
            result["table"].append(row)
            write_results(result, output)
            print(f"S = {S:4d}  {'refined' if steps else 'naive  '}  error {row['mean_squared_error']:.2e}")
    plot(result, output / "table2.png")

    few, many = config.strip
    shown = images[: config.columns]
    for S, steps in ((few, 0), (few, refinements[0]), (many, 0)):
        if (S, steps > 0) not in pictures:
            pictures[S, steps > 0] = round_trip(bench, shown, S, steps)[1]
    rows = [shown.float() / 255] + [
        pictures[key][: config.columns] for key in ((few, False), (few, True), (many, False))
    ]
    labels = ["image", f"naive S = {few}", f"refined S = {few}", f"naive S = {many}"]
    grid(arrays(rows), labels).save(output / "reconstructions.png")

    result["figure_5"], rows = same_latent(bench)
    labels = [f"S = {S}" for S in config.figure_steps]
    grid(arrays(rows), labels, "one latent in each column").save(output / "figure5.png")

    if config.paths and len(images) >= 2:
        z, _ = bench.encode(images[: max(2 * config.paths, 4)], config.interpolation_steps, refinements[0])
        result["figure_6"], made = paths(bench, images, z)
        grid(arrays(made)).save(output / "interpolations.png")
        if len(images) >= 4:
            settings = {"num_inference_steps": config.interpolation_steps, "output_type": "pt", **bench.shared}
            cells = bench.pipe.interpolate_grid(z[:4], config.points, **settings).float().cpu()
            cells = cells.view(config.points, config.points, *images.shape[1:])
            grid(arrays(cells), title="between four images").save(output / "figure6.png")
    write_results(result, output)
    return result


# ---- tables and pictures ---------------------------------------------------------------------------------------


def write_results(result: dict[str, Any], output: Path) -> None:
    """The record, and from it `results.json` for cards, with the pictures that are there, and the table."""
    write_json(output / "reconstruct.json", result)
    captions = {name: told for name, told in PICTURES.items() if (output / name).is_file()}
    write_json(output / "results.json", {"model": result["model"], "results": entries(result), "pictures": captions})
    write_whole(output / "table2.md", table(result))


def entries(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table as entries of `results.json`."""
    config, found = result["config"], []
    for row in result["table"]:
        kind = "refined" if row["refinement_steps"] else "naive"
        known = {
            "metric": f"reconstruction_error_{kind}",
            "name": f"Reconstruction error for a dimension on [0, 1] (Table 2), {kind}",
            "value": row["mean_squared_error"],
            "standard_error": row["standard_error"],
            "nfe": row["evaluations_encoding"] + row["evaluations_decoding"],
            "dataset": as_dataset(config["data"], config["split"]),
            "num_inference_steps": row["S"],
            "eta": 0.0,
            "timestep_spacing": result["spacing"],
            "images": result["images"],
        }
        found.append({key: value for key, value in known.items() if value is not None})
    return found


def table(result: dict[str, Any]) -> str:
    """Table 2 in Markdown."""
    cells = ("error", "evaluations", "seconds", "latents' σ")
    lines = [
        f"Error for a dimension on [0, 1] images, {result['images']} images of {Path(result['config']['data']).name}, "
        f"τ {result['spacing']}. Evaluations of the network to encode one image; seconds for all, there and back.",
        "",
        "| S | paper, CIFAR-10 | "
        + " | ".join(f"{kind} {cell}" for kind in ("naive", "refined") for cell in cells)
        + " |",
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
    """Error against S, and against the evaluations that encoding took."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    by_steps, by_evaluations = figure.subplots(1, 2, sharey=True)
    for refined in (False, True):
        rows = [row for row in result["table"] if (row["refinement_steps"] > 0) is refined]
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


def arrays(rows: Any) -> list[np.ndarray]:
    """Rows of images (N, C, H, W) as arrays (N, H, W, C)."""
    return [row.permute(0, 2, 3, 1).numpy() for row in rows]


def rms(x: Tensor) -> float:
    return float(x.pow(2).mean().sqrt())


if __name__ == "__main__":
    try:
        done = main(parse(ReconstructConfig))
    except (ValueError, OSError) as error:
        sys.exit(f"reconstruct.py: {error}")
    except KeyboardInterrupt:
        sys.exit("reconstruct.py: interrupted; what was measured by then is in the output folder")
    for name in WRITTEN:
        if (path := Path(done["config"]["output"]) / name).exists():
            print(path)
