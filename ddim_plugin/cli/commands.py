"""The command line: ddim-plugin sample | encode | reconstruct | interpolate | fit | push MODEL …"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Generator, Tensor

from ..hub.push import push_folder, variants
from ..pipelines.fit import fit_timesteps
from ..pipelines.generation import TOLERANCE, GeneralizedDDIMPipeline
from ..pipelines.images import check_channels, grid, image_files, open_image, read
from ..process.inversion import InversionReport
from ..process.moves import VARIANCES
from ..process.spacings import NAMES
from ..schedulers.generalized import DETERMINISTIC, GeneralizedDDIMScheduler, MultistepDDIMScheduler, keep_learned
from ..version import __version__

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LATENTS = "latents.safetensors"
MODEL = "model"
HIDDEN = ("run", "files", "found", "command", "token")  # of the arguments: not settings

Made = dict[str, Any]
"""File name → what goes into it: an image, a tensor, a pipeline or a dictionary."""


# ---- arguments -------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = argparse.ArgumentParser(
        prog="ddim-plugin", description="Images from diffusion models, and latents from images (DDIM)."
    )
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Any, files: Sequence[str], summary: str, example: str) -> argparse.ArgumentParser:
        writes = f"\n\nwrites into --output: {', '.join(files)}" if files else ""
        sub = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=f"example:\n  ddim-plugin {name} {example}{writes}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run, files=files)
        if files:
            sub.add_argument("model", metavar="MODEL", help="a folder written by save_pretrained, or a Hub id")
        return sub

    sub = command(
        "sample",
        sample,
        ("samples.png", LATENTS, "sample.json"),
        "draw images from noise, or decode latents",
        "user/model --num 16 --steps 20 --seed 0 --output out",
    )
    sub.add_argument("--num", type=int, help="images to draw (default: 16)")
    sub.add_argument("--seed", type=int, default=0, help="image i is drawn from seed + i (default: %(default)s)")
    sub.add_argument(
        "--latents", metavar="FILE", help="decode these latents instead (η = 0), along the τ they came with"
    )
    _strength(sub)
    sub.add_argument("--eta", type=float, help="η of Eq. 16: 0 is DDIM, 1 DDPM (default: the model's)")
    sub.add_argument("--variance", choices=VARIANCES, help="kind of noise (default: the model's)")
    sub.add_argument(
        "--clip", action=argparse.BooleanOptionalAction, help="clip x̂0 in each step (default: the model's)"
    )
    _shared(sub)
    _columns(sub)

    sub = command(
        "encode",
        encode,
        (LATENTS, "encode.json"),
        "find the latents of images",
        "user/model pictures/*.png --steps 10 --refine 14 --output out",
    )
    _images(sub)
    _refinement(sub)
    _shared(sub)

    sub = command(
        "reconstruct",
        reconstruct,
        ("reconstruction.png", LATENTS, "reconstruct.json"),
        "encode images and decode them again",
        "user/model pictures/ --steps 10 --refine 14 --output out",
    )
    _images(sub)
    _refinement(sub)
    _shared(sub)
    _columns(sub)

    sub = command(
        "interpolate",
        interpolate,
        ("interpolation.png", LATENTS, "interpolate.json"),
        "draw the path between two images or latents, or the grid between four",
        "user/model a.png b.png --steps 50 --refine 5 --output out",
    )
    _images(sub, nargs="*")
    sub.add_argument("--latents", metavar="FILE", help="the ends as latents, along the τ they came with")
    sub.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="the ends drawn from noise")
    sub.add_argument("--points", type=int, default=11, help="images on a path (default: %(default)s)")
    _refinement(sub)
    _shared(sub)

    sub = command(
        "fit",
        fit,
        (MODEL, "fit.json"),
        "find the times that suit a model at few steps, and save it with them",
        "user/model --steps 5 8 10 15 20 --output out",
    )
    sub.add_argument("--steps", type=int, nargs="+", default=[5, 8, 10, 15, 20], metavar="S", help="numbers of steps")
    sub.add_argument("--num", type=int, default=128, help="images to look at (default: %(default)s)")
    sub.add_argument("--seed", type=int, default=0, help="image i is drawn from seed + i (default: %(default)s)")
    sub.add_argument("--teacher-steps", type=int, default=200, help="steps of the solutions (default: %(default)s)")
    _model(sub)

    sub = command(
        "push",
        push,
        (),
        "push a saved pipeline to the Hub, with a card made from its records",
        "out/digits user/ddim-digits --private --license cc-by-4.0",
    )
    sub.add_argument("folder", metavar="FOLDER", help="what save_pretrained or the training script wrote")
    sub.add_argument("repo_id", metavar="USER/MODEL", help="id of the repo, which is made where it does not exist")
    sub.add_argument("--private", action="store_true", help="make it private")
    sub.add_argument("--revision", metavar="BRANCH", help="the branch (default: main)")
    sub.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    sub.add_argument("--message", help="title of the commit")
    sub.add_argument("--license", help="licence of the weights, as the Hub names it: mit, cc-by-4.0, …")
    sub.add_argument(
        "--records", metavar="FOLDER", help="where results.json, training.json, pictures are (default: there)"
    )
    sub.add_argument(
        "--samples", type=int, metavar="N", help="pictures to draw for the card (default: 16 if it has none)"
    )
    sub.add_argument("--token", help="token that may write (default: HF_TOKEN, or that of `hf auth login`)")
    return top


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of a command. argparse takes an optional list of images to be empty where flags follow MODEL."""
    top = parser()
    args, rest = top.parse_known_args(argv)
    if args.command == "interpolate" and not args.images and not any(word.startswith("-") for word in rest):
        args.images, rest = rest, []
    if rest:
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def _images(sub: argparse.ArgumentParser, nargs: str = "+") -> None:
    sub.add_argument("images", metavar="IMAGE", nargs=nargs, help="image files, or folders of them")
    sub.add_argument("--resize", action="store_true", help="crop and resize images to the network's size")


def _refinement(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--refine", type=int, default=0, metavar="K", help="network evaluations to refine each move of an encoding with"
    )
    sub.add_argument(
        "--tolerance", type=float, default=TOLERANCE, help="residual at which a move is solved (default: %(default)s)"
    )
    _strength(sub)


def _strength(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--strength", type=float, help="part of the way to noise to go, in (0, 1] (default: 1)")


def _columns(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--columns", type=int, default=8, help="images in a row of the grid (default: %(default)s)")


def _shared(sub: argparse.ArgumentParser) -> None:
    steps = sub.add_mutually_exclusive_group()
    steps.add_argument("--steps", type=int, default=None, help="number of steps S (default: 50)")
    steps.add_argument("--timesteps", type=int, nargs="+", metavar="T", help="τ itself: network times, descending")
    sub.add_argument("--spacing", choices=NAMES, help="τ by name (default: the model's)")
    sub.add_argument(
        "--multistep",
        action=argparse.BooleanOptionalAction,
        help="the multistep method: good images in 8 to 20 steps (default: as the model was saved)",
    )
    _model(sub)


def _model(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--class-label", type=int, nargs="+", metavar="C", help="one for all images, or one for each")
    sub.add_argument("--guidance-scale", type=float, help="classifier-free guidance (default: none)")
    sub.add_argument("--null-class-label", type=int, metavar="C", help="stands for no class (default: the last)")
    sub.add_argument("--batch-size", type=int, default=16, help="images at a time (default: %(default)s)")
    sub.add_argument("--device", help="cpu, cuda, … (default: an accelerator if there is one)")
    sub.add_argument("--dtype", choices=DTYPES, default="float32", help="of the network (default: %(default)s)")
    sub.add_argument("--revision", help="branch, tag or commit of a model on the Hub")
    sub.add_argument("--output", default="out", metavar="FOLDER", help="where files are written (default: %(default)s)")
    sub.add_argument("--overwrite", action="store_true", help="replace files of an earlier run")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status. Bad input ends with one line on stderr and status 1."""
    args = parse(argv)
    start = time.perf_counter()
    try:
        if args.command == "push":
            print(push(args))
            return 0
        _check(args)
        made = args.run(args)
        made[f"{args.command}.json"] |= {
            "command": args.command,
            "settings": {key: value for key, value in vars(args).items() if key not in HIDDEN},
            "seconds": time.perf_counter() - start,
            "cpus": os.cpu_count(),
            "version": __version__,
        }
        for path in _write(Path(args.output), made, args):
            print(path)
    except (ValueError, OSError) as error:
        print(f"ddim-plugin {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"ddim-plugin {args.command}: interrupted, nothing was written", file=sys.stderr)
        return 130
    return 0


# ---- commands --------------------------------------------------------------------------------------------------


def sample(args: argparse.Namespace) -> Made:
    if args.latents:
        return _decode(args)
    if args.strength is not None:
        raise ValueError("--strength needs --latents: noise is decoded from the top")
    num = 16 if args.num is None else args.num
    labels = _labels(args, num)
    generators = [_generator(args.seed + i) for i in range(num)]
    changes = {"eta": args.eta, "variance_type": args.variance, "clip_sample": args.clip}
    pipe = _load(args, {key: value for key, value in changes.items() if value is not None})
    # Drawn here to be written; the generators go on to the noise of the steps.
    latents = torch.cat([_noise(pipe, generator) for generator in generators])
    images = []
    for part in _parts(num, args.batch_size):
        images.append(
            pipe(
                latents=latents[part],
                generator=generators[part],
                class_labels=labels[part] if labels else None,
                output_type="np",
                **_times(args),
                **_guidance(args),
            ).images
        )
    rows = _rows(np.concatenate(images), args.columns)
    return {"samples.png": grid(rows), LATENTS: latents, "sample.json": {"images": num}}


def _decode(args: argparse.Namespace) -> Made:
    """The images of latents, in the deterministic process."""
    given = [name for name in ("num", "eta", "variance", "clip") if getattr(args, name) is not None]
    if given:
        raise ValueError(f"--{given[0]} says how noise becomes images: leave it out with --latents")
    z = _load_latents(args)
    pipe = _load(args, DETERMINISTIC)
    images = pipe.decode(z, **_decoding(args, _labels(args, len(z))))
    rows = _rows(_array(images), args.columns)
    return {"samples.png": grid(rows), "sample.json": {"images": len(z)}}


def encode(args: argparse.Namespace) -> Made:
    pipe, images = _load_with_images(args)
    z, report = _encode(pipe, images, args)
    return {LATENTS: z, "encode.json": {"report": report.to_dict(), "images": args.found}}


def reconstruct(args: argparse.Namespace) -> Made:
    pipe, images = _load_with_images(args)
    z, report = _encode(pipe, images, args)
    again = pipe.decode(z, **_decoding(args, _labels(args, len(z)))).cpu()
    original = (read(images, pipe.unet.config.in_channels, None) + 1) / 2
    mse = (again - original).pow(2).flatten(1).mean(1)
    print(f"error for a dimension, on [0, 1]: {mse.mean():.3g} (mean of {len(mse)} images)", file=sys.stderr)
    rows, names = [], []
    for first, second in zip(_rows(_array(original), args.columns), _rows(_array(again), args.columns), strict=True):
        rows += [first, second]
        names += ["image", "decoded"]
    result = {"report": report.to_dict(), "images": args.found, "mean_squared_error": mse.tolist()}
    return {"reconstruction.png": grid(rows, names), LATENTS: z, "reconstruct.json": result}


def interpolate(args: argparse.Namespace) -> Made:
    if sum(map(bool, (args.images, args.latents, args.seeds))) != 1:
        raise ValueError("give the ends in one way: two or four images, --latents FILE, or --seeds")
    if args.points < 2:
        raise ValueError(f"--points must be at least 2, not {args.points}")
    if not args.images and (args.refine or args.resize):
        raise ValueError("--refine and --resize are for images")
    if args.seeds and args.strength is not None:
        raise ValueError("--strength needs images or --latents: noise is decoded from the top")
    z = _load_latents(args) if args.latents else None
    if args.class_label and len(set(args.class_label)) > 1:
        raise ValueError("an interpolation takes one --class-label")
    number = len(z) if z is not None else len(args.seeds or args.found)
    if number not in (2, 4):
        raise ValueError(f"give two ends for a path or four for a grid, not {number}")
    result: dict[str, Any] = {}
    if args.images:
        pipe, images = _load_with_images(args)
        z, report = _encode(pipe, images, args)
        result["report"] = report.to_dict()
    else:
        generators = [_generator(seed) for seed in args.seeds or []]
        pipe = _load(args, DETERMINISTIC)
        if z is None:
            z = torch.cat([_noise(pipe, generator) for generator in generators])
    settings = _decoding(args, args.class_label[0] if args.class_label else None)
    if number == 2:
        made = pipe.interpolate(z[0], z[1], args.points, **settings)
    else:
        made = pipe.interpolate_grid(z, args.points, **settings)
    rows = _rows(_array(made), args.points)
    ends = {} if args.latents else {LATENTS: z}
    return {"interpolation.png": grid(rows), "interpolate.json": result, **ends}


def fit(args: argparse.Namespace) -> Made:
    labels = _labels(args, args.num)
    folder = Path(args.output) / MODEL
    if folder.resolve() in (Path(args.model).resolve(), *Path(args.model).resolve().parents):
        raise ValueError(f"--output {args.output} would put the fitted model in the place of {args.model}")
    if os.path.lexists(folder) and (folder.is_symlink() or not (folder / "model_index.json").is_file()):
        raise ValueError(f"{folder} is no model that --overwrite may replace: choose another --output")
    pipe = _load(args, {"eta": 0.0, "variance_type": "fixed_small"}, multistep=True)
    found = fit_timesteps(
        pipe, args.steps, args.num, args.teacher_steps, args.seed, args.batch_size, labels, **_guidance(args)
    )
    for S, each in found.items():
        print(
            f"S = {S}: distance to the solution {each.error:.3g} (without fitting {each.default_error:.3g})",
            file=sys.stderr,
        )
    if args.dtype != "float32":  # what is saved has the model's own weights
        scheduler, pipe = pipe.scheduler, _load(argparse.Namespace(**vars(args) | {"dtype": "float32"}), {}, True)
        pipe.scheduler = scheduler
    return {MODEL: pipe, "fit.json": {"fitted": {str(S): each._asdict() for S, each in found.items()}}}


def push(args: argparse.Namespace) -> str:
    """Where the commit, or the pull request, is."""
    if not Path(args.folder).is_dir():
        raise ValueError(f"there is no folder {args.folder}")

    def sampler() -> GeneralizedDDIMPipeline:
        pipe = GeneralizedDDIMPipeline.from_pretrained(args.folder, variant=variants(args.folder)[0])
        pipe.set_progress_bar_config(desc="drawing samples", leave=False)
        return pipe.to(_accelerator())

    commit = push_folder(
        args.folder,
        args.repo_id,
        commit_message=args.message,
        private=args.private or None,
        token=args.token,
        revision=args.revision,
        create_pr=args.create_pr,
        license=args.license,
        records=args.records,
        samples=args.samples,
        sampler=sampler,
    )
    return commit.pr_url or commit.commit_url


# ---- pieces ----------------------------------------------------------------------------------------------------


def _check(args: argparse.Namespace) -> None:
    """Raise ValueError for what cannot work, before anything is loaded."""
    for name in ("num", "batch_size", "columns"):
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, not {value}")
    output = Path(args.output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file: give a folder")
    files = [name for name in args.files if name != LATENTS or not getattr(args, "latents", None)]
    there = [name for name in files if (output / name).exists()]
    if there and not args.overwrite:
        raise ValueError(f"{output / there[0]} exists: choose another --output, or pass --overwrite")
    parent = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"--output {output} cannot be written: {parent} is no folder one may write to")
    if args.device is not None:
        try:
            torch.empty(1, device=args.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"--device {args.device} cannot be used here: {str(error).splitlines()[0]}") from error
    if not Path(args.model).exists() and (args.model.startswith((".", "/", "~")) or args.model.count("/") > 1):
        raise ValueError(f"there is no folder {args.model}")
    if Path(args.model).exists() and not (Path(args.model) / "model_index.json").is_file():
        raise ValueError(f"{args.model} is no model: it has no model_index.json")
    args.found = _files(getattr(args, "images", None) or [])


def _load(args: argparse.Namespace, changes: dict[str, Any], multistep: bool | None = None) -> GeneralizedDDIMPipeline:
    """The model with a scheduler of ours, whose settings are the model's but for `changes`."""
    settings = {} if args.revision is None else {"revision": args.revision}
    pipe = GeneralizedDDIMPipeline.from_pretrained(args.model, **settings)
    if multistep is None:
        multistep = args.multistep
        if args.spacing is not None:
            changes = changes | {"timestep_spacing": args.spacing}
    if multistep is None:
        multistep = isinstance(pipe.scheduler, MultistepDDIMScheduler)
    before = pipe.scheduler.config
    changes = keep_learned(before, changes)
    scheduler = MultistepDDIMScheduler if multistep else GeneralizedDDIMScheduler
    pipe.scheduler = scheduler.from_config(before, **changes)
    for key, value in changes.items():
        if key in before and before[key] != value:
            print(f"note: {key}={value}, the model has {before[key]}", file=sys.stderr)
    check_channels(pipe.unet.config.in_channels)
    pipe.set_progress_bar_config(desc=args.command, leave=False)
    if args.dtype != "float32":
        pipe.to(dtype=DTYPES[args.dtype])
    return pipe.to(args.device or _accelerator())


def _accelerator() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _files(paths: Sequence[str]) -> list[str]:
    """Image files, folders replaced by the files in them. Raises ValueError for a path without any."""
    files: list[str] = []
    for path in map(Path, paths):
        if path.is_dir():
            files += image_files(path)
        elif path.is_file():
            files.append(str(path))
        else:
            raise ValueError(f"there is no file {path}")
    return files


def _load_with_images(args: argparse.Namespace) -> tuple[GeneralizedDDIMPipeline, list[Image.Image]]:
    """The model, deterministic, and the images in its mode and, where asked, its size."""
    _labels(args, len(args.found))
    pipe = _load(args, DETERMINISTIC)
    channels, size = pipe.unet.config.in_channels, pipe.image_size
    images = [open_image(file, channels, size, args.resize, hint=" (--resize)") for file in args.found]
    read(images, channels, size)  # all of one size
    return pipe, images


def _encode(
    pipe: GeneralizedDDIMPipeline, images: list[Image.Image], args: argparse.Namespace
) -> tuple[Tensor, InversionReport]:
    """Latents on the CPU, and their report, which is also printed."""
    settings = _decoding(args, _labels(args, len(images)))
    del settings["output_type"]
    z, report = pipe.encode(
        images, refinement_steps=args.refine, tolerance=args.tolerance, return_report=True, **settings
    )
    print(report, file=sys.stderr)
    return z.cpu(), report


def _decoding(args: argparse.Namespace, labels: int | list[int] | None) -> dict[str, Any]:
    """Keywords of `decode`."""
    return {
        "strength": 1.0 if args.strength is None else args.strength,
        "class_labels": labels,
        "batch_size": args.batch_size,
        "output_type": "pt",
        **_times(args),
        **_guidance(args),
    }


def _times(args: argparse.Namespace) -> dict[str, Any]:
    return {"num_inference_steps": args.steps, "timesteps": args.timesteps}


def _guidance(args: argparse.Namespace) -> dict[str, Any]:
    scale = 1.0 if args.guidance_scale is None else args.guidance_scale
    return {"guidance_scale": scale, "null_class_label": args.null_class_label}


def _generator(seed: int) -> Generator:
    try:
        return Generator().manual_seed(seed)
    except (RuntimeError, ValueError, OverflowError) as error:
        raise ValueError(f"a seed must fit 64 bits, not {seed}") from error


def _noise(pipe: GeneralizedDDIMPipeline, generator: Generator) -> Tensor:
    """x_T of one image, (1, C, H, W)."""
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


def _parts(num: int, size: int) -> list[slice]:
    return [slice(i, i + size) for i in range(0, num, size)]


def _rows(images: np.ndarray, columns: int) -> list[np.ndarray]:
    return [images[part] for part in _parts(len(images), columns)]


def _array(images: Tensor) -> np.ndarray:
    return images.permute(0, 2, 3, 1).float().cpu().numpy()


KEPT = ("steps", "timesteps", "spacing", "multistep", "strength", "class_label", "guidance_scale", "null_class_label")
"""Settings that latents are decoded with as they were made; they are kept in the file's metadata."""


def _load_latents(args: argparse.Namespace) -> Tensor:
    """The tensor "latents" of --latents; settings that are not given are taken over from its metadata."""
    file = args.latents
    if not Path(file).is_file():
        raise ValueError(f"there is no file {file}")
    try:
        with safe_open(file, "pt") as opened:
            names = list(opened.keys())
            if "latents" not in names:
                raise ValueError(f"{file} holds no latents: it has {', '.join(names) or 'nothing'}")
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


def _write(output: Path, made: Made, args: argparse.Namespace) -> list[Path]:
    """Write each file aside and rename it, so that no reader meets half a file."""
    output.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, content in made.items():
        path, aside = output / name, output / f".{name}.part"
        if isinstance(content, Tensor):
            kept = json.dumps({key: getattr(args, key) for key in KEPT})
            save_file({"latents": content.cpu().contiguous()}, aside, {"ddim_plugin": kept})
        elif isinstance(content, Image.Image):
            content.save(aside, format="PNG")
        elif isinstance(content, GeneralizedDDIMPipeline):
            _save_aside(content, path, aside)
        else:
            aside.write_text(json.dumps(content, indent=2) + "\n")
        aside.replace(path)
        paths.append(path)
    return paths


def _save_aside(pipe: GeneralizedDDIMPipeline, path: Path, aside: Path) -> None:
    """Save the pipeline aside, and take away what stands in its place."""
    shutil.rmtree(aside, ignore_errors=True)
    try:
        pipe.save_pretrained(aside)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    shutil.rmtree(path, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
