"""Model cards: one template, filled from the configs and records of a model."""

import hashlib
import re
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..version import __version__
from .code import code
from .records import GRID, Records
from .tables import SAMPLER, SETS, cell, figures, metric_name, notes, origin, settings

TASK = "unconditional-image-generation"  # the Hub's name for the task of these pipelines
MARK = "*Written by ddim-plugin"  # starts the last line of our cards, which ends with a digest of the text above it
TEMPLATE = Template(Path(__file__).with_name("card.md").read_text(encoding="utf-8"))

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
    title, training, classes = repo_id.split("/")[-1], records.training, unet.get("num_class_embeds")
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
