"""Runs in processes of their own, forked from one that has imported everything: quick to start, and to kill.

Tests start scripts and functions by `Fork` and `ranks_of`, on Python's fork server. As a program this makes trials:

python tests/trials.py kill SETTINGS.json COUNT SEED     COUNT runs of the settings, each killed, and one that is not
python tests/trials.py full SETTINGS.json COUNT SEED     COUNT runs on disks that are too small, then with room (root)
python tests/trials.py two SETTINGS.json COUNT SEED      COUNT times two runs at once in one folder
python tests/trials.py start COUNT SEED                  COUNT scripts that get a signal while they import and read
python tests/trials.py ranks SETTINGS.json               under torch.distributed.run: one run, and what each rank holds
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing import forkserver
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

import guard
import torch
import train
from safetensors.torch import load_file
from trainer import run as run_
from trainer.checkpoints import damage
from trainer.settings import build

ROOT = Path(__file__).parents[1]
FORKS = multiprocessing.get_context("forkserver")
IMPORTED = ["trials", "evaluate", "sample", "reconstruct", "diffusers", "transformers", "sklearn.datasets", "PIL.Image"]
"""What the fork server imports."""


def _enter(folder, environment, function, arguments):
    """Begin as a new process does: with this environment, in the root, and with files for stdout and stderr."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    torch.set_num_threads(1)
    function(*arguments)


def script(path, *arguments):
    """Run a script as `python PATH ARGUMENTS` does."""
    sys.argv = [str(path), *map(str, arguments)]
    runpy.run_path(str(path), run_name="__main__")


class Fork:
    """A function in a process of its own, forked from one that has imported `IMPORTED` and computed nothing."""

    def __init__(self, function, *arguments, **environment):
        self._folder = tempfile.TemporaryDirectory()
        given = (self._folder.name, os.environ | {"OMP_NUM_THREADS": "1"} | environment, function, arguments)
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        try:
            FORKS.set_forkserver_preload(IMPORTED)
            forkserver.ensure_running()
        finally:
            os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
        self.process = FORKS.Process(target=_enter, args=given, daemon=True)
        self.process.start()

    def signal(self, number):
        os.kill(self.process.pid, number)

    def is_running(self):
        return self.process.is_alive()

    def wait(self, seconds=120):
        """Wait for its end. Return what `subprocess.run` returns: the exit code and what it printed."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        printed = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        texts = [path.read_text() if path.exists() else "" for path in printed]
        return subprocess.CompletedProcess((), self.process.exitcode, *texts)


def ranks_of(count, function, *arguments):
    """Run a function on several ranks, as a launcher does; return what the first printed, and raise if one failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "ACCELERATE_USE_CPU": "true"}
    size = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    forks = [Fork(function, *arguments, **place, **size, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(count)]
    done = [each.wait() for each in forks]
    assert [each.returncode for each in done] == [0] * count, [each.stderr for each in done]
    return done[0]


def digest(module):
    """A checksum of a module's weights."""
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in module.state_dict().values())).hexdigest()


def digests(images):
    """A checksum of each picture."""
    return [hashlib.sha256(image.numpy().tobytes()).hexdigest()[:12] for image in images]


def fork(settings, **changes):
    """Start a run as train.py does, in a process of its own, which appends its stderr to OUTPUT.err; return its id."""
    child = os.fork()
    if child:
        return child
    errors = os.open(f"{settings['output']}.err", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(errors, 2)
    torch.set_num_threads(1)
    status = 1
    try:
        guard.start()
        with guard.program():
            sys.exit(train.exit_status(train.main(build(train.TrainConfig, settings | changes))))
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else print(end.code, file=sys.stderr, flush=True) or 1
    finally:
        os._exit(status)


def code(status):
    """The exit code of a status that waitpid returns."""
    return os.waitstatus_to_exitcode(status)


def examine(settings, whole=None):
    """Check what a run has left: nothing is half-written, "finished" is true. Return the status in its record."""
    output = Path(settings["output"])
    errors = Path(f"{output}.err").read_text()
    assert "Traceback" not in errors, errors
    record = output / "training.json"
    status = json.loads(record.read_text())["status"] if record.is_file() else None
    found = sorted(each for each in (output / "checkpoints").glob("step-*") if not each.suffix)
    assert not any(map(damage, found)), [damage(each) for each in found]
    finished = (output / "model_index.json").is_file()
    assert finished or status != "finished"
    if finished and whole is not None:
        for name in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.non_ema.safetensors"):
            one, other = load_file(output / "unet" / name), load_file(Path(whole) / "unet" / name)
            assert all(torch.equal(one[key], other[key]) for key in other), name
    return status


def undisturbed(settings):
    """The folder of a run of these settings that nothing disturbs."""
    output = f"{settings['output']}-whole"
    shutil.rmtree(output, ignore_errors=True)
    assert code(os.waitpid(fork(settings | {"output": output}), 0)[1]) == 0
    return output


def kill(settings, count, seed):
    """Start the run, kill it after a random time, resume, and so on; the last is left alone. Prints the ends.

    Of three runs, two are killed by SIGKILL and one ends by SIGTERM, at times by a second one.
    """
    rng, folder = random.Random(seed), Path(settings["output"]) / "checkpoints"

    def writing(since):
        """Whether a checkpoint is being written by a run that began at `since`."""
        for path in folder.glob(".step-*"):
            with contextlib.suppress(FileNotFoundError):  # it was renamed meanwhile
                if path.stat().st_mtime > since:
                    return True
        return False

    for trial in range(count + 1):
        child = fork(settings, **({"resume": "latest"} if trial else {}))
        killed, number = False, signal.SIGTERM if trial % 3 == 2 else signal.SIGKILL
        if trial < count:
            begun, wait, saving = time.time(), rng.uniform(0.1, 1.5), rng.random() < 0.8
            while time.time() < begun + wait or (saving and not writing(begun)):
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    print("\nended", flush=True)
                    sys.exit(status and "a run failed")
                time.sleep(rng.uniform(0, 0.004))
            os.kill(child, number)
            killed = True
        if killed and number == signal.SIGTERM and rng.random() < 0.5:
            time.sleep(rng.uniform(0, 0.05))
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)
        status = code(os.waitpid(child, 0)[1])
        saving = killed and writing(begun)
        print("\nkilled while saving" if saving else "\nkilled" if killed else "\nended", flush=True)
        if status not in ((0, -number, 128 + number) if killed else (0,)):
            sys.exit(f"a run failed with status {status}")
        examine(settings)


def full(settings, count, seed):
    """Fill the disk of each run after a random time, of some only for a while; then make room and resume."""
    rng, whole = random.Random(seed), undisturbed(settings)
    disk, ends = Path(f"{settings['output']}-disk"), []
    disk.mkdir(exist_ok=True)
    errors, ballast = Path(f"{disk}.err"), disk / "ballast"
    for _ in range(count):
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk], check=True)
        try:
            mine = settings | {"output": str(disk / "run")}
            errors.write_text("")
            os.symlink(errors, f"{disk}/run.err")
            child, output = fork(mine), disk / "run"
            while not (output / "training.json").is_file():  # before, it is refused at once
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 1.5))
            with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
                for size in (1 << 16, 1 << 10, 1):
                    with contextlib.suppress(OSError):
                        while file.write(bytes(size)) == size:
                            pass
            if rng.random() < 0.4:
                time.sleep(rng.uniform(0, 1))
                ballast.unlink()
            first = code(os.waitpid(child, 0)[1])
            ballast.unlink(missing_ok=True)
            status = examine(mine, whole)
            assert first in (0, 1), (first, errors.read_text())
            assert (first == 0) == (status == "finished"), (first, status, errors.read_text())
            if first == 0:
                lines = [json.loads(line)["step"] for line in (output / "log.jsonl").read_text().splitlines()]
                assert lines == sorted(lines), lines
            elif status is not None:
                assert code(os.waitpid(fork(mine, resume="latest"), 0)[1]) == 0, errors.read_text()
                assert examine(mine, whole) == "finished"
        finally:
            subprocess.run(["umount", disk], check=True)
        words = {
            "no checkpoint": "no checkpoint at step",
            "no line": "has no line",
            "no pipeline": "cannot save the pipe",
        }
        found = [word for word, text in words.items() if text in errors.read_text()]
        ends.append(", ".join(["finished" if first == 0 else "failed", *found]))
    print({end: ends.count(end) for end in sorted(set(ends))})


def two(settings, count, seed):
    """Start two runs in one folder, of which the second is new, resumes or overwrites. One is refused, none is lost."""
    rng, whole = random.Random(seed), undisturbed(settings)
    output, ends = Path(settings["output"]), []
    for _ in range(count):
        shutil.rmtree(output, ignore_errors=True)
        Path(f"{output}.err").unlink(missing_ok=True)
        first = fork(settings)
        time.sleep(rng.choice([0, rng.uniform(0, 0.5), rng.uniform(0, 2)]))
        second = fork(settings, **rng.choice([{}, {"resume": "latest"}, {"overwrite": True}]))
        codes = [code(os.waitpid(each, 0)[1]) for each in (first, second)]
        assert examine(settings, whole) == "finished", codes
        assert 0 in codes, codes
        assert not (output / guard.LOCK).exists()
        errors = Path(f"{output}.err").read_text()
        refused = (
            "in use" if "is in use by process" in errors else "exists" if "holds another run" in errors else "none"
        )
        assert (refused == "none") == (codes == [0, 0]), (codes, errors)
        ends.append(refused)
    print({end: ends.count(end) for end in sorted(set(ends))})


def start(count, seed):
    """Send a signal to scripts in their first seconds: one line, 128 + its number, nothing written."""
    rng, ends = random.Random(seed), []
    for _ in range(count):
        script, number = rng.choice(sorted((ROOT / "training").glob("*.py"))), rng.choice(guard.signals.CAUGHT)
        output = Path(f"/tmp/trials-{os.getpid()}")
        needs = {"--model": ROOT / "model_cards" / "ddim-mnist-28", "--checkpoint": script, "--records": output.parent}
        named = [word for key, value in needs.items() if f"{key[2:]}: " in script.read_text() for word in (key, value)]
        run = [sys.executable, script, "--output", output, *named]
        process = subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        time.sleep(rng.uniform(0.15, 6))
        process.send_signal(number)
        text = process.communicate()[0]
        assert "Traceback" not in text, text
        if process.returncode >= 128:
            assert process.returncode == 128 + number
            assert f"{script.name}: {number.name}: end" in text
        ends.append(process.returncode)
        shutil.rmtree(output, ignore_errors=True)
    print({end: ends.count(end) for end in sorted(set(ends))})


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
    what, *rest = sys.argv[1:]
    if what == "start":
        start(*map(int, rest))
    else:
        settings = json.loads(Path(rest[0]).read_text())
        {"kill": kill, "full": full, "two": two, "ranks": ranks}[what](settings, *map(int, rest[1:]))
