"""Pipelines as folders and repos of the Hub: written for three kinds of reader, and opened without running code.

A folder has, beside the weights and configs, the package as one file (see `bundle`) and for each kind of class a short
entry to it, which `model_index.json` names: that is what diffusers needs to load it where this package is missing. Here
those files are never run: classes are taken by their names, from what this process knows.
"""

import inspect
import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin, UNet2DModel
from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .bundle import code
from .card import read_object
from .schedulers import GeneralizedDDIMScheduler, InverseDDIMScheduler

logger = logging.getLogger("ddim_plugin")

INDEX = "model_index.json"
PIPELINE = "GeneralizedDDIMPipeline"
SCHEDULERS = {each.__name__: each for each in (GeneralizedDDIMScheduler, InverseDDIMScheduler)}

CODE = re.compile(r"(scheduler/)?ddim_plugin_\w+_[0-9a-f]{8}(_pipeline|_scheduler)?\.py")
"""Names of the code files, of any version."""

OURS = re.compile(r"ddim_plugin(_\w+)?")
"""Modules that `model_index.json` may name for classes of this package."""

ENTRY = '''"""{classes} for diffusers. The code is in {name}.py.

diffusers runs this file anew at each load. The code is run once, so that the classes of all pipelines stay the same.
"""

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for diffusers: it copies the files that such lines name
    {line}

if "{name}" not in sys.modules:
    spec = importlib.util.spec_from_file_location("{name}", Path(__file__).with_name("{name}.py"))
    module = sys.modules["{name}"] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules["{name}"]
        raise

{takes}
'''

HUB_SETTINGS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision")
WEIGHT_SETTINGS = ("torch_dtype", "dtype", "variant", "use_safetensors", "low_cpu_mem_usage", "disable_mmap")
PLACEMENT = ("device_map", "max_memory", "offload_folder", "offload_state_dict", "quantization_config", "use_flashpack")
"""Keywords of `from_pretrained`: where files come from, how weights are read, and what diffusers alone can do."""


# ---- writing -------------------------------------------------------------------------------------------------------


def write_index(pipe: DiffusionPipeline, folder: str | Path) -> None:
    """`model_index.json` for all readers, and the code files it names; those of other versions go."""
    folder = Path(folder)
    index = json.loads(pipe.to_json_string())
    index.pop("_name_or_path", None)  # a place on this machine
    index, files = with_code(index)
    for name, text in files.items():
        _write(folder / name, text)
    _write(folder / INDEX, json.dumps(index, indent=2) + "\n")
    for path in (*folder.glob("*.py"), *folder.glob("scheduler/*.py")):
        name = path.relative_to(folder).as_posix()
        if CODE.fullmatch(name) and name not in files:
            path.unlink()


def with_code(index: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """What `model_index.json` holds, with entries that name code files; and those files, names and texts."""
    name, text = code()
    files = {f"{name}.py": text, f"{name}_pipeline.py": _entry([PIPELINE])}
    index = index | {"_class_name": [f"{name}_pipeline", PIPELINE]}
    if _scheduler_is_ours(index):
        files |= {f"scheduler/{name}.py": text, f"scheduler/{name}_scheduler.py": _entry(list(SCHEDULERS))}
        index["scheduler"] = [f"{name}_scheduler", index["scheduler"][1]]
    return index, files


def _entry(classes: list[str]) -> str:
    name, names = code()[0], ", ".join(classes)
    line = f"from .{name} import {names}"  # not in the template: diffusers would take it for one of this file
    takes = "\n".join(f'{each} = sys.modules["{name}"].{each}' for each in classes)
    return ENTRY.format(name=name, classes=names, line=line, takes=takes)


def _write(path: Path, text: str) -> None:
    """A text file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


# ---- opening -------------------------------------------------------------------------------------------------------


class _Download(DiffusionPipeline):
    """Downloads the files of a U-Net and a scheduler, whatever classes and code the repo names for them."""

    def __init__(self, unet: Any, scheduler: Any): ...

    @classmethod
    def _dict_from_json_file(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        index = super()._dict_from_json_file(*args, **kwargs)
        known = {key: ["diffusers", "ModelMixin"] for key, value in index.items() if isinstance(value, list)}
        return index | known | {"_class_name": cls.__name__}


def opened(cls: Any, source: str | os.PathLike, kwargs: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The folder of a model, and keywords with which `DiffusionPipeline.from_pretrained` makes a `cls` of it.

    Nothing of a repo is run: scheduler and network are made here, from classes that this process knows. Raises
    ValueError or OSError that says what to do.
    """
    name, kwargs = os.fspath(source), dict(kwargs)
    if kwargs.pop("custom_pipeline", None) is not None:
        raise ValueError(
            f"{cls.__name__} runs no code of a repo: custom_pipeline is for DiffusionPipeline.from_pretrained"
        )
    kwargs.pop("trust_remote_code", None)  # there is nothing to trust
    hub = {key: kwargs.pop(key) for key in HUB_SETTINGS if key in kwargs}
    folder = Path(name) if os.path.isdir(name) else _download(name, hub, kwargs)
    index = read_index(folder, name)
    others = components(index).keys() - inspect.signature(cls.__init__).parameters.keys()
    if others:
        raise ValueError(
            f"{name} has {', '.join(sorted(others))} beside a network and a scheduler: open it with DiffusionPipeline, "
            "and give that pipeline a scheduler of this package"
        )
    if kwargs.get("scheduler") is None:
        kwargs["scheduler"] = open_scheduler(folder, index, name)
    if kwargs.get("unet") is None and all(kwargs.get(key) is None for key in PLACEMENT):
        weights = {key: kwargs.pop(key) for key in WEIGHT_SETTINGS if key in kwargs}
        kwargs["unet"] = open_unet(folder, index, name, weights)
    return folder, kwargs


def plain_index(index: dict[str, Any]) -> dict[str, Any]:
    """What `model_index.json` holds, naming no code files but the modules of this process."""
    plain = index | {"_class_name": _class_name(index.get("_class_name"))}
    if _scheduler_is_ours(index):
        plain["scheduler"] = [GeneralizedDDIMScheduler.__module__, index["scheduler"][1]]
    return plain


def _download(name: str, hub: dict[str, Any], kwargs: dict[str, Any]) -> Path:
    """The folder of a snapshot of a repo, with the weights that are asked for."""
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise OSError(f"there is no folder {name}")
    wanted = {key: kwargs[key] for key in ("variant", "use_safetensors") if key in kwargs}
    with told(name, hub.get("token"), hub.get("revision")):
        return Path(_Download.download(name, **hub, **wanted))


def read_index(folder: Path, name: str) -> dict[str, Any]:
    """What `model_index.json` holds, where it is of a network and a scheduler."""
    if not (folder / INDEX).is_file():
        raise OSError(f"{name} is no pipeline: it has no {INDEX}")
    index = read_object(folder / INDEX)
    for key, value in index.items():
        named = key == "_class_name" or not key.startswith("_")
        if named and isinstance(value, list) and not (len(value) == 2 and {*map(type, value)} <= {str, type(None)}):
            raise ValueError(f"{name}: {INDEX} says {key}={value!r}, which is not a module and a class")
    missing = [key for key in ("unet", "scheduler") if key not in components(index)]
    if missing:
        raise ValueError(
            f"{name}: {INDEX} names no {' and no '.join(missing)}, so it is no model of this pipeline's kind"
        )
    return index


def is_ours(index: dict[str, Any]) -> bool:
    """Whether a `model_index.json` is of a pipeline of this package."""
    return _class_name(index.get("_class_name")) == PIPELINE


def _class_name(value: Any) -> Any:
    return value[1] if isinstance(value, list | tuple) else value


def _scheduler_is_ours(index: dict[str, Any]) -> bool:
    module, name = components(index).get("scheduler", ("", ""))
    return name in SCHEDULERS and OURS.fullmatch(module) is not None


def components(index: dict[str, Any]) -> dict[str, list[str]]:
    """Module and class of each component that a `model_index.json` names."""
    named = {key: value for key, value in index.items() if isinstance(value, list) and not key.startswith("_")}
    return {key: value for key, value in named.items() if None not in value}


def _part(folder: Path, component: str) -> Path:
    """Where the files of a component are: old repos keep all in one folder."""
    return folder / component if (folder / component).is_dir() else folder


def _class(name: str, component: str, module: str, class_name: str, base: type) -> Any:
    """A class that this process knows: of diffusers, or of a module that was imported before."""
    found = getattr(diffusers if module == "diffusers" else sys.modules.get(module), class_name, None)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(
            f"{name}: {INDEX} names {class_name} of {module} for the {component}, and this process knows no such "
            f"{base.__name__}. Import that module before, or pass {component}=…. If it is code of the repo, read it "
            "and use DiffusionPipeline.from_pretrained with trust_remote_code=True and a pinned revision"
        )
    return found


def open_scheduler(folder: Path, index: dict[str, Any], name: str) -> SchedulerMixin:
    """The scheduler of a folder. That of a stock pipeline becomes one of ours, and what that changes is logged."""
    module, class_name = index["scheduler"]
    part = _part(folder, "scheduler")
    if not (part / "scheduler_config.json").is_file():
        raise OSError(f"{name} has no scheduler_config.json")
    config = read_object(part / "scheduler_config.json")
    if _scheduler_is_ours(index):
        return SCHEDULERS[class_name].from_config(config)
    known = _class(name, "scheduler", module, class_name, SchedulerMixin)
    if is_ours(index):
        return known.from_config(config)
    scheduler, story = adopt(config, known)
    logger.warning("%s is a %s. %s", name, _class_name(index.get("_class_name")), story)
    return scheduler


def adopt(config: dict[str, Any], known: type) -> tuple[GeneralizedDDIMScheduler, str]:
    """A scheduler of ours from the config of a stock one; and in words what was taken over, and what is another now."""
    if known.__name__ not in GeneralizedDDIMScheduler._compatibles:
        raise ValueError(f"a {known.__name__} is of another family: pass scheduler=… that fits the network")
    ours, theirs = _defaults(GeneralizedDDIMScheduler), _defaults(known)
    taken = {key: value for key, value in config.items() if key in ours or key.startswith("_")}
    scheduler = GeneralizedDDIMScheduler.from_config(taken)
    before = theirs | {key: value for key, value in config.items() if key in theirs}
    after = {key: scheduler.config[key] for key in ours if key in before}
    said = {
        "taken over": [f"{key}={value!r}" for key, value in after.items() if key in config and value == before[key]],
        "another now": [
            f"{key}={value!r} (was {before[key]!r})" for key, value in after.items() if value != before[key]
        ],
        "left out": [key for key in config if key not in taken],
    }
    lines = [f"Its {known.__name__} became a GeneralizedDDIMScheduler with η = {scheduler.config.eta:g}."]
    lines += [f"  {what}: {', '.join(settings)}" for what, settings in said.items() if settings]
    if scheduler.config.clip_sample:
        lines.append("  x̂0 is clipped in each step, as its config says; the paper does not clip (clip_sample=False)")
    return scheduler, "\n".join(lines)


def _defaults(known: type) -> dict[str, Any]:
    """The settings of a scheduler and their defaults."""
    parameters = inspect.signature(known.__init__).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty}


def open_unet(folder: Path, index: dict[str, Any], name: str, settings: dict[str, Any]) -> ModelMixin:
    """The network of a folder. Raises OSError or ValueError unless its weights are whole, all there, and no others."""
    known = _class(name, "unet", *index["unet"], ModelMixin)
    if known.__module__.startswith("diffusers.") and not issubclass(known, UNet2DModel):
        raise ValueError(f"{name} has a {known.__name__}; this pipeline is for a UNet2DModel")
    dtype = settings.get("dtype", settings.get("torch_dtype"))
    if isinstance(dtype, dict):
        key = "dtype" if "dtype" in settings else "torch_dtype"
        settings = settings | {key: dtype.get("unet", dtype.get("default", torch.float32))}
    part = _part(folder, "unet")
    found = sorted(file.name for file in part.glob("*") if file.suffix in (".safetensors", ".bin"))
    if settings.get("use_safetensors") is None:  # or diffusers says that it looks for others
        settings = settings | {"use_safetensors": any(name.endswith(".safetensors") for name in found)}
    try:
        unet, report = known.from_pretrained(part, output_loading_info=True, **settings)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        said = _line(error).split(" If you want")[0]
        if "shape" in said or "size mismatch" in said:
            raise ValueError(f"the weights of {name} do not fit its config: {said}") from error
        raise OSError(
            f"cannot load the network of {name}: {said}. Its weights: {', '.join(found) or 'none'}. Where a "
            "download is damaged, force_download=True mends it"
        ) from error
    wrong = {
        key: sorted(report[f"{key}_keys"]) for key in ("missing", "unexpected", "mismatched") if report[f"{key}_keys"]
    }
    if wrong:
        said = "; ".join(f"{len(keys)} {key}, such as {keys[0]}" for key, keys in wrong.items())
        raise ValueError(f"the weights of {name} do not fit its config: {said}")
    return unet


# ---- failures of the Hub's client ----------------------------------------------------------------------------------


@contextmanager
def told(name: str, token: Any = None, revision: str | None = None, to: str = "read") -> Iterator[None]:
    """Failures of the Hub's client in here become an OSError that says what to do, and never the token.

    `to` "read" or "write" is what is being tried with the repo.
    """
    used = token if isinstance(token, str) else None if token is False else get_token()
    if used and not (used.isascii() and used.isprintable() and " " not in used):  # the client's error would show it
        raise OSError("the token has characters that no token has: copy it again")
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and not isinstance(error, OSError | HFValidationError):
            raise
        raise OSError(_meaning(list(_causes(error)), name, revision, to)) from error


def _meaning(chain: list[BaseException], name: str, revision: str | None, to: str) -> str:
    where = constants.ENDPOINT

    def has(*kinds: type) -> bool:
        return any(isinstance(each, kinds) for each in chain)

    answers = [each.response for each in chain if isinstance(each, HfHubHTTPError)]
    status = next((answer.status_code for answer in answers if answer is not None), None)
    if has(HFValidationError):
        return f"{name!r} is no id of a repo: it must be like user/model"
    if has(RevisionNotFoundError):
        return f"{name} has no revision {revision!r} on {where}: give a branch, a tag or a commit that is there"
    if has(GatedRepoError):
        return f"{name} is gated: accept its conditions at {where}/{name}, and log in"
    if has(LocalTokenNotFoundError) or (status == 401 and not has(RepositoryNotFoundError)):
        return f"{where} needs another token for {name}: log in with `hf auth login`, set HF_TOKEN, or pass a token"
    if has(RepositoryNotFoundError):
        return f"there is no {name} on {where} for all to {to}: check the name, or log in with a token that may {to} it"
    if status == 403:
        return f"the token may not write to {name} on {where}: use one that may"
    if status is not None and status != 404:
        return f"{where} answered {name} with status {status}: try again later"
    if has(LocalEntryNotFoundError, ConnectionError) or any("Connect" in type(each).__name__ for each in chain):
        return f"{where} cannot be reached, and {name} is not whole in the cache"
    if has(EntryNotFoundError):
        return f"{name} is no pipeline: it has no {INDEX}"
    return f"{name}: {_line(chain[0])}"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
