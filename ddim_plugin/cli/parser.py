"""The options of the command line: `ddim-plugin COMMAND …`."""

from argparse import ArgumentParser, BooleanOptionalAction, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence

from ..process.moves import VARIANCES
from ..process.spacings import NAMES
from ..version import __version__

LATENTS, MODEL = "latents.safetensors", "model"

# What each command writes into --output beside the record COMMAND.json.
FILES = {"sample": ("samples.png", LATENTS), "encode": (LATENTS,)}
FILES |= {"invert": (LATENTS,), "edit": ("edited.png", LATENTS)}


def number(text: str) -> float:
    """Convert a timestep, an integer for a table of levels."""
    return int(text) if text.isdecimal() else float(text)


def parse(argv: Sequence[str] | None = None) -> Namespace:
    """Parse the arguments of a command."""
    stock, timesteps, latents, images, refine, text = (ArgumentParser(add_help=False) for _ in range(6))
    stock.add_argument("model", metavar="MODEL", help="a folder written by save_pretrained, or a Hub id")
    stock.add_argument("--guidance-scale", type=float, help="classifier-free guidance (default: the pipeline's)")
    stock.add_argument("--device", help="cpu, cuda, … (default: an accelerator if there is one)")
    stock.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    stock.add_argument("--revision", help="branch, tag or commit of a model on the Hub")
    stock.add_argument("--output", default="out", metavar="FOLDER", help="folder for the files (default: out)")
    stock.add_argument("--overwrite", action="store_true", help="replace files of an earlier run")

    model = ArgumentParser(add_help=False, parents=[stock])
    model.add_argument("--class-label", type=int, nargs="+", metavar="C", help="one for all images, or one for each")
    model.add_argument("--null-class-label", type=int, metavar="C", help="the label of no class (default: the last)")
    model.add_argument("--batch-size", type=int, default=16, help="images at a time (default: %(default)s)")

    steps = timesteps.add_mutually_exclusive_group()
    steps.add_argument("--steps", type=int, help="number of steps S (default: 50)")
    steps.add_argument("--timesteps", type=number, nargs="+", metavar="T", help="the timesteps themselves, descending")
    timesteps.add_argument("--spacing", choices=NAMES, help="spacing of the timesteps (default: the model's)")
    timesteps.add_argument("--multistep", action=BooleanOptionalAction, help="the scheduler (default: the model's)")
    timesteps.add_argument("--strength", type=float, help="share of the steps to make, in (0, 1] (default: 1)")

    latents.add_argument("--latents", metavar="FILE", help="use these latents, with the settings in the file (η = 0)")
    images.add_argument("images", metavar="IMAGE", nargs="+", help="image files")
    for sub, k, tolerance in ((refine, 0, "1e-5"), (text, 4, "1e-2")):
        sub.add_argument("--resize", action="store_true", default=None, help="crop and resize images for the network")
        sub.add_argument(
            "--refine", type=int, metavar="K", help=f"evaluations of a step after the first (default: {k})"
        )
        sub.add_argument("--tolerance", type=float, help=f"residual of a step (default: {tolerance})")
    text.add_argument("--prompt", action="append", metavar="TEXT", help="text of all images, or again for each image")

    top = ArgumentParser("ddim-plugin", description="Sample images with diffusion models, and encode images (DDIM).")
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, summary: str, example: str, *parents: ArgumentParser) -> ArgumentParser:
        writes = f"\n\nwrites into --output: {', '.join(FILES[name])}, {name}.json" if name in FILES else ""
        texts = {"help": summary, "description": f"{summary[0].upper()}{summary[1:]}."}
        texts["epilog"] = f"example:\n  ddim-plugin {name} {example}{writes}"
        return commands.add_parser(name, parents=parents, formatter_class=RawDescriptionHelpFormatter, **texts)

    shared = model, timesteps, latents
    sub = command("sample", "sample images from noise, or decode latents", "user/model --num 16 --steps 20", *shared)
    sub.add_argument("--seed", type=int, default=0, help="image i is drawn with seed + i (default: %(default)s)")
    sub.add_argument("--columns", type=int, default=8, help="images in a row of the grid (default: %(default)s)")
    sub.add_argument("--num", type=int, help="number of images (default: 16)")
    sub.add_argument("--eta", type=float, help="η of Eq. 16: 0 is DDIM, 1 is DDPM (default: the model's)")
    sub.add_argument("--variance", choices=VARIANCES, help="variance of the noise (default: the model's)")
    sub.add_argument("--clip", action=BooleanOptionalAction, help="clip x̂0 in each step (default: the model's)")

    command("encode", "encode images as latents", "user/model a.png --refine 4", model, timesteps, images, refine)

    shared = stock, timesteps, text
    example = "user/model a.png --prompt cat"
    command("invert", "find the latents of images in a text-to-image pipeline", example, *shared, images)
    example += " --new-prompt dog"
    sub = command("edit", "edit images: invert them, and decode them with another prompt", example, *shared, latents)
    sub.add_argument("images", metavar="IMAGE", nargs="*", help="image files, without --latents")
    sub.add_argument("--new-prompt", action="append", required=True, metavar="TEXT", help="as --prompt, to decode with")
    sub.add_argument("--new-guidance-scale", type=float, metavar="W", help="with the new prompt (default: the old)")

    sub = command("push", "push a saved pipeline to the Hub, with a card", "out/digits user/digits --license cc-by-4.0")
    sub.add_argument("folder", metavar="FOLDER", help="a folder written by save_pretrained or the training script")
    sub.add_argument("repo_id", metavar="USER/MODEL", help="id of the repo, which is created if it does not exist")
    sub.add_argument("--private", action="store_true", default=None, help="create the repo as a private one")
    sub.add_argument("--revision", metavar="BRANCH", help="the branch (default: main)")
    sub.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    sub.add_argument("--message", dest="commit_message", metavar="TITLE", help="title of the commit")
    sub.add_argument("--license", help="licence of the weights, by its id on the Hub: mit, cc-by-4.0, …")
    sub.add_argument("--token", help="token with write access (default: HF_TOKEN, or that of `hf auth login`)")

    args, rest = top.parse_known_args(argv)
    if args.command == "edit" and not args.images and not any(word.startswith("-") for word in rest):
        args.images = rest  # argparse leaves over images that follow an option
    elif rest:
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    return args
