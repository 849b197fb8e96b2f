"""Fit τ for few steps to a model, on its own trajectories."""

from collections.abc import Callable, Sequence
from copy import copy
from functools import cache, partial
from itertools import pairwise, product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..process import spacings
from ..schedulers import MultistepDDIMScheduler
from .generation import GeneralizedDDIMPipeline
from .loop import batches, check_count, finite

Times = tuple[int, ...]  # τ, increasing
Cost = Callable[[Times], float]
POWERS = (0.75, 1.0, 1.5, 2.0, 3.0)  # exponents of the power laws that the search tries first
TEACHER = {"solver_order": 3, "lower_order_final": False}  # settings of the solver that computes the solutions


class Fitted(NamedTuple):
    """Network timesteps for S steps, descending, and their error on images that they were not fitted to."""

    timesteps: list[int]
    error: float  # mean over the images of the root mean square distance to the solution
    default_error: float  # that of the spacing "few_steps"


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
    """Fit timesteps for few steps to a model, and give the pipeline a scheduler with them.

    The ODE is solved from `num_images` draws of x_T, with `teacher_steps` steps of order 3. The search starts from the
    best two of "few_steps", power laws and an earlier fit. It moves each time so that the sampler's images come nearer
    to half of the solutions. The best τ on the other half is used. `pipe.scheduler` becomes a `MultistepDDIMScheduler`
    with `fitted_timesteps`, which are saved with it and used for those step counts.

    Args:
        pipe: the model. Settings of a `MultistepDDIMScheduler` in it are kept, except that its spacing is "few_steps".
        steps: the S to fit, each from 1 to T/2.
        num_images: number of images; x_T of image i is drawn from `seed` + i.
        teacher_steps: S of the solutions, or T if that is less.
        class_labels: for a class-conditional network, one for each image. By default they are spread over all classes,
            without the label of "no class" if guidance is on.
        batch_size, guidance_scale, null_class_label: as for `encode` and the pipeline's call.

    Raises ValueError for numbers out of range, a scheduler that adds noise, and images that are not finite.
    """
    scheduler = MultistepDDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="few_steps")
    T = scheduler.config.num_train_timesteps
    check_count("num_images", num_images)
    check_count("teacher_steps", teacher_steps)
    check_count("batch_size", batch_size, 1)
    most = min(teacher_steps, T) // 2
    if (
        not isinstance(steps, Sequence)
        or not steps
        or not all(spacings.is_integer(S) and 1 <= S <= most for S in steps)
    ):
        limits = f"half of teacher_steps={teacher_steps} and of the {T} timesteps"
        raise ValueError(f"steps must be a list of integers from 1 to {most}, {limits}, not {steps!r}")
    fitting = copy(pipe)
    fitting.scheduler = scheduler
    fitting._check_deterministic()
    if class_labels is None:
        class_labels = _labels(pipe.unet.config.num_class_embeds, num_images, guidance_scale, null_class_label)
    condition = fitting._condition(class_labels, guidance_scale, null_class_label, num_images)
    noise = fitting._noise(range(seed, seed + num_images))[1].to(condition.device, condition.state_dtype)

    def sample(scheduler: MultistepDDIMScheduler, tau: Sequence[int], images: range) -> Tensor:
        scheduler._fitted[len(tau)] = np.array(tau)  # a spacing's own plan: the loop begins with x_T
        scheduler.set_timesteps(len(tau), device=noise.device, eta=0.0)
        x, times = noise * scheduler.init_noise_sigma, scheduler.timesteps
        rows = batches(images, batch_size)
        return torch.cat([fitting._run(scheduler, x[i], times, condition.rows(i)) for i in rows])

    @cache
    def error(images: range, tau: Times) -> float:
        """Compute the mean distance of these images to their solutions."""
        sampled = sample(scheduler, tau, images).clamp(*scheduler.image_range)
        return float((sampled - solutions[images.start : images.stop]).flatten(1).square().mean(1).sqrt().mean())

    teacher = MultistepDDIMScheduler.from_config(scheduler.config, **TEACHER)
    tau = spacings.linear(min(teacher_steps, T), T)
    solutions = finite(sample(teacher, tau, range(num_images))).clamp(*scheduler.image_range)
    seen, held = (partial(error, images) for images in (range(num_images // 2), range(num_images // 2, num_images)))
    found = {S: _search(S, scheduler, seen, held) for S in tqdm(sorted(set(steps)), desc="fitting τ")}
    known = {S: times for S, times in (scheduler.config.fitted_timesteps or {}).items() if int(S) not in found}
    known |= {str(S): fitted.timesteps for S, fitted in found.items() if fitted.error < fitted.default_error}
    pipe.scheduler = MultistepDDIMScheduler.from_config(scheduler.config, fitted_timesteps=known or None)
    return found


def _labels(classes: int | None, num: int, guidance_scale: float, null_class_label: int | None) -> list[int] | None:
    if not classes:
        return None
    null = classes - 1 if null_class_label is None else null_class_label
    used = [label for label in range(classes) if guidance_scale == 1 or classes == 1 or label != null]
    return [used[i * max(1, len(used) // num) % len(used)] for i in range(num)]


def _search(S: int, scheduler: MultistepDDIMScheduler, seen: Cost, held: Cost) -> Fitted:
    plain = MultistepDDIMScheduler.from_config(scheduler.config, fitted_timesteps=None)
    plain.set_timesteps(S, eta=0.0)
    T = scheduler.config.num_train_timesteps
    default = tuple(spacings._spread(plain._tau[::-1], T).tolist())
    known = [default, *(tuple(times.tolist()) for n, times in scheduler._fitted.items() if n == S)]
    powers = [tuple(spacings.few_steps(S, scheduler.alpha_bar, power).tolist()) for power in POWERS]
    starts = sorted(known + powers, key=seen)[:2]
    moved = min((descend(start, T, seen) for start in starts), key=seen)
    tau = min([*known, moved], key=held)
    return Fitted([scheduler.path.timestep(t) for t in reversed(tau)], held(tau), held(default))


def descend(tau: Times, T: int, cost: Cost, rounds: int = 4) -> Times:
    """Move the times of τ one by one to a lower `cost`, by a third of a gap and then less."""
    step = max(1, (tau[-1] - tau[0]) // (3 * max(1, len(tau) - 1)))
    for _ in range(rounds):
        for i, change in product(reversed(range(len(tau))), (-step, step)):
            moved = (*tau[:i], tau[i] + change, *tau[i + 1 :])
            if all(low < high for low, high in pairwise((0, *moved, T + 1))):
                tau = min(tau, moved, key=cost)
        step = max(1, step // 2)
    return tau
