"""A training run: one optimiser step, the averaged weights, and the state that a checkpoint keeps."""

import dataclasses
import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel
from discrete import DiscreteObjective
from guard.reading import read_object
from pictures import Feed, Pictures, Share, Stream, to_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddim_plugin import DiscreteDDIMScheduler, GeneralizedDDIMPipeline, GeneralizedDDIMScheduler
from ddim_plugin.pipelines.loop import SELF_CONDITIONING

from .config import TrainConfig, learning_rate
from .objective import ImportanceTimes, Noised, Objective, draw_times, log_normal_times
from .report import Clock
from .settings import write_json

ENTRIES = dict.fromkeys(("step", "processes", "skipped", "format", "seen"), int)
ENTRIES |= dict.fromkeys(("data", "config", "scheduler", "unet"), dict)
"""Types of the entries of `run.json`."""

EARLIER = {"format": 0, "seen": 0, "scheduler": {}, "unet": {}}
"""Entries that version 0.1 did not write. It kept settings of both parts in `config`."""

FORMAT = 1
"""Number of the format of checkpoints, to raise if older code cannot read them. Those of version 0.1 have none."""

SKIPS = 50
"""Steps in a row that fp16's scaler may skip; each halves its scale."""


@dataclass
class Run:
    """Everything that a training run consists of.

    `network` is what Accelerate made of `unet`; `average` holds the moving average of its weights. `classes` are the
    names of the labels, `eval_set` the held-out pictures, uint8 (N, C, H, W), and their labels (N,). `shift` is that of
    the drawn times. `seen` counts the pictures of all steps, those of earlier epochs again.
    """

    config: TrainConfig
    accelerator: Accelerator
    feed: Feed
    share: Share
    scheduler: GeneralizedDDIMScheduler | DiscreteDDIMScheduler
    objective: Objective | DiscreteObjective
    unet: UNet2DModel
    network: torch.nn.Module
    optimizer: Any
    average: EMAModel
    importance: ImportanceTimes | None
    classes: tuple[str, ...]
    eval_set: tuple[Tensor, Tensor | None] | None
    dtype: torch.dtype
    shift: float = 1.0
    seen: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0

    # ---- one step ------------------------------------------------------------------------------------------------

    def step(self, step: int, batches: Iterator, clock: Clock) -> tuple[Tensor, Tensor]:
        """Do optimiser step 1, 2, … Returns (loss, norm of the gradient), on the device.

        Times, dropped labels and noise depend on the seed, the step and, for the noise, the process.
        Raises FloatingPointError if fp16 keeps overflowing.
        """
        config, accelerator, share = self.config, self.accelerator, self.share
        rng = np.random.default_rng([config.seed, 2, step])
        times, weights = self._draw_times(rng)
        dropped = rng.random(config.batch_size) < config.label_dropout
        first = int(rng.integers(2))
        noise: tuple[Tensor, ...] = ()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        total, norm = torch.zeros((), device=accelerator.device), torch.zeros((), device=accelerator.device)
        for part in range(share.parts):
            images, labels = clock.wait(batches)
            if labels is not None:
                without = torch.from_numpy(share.of(dropped, part)).to(labels.device, non_blocking=True)
                labels = torch.where(without, len(self.classes), labels)
            noise = noise or self._noise((share.size * share.parts, *images.shape[1:]), step).chunk(share.parts)
            t = torch.from_numpy(share.of(times, part)).to(images.device, non_blocking=True)
            batch = self.objective.noised(self._to_model(images), noise[part], t)
            with accelerator.accumulate(self.network):
                x = self._input(self.network, batch, labels, first)
                losses = self.objective(self._predict(self.network, x, t, labels), batch)
                if weights is not None:
                    self.importance.record(accelerator.gather(t), accelerator.gather(losses.detach()))
                    losses = losses * torch.from_numpy(share.of(weights, part)).to(losses)
                loss = losses.mean()
                accelerator.backward(loss)
                total += loss.detach() / share.parts
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.network.parameters(), config.max_grad_norm or math.inf)
                self.optimizer.step()
                self.optimizer.zero_grad()
        if self._was_skipped(step):
            norm = torch.zeros_like(total)
        self.average.step(self.network.parameters())
        self.seen += config.batch_size
        return total, torch.as_tensor(0.0 if norm is None else _whole(norm), device=total.device)

    def _draw_times(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray | None]:
        if self.importance is not None:
            return self.importance.draw(self.config.batch_size, rng)
        if self.config.times == "log_normal":
            return log_normal_times(self.config.batch_size, self.scheduler.path, rng), None
        return draw_times(self.config.times, self.config.batch_size, self.objective.T, rng, self.shift), None

    def _to_model(self, images: Tensor) -> Tensor:
        """Map bytes to the range of the path: −1..1, or the 0..1 of NCSN++."""
        images, (low, high) = to_model(images), getattr(self.scheduler, "image_range", (-1, 1))
        return images if low == -1 else low + (high - low) * (images + 1) / 2

    def _noise(self, shape: tuple[int, ...], step: int) -> Tensor:
        seed = np.random.SeedSequence([self.config.seed, 3, step, self.share.rank]).generate_state(1, np.uint64)
        device = self.accelerator.device
        generator = torch.Generator(device).manual_seed(int(seed[0] >> np.uint64(1)))
        return torch.randn(shape, generator=generator, device=device)

    def _predict(self, network: torch.nn.Module, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        x = x.to(self.dtype)
        if self.config.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        t = self.objective.timesteps(t)
        return network(x, t, class_labels=labels).sample  # under autocast, which Accelerate has added to `network`

    def _input(self, network: torch.nn.Module, batch: Noised, labels: Tensor | None, first: int) -> Tensor:
        """Return x_t, or for self-conditioning x_t and x̂0, (B, 2C, H, W) (Chen et al. 2022).

        x̂0 is that of a pass without gradient for every second image, from image `first` on, and 0 for the others.
        """
        seen = self.objective.seen(batch.x, batch.t)
        if not self.config.self_conditioning:
            return seen
        rows, guess = slice(first, None, 2), torch.zeros_like(batch.x)
        if len(x := seen[rows]):
            t, labels = batch.t[rows], None if labels is None else labels[rows]
            with torch.no_grad():
                output = self._predict(network, torch.cat([x, torch.zeros_like(x)], 1), t, labels)
            guess[rows] = self.objective.guess(output, batch.x[rows], t)
        return torch.cat([seen, guess], 1)

    def _was_skipped(self, step: int) -> bool:
        """Whether fp16's scaler saw an overflow, skipped the step and lowered its scale."""
        if not self.accelerator.optimizer_step_was_skipped:
            self.skipped_in_a_row = 0
            return False
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row == SKIPS:
            raise FloatingPointError(f"gradients overflow in fp16, {SKIPS} times in a row, up to step {step}")
        return True

    # ---- the averaged weights ------------------------------------------------------------------------------------

    def averaged(self) -> UNet2DModel:
        """Return a network with the averaged weights. All processes call it: FSDP's shards are put together."""
        with torch.device("meta"):
            unet = UNet2DModel.from_config(self.unet.config)
        names = (name for name, _ in unet.named_parameters())
        weights = {name: _whole(value) for name, value in zip(names, self.average.shadow_params, strict=True)}
        unet.load_state_dict(weights, assign=True)
        return unet.eval().requires_grad_(False)

    def pipeline(self) -> GeneralizedDDIMPipeline:
        """Return the averaged weights as a pipeline. All processes call it."""
        pipe = GeneralizedDDIMPipeline(self.averaged(), type(self.scheduler).from_config(self.scheduler.config))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Return the loss of the averaged weights on held-out pictures, always at the same times and noise."""
        images, labels = self.eval_set
        unet, device, count = self.averaged(), self.accelerator.device, len(images)
        times = 1 + (np.arange(count) * self.objective.T) // count  # evenly over 1..T
        times = torch.from_numpy(np.random.default_rng(self.config.seed).permutation(times))
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(self.config.seed))
        total = torch.zeros((), device=device)
        for rows in torch.arange(self.share.rank, count, self.share.processes).split(self.share.size):
            t = times[rows].to(device)
            batch = self.objective.noised(self._to_model(images[rows].to(device)), noise[rows].to(device), t)
            given = None if labels is None else labels[rows].to(device)
            with self.accelerator.autocast():
                x = self._input(unet, batch, given, 0)
                output = unet(x, self.objective.timesteps(t), class_labels=given).sample
            total += self.objective(output, batch).sum()
        return float(self.accelerator.reduce(total, "sum")) / count

    # ---- the state in a checkpoint -------------------------------------------------------------------------------

    def write(self, folder: Path, step: int) -> None:
        """Save the whole state to a folder. All processes call it."""
        self.accelerator.save_state(str(folder))
        if isinstance(self.feed.pictures, Stream):
            write_json(folder / f"stream-{self.share.rank}.json", {"epochs": self.feed.epochs})
        weights = self.averaged().state_dict()
        if self.accelerator.is_main_process:
            save_file({name: value.contiguous() for name, value in weights.items()}, folder / "ema.safetensors")
            if self.importance is not None:
                save_file(self.importance.state_dict(), folder / "times.safetensors")
            state = {"format": FORMAT, "step": step, "processes": self.share.processes, "data": self.data_set()}
            state |= {"seen": self.seen, "skipped": self.skipped}
            for name, part in {"unet": self.unet, "scheduler": self.scheduler}.items():  # for a pipeline made of this
                known = {*inspect.signature(type(part).__init__).parameters, SELF_CONDITIONING}
                state[name] = {key: value for key, value in part.config.items() if key in known}
            write_json(folder / "run.json", state | {"config": dataclasses.asdict(self.config)})

    def read(self, folder: Path, state: dict[str, Any]) -> int:
        """Load a checkpoint, of which `run.json` is the `state`; return its step.

        Raises ValueError if the data set is another one.
        """
        if state["data"] != self.data_set():
            raise ValueError(f"the data set is not the one of {folder}: {state['data']}, now {self.data_set()}")
        if self.share.processes != state["processes"]:
            change = f"{state['processes']} processes, now {self.share.processes}"
            self.accelerator.print(f"note: this run had {change}: other noise from here on")
        self.accelerator.load_state(str(folder))
        self.accelerator.step = 0  # it counts parts of a batch, and every step begins with the first
        epochs = folder / f"stream-{self.share.rank}.json"
        if isinstance(self.feed.pictures, Stream) and self.share.processes == state["processes"]:
            self.feed.epochs = read_object(epochs)["epochs"]
        restore_average(self.average, self.unet, load_file(folder / "ema.safetensors"), state["step"])
        if self.importance is not None:
            self.importance.load_state_dict(load_file(folder / "times.safetensors"))
        self.skipped, self.seen = state["skipped"], state["seen"]
        return state["step"]

    def data_set(self) -> dict[str, Any]:
        """Return what identifies the data set."""
        pictures = self.feed.pictures
        count = pictures.count if isinstance(pictures, Pictures) else None
        return {"images": count, "classes": list(self.classes)}


def read_state(folder: Path) -> dict[str, Any]:
    """Read `run.json` of a checkpoint. Raises ValueError if it is of a newer version, or an entry lacks or is wrong."""
    state, file = read_object(folder / "run.json"), folder / "run.json"
    number = state.get("format", 0)
    if type(number) is int and number > FORMAT:
        raise ValueError(
            f"{folder} has format {number}, and this version reads formats up to {FORMAT}: upgrade ddim-plugin, or "
            "start a new run"
        )
    if missing := [key for key in ENTRIES if key not in EARLIER | state]:
        raise ValueError(f"{file} has no {', '.join(missing)}: pass another checkpoint")
    for key, kind in ENTRIES.items():
        _check(file, key, (EARLIER | state)[key], kind)
    given = {"batch_size": 0, "unet": {}} | state["config"]
    _check(file, "batch_size in its config", given["batch_size"], int)
    _check(file, "unet in its config", given["unet"] or {}, dict)
    state = {"seen": state["step"] * given["batch_size"], "scheduler": given.get("scheduler")} | state
    _check(file, "scheduler", state["scheduler"], dict)
    return state


def _check(file: Path, key: str, value: Any, kind: type) -> None:
    """Check an entry of `run.json`. Raises ValueError if it is of another type, or a negative number."""
    if type(value) is not kind or (kind is int and value < (key == "processes")):
        what = "an object" if kind is dict else "a whole number"
        raise ValueError(f"{file} has {value!r} for {key}, and needs {what}: pass another checkpoint")


def read_network(folder: Path, kind: str = "ema") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the settings of UNet2DModel and the weights in a checkpoint, which are "ema" (averaged) or "raw".

    Raises ValueError if they cannot be read, or the checkpoint is of a newer version.
    """
    state, file = read_state(folder), folder / {"ema": "ema.safetensors", "raw": "model.safetensors"}[kind]
    try:
        weights = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read the {kind} weights of {folder}: {error}") from error
    settings = state.get("unet")
    if settings is None:  # version 0.1 kept no more than [unet], and had resolution in the settings of the run
        (out_channels, *_), (_, channels, *_) = weights["conv_out.weight"].shape, weights["conv_in.weight"].shape
        _check(folder / "run.json", "resolution in its config", size := state["config"].get("resolution"), int)
        settings = {"in_channels": channels, "out_channels": out_channels, "sample_size": size}
        if "class_embedding.weight" in weights:
            settings["num_class_embeds"] = len(weights["class_embedding.weight"])
        table = state["config"].get("unet") or {}
        settings |= {key: None if value == "none" else value for key, value in table.items()}
    return settings, weights


def make_average(network: torch.nn.Module, decay: float, warmup: bool) -> EMAModel:
    """Start a moving average of a network's weights, or of its shards, in float32.

    With `warmup` the decay rises as 1 − n^(−3/4) over the steps n, up to `decay`, so that the first, random weights
    are forgotten.
    """
    average = EMAModel(
        network.parameters(),
        decay=decay,
        min_decay=0.0 if warmup else decay,
        update_after_step=0 if warmup else -1,  # by default the first step copies the weights
        use_ema_warmup=warmup,
        power=0.75,
        foreach=True,
    )
    average.to(dtype=torch.float32)
    return average


@torch.no_grad()
def restore_average(average: EMAModel, unet: UNet2DModel, weights: dict[str, Tensor], step: int) -> None:
    """Continue an average after `step` from its weights by name, whole or to be put in shards as those of `unet`."""
    average.optimization_step = step
    for (name, _), value in zip(unet.named_parameters(), average.shadow_params, strict=True):
        saved = weights[name].to(value.device)
        if hasattr(value, "full_tensor"):
            from torch.distributed.tensor import distribute_tensor

            saved = distribute_tensor(saved, value.device_mesh, value.placements)
        value.copy_(saved)


def _whole(value: Tensor) -> Tensor:
    """Return a tensor put together from its shards (FSDP), if it has any."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value
