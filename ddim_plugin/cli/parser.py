"""The options of the command line: `ddim-plugin COMMAND …`."""

import math
from argparse import ArgumentParser, BooleanOptionalAction, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence

from ..process.moves import VARIANCES
from ..process.spacings import NAMES
from ..version import __version__

LATENTS = "latents.safetensors"
# What each command writes into --output, with what it is.
FILES = {"sample": {"samples.png": "{images} image{plural}", LATENTS: "their latents"}, "encode": {LATENTS: "latents"}}
FILES |= {name: {f"{name}ed.png": f"images, {name}ed", LATENTS: "their latents"} for name in ("reconstruct", "edit")}
FILES = {name: {**files, f"{name}.json": "settings"} for name, files in (FILES | {"fit": {"model": "model"}}).items()}


def number(text: str) -> float:
    """Convert text to a finite number, an int if it is whole."""
    if not math.isfinite(value := float(text)):
        raise ValueError
    return int(value) if value.is_integer() else value


def parse(argv: Sequence[str] | None = None) -> Namespace:
    machine, times, size, images = (ArgumentParser(add_help=False) for _ in range(4))
    machine.add_argument("--device", help="cpu, cuda, … (default: an accelerator if there is one)")
    machine.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    machine.add_argument("--revision", help="branch, tag or commit of a model on the Hub")
    model = ArgumentParser(add_help=False, parents=[machine])
    model.add_argument("model", metavar="MODEL", help="a folder written by save_pretrained, or a Hub id")
    model.add_argument("--prompt", action="append", metavar="TEXT", help="text of all images, or again for each image")
    model.add_argument("--class-label", type=int, nargs="+", metavar="C", help="one for all images, or one for each")
    model.add_argument("--null-class-label", type=int, metavar="C", help="the label of no class (default: the last)")
    model.add_argument("--guidance-scale", type=number, help="classifier-free guidance (default: the pipeline's)")
    model.add_argument("--batch-size", type=int, default=16, help="images at a time (default: %(default)s)")
    model.add_argument("--output", default="out", metavar="FOLDER", help="folder for the files (default: out)")
    model.add_argument("--overwrite", action="store_true", help="replace files of an earlier run")
    times.add_argument("--steps", type=int, help="number of steps S (default: the pipeline's, 50 for pixels)")
    times.add_argument("--timesteps", type=number, nargs="+", metavar="T", help="these timesteps, descending")
    times.add_argument("--spacing", choices=NAMES, help="spacing of the timesteps (default: the model's)")
    times.add_argument("--multistep", action=BooleanOptionalAction, help="the scheduler (default: the model's)")
    size.add_argument("--seed", type=int, help="image i is drawn with seed + i (default: 0)")
    size.add_argument("--height", type=int, help="of images of a text-to-image model (default: the pipeline's)")
    size.add_argument("--width", type=int, help="as --height")
    images.add_argument("images", metavar="IMAGE", nargs="+", help="image files (edit: or a file of latents)")
    images.add_argument("--strength", type=number, help="share of the steps to make, in (0, 1] (default: 1)")
    images.add_argument("--resize", action="store_true", default=None, help="crop and resize images for the network")
    images.add_argument("--refine", type=int, metavar="K", help="more evaluations of a step (default: 4)")
    images.add_argument("--tolerance", type=number, help="residual of a step (default: 1e-5, with a text 1e-2)")

    top = ArgumentParser("ddim-plugin", description="Sample images with diffusion models, and encode images (DDIM).")
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, summary: str, example: str, *parents: ArgumentParser) -> ArgumentParser:
        writes = f"\n\nwrites into --output: {', '.join(FILES[name])}" if name in FILES else ""
        texts = {"help": summary, "description": summary, "epilog": f"example:\n  ddim-plugin {name} {example}{writes}"}
        return commands.add_parser(name, parents=parents, formatter_class=RawDescriptionHelpFormatter, **texts)

    sub = command("sample", "sample images from noise, or decode latents", "user/model --steps 20", model, times, size)
    sub.add_argument("--latents", metavar="FILE", help="use these latents, with the settings in the file (η = 0)")
    sub.add_argument("--num", type=int, help="number of images (default: 16)")
    sub.add_argument("--eta", type=number, help="η of Eq. 16: 0 is DDIM, 1 is DDPM (default: the model's)")
    sub.add_argument("--variance", choices=VARIANCES, help="variance of the noise (default: the model's)")
    sub.add_argument("--clip", action=BooleanOptionalAction, help="clip x̂0 in each step (default: the model's)")
    command("encode", "encode images as latents", "user/model a.png --refine 9", model, times, images)
    command("reconstruct", "encode images and decode them", "user/model a.png --steps 10", model, times, images)
    example = "user/model a.png --prompt cat --new-prompt dog"
    sub = command("edit", "encode images, and decode them with a change", example, model, times, images)
    sub.add_argument("--new-prompt", action="append", metavar="TEXT", help="as --prompt, to decode with")
    sub.add_argument("--new-class-label", type=int, nargs="+", metavar="C", help="as --class-label, to decode with")
    sub.add_argument("--new-guidance-scale", type=number, metavar="W", help="to decode with (default: the old)")
    sub = command("fit", "save a model with solvers of few steps", "user/model --steps 5 8 --minutes 5", model, size)
    sub.add_argument("--steps", type=int, nargs="+", default=[5, 8, 10, 15, 20], metavar="S", help="numbers of steps")
    sub.add_argument("--prompt-file", metavar="FILE", help="a prompt in each line, in turn")
    sub.add_argument("--num", type=int, default=64, help="images to fit to (default: %(default)s)")
    sub.add_argument("--minutes", type=number, default=0.0, help="time to refine all solvers (default: none)")
    sub.set_defaults(spacing=None, multistep=True)
    sub = command("push", "push a saved pipeline to the Hub, with a card", "out/digits user/digits --license cc-by-4.0")
    sub.add_argument("folder", metavar="FOLDER", help="a folder written by save_pretrained or the training script")
    sub.add_argument("repo_id", metavar="USER/MODEL", help="id of the repo, which is created if it does not exist")
    sub.add_argument("--private", action="store_true", default=None, help="create the repo as a private one")
    sub.add_argument("--revision", metavar="BRANCH", help="the branch (default: main)")
    sub.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    sub.add_argument("--message", dest="commit_message", metavar="TITLE", help="title of the commit")
    sub.add_argument("--license", help="licence of the weights, by its id on the Hub: mit, cc-by-4.0, …")
    sub.add_argument("--space", action="store_true", help="also push a Space of the same id that shows the model")
    sub.add_argument("--token", help="token with write access (default: HF_TOKEN, or that of `hf auth login`)")
    sub = command("demo", "show a model in the browser, in a page of this machine", "user/model", machine)
    sub.add_argument("model", metavar="MODEL", nargs="?", help="a model of pixels (default: installed digits)")
    sub.add_argument("--port", type=int, help="port of the page (default: the first free one from 7860 on)")
    return top.parse_args(argv)
