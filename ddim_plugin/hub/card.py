"""Model cards: one template, filled from the configs and records of a model."""

import hashlib
import re
from pathlib import Path
from string import Template
from typing import Any

import huggingface_hub
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import yaml_dump

from ..schedulers import STOCK_SPACINGS
from ..version import __version__
from .code import code
from .tables import cell, conversion_rows, figures, metric_name, settings, table, training_rows

TASK = "unconditional-image-generation"
"""The Hub's name for the task of these pipelines."""

SETTINGS = ("num_inference_steps", "eta", "variance_type", "timestep_spacing", "scheduler", "images", "draws", "seed")
"""Settings of a measurement that a result may have."""

MARK = "*Written by ddim-plugin"
"""Start of the last line of a card that was written here. It ends with a digest of the text above it."""

TEMPLATE = Template("""# $title

$summary

$picture

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

$stock

## Settings

$settings

## Figures

$figures
$pictures
## Training

$training

## Limits and biases

- The images resemble the training data, with everything it over- or underrepresents. They are not filtered, and what
  they may show was not examined.
- An image may be close to one of the training set. Do not use images as evidence of anything real.
- The model is made for images of $size and for research on sampling.
- With fewer steps the images differ more from those of the model's own process. Compare models at equal numbers of
  evaluations of the network (NFE).

## Licence

$licence

## Citation

```bibtex
@inproceedings{song2021denoising,
  title     = {Denoising Diffusion Implicit Models},
  author    = {Song, Jiaming and Meng, Chenlin and Ermon, Stefano},
  booktitle = {International Conference on Learning Representations},
  year      = {2021}
}
```
""")

STOCK = """With the stock sampler of diffusers, which runs no code of this repository:

```python
from diffusers import DDIMPipeline

pipe = DDIMPipeline.from_pretrained("$repo"$variant$revision)
images = pipe(batch_size=16, num_inference_steps=20).images
```$other"""

PARTS = """The parts load into the classes of diffusers too:
`UNet2DModel.from_pretrained("$repo", subfolder="unet")` and
`$scheduler.from_pretrained("$repo", subfolder="scheduler")`. `DDIMPipeline` does not support $unknown."""

SAMPLING = """pipe.scheduler = GeneralizedDDIMScheduler.from_config(pipe.scheduler.config)  # the saved one encodes
"""


def card(
    repo_id: str,
    unet: dict[str, Any],
    scheduler: dict[str, Any],
    parameters: int,
    results: list[dict[str, Any]] | None = None,
    training: dict[str, Any] | None = None,
    conversion: dict[str, Any] | None = None,
    picture: str | None = None,
    caption: str = "",
    pictures: dict[str, str] | None = None,
    license: str | None = None,
    variant: str | None = None,
    revision: str | None = None,
) -> str:
    """Write the card of a model, as Markdown with its metadata in front.

    Args:
        repo_id: id of the repository on the Hub.
        unet, scheduler: the configs of the two, with the name of the class under "_class_name".
        parameters: number of parameters of the network.
        results, training, conversion: the entries of `results.json`, and the contents of `training.json` and
            `conversion.json`.
        picture, caption: name of a sample grid in the repository, and its caption.
        pictures: captions of further pictures, by their names.
        license: the Hub's id of the licence of the weights.
        variant: the variant of the weights to load, if there are no plain ones.
        revision: the branch of the repository, if not main.

    Raises:
        ValueError: for a licence that is not an id.
    """
    check_license(license)
    results, training = results or [], training or {}
    title, name, (height, width) = repo_id.split("/")[-1], scheduler.get("_class_name"), _size(unet)
    classes = unet.get("num_class_embeds")
    known = training.get("classes")
    labels = len(known) if isinstance(known, list) and known else classes
    colours = {1: "grayscale", 3: "RGB"}.get(unet["in_channels"], f"{unet['in_channels']}-channel")
    inverse, ours = str(name).startswith("Inverse"), "eta" in scheduler  # a stock scheduler has none
    process = "sampled by the generalized process of" if ours else f"saved with `{name}`, a network as in"
    unknown = _unknown_to_stock(unet, scheduler)
    dataset = training["config"].get("data") if training.get("data_from") == "hub" else None
    link = f"[{dataset}](https://huggingface.co/datasets/{dataset}), " if dataset else ""
    origin = training_rows(training) if training else conversion_rows(conversion) if conversion else []
    words = {
        "repo": repo_id,
        "code": code().name,
        "variant": f', variant="{variant}"' if variant else "",
        "revision": f', revision="{revision}"' if revision else "",
        "scheduler": "DDIMScheduler" if ours else name,
        "unknown": unknown,
        "other": _other_sampler(scheduler),
    }
    body = TEMPLATE.substitute(
        words,
        title=title,
        summary=f"{'A class-conditional' if classes else 'An unconditional'} diffusion model of {height}×{width} "
        f"{colours} images: a `{unet.get('_class_name')}` of {parameters:,} parameters, {process} "
        "[Denoising Diffusion Implicit Models](https://arxiv.org/abs/2010.02502) (DDIM).",
        picture=f"![samples]({picture})\n\n*{caption}*" if picture else "*There is no sample grid.*",
        also=", GeneralizedDDIMScheduler" if inverse else "",
        sampler=SAMPLING if inverse else "",
        labels=", class_labels=0" if classes else "",
        stock=Template(PARTS if unknown else STOCK).substitute(words),
        settings=table([*settings(scheduler), ("classes", labels)]),
        figures=figures(results),
        pictures="".join(f"\n![{each}]({each})\n\n*{cell(text)}*\n" for each, text in (pictures or {}).items()),
        training=table(origin) if origin else "How these weights were trained was not recorded.",
        size=f"{height}×{width} pixels",
        licence=f"The weights: {license or 'not stated'}. The training data: {link}under its own licence, which may "
        "bind the weights. The code file: Apache-2.0.",
    )
    metadata = ModelCardData(
        library_name="diffusers",
        pipeline_tag=TASK,
        license=license,
        tags=["ddim", "diffusion", "ddim-plugin"],
        datasets=[dataset] if dataset else None,
        model_name=title,
        eval_results=[_eval_result(entry) for entry in results if entry.get("listed", True)] or None,
    )
    text = f"---\n{metadata.to_yaml()}\n---\n\n{body}"
    return f"{text}\n{MARK} {__version__} from the records and configs of this repo ({_digest(text)}).*\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def is_written_here(text: str) -> bool:
    """Test whether a card was written by `card`, and not changed since."""
    above, _, mark = text.replace("\r\n", "\n").rpartition(f"\n{MARK}")
    return mark.rstrip().endswith(f"({_digest(above)}).*")


def is_kept(path: Path) -> bool:
    """Test for a card in a file that somebody wrote or changed."""
    return path.is_file() and not is_written_here(path.read_text(encoding="utf-8", errors="replace"))


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


def eval_results(results: list[dict[str, Any]]) -> dict[str, str]:
    """Return the texts of `.eval_results/*.yaml`, for results on data sets of the Hub, by name.

    `huggingface_hub` before 1.0 does not have that format: there are none then.
    """
    if not hasattr(huggingface_hub, "EvalResultEntry"):
        return {}
    files: dict[str, list[Any]] = {}
    for entry in results:
        if (dataset := entry["dataset"].get("id")) and entry.get("listed", True):
            made = huggingface_hub.EvalResultEntry(dataset, TASK, float(entry["value"]), notes=_notes(entry))
            files.setdefault(f".eval_results/{dataset.replace('/', '--')}.yaml", []).append(made)
    to_yaml = huggingface_hub.eval_result_entries_to_yaml
    return {name: yaml_dump(to_yaml(entries)) for name, entries in files.items()}


def _eval_result(entry: dict[str, Any]) -> EvalResult:
    dataset = entry["dataset"]
    return EvalResult(
        task_type=TASK,
        dataset_type=dataset.get("id") or dataset["name"],
        dataset_name=dataset["name"],
        dataset_split=dataset.get("split"),
        metric_type=entry["metric"],
        metric_name=f"{metric_name(entry)} ({_notes(entry)})",
        metric_value=float(entry["value"]),
        metric_args={"nfe": entry["nfe"]} | {key: entry[key] for key in SETTINGS if entry.get(key) is not None},
    )


def _notes(entry: dict[str, Any]) -> str:
    """Return the settings of a measurement, in a line."""
    short = {"num_inference_steps": "S", "eta": "η", "variance_type": "variance", "timestep_spacing": "τ"}
    known = [f"{short.get(key, key)} = {entry[key]}" for key in SETTINGS[:5] if entry.get(key) is not None]
    return ", ".join([f"NFE = {entry['nfe']:g}", *known])


def _size(unet: dict[str, Any]) -> tuple[Any, Any]:
    size = unet.get("sample_size") or ("?", "?")
    return (size, size) if isinstance(size, int) else tuple(size)


def _unknown_to_stock(unet: dict[str, Any], scheduler: dict[str, Any]) -> str:
    """Return what the stock DDIM pipeline does not support of this model."""
    if unet.get("num_class_embeds"):
        return "class labels"
    if "eta" not in scheduler:
        return f"the settings of `{scheduler.get('_class_name')}`"
    return "learned variances" if unet.get("out_channels") != unet["in_channels"] else ""


def _other_sampler(scheduler: dict[str, Any]) -> str:
    """Return how the stock sampler differs, whose η is 0."""
    found = [] if scheduler.get("timestep_spacing") in STOCK_SPACINGS else ["its own τ"]
    if "solver_order" in scheduler and scheduler["solver_order"] != 1:
        found.append("order 1")
    if scheduler.get("eta") or scheduler.get("variance_type") in ("fixed_large", "optimal"):
        found.append("η = 0")
    if scheduler.get("use_clipped_model_output"):
        found.append("the network's ε̂ beside a clipped x̂0")
    return f"\n\nThat is another sampler than the one above: it has {', '.join(found)}." if found else ""
