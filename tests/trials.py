"""Training runs in processes of their own, forked from one that has imported everything: quick to start, and to kill.

python tests/trials.py kill SETTINGS.json COUNT SEED     COUNT runs of the settings, each killed at random but the last
python tests/trials.py ranks SETTINGS.json               under torch.distributed.run: one run, and what each rank holds
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

import torch
import train
from config import build


def digest(module):
    """A checksum of a module's weights."""
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in module.state_dict().values())).hexdigest()


def kill(settings, count, seed):
    """Start the run, kill it after a random time, resume, and so on; the last is left alone. Prints each step found."""
    rng = random.Random(seed)
    for trial in range(count + 1):
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            result = train.main(build(train.TrainConfig, settings | ({"resume": "latest"} if trial else {})))
            os._exit(0 if result["status"] == "finished" else 1)
        killed = False
        if trial < count:
            begun, wait = time.monotonic(), rng.uniform(0.3, 2.5)
            while time.monotonic() - begun < wait and os.waitpid(child, os.WNOHANG)[0] == 0:
                time.sleep(0.005)
            try:
                os.kill(child, signal.SIGKILL)
                killed = True
            except ProcessLookupError:
                print("it had ended", flush=True)
                continue
        status = os.waitpid(child, 0)[1]
        print(f"trial {trial}: {'killed' if killed else f'ended with {status}'}", flush=True)
        if not killed and status:
            sys.exit("a run failed")


def ranks(settings):
    """One run under a launcher; each rank prints its learning rates, pictures and weights."""
    torch.set_num_threads(1)
    seen, runs = [], []
    before = train.Run.step

    def step(run, number, batches, clock):
        found = before(run, number, batches, clock)
        runs[:] = [run]
        seen.append(run.optimizer.param_groups[0]["lr"])
        return found

    train.Run.step = step
    result = train.main(build(train.TrainConfig, settings))
    run = runs[0]
    held = {"rank": run.share.rank, "lr": seen, "unet": digest(run.unet), "ema": digest(run.ema.unet)}
    folder = Path(settings["output"])
    (folder / f"rank-{run.share.rank}-{result['status'].replace(' ', '-')}.json").write_text(json.dumps(held))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    what, file, *rest = sys.argv[1:]
    settings = json.loads(Path(file).read_text())
    if what == "kill":
        kill(settings, *map(int, rest))
    else:
        ranks(settings)
