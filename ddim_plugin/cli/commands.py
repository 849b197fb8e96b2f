"""The commands: sample, encode, reconstruct, interpolate, fit and push."""

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Generator, Tensor

from ..hub.files import replace_folder, write_file
from ..hub.push import push_folder
from ..pipelines.fit import fit_timesteps
from ..pipelines.generation import GeneralizedDDIMPipeline
from ..pipelines.images import check_channels, grid, image_files, open_image, read
from ..process.inversion import InversionReport
from ..schedulers import DETERMINISTIC, GeneralizedDDIMScheduler, MultistepDDIMScheduler, keep_learned
from ..version import __version__
from .parser import FILES, LATENTS, MODEL, parse

HIDDEN = ("found", "command", "token")  # arguments that are no settings

KEPT = ("steps", "timesteps", "spacing", "multistep", "strength", "class_label", "guidance_scale", "null_class_label")
"""Settings saved in a file of latents, with which they are decoded."""

Made = dict[str, Any]  # file name → its content: an image, a tensor, a pipeline or a dictionary


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status.

    Bad input ends with one line on stderr and status 1.
    """
    args = parse(argv)
    start = time.perf_counter()
    try:
        if args.command == "push":
            print(push(args))
            return 0
        _check(args)
        made = COMMANDS[args.command](args)
        made[f"{args.command}.json"] |= {
            "command": args.command,
            "settings": {key: value for key, value in vars(args).items() if key not in HIDDEN},
            "seconds": time.perf_counter() - start,
            "cpus": os.cpu_count(),
            "version": __version__,
        }
        for name, content in made.items():
            print(_write(Path(args.output) / name, content, args))
    except (ValueError, OSError) as error:
        print(f"ddim-plugin {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"ddim-plugin {args.command}: interrupted, nothing was written", file=sys.stderr)
        return 130
    return 0


# ---- commands --------------------------------------------------------------------------------------------------


def sample(args: argparse.Namespace) -> Made:
    """Sample images from noise, or decode --latents."""
    if args.latents:
        return _decode(args)
    if args.strength is not None:
        raise ValueError("--strength needs --latents: sampling from noise makes all steps")
    num = 16 if args.num is None else args.num
    labels = _labels(args, num)
    generators = [_generator(args.seed + i) for i in range(num)]
    changes = {"eta": args.eta, "variance_type": args.variance, "clip_sample": args.clip}
    pipe = _load(args, {key: value for key, value in changes.items() if value is not None})
    latents = torch.cat([_noise(pipe, generator) for generator in generators])  # drawn here to be written
    images = []
    for start in range(0, num, args.batch_size):
        part = slice(start, start + args.batch_size)
        settings = {"generator": generators[part], "class_labels": labels and labels[part], "output_type": "np"}
        images.append(pipe(latents=latents[part], **settings, **_timesteps(args), **_guidance(args)).images)
    rows = _rows(np.concatenate(images), args.columns)
    return {"samples.png": grid(rows), LATENTS: latents, "sample.json": {"images": num}}


def _decode(args: argparse.Namespace) -> Made:
    given = [name for name in ("num", "eta", "variance", "clip") if getattr(args, name) is not None]
    if given:
        raise ValueError(f"--{given[0]} has no effect on --latents, which determine the images: leave it out")
    z = _load_latents(args)
    images = _load(args, DETERMINISTIC).decode(z, output_type="np", **_shared(args, _labels(args, len(z))))
    return {"samples.png": grid(_rows(images, args.columns)), "sample.json": {"images": len(z)}}


def encode(args: argparse.Namespace) -> Made:
    """Encode images as latents."""
    _, _, z, report = _encode(args)
    return {LATENTS: z, "encode.json": {"report": report.to_dict(), "images": args.found}}


def reconstruct(args: argparse.Namespace) -> Made:
    """Encode images and decode them again."""
    pipe, x, z, report = _encode(args)
    again = pipe.decode(z, output_type="np", **_shared(args, _labels(args, len(z))))
    original = ((x + 1) / 2).permute(0, 2, 3, 1).numpy()
    mse = np.square(again - original).mean((1, 2, 3))
    print(f"mean squared error on [0, 1]: {mse.mean():.3g} (mean of {len(mse)} images)", file=sys.stderr)
    rows, names = [], []
    for pair in zip(_rows(original, args.columns), _rows(again, args.columns), strict=True):
        rows += pair
        names += ["image", "decoded"]
    result = {"report": report.to_dict(), "images": args.found, "mean_squared_error": mse.tolist()}
    return {"reconstruction.png": grid(rows, names), LATENTS: z, "reconstruct.json": result}


def interpolate(args: argparse.Namespace) -> Made:
    """Interpolate between two images or latents, or on the grid between four."""
    if sum(map(bool, (args.images, args.latents, args.seeds))) != 1:
        raise ValueError("give the ends in one way: two or four images, --latents FILE, or --seeds")
    if args.points < 2:
        raise ValueError(f"--points must be at least 2, not {args.points}")
    if not args.images and (args.refine or args.resize):
        raise ValueError("--refine and --resize need images: leave them out with --latents and --seeds")
    if args.seeds and args.strength is not None:
        raise ValueError("--strength needs images or --latents: sampling from noise makes all steps")
    z = _load_latents(args) if args.latents else None
    if args.class_label and len(set(args.class_label)) > 1:
        raise ValueError(f"an interpolation takes one --class-label, not {len(args.class_label)}")
    number = len(z) if z is not None else len(args.seeds or args.found)
    if number not in (2, 4):
        raise ValueError(f"give two ends for a path or four for a grid, not {number}")
    result: dict[str, Any] = {}
    if args.images:
        pipe, _, z, report = _encode(args)
        result["report"] = report.to_dict()
    else:
        generators = [_generator(seed) for seed in args.seeds or []]
        pipe = _load(args, DETERMINISTIC)
        if z is None:
            z = torch.cat([_noise(pipe, generator) for generator in generators])
    settings = {"output_type": "np", **_shared(args, args.class_label and args.class_label[0])}
    if number == 2:
        images = pipe.interpolate(z[0], z[1], args.points, **settings)
    else:
        images = pipe.interpolate_grid(z, args.points, **settings)
    ends = {} if args.latents else {LATENTS: z}
    return {"interpolation.png": grid(_rows(images, args.points)), "interpolate.json": result, **ends}


def fit(args: argparse.Namespace) -> Made:
    """Fit the timesteps of a model at few steps."""
    labels = _labels(args, args.num)
    folder, model = Path(args.output) / MODEL, Path(args.model).resolve()
    if folder.resolve() in (model, *model.parents):
        raise ValueError(f"--output {args.output} would replace {args.model} by the fitted model: choose another one")
    if os.path.lexists(folder) and (folder.is_symlink() or not (folder / "model_index.json").is_file()):
        raise ValueError(f"--overwrite replaces models only, and {folder} is none: choose another --output")
    pipe = _load(args, {"eta": 0.0, "variance_type": "fixed_small"})
    images = args.num, args.teacher_steps, args.seed, args.batch_size
    found = fit_timesteps(pipe, args.steps, *images, labels, **_guidance(args))
    for S, each in found.items():
        print(f"S = {S}: distance to the solution {each.error:.3g} (default {each.default_error:.3g})", file=sys.stderr)
    if args.dtype != "float32":  # the weights are saved as they were loaded
        scheduler, pipe = pipe.scheduler, _load(argparse.Namespace(**vars(args) | {"dtype": "float32"}), {})
        pipe.scheduler = scheduler
    return {MODEL: pipe, "fit.json": {"fitted": {str(S): each._asdict() for S, each in found.items()}}}


def push(args: argparse.Namespace) -> str:
    """Push a folder to the Hub, and return the address of the commit or pull request."""
    commit = push_folder(**{key: value for key, value in vars(args).items() if key != "command"})
    return commit.pr_url or commit.commit_url


COMMANDS = {"sample": sample, "encode": encode, "reconstruct": reconstruct, "interpolate": interpolate, "fit": fit}


def _check(args: argparse.Namespace) -> None:
    """Raise ValueError for settings that cannot work, before anything is loaded."""
    for name in ("num", "batch_size", "columns"):
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, not {value}")
    output, model = Path(args.output), Path(args.model)
    written = [name for name in FILES[args.command] if name != LATENTS or not getattr(args, "latents", None)]
    existing = [name for name in written if (output / name).exists()]
    if existing and not args.overwrite:
        raise ValueError(f"{output / existing[0]} exists: choose another --output, or pass --overwrite")
    parent = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"--output {output} cannot be written, since {parent} is no writable folder: give another")
    if args.device is not None:
        try:
            torch.empty(1, device=args.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"--device {args.device} is not available: {str(error).splitlines()[0]}") from error
    if not model.exists() and (args.model.startswith((".", "/", "~")) or args.model.count("/") > 1):
        raise ValueError(f"folder {args.model} was not found: check the path")
    if model.exists() and not (model / "model_index.json").is_file():
        raise ValueError(f"{args.model} has no model_index.json: give a folder written by save_pretrained")
    args.found = _files(getattr(args, "images", None) or [])


def _files(paths: Sequence[str]) -> list[str]:
    """Return image files, with each folder replaced by the image files in it."""
    files: list[str] = []
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"file {path} was not found: check the path")
        files += image_files(path) if path.is_dir() else [str(path)]
    return files


def _load(args: argparse.Namespace, changes: dict[str, Any]) -> GeneralizedDDIMPipeline:
    """Load the model, and change settings of its scheduler."""
    revision = {} if args.revision is None else {"revision": args.revision}
    pipe = GeneralizedDDIMPipeline.from_pretrained(args.model, **revision)
    before = pipe.scheduler.config
    changes = keep_learned(before, changes)
    if args.spacing is not None:
        changes = changes | {"timestep_spacing": args.spacing}
    multistep = isinstance(pipe.scheduler, MultistepDDIMScheduler) if args.multistep is None else args.multistep
    scheduler = MultistepDDIMScheduler if multistep else GeneralizedDDIMScheduler
    pipe.scheduler = scheduler.from_config(before, **changes)
    for key, value in changes.items():
        if key in before and before[key] != value:
            print(f"note: {key}={value}, the model has {before[key]}", file=sys.stderr)
    check_channels(pipe.unet.config.in_channels)
    pipe.set_progress_bar_config(desc=args.command, leave=False)
    if args.dtype != "float32":
        pipe.to(dtype=getattr(torch, args.dtype))
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return pipe.to(args.device or accelerator or "cpu")


def _encode(args: argparse.Namespace) -> tuple[GeneralizedDDIMPipeline, Tensor, Tensor, InversionReport]:
    """Return the model, the images in −1..1, their latents on the CPU, and the report, which is printed."""
    labels = _labels(args, len(args.found))
    pipe = _load(args, DETERMINISTIC)
    channels, size = pipe.unet.config.in_channels, pipe.image_size
    images = [open_image(file, channels, size, args.resize, hint=" (--resize)") for file in args.found]
    x = read(images, channels, size)
    settings = {"refinement_steps": args.refine, "tolerance": args.tolerance, **_shared(args, labels)}
    z, report = pipe.encode(images, return_report=True, **settings)
    print(report, file=sys.stderr)
    return pipe, x, z.cpu(), report


def _load_latents(args: argparse.Namespace) -> Tensor:
    """Load --latents; the settings saved in the file replace those that were not given."""
    file = args.latents
    if not Path(file).is_file():
        raise ValueError(f"file {file} was not found: check the path")
    try:
        with safe_open(file, "pt") as opened:
            names = list(opened.keys())
            if "latents" not in names:
                raise ValueError(f"{file} holds no latents, but {', '.join(names) or 'nothing'}: choose another file")
            z, kept = opened.get_tensor("latents"), json.loads((opened.metadata() or {}).get("ddim_plugin", "{}"))
    except SafetensorError as error:
        raise ValueError(f"{file} is no safetensors file: {error}") from error
    if z.ndim != 4 or len(z) == 0:
        raise ValueError(f"{file} holds latents of shape {tuple(z.shape)}: they must be (B, C, H, W)")
    if args.steps is not None or args.timesteps is not None:
        kept = {key: value for key, value in kept.items() if key not in ("steps", "timesteps")}
    for key in KEPT:
        if getattr(args, key) is None and kept.get(key) is not None:
            setattr(args, key, kept[key])
    return z


def _generator(seed: int) -> Generator:
    try:
        return Generator().manual_seed(seed)
    except (RuntimeError, ValueError, OverflowError) as error:
        raise ValueError(f"a seed must fit 64 bits, not {seed}") from error


def _noise(pipe: GeneralizedDDIMPipeline, generator: Generator) -> Tensor:
    """Draw x_T of one image, (1, C, H, W)."""
    if pipe.image_size is None:
        raise ValueError("the network's config has no sample_size: pass --latents of the wanted size")
    return torch.randn(1, pipe.unet.config.in_channels, *pipe.image_size, generator=generator)


def _labels(args: argparse.Namespace, num: int) -> list[int] | None:
    if not args.class_label:
        return None
    labels = args.class_label * num if len(args.class_label) == 1 else args.class_label
    if len(labels) != num:
        raise ValueError(f"{len(labels)} class labels for {num} images: give one, or one for each")
    return labels


def _shared(args: argparse.Namespace, labels: int | list[int] | None) -> dict[str, Any]:
    """Return the keywords that `encode` and `decode` share."""
    settings = {"strength": 1.0 if args.strength is None else args.strength, "batch_size": args.batch_size}
    return {"class_labels": labels, **settings, **_timesteps(args), **_guidance(args)}


def _timesteps(args: argparse.Namespace) -> dict[str, Any]:
    return {"num_inference_steps": args.steps, "timesteps": args.timesteps}


def _guidance(args: argparse.Namespace) -> dict[str, Any]:
    scale = 1.0 if args.guidance_scale is None else args.guidance_scale
    return {"guidance_scale": scale, "null_class_label": args.null_class_label}


def _rows(images: np.ndarray, columns: int) -> list[np.ndarray]:
    return [images[start : start + columns] for start in range(0, len(images), columns)]


def _write(path: Path, content: Any, args: argparse.Namespace) -> Path:
    """Write one file or folder, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, GeneralizedDDIMPipeline):
        with replace_folder(path) as folder:
            content.save_pretrained(folder)
    elif isinstance(content, Tensor):
        kept = json.dumps({key: getattr(args, key) for key in KEPT})
        write_file(path, save({"latents": content.cpu().contiguous()}, {"ddim_plugin": kept}))
    elif isinstance(content, Image.Image):
        content.save(file := io.BytesIO(), format="PNG")
        write_file(path, file.getvalue())
    else:
        write_file(path, json.dumps(content, indent=2) + "\n")
    return path
