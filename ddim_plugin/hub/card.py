"""Model cards: one template, filled with tables of a model's configs."""

import hashlib
import re
from pathlib import Path
from typing import Any

import diffusers
from huggingface_hub import ModelCard, ModelCardData
from jinja2 import StrictUndefined, Template

from ..schedulers.config import CLASSES, KEY, OF_PATH, defaults, path_of
from ..version import __version__
from .code import code

TASK = "unconditional-image-generation"  # the Hub's name for the task of these pipelines
MARK = "*Written by ddim-plugin"  # starts the last line of our cards, which ends with a digest of the text above it
LAYOUT = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True, "undefined": StrictUndefined}
TEMPLATE = Template(Path(__file__).with_name("card.md").read_text(encoding="utf-8"), **LAYOUT)
SYMBOLS = {"num_train_timesteps": "T", "beta_schedule": "β", "prediction_type": "prediction", "eta": "η"}
SYMBOLS |= {"timestep_spacing": "τ", "variance_type": "variance"}
# What the snippets load: a variant, unless there are plain weights, of a revision. The stock pipeline that samples, the
# caption of samples.png (None without it), and sections to add.
DETAILS = {"variant": None, "revision": None, "pipeline": "DDIMPipeline", "samples": None, "sections": ""}
Config = dict[str, Any]


def card(repo_id: str, unet: Config, scheduler: Config, parameters: int, license: str | None = None, **details: Any):
    """Write the card of a model, as Markdown with its metadata.

    `unet` and `scheduler` are the configs, with "_class_name". `details` are those of `DETAILS`, or more metadata.
    """
    shown, title = {key: details.pop(key, default) for key, default in DETAILS.items()}, repo_id.split("/")[-1]
    known = {"library_name": "diffusers", "pipeline_tag": TASK, "tags": ["ddim", "diffusion", "ddim-plugin"]}
    metadata = ModelCardData(**known, license=license, model_name=title, **details).to_yaml()
    return sign(TEMPLATE.render(locals() | shown, code=code().name, settings=settings, cell=cell))


def adapt(text: str, repo_id: str, license: str | None = None) -> str:
    """Put the id of another repository, and the licence if one is given, into a card that `card` wrote."""
    written = ModelCard(text.replace("\r\n", "\n").rpartition(f"\n{MARK}")[0])
    body = re.sub(r'(from_pretrained\(\s*")[^"]+', rf"\g<1>{repo_id}", written.text)
    body = re.sub(r"ddim_plugin_\d+_\d+\w*", code().name, body)
    if license is not None:
        written.data.license = license
        body = re.sub(r"(?<=\nThe weights: ).+?(?=\. The training data)", lambda _: license, body)
    return sign(f"---\n{written.data.to_yaml()}\n---\n{body}")


def is_written_here(text: str) -> bool:
    """Test whether a card was written by `card`, and not changed since."""
    above, _, mark = text.replace("\r\n", "\n").rpartition(f"\n{MARK}")
    return mark.rstrip()[-12:] == sign(above).rstrip()[-12:]  # the digest, of any version


def sign(text: str) -> str:
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{text}\n{MARK} {__version__} from the records and configs of this repo ({digest}).*\n"


def cell(value: Any) -> str:
    """Write a value for a table: of a long list its length, of a dictionary its keys."""
    if isinstance(value, float):
        value = f"{value:.6g}"
    elif isinstance(value, dict):
        value = ", ".join(sorted(map(str, value), key=len))
    elif isinstance(value, list | tuple):
        value = f"{len(value)} values" if len(value) > 6 else ", ".join(map(str, value))
    return " ".join(str(value).split()).replace("|", "\\|")


def settings(config: Config) -> Config:
    """Select the settings in a config that are not the defaults of their class, and those of `SYMBOLS` in any case."""
    known = defaults(CLASSES.get(name := config["_class_name"]) or getattr(diffusers, name))
    hidden = (config.get(KEY) or {}).keys() & {"trained_betas"}  # from the schedule
    hidden |= {key for keys in OF_PATH.values() for key in keys if key not in OF_PATH[path_of(config)]}
    shown = {key for key, default in known.items() if config.get(key, default) != default} | SYMBOLS.keys()
    found = {SYMBOLS.get(key, key): config[key] for key in config if key in shown - hidden}
    solvers = sorted((int(S), each) for S, each in (config.get("fitted_solvers") or {}).items() if "error" in each)
    gains = [(S, each["error"] / each["default_error"], each.get("guidance_scale", 1)) for S, each in solvers]
    gains = [f"{S} (error × {gain:.2f}{'' if w == 1 else f' at w = {w:g}'})" for S, gain, w in gains]
    return found | ({"fitted_solvers": ", ".join(gains)} if gains else {})
