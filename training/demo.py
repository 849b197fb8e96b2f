"""From end to end: draw from a model, train one on real digits, save, load in fresh processes, encode held-out digits.

python training/demo.py [--output out/demo] [--steps 2400]
"""

import guard

if __name__ == "__main__":
    guard.start()  # before the imports that take seconds

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.settings import parse, record, write_json

HERE = Path(__file__).parent
MODEL = HERE.parent / "model_cards" / "ddim-mnist-28"


@dataclass(frozen=True)
class DemoConfig:
    """Train a small U-Net on handwritten digits, save it as a pipeline, load it in fresh processes, draw pictures."""

    output: str = field(default="out/demo", metadata={"help": "folder for the model and the pictures"})
    overwrite: bool = field(default=False, metadata={"help": "replace an earlier demo in that folder"})
    steps: int | None = field(default=None, metadata={"help": "optimiser steps; by default those of digits.toml"})


@guard.output(alone=True)
def main(config: DemoConfig) -> dict[str, Any]:
    """Run the scripts as a user would, each in a process of its own."""
    output = Path(config.output)
    if not config.overwrite and any(each.name != guard.LOCK for each in output.iterdir()):
        raise ValueError(f"{output} is not empty: choose another output, or pass --overwrite to replace a demo in it")
    model, pictures = output / "digits", output / "pictures"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "--num_machines=1"]
    launch += ["--mixed_precision=no", "--dynamo_backend=no", f"--num_cpu_threads_per_process={os.cpu_count()}"]
    train = [*launch, str(HERE / "train.py"), "--config", str(HERE / "configs" / "digits.toml")]
    train += ["--output", str(model), "--overwrite"] + ([] if config.steps is None else ["--steps", str(config.steps)])
    sample = [sys.executable, str(HERE / "sample.py"), "--model", str(model), "--output", str(pictures)]
    sample += ["--data", "digits", "--overwrite"]
    latents = [sys.executable, str(HERE / "reconstruct.py"), "--model", str(model), "--output", str(pictures)]
    latents += ["--data", "digits", "--config", str(HERE / "configs" / "digits_latents.toml"), "--overwrite"]

    first = [sys.executable, "-m", "ddim_plugin.cli", "sample", str(MODEL), "--num", "64", "--steps", "10"]
    first += ["--batch-size", "64", "--output", str(output / "mnist"), "--overwrite"]

    seconds = {"first": run(first)}
    print(f"64 digits of {MODEL.name} in ten steps: {seconds['first']:.0f} s. Now a model of your own:", flush=True)
    seconds |= {"training": run(train), "sampling": run(sample), "latents": run(latents)}
    made = {
        "first": str(output / "mnist" / "samples.png"),
        "model": str(model),
        "by steps": str(pictures / "samples_by_steps.png"),
        "by eta": str(pictures / "samples_by_eta.png"),
        "reconstructions": str(pictures / "reconstructions.png"),
        "interpolation": str(pictures / "figure6.png"),
    }
    result = record(config) | {"made": made, "seconds": seconds}
    write_json(output / "demo.json", result)
    return result


def run(command: list[str]) -> float:
    """Return the seconds of a command. Raises OSError if it fails. A signal that ends this script ends the command."""
    start = time.perf_counter()
    process = subprocess.Popen(command, start_new_session=True)
    try:
        status = process.wait()
    except BaseException:
        os.killpg(process.pid, signal.SIGTERM)  # a launcher would not pass it on
        process.wait()
        raise
    if status:
        script = next((Path(word).name for word in command if word.endswith(".py")), "ddim-plugin sample")
        raise ChildProcessError(f"{script} failed, see above")
    return time.perf_counter() - start


if __name__ == "__main__":
    with guard.program():
        done = main(parse(DemoConfig))
        print()
        print(f"digits of {MODEL.name}, S = 10       {done['made']['first']}  ({done['seconds']['first']:.0f} s)")
        print(f"the model, a GeneralizedDDIMPipeline  {done['made']['model']}  ({done['seconds']['training']:.0f} s)")
        print(f"samples for S = 5, 10, 20, 50, 100    {done['made']['by steps']}")
        print(f"samples for η = 0 … 1 and σ̂           {done['made']['by eta']}")
        print(f"held-out digits, encoded and decoded  {done['made']['reconstructions']}")
        print(f"the grid between four of them         {done['made']['interpolation']}")
        print(f"drawing                               {done['seconds']['sampling'] + done['seconds']['latents']:.0f} s")
