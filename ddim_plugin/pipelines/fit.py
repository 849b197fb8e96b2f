"""Fit τ for few steps to a model, on its own trajectories."""

from collections.abc import Callable, Sequence
from copy import copy
from functools import cache, partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..process import spacings
from ..schedulers import MultistepDDIMScheduler
from .generation import GeneralizedDDIMPipeline
from .loop import Condition, batches, check_count, finite

Times = tuple[int, ...]  # τ, increasing
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
    _check_numbers(scheduler.config.num_train_timesteps, steps, num_images, teacher_steps, batch_size)
    fitting = copy(pipe)
    fitting.scheduler = scheduler
    fitting._check_deterministic()
    if class_labels is None:
        class_labels = _labels(pipe.unet.config.num_class_embeds, num_images, guidance_scale, null_class_label)
    condition = fitting._condition(class_labels, guidance_scale, null_class_label, num_images)
    noise = fitting._noise(range(seed, seed + num_images))[1].to(condition.device)
    found = _search(fitting, noise, condition, batch_size, sorted(set(steps)), teacher_steps)
    known = {S: times for S, times in (scheduler.config.fitted_timesteps or {}).items() if int(S) not in found}
    known |= {str(S): fitted.timesteps for S, fitted in found.items() if fitted.error < fitted.default_error}
    pipe.scheduler = MultistepDDIMScheduler.from_config(scheduler.config, fitted_timesteps=known or None)
    return found


def _check_numbers(T: int, steps: Sequence[int], num_images: int, teacher_steps: int, batch_size: int) -> None:
    check_count("num_images", num_images)
    check_count("batch_size", batch_size, 1)
    if not isinstance(steps, Sequence):
        raise ValueError(f"steps must be a list of step counts, not {steps!r}")
    wrong = [S for S in steps if not spacings.is_integer(S) or not 1 <= S <= T]
    if wrong or not steps:
        raise ValueError(f"steps must be integers from 1 to {T} (num_train_timesteps), not {wrong or steps!r}")
    if not spacings.is_integer(teacher_steps) or min(teacher_steps, T) < 2 * max(steps):
        raise ValueError(
            f"teacher_steps={teacher_steps!r} of {T} timesteps must be at least twice the largest of the steps "
            f"({max(steps)}): the solutions are the reference for the steps"
        )


def _labels(classes: int | None, num: int, guidance_scale: float, null_class_label: int | None) -> list[int] | None:
    """Return a label for each image, spread over the classes."""
    if not classes:
        return None
    null = classes - 1 if null_class_label is None else null_class_label
    used = [label for label in range(classes) if guidance_scale == 1 or classes == 1 or label != null]
    spread = used[:: max(1, len(used) // num)]
    return [spread[i % len(spread)] for i in range(num)]


def _search(
    pipe: GeneralizedDDIMPipeline,
    noise: Tensor,
    condition: Condition,
    batch_size: int,
    steps: list[int],
    teacher_steps: int,
) -> dict[int, Fitted]:
    """Fit τ for each S to solutions from `noise`, draws of x_T."""
    scheduler, half = pipe.scheduler, len(noise) // 2
    alpha_bar, T = scheduler.alpha_bar, scheduler.config.num_train_timesteps

    def sample(scheduler: MultistepDDIMScheduler, tau: Sequence[int], images: range) -> Tensor:
        scheduler._fitted[len(tau)] = np.array(tau)  # a spacing's own plan: the loop begins with x_T
        scheduler.set_timesteps(len(tau), device=noise.device, eta=0.0)
        if not np.array_equal(scheduler._tau, tau):
            raise ValueError("timesteps of flow matching are those of its shift: change shift, or pass timesteps")
        x = noise.to(condition.state_dtype) * scheduler.init_noise_sigma
        rows = batches(images, batch_size)
        return torch.cat([pipe._run(scheduler, x[i], scheduler.timesteps, condition.rows(i)) for i in rows])

    @cache
    def error(images: range, tau: Times) -> float:
        """Compute the mean distance of these images to their solutions."""
        sampled = sample(scheduler, tau, images).clamp(*pipe._image_range)
        return float((sampled - solutions[images.start : images.stop]).flatten(1).square().mean(1).sqrt().mean())

    plain = MultistepDDIMScheduler.from_config(scheduler.config, fitted_timesteps=None)
    teacher = MultistepDDIMScheduler.from_config(scheduler.config, **TEACHER)
    tau = spacings.linear(min(teacher_steps, T), T)
    solutions, found = finite(sample(teacher, tau, range(len(noise)))).clamp(*pipe._image_range), {}
    seen, held = partial(error, range(half)), partial(error, range(half, len(noise)))
    for S in tqdm(steps, desc="fitting τ"):
        plain.set_timesteps(S, eta=0.0)
        known = [_whole(plain._tau), *(times for n, times in scheduler._fitted.items() if n == S)]
        powers = [spacings.few_steps(S, alpha_bar, power) for power in POWERS]
        known, powers = ([tuple(times.tolist()) for times in each] for each in (known, powers))
        starts = sorted(known + powers, key=seen)[:2]
        tau, _ = min((descend(start, T, seen) for start in starts), key=lambda pair: pair[1])
        tau = min([*known, tau], key=held)
        found[S] = Fitted([t - 1 for t in reversed(tau)], held(tau), held(known[0]))
    return found


def _whole(tau: np.ndarray) -> np.ndarray:
    """Round times to distinct integers from 1."""
    places = np.arange(1, len(tau) + 1)
    return (np.maximum.accumulate(np.maximum(np.rint(tau) - places, 0)) + places).astype(int)


def descend(tau: Times, T: int, cost: Callable[[Times], float], rounds: int = 4) -> tuple[Times, float]:
    """Move the times of τ one by one to a lower `cost`, by a third of a gap and then less, and return both."""
    best = cost(tau)
    step = max(1, (tau[-1] - tau[0]) // (3 * max(1, len(tau) - 1)))
    for _ in range(rounds):
        for i in reversed(range(len(tau))):
            for change in (-step, step):
                moved = (*tau[:i], tau[i] + change, *tau[i + 1 :])
                if not 1 <= moved[i] <= T or any(low >= high for low, high in pairwise(moved)):
                    continue
                found = cost(moved)
                if found < best:
                    best, tau = found, moved
                    break
        step = max(1, step // 2)
    return tau, best
