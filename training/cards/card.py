"""Write the card of a model with its training and figures, from the records in its folder."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from guard.writing import write_file
from huggingface_hub import EvalResult, ModelCard
from jinja2 import Template

from ddim_plugin import DiscreteDDIMScheduler, GeneralizedDDIMPipeline
from ddim_plugin.hub.card import LAYOUT, SYMBOLS, TASK, cell, is_written_here
from ddim_plugin.hub.push import CONFIGS, GRID, README, Model, variant_of

from .records import CONVERSION, RESULTS, TRAINING, Records, read_records
from .weights import weights_digest

SECTIONS = Template(Path(__file__).with_name("sections.md").read_text(encoding="utf-8"), **LAYOUT)
SHORT = SYMBOLS | {"nfe": "NFE", "num_inference_steps": "S", "draws": "sets", "guidance_scale": "w"}  # of measurements
SAMPLER = ("scheduler", "variance_type", "eta", "timestep_spacing", "guidance_scale")  # the rows of a table of figures
SETS = ("images", "draws", "seed")  # and in its title
LISTED = ("nfe", "num_inference_steps", *SAMPLER)  # and in what the Hub lists


def write_card(folder: str | Path, repo_id: str, license: str | None = None) -> None:
    """Write README.md into the folder of a pipeline, and remove paths of this machine from the records beside it.

    If there is no `samples.png`, the last preview becomes it. A card that somebody wrote is kept. Without `license`,
    the licence of the earlier card is kept. Raises ValueError for records that are not valid, or of other weights.
    A pipeline for categorical data is not pushed, and has no card.
    """
    folder = Path(folder)
    if GeneralizedDDIMPipeline.load_config(folder)["scheduler"][1] == DiscreteDDIMScheduler.__name__:
        return
    file, records, model = folder / README, read_records(folder), Model(folder)
    if not fits(records, model, folder):
        raise ValueError(f"{folder / RESULTS} was measured on other weights than those in {folder}: measure these")
    before = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    if before and not is_written_here(before):
        text = before
    else:
        text = made(model, records, repo_id, license or (license_of(before) if before else None))
    for name in CONFIGS:
        write_file(folder / name, model.files[name])
    for name, content in records.files.items():
        write_file(folder / name, as_json(content, folder / name))
    if GRID in records.pictures and not (folder / GRID).is_file():
        shutil.copyfile(records.pictures[GRID], folder / GRID)
    write_file(file, text)


def made(model: Model, records: Records, repo_id: str, license: str | None = None) -> str:
    """Return the card of a model with the sections and the metadata of its records."""
    check_license(license)
    training, conversion = (records.files.get(name, {}) for name in (TRAINING, CONVERSION))
    data = training.get("config", {}).get("data")
    sections = SECTIONS.render(
        figures=figures(records.results),
        captions=records.captions,
        training=training,
        conversion=conversion,
        cell=cell,
    )
    return model.card(
        repo_id,
        license,
        samples=records.captions.get(GRID),
        sections=sections.strip(),
        datasets=[data] if data and training.get("data_from") == "hub" else None,
        eval_results=[listed(entry) for entry in records.results if entry.get("listed", True)] or None,
    )


def check_license(license: str | None) -> None:
    """Raise ValueError for a licence that the Hub refuses, before training and not after."""
    if license is not None and not re.fullmatch(r"[a-z0-9.+-]+", license):
        raise ValueError(f"license must be as the Hub names it, such as mit or cc-by-4.0, not {license!r}")


def fits(records: Records, model: Model, folder: Path) -> bool:
    """Test whether the results were measured on the weights in a folder, in any variant."""
    if records.digest in (None, weights_digest(model.pipe.unet)):
        return True
    variants = {variant for name in model.files if (variant := variant_of(name))}
    pipes = (GeneralizedDDIMPipeline.from_pretrained(str(folder), variant=each) for each in sorted(variants))
    return any(weights_digest(pipe.unet) == records.digest for pipe in pipes)


def as_json(content: dict[str, Any], file: Path) -> str:
    """Return JSON. Raises ValueError for numbers that JSON does not have."""
    try:
        return json.dumps(content, indent=2, allow_nan=False) + "\n"
    except ValueError as error:
        raise ValueError(f"{file} contains a non-finite number, which JSON cannot store: remove it") from error


def license_of(text: str) -> str | None:
    """Return the licence in a card's metadata."""
    try:
        return ModelCard(text).data.license
    except ValueError:  # no valid metadata
        return None


def listed(entry: dict[str, Any]) -> EvalResult:
    """Return a result as the Hub lists it."""
    return EvalResult(
        task_type=TASK,
        dataset_type=entry["dataset"].get("id") or entry["dataset"]["name"],
        dataset_name=entry["dataset"]["name"],
        dataset_split=entry["dataset"].get("split"),
        metric_type=entry["metric"],
        metric_name=f"{entry.get('name') or entry['metric'].upper()} ({notes(entry, LISTED)})",
        metric_value=float(entry["value"]),
        metric_args={key: entry[key] for key in (*LISTED, *SETS) if entry.get(key) is not None},
    )


def figures(results: list[dict[str, Any]]) -> dict[str, dict[str, dict[tuple, str]]]:
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
    return ", ".join(f"{SHORT.get(key, key)} = {cell(entry[key])}" for key in keys if entry.get(key) is not None)
