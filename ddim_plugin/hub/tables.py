"""Tables of a model card, in Markdown: settings, figures and training."""

from pathlib import Path
from typing import Any

from ..process.betas import RANGED
from .records import is_finite

SPACINGS = {
    "linear": "linear, τ_i = ⌊T·i/S⌋",
    "quadratic": "quadratic, τ_i = max(i, ⌊T·i²/S²⌋)",
    "paper_linear": "linear, as the authors' code",
    "paper_quadratic": "quadratic, as the authors' code",
}


def metric_name(entry: dict[str, Any]) -> str:
    return entry.get("name") or entry["metric"].upper()


def settings(scheduler: dict[str, Any]) -> list[tuple[str, Any]]:
    derived = "trained_betas" in (scheduler.get("_ddim_plugin") or {})  # from a named schedule
    betas, ends = scheduler.get("beta_schedule"), (scheduler.get("beta_start"), scheduler.get("beta_end"))
    if scheduler.get("trained_betas") is not None and not derived:
        betas = "given as numbers, in the config"
    elif betas in RANGED and all(map(is_finite, ends)):
        betas = f"{betas}, {ends[0]:g} to {ends[1]:g}"
    if betas and scheduler.get("rescale_betas_zero_snr"):
        betas += ", rescaled to zero terminal SNR"
    constraint = "not constrained"
    if scheduler.get("thresholding"):
        constraint = f"thresholded dynamically, ratio {scheduler.get('dynamic_thresholding_ratio')}"
    elif scheduler.get("clip_sample"):
        constraint = f"clipped to ±{scheduler.get('clip_sample_range')}"
    spacing, fitted = scheduler.get("timestep_spacing"), scheduler.get("fitted_timesteps") or {}
    return [
        ("scheduler", f"`{scheduler.get('_class_name')}`"),
        ("T", scheduler.get("num_train_timesteps")),
        ("β", betas),
        ("prediction", scheduler.get("prediction_type")),
        ("τ", SPACINGS.get(spacing, spacing)),
        ("τ fitted to these weights", ", ".join(f"S = {S}" for S in sorted(map(int, fitted))) or None),
        ("order", (scheduler["solver_order"] or "3, or 2 with noise") if "solver_order" in scheduler else None),
        ("η", scheduler.get("eta")),
        ("variance", scheduler.get("variance_type")),
        ("x̂0", constraint),
    ]


def figures(results: list[dict[str, Any]]) -> str:
    """Return a table for each metric and data set: settings by S."""
    if not results:
        return "None have been measured for these weights."
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for entry in results:
        data = " ".join(filter(None, (entry["dataset"]["name"], entry["dataset"].get("split"))))
        key = (metric_name(entry), data, entry.get("images"), entry.get("draws"), entry.get("seed"))
        groups.setdefault(key, []).append(entry)
    parts = []
    for (name, data, images, draws, seed), entries in groups.items():
        sets = "" if draws in (None, 1) else f"mean of {draws} sets of "
        head = [f"**{cell(name)}**", cell(data), images is not None and f"{sets}{images:,} images"]
        parts += [", ".join(filter(None, [*head, seed is not None and f"seed {seed}"])), _by_steps(entries)]
    note = "In brackets evaluations of the network for an image (NFE), if they are not S; ± the standard error."
    return "\n\n".join([*parts, f"{note} All of it is in `results.json`."])


def _by_steps(entries: list[dict[str, Any]]) -> str:
    """Return the values of entries as a table, a row for each setting and a column for each S."""
    heads = {"scheduler": "scheduler", "variance_type": "variance", "eta": "η", "timestep_spacing": "τ"}
    used = [key for key in heads if any(entry.get(key) is not None for entry in entries)]
    columns = sorted({_column(entry) for entry in entries})
    rows: dict[tuple, dict[tuple, list[str]]] = {}
    for entry in entries:
        error, steps = entry.get("standard_error"), entry.get("num_inference_steps")
        value = f"{entry['value']:.4g}" + ("" if error is None else f" ± {error:.2g}")
        value += "" if steps in (None, entry["nfe"]) else f" ({entry['nfe']:.4g})"
        setting = tuple("" if entry.get(key) is None else cell(entry[key]) for key in used)
        rows.setdefault(setting, {}).setdefault(_column(entry), []).append(value)
    lines = [[*(heads[key] for key in used), *(head for _, _, head in columns)]]
    lines += [["---"] * len(lines[0])]
    lines += [[*key, *(", ".join(values.get(column, ())) for column in columns)] for key, values in rows.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _column(entry: dict[str, Any]) -> tuple[bool, float, str]:
    """Return what sorts and heads the column of an entry: its S, or else its evaluations."""
    steps = entry.get("num_inference_steps")
    return (True, entry["nfe"], f"NFE {entry['nfe']:.4g}") if steps is None else (False, steps, f"S = {steps}")


def training_rows(training: dict[str, Any]) -> list[tuple[str, Any]]:
    config, seconds = training.get("config", {}), training.get("seconds")
    steps, batch, data = config.get("steps"), config.get("batch_size"), config.get("data")
    if isinstance(data, str) and training.get("data_from") != "hub":
        data = Path(data).name  # of a folder

    def shown(key: str, pattern: str) -> str | None:
        return None if training.get(key) is None else pattern.format(training[key])

    hours = None if seconds is None else f"{seconds / 3600:.2f} h on {training.get('device')}"
    if hours and training.get("processes", 1) > 1:
        hours += f", {training['processes']} processes"
    return [
        ("data", f"{data}, {config.get('split')}"),
        ("images in the set", shown("images", "{:,}")),
        ("images seen", f"{steps * batch:,} in {steps:,} steps of {batch}" if steps and batch else None),
        ("loss", config.get("loss")),
        ("optimizer", f"{config.get('optimizer')}, learning rate {config.get('learning_rate')}"),
        ("weights", f"exponential average, decay {config.get('ema_decay')}"),
        ("precision", training.get("mixed_precision")),
        ("seed", config.get("seed")),
        ("last loss", shown("loss", "{:.4g}")),
        ("cost", hours),
        ("images a second", shown("images_per_second", "{:.4g}")),
        ("code", shown("revision", "revision {}")),
        ("status", training.get("status")),
    ]


def conversion_rows(conversion: dict[str, Any]) -> list[tuple[str, Any]]:
    source = conversion.get("source", {})
    return [
        ("converted from", source.get("file")),
        ("its SHA-256", source.get("sha256")),
        ("published as", source.get("published")),
        ("weights", conversion.get("weights")),
        ("step", source.get("step")),
    ]


def cell(value: Any) -> str:
    """Return a value for a table of Markdown."""
    return " ".join(str(value).split()).replace("|", "\\|")


def table(rows: list[tuple[str, Any]]) -> str:
    lines = [f"| {name} | {cell(value)} |" for name, value in rows if value is not None]
    return "\n".join(["| | |", "|---|---|", *lines])
