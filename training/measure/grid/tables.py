"""Tables of a grid, in the form of the paper's Tables 1 and 3."""

from typing import Any, NamedTuple

from .cells import Cell
from .settings import PRESETS

PAPER: dict[str, dict[str, dict[str, tuple[float, ...]]]] = {
    "table1": {
        "CIFAR-10": {
            "0": (13.36, 6.84, 4.67, 4.16, 4.04),
            "0.2": (14.04, 7.11, 4.77, 4.25, 4.09),
            "0.5": (16.66, 8.35, 5.25, 4.46, 4.29),
            "1": (41.07, 18.36, 8.01, 5.78, 4.73),
            "fixed_large": (367.43, 133.37, 32.72, 9.99, 3.17),
        },
        "CelebA": {
            "0": (17.33, 13.73, 9.17, 6.53, 3.51),
            "0.2": (17.66, 14.11, 9.51, 6.79, 3.64),
            "0.5": (19.86, 16.06, 11.01, 8.09, 4.28),
            "1": (33.12, 26.03, 18.48, 13.93, 5.98),
            "fixed_large": (299.71, 183.83, 71.71, 45.20, 3.26),
        },
    },
    "table3": {
        "LSUN bedroom": {"0": (16.95, 8.89, 6.75, 6.62), "1": (42.78, 22.77, 10.81, 6.81)},
        "LSUN church": {"0": (19.45, 12.47, 10.84, 10.58), "1": (51.56, 23.37, 11.16, 8.27)},
    },
}
"""FID in the paper by dataset and variance, at the preset's S."""

HO = {"fid": {1000: "3.17"}, "is": {1000: "9.46"}}
"""What Ho et al. (2020, Table 1) report for CIFAR-10 and σ̂, by metric and S."""


class Panel(NamedTuple):
    """A table or plot: a metric, against a split of a data set. The split is empty for a metric that needs none."""

    name: str
    dataset: str
    split: str


class Entry(NamedTuple):
    """A number of a grid: its cell, and the entry of results.json."""

    cell: Cell
    result: dict[str, Any]


def grid_cells(result: dict[str, Any]) -> list[Cell]:
    """Return the cells of results.json."""
    return [Cell(**each["cell"]) for each in result["cells"]]


def panels(result: dict[str, Any]) -> dict[Panel, list[Entry]]:
    """Sort the entries of results.json by metric and split. Each cell has as many."""
    cells, results = grid_cells(result), result["results"]
    count = len(results) // max(1, len(cells))
    found: dict[Panel, list[Entry]] = {}
    for i, each in enumerate(results):
        panel = Panel(each["name"], each["dataset"]["name"], each["dataset"].get("split") or "")
        found.setdefault(panel, []).append(Entry(cells[i // count], each))
    return found


def table(result: dict[str, Any]) -> str:
    """Return a table in Markdown for each metric, split, scheduler and spacing: variances by S, and the paper's."""
    config = result["config"]
    counts = {each["split"]: each["images"] for each in result["references"]}
    preset = "table1" if config["table1"] else "table3" if config["table3"] else None
    lines = []
    for (name, data, split), entries in panels(result).items():
        against = f", against the {counts[split]:,} pictures of {data} {split}" if split else ""
        lines += [f"**{name}** of {config['images']:,} pictures, seed {config['seed']}{against}", ""]
        columns = sorted({entry.cell.steps for entry in entries})
        for kind in dict.fromkeys((entry.cell.scheduler, entry.cell.spacing) for entry in entries):
            chosen = [entry for entry in entries if (entry.cell.scheduler, entry.cell.spacing) == kind]
            lines += [*_table(chosen, columns, preset), ""]
    return "\n".join(lines)


def _table(entries: list[Entry], columns: list[int], preset: str | None) -> list[str]:
    """Return the lines of the table of one scheduler and spacing."""
    first = entries[0].result
    spacing = f", τ {first['timestep_spacing']}" if first["timestep_spacing"] else ""
    rows: dict[str, dict[int, str]] = {}
    for cell, result in entries:
        rows.setdefault(cell.label(), {})[cell.steps] = f"{result['value']:.4g}"
    nfe = {S: sorted({entry.result["nfe"] for entry in entries if entry.cell.steps == S}) for S in columns}
    rows["evaluations"] = {S: " or ".join(f"{each:g}" for each in found) for S, found in nfe.items()}
    if preset and first["metric"] == "fid":
        rows |= paper_rows(preset)
    if preset == "table1" and first["metric"] in HO:
        rows["Ho et al., CIFAR-10, σ̂"] = HO[first["metric"]]
    lines = [_row(first["scheduler"] + spacing, [f"S = {S}" for S in columns]), "|---" * (len(columns) + 1) + "|"]
    return lines + [_row(label, [values.get(S, "") for S in columns]) for label, values in rows.items()]


def _row(label: str, values: list[str]) -> str:
    return f"| {label} | {' | '.join(values)} |"


def paper_rows(preset: str) -> dict[str, dict[int, str]]:
    """Return the paper's rows of a preset's table."""
    steps = PRESETS[preset]["steps"]
    return {
        f"paper, {data}, {Cell('', variance, '', 1).label()}": {
            S: f"{value:.2f}" for S, value in zip(steps, values, strict=True)
        }
        for data, rows in PAPER[preset].items()
        for variance, values in rows.items()
    }
