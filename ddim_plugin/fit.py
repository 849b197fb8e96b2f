"""τ for few steps that is fitted to a model, on its own trajectories and nothing else."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor
from tqdm.auto import tqdm

from . import tau as spacings
from .pipeline import GeneralizedDDIMPipeline
from .schedulers import MultistepDDIMScheduler
from .search import Trajectories, descend, search_trajectories

NODES = 28
"""Times that the dynamic programming chooses from."""

NUMBERS = 2**20
"""Numbers of the images that it looks at, at most."""


class Fitted(NamedTuple):
    """τ for S steps, and what it was worth on images that it was not fitted to.

    Attributes:
        timesteps: network times, descending; those of the spacing "few_steps" where nothing better was found.
        error: mean over the images of the root mean square distance to the converged solution, in units of the
            network's images (−1..1).
        default_error: that of the spacing "few_steps".
    """

    timesteps: list[int]
    error: float
    default_error: float


@torch.no_grad()
def fit_timesteps(
    pipe: GeneralizedDDIMPipeline,
    steps: Sequence[int] = (5, 8, 10, 15, 20),
    num_images: int = 128,
    teacher_steps: int = 200,
    seed: int = 0,
    batch_size: int = 64,
    class_labels: Sequence[int] | None = None,
    guidance_scale: float = 1.0,
    null_class_label: int | None = None,
) -> dict[int, Fitted]:
    """Find τ for few steps with `MultistepDDIMScheduler`, and give the pipeline such a scheduler that knows it.

    Solutions of the ODE for `num_images` draws of x_T are made with `teacher_steps` steps. On half of them τ is found
    by dynamic programming (`ddim_plugin.search.search_trajectories`), and from there, or from a spacing where that is
    better, moved time by time to where the sampler's own images are nearer to the solutions. It is taken where it is
    better on the other half too. `pipe.scheduler` is then a `MultistepDDIMScheduler` with `fitted_timesteps`, which
    are saved with it and used wherever that many steps are asked for.

    Args:
        pipe: the model. The settings of a `MultistepDDIMScheduler` in it are kept.
        steps: the S to fit, each from 1 to T.
        num_images: x_T of image i is drawn from `seed` + i.
        teacher_steps: S of the solutions, or T where that is less.
        batch_size: images at a time.
        class_labels: of a class-conditional network, one for each image; in turn all but the label of no class where
            guidance is on, all where it is not.
        guidance_scale, null_class_label: as in the pipeline's call.

    Returns:
        For each S what was found.

    Raises:
        ValueError: before the network is called, for numbers that cannot be, or a scheduler that adds noise.
    """
    scheduler = MultistepDDIMScheduler.from_config(pipe.scheduler.config)
    T = scheduler.config.num_train_timesteps
    for name, value, least in (("num_images", num_images, 2), ("batch_size", batch_size, 1)):
        if not spacings.is_integer(value) or value < least:
            raise ValueError(f"{name} must be an integer from {least} on, not {value!r}")
    wrong = [S for S in steps if not spacings.is_integer(S) or not 1 <= S <= T]
    if wrong or not len(steps):
        raise ValueError(f"steps must be integers from 1 to {T} (num_train_timesteps), not {wrong or steps!r}")
    if not spacings.is_integer(teacher_steps) or min(teacher_steps, T) < 2 * max(steps):
        raise ValueError(
            f"teacher_steps={teacher_steps!r} of {T} times must be twice the largest of the steps ({max(steps)}) at "
            "least: the solutions are what the steps are compared with"
        )
    before = pipe.scheduler
    pipe.scheduler = scheduler
    try:
        pipe._check_deterministic()
        fitter = _Fitter(pipe, num_images, seed, batch_size, class_labels, guidance_scale, null_class_label)
        found = fitter.fit(sorted(set(steps)), min(teacher_steps, T))
    except BaseException:
        pipe.scheduler = before
        raise
    known = dict(scheduler.config.fitted_timesteps or {})
    for S, fitted in found.items():
        known.pop(str(S), None)
        if fitted.error < fitted.default_error:
            known[str(S)] = fitted.timesteps
    pipe.scheduler = MultistepDDIMScheduler.from_config(scheduler.config, fitted_timesteps=known or None)
    return found


class _Fitter:
    """A model, draws of x_T, and the solutions from them."""

    def __init__(
        self,
        pipe: GeneralizedDDIMPipeline,
        num_images: int,
        seed: int,
        batch_size: int,
        class_labels: Sequence[int] | None,
        guidance_scale: float,
        null_class_label: int | None,
    ):
        classes = pipe.unet.config.num_class_embeds
        if classes and class_labels is None:
            used = classes if guidance_scale == 1 else max(1, classes - 1)
            class_labels = [i % used for i in range(num_images)]
        shape, self.device = pipe._shape(num_images, None), pipe._execution_device
        self.pipe, self.scheduler, self.batch_size = pipe, pipe.scheduler, batch_size
        self.condition = pipe._condition(class_labels, guidance_scale, null_class_label, num_images, self.device)
        pipe._check_channels()
        seeds = [Generator().manual_seed(seed + i) for i in range(num_images)]
        draws = [torch.randn(shape[1:], generator=each) for each in seeds]
        self.noise = torch.stack(draws).to(self.device)
        self.half = num_images // 2
        self.solutions = torch.empty(0)

    def fit(self, steps: list[int], teacher_steps: int) -> dict[int, Fitted]:
        path = self._solve(teacher_steps)
        programmed = search_trajectories(
            self.scheduler.alpha_bar, path, min(max(steps), len(path.times)), spacings.NOISE
        )
        T, found = self.scheduler.config.num_train_timesteps, {}
        held = range(self.half, len(self.noise))
        for S in tqdm(steps, desc="fitting τ"):
            default = spacings.tau("few_steps", S, T, alpha_bar=self.scheduler.alpha_bar).tolist()
            starts = [default, *([programmed[S - 1].tau.tolist()] if len(programmed) >= S else [])]
            start = min(starts, key=lambda tau: self._error(tau, range(self.half)))
            tau, _ = descend(start, T, lambda tau: self._error(tau, range(self.half)))
            error, default_error = self._error(tau, held), self._error(default, held)
            if not error < default_error:
                tau, error = default, default_error
            found[S] = Fitted([t - 1 for t in reversed(tau)], error, default_error)
        return found

    def _solve(self, S: int) -> Trajectories:
        """The solutions, and for the dynamic programming the first half of them at some times."""
        T = self.scheduler.config.num_train_timesteps
        teacher = spacings.linear(S, T)
        wanted = T * np.linspace(0, 1, NODES + 1)[1:] ** 1.5
        nodes = sorted({int(teacher[np.searchsorted(teacher, t)]) for t in np.round(wanted)}, reverse=True)
        kept = max(1, min(self.half, NUMBERS // math.prod(self.noise.shape[1:])))
        x, eps, solutions = {t: [] for t in nodes}, {t: [] for t in nodes}, []

        def keep(t: int, sample: Tensor, step: Any) -> None:
            if t in x:
                x[t].append(sample.cpu())
                eps[t].append(step.pred_epsilon.cpu())

        for rows in self._batches(range(len(self.noise))):
            solutions.append(self._sample(teacher.tolist(), rows, keep))
        self.solutions = torch.cat(solutions).clamp(-1, 1)
        columns = [torch.stack([torch.cat(each[t])[:kept].flatten() for t in nodes]) for each in (x, eps)]
        ends = (self.noise[:kept].cpu().flatten(), torch.cat(solutions)[:kept].cpu().flatten())
        return Trajectories(np.array(nodes), *columns, *ends)

    def _error(self, tau: list[int], images: range) -> float:
        """The mean distance of these images to their solutions."""
        errors = []
        for rows in self._batches(images):
            made = self._sample(tau, rows).clamp(-1, 1)
            errors.append((made - self.solutions[rows]).flatten(1).square().mean(1).sqrt())
        return float(torch.cat(errors).mean())

    def _batches(self, images: range) -> list[slice]:
        size = self.batch_size
        return [slice(start, min(start + size, images.stop)) for start in range(images.start, images.stop, size)]

    def _sample(self, tau: list[int], rows: slice, keep: Any = None) -> Tensor:
        """x_0 along τ, increasing times; `keep` is called with each time, sample and step."""
        pipe, scheduler, condition = self.pipe, self.scheduler, self.condition.rows(rows)
        x = self.noise[rows].to(torch.promote_types(pipe.unet.dtype, torch.float32))
        scheduler.set_timesteps(timesteps=[t - 1 for t in reversed(tau)], device=self.device)
        for t, time in zip(scheduler.timesteps, reversed(tau), strict=False):
            output = pipe._predict(x.to(pipe.unet.dtype), t, condition)
            step = scheduler.step(output, t, x, eta=0.0)
            if keep:
                keep(time, x, step)
            x = step.prev_sample
        return x
