"""Training runs in processes of their own, forked from one that has imported everything: quick to start, and to kill.

python tests/trials.py kill SETTINGS.json COUNT SEED     COUNT runs of the settings, each killed, and one that is not
python tests/trials.py ranks SETTINGS.json               under torch.distributed.run: one run, and what each rank holds
"""

import contextlib
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
from trainer import run as run_
from trainer.settings import build


def digest(module):
    """A checksum of a module's weights."""
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in module.state_dict().values())).hexdigest()


def digests(images):
    """A checksum of each picture."""
    return [hashlib.sha256(image.numpy().tobytes()).hexdigest()[:12] for image in images]


def kill(settings, count, seed):
    """Start the run, kill it after a random time, resume, and so on; the last is left alone. Prints the ends."""
    rng, folder = random.Random(seed), Path(settings["output"]) / "checkpoints"

    def writing(since):
        """Whether a checkpoint is being written by a run that began at `since`."""
        for path in folder.glob(".step-*"):
            with contextlib.suppress(FileNotFoundError):  # it was renamed meanwhile
                if path.stat().st_mtime > since:
                    return True
        return False

    for trial in range(count + 1):
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            result = train.main(build(train.TrainConfig, settings | ({"resume": "latest"} if trial else {})))
            os._exit(0 if result["status"] == "finished" else 1)
        killed = False
        if trial < count:
            begun, wait, saving = time.time(), rng.uniform(0.3, 1.5), rng.random() < 0.8
            while time.time() < begun + wait or (saving and not writing(begun)):
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    print("\nended", flush=True)
                    sys.exit(status and "a run failed")
                time.sleep(rng.uniform(0, 0.004))
            os.kill(child, signal.SIGKILL)
            killed = True
        status = os.waitpid(child, 0)[1]
        saving = killed and writing(begun)
        print("\nkilled while saving" if saving else "\nkilled" if killed else "\nended", flush=True)
        if not killed and status:
            sys.exit("a run failed")


def ranks(settings):
    """One run under a launcher; each rank prints its learning rates, pictures and weights."""
    torch.set_num_threads(1)
    seen, runs, pictures = [], [], []
    before, to_model = run_.Run.step, run_.to_model

    def step(run, number, batches, clock):
        found = before(run, number, batches, clock)
        runs[:] = [run]
        seen.append(run.optimizer.param_groups[0]["lr"])
        return found

    run_.Run.step = step
    run_.to_model = lambda images: pictures.append(digests(images)) or to_model(images)
    result = train.main(build(train.TrainConfig, settings))
    run = runs[0]
    held = {"rank": run.share.rank, "lr": seen, "unet": digest(run.unet), "ema": digest(run.averaged())}
    held["pictures"] = pictures
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
