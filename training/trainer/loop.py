"""The training loop: steps, and the reports, checkpoints, held-out losses and previews between them."""

import io
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from guard import Signals, warn
from guard.writing import write_file
from PIL import Image

from .checkpoints import Checkpoints
from .config import learning_rate
from .report import Clock, Log, Spikes, Window, attempt, preview
from .run import Run


class End(NamedTuple):
    """How a loop ended: its last step, the last step in a checkpoint, and the signal that stopped it."""

    step: int
    saved: int
    signal: int | None


class Loop:
    """Trains from the step after `step` until the last one, or until a signal."""

    def __init__(self, run: Run, checkpoints: Checkpoints, log: Log, step: int, signals: Signals):
        self.run, self.checkpoints, self.log, self.signals = run, checkpoints, log, signals
        self.step, self.saved = step, step
        self.window, self.clock, self.spikes = Window(run.accelerator), Clock(), Spikes()
        self.losses: list[float] = []
        self.norms: list[float] = []

    def __call__(self) -> End:
        config = self.run.config
        with closing(self.run.feed.batches(self.step)) as batches:
            self.clock.read()
            while self.step < config.steps:
                self._train(batches)
                number = self._signal() if self.step < config.steps else 0
                if self._due(config.log_every) or self._due(config.checkpoint_every) or number:
                    self._report()
                if self._due(config.checkpoint_every) or number:
                    self.clock.pause(self._save)
                if number:
                    return End(self.step, self.saved, number)
                if self._due(config.eval_every):
                    self.clock.pause(self._evaluate)
                if self._due(config.preview_every):
                    self.clock.pause(self._preview)
        return End(self.step, self.saved, None)

    def _signal(self) -> int:
        """Return the signal that any process received, or 0. On accelerators they compare every ten steps."""
        accelerator = self.run.accelerator
        if accelerator.num_processes == 1:
            return self.signals.received
        if self.step % 10 and accelerator.device.type != "cpu":
            return 0
        return int(accelerator.gather(torch.tensor([self.signals.received], device=accelerator.device)).max())

    def _due(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.step == self.run.config.steps)

    def _train(self, batches: Iterator[Any]) -> None:
        """Do the next step. If a picture cannot be read, save a checkpoint, if there are no other processes."""
        run = self.run
        try:
            loss, norm = run.step(self.step + 1, batches, self.clock)
        except (ValueError, OSError):
            self._report()
            if run.accelerator.num_processes == 1 and run.config.checkpoint_every:
                self._save()
            raise
        self.step += 1
        self.window.add(loss, norm)
        self.log.advance()

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
        self.log.advance(loss=f"{loss:.4f}", **{"images/s": f"{images / seconds:.0f}"})
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
            last = f"the last is of step {self.saved}" if self.saved else "there is none before"
            warn(f"no checkpoint at step {step} ({problem}); {last}, in {self.checkpoints.folder}")
            self.log.write(step, no_checkpoint=problem)

    def _evaluate(self) -> None:
        self.log.write(self.step, held_out_loss=self.run.held_out_loss())

    def _preview(self) -> None:
        run, config = self.run, self.run.config
        steps, classes = min(config.preview_steps, run.objective.T), len(run.classes)
        settings = (config.preview_images, steps, classes, config.seed, run.share.size)
        made: list[Image.Image | None] = []

        def show() -> None:
            made.append(preview(run.accelerator, run.pipeline(), *settings))
            if made[0] is not None:
                folder = Path(config.output) / "previews"
                folder.mkdir(parents=True, exist_ok=True)
                made[0].save(file := io.BytesIO(), format="PNG")
                write_file(folder / f"step-{self.step:08d}.png", file.getvalue())
                self.log.picture(self.step, made[0])

        if problem := attempt(f"no preview at step {self.step}", show):
            self.log.write(self.step, no_preview=problem)
