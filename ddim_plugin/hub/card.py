"""Model cards: one template, filled with tables of the configs and records of a model."""

import hashlib
import inspect
import re
from pathlib import Path
from typing import Any

import diffusers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import StrictUndefined, Template

from ..schedulers import KEY
from ..schedulers.config import CLASSES, OF_PATH, path_of
from ..version import __version__
from .code import code
from .records import TRAINING, Records

TASK = "unconditional-image-generation"  # the Hub's name for the task of these pipelines
MARK = "*Written by ddim-plugin"  # starts the last line of our cards, which ends with a digest of the text above it
LAYOUT = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True, "undefined": StrictUndefined}
TEMPLATE = Template(Path(__file__).with_name("card.md").read_text(encoding="utf-8"), **LAYOUT)
# Names of settings that a card has even if they are the defaults.
SYMBOLS = {"num_train_timesteps": "T", "beta_schedule": "β", "prediction_type": "prediction", "nfe": "NFE", "eta": "η"}
SYMBOLS |= {"timestep_spacing": "τ", "variance_type": "variance", "num_inference_steps": "S", "draws": "sets"}

SAMPLER = ("scheduler", "variance_type", "eta", "timestep_spacing")  # settings in the rows of a table of figures
SETS = ("images", "draws", "seed")  # and in its title


def card(
    repo_id: str,
    unet: dict[str, Any],
    scheduler: dict[str, Any],
    parameters: int,
    records: Records,
    license: str | None = None,
    variant: str | None = None,
    revision: str | None = None,
    pipeline: str | None = "DDIMPipeline",
) -> str:
    """Write the card of a model, as Markdown with its metadata in front.

    `unet` and `scheduler` are the configs, with the name of the class under "_class_name". The snippets load `variant`,
    if there are no plain weights, from the branch `revision`. `pipeline` is the stock one that samples with the model.
    """
    check_license(license)
    title, training, figures = repo_id.split("/")[-1], records.files.get(TRAINING, {}), _figures(records.results)
    data, used = training.get("config", {}).get("data"), ("nfe", "num_inference_steps", *SAMPLER)
    metadata = ModelCardData(
        library_name="diffusers",
        pipeline_tag=TASK,
        license=license,
        tags=["ddim", "diffusion", "ddim-plugin"],
        datasets=[data] if data and training.get("data_from") == "hub" else None,
        model_name=title,
        eval_results=[
            EvalResult(
                task_type=TASK,
                dataset_type=entry["dataset"].get("id") or entry["dataset"]["name"],
                dataset_name=entry["dataset"]["name"],
                dataset_split=entry["dataset"].get("split"),
                metric_type=entry["metric"],
                metric_name=f"{entry.get('name') or entry['metric'].upper()} ({notes(entry, used)})",
                metric_value=float(entry["value"]),
                metric_args={key: entry[key] for key in (*used, *SETS) if entry.get(key) is not None},
            )
            for entry in records.results
            if entry.get("listed", True)
        ]
        or None,
    ).to_yaml()
    text = TEMPLATE.render(locals(), code=code().name, settings=settings, cell=cell)
    return f"{text}\n{MARK} {__version__} from the records and configs of this repo ({_digest(text)}).*\n"


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


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """Select the settings in a config that are not the defaults of their class, and those in `SYMBOLS`."""
    parameters = inspect.signature(CLASSES.get(name := config["_class_name"]) or getattr(diffusers, name)).parameters
    hidden = (config.get(KEY) or {}).keys() & {"trained_betas"}  # from the schedule
    hidden |= {key for path, keys in OF_PATH.items() if path != path_of(config) for key in keys}
    shown = {key for key, each in parameters.items() if config.get(key, each.default) != each.default} | SYMBOLS.keys()
    return {SYMBOLS.get(key, key): config[key] for key in config if key in shown - hidden}


def _figures(results: list[dict[str, Any]]) -> dict[str, dict[str, dict[tuple, str]]]:
    """Arrange results by metric and data set, sampler, and S."""
    tables: dict[str, dict[str, dict[tuple, str]]] = {}
    for entry in results:
        data = " ".join(filter(None, (entry["dataset"]["name"], entry["dataset"].get("split"))))
        name = cell(entry.get("name") or entry["metric"].upper())
        title = ", ".join(filter(None, [f"**{name}**", cell(data), notes(entry, SETS)]))
        error, nfe, steps = entry.get("standard_error"), entry["nfe"], entry.get("num_inference_steps")
        value = f"{entry['value']:.4g}" + ("" if error is None else f" ± {error:.2g}")
        value += "" if steps in (None, nfe) else f" ({nfe:.4g})"
        row = tables.setdefault(title, {}).setdefault(notes(entry, SAMPLER).removeprefix("scheduler = "), {})
        column = ("NFE", nfe) if steps is None else ("S", steps)
        row[column] = ", ".join(filter(None, [row.get(column), value]))
    return tables


def notes(entry: dict[str, Any], keys: tuple[str, ...]) -> str:
    """Write settings of a measurement in a line."""
    return ", ".join(f"{SYMBOLS.get(key, key)} = {cell(entry[key])}" for key in keys if entry.get(key) is not None)
