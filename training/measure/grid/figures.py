"""Figures of a grid: plots of quality and time, and samples of each cell."""

from pathlib import Path
from typing import Any

from pictures.grids import grid

from ..parts import read_arrays
from .cells import Cell
from .tables import Entry, grid_cells, panels


def draw(result: dict[str, Any], pictures: dict[Cell, Path], output: Path) -> dict[str, str]:
    """Draw quality.png and time.png if there are several S, and a grid of samples for each S.

    Args:
        result: the content of results.json.
        pictures: the file with the pictures of each cell.

    Returns:
        The captions of the figures, by file name.
    """
    captions, among = {}, grid_cells(result)
    if len({cell.steps for cell in among}) > 1:
        plot_quality(result, output / "quality.png")
        plot_time(result, output / "time.png")
        captions["quality.png"] = "Distance from the data against S, and against the time that the pictures took."
        captions["time.png"] = "Time against S (Fig. 4 of the paper)."
    kinds = "a kind of noise" if all(cell.guidance is None for cell in among) else "a guidance scale w"
    for S in sorted({cell.steps for cell in pictures}):
        chosen = [cell for cell in pictures if cell.steps == S]
        arrays = [read_arrays(pictures[cell])[0]["pictures"] for cell in chosen]
        rows = [array.transpose(0, 2, 3, 1) / 255 for array in arrays]
        labels = [" ".join(line_name(cell, among, plain=True)) for cell in chosen]
        grid(rows, labels, f"S = {S}, the same x_T in each column").save(output / f"samples-S{S:04d}.png")
        captions[f"samples-S{S:04d}.png"] = f"S = {S}, {kinds} in each row, the same x_T in each column."
    return captions


def line_name(cell: Cell, among: list[Cell], plain: bool = False) -> list[str]:
    """Return what distinguishes the line of a cell: scheduler and spacing if there are several, and the variance."""
    found = []
    if len({each.scheduler for each in among}) > 1:
        found.append(cell.scheduler)
    if len({each.spacing for each in among}) > 1:
        found.append(cell.spacing)
    return [*found, cell.label(plain)]


def lines(entries: list[Entry], among: list[Cell]) -> dict[str, list[dict[str, Any]]]:
    """Return the results on each line of a plot, by growing S."""
    found: dict[str, list] = {}
    for cell, result in sorted(entries, key=lambda entry: entry.cell.steps):
        found.setdefault(", ".join(line_name(cell, among)), []).append(result)
    return found


def plot_quality(result: dict[str, Any], path: Path) -> None:
    """Plot each metric against S and against the time of sampling, with a line for each variance."""
    from matplotlib.figure import Figure

    shown, among = panels(result), grid_cells(result)
    figure = Figure(figsize=(11, 3.4 * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), 2, sharey="row", squeeze=False)
    for (by_steps, by_time), (panel, entries) in zip(axes, shown.items(), strict=True):
        for label, results in lines(entries, among).items():
            values = [each["value"] for each in results]
            by_steps.plot([each["num_inference_steps"] for each in results], values, marker="o", label=label)
            seconds = [1000 * each["seconds"] / each["images"] for each in results]
            by_time.plot(seconds, values, marker="o", label=label)
        by_steps.set(xlabel="S", ylabel=f"{panel.name}\n{panel.dataset} {panel.split}")
        by_time.set(xlabel=f"seconds for 1000 pictures, {result['device']}")
        positive = all(entry.result["value"] > 0 for entry in entries)
        for each in (by_steps, by_time):
            logarithmic(each, *("xy" if positive else "x"))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=110)


def plot_time(result: dict[str, Any], path: Path) -> None:
    """Plot the hours for 50,000 pictures on one device against S, as in Fig. 4."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for label, results in lines(next(iter(panels(result).values())), grid_cells(result)).items():
        hours = [50_000 * each["seconds"] / each["images"] / 3600 for each in results]
        axes.plot([each["num_inference_steps"] for each in results], hours, marker="o", label=label)
    axes.set(xlabel="S", ylabel=f"hours for 50,000 pictures, {result['device']}")
    figure.legend(loc="outside right upper")
    logarithmic(axes, "x", "y")
    figure.savefig(path, dpi=110)


def logarithmic(axes: Any, *names: str) -> None:
    """Make the x or y axis logarithmic, with plain numbers at 1, 2, 5, 10, …"""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.grid(alpha=0.3)
    for name in names:
        axes.set(**{f"{name}scale": "log"})
        axis = getattr(axes, f"{name}axis")
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())
