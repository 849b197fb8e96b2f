"""Draw three pictures that explain a model: one noise at many S, an exact inverse beside the plain one, and paths.

python training/gallery.py --model model_cards/ddim-mnist-28 --output out/gallery
python training/gallery.py --model out/mnist --data my/mnist --output out/gallery
"""

import guard

if __name__ == "__main__":
    guard.start()  # before the imports that take seconds

import io
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cards.weights import weights_digest
from guard.progress import Progress
from guard.writing import write_file
from matplotlib import colormaps
from measure.reconstructions import Bench, arrays, round_trip
from pictures import Frame, Pictures, Reading, choose_split, open_pictures
from pictures.grids import grid
from pictures.strips import HELD_OUT, choose, read_strip, to_strip
from torch import Tensor
from trainer.settings import command, parse, record, write_json

PICTURES = {
    "one-noise.png": "The same noise in each column, at several S.",
    "exact-inverse.png": "Held-out images, encoded and decoded at the same S: by the plain inverse, and exactly.",
    "paths.png": "Paths between held-out images, each encoded exactly.",
    HELD_OUT: "Held-out images: the first of each class, and the next of the set.",
}
RECORD, TABLE = "gallery.json", "gallery.md"
CELL, TEXT = 84, 32
"""Height of a picture and of the text, in pixels. Both are readable at the width of a telephone."""


@dataclass(frozen=True)
class GalleryConfig(Reading):
    """Draw the same noise at many S, the exact inverse beside the plain one, and paths between held-out images."""

    model: str = field(metadata={"help": "a folder written by save_pretrained, or a Hub id"})
    output: str = field(default="out/gallery", metadata={"help": "folder for the pictures"})
    data: str | None = field(
        default=None, metadata={"help": f"data set of the held-out images; by default {HELD_OUT} of the model's folder"}
    )
    split: str | None = field(default=None, metadata={"help": "its split; by default test, validation or train"})
    images: int = field(default=12, metadata={"help": f"images in {HELD_OUT}"})
    columns: int = field(default=10, metadata={"help": "pictures in a row"})
    steps: tuple[int, ...] = field(default=(2, 5, 10, 20, 50, 100), metadata={"help": "S of the same noise"})
    inverse_steps: int = field(default=10, metadata={"help": "S of the two inverses"})
    refinement_steps: int = field(default=4, metadata={"help": "refinements of a step of the exact inverse"})
    paths: int = field(default=4, metadata={"help": "paths between two images"})
    points: int = field(default=9, metadata={"help": "images on a path"})
    path_steps: int = field(default=20, metadata={"help": "S of the paths"})
    spacing: str = field(default="linear", metadata={"help": "τ by name"})
    class_label: int | None = field(default=None, metadata={"help": "label of all images, for a conditional network"})
    batch_size: int = field(default=64, metadata={"help": "images at a time"})
    seed: int = field(default=0, metadata={"help": "noise i comes from seed + i"})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, …; by default an accelerator if any"})
    overwrite: bool = field(default=False, metadata={"help": "replace the pictures of an earlier run"})


def check(config: GalleryConfig) -> None:
    """Raise ValueError for settings out of range, and for pictures that must not be replaced."""
    for name in ("columns", "inverse_steps", "refinement_steps", "paths", "path_steps", "batch_size"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be positive, not {getattr(config, name)}")
    if min(config.steps, default=0) < 1 or config.points < 2:
        raise ValueError(f"steps must be positive, not {config.steps}, and points 2 or more, not {config.points}")
    if config.images < max(config.columns, 2 * config.paths):
        needed = f"{config.columns} columns and {config.paths} paths"
        raise ValueError(f"{needed} need {max(config.columns, 2 * config.paths)} images, not {config.images}")
    for name in (*PICTURES, RECORD, TABLE):
        if (Path(config.output) / name).exists() and not config.overwrite:
            raise ValueError(f"{Path(config.output) / name} exists: choose another output, or pass --overwrite")


@guard.output(alone=True, results="gallery")
def main(config: GalleryConfig) -> dict[str, Any]:
    """Write the pictures, and the errors of both inverses as `gallery.json` and `gallery.md`; return the former."""
    check(config)
    if config.data is not None:
        config = replace(config, split=choose_split(config.data, config.split, config.data_config))
    S, k, label = config.inverse_steps, config.refinement_steps, config.class_label
    used = {*config.steps, S, config.path_steps}
    bench = Bench(config.model, used, config.spacing, label, config.batch_size, 1e-5, config.device)
    images, numbers = find_images(config, bench.pipe.image_channels, bench.pipe.image_size)
    real, pairs = images[: config.columns], images[: 2 * config.paths]
    exact = 2 * k  # about the evaluations of the network for a step of the exact inverse
    work = config.columns * (sum(config.steps) + (3 + exact) * S)
    work += config.path_steps * (len(pairs) * exact + config.paths * config.points)
    with Progress(work, "gallery") as bar, bar.counting(bench.pipe.unet):
        noise = bench.noise(config.columns, config.seed)
        strip = [bench.decode(noise, each) for each in config.steps]
        rows, plain = inverse_rows(bench, real, S, None)
        with bar.part(config.columns * (1 + exact) * S):
            more, refined = inverse_rows(bench, real, S, k)
        with bar.part(len(pairs) * exact * config.path_steps):
            z, _ = bench.encode(pairs, config.path_steps, k)
        paths = bench.interpolate(z[0::2], z[1::2], config.path_steps, config.points)
    rows = [("Images that the model was not trained on", arrays([real / 255])[0]), *rows, *more]
    labels, cells = zip(*rows, strict=True)
    made = {
        "one-noise.png": grid(
            arrays(strip), [*map(str, config.steps)], "Steps, from the same noise in each column", CELL, TEXT
        ),
        "exact-inverse.png": grid(cells, labels, "", CELL, TEXT, above=True),
        "paths.png": grid(arrays(paths), cell=CELL),
        HELD_OUT: to_strip(images),
    }
    output = Path(config.output)
    for name, picture in made.items():
        picture.save(file := io.BytesIO(), format="PNG", optimize=True)
        write_file(output / name, file.getvalue())
    known = {"model": {"sha256": weights_digest(bench.pipe.unet)}, "script": "gallery"}
    write_json(output / "results.json", known | {"results": [], "pictures": PICTURES})
    result = record(config) | {"command": command(config), "device": bench.device, "model": known["model"]}
    result |= {"held_out": numbers, "plain": plain, "exact": refined}
    write_json(output / RECORD, result)
    write_file(output / TABLE, table(result))
    return result


def find_images(config: GalleryConfig, channels: int, size: tuple[int, int]) -> tuple[Tensor, list[int] | None]:
    """Return held-out images, uint8 (N, C, H, W), and their numbers in the data set, None if a picture holds them.

    Raises ValueError if there are too few, or no data set and no picture.
    """
    if config.data is None:
        file = Path(config.model) / HELD_OUT
        if not file.is_file():
            raise ValueError(f"{config.model} has no {HELD_OUT}: pass the data set of held-out images, --data")
        images, numbers = read_strip(file, channels, size), None
    else:
        pictures, frame = open_labelled(config.data, config), Frame(channels, size)
        numbers = [i for i in choose(pictures.labels, config.images) if i < pictures.count]
        images = torch.from_numpy(np.stack([frame.read(pictures, i) for i in numbers]))
    if len(images) < config.images:
        raise ValueError(f"there are {len(images)} held-out images, not {config.images}: pass --images {len(images)}")
    return images[: config.images], numbers


def open_labelled(data: str, config: GalleryConfig) -> Pictures:
    """Open a data set, with its labels if it has any."""
    try:
        return open_pictures(data, config.split, labelled=True, **config.reading)
    except ValueError as error:
        if "label" not in str(error):
            raise
        return open_pictures(data, config.split, **config.reading)


def inverse_rows(
    bench: Bench, images: Tensor, S: int, refinement_steps: int | None
) -> tuple[list[tuple[str, np.ndarray]], dict[str, Any]]:
    """Encode and decode images, uint8 (N, C, H, W).

    Returns two rows of a picture with their labels, the reconstructions and ten times their error, and the row of
    Table 2 with the error of each image.
    """
    row, again = round_trip(bench, images, S, refinement_steps)
    error = (again - images / 255).abs()
    kind = "by the plain inverse" if refinement_steps is None else "exactly"
    ten_times = colormaps["inferno"]((10 * error.mean(1)).clamp(0, 1).numpy())[..., :3]
    rows = [
        (f"Encoded {kind} and decoded, {S} steps each", arrays([again])[0]),
        (f"Ten times its error (mean square {row['mean_squared_error']:.1e})", ten_times),
    ]
    return rows, row | {"errors": error.square().flatten(1).mean(1).tolist()}


def table(result: dict[str, Any]) -> str:
    """Format the errors of both inverses in Markdown."""
    lines = [f"Mean squared error of an image on [0, 1], S = {result['plain']['S']}.", ""]
    lines += ["| image | plain inverse | exact inverse |", "|---|---|---|"]
    both = zip(result["plain"]["errors"], result["exact"]["errors"], strict=True)
    lines += [f"| {i} | {plain:.1e} | {exact:.1e} |" for i, (plain, exact) in enumerate(both)]
    means = [f"{result[kind]['mean_squared_error']:.1e}" for kind in ("plain", "exact")]
    return "\n".join([*lines, f"| mean | {' | '.join(means)} |"]) + "\n"


if __name__ == "__main__":
    with guard.program():
        done = main(parse(GalleryConfig))
        for name in (*PICTURES, RECORD, TABLE):
            print(Path(done["config"]["output"]) / name)
