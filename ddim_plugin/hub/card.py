"""Model cards: one template, filled with tables of the configs and records of a model."""

import hashlib
import inspect
import re
from pathlib import Path
from string import Template
from typing import Any

import diffusers
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..schedulers import KEY
from ..schedulers.config import CLASSES
from ..version import __version__
from .code import code
from .records import CONVERSION, GRID, TRAINING, Records

TASK = "unconditional-image-generation"  # the Hub's name for the task of these pipelines
MARK = "*Written by ddim-plugin"  # starts the last line of our cards, which ends with a digest of the text above it
TEMPLATE = Template(Path(__file__).with_name("card.md").read_text(encoding="utf-8"))
# Names of settings that a card has even if they are the defaults.
SYMBOLS = {"num_train_timesteps": "T", "beta_schedule": "β", "prediction_type": "prediction", "nfe": "NFE", "eta": "η"}
SYMBOLS |= {"timestep_spacing": "τ", "variance_type": "variance", "num_inference_steps": "S", "draws": "sets"}

SAMPLER = ("scheduler", "variance_type", "eta", "timestep_spacing")  # settings in the rows of a table of figures
SETS = ("images", "draws", "seed")  # and in its title
# Entries of `training.json` in a card: of its config, and of what came of it.
RUN = ("data", "split", "steps", "batch_size", "loss", "optimizer", "learning_rate", "ema_decay", "seed")
OUTCOME = ("images", "classes", "loss", "seconds", "device", "processes", "mixed_precision", "revision", "status")

SAMPLING = "pipe.scheduler = GeneralizedDDIMScheduler.from_config(pipe.scheduler.config)  # the saved one encodes\n"


def card(
    repo_id: str,
    unet: dict[str, Any],
    scheduler: dict[str, Any],
    parameters: int,
    records: Records,
    license: str | None = None,
    variant: str | None = None,
    revision: str | None = None,
) -> str:
    """Write the card of a model, as Markdown with its metadata in front.

    `unet` and `scheduler` are the configs, with the name of the class under "_class_name". `parameters` is the number
    of those of the network. The snippets load `variant`, if there are no plain weights, from the branch `revision`.
    Raises ValueError for a licence that is not an id.
    """
    check_license(license)
    title, training, classes = repo_id.split("/")[-1], records.files.get(TRAINING, {}), unet.get("num_class_embeds")
    dataset = training.get("config", {}).get("data") if training.get("data_from") == "hub" else None
    size, inverse = unet.get("sample_size") or "?", scheduler["_class_name"].startswith("Inverse")
    unsupported = "class labels" if classes else "learned variances"
    is_stock = not classes and unet["out_channels"] == unet["in_channels"]
    pictures = {name: f"![{name}]({name})\n\n*{cell(caption)}*" for name, caption in records.captions.items()}
    body = TEMPLATE.substitute(
        title=title,
        kind="A class-conditional" if classes else "An unconditional",
        size="×".join(map(str, size)) if isinstance(size, list | tuple) else f"{size}×{size}",
        network=unet["_class_name"],
        parameters=f"{parameters:,}",
        grid=pictures.pop(GRID, "*No sample grid was made.*"),
        repo=repo_id,
        variant=f', variant="{variant}"' if variant else "",
        revision=f', revision="{revision}"' if revision else "",
        also=", GeneralizedDDIMScheduler" if inverse else "",
        sampler=SAMPLING if inverse else "",
        labels=", class_labels=0" if classes else "",
        code=code().name,
        unsupported="" if is_stock else f" `DDIMPipeline` does not support {unsupported}: use its parts.",
        settings=f"{settings('scheduler', scheduler)}\n\n{settings('network', unet)}",
        figures="\n\n".join([figures(records.results), *pictures.values()]),
        training=origin(records.files),
        license=license or "not stated",
    )
    metadata = ModelCardData(
        library_name="diffusers",
        pipeline_tag=TASK,
        license=license,
        tags=["ddim", "diffusion", "ddim-plugin"],
        datasets=[dataset] if dataset else None,
        model_name=title,
        eval_results=[_eval_result(entry) for entry in records.results if entry.get("listed", True)] or None,
    )
    text = f"---\n{metadata.to_yaml()}\n---\n\n{body}"
    return f"{text}\n{MARK} {__version__} from the records and configs of this repo ({_digest(text)}).*\n"


def _eval_result(entry: dict[str, Any]) -> EvalResult:
    dataset, used = entry["dataset"], ("nfe", "num_inference_steps", *SAMPLER)
    return EvalResult(
        task_type=TASK,
        dataset_type=dataset.get("id") or dataset["name"],
        dataset_name=dataset["name"],
        dataset_split=dataset.get("split"),
        metric_type=entry["metric"],
        metric_name=f"{metric_name(entry)} ({notes(entry, used)})",
        metric_value=float(entry["value"]),
        metric_args={key: entry[key] for key in (*used, *SETS) if entry.get(key) is not None},
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def is_written_here(text: str) -> bool:
    """Test whether a card was written by `card`, and not changed since."""
    above, _, mark = text.replace("\r\n", "\n").rpartition(f"\n{MARK}")
    return mark.rstrip().endswith(f"({_digest(above)}).*")


def check_license(license: str | None) -> None:
    """Raise ValueError for a licence that is not an id."""
    if license is not None and not re.fullmatch(r"[a-z0-9.+-]+", license):
        raise ValueError(f"license must be as the Hub names it, such as mit or cc-by-4.0, not {license!r}")


def license_of(text: str) -> str | None:
    """Return the licence in a card's metadata."""
    try:
        return ModelCard(text).data.license
    except ValueError:  # no valid metadata
        return None


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
