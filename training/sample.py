"""Load a saved pipeline and draw two grids: samples by the number of steps (the paper's Fig. 5), and by η.

python training/sample.py --model out/digits --output out/digits-pictures
python training/sample.py --model out/digits --output out/digits-arrays --steps 10 --npz 10000
"""

import guard

if __name__ == "__main__":
    guard.start()  # before the imports that take seconds

import io
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import SchedulerMixin
from guard.progress import Progress
from guard.writing import write_file
from measure.labels import check_label
from pictures import Reading, choose_split, load_images
from pictures.grids import grid
from torch import Generator
from trainer.settings import parse, record, write_json

from ddim_plugin import DiscreteDDIMScheduler, GeneralizedDDIMPipeline, GeneralizedDDIMScheduler

BATCH = 64  # pictures of an array at a time
WRITTEN = ("samples_by_steps.png", "samples_by_eta.png", "sample.json")


@dataclass(frozen=True)
class SampleConfig(Reading):
    """Draw grids of samples from a saved pipeline: by the number of steps S, and by η at few and many steps."""

    model: str = field(metadata={"help": "a folder written by save_pretrained, or a Hub id"})
    output: str = field(default="pictures", metadata={"help": "folder for the pictures"})
    data: str | None = field(
        default=None, metadata={"help": "data set of a first row of real pictures: digits, a folder, …"}
    )
    split: str | None = field(default=None, metadata={"help": "its split; by default test, validation or train"})
    steps: tuple[int, ...] = field(default=(5, 10, 20, 50, 100), metadata={"help": "rows of the first grid"})
    etas: tuple[float, ...] = field(default=(0.0, 0.2, 0.5, 1.0), metadata={"help": "η in the second grid, then σ̂"})
    eta_steps: tuple[int, ...] = field(default=(10, 100), metadata={"help": "S in the second grid"})
    columns: int = field(default=16, metadata={"help": "pictures in a row"})
    class_label: tuple[int, ...] = field(default=(), metadata={"help": "label of all pictures, or one for each column"})
    npz: int = field(
        default=0, metadata={"help": "pictures in samples-S*.npz, bytes arr_0 (N, H, W, C), for each of steps"}
    )
    seed: int = field(default=0, metadata={"help": "picture i starts from seed + i"})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, …; by default an accelerator if any"})
    overwrite: bool = field(default=False, metadata={"help": "replace pictures of an earlier run"})


def check(config: SampleConfig) -> None:
    """Raise ValueError for settings out of range, and for pictures that must not be replaced."""
    if config.columns < 1 or config.npz < 0:
        raise ValueError(f"columns must be positive, not {config.columns}, and npz 0 or more, not {config.npz}")
    if len(config.class_label) not in (0, 1, config.columns):
        raise ValueError(
            f"{len(config.class_label)} class labels for {config.columns} columns: give one, or one for each"
        )
    arrays = [f"samples-S{S}.npz" for S in config.steps] if config.npz else []
    for file in (Path(config.output) / name for name in (*WRITTEN, *arrays)):
        if file.exists() and not config.overwrite:
            raise ValueError(f"{file} exists: choose another output, or pass --overwrite")


@guard.output(alone=True)
def main(config: SampleConfig) -> dict[str, Any]:
    """Write `samples_by_steps.png`, `samples_by_eta.png` and `sample.json`; return the content of the latter."""
    check(config)
    if config.data is not None:
        config = replace(config, split=choose_split(config.data, config.split, config.data_config))
    start = time.perf_counter()
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    pipe = GeneralizedDDIMPipeline.from_pretrained(config.model).to(device)
    for label in config.class_label or (None,):
        check_label(config.model, pipe.unet, label)
    real = None
    if config.data is not None:
        shape = (pipe.image_channels, pipe.image_size)
        images = load_images(config.data, config.split, *shape, config.columns, **config.reading)
        real = images.permute(0, 2, 3, 1).numpy() / 255
    pipe.set_progress_bar_config(disable=True)
    stock, discrete = pipe.scheduler.config, isinstance(pipe.scheduler, DiscreteDDIMScheduler)
    largest = "the largest of Appendix A" if discrete else "Ho's larger variance"
    if discrete:
        larger, most = DiscreteDDIMScheduler.from_config(stock, noisiest="independent", eta=1.0), "sigma = 0"
        smaller = DiscreteDDIMScheduler.from_config(stock, noisiest="bayes")
    else:
        larger = GeneralizedDDIMScheduler.from_config(stock, variance_type="fixed_large", eta=0.0)
        smaller, most = GeneralizedDDIMScheduler.from_config(stock, variance_type="fixed_small", eta=0.0), "sigma-hat"

    def draw(S: int, eta: float | None, scheduler: SchedulerMixin, start: int = 0, stop: int = 0) -> Any:
        pipe.scheduler, seeds = scheduler, range(start, stop or config.columns)
        labels = [config.class_label[i % len(config.class_label)] for i in seeds] if config.class_label else None
        generators = [Generator().manual_seed(config.seed + i) for i in seeds]  # x_T, then each z
        return pipe(len(seeds), S, eta=eta, generator=generators, class_labels=labels, output_type="np").images

    seconds = {"load": time.perf_counter() - start}
    work = (config.columns + config.npz) * sum(config.steps)
    work += config.columns * sum(config.eta_steps) * (len(config.etas) + 1)
    with Progress(work, "sampling") as bar, bar.counting(pipe.unet):
        start = time.perf_counter()
        rows = [(f"S = {S}", draw(S, 0.0, smaller)) for S in config.steps]
        if real is not None:
            rows.insert(0, ("real", real))
        by_steps = picture(rows, "eta = 0, the same x_T in each column")
        seconds["samples_by_steps"] = time.perf_counter() - start

        start = time.perf_counter()
        rows = []
        for S in config.eta_steps:
            rows += [(f"S = {S}  eta = {eta:g}", draw(S, eta, smaller)) for eta in config.etas]
            rows += [(f"S = {S}  {most}", draw(S, None, larger))]
        by_eta = picture(rows, f"noise by eta, and {largest}; the same x_T in each column")
        seconds["samples_by_eta"] = time.perf_counter() - start

        made = {Path(config.output) / name: content for name, content in zip(WRITTEN, (by_steps, by_eta), strict=False)}
        for S in config.steps if config.npz else ():
            parts = (draw(S, 0.0, smaller, i, min(i + BATCH, config.npz)) for i in range(0, config.npz, BATCH))
            np.savez(file := io.BytesIO(), np.concatenate([(part * 255).round().astype(np.uint8) for part in parts]))
            made[Path(config.output) / f"samples-S{S}.npz"] = file.getvalue()
    for path, content in made.items():
        write_file(path, content)
    result = record(config) | {"pictures": [str(path) for path in made], "seconds": seconds, "device": device}
    write_json(Path(config.output) / "sample.json", result)
    return result


def picture(rows: list[tuple[str, Any]], title: str) -> bytes:
    """Draw rows of pictures with their labels, as PNG."""
    grid([row for _, row in rows], [label for label, _ in rows], title).save(file := io.BytesIO(), format="PNG")
    return file.getvalue()


if __name__ == "__main__":
    with guard.program():
        done = main(parse(SampleConfig))
        print("\n".join([*done["pictures"], str(Path(done["config"]["output"]) / "sample.json")]))
