"""Reproduce Table 2 and Figs. 5 and 6 of the paper for any model and image set: encode, decode, interpolate.

python training/reconstruct.py --model user/model --data pictures --output out/reconstruct
"""

import guard

if __name__ == "__main__":
    guard.start()  # before the imports that take seconds

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cards.weights import weights_digest
from guard.progress import Progress
from guard.writing import write_file
from measure.reconstructions import EXACT, Bench, arrays, cost, entries, paths, plot, round_trip, same_latent, table
from pictures import Reading, choose_split, load_images
from pictures.grids import grid
from torch import Tensor
from trainer.settings import command, parse, record, write_json

PICTURES = {
    "table2.png": "Table 2: the error of reconstructions against S.",
    "reconstructions.png": "Held-out images, encoded and decoded.",
    "figure5.png": "One latent in each column, decoded at several S (Fig. 5 of the paper).",
    "interpolations.png": "Paths between pairs of held-out images.",
    "figure6.png": "The grid between four held-out images (Fig. 6 of the paper).",
}
WRITTEN = ["reconstruct.json", "results.json", "table2.md", *PICTURES]


@dataclass(frozen=True)
class ReconstructConfig(Reading):
    """Measure how well images are reconstructed from their latents (Table 2), naively and by exact inversion.

    Also whether one latent gives one picture at any S (Fig. 5), and whether interpolations are smooth (Fig. 6).
    """

    model: str = field(metadata={"help": "a folder written by save_pretrained, or a Hub id"})
    output: str = field(default="out/reconstruct", metadata={"help": "folder for the results"})
    data: str = field(default="digits", metadata={"help": "digits, a folder of images, parquet or arrow, or a Hub id"})
    split: str | None = field(default=None, metadata={"help": "its split; by default test, validation or train"})
    images: int = field(default=100, metadata={"help": "images to reconstruct, the first of the set"})
    steps: tuple[int, ...] = field(default=(10, 20, 50, 100, 200, 500, 1000), metadata={"help": "rows of the table, S"})
    refinement_steps: tuple[int, ...] = field(
        default=(),
        metadata={"help": "refinements of a step: one number for each S, or for all; by default 14, 9 or 5"},
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
    """Raise ValueError for settings out of range, before anything is loaded."""
    for name in ("images", "batch_size", "columns", "interpolation_steps"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be positive, not {getattr(config, name)}")
    for name in ("steps", "refinement_steps", "strip", "figure_steps"):
        values = getattr(config, name)
        if min(values, default=int(name == "refinement_steps")) < 1:
            raise ValueError(f"{name} must be positive numbers, not {values}")
    if len(set(config.steps)) < len(config.steps):
        raise ValueError(f"steps must be distinct, not {config.steps}")
    if len(config.refinement_steps) not in (0, 1, len(config.steps)):
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


@guard.output(alone=True, results="reconstruct")
def main(config: ReconstructConfig) -> dict[str, Any]:
    """Write `reconstruct.json`, `results.json` and `table2.md` after each measurement, then the pictures."""
    check(config)
    refinements = config.refinement_steps or tuple(14 if S < 20 else 9 if S < 50 else 5 for S in config.steps)
    split = choose_split(config.data, config.split, config.data_config)
    config = replace(config, split=split, refinement_steps=refinements)
    used = {*config.steps, *config.strip, *config.figure_steps, config.interpolation_steps}
    settings = (config.class_label, config.batch_size, config.tolerance, config.device)
    bench = Bench(config.model, used, config.spacing, *settings)
    channels, size = bench.pipe.unet.config.in_channels, bench.pipe.image_size
    images = load_images(config.data, config.split, channels, size, config.images, **config.reading)
    if len(images) < config.images:
        print(f"note: {config.data} has {len(images)} images, not {config.images}", file=sys.stderr)
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    spacing = bench.pipe.scheduler.config.timestep_spacing
    result = record(config) | {
        "command": command(replace(config, spacing=spacing)),
        "images": len(images),
        "device": bench.device,
        "spacing": spacing,
        "model": {"sha256": weights_digest(bench.pipe.unet)},
        "table": [],
    }
    refinements = refinements if len(refinements) > 1 else refinements * len(config.steps)
    with Progress(cost(len(images), config), "reconstruct") as bar, bar.counting(bench.pipe.unet):
        made = measure(bench, images, dict(zip(config.steps, refinements, strict=True)), result, output, bar)
        plot(result, output / "table2.png")
        draw_strip(bench, images[: config.columns], config.strip, refinements[0], made, output)

        result["figure_5"], rows = same_latent(bench, config.figure_steps, config.columns, config.seed)
        labels = [f"S = {S}" for S in config.figure_steps]
        grid(arrays(rows), labels, "one latent in each column").save(output / "figure5.png")

        pairs, S = min(config.paths, len(images) // 2), config.interpolation_steps
        if pairs:
            z, _ = bench.encode(images[: max(2 * pairs, 4)], S, refinements[0])
            result["figure_6"], rows = paths(bench, images[: 2 * pairs], z[: 2 * pairs], S, config.points)
            grid(arrays(rows)).save(output / "interpolations.png")
            if len(z) >= 4:
                cells = bench.interpolate_grid(z[:4], S, config.points)
                grid(arrays(cells), title="between four images").save(output / "figure6.png")
    write_results(result, output)
    return result


def measure(
    bench: Bench, images: Tensor, refinements: dict[int, int], result: dict[str, Any], output: Path, bar: Progress
) -> dict[tuple[int, bool], Tensor]:
    """Fill the table of `result`, and write it after each row.

    `refinements` maps S to the evaluations that refine a move. Returns reconstructions by (S, whether refined).
    """
    made = {}
    for S, refinement in refinements.items():
        for refined in (False, True):
            with bar.part(len(images) * S * (1 + EXACT if refined else 2)):
                row, made[S, refined] = round_trip(bench, images, S, refinement if refined else None)
            if not result["table"]:
                for name in WRITTEN:
                    (output / name).unlink(missing_ok=True)  # nothing stays beside results of another run
            result["table"].append(row)
            write_results(result, output)
            bar.print(f"S = {S:4d}  {'refined' if refined else 'naive  '}  error {row['mean_squared_error']:.2e}")
    return made


def draw_strip(
    bench: Bench,
    images: Tensor,
    steps: tuple[int, int],
    refinement: int,
    made: dict[tuple[int, bool], Tensor],
    output: Path,
) -> None:
    """Draw images above their reconstructions at few steps, naive and refined, and at many steps."""
    rows, labels = [images.float() / 255], ["image"]
    for S, refined in ((steps[0], False), (steps[0], True), (steps[1], False)):
        if (S, refined) not in made:
            made[S, refined] = round_trip(bench, images, S, refinement if refined else None)[1]
        rows.append(made[S, refined][: len(images)])
        labels.append(f"{'refined' if refined else 'naive'} S = {S}")
    grid(arrays(rows), labels).save(output / "reconstructions.png")


def write_results(result: dict[str, Any], output: Path) -> None:
    """Write the record, and made from it `results.json` for cards, with the pictures that exist, and the table."""
    write_json(output / "reconstruct.json", result)
    captions = {name: caption for name, caption in PICTURES.items() if (output / name).is_file()}
    write_json(output / "results.json", {"model": result["model"], "results": entries(result), "pictures": captions})
    write_file(output / "table2.md", table(result))


if __name__ == "__main__":
    with guard.program():
        done = main(parse(ReconstructConfig))
        for name in WRITTEN:
            if (path := Path(done["config"]["output"]) / name).exists():
                print(path)
