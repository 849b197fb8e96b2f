"""Tables of a model card, in Markdown: settings, figures, and records of the training."""

import inspect
from typing import Any

import diffusers

from ..schedulers import KEY
from ..schedulers.config import CLASSES
from .records import CONVERSION, TRAINING

# Names of settings that a card has even if they are the defaults.
SYMBOLS = {"num_train_timesteps": "T", "beta_schedule": "β", "prediction_type": "prediction", "nfe": "NFE", "eta": "η"}
SYMBOLS |= {"timestep_spacing": "τ", "variance_type": "variance", "num_inference_steps": "S", "draws": "sets"}

SAMPLER = ("scheduler", "variance_type", "eta", "timestep_spacing")  # settings in the rows of a table of figures
SETS = ("images", "draws", "seed")  # and in its title
# Entries of `training.json` in a card: of its config, and of what came of it.
RUN = ("data", "split", "steps", "batch_size", "loss", "optimizer", "learning_rate", "ema_decay", "seed")
OUTCOME = ("images", "classes", "loss", "seconds", "device", "processes", "mixed_precision", "revision", "status")


def cell(value: Any) -> str:
    """Write a value for a table: of a long list its length, of a dictionary its keys."""
    if isinstance(value, float):
        value = f"{value:.6g}"
    elif isinstance(value, dict):
        value = ", ".join(sorted(map(str, value), key=len))
    elif isinstance(value, list | tuple):
        value = f"{len(value)} values" if len(value) > 6 else ", ".join(map(str, value))
    return " ".join(str(value).split()).replace("|", "\\|")


def table(rows: dict[str, Any]) -> str:
    """Write a table of two columns. The first row is its head. Rows that are None or empty are left out."""
    lines = [f"| {key.replace('_', ' ')} | {cell(each)} |" for key, each in rows.items() if each not in (None, [], {})]
    return "\n".join([lines[0], "|---|---|", *lines[1:]])


def settings(part: str, config: dict[str, Any]) -> str:
    """Write a table of the settings in a config that are not the defaults of their class, and of `SYMBOLS`."""
    name = config["_class_name"]
    parameters = inspect.signature(CLASSES.get(name) or getattr(diffusers, name)).parameters
    derived = (config.get(KEY) or {}).keys() & {"trained_betas"}  # from the schedule
    changed = {key for key, each in parameters.items() if config.get(key, each.default) != each.default} - derived
    rows = {SYMBOLS.get(key, key): config[key] for key in config if key in SYMBOLS or key in changed}
    return table({part: f"`{name}`"} | rows)


def origin(files: dict[str, dict[str, Any]]) -> str:
    """Write tables of what `training.json` or else `conversion.json` records."""
    if training := files.get(TRAINING):
        config = training.get("config", {})
        run, outcome = {key: config.get(key) for key in RUN}, {key: training.get(key) for key in OUTCOME}
        return f"{table({'config': ''} | run)}\n\n{table({'outcome': ''} | outcome)}"
    if conversion := files.get(CONVERSION):
        return table({"conversion": ""} | conversion.get("source", {}) | {"weights": conversion.get("weights")})
    return "How these weights were trained was not recorded."


def figures(results: list[dict[str, Any]]) -> str:
    """Write a table for each metric and data set: samplers by S."""
    tables: dict[str, dict[str, dict[tuple, str]]] = {}
    for entry in results:
        data = " ".join(filter(None, (entry["dataset"]["name"], entry["dataset"].get("split"))))
        title = ", ".join(filter(None, [f"**{cell(metric_name(entry))}**", cell(data), notes(entry, SETS)]))
        error, nfe, steps = entry.get("standard_error"), entry["nfe"], entry.get("num_inference_steps")
        value = f"{entry['value']:.4g}" + ("" if error is None else f" ± {error:.2g}")
        value += "" if steps in (None, nfe) else f" ({nfe:.4g})"
        row = tables.setdefault(title, {}).setdefault(notes(entry, SAMPLER).removeprefix("scheduler = "), {})
        column = ("NFE", nfe) if steps is None else ("S", steps)
        row[column] = ", ".join(filter(None, [row.get(column), value]))
    parts = []
    for title, rows in tables.items():
        columns = sorted({column for row in rows.values() for column in row})
        lines = [["sampler", *(f"{name} = {number:g}" for name, number in columns)], ["---"] * (len(columns) + 1)]
        lines += [[sampler, *(row.get(column, "") for column in columns)] for sampler, row in rows.items()]
        parts += [title, "\n".join("| " + " | ".join(line) + " |" for line in lines)]
    note = "Values are means over the sets of images, ± the standard error. In brackets are the evaluations of the "
    note += "network for an image (NFE), if they are not S."
    return "\n\n".join([*parts, note]) if results else "None have been measured for these weights."


def metric_name(entry: dict[str, Any]) -> str:
    return entry.get("name") or entry["metric"].upper()


def notes(entry: dict[str, Any], keys: tuple[str, ...]) -> str:
    """Write settings of a measurement in a line."""
    return ", ".join(f"{SYMBOLS.get(key, key)} = {cell(entry[key])}" for key in keys if entry.get(key) is not None)
