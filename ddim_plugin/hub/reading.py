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
from huggingface_hub.utils import validate_repo_id

from ..schedulers.generalized import (
    GeneralizedDDIMScheduler,
    InverseDDIMScheduler,
    InverseMultistepDDIMScheduler,
    MultistepDDIMScheduler,
)
from .code import code
from .files import read_object, weights_digest, write_file  # noqa: F401

logger = logging.getLogger("ddim_plugin")

INDEX = "model_index.json"
PIPELINE = "GeneralizedDDIMPipeline"
SCHEDULERS = {
    each.__name__: each
    for each in (
        GeneralizedDDIMScheduler,
        InverseDDIMScheduler,
        MultistepDDIMScheduler,
        InverseMultistepDDIMScheduler,
    )
}

CODE = re.compile(r"(scheduler/)?ddim_plugin_\w+_[0-9a-f]{8}(_pipeline|_scheduler)?\.py")
"""Names of the code files, of any version."""

write_whole = write_file

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

sys.modules.setdefault("{name}_scheduler", sys.modules["{name}"])  # where diffusers looks for what it is given instead
{takes}
'''

WEIGHTS = re.compile(
    r"(unet/)?diffusion_pytorch_model((\.(?P<variant>[^/]+?))?(-\d{5}-of-\d{5})?\.(safetensors|bin)"
    r"|\.(safetensors|bin)\.index(\.(?P<parts>[^/]+))?\.json)"
)
"""Names of a network's weights, and of the index of those in several files."""

DTYPE = "dtype" if tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 42) else "torch_dtype"
"""What this version of diffusers calls it."""

HUB_SETTINGS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision")
WEIGHT_SETTINGS = ("torch_dtype", "dtype", "variant", "use_safetensors", "low_cpu_mem_usage", "disable_mmap")
WEIGHT_SETTINGS += ("device_map", "max_memory", "offload_folder", "offload_state_dict", "quantization_config")
WEIGHT_SETTINGS += ("use_flashpack",)
"""Keywords of `from_pretrained`: where files come from, and how a network is read and placed."""


# ---- writing -------------------------------------------------------------------------------------------------------


def write_index(pipe: DiffusionPipeline, folder: str | Path) -> None:
    """`model_index.json` for all readers, and the code files it names; those of other versions go."""
    folder = Path(folder)
    index = json.loads(pipe.to_json_string())
    index.pop("_name_or_path", None)  # a place on this machine
    index, files = with_code(index)
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_file(folder / name, text)
    write_file(folder / INDEX, json.dumps(index, indent=2) + "\n")
    for path in (*folder.glob("*.py"), *folder.glob("scheduler/*.py")):
        name = path.relative_to(folder).as_posix()
        if CODE.fullmatch(name) and name not in files:
            path.unlink()


def variant_of(name: str) -> str | None:
    """The variant of a file of weights, or of the index of several: "" is none; None for files that are neither."""
    match = WEIGHTS.fullmatch(name)
    return None if match is None else match["variant"] or match["parts"] or ""


@contextmanager
def replaced(folder: str | Path, variant: str | None) -> Iterator[None]:
    """In here a network's weights are written anew: those that were there, in any form, go; or stay if that fails."""
    unet = Path(folder) / "unet"
    files = [path for path in unet.glob("diffusion_pytorch_model*") if variant_of(path.name) == (variant or "")]
    asides = {path: path.with_name(path.name + ".before") for path in files}
    for path, aside in asides.items():
        path.replace(aside)
    try:
        yield
    except BaseException:
        for path, aside in asides.items():
            aside.replace(path)
        raise
    for aside in asides.values():
        aside.unlink()


def with_code(index: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """What `model_index.json` holds, with entries that name code files; and those files, names and texts."""
    name, text = code()
    files = {f"{name}.py": text, f"{name}_pipeline.py": _entry([PIPELINE])}
    index = index | {"_class_name": [f"{name}_pipeline", PIPELINE]}
    if scheduler_is_ours(index):
        files |= {f"scheduler/{name}.py": text, f"scheduler/{name}_scheduler.py": _entry(list(SCHEDULERS))}
        index["scheduler"] = [f"{name}_scheduler", index["scheduler"][1]]
    return index, files


def _entry(classes: list[str]) -> str:
    name, names = code()[0], ", ".join(classes)
    line = f"from .{name} import {names}"  # not in the template: diffusers would take it for one of this file
    takes = "\n".join(f'{each} = sys.modules["{name}"].{each}' for each in classes)
    return ENTRY.format(name=name, classes=names, line=line, takes=takes)


# ---- opening -------------------------------------------------------------------------------------------------------


class _Download(DiffusionPipeline):
    """Downloads the files of a U-Net and a scheduler, whatever classes and code the repo names for them."""

    def __init__(self, unet: Any, scheduler: Any): ...

    @classmethod
    def _dict_from_json_file(cls, json_file: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        index = read_object(json_file)
        ours = {key: ["diffusers", "ModelMixin"] for key in ("unet", "scheduler") if key in components(index)}
        return {"_class_name": cls.__name__} | ours


def parts(cls: Any, source: str | os.PathLike, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments with which to make a `cls` of what is in a folder or a repo.

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
    weights = {key: kwargs.pop(key) for key in WEIGHT_SETTINGS if key in kwargs}
    wanted = inspect.signature(cls.__init__).parameters.keys() - {"self"}
    if kwargs.keys() - wanted:
        raise TypeError(f"{cls.__name__}.from_pretrained() got an unexpected keyword {min(kwargs.keys() - wanted)!r}")
    folder = Path(name) if os.path.isdir(name) else _download(name, hub, weights)
    index = read_index(folder, name)
    others = components(index).keys() - wanted
    if others:
        raise ValueError(
            f"{name} has {', '.join(sorted(others))} beside a network and a scheduler: open it with DiffusionPipeline, "
            "and give that pipeline a scheduler of this package"
        )
    made = {key: value for key, value in kwargs.items() if value is not None}
    if "scheduler" not in made:
        made["scheduler"] = open_scheduler(folder, index, name)
    if "unet" not in made:
        made["unet"] = open_unet(folder, index, name, weights)
    missing = components(index).keys() - made.keys()
    if missing:
        raise ValueError(f"{name} has {', '.join(sorted(missing))}: a {cls.__name__} is to open that, and pass it on")
    return {key: value for key, value in index.items() if key in wanted and key not in components(index)} | made


def plain_index(index: dict[str, Any]) -> dict[str, Any]:
    """What `model_index.json` holds, naming no code files but the modules of this process."""
    plain = index | {"_class_name": _class_name(index.get("_class_name"))}
    if scheduler_is_ours(index):
        plain["scheduler"] = [GeneralizedDDIMScheduler.__module__, index["scheduler"][1]]
    return plain


def _download(name: str, hub: dict[str, Any], weights: dict[str, Any]) -> Path:
    """The folder of a snapshot of a repo, with the weights that are asked for."""
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise OSError(f"there is no folder {name}")
    check_repo_id(name)
    wanted = {key: weights[key] for key in ("variant", "use_safetensors") if key in weights}
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
        raise ValueError(f"{name}: {INDEX} names no {' and no '.join(missing)}, so it is no model of this kind")
    return index


def is_ours(index: dict[str, Any]) -> bool:
    """Whether a `model_index.json` is of a pipeline of this package."""
    return _class_name(index.get("_class_name")) == PIPELINE


def scheduler_is_ours(index: dict[str, Any]) -> bool:
    """Whether the scheduler that a `model_index.json` names is of this package."""
    module, name = components(index).get("scheduler", ("", ""))
    return name in SCHEDULERS and OURS.fullmatch(module) is not None


def components(index: dict[str, Any]) -> dict[str, list[str]]:
    """Module and class of each component that a `model_index.json` names."""
    named = {key: value for key, value in index.items() if isinstance(value, list) and not key.startswith("_")}
    return {key: value for key, value in named.items() if None not in value}


def _class_name(value: Any) -> Any:
    return value[1] if isinstance(value, list | tuple) else value


def _part(folder: Path, component: str) -> Path:
    """Where the files of a component are: old repos keep all in one folder."""
    return folder / component if (folder / component).is_dir() else folder


def _class(name: str, component: str, module: str, class_name: str, base: type) -> Any:
    """A class that this process knows: of diffusers, or of a module that was imported before."""
    found = getattr(diffusers if module == "diffusers" else sys.modules.get(module), class_name, None)
    if not (isinstance(found, type) and issubclass(found, base) and hasattr(found, "from_pretrained")):
        raise ValueError(
            f"{name}: {INDEX} names {class_name} of {module} for the {component}, and this process knows no such "
            f"{base.__name__}. Import that module before, or pass {component}=…. If it is code of the repo, read it "
            "and use DiffusionPipeline.from_pretrained with trust_remote_code=True and a pinned revision"
        )
    return found


def open_scheduler(folder: Path, index: dict[str, Any], name: str) -> SchedulerMixin:
    """The scheduler of a folder. That of a stock pipeline becomes one of ours, and what that changes is logged."""
    file = _part(folder, "scheduler") / "scheduler_config.json"
    if not file.is_file():
        raise OSError(f"{name} has no scheduler_config.json")
    config = read_object(file)
    if scheduler_is_ours(index):
        known, adopts = SCHEDULERS[index["scheduler"][1]], False
    else:
        known, adopts = _class(name, "scheduler", *index["scheduler"], SchedulerMixin), not is_ours(index)
    try:
        if not adopts:
            return known.from_config(config)
        scheduler, story = adopt(config, known)
    except (ValueError, TypeError, AttributeError, ArithmeticError, MemoryError, LookupError) as error:
        raise ValueError(f"{name}: scheduler_config.json makes no scheduler: {_line(error)}") from error
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
    changed = {key: value for key, value in after.items() if value != before[key]}
    said = {
        "taken over": [f"{key}={value!r}" for key, value in after.items() if key in config and key not in changed],
        "another now": [f"{key}={value!r} (was {before[key]!r})" for key, value in changed.items()],
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
    settings = {key: value for key, value in settings.items() if value is not None}
    dtype = settings.pop("dtype", None) or settings.pop("torch_dtype", None)
    settings.pop("torch_dtype", None)
    if isinstance(dtype, dict):
        dtype = dtype.get("unet", dtype.get("default", torch.float32))
    if dtype is not None:
        settings[DTYPE] = dtype
    part, variant = _part(folder, "unet"), settings.get("variant")
    found = sorted(path.name for path in part.glob("*") if variant_of(path.name) is not None)
    fitting = [file for file in found if variant_of(file) == (variant or "")]
    if known.__module__.startswith("diffusers.") and not fitting:
        wanted = "weights of a network" if variant is None else f"weights of the variant {variant!r}"
        raise OSError(f"{name} has no {wanted}; it has {', '.join(found) or 'none at all'}")
    if "use_safetensors" not in settings:  # or diffusers says that it looks for others
        settings["use_safetensors"] = any(file.endswith(".safetensors") for file in fitting)
    try:
        unet, report = known.from_pretrained(part, output_loading_info=True, **settings)
    except Exception as error:  # settings and files of any kind reach the class, which fails in as many ways
        said = _line(error).split(" If you want")[0]
        if "shape" in said or "size mismatch" in said:
            raise ValueError(f"the weights of {name} do not fit its config: {said}") from error
        again = "" if os.path.isdir(name) else ". Where the download is damaged, force_download=True mends it"
        raise OSError(f"cannot load the network of {name} ({', '.join(fitting)}): {said}{again}") from error
    kinds = ("missing", "unexpected", "mismatched")
    wrong = {kind: sorted(map(str, report[f"{kind}_keys"])) for kind in kinds if report[f"{kind}_keys"]}
    if wrong:
        said = "; ".join(f"{len(keys)} {kind}, such as {keys[0]}" for kind, keys in wrong.items())
        raise ValueError(f"the weights of {name} do not fit its config: {said}")
    return unet


# ---- failures of the Hub's client ----------------------------------------------------------------------------------


def check_repo_id(name: str) -> None:
    """Raise OSError for what is no id of a repo."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise OSError(f"{name!r} is no id of a repo: it must be like user/model") from error


@contextmanager
def told(name: str, token: Any = None, revision: str | None = None, to: str = "read") -> Iterator[None]:
    """Failures of the Hub's client in here become an OSError that says what to do, and never the token.

    `to` "read" or "write" is what is being tried with the repo.
    """
    used = token if isinstance(token, str) else None if token is False else get_token()
    if used is not None and not (used and used.isascii() and used.isprintable() and " " not in used):
        raise OSError("the token is empty, or has characters that no token has: copy it again")  # the client shows it
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
    if status == 412:
        return f"somebody else pushed to {name} at the same time: push again"
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
