"""The reports of a training run: log.jsonl, trackers, progress bar, previews, the plot of the loss."""

import errno
import io
import json
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from guard import warn
from guard.writing import write_file
from pictures.grids import grid
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ddim_plugin import GeneralizedDDIMPipeline

SPIKE = 5.0
"""A loss or gradient norm this many times the median before it counts as a spike."""


class Window:
    """Losses and gradient norms since the last report, kept on the device and read there once."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.values: list[Tensor] = []

    def add(self, loss: Tensor, norm: Tensor) -> None:
        self.values.append(torch.stack([loss, norm.to(loss)]))

    def read(self, last: int) -> tuple[list[float], list[float]]:
        """Return (losses, gradient norms) of the steps up to `last`, averaged over all processes.

        Raises FloatingPointError naming the first step at which one is not finite.
        """
        if not self.values:
            return [], []
        values = self.accelerator.reduce(torch.stack(self.values), "mean").tolist()
        self.values = []
        for step, (loss, norm) in enumerate(values, last - len(values) + 1):
            if not math.isfinite(loss) or not math.isfinite(norm):
                what = f"the loss is {loss}" if not math.isfinite(loss) else f"the norm of the gradient is {norm}"
                raise FloatingPointError(f"{what} at step {step}")
        return [loss for loss, _ in values], [norm for _, norm in values]


class Spikes:
    """Finds steps whose loss or gradient norm is far above the median of the `HISTORY` steps before."""

    HISTORY = 200
    LEAST = 20

    def __init__(self) -> None:
        self.before: deque[tuple[float, float]] = deque(maxlen=self.HISTORY)

    def find(self, losses: list[float], norms: list[float], last: int) -> list[dict[str, float]]:
        """Return the spikes among the steps up to `last`."""
        found = []
        for step, pair in enumerate(zip(losses, norms, strict=True), last - len(losses) + 1):
            if len(self.before) >= self.LEAST:
                medians = (statistics.median(values) for values in zip(*self.before, strict=True))
                if any(value > SPIKE * median for value, median in zip(pair, medians, strict=True)):
                    found.append({"step": step, "loss": pair[0], "grad_norm": pair[1]})
            self.before.append(pair)
        return found


class Log:
    """Writes `log.jsonl`, one line for each report, and the same to the trackers, in the main process alone.

    A disk or a tracker that fails ends in a warning. Lines that could not be written are written with the next one.
    """

    def __init__(self, path: Path, accelerator: Accelerator, step: int, steps: int):
        self.path, self.accelerator = path, accelerator
        self.main = accelerator.is_main_process
        self.lines: list[dict[str, Any]] = []
        self._waiting, self._size, self._untracked = b"", 0, None
        if self.main:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.lines = [line for line in read_log(path) if line["step"] <= step]  # later steps are trained again
            write_file(path, "".join(json.dumps(line) + "\n" for line in self.lines))
            self._size = path.stat().st_size
        self.bar = tqdm(initial=step, total=steps, desc="training", unit="step", disable=not self.main, mininterval=0.5)

    def write(self, step: int, **values: Any) -> None:
        if not self.main:
            return
        self.lines.append({"step": step} | values)
        again = bool(self._waiting)
        self._waiting += (json.dumps(self.lines[-1]) + "\n").encode()
        attempt(None if again else f"{self.path} has no line for step {step} yet", self._append)
        numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
        failed = None if self._untracked else f"no tracker has step {step}"
        self._untracked = attempt(failed, self.accelerator.log, numbers, step=step)

    def _append(self) -> None:
        """Write the lines that wait, in place of half a line that a full disk has left."""
        if not self.path.exists():
            self._size, self._waiting = 0, "".join(json.dumps(line) + "\n" for line in self.lines).encode()
            self.path.touch()
        with open(self.path, "r+b", buffering=0) as file:
            file.truncate(self._size)
            file.seek(self._size)
            if (written := file.write(self._waiting)) != len(self._waiting):
                raise OSError(errno.ENOSPC, f"only {written} of {len(self._waiting)} bytes were written")
        self._size, self._waiting = self._size + len(self._waiting), b""

    def picture(self, step: int, picture: Image.Image) -> None:
        """Send a preview to the trackers that take pictures."""
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({"preview": np.asarray(picture)[None]}, step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({"preview": [picture]}, step)

    def advance(self, **shown: str) -> None:
        """Move the progress bar by a step, or show values in it."""
        try:
            self.bar.set_postfix(shown) if shown else self.bar.update()
        except OSError:  # stderr is a file on a full disk
            self.bar.disable = True

    def close(self) -> None:
        attempt("the progress bar is left open", self.bar.close)


def attempt(failed: str | None, work: Callable[..., Any], *args: Any, **settings: Any) -> str | None:
    """Do work that a run can do without. Returns None, or what went wrong, which is printed if `failed` is given."""
    try:
        work(*args, **settings)
    except Exception as error:  # trackers raise exceptions of their own
        problem = f"{type(error).__name__}: {error}"
        if failed:
            warn(f"{failed} ({problem})")
        return problem
    return None


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a log, without one that a kill has cut off."""
    lines = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def summary(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Summarise a log for `training.json`: the loss of its last tenth, seconds, speed, spikes."""
    timed = [line for line in lines if "images_per_second" in line]
    seconds = sum(line["seconds"] for line in timed)
    last = timed[-max(1, len(timed) // 10) :]
    return {
        "loss": sum(line["loss"] for line in last) / len(last) if last else None,
        "seconds": seconds,
        "images_per_second": sum(line["images"] for line in timed) / seconds if seconds else None,
        "loader_share": sum(line["loader_share"] * line["seconds"] for line in timed) / seconds if seconds else None,
        "spikes": sum(len(line.get("spikes", ())) for line in lines),
    }


class Clock:
    """Measures seconds of training and, of those, of waiting for data. Pauses do not count."""

    def __init__(self):
        self.start, self.waited, self.paused = time.perf_counter(), 0.0, 0.0

    def read(self) -> tuple[float, float]:
        """Return (seconds, seconds waiting) since the last reading."""
        now = time.perf_counter()
        found = now - self.start - self.paused, self.waited
        self.start, self.waited, self.paused = now, 0.0, 0.0
        return found

    def wait(self, batches: Iterator[Any]) -> Any:
        """Return the next batch, and count the seconds as waiting."""
        before = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - before
        return batch

    def pause(self, work: Any, *args: Any) -> Any:
        """Return work(*args), without counting its seconds."""
        before = time.perf_counter()
        try:
            return work(*args)
        finally:
            self.paused += time.perf_counter() - before


def preview(
    accelerator: Accelerator,
    pipe: GeneralizedDDIMPipeline,
    count: int,
    steps: int,
    classes: int,
    seed: int,
    batch_size: int,
) -> Image.Image | None:
    """Draw a grid of samples at η = 0, from the same x_T each time. The processes share the work.

    Args:
        count: number of samples.
        classes: number of classes, or 0; sample i is of class i modulo that number.

    Returns:
        the picture in the main process, None in the others.

    Raises:
        ValueError: in all processes, if samples are not finite in one.
    """
    mine = range(accelerator.process_index, count, accelerator.num_processes)
    made: list[Any] = []
    try:
        for start in range(0, len(mine), batch_size):
            part = mine[start : start + batch_size]
            images = pipe(
                batch_size=len(part),
                num_inference_steps=steps,
                eta=0.0,
                generator=[torch.Generator().manual_seed(seed + i) for i in part],
                class_labels=[i % classes for i in part] if classes else None,
                output_type="np",
            ).images
            made += list(zip(part, images, strict=True))
    except Exception as error:  # the other processes wait for this one
        made = [f"{type(error).__name__}: {error}"]
    made = gather_object(made)
    for problem in (each for each in made if isinstance(each, str)):
        raise ValueError(problem)
    if not accelerator.is_main_process:
        return None
    images = np.stack([image for _, image in sorted(made, key=lambda pair: pair[0])])
    columns = min(count, classes if 0 < classes <= 16 else max(1, math.ceil(math.sqrt(count))))
    return grid([images[i : i + columns] for i in range(0, count, columns)])


def plot_loss(lines: list[dict[str, Any]], path: Path) -> None:
    """Plot the loss of a log, and that on held-out pictures."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for key, label in (("loss", "loss"), ("held_out_loss", "held-out loss, averaged weights")):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, linewidth=1)
    axes.set(xlabel="optimiser steps", ylabel="loss", yscale="log")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(file := io.BytesIO(), dpi=120)
    write_file(path, file.getvalue())


def device_name(accelerator: Accelerator) -> str:
    """Name the devices, for the record."""
    device = accelerator.device
    if device.type == "cuda":
        return f"{accelerator.num_processes} × {torch.cuda.get_device_name(device)}"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = "CPU"
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'' if threads == 1 else 's'}" if device.type == "cpu" else str(device)
