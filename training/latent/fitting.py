"""Minimize a loss in steps, with checkpoints and averaged weights."""

import io
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import guard
import torch
from diffusers.training_utils import EMAModel
from guard.progress import Progress
from guard.writing import write_file
from torch import Tensor, nn

WARMUP, EVERY = 100, 100
"""Steps in which the learning rate rises, and from one printed line to the next."""


@dataclass(frozen=True)
class Schedule:
    """How long to train, and how fast: the learning rate rises in 100 steps, and falls to 2 % as a cosine."""

    steps: int
    learning_rate: float
    ema_decay: float
    save_every: int
    seed: int

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        return self.learning_rate * min(1, (step + 1) / WARMUP) * (0.51 + 0.49 * math.cos(math.pi * step / self.steps))


def fit(
    file: Path,
    settings: dict[str, Any],
    networks: list[Any],
    schedule: Schedule,
    loss_of: Callable[[int, torch.Generator], Tensor],
) -> dict[str, float]:
    """Minimize a loss and give the networks their averaged weights.

    Args:
        file: the checkpoint, which continues an earlier run.
        settings: what an earlier run must have in common with this one.
        loss_of: the loss of a step, from 0 on, with a generator for its noise.

    Returns:
        the seconds and the loss, averaged over some 50 steps.

    Raises:
        ValueError: if the checkpoint has other settings.
        FloatingPointError: if the loss is not finite.
    """
    weights = [each for network in networks for each in network.parameters()]
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.99), weight_decay=0.01)
    average = EMAModel(weights, schedule.ema_decay, foreach=True)
    step, before, loss, began = 0, 0.0, 0.0, time.perf_counter()
    if file.exists():
        held = torch.load(file, weights_only=True)
        if held["settings"] != settings:
            raise ValueError(f"{file} is of a run with other settings. Choose another output, or delete the file")
        step, before, loss = held["step"], held["seconds"], held["loss"]
        for network, values in zip(networks, held["networks"], strict=True):
            network.load_state_dict(values)
        optimizer.load_state_dict(held["optimizer"])
        average.load_state_dict(held["average"])

    def seconds() -> float:
        return before + time.perf_counter() - began

    plan = "ending after this step, with a checkpoint"
    with Progress(schedule.steps, file.stem, "step") as bar, guard.ending_after_a_step(plan) as signals:
        bar.advance(step)
        while step < schedule.steps and not signals.received:
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(step)
            value = loss_of(step, torch.Generator().manual_seed(schedule.seed + 1_000_003 * step))
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            average.step(weights)
            loss, step = value.item() if step == 0 else 0.98 * loss + 0.02 * value.item(), step + 1
            bar.advance()
            if not math.isfinite(loss):
                raise FloatingPointError(f"{file.stem}: the loss is {loss} at step {step}. Lower the learning rate")
            if step % EVERY == 0:
                bar.print(f"{file.stem} {step}/{schedule.steps}: loss {loss:.4f}, {seconds():.0f} s")
            if step % schedule.save_every == 0 or step == schedule.steps or signals.received:
                held = {"settings": settings, "step": step, "seconds": seconds(), "loss": loss}
                held |= {"networks": [each.state_dict() for each in networks]}
                held |= {"optimizer": optimizer.state_dict(), "average": average.state_dict()}
                torch.save(held, buffer := io.BytesIO())
                write_file(file, buffer.getvalue())
        if step < schedule.steps:
            raise guard.Ended(128 + signals.received)
    average.copy_to(weights)
    return {"seconds": seconds(), "loss": loss}
