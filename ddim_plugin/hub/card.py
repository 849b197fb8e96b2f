"""Model cards: one template, filled from the configs and records of a model."""

import hashlib
import re
from string import Template
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..version import __version__
from .code import code
from .records import GRID, Records
from .tables import SAMPLER, SETS, cell, figures, metric_name, notes, origin, settings

TASK = "unconditional-image-generation"  # the Hub's name for the task of these pipelines
MARK = "*Written by ddim-plugin"
"""Start of the last line of a card that was written here. It ends with a digest of the text above it."""

TEMPLATE = Template("""# $title

$kind diffusion model of images of $size pixels: a `$network` of $parameters parameters, for the process of
[Denoising Diffusion Implicit Models](https://arxiv.org/abs/2010.02502) (Song, Meng and Ermon, ICLR 2021).

$grid

## Use

With ddim-plugin installed:

```python
from ddim_plugin import GeneralizedDDIMPipeline$also

pipe = GeneralizedDDIMPipeline.from_pretrained("$repo"$variant$revision)
${sampler}images = pipe(batch_size=16, num_inference_steps=20$labels).images
```

With diffusers alone, and the same sampler. This runs `$code.py` of this repository: read it, and pin the commit.

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(
    "$repo"$variant, custom_pipeline="$code", trust_remote_code=True, revision="THE COMMIT YOU READ"
)
```

`DDIMPipeline.from_pretrained("$repo"$variant$revision)` runs no code of this repository. It loads the stock
sampler of diffusers, which uses η = 0, order 1 and a stock spacing.$unsupported

## Settings

$settings

Settings that are not listed have the defaults of their classes.

## Figures

$figures

## Training

$training

## Limits and biases

- The images resemble the training data, with everything it over- or underrepresents. They are not filtered, and were
  not examined.
- An image may be close to one of the training set. Do not use images as evidence of anything real.
- The model is made for images of $size pixels and for research on sampling.

## Licence

The weights: $license. The training data has its own licence, which may bind the weights. The code file: Apache-2.0.
""")

SAMPLING = """pipe.scheduler = GeneralizedDDIMScheduler.from_config(pipe.scheduler.config)  # the saved one encodes
"""


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
    dataset = training["config"].get("data") if training.get("data_from") == "hub" else None
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
        grid=pictures.pop(GRID, "*There is no sample grid.*"),
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
