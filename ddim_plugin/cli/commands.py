"""The commands: sample, encode, invert, edit, fit and push."""

import json
import os
import sys
import tempfile
import time
from argparse import Namespace
from importlib.metadata import files
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import get_device

from ..hub.push import explained, push_folder
from ..pipelines import invert as inversion
from ..pipelines.fit import fit_solver
from ..pipelines.generation import GeneralizedDDIMPipeline
from ..pipelines.images import check_channels, grid, open_image
from ..pipelines.loop import batches
from ..process.spacings import integer
from ..schedulers import DETERMINISTIC, GeneralizedDDIMScheduler, MultistepDDIMScheduler, keep_learned, sampler_class
from ..schedulers.config import restored
from ..version import __version__
from .parser import FILES, LATENTS

CALL = ("timesteps", "guidance_scale", "null_class_label")  # options that are keywords of the pipeline's call
CODING = (*CALL, "strength", "batch_size")  # those of encode and decode
KEPT = ("steps", "spacing", "multistep", "strength", "class_label", *CALL)  # saved with latents


def run(args: Namespace) -> None:
    """Run a command, move its files into place when all are complete, and print their paths."""
    command, start = vars(args).pop("command"), time.perf_counter()  # all others are settings
    if command == "demo":
        demo(args)
        return
    if command == "push":
        if (space := vars(args).pop("space")) and (args.revision or args.create_pr):
            raise ValueError("--space shows the main branch: leave out --revision and --create-pr")
        commit = push_folder(**vars(args))
        print(commit.pr_url or commit.commit_url)
        if space:
            print(_page("space.py").push_space(args.repo_id, args.private, args.token, args.license).commit_url)
        return
    files = [file for file in FILES[command] if file != LATENTS or not vars(args).get("latents")]
    places = [Path(args.output, file) for file in (*files, f"{command}.json")]
    for name, value in _given(args, "num", "batch_size").items():
        integer(f"--{name.replace('_', '-')}", value, 1)
    for place in places:
        if place.is_dir() or (os.path.lexists(place) and not args.overwrite):
            raise ValueError(f"{place} exists: choose another --output, or pass --overwrite to replace files")
    try:
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device} is not available: {str(error).splitlines()[0]}") from error
    parent = next(path for path in Path(args.output, LATENTS).absolute().parents if path.exists())
    with tempfile.TemporaryDirectory(dir=parent, prefix=".ddim-plugin-") as scratch:
        record, *contents = {"sample": sample, "edit": edit, "fit": fit}.get(command, encode)(args)
        for file, content in zip(files, contents, strict=False):  # not those that were given
            (content.save_pretrained if command == "fit" else content.save)(Path(scratch, file))
        measured = {"seconds": time.perf_counter() - start, "cpus": os.cpu_count(), "version": __version__}
        record |= {"command": command, "settings": vars(args), **measured}
        Path(scratch, f"{command}.json").write_text(json.dumps(record, indent=2) + "\n")
        Path(args.output).mkdir(parents=True, exist_ok=True)
        for place in places:
            Path(scratch, place.name).replace(place)
            print(place)


def sample(args: Namespace) -> tuple:
    """Sample images from noise, or decode --latents."""
    if args.latents:
        _refuse(args, "num", "eta", "variance", "clip")
        found = inversion.Inverted.load(args.latents)
        z, kept = found.latents, found.settings
        kept |= {"steps": None, "timesteps": None} if _given(args, "steps", "timesteps") else {}
        vars(args).update({key: kept.get(key) for key in KEPT} | _given(args, *KEPT))
        pipe = _load(args)
        args.num = pipe._check_latents(z)[0]
        images = pipe.decode(z, output_type="np", **_keywords(args, args.num, *CODING))
    else:
        if args.strength is not None:
            raise ValueError("--strength needs --latents: sampling from noise makes all steps")
        args.num = 16 if args.num is None else args.num
        settings = _keywords(args, args.num, *CALL) | {"output_type": "np"}
        pipe = _load(args, {"eta": args.eta, "variance_type": args.variance, "clip_sample": args.clip})
        generators = [torch.Generator().manual_seed(args.seed + i) for i in range(args.num)]
        z = torch.cat([torch.randn(pipe._shape(1), generator=each) for each in generators])
        labels, images = settings.pop("class_labels", None), []
        for rows in batches(args.num, args.batch_size):
            settings |= {"class_labels": labels and labels[rows], "generator": generators[rows]}
            images.extend(pipe(None, latents=z[rows], **settings).images)
    found = inversion.Inverted(z, None, {key: getattr(args, key) for key in KEPT})
    return {"images": args.num}, grid(np.asarray(images), 8), found


def encode(args: Namespace) -> tuple:
    """Encode or invert images. Return the record with the report, which is printed, the latents, model and images."""
    settings = _keywords(args, len(args.images), "tolerance", *CODING)
    pipe = _load(args)
    network = getattr(pipe, "transformer", None) or pipe.unet
    side = getattr(pipe, "default_sample_size", None) or network.config.get("sample_size")
    sides = getattr(pipe, "vae_scale_factor", 1) * np.broadcast_to(side or 0, 2)
    size = tuple(sides.tolist()) if side and args.resize else None
    channels = getattr(pipe, "image_channels", 0) or (getattr(pipe, "vae", 0) or network).config.get("in_channels", 3)
    images = [open_image(file, channels, size) for file in args.images]
    if "prompt" not in vars(args):
        z, report = pipe.encode(images, refinement_steps=args.refine or 0, return_report=True, **settings)
        found = inversion.Inverted(z, report, {key: getattr(args, key) for key in KEPT})
    else:
        found = inversion.invert(pipe, images, args.prompt, 4 if args.refine is None else args.refine, **settings)
    print(found.report or "no residual was measured: pass --refine K", file=sys.stderr)
    return {"report": found.report and found.report.to_dict(), "images": args.images}, found, pipe, images


def edit(args: Namespace) -> tuple:
    """Invert images, or load an earlier inversion, and decode them again and with another prompt."""
    if [Path(file).suffix for file in args.images] == [".safetensors"]:
        _refuse(args, "prompt", "guidance_scale", "strength", "tolerance", "refine", "resize", *KEPT[:3], "timesteps")
        record, inverted, images = {}, inversion.Inverted.load(args.images[0]), []
        if "call" not in inverted.settings:
            raise ValueError(f"{args.images[0]} has no settings of an inversion: pass what invert or edit wrote")
        pipe = _load(args)
    else:
        record, inverted, pipe, images = encode(args)
    scale = {} if args.new_guidance_scale is None else {"guidance_scale": args.new_guidance_scale}
    edited = inverted.decode(pipe, args.new_prompt, output_type="np", **scale)
    again = inverted.decode(pipe, output_type="np")
    shown = [np.stack([*map(np.asarray, images)]).reshape(again.shape) / np.float32(255)] if images else []
    rows = np.stack([*shown, again, edited], 1)  # the image, decoded, and edited
    return record, grid(rows.reshape(-1, *again.shape[1:]), rows.shape[1]), inverted


def fit(args: Namespace) -> tuple:
    """Fit solvers, and return the model with them."""
    call, labels = _given(args, "guidance_scale", "null_class_label"), args.class_label
    if args.prompt_file:
        args.prompt = Path(args.prompt_file).read_text("utf-8").splitlines() or [""]
        call["prompt"] = [args.prompt[i % len(args.prompt)] for i in range(args.num)]
    pipe = _load(args)
    if isinstance(pipe, GeneralizedDDIMPipeline) and (classes := pipe.unet.config.num_class_embeds):
        labels = labels or range(max(1, classes - (call.get("guidance_scale", 1) != 1)))  # the last is that of no class
        call["class_labels"] = [labels[i % len(labels)] for i in range(args.num)]
    found = fit_solver(pipe, args.steps, args.num, args.batch_size, seed=args.seed, minutes=args.minutes, **call)
    for S, each in found.items():
        print(f"S = {S}: error {each['error']:.3g}, by default {each['default_error']:.3g}", file=sys.stderr)
    if args.dtype != "float32":  # weights are saved as they were loaded
        whole = _load(Namespace(**vars(args) | {"dtype": "float32"}))
        whole.scheduler, pipe = pipe.scheduler, whole
    return {"fitted": found}, pipe


def demo(args: Namespace) -> None:
    """Show a model in the browser, until the command is interrupted."""
    try:
        app = _page("app.py")
    except ModuleNotFoundError as error:
        raise ValueError(f'the page needs {error.name}: pip install "ddim-plugin[demo]"') from error
    args.model = args.model or str(app.default_model())
    pipe = _load(args, {})
    app.launch(app.Demo(pipe, app.held_out(args.model, args.revision)).page(Path(args.model).name), args.port)


def _page(name: str) -> Any:
    """Import a file of the page, which is in a clone, or in the data of an installation."""
    place = Path(__file__).parents[2] / "training" / "page" / name
    if not place.is_file():
        data = [each.locate() for each in files("ddim-plugin") or () if each.match(f"share/ddim-plugin/{name}")]
        place = Path(*data[:1])
    spec: Any = spec_from_file_location(place.stem, place)
    spec.loader.exec_module(module := module_from_spec(spec))
    return module


def _load(args: Namespace, changes: dict[str, Any] = DETERMINISTIC) -> Any:
    """Load the model on its device, and change those settings of its scheduler that are not None."""
    kind = DiffusionPipeline if "prompt" in vars(args) else GeneralizedDDIMPipeline
    with explained(args.model if Path(args.model).is_dir() else f"{args.model} (no folder)"):
        pipe = kind.from_pretrained(args.model, revision=args.revision)
    if isinstance(pipe, GeneralizedDDIMPipeline):
        check_channels(pipe.image_channels)
    scheduler: Any = restored(pipe.scheduler)
    before, changes = scheduler.config, changes | {"timestep_spacing": args.spacing}
    changes = keep_learned(before, {key: value for key, value in changes.items() if value is not None})
    classes = {None: sampler_class(scheduler), True: MultistepDDIMScheduler, False: GeneralizedDDIMScheduler}
    pipe.scheduler = classes[args.multistep].from_config(before, **changes)
    for key, value in changes.items():
        if key in before and before[key] != value:
            print(f"note: {key}={value}, the model has {before[key]}", file=sys.stderr)
    pipe.set_progress_bar_config(desc="steps", leave=False, disable=None)  # None: unless stderr is a terminal
    dtype = None if args.dtype == "float32" else getattr(torch, args.dtype)  # diffusers warns of each cast
    return pipe.to(args.device or get_device(), dtype=dtype)


def _given(args: Namespace, *names: str) -> dict[str, Any]:
    """Return those of the options that the command has and that were given."""
    return {name: value for name in names if (value := vars(args).get(name)) is not None}


def _refuse(args: Namespace, *names: str) -> None:
    for name in _given(args, *names):
        raise ValueError(f"--{name.replace('_', '-')} has no effect on latents: leave it out")


def _keywords(args: Namespace, num: int, *names: str) -> dict[str, Any]:
    """Return the options of a pipeline's method that were given, with a class label for each of `num` images."""
    known = _given(args, *names) | ({} if args.steps is None else {"num_inference_steps": args.steps})
    for name, values in _given(args, "class_label", "prompt", "new_prompt").items():
        if len(values) not in (1, num):
            raise ValueError(f"{len(values)} of --{name.replace('_', '-')} for {num} images: give one, or one for each")
    if labels := vars(args).get("class_label"):
        known["class_labels"] = labels * (num // len(labels))
    return known
