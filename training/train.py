"""Train a UNet2DModel on pictures and save it as a GeneralizedDDIMPipeline.

accelerate launch training/train.py --config training/configs/digits.toml --output out/digits
"""

import guard

if __name__ == "__main__":
    guard.start()  # before the imports that take seconds

import dataclasses
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from cards.card import write_card
from pictures import origin
from trainer.checkpoints import Checkpoints, resume
from trainer.config import TrainConfig
from trainer.loop import Loop
from trainer.output import open_repo_first, push, save, set_aside
from trainer.report import Log, attempt, device_name, summary
from trainer.run import Run
from trainer.settings import parse, record, write_json
from trainer.setup import build_run


@guard.output(alone=False)
def main(config: TrainConfig) -> dict[str, Any]:
    """Train, save the pipeline and `training.json` into `config.output`, and return the content of the latter."""
    run = build_run(config)
    if config.push_to_hub is not None:
        open_repo_first(config, run.accelerator)
    accelerator, output = run.accelerator, Path(config.output).resolve()
    checkpoints = Checkpoints(output / "checkpoints", config.keep_checkpoints, accelerator)
    step = resume(run, checkpoints)
    result = start(run, output, step)
    log = Log(output / "log.jsonl", accelerator, step, config.steps)
    with guard.ending_after_a_step("ending after this step, with a checkpoint; again to end without it") as signals:
        loop = Loop(run, checkpoints, log, step, signals)
        try:
            end = loop()
        except BaseException as error:
            reason = "a signal" if isinstance(error, guard.Ended) else f"{type(error).__name__}: {error}"
            keep(run, output, result | {"status": f"ended by {reason}", "step": loop.step, "checkpoint": loop.saved})
            if not isinstance(error, FloatingPointError):
                raise
            last = checkpoints.all()[:1]
            where = f"the checkpoint {last[0]} is from before" if last else "there is no checkpoint from before"
            raise FloatingPointError(f"{error}: stopped; {where}. Lower learning_rate, or look at the data") from error
        finally:
            log.close()
            for tracker in accelerator.trackers:  # accelerator.end_training would end the process group too
                attempt(f"the tracker {tracker.name} did not finish", tracker.finish)

        finished = end.step == config.steps
        result |= {"status": "finished" if finished else f"stopped at step {end.step}"}
        result |= {"step": end.step, "checkpoint": end.saved, "pictures_seen": run.seen} | summary(log.lines)
        result |= {"skipped_steps": run.skipped, "signal": end.signal}
        if accelerator.device.type == "cuda":
            result["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        if finished:
            signals.polled = "ending when the pipeline is saved"
            pipe, raw = run.pipeline(), accelerator.get_state_dict(run.network)
            if accelerator.is_main_process:
                save(config, pipe, raw, result, log.lines)
                repo_id = config.push_to_hub or f"user/{output.name}"
                attempt("the card is not written", write_card, output, repo_id, config.hub_license)
        else:
            keep(run, output, result)
    if finished and accelerator.is_main_process and config.push_to_hub is not None:
        result["not_pushed"] = push(config, signals.received)
    accelerator.wait_for_everyone()
    return result


def keep(run: Run, output: Path, result: dict[str, Any]) -> None:
    """Write `training.json` of a run that is not finished, if the disk allows it."""
    if run.accelerator.is_main_process:
        attempt(f"{output / 'training.json'} is as it was", write_json, output / "training.json", result)


def start(run: Run, output: Path, step: int) -> dict[str, Any]:
    """Open the output folder and the trackers after `step`; return what `training.json` holds so far."""
    config, accelerator = run.config, run.accelerator
    result = record(config) | run.data_set()
    result |= {
        "data_from": origin(config.data),
        "status": "running",
        "parameters": run.unet.num_parameters(),
        "in_memory": run.feed.images is not None,
        "processes": run.share.processes,
        "device": device_name(accelerator),
        "mixed_precision": accelerator.mixed_precision,
    }
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        if config.overwrite:
            set_aside(output)
        write_json(output / "training.json", result)
    accelerator.wait_for_everyone()
    if accelerator.log_with:
        flat = {key: str(value) for key, value in dataclasses.asdict(config).items()}
        purge = {"tensorboard": {"purge_step": step + 1}} if step else {}  # later steps are trained again
        accelerator.init_trackers(config.project, config=flat, init_kwargs=purge)
    return result


def exit_status(result: dict[str, Any]) -> int:
    """Print how training ended, and return the status of the process: 128 + a signal, 1 if not pushed, or 0."""
    is_main, step = PartialState().is_main_process, result["step"]
    if result["status"] != "finished":
        if is_main:
            saved = step == result["checkpoint"]
            kept = "which is saved" if saved else f"which could not be saved: the last is step {result['checkpoint']}"
            name = signal.Signals(result["signal"]).name
            print(f"{name}: {result['status']}, {kept}. Continue with --resume latest", file=sys.stderr)
        return 128 + result["signal"]
    if is_main and result["seconds"]:
        speed = f"{result['images_per_second']:.0f} images/s"
        print(f"trained {step} steps in {result['seconds']:.0f} s ({speed}), loss {result['loss']:.4f}")
    if is_main:
        print(f"{result['config']['output']}: the pipeline and training.json")
    return 1 if result.get("not_pushed") else 0


if __name__ == "__main__":
    with guard.program():
        status = exit_status(main(parse(TrainConfig)))
        PartialState().destroy_process_group()  # only here, as nothing that communicates is left
        sys.exit(status)
