"""The commands: sample, encode, reconstruct, edit, fit and push."""

import json
import os
import runpy
import sys
import tempfile
import time
from argparse import Namespace
from importlib.metadata import files
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import get_device
from tqdm.auto import tqdm

from ..hub.push import explained, push_folder
from ..pipelines.fit import fit_solver
from ..pipelines.generation import GeneralizedDDIMPipeline
from ..pipelines.images import check_channels, grid, open_image
from ..pipelines.invert import Inverted, draw, invert
from ..pipelines.loop import batches, part_of
from ..process.spacings import integer
from ..schedulers import DETERMINISTIC, GeneralizedDDIMScheduler, MultistepDDIMScheduler, keep_learned, sampler_class
from ..schedulers.config import restored
from ..version import __version__
from .parser import FILES, LATENTS

CALL = {"prompt": "prompt", "class_label": "class_labels"}  # options that are arguments of the pipeline's call
CALL |= {name: name for name in ("guidance_scale", "null_class_label")}
STEPS, SIZE = {"steps": "num_inference_steps", "timesteps": "timesteps"}, {"height": "height", "width": "width"}
LOADING = {"model", "images", "latents", "batch_size", "device", "dtype", "revision", "output", "overwrite"}


def run(args: Namespace) -> None:
    """Run a command, move its files into place when all are complete, and print what was made and where."""
    command, start = vars(args).pop("command"), time.perf_counter()  # all others are settings
    try:
        torch.zeros(1, device=vars(args).get("device")).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device} is not available: {str(error).partition('. ')[0]}") from error
    if "model" in args and args.revision is not None and (args.model is None or Path(args.model).is_dir()):
        place = args.model or "of the installed digits"
        raise ValueError(
            f"--revision {args.revision} has no effect on the folder {place}: leave it out, or pass a Hub id"
        )
    if command == "demo" or vars(args).pop("space", False):
        _page("app.py" if command == "demo" else "space.py").main(**vars(args))
        return
    if command == "push":
        commit = push_folder(**vars(args))
        print(f"pushed {args.folder}: {commit.pr_url or commit.commit_url}")
        return
    files = {file: what for file, what in FILES[command].items() if file != LATENTS or not vars(args).get("latents")}
    places = [Path(args.output, file) for file in files]
    integer("--seed", vars(args).get("seed") or 0, 0, 2**62)
    for name, value in _given(args, "num", "batch_size", "height", "width").items():
        integer(f"--{name.replace('_', '-')}", value, 1)

    def taken() -> Path | None:
        return next((each for each in places if each.is_dir() or (os.path.lexists(each) and not args.overwrite)), None)

    if place := taken():
        remedy = "" if place.is_dir() else ", or pass --overwrite to replace files"
        raise ValueError(f"{place} exists: choose another --output{remedy}")
    parent = next(path for path in Path(args.output, LATENTS).absolute().parents if os.path.lexists(path))
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise ValueError(f"--output {args.output} is in {parent}, which is no folder, or protected: choose another")
    model = args.model if Path(args.model).is_dir() else f"{args.model} (no folder)"
    with explained(model), tempfile.TemporaryDirectory(dir=parent, prefix=".ddim-plugin-") as scratch:
        record, *contents = {"sample": sample, "fit": fit}.get(command, encode)(args, command)
        for file, content in zip(files, contents, strict=False):
            (content.save_pretrained if command == "fit" else content.save)(Path(scratch, file))
        measured = {"seconds": time.perf_counter() - start, "cpus": os.cpu_count(), "version": __version__}
        record |= {"command": command, "settings": vars(args), **measured}
        Path(scratch, f"{command}.json").write_text(json.dumps(record, indent=2) + "\n")
        output = Path(args.output, f"{command}-{os.getpid()}" if (place := taken()) else "")  # another run was first
        output.mkdir(parents=True, exist_ok=True)
        for file in files:
            Path(scratch, file).replace(output / file)
    for file, what in files.items():
        print(f"{what.format(**record, plural='s' * (record.get('images') != 1))}: {output / file}")
    if place:
        raise ValueError(f"{place} was written by another run meanwhile: the files of this one are in {output}")


def sample(args: Namespace, command: str) -> tuple:
    """Sample images from noise, or decode --latents."""
    found = _read(args, args.latents, *CALL, *STEPS) if args.latents else None
    args.num, args.seed = (len(found.latents), None) if found else (args.num or 16, args.seed or 0)
    pipe = _load(args, {"eta": args.eta, "variance_type": args.variance, "clip_sample": args.clip})
    call = _call(args, pipe, CALL | STEPS | SIZE)
    with _progress(pipe, len(batches(args.num, args.batch_size))):
        if found:
            images = found.decode(pipe, batch_size=args.batch_size, output_type="np", **call)
            return {"images": args.num, "call": found.call(pipe, **call)}, grid(images, 8)
        images, found = draw(pipe, range(args.seed, args.seed + args.num), args.batch_size, **call)
    return {"images": args.num}, grid(images, 8), found


def encode(args: Namespace, command: str) -> tuple:
    """Encode images, and for `reconstruct` and `edit` decode them. `edit` decodes them with changes too."""
    saved = command == "edit" and [Path(file).suffix for file in args.images] == [".safetensors"]
    found, images = _read(args, args.images[0], *(f"new_{name}" for name in CALL)) if saved else None, []
    pipe, num = _load(args), len(found.latents if found else args.images)
    call, new = _call(args, pipe, CALL | STEPS), part_of(_call(args, pipe, CALL, "new_"), slice(num), num)
    if command == "edit" and not new:
        raise ValueError("nothing changes: pass --new-prompt, or --new-class-label for a model with classes")
    if not found:
        network = getattr(pipe, "transformer", None) or pipe.unet
        side = getattr(pipe, "default_sample_size", None) or network.config.get("sample_size")
        sides = getattr(pipe, "vae_scale_factor", 1) * np.broadcast_to(side or 0, 2)
        size = tuple(sides.tolist()) if side and args.resize else None
        channels = getattr(pipe, "image_channels", 0) or pipe.vae.config.get("in_channels", 3)
        images = [open_image(file, channels, size) for file in args.images]
    changed = found.call(pipe, **new) if found else call | new
    if isinstance(pipe, GeneralizedDDIMPipeline):  # else refused after the inversion
        pipe._condition(num, **{key: value for key, value in changed.items() if key in CALL.values()})
    decodings = {"encode": [], "reconstruct": [{}], "edit": [{}, new]}[command]
    refine = 4 if args.refine is None else args.refine
    with _progress(pipe, (len(decodings) + (0 if found else 1 + refine)) * len(batches(num, args.batch_size))):
        if not found:
            call |= _given(args, "strength", "tolerance", "batch_size")
            found = invert(pipe, images, refinement_steps=refine, **call)
        rows = [found.decode(pipe, batch_size=args.batch_size, output_type="np", **each) for each in decodings]
    record = {"images": args.images, "report": found.report and found.report.to_dict()}
    if images:
        print(found.report or "no residual was measured: pass --refine K", file=sys.stderr)
    if not rows:
        return record, found
    if images:
        rows.insert(0, np.stack([*map(np.asarray, images)]).reshape(rows[0].shape) / np.float32(255))
        record["errors"] = np.sqrt(np.square(rows[0] - rows[1]).mean((1, 2, 3))).tolist()
        print(f"error of the reconstructions (RMSE in [0, 1]): {np.mean(record['errors']):.3g}", file=sys.stderr)
    return record, grid(np.stack(rows, 1).reshape(-1, *rows[0].shape[1:]), len(rows)), found


def fit(args: Namespace, command: str) -> tuple:
    """Fit solvers, and return the model with them."""
    if args.prompt_file:
        args.prompt = [*(args.prompt or []), *Path(args.prompt_file).read_text("utf-8").splitlines()] or [""]
    args.seed, pipe = args.seed or 0, _load(args)
    call = _call(args, pipe, CALL | SIZE)
    if isinstance(pipe, GeneralizedDDIMPipeline) and (classes := pipe.unet.config.num_class_embeds):
        guided = call.get("guidance_scale", 1) != 1  # the last label is that of no class
        call = {"class_labels": [*range(max(1, classes - guided))]} | call
    for key, each in call.items():
        call[key] = [each[i % len(each)] for i in range(args.num)] if isinstance(each, list) else each
    found = fit_solver(pipe, args.steps, args.num, args.batch_size, seed=args.seed, minutes=args.minutes, **call)
    for S, each in found.items():
        print(f"S = {S}: error {each['error']:.3g}, by default {each['default_error']:.3g}", file=sys.stderr)
    if args.dtype != "float32":  # weights are saved as they were loaded
        whole = _load(Namespace(**vars(args) | {"dtype": "float32"}))
        whole.scheduler, pipe = pipe.scheduler, whole
    return {"fitted": found}, pipe


def _page(name: str) -> Any:
    """Import a file of the page, which is in a clone, or in the data of an installation."""
    place = Path(__file__).parents[2] / "training" / "page" / name
    if not place.is_file():
        place = next(each.locate() for each in files("ddim-plugin") or () if each.match(f"share/ddim-plugin/{name}"))
    try:
        return SimpleNamespace(**runpy.run_path(str(place), run_name=name))
    except ModuleNotFoundError as error:
        raise ValueError(f'the page needs {error.name}: pip install "ddim-plugin[demo]"') from error


def _load(args: Namespace, changes: dict[str, Any] = DETERMINISTIC) -> Any:
    """Load the model on its device, and change those settings of its scheduler that are not None."""
    index = DiffusionPipeline.load_config(args.model, revision=args.revision)
    kind = DiffusionPipeline if index.keys() & {"vae", "vqvae"} else GeneralizedDDIMPipeline
    pipe = kind.from_pretrained(args.model, revision=args.revision)
    if kind is GeneralizedDDIMPipeline:
        check_channels(pipe.image_channels)
    scheduler: Any = restored(pipe.scheduler)
    before, changes = scheduler.config, changes | {"timestep_spacing": args.spacing}
    changes = keep_learned(before, {key: value for key, value in changes.items() if value is not None})
    classes = {None: sampler_class(scheduler), True: MultistepDDIMScheduler, False: GeneralizedDDIMScheduler}
    pipe.scheduler = classes[args.multistep].from_config(before, **changes)
    for key, value in changes.items():
        if key in before and before[key] != value:
            print(f"note: {key}={value}, the model has {before[key]}", file=sys.stderr)
    dtype = None if args.dtype == "float32" else getattr(torch, args.dtype)  # diffusers warns of each cast
    return pipe.to(args.device or get_device(), dtype=dtype)


def _progress(pipe: Any, total: int) -> tqdm:
    """Show one bar with the time left for `total` calls of a pipeline, of one evaluation in each step."""
    bar = tqdm(total=total, bar_format="{percentage:3.0f}%|{bar}| {remaining} left", leave=False, disable=None)
    pipe.set_progress_bar_config(disable=True)
    network = getattr(pipe, "transformer", None) or pipe.unet  # evaluated `order` times in a step of an inverse
    network.register_forward_hook(lambda *_: bar.update(pipe.scheduler.order / len(pipe.scheduler.timesteps)) and None)
    return bar


def _given(args: Namespace, *names: str) -> dict[str, Any]:
    """Return those of the options that the command has and that were given."""
    return {name: value for name in names if (value := vars(args).get(name)) is not None}


def _read(args: Namespace, file: str, *changes: str) -> Inverted:
    """Load latents, and refuse options beside those for `changes`."""
    for name in _given(args, *vars(args).keys() - LOADING - {*changes}):
        raise ValueError(f"--{name.replace('_', '-')} has no effect on latents: leave it out")
    return Inverted.load(file)


def _call(args: Namespace, pipe: Any, names: dict[str, str], prefix: str = "") -> dict[str, Any]:
    """Return the options that were given as arguments of the pipeline's call."""
    call, known = {}, {*signature(pipe.__call__).parameters, "timesteps"}
    for option, value in _given(args, *(prefix + name for name in names)).items():
        if (name := names[option.removeprefix(prefix)]) not in known:
            option = "prompt_file" if option == "prompt" and vars(args).get("prompt_file") else option
            raise ValueError(f"{type(pipe).__name__} has no {name}: leave out --{option.replace('_', '-')}")
        call[name] = value[0] if name in ("prompt", "class_labels") and len(value) == 1 else value
    if len(call.keys() & SIZE.keys()) == 1:  # some pipelines then use neither
        raise ValueError("one of --height and --width is missing: pass both")
    return call
