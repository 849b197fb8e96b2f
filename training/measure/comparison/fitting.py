"""Fit τ for few steps to a model, on its own trajectories."""

from collections.abc import Callable, Sequence
from copy import copy
from functools import cache, partial
from itertools import pairwise, product
from typing import NamedTuple

import numpy as np
from torch import Tensor
from tqdm.auto import tqdm

from ddim_plugin import GeneralizedDDIMPipeline, MultistepDDIMScheduler
from ddim_plugin.pipelines.loop import finite
from ddim_plugin.process import spacings

Times = tuple[int, ...]  # τ, increasing
Cost = Callable[[Times], float]
POWERS = (0.75, 1.0, 1.5, 2.0, 3.0)  # exponents of the power laws that the search tries first
TEACHER = {"solver_order": 3, "lower_order_final": False}  # settings of the solver that computes the solutions


class Fitted(NamedTuple):
    """Network timesteps for S steps, descending, and their error on images that they were not fitted to."""

    timesteps: list[int]
    error: float  # mean over the images of the root mean square distance to the solution
    default_error: float  # that of the spacing "few_steps"


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

    Raises:
        ValueError: for numbers out of range, a scheduler that adds noise, and images that are not finite.
    """
    scheduler = MultistepDDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="few_steps")
    T = scheduler.config.num_train_timesteps
    most = min(teacher_steps, T) // 2
    if not steps or not all(1 <= S <= most for S in steps):
        limits = f"half of teacher_steps={teacher_steps} and of the {T} timesteps"
        raise ValueError(f"steps must be a list of integers from 1 to {most}, {limits}, not {[*steps]}")
    if class_labels is None:
        class_labels = spread_labels(pipe.unet.config.num_class_embeds, num_images, guidance_scale, null_class_label)
    decoding = {"batch_size": batch_size, "guidance_scale": guidance_scale, "null_class_label": null_class_label}
    noise = pipe._noise(range(seed, seed + num_images))[1]
    fitting = copy(pipe)
    fitting.set_progress_bar_config(disable=True)

    def sample(scheduler: MultistepDDIMScheduler, tau: Sequence[int], images: range) -> Tensor:
        scheduler._fitted[len(tau)] = np.array(tau)  # a spacing's own plan: the loop begins with x_T
        fitting.scheduler, rows = scheduler, slice(images.start, images.stop)
        labels = None if class_labels is None else class_labels[rows]
        return fitting.decode(noise[rows], len(tau), class_labels=labels, output_type="latent", **decoding)

    @cache
    def error(images: range, tau: Times) -> float:
        """Compute the mean distance of these images to their solutions."""
        sampled = sample(scheduler, tau, images).clamp(*scheduler.image_range)
        return float((sampled - solutions[images.start : images.stop]).flatten(1).square().mean(1).sqrt().mean())

    teacher = MultistepDDIMScheduler.from_config(scheduler.config, **TEACHER)
    tau = spacings.tau("linear", min(teacher_steps, T), T)
    solutions = finite(sample(teacher, tau, range(num_images))).clamp(*scheduler.image_range)
    seen, held = (partial(error, images) for images in (range(num_images // 2), range(num_images // 2, num_images)))
    found = {S: search(S, scheduler, seen, held) for S in tqdm(sorted(set(steps)), desc="fitting τ")}
    known = {S: times for S, times in (scheduler.config.fitted_timesteps or {}).items() if int(S) not in found}
    known |= {str(S): fitted.timesteps for S, fitted in found.items() if fitted.error < fitted.default_error}
    pipe.scheduler = MultistepDDIMScheduler.from_config(scheduler.config, fitted_timesteps=known or None)
    return found


def spread_labels(classes: int | None, num: int, guidance_scale: float, null_label: int | None) -> list[int] | None:
    """Spread the labels of `num` images over all classes, without that of "no class" if guidance is on."""
    if not classes:
        return None
    null = classes - 1 if null_label is None else null_label
    used = [label for label in range(classes) if guidance_scale == 1 or classes == 1 or label != null]
    return [used[i * max(1, len(used) // num) % len(used)] for i in range(num)]


def search(S: int, scheduler: MultistepDDIMScheduler, seen: Cost, held: Cost) -> Fitted:
    """Search τ of S times by the cost on images that are seen, and choose by that on images that are held out."""
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
