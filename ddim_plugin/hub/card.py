"""Model cards: one template, filled from what was written by the scripts that trained and measured the model.

`results.json` holds a list under "results". An entry has
    metric: its id ("fid"), and optionally name ("FID") and standard_error;
    value, and nfe: evaluations of the network for an image;
    dataset: {"name", and optionally "id" on the Hub and "split"}, what the value was measured against;
and optionally the settings it was measured with: num_inference_steps, eta, variance_type, timestep_spacing, scheduler,
images, draws (sets of so many images, whose values were averaged), seed. With `"listed": false` it stands in the card's
tables but not in the metadata that the Hub lists.
`training.json` is the record that the training script leaves.
"""

import hashlib
import re
from numbers import Real
from pathlib import Path, PureWindowsPath
from string import Template
from typing import Any

import huggingface_hub
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import yaml_dump

from ..process.betas import RANGED
from ..schedulers.generalized import STOCK_SPACINGS
from ..version import __version__
from .files import read_object

TASK = "unconditional-image-generation"
"""The Hub's name for the task of these pipelines."""

SETTINGS = ("num_inference_steps", "eta", "variance_type", "timestep_spacing", "scheduler", "images", "draws", "seed")
"""What a result may tell of how it was measured."""

MARK = "*Written by ddim-plugin"
"""Begins the last line of a card that was made here, which ends with a digest of the text above it."""

WITH_PLUGIN = "from ddim_plugin import GeneralizedDDIMPipeline"  # diffusers would miss it, at the head of a line

TEMPLATE = Template("""# $title

$summary

$picture

## Use

With ddim-plugin installed, which runs no code of this repo:

```python
$with_plugin

pipe = GeneralizedDDIMPipeline.from_pretrained("$repo"$variant$revision)
${sampler}images = pipe(batch_size=16, num_inference_steps=20$labels).images
```

With diffusers alone. The flag runs the `ddim_plugin_….py` files of this repo: read them, and pin the commit you read.

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("$repo"$variant, trust_remote_code=True, revision="THE COMMIT YOU READ")
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

- The pictures resemble the training data, with whatever it over- or underrepresents; nothing filters them, and nothing
  was done to find out what they may show.
- A picture may come close to one of the training set. Do not take pictures for evidence of anything real.
- Made for $size pictures and for research on sampling; at other sizes the network is out of its range.
- The fewer the steps, the further the pictures are from those of the model's own process: compare at equal
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

STOCK = """With the classes of diffusers only:

```python
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

unet = UNet2DModel.from_pretrained("$repo", subfolder="unet"$variant$revision)
scheduler = DDIMScheduler.from_pretrained("$repo", subfolder="scheduler"$revision)
images = DDIMPipeline(unet, scheduler)(batch_size=16, num_inference_steps=20).images
```$other"""

LOOP = """The parts load into the classes of diffusers too, `UNet2DModel.from_pretrained("$repo", subfolder="unet")` and
`$scheduler.from_pretrained("$repo", subfolder="scheduler")`; `DDIMPipeline` does not know $unknown."""

SAMPLING = """pipe.scheduler = GeneralizedDDIMScheduler.from_config(pipe.scheduler.config)  # the saved one encodes
"""

TAU_NAMES = {
    "linear": "linear, τ_i = ⌊T·i/S⌋",
    "quadratic": "quadratic, τ_i = max(i, ⌊T·i²/S²⌋)",
    "paper_linear": "linear, as the authors' code",
    "paper_quadratic": "quadratic, as the authors' code",
}


# ---- reading -------------------------------------------------------------------------------------------------------


def read_results(file: str | Path) -> list[dict[str, Any]]:
    """The entries of a `results.json`. Raises ValueError naming what does not fit the format."""
    return entries_of(read_object(file), file)


def entries_of(content: dict[str, Any], file: str | Path) -> list[dict[str, Any]]:
    """`read_results` of what the file holds."""
    entries = content.get("results")
    if not isinstance(entries, list):
        raise ValueError(f'{file} holds no list under "results"')
    for i, entry in enumerate(entries):
        problem = _problem(entry)
        if problem:
            raise ValueError(f"{file}: entry {i} of results {problem}")
    return entries


def _problem(entry: Any) -> str | None:
    if not isinstance(entry, dict):
        return f"is no object: {entry!r}"
    for key in ("metric", "value", "nfe", "dataset"):
        if key not in entry:
            return f"has no {key}"
    if not isinstance(entry["metric"], str) or not entry["metric"]:
        return f"has the metric {entry['metric']!r}: give its id, such as fid"
    for key in ("value", "nfe", "standard_error"):
        value = entry.get(key)
        if not (key == "standard_error" and value is None) and not _finite(value):
            return f"has {key}={value!r}: it must be a finite number"
    if entry["nfe"] <= 0:
        return f"has nfe={entry['nfe']!r}: it must be positive"
    dataset = entry["dataset"]
    texts = isinstance(dataset, dict) and all(isinstance(dataset.get(key, ""), str) for key in ("name", "id", "split"))
    if not texts or not dataset.get("name"):
        return f"has the dataset {dataset!r}: give at least its name; name, id and split are texts"
    return None


def _finite(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and abs(value) < 1e300


PLACE = re.compile(
    r"(?:^|(?<=[\s\"'=:]))(?!//)(?:file://[^/\s]*)?(?:~|[A-Za-z]:)?[\\/](?:[^\s\"'\\/]+[\\/])+([^\s\"'\\/,;:)]*)"
)
"""A place on a machine within a text: two parts or more, from the root or the home."""


def public(value: Any) -> Any:
    """A record without the places of this machine: of each the last part is left."""
    if isinstance(value, dict):
        return {public(key): public(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [public(each) for each in value]
    if not isinstance(value, str):
        return value
    if Path(value).is_absolute() or value.startswith(("~/", "../", "./")):
        return Path(value).name
    if PureWindowsPath(value).is_absolute():
        return PureWindowsPath(value).name
    return PLACE.sub(r"\1", value)


# ---- writing -------------------------------------------------------------------------------------------------------


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
    """The card of a model, as Markdown with its metadata in front.

    Args:
        repo_id: id of the repo on the Hub.
        unet, scheduler: the configs of the two.
        parameters: number of the network's parameters.
        results, training, conversion: what `results.json` lists, and what `training.json` and `conversion.json` hold,
            where there are such.
        picture, caption: name of a sample grid in the repo, and what is said below it.
        pictures: the same for further pictures, by their names.
        license: the Hub's id of the licence of the weights.
        variant: the weights to load, where there are no ordinary ones.
        revision: the branch of the repo, if not main.

    Raises:
        ValueError: for a licence that is no id.
    """
    check_license(license)
    results, training = results or [], training or {}
    origin = _training(training) if training else _conversion(conversion) if conversion else []
    title = repo_id.split("/")[-1]
    height, width = _size(unet)
    classes = unet.get("num_class_embeds")
    kind = "A class-conditional" if classes else "An unconditional"
    colours = {1: "grayscale", 3: "RGB"}.get(unet["in_channels"], f"{unet['in_channels']}-channel")
    inverse = str(scheduler.get("_class_name")).startswith("Inverse")
    ours = "eta" in scheduler  # a stock scheduler has none
    unknown = _unknown_to_stock(unet, scheduler)
    words = {
        "repo": repo_id,
        "variant": f', variant="{variant}"' if variant else "",
        "revision": f', revision="{revision}"' if revision else "",
        "scheduler": "DDIMScheduler" if ours else scheduler.get("_class_name"),
        "unknown": unknown,
        "other": _other_sampler(scheduler),
    }
    process = "sampled by the generalized process of"
    if not ours:
        process = f"saved with `{scheduler.get('_class_name')}`, a network as in"
    known = training.get("classes")
    labels = len(known) if isinstance(known, list) and known else classes
    data_set = training["config"].get("data") if training.get("data_from") == "hub" else None
    data = "under its own licence, which may bind the weights"
    if data_set:
        data = f"[{data_set}](https://huggingface.co/datasets/{data_set}), {data}"
    body = TEMPLATE.substitute(
        words,
        title=title,
        summary=f"{kind} diffusion model of {height}×{width} {colours} pictures: a `{unet.get('_class_name')}` of "
        f"{parameters:,} parameters, {process} "
        "[Denoising Diffusion Implicit Models](https://arxiv.org/abs/2010.02502) (DDIM).",
        picture=f"![samples]({picture})\n\n*{caption}*" if picture else "*There is no sample grid.*",
        with_plugin=WITH_PLUGIN + (", GeneralizedDDIMScheduler" if inverse else ""),
        sampler=SAMPLING if inverse else "",
        labels=", class_labels=0" if classes else "",
        stock=Template(LOOP if unknown else STOCK).substitute(words),
        settings=_table([*_settings(scheduler), ("classes", labels)]),
        figures=_figures(results),
        pictures="".join(f"\n![{name}]({name})\n\n*{_cell(told)}*\n" for name, told in (pictures or {}).items()),
        training=_table(origin) if origin else "How these weights were trained was not recorded.",
        size=f"{height}×{width}",
        licence=f"The weights: {license or 'nothing is said'}. The training data: {data}. The code files: Apache-2.0.",
    )
    metadata = ModelCardData(
        library_name="diffusers",
        pipeline_tag=TASK,
        license=license,
        tags=["ddim", "diffusion", "ddim-plugin"],
        datasets=[data_set] if data_set else None,
        model_name=title,
        eval_results=[_eval_result(entry) for entry in results if entry.get("listed", True)] or None,
    )
    return _signed(f"---\n{metadata.to_yaml()}\n---\n\n{body}")


def _signed(text: str) -> str:
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{text}\n{MARK} {__version__} from the records and configs of this repo ({digest}).*\n"


def is_written_here(text: str) -> bool:
    """Whether a card was made here, and nobody has changed it since."""
    above, _, mark = text.replace("\r\n", "\n").rpartition(f"\n{MARK}")
    return mark.rstrip().endswith(f"({hashlib.sha256(above.encode()).hexdigest()[:8]}).*")


def check_license(license: str | None) -> None:
    """Raise ValueError for what is no id of a licence."""
    if license is not None and not re.fullmatch(r"[a-z0-9.+-]+", license):
        raise ValueError(f"license must be as the Hub names it, such as mit or cc-by-4.0, not {license!r}")


def license_of(text: str) -> str | None:
    """The licence that a card names."""
    try:
        return ModelCard(text).data.license
    except ValueError:  # no metadata that can be read
        return None


def eval_results(results: list[dict[str, Any]]) -> dict[str, str]:
    """`.eval_results/*.yaml` for what was measured against data sets of the Hub: name → text.

    Nothing where `huggingface_hub` is too old to know that format.
    """
    if not hasattr(huggingface_hub, "EvalResultEntry"):
        return {}
    files: dict[str, list[Any]] = {}
    for entry in results:
        if entry["dataset"].get("id") and entry.get("listed", True):
            made = huggingface_hub.EvalResultEntry(
                entry["dataset"]["id"], TASK, float(entry["value"]), notes=_notes(entry)
            )
            files.setdefault(entry["dataset"]["id"].replace("/", "--"), []).append(made)
    return {
        f".eval_results/{name}.yaml": yaml_dump(huggingface_hub.eval_result_entries_to_yaml(entries))
        for name, entries in files.items()
    }


def _eval_result(entry: dict[str, Any]) -> EvalResult:
    dataset = entry["dataset"]
    return EvalResult(
        task_type=TASK,
        dataset_type=dataset.get("id") or dataset["name"],
        dataset_name=dataset["name"],
        dataset_split=dataset.get("split"),
        metric_type=entry["metric"],
        metric_name=f"{_name(entry)} ({_notes(entry)})",
        metric_value=float(entry["value"]),
        metric_args={"nfe": entry["nfe"]} | {key: entry[key] for key in SETTINGS if entry.get(key) is not None},
    )


def _name(entry: dict[str, Any]) -> str:
    return entry.get("name") or entry["metric"].upper()


def _notes(entry: dict[str, Any]) -> str:
    """How a result was measured, in a line."""
    known = {"num_inference_steps": "S", "eta": "η", "variance_type": "variance", "timestep_spacing": "τ"}
    said = [f"{known.get(key, key)} = {entry[key]}" for key in SETTINGS[:5] if entry.get(key) is not None]
    return ", ".join([f"NFE = {entry['nfe']:g}", *said])


def _size(unet: dict[str, Any]) -> tuple[Any, Any]:
    size = unet.get("sample_size") or ("?", "?")
    return (size, size) if isinstance(size, int) else tuple(size)


def _unknown_to_stock(unet: dict[str, Any], scheduler: dict[str, Any]) -> str:
    """What of this model the stock DDIM pipeline has no word for."""
    if unet.get("num_class_embeds"):
        return "class labels"
    if "eta" not in scheduler:
        return f"the settings of `{scheduler.get('_class_name')}`"
    return "learned variances" if unet.get("out_channels") != unet["in_channels"] else ""


def _other_sampler(scheduler: dict[str, Any]) -> str:
    """What is to be said where the stock pipeline, which has η = 0 and its own τ, makes other pictures."""
    told = [] if scheduler.get("timestep_spacing") in STOCK_SPACINGS else ["its own τ"]
    if "solver_order" in scheduler and scheduler["solver_order"] != 1:
        told.append("order 1")
    if scheduler.get("eta") or scheduler.get("variance_type") in ("fixed_large", "optimal"):
        told.append("η = 0")
    if scheduler.get("beta_schedule") and scheduler.get("use_clipped_model_output"):
        told.append("the network's ε̂ beside a clipped x̂0")
    return f"\n\nThat is another sampler than the one above: it has {', '.join(told)}." if told else ""


def _settings(scheduler: dict[str, Any]) -> list[tuple[str, Any]]:
    derived = "trained_betas" in (scheduler.get("_ddim_plugin") or {})  # from a schedule with a name
    schedule, ends = scheduler.get("beta_schedule"), (scheduler.get("beta_start"), scheduler.get("beta_end"))
    betas = schedule
    if scheduler.get("trained_betas") is not None and not derived:
        betas = "given as numbers, in the config"
    elif schedule in RANGED and all(map(_finite, ends)):
        betas = f"{schedule}, {ends[0]:g} to {ends[1]:g}"
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
        ("τ", TAU_NAMES.get(spacing, spacing)),
        ("τ fitted to these weights", ", ".join(f"S = {S}" for S in sorted(map(int, fitted))) or None),
        ("order", (scheduler["solver_order"] or "3, or 2 with noise") if "solver_order" in scheduler else None),
        ("η", scheduler.get("eta")),
        ("variance", scheduler.get("variance_type")),
        ("x̂0", constraint),
    ]


def _figures(results: list[dict[str, Any]]) -> str:
    """A table for each metric and data set: settings by S."""
    if not results:
        return "None have been measured for these weights."
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for entry in results:
        data = " ".join(filter(None, (entry["dataset"]["name"], entry["dataset"].get("split"))))
        key = (_name(entry), data, entry.get("images"), entry.get("draws"), entry.get("seed"))
        groups.setdefault(key, []).append(entry)
    parts = []
    for (name, data, images, draws, seed), entries in groups.items():
        told = [f"**{_cell(name)}**", _cell(data)]
        sets = "" if draws in (None, 1) else f"mean of {draws} sets of "
        told += [] if images is None else [f"{sets}{images:,} images"]
        told += [] if seed is None else [f"seed {seed}"]
        parts += [", ".join(told), _by_steps(entries)]
    note = "In brackets evaluations of the network for an image (NFE), where they are not S; ± the standard error."
    return "\n\n".join([*parts, f"{note} All of it is in `results.json`."])


def _by_steps(entries: list[dict[str, Any]]) -> str:
    """The values of entries, a row for each setting and a column for each S."""
    heads = {"scheduler": "scheduler", "variance_type": "variance", "eta": "η", "timestep_spacing": "τ"}
    used = [key for key in heads if any(entry.get(key) is not None for entry in entries)]
    columns = sorted({_column(entry) for entry in entries})
    rows: dict[tuple, dict[tuple, list[str]]] = {}
    for entry in entries:
        error, steps = entry.get("standard_error"), entry.get("num_inference_steps")
        value = f"{entry['value']:.4g}" + ("" if error is None else f" ± {error:.2g}")
        value += "" if steps in (None, entry["nfe"]) else f" ({entry['nfe']:.4g})"
        setting = tuple("" if entry.get(key) is None else _cell(entry[key]) for key in used)
        rows.setdefault(setting, {}).setdefault(_column(entry), []).append(value)
    lines = [[heads[key] for key in used] + [head for _, _, head in columns]]
    lines += [["---"] * len(lines[0])]
    lines += [
        [*setting, *(", ".join(values.get(column, ())) for column in columns)] for setting, values in rows.items()
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _column(entry: dict[str, Any]) -> tuple[bool, float, str]:
    """Where an entry stands: its S, or where it has none its evaluations."""
    steps = entry.get("num_inference_steps")
    if steps is None:
        return True, entry["nfe"], f"NFE {entry['nfe']:.4g}"
    return False, steps, f"S = {steps}"


def _training(training: dict[str, Any]) -> list[tuple[str, Any]]:
    config = training.get("config", {})
    steps, batch, seconds = config.get("steps"), config.get("batch_size"), training.get("seconds")
    seen = f"{steps * batch:,} in {steps:,} steps of {batch}" if steps and batch else None
    data = config.get("data")
    if isinstance(data, str) and training.get("data_from") != "hub":
        data = Path(data).name  # of a folder
    hours = None if seconds is None else f"{seconds / 3600:.2f} h on {training.get('device')}"
    if hours and training.get("processes", 1) > 1:
        hours += f", {training['processes']} processes"
    rate = training.get("images_per_second")
    revision = training.get("revision")
    return [
        ("data", f"{data}, {config.get('split')}"),
        ("pictures in the set", None if training.get("images") is None else f"{training['images']:,}"),
        ("pictures seen", seen),
        ("loss", config.get("loss")),
        ("optimizer", f"{config.get('optimizer')}, learning rate {config.get('learning_rate')}"),
        ("weights", f"exponential average, decay {config.get('ema_decay')}"),
        ("precision", training.get("mixed_precision")),
        ("seed", config.get("seed")),
        ("last loss", None if training.get("loss") is None else f"{training['loss']:.4g}"),
        ("cost", hours),
        ("pictures a second", None if rate is None else f"{rate:.4g}"),
        ("code", None if revision is None else f"revision {revision}"),
        ("status", training.get("status")),
    ]


def _conversion(conversion: dict[str, Any]) -> list[tuple[str, Any]]:
    source = conversion.get("source", {})
    return [
        ("converted from", source.get("file")),
        ("its SHA-256", source.get("sha256")),
        ("published as", source.get("published")),
        ("weights", conversion.get("weights")),
        ("step", source.get("step")),
    ]


def _cell(value: Any) -> str:
    """A value in a table of Markdown."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _table(rows: list[tuple[str, Any]]) -> str:
    lines = [f"| {name} | {_cell(value)} |" for name, value in rows if value is not None]
    return "\n".join(["| | |", "|---|---|", *lines])
