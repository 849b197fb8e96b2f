"""The commands: sample, encode, reconstruct, interpolate, invert, edit and push."""

import json
import os
import re
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from zipfile import ZipFile

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import numpy_to_pil
from huggingface_hub import constants
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..hub.files import put
from ..hub.push import INDEX, explained, push_folder
from ..pipelines import invert as inversion
from ..pipelines.generation import GeneralizedDDIMPipeline
from ..pipelines.images import check_channels, grid, image_files, open_image
from ..schedulers import DETERMINISTIC, GeneralizedDDIMScheduler, MultistepDDIMScheduler, keep_learned, sampler_class
from ..schedulers.config import restored
from ..version import __version__
from .parser import FILES, LATENTS, MODEL

GUIDANCE = ("guidance_scale", "null_class_label")
CALL = ("timesteps", *GUIDANCE)  # options that are keywords of the pipeline's call
CODING = (*CALL, "strength", "batch_size")  # those of encode and decode
KEPT = ("steps", "timesteps", "spacing", "multistep", "strength", "class_label", *GUIDANCE)  # saved with latents


def run(args: Namespace) -> None:
    """Run a command, move its files into place when all are complete, and print their paths."""
    command, start = vars(args).pop("command"), time.perf_counter()  # all others are settings
    if command == "push":
        commit = push_folder(**vars(args))
        print(commit.pr_url or commit.commit_url)
        return
    files = FILES[vars(args).get("format") or command]
    files = [file for file in files if file != LATENTS or not vars(args).get("latents")]
    places = [Path(args.output, file) for file in (*files, f"{command}.json")]
    commands = {each.__name__: each for each in (sample, encode, reconstruct, interpolate, invert, edit)}
    _check(args, places)
    parent = next(path for path in Path(args.output, MODEL).absolute().parents if path.exists())
    with tempfile.TemporaryDirectory(dir=parent, prefix=".ddim-plugin-") as scratch:
        record, *contents = commands[command](args)
        for file, content in zip(files, contents, strict=False):
            _write(Path(scratch, file), content, args)
        measured = {"seconds": time.perf_counter() - start, "cpus": os.cpu_count(), "version": __version__}
        record |= {"command": command, "settings": vars(args), **measured}
        Path(scratch, f"{command}.json").write_text(json.dumps(record, indent=2) + "\n")
        _check_places(places, args.overwrite)  # another command may have written there in the meantime
        Path(args.output).mkdir(parents=True, exist_ok=True)
        for place in places:
            put(Path(scratch, place.name), place)
            print(place)


def sample(args: Namespace) -> tuple:
    """Sample images from noise, or decode --latents."""
    z, options, changes = None, CALL, {"eta": args.eta, "variance_type": args.variance, "clip_sample": args.clip}
    if args.latents:
        for name in _given(args, "num", "eta", "variance", "clip"):
            raise ValueError(f"--{name} has no effect on --latents, which determine the images: leave it out")
        z, options, changes = _load_latents(args), CODING, DETERMINISTIC
    args.num = len(z) if z is not None else 16 if args.num is None else args.num
    settings = _keywords(args, args.num, *options) | {"output_type": "np"}
    labels = settings.pop("class_labels")
    pipe = _load(args, changes)

    def batches() -> Iterator[np.ndarray]:
        for start in range(0, args.num, args.batch_size):
            rows = slice(start, min(start + args.batch_size, args.num))
            settings["class_labels"] = labels and labels[rows]
            if z is not None:
                yield pipe.decode(z[rows], args.steps, **settings)
            else:
                generators, noise = pipe._noise(range(args.seed + start, args.seed + rows.stop))
                yield pipe(None, args.steps, latents=noise, generator=generators, **settings).images

    if args.format:
        return {"images": args.num}, batches()
    drawn = pipe._noise(range(args.seed, args.seed + args.num))[1] if z is None else z
    picture = grid(np.split(np.concatenate([*batches()]), range(args.columns, args.num, args.columns)))
    return {"images": args.num}, picture, drawn


def encode(args: Namespace) -> tuple:
    """Encode images as latents."""
    _, _, z, record = _encode(args)
    return record, z


def reconstruct(args: Namespace) -> tuple:
    """Encode images and decode them again."""
    pipe, images, z, record = _encode(args)
    again = pipe.decode(z, args.steps, **_keywords(args, len(z), *CODING), output_type="np")
    original = np.stack(images).reshape(again.shape) / np.float32(255)
    mse = np.square(again - original).mean((1, 2, 3))
    print(f"mean squared error on [0, 1]: {mse.mean():.3g} (mean of {len(mse)} images)", file=sys.stderr)
    record["mean_squared_error"] = mse.tolist()
    rows = [each[i : i + args.columns] for i in range(0, len(z), args.columns) for each in (original, again)]
    return record, grid(rows, ["image", "decoded"] * (len(rows) // 2)), z


def interpolate(args: Namespace) -> tuple:
    """Interpolate between two images or latents, or on the grid between four."""
    if sum(map(bool, (args.images, args.latents, args.seeds))) != 1:
        raise ValueError("give the ends in one way: two or four images, --latents FILE, or --seeds")
    if not args.images and (args.refine or args.resize or args.tolerance is not None):
        raise ValueError("--tolerance, --refine and --resize need images: leave them out with --latents and --seeds")
    ends = _load_latents(args) if args.latents else args.seeds or args.images
    settings = _keywords(args, 1, *CODING) | {"num_inference_steps": args.steps, "output_type": "np"}
    settings["class_labels"] = args.class_label and args.class_label[0]
    if len(ends) not in (2, 4):
        raise ValueError(f"give two ends for a path or four for a grid, not {len(ends)}")
    if args.images:
        pipe, _, z, record = _encode(args)
    else:
        pipe, record = _load(args, DETERMINISTIC), {}
        z = ends if args.latents else pipe._noise(ends)[1]
    draw, ends = (pipe.interpolate, z) if len(z) == 2 else (pipe.interpolate_grid, [z])
    images = draw(*ends, args.points, **settings)
    return record, grid(np.split(images, range(args.points, len(images), args.points))), z


def invert(args: Namespace) -> tuple:
    """Invert images in the pipeline of a text-to-image model."""
    _, _, inverted, record = _invert(args)
    return record, inverted


def edit(args: Namespace) -> tuple:
    """Decode inverted images again, and with another prompt."""
    if bool(args.images) == bool(args.latents):
        raise ValueError("give either images, or --latents FILE that `ddim-plugin invert` wrote")
    if args.latents:
        own = ("prompt", "guidance_scale", "steps", "timesteps", "spacing", "multistep", "strength", "tolerance")
        for name in _given(args, *own):
            raise ValueError(f"--{name.replace('_', '-')} has no effect on --latents: leave it out")
        inverted, images, record = inversion.Inverted.load(args.latents), [], {}
        pipe = _load(args, {}, DiffusionPipeline)
    else:
        pipe, images, inverted, record = _invert(args)
    scale = {} if args.new_guidance_scale is None else {"guidance_scale": args.new_guidance_scale}
    again = inverted.decode(pipe, output_type="np")
    edited = inverted.decode(pipe, args.new_prompt, output_type="np", **scale)
    shown = [np.stack(images).reshape(again.shape) / np.float32(255)] if images else []
    title = " | ".join(["image", "decoded", "edited"][-len(shown) - 2 :])
    return record, grid([*np.stack([*shown, again, edited], 1)], title=title), inverted


def _check(args: Namespace, places: list[Path]) -> None:
    """Raise ValueError for settings that cannot work, before anything is loaded."""
    settings = {name: value for name, value in vars(args).items() if value is not None}
    for name, least in {"num": 1, "batch_size": 1, "columns": 1, "points": 2}.items():
        if settings.get(name, least) < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, not {settings[name]}")
    for seed in settings.get("seeds", [settings.get("seed", 0)]):
        if abs(seed) >= 2**63:
            raise ValueError(f"a seed must fit 64 bits with its sign, not {seed}")
    if "strength" in settings and not (settings.get("latents") or settings.get("images")):
        raise ValueError("--strength needs --latents or images: sampling from noise makes all steps")
    _check_places(places, args.overwrite)
    try:
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device} is not available: {str(error).splitlines()[0]}") from error
    args.model, args.revision = locate(args.model, args.revision)
    if "images" in settings:
        args.images = [file for path in args.images for file in (image_files(path) if Path(path).is_dir() else [path])]


def _check_places(places: list[Path], overwrite: bool) -> None:
    """Raise ValueError for files that exist, or, with --overwrite, for folders of anything but samples."""
    for place in filter(os.path.lexists, places):
        if not overwrite:
            raise ValueError(f"{place} exists: choose another --output, or pass --overwrite")
        names = os.listdir(place) if place.is_dir() else []
        if not all(re.fullmatch(r"\d{6,}\.png", name) for name in names):
            raise ValueError(f"--overwrite replaces samples only, not {place}: choose another --output")


def locate(model: str, revision: str | None) -> tuple[str, str | None]:
    """Return the folder or the Hub id of a model, and its revision, for a path, an id or an address on the Hub."""
    start = rf"(?:{re.escape(constants.ENDPOINT)}|(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co))/+"
    tail = r"([^/?#]+/[^/?#]+)(?:/(?:tree|blob|resolve|commit)/([^/?#]+))?(?:[/?#].*)?"
    if match := re.fullmatch(start + tail, model.strip()):
        return match[1], revision or (match[2] and unquote(match[2]))
    if Path(model).exists() and not Path(model, INDEX).is_file():
        near = [path for path in (Path(model, MODEL), *Path(model).absolute().parents[:2]) if (path / INDEX).is_file()]
        raise ValueError(f"{model} has no {INDEX}: pass {(near or ['the folder of a whole saved pipeline'])[0]}")
    if not Path(model).exists() and not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", model):
        raise ValueError(f"{model} is no folder, and no id on the Hub such as user/model: check the path")
    return model, revision


def _load(args: Namespace, changes: dict[str, Any], kind: type[DiffusionPipeline] = GeneralizedDDIMPipeline) -> Any:
    """Load the model, and change those settings of its scheduler that are not None."""
    try:
        with explained(args.model):
            pipe = kind.from_pretrained(args.model, revision=args.revision)
    except OSError as error:
        where = "" if Path(args.model).is_dir() else f"there is no folder {args.model}, and "
        raise OSError(f"{where}{error}") from error
    if isinstance(pipe, GeneralizedDDIMPipeline):
        check_channels(pipe.unet.config.in_channels)
    pipe.scheduler = restored(pipe.scheduler)
    before, changes = pipe.scheduler.config, changes | {"timestep_spacing": args.spacing}
    changes = keep_learned(before, {key: value for key, value in changes.items() if value is not None})
    classes = {None: sampler_class(pipe.scheduler), True: MultistepDDIMScheduler, False: GeneralizedDDIMScheduler}
    pipe.scheduler = classes[args.multistep].from_config(before, **changes)
    for key, value in changes.items():
        if key in before and before[key] != value:
            print(f"note: {key}={value}, the model has {before[key]}", file=sys.stderr)
    pipe.set_progress_bar_config(desc="steps", leave=False, disable=None)  # None: unless stderr is a terminal
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    dtype = None if args.dtype == "float32" else getattr(torch, args.dtype)  # diffusers warns of each cast
    return pipe.to(args.device or accelerator or "cpu", dtype=dtype)


def _encode(args: Namespace) -> tuple[GeneralizedDDIMPipeline, list[Image.Image], Tensor, dict]:
    """Return the model, the images, their latents, and the record with the report, which is printed."""
    settings = _keywords(args, len(args.images), "tolerance", *CODING)
    pipe = _load(args, DETERMINISTIC)
    shape = pipe.unet.config.in_channels, pipe.image_size
    images = [open_image(file, *shape, args.resize, hint=" (--resize)") for file in args.images]
    z, report = pipe.encode(images, args.steps, refinement_steps=args.refine, return_report=True, **settings)
    print(report, file=sys.stderr)
    return pipe, images, z, {"report": report.to_dict(), "images": args.images}


def _invert(args: Namespace) -> tuple[Any, list[Image.Image], inversion.Inverted, dict]:
    """Return the pipeline, the images, their inversion, and the record with the report, which is printed."""
    pipe, size = _load(args, DETERMINISTIC, DiffusionPipeline), None
    if args.resize:
        side = (
            getattr(pipe, "default_sample_size", None)
            or (getattr(pipe, "transformer", None) or pipe.unet).config.sample_size
        )
        size = tuple(int(each) * getattr(pipe, "vae_scale_factor", 1) for each in np.broadcast_to(side, 2))
    channels = pipe.vae.config.get("in_channels", 3) if hasattr(pipe, "vae") else 3
    images = [open_image(file, channels, size, args.resize) for file in args.images]
    settings = _given(args, "guidance_scale", "timesteps", "strength", "tolerance")
    settings |= {} if args.steps is None else {"num_inference_steps": args.steps}
    inverted = inversion.invert(pipe, images, args.prompt, args.refine, **settings)
    print(inverted.report or "no residual was measured: pass --refine K", file=sys.stderr)
    return pipe, images, inverted, {"report": inverted.report and inverted.report.to_dict(), "images": args.images}


def _load_latents(args: Namespace) -> Tensor:
    """Load --latents; the settings saved in the file replace those that were not given."""
    try:
        with safe_open(args.latents, "pt") as file:
            z, kept = file.get_tensor("latents"), json.loads((file.metadata() or {}).get("ddim_plugin", "{}"))
    except SafetensorError as error:
        raise ValueError(f"cannot read latents from {args.latents}: {error}") from error
    if z.ndim != 4 or len(z) == 0:
        raise ValueError(f"{args.latents} contains latents of shape {tuple(z.shape)}: they must be (B, C, H, W)")
    if _given(args, "steps", "timesteps"):
        kept |= {"steps": None, "timesteps": None}
    vars(args).update({key: kept.get(key) for key in KEPT} | _given(args, *KEPT))
    return z


def _given(args: Namespace, *names: str) -> dict[str, Any]:
    """Return those of the options that were given."""
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def _keywords(args: Namespace, num: int, *names: str) -> dict[str, Any]:
    """Return those of the options that were given, with a class label for each of `num` images."""
    labels = args.class_label
    if labels and len(labels) not in (1, num):
        raise ValueError(f"{len(labels)} class labels for {num} images: give one, or one for each")
    return {"class_labels": labels and labels * (num // len(labels)), **_given(args, *names)}


def _write(path: Path, content: Any, args: Namespace) -> None:
    """Write one file or folder."""
    if isinstance(content, inversion.Inverted):
        content.save(path)
    elif isinstance(content, Tensor):
        kept = json.dumps({key: getattr(args, key) for key in KEPT})
        path.write_bytes(save({"latents": content.cpu().contiguous()}, {"ddim_plugin": kept}))
    elif isinstance(content, Image.Image):
        content.save(path)
    elif path.suffix == ".npz":
        first = next(content)
        header = {"descr": "|u1", "fortran_order": False, "shape": (args.num, *first.shape[1:])}
        with ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for batch in chain([first], content):
                file.write((batch * 255).round().astype(np.uint8).tobytes())
    else:
        path.mkdir()
        for i, picture in enumerate(chain.from_iterable(map(numpy_to_pil, content))):
            picture.save(path / f"{i:06d}.png")
