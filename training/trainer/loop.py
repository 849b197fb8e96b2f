"""The training loop: steps, and the reports, checkpoints, held-out losses and previews between them."""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from .checkpoints import Checkpoints
from .config import learning_rate
from .report import Clock, Log, Spikes, Window, preview
from .run import Run


class End(NamedTuple):
    """How a loop ended: its last step, the last step in a checkpoint, and the signal that stopped it."""

    step: int
    saved: int
    signal: int | None


class Loop:
    """Trains from the step after `step` until the last one, or until a signal."""

    def __init__(self, run: Run, checkpoints: Checkpoints, log: Log, step: int):
        self.run, self.checkpoints, self.log = run, checkpoints, log
        self.step, self.saved = step, step
        self.window, self.clock, self.spikes, self.signals = Window(run.accelerator), Clock(), Spikes(), Signals()
        self.losses: list[float] = []
        self.norms: list[float] = []

    def __call__(self) -> End:
        config = self.run.config
        with self.signals.caught(), closing(self.run.feed.batches(self.step)) as batches:
            self.clock.read()
            while self.step < config.steps:
                self._train(batches)
                if self._due(config.log_every):
                    self._report()
                if self._due(config.checkpoint_every):
                    self.clock.pause(self._save)
                if self._due(config.eval_every):
                    self.clock.pause(self._evaluate)
                if self._due(config.preview_every):
                    self.clock.pause(self._preview)
                number = self.signals.anywhere(self.run.accelerator, self.step)
                if number and self.step < config.steps:
                    self._report()
                    self._save()
                    return End(self.step, self.saved, number)
        return End(self.step, self.saved, None)

    def _due(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.step == self.run.config.steps)

    def _train(self, batches: Iterator[Any]) -> None:
        """Do the next step. If a picture cannot be read, save a checkpoint, if there are no other processes."""
        run = self.run
        try:
            loss, norm = run.step(self.step + 1, batches, self.clock)
        except (ValueError, OSError):
            self._read_window()
            if run.accelerator.num_processes == 1 and run.config.checkpoint_every:
                self._save()
            raise
        self.step += 1
        self.window.add(loss, norm)
        self.log.bar.update()

    def _read_window(self) -> None:
        losses, norms = self.window.read(self.step)
        self.losses += losses
        self.norms += norms

    def _report(self) -> None:
        self._read_window()
        if not self.losses:
            return
        run, step, count = self.run, self.step, len(self.losses)
        seconds, waited = self.clock.read()
        images, loss = count * run.config.batch_size, sum(self.losses) / count
        values = {
            "loss": loss,
            "grad_norm": sum(self.norms) / count,
            "learning_rate": learning_rate(step, run.config),
            "ema_decay": run.average.get_decay(step),
            "images": images,
            "seconds": seconds,
            "images_per_second": images / seconds,
            "loader_share": waited / seconds,
            "skipped_steps": run.skipped,
        }
        spikes = self.spikes.find(self.losses, self.norms, step)
        self.log.write(step, **values, **({"spikes": spikes} if spikes else {}))
        self.log.bar.set_postfix(loss=f"{loss:.4f}", **{"images/s": f"{images / seconds:.0f}"})
        self.losses, self.norms = [], []

    def _save(self) -> None:
        """Save a checkpoint, if there is none of this step. Nothing is saved after a step that was not finite."""
        self._read_window()
        step = self.step
        if self.saved == step:
            return
        problem = self.checkpoints.save(step, lambda folder: self.run.write(folder, step))
        if problem is None:
            self.saved = step
        elif self.run.accelerator.is_main_process:
            self.log.write(step, no_checkpoint=problem)
            print(
                f"warning: no checkpoint at step {step} ({problem}); the last is of step {self.saved}", file=sys.stderr
            )

    def _evaluate(self) -> None:
        self.log.write(self.step, held_out_loss=self.run.held_out_loss())

    def _preview(self) -> None:
        run, config = self.run, self.run.config
        steps, classes = min(config.preview_steps, run.objective.T), len(run.classes)
        picture = preview(
            run.accelerator, run.pipeline(), config.preview_images, steps, classes, config.seed, run.share.size
        )
        if picture is not None:
            folder = Path(config.output) / "previews"
            folder.mkdir(parents=True, exist_ok=True)
            picture.save(folder / f"step-{self.step:08d}.png")
            self.log.picture(self.step, picture)


class Signals:
    """Catches SIGTERM and SIGINT until the end of a step. Again `PATIENCE` seconds later, they end the process."""

    PATIENCE = 5.0  # launchers and schedulers deliver one signal more than once

    def __init__(self) -> None:
        self.received: int | None = None

    @contextmanager
    def caught(self) -> Iterator[None]:
        def note(number: int, frame: Any) -> None:
            if self.received is None:
                self.received, self._when = number, time.monotonic()
            elif time.monotonic() > self._when + self.PATIENCE:
                signal.signal(number, before[number])
                signal.raise_signal(number)

        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            for number in before:
                signal.signal(number, note)
        except ValueError:  # not in the main thread, where signals do not arrive
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def anywhere(self, accelerator: Accelerator, step: int) -> int:
        """Return the signal that any process received, or 0. On accelerators they compare every ten steps."""
        if accelerator.num_processes == 1:
            return self.received or 0
        if step % 10 and accelerator.device.type != "cpu":
            return 0
        flag = torch.tensor([self.received or 0], device=accelerator.device)
        return int(accelerator.gather(flag).max())
