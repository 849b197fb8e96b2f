"""The output folder of a run: what it may touch, room on the disk, the finished pipeline, the push."""

import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from cards.card import check_license
from guard import LOCK
from guard.writing import share
from huggingface_hub import HfApi
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ddim_plugin import GeneralizedDDIMPipeline
from ddim_plugin.hub.push import open_repo, push_folder

from .config import TrainConfig
from .report import attempt, plot_loss
from .settings import write_json

INDEX, RECORD, PART = "model_index.json", "training.json", "pipeline.part"
LAST = (RECORD, INDEX)
"""Files that are put in place after all others, the first of these at the end."""

WRITTEN = (INDEX, "unet", "scheduler", RECORD, "loss.png", "log.jsonl", "previews", "checkpoints")
WRITTEN += ("trackers", PART, "results.json", "samples.png", "sample.json", "README.md")
"""What a run, or a script that reads its pipeline, writes there: --overwrite replaces these and nothing else."""

EARLIER = ".earlier"
"""Folder with the run that is being replaced, until the new one is finished."""

RAW = "diffusion_pytorch_model.non_ema.safetensors"


def check_output(config: TrainConfig) -> None:
    """Raise ValueError if the output folder holds something that the run must not touch."""
    output = Path(config.output).resolve()
    if not output.exists() or (output.is_dir() and {part.name for part in output.iterdir()} <= {LOCK}):
        return
    if not (output / RECORD).is_file():
        raise ValueError(
            f"the output {config.output} holds something else than a run: choose another folder"
            if not config.overwrite
            else f"--overwrite replaces the folder of an earlier run only, and {config.output} is none"
        )
    if config.resume is None and not config.overwrite:
        raise ValueError(
            f"the output {config.output} holds another run: choose another folder, continue it by --resume latest, "
            "or pass --overwrite"
        )
    if config.resume not in (None, "latest") and not Path(config.resume).resolve().is_relative_to(output):
        raise ValueError(
            f"the output {config.output} is another run than {config.resume}: choose a new folder to continue from it"
        )
    without = not any((output / "checkpoints").glob("step-*"))
    if config.resume == "latest" and without and (output / INDEX).is_file():
        raise ValueError(f"the run in {config.output} is finished, and has no checkpoint to continue from")


def check_space(config: TrainConfig, parameters: int) -> None:
    """Raise OSError if the disk cannot hold the checkpoints and the pipeline.

    A checkpoint holds four numbers for each of the `parameters` (weights, average, Adam's two), the pipeline two.
    """
    folder = Path(config.output).resolve()
    copies = (4 * (config.keep_checkpoints + 1) if config.checkpoint_every else 0) + 2
    there = sum(file.stat().st_size for file in (folder / "checkpoints").rglob("*") if file.is_file())
    needed = copies * parameters * 4 - (there if config.resume else 0)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"the disk of {config.output} has {free / 1e6:.0f} MB free; the run needs {needed / 1e6:.0f} MB, for "
            f"{config.keep_checkpoints} checkpoints and one being written"
        )


def set_aside(output: Path) -> None:
    """Move a finished run to `EARLIER`, until the new one is finished too. Delete an unfinished one."""
    earlier, finished = output / EARLIER, (output / INDEX).is_file()
    if finished:
        shutil.rmtree(earlier, ignore_errors=True)
        earlier.mkdir()
    for part in (output / name for name in WRITTEN):
        if finished and part.exists():
            part.rename(earlier / part.name)
        elif part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink(missing_ok=True)


@contextmanager
def replace_pipeline(output: Path) -> Iterator[Path]:
    """Yield an empty folder whose files replace those of the pipeline in `output` at the end; other files stay.

    `model_index.json` is deleted first and comes last, so that a folder that has it is complete. After it comes
    `training.json`, which calls the run finished.
    Raises OSError if safetensors fails to write.
    """
    aside = output / PART
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        share(aside)
        (output / INDEX).unlink(missing_ok=True)
        for part in sorted(aside.iterdir(), key=lambda part: (*(part.name == last for last in LAST), part.name)):
            target = output / part.name
            if target.is_dir():
                shutil.rmtree(target)
            part.replace(target)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def save(
    config: TrainConfig,
    pipe: GeneralizedDDIMPipeline,
    raw: dict[str, Tensor],
    result: dict[str, Any],
    lines: list[dict[str, Any]],
) -> None:
    """Save the pipeline with the averaged weights, the raw ones as its variant "non_ema", and the records.

    Args:
        raw: weights of the network as trained, by name.
        result: content of `training.json`.
        lines: the log, for the plot of the loss.

    Raises:
        OSError: if the disk fails. The folder then holds the pipeline that it held before.
    """
    output = Path(config.output).resolve()
    pipe.unet.to(memory_format=torch.contiguous_format)
    raw = {name.removeprefix("_orig_mod."): value.float().contiguous().cpu() for name, value in raw.items()}
    try:
        with replace_pipeline(output) as aside:
            pipe.save_pretrained(aside)
            save_file(raw, aside / "unet" / RAW)
            write_json(aside / RECORD, result)
    except OSError as error:
        raise OSError(f"cannot save the pipeline: {error}. Make room, and continue with --resume latest") from error
    attempt("the loss is not plotted", plot_loss, lines, output / "loss.png")
    shutil.rmtree(output / EARLIER, ignore_errors=True)


def open_repo_first(config: TrainConfig, accelerator: Accelerator) -> None:
    """Raise ValueError or OSError, in all processes, if the trained pipeline could not be pushed."""
    problem: list[Exception | None] = [None]
    if accelerator.is_main_process:
        try:
            check_license(config.hub_license)
            open_repo(HfApi(), config.push_to_hub, config.hub_private or None)
        except (ValueError, OSError) as error:
            problem = [error]
    broadcast_object_list(problem)
    if problem[0] is not None:
        raise problem[0]


def push(config: TrainConfig, number: int) -> str | None:
    """Push the saved pipeline, if no signal `number` came before. Returns None, or what went wrong, also printed."""
    try:
        if number:
            raise OSError(signal.Signals(number).name)
        commit = push_folder(
            config.output,
            config.push_to_hub,
            private=config.hub_private or None,
            revision=config.hub_revision,
            create_pr=config.hub_create_pr,
            license=config.hub_license,
        )
    except (ValueError, OSError) as error:
        flags = {"--private": config.hub_private, "--create-pr": config.hub_create_pr}
        named = {"--revision": config.hub_revision, "--license": config.hub_license}
        again = ["ddim-plugin push", config.output, config.push_to_hub, *(flag for flag, on in flags.items() if on)]
        again += [f"{flag} {value}" for flag, value in named.items() if value]
        print(f"train.py: not pushed: {error}. The pipeline is saved: {' '.join(again)}", file=sys.stderr)
        return str(error)
    print(f"pushed: {commit.pr_url or commit.commit_url}")
    return None
