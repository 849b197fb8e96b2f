"""Fit solvers to a model, in the loop of any pipeline, by schedulers that record trajectories and solve for weights."""

import inspect
import math
import time
from collections.abc import Sequence
from copy import copy
from functools import cached_property, partial, wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..process.fitting import SPREADS, Curve, descend, least_squares, refine
from ..process.spacings import Array, integer, is_integer
from ..schedulers.multistep import MultistepDDIMScheduler, guidance_scale, keep_learned
from ..schedulers.step import Evaluation
from .loop import finite, part_of, run_with

MOST_COORDINATES = 4096  # numbers of a sample that are recorded, always the same ones: products are means over them
HELD_OUT = 4  # one image in so many judges the solvers, and does not enter
# Arguments of the call that a fit sets, or that a fitted solver does not have.
OWN = {"num_inference_steps", "generator", "latents", "timesteps", "sigmas", "eta", "batch_size", "output_type"}
OWN |= {"classifier", "classifier_scale"}


@torch.no_grad()
def fit_solver(
    pipe: Any,
    steps: Sequence[int] = (5, 8, 10, 15, 20),
    num_images: int = 64,
    batch_size: int | None = None,
    teacher_steps: int = 100,
    seed: int = 0,
    minutes: float = 0.0,
    **call: Any,
) -> dict[int, dict[str, Any]]:
    """Fit a solver to a model for each number of steps, in the pipeline's own loop, and give the pipeline a scheduler.

    `num_images` draws of x_T are solved with `teacher_steps` steps. Times are searched on these trajectories, and
    weights are solved for step by step while the pipeline samples. A quarter of the images does not enter: a solver is
    kept where these come nearer to their solutions than with the default. `pipe.scheduler` becomes a
    `MultistepDDIMScheduler` with `fitted_solvers`, saved with it and used for those step counts and guidance scale.

    Args:
        pipe: any pipeline of diffusers whose loop calls `scheduler.step` with its timesteps.
        steps: the numbers S of steps to fit.
        batch_size: images in a call of the pipeline; all of them by default.
        seed: noise of image i is drawn from `seed` + i.
        minutes: time to move times and weights together, by Gauss–Newton with finite differences, for all S.
        call: arguments of the pipeline's call: prompts, `guidance_scale`, size. A list of `num_images` has an entry for
            each image, as has a tensor. One text, or the embedding of one, is the prompt of all.

    Returns the solvers with their typical distances "error" and "default_error", network "evaluations" and "seconds".
    Raises ValueError for numbers out of range and arguments that the call does not have, before any evaluation.
    """
    run = _Run(pipe, num_images, batch_size, seed, call)
    integer("teacher_steps", teacher_steps, 2)
    if not steps or not all(is_integer(S) and 1 <= S <= teacher_steps // 2 for S in steps):
        raise ValueError(f"steps must be integers from 1 to half of teacher_steps={teacher_steps}, not {[*steps]}")
    if not 0 <= minutes < math.inf:
        raise ValueError(f"minutes must be a finite number of 0 or more, not {minutes!r}")
    config, plain = pipe.scheduler.config, {"eta": 0.0, "variance_type": "fixed_small", "timestep_spacing": "few_steps"}
    config = MultistepDDIMScheduler.from_config(config, **keep_learned(config, plain)).config
    known, found = {str(S): each for S, each in (config.fitted_solvers or {}).items()}, {}
    config = MultistepDDIMScheduler.from_config(config, fitted_solvers=None).config
    if config.solver_order == 1 or config.denoising_start or config.denoising_end < 1:
        raise ValueError("a fit needs the whole process, and solver_order 2, 3 or 4, or None, not 1")
    teacher, judge = (run(Recorder.from_config(config), teacher_steps, held) for held in (False, True))
    finite(torch.cat([teacher.data, judge.data]))
    for S in tqdm(sorted(set(steps)), desc="fitting"):
        start, before = time.perf_counter(), run.evaluations
        plain = run(Recorder.from_config(config), S, held=True)
        top, solved = (torch.cat([y for y, _ in each.nodes[0]]) for each in (plain, judge))
        if not (top - solved).square().mean() < 0.1 * solved.square().mean():
            raise ValueError(f"{type(pipe).__name__} does not draw x_T from its generators: use another pipeline")
        solver = _fit(run, plain, teacher, minutes / len(set(steps)))
        fitted = run(Recorder.from_config(config, fitted_solvers={str(S): solver}), S, held=True)
        errors = {"default_error": _distance(plain, judge), "error": _distance(fitted, judge)}
        found[S] = solver | errors | {"evaluations": run.evaluations - before, "seconds": time.perf_counter() - start}
    kept = {str(S): each for S, each in found.items() if each["error"] < each["default_error"]}
    pipe.scheduler = MultistepDDIMScheduler.from_config(config, fitted_solvers=(known | kept) or None)
    return found


class _Run:
    """Call a pipeline for the same images with different schedulers."""

    def __init__(self, pipe: Any, number: int, batch_size: int | None, seed: int, call: dict[str, Any]):
        integer("num_images", number, HELD_OUT)
        known = inspect.signature(pipe.__call__).parameters
        if wrong := sorted(each for each in call if each not in known or each in OWN):
            raise ValueError(f"{', '.join(wrong)} cannot be passed on to {type(pipe).__name__}: leave it out")
        if missing := {"num_inference_steps", "generator"} - known.keys():
            raise ValueError(f"the call of {type(pipe).__name__} has no {missing.pop()}: use another pipeline")
        self.pipe, self.evaluations, self.seed, self.number, self.batch_size = copy(pipe), 0, seed, number, batch_size
        self.pipe.set_progress_bar_config(disable=True)
        self.call = call | ({"output_type": "latent"} if "output_type" in known else {})
        held = number // HELD_OUT
        self.rows = {False: range(number - held), True: range(number - held, number)}

    def __call__(self, scheduler: Any, S: int, held: bool = False) -> Any:
        """Run the loop with a scheduler for the images that are held out, or for the others. Returns the scheduler."""
        rows = self.rows[held]
        call = part_of(self.call, slice(rows.start, rows.stop), self.number)
        call["generator"] = [torch.Generator().manual_seed(self.seed + i) for i in rows]
        run_with(self.pipe, lambda _: scheduler, None, self.batch_size, num_inference_steps=S, **call)
        self.evaluations += S * (number := len(rows))
        made = {sum(len(y) for y, _ in node) for node in getattr(scheduler, "nodes", ())}
        if made not in ({number}, {2 * number}) or not scheduler._from_noise:  # some step with guidance's copies too
            problem = f"the pipeline sets its own timesteps, or does not make all steps from x_T for {number} images"
            raise ValueError(f"{problem}: pass a prompt for each, and begin with noise")
        return scheduler


class Recorder(MultistepDDIMScheduler):
    """Sample, and record y = x/√(a² + b²) and v = dy/dφ at the beginning of each step, and x_0.

    A loop that begins again adds images. `nodes` are lists by position, of pairs (y, v) of (B, coordinates) in float32.
    """

    @wraps(MultistepDDIMScheduler.set_timesteps)  # pipelines read its signature
    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        super().set_timesteps(*args, **kwargs)
        self.scale = guidance_scale()
        if not vars(self).get("nodes"):
            self.nodes: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(len(self._pairs) + 1)]
            tops = self.path.T if self._starts_above(self._pairs[0][0]) else self._pairs[0][0]
            self.levels = [self.path.level(t) for t in (tops, *(s for _, s in self._pairs))]
            self.angles = np.array([math.atan2(level.noise, level.signal) for level in self.levels])

    def _advance(self, evaluation: Evaluation) -> Tensor:
        x, i = super()._advance(evaluation), self._place
        if i is None:
            raise ValueError("this pipeline does not step through its scheduler's timesteps: no solver can be fitted")
        x0, eps = (self.sampled(each()) for each in (evaluation.pred_original_sample, evaluation.pred_epsilon))
        v = math.cos(self.angles[i]) * eps - math.sin(self.angles[i]) * x0
        self.nodes[i].append((self.sampled(evaluation.sample) / math.hypot(*self.levels[i]), v))
        if i == len(self._pairs) - 1:  # the slope at the data is that of the line through the last two
            before = self.nodes[i - 1][-1][1] if i else v
            share = self.angles[i] / (self.angles[i - 1] - self.angles[i]) if i else 0
            self.nodes[-1].append((self.sampled(x), v + share * (v - before)))
        return x

    def sampled(self, x: Tensor) -> Tensor:
        """Select the coordinates that are recorded, (B, coordinates)."""
        x, fixed = x.flatten(1), torch.Generator().manual_seed(0)
        return x[:, torch.randperm(x.shape[1], generator=fixed)[:MOST_COORDINATES].to(x.device)].float().cpu()

    @property
    def data(self) -> Tensor:
        """Return x_0 of all images, (N, coordinates)."""
        return torch.cat([y for y, _ in self.nodes[-1]])

    @cached_property
    def curve(self) -> Curve:
        """Compute the mean products of the recorded trajectories."""
        whole = torch.stack([torch.cat([pair[k] for pair in node]) for k in (0, 1) for node in self.nodes]).flatten(1)
        products = sum((part @ part.T).double() for part in whole.split(2**16, 1))
        return Curve(self.angles, (products / whole.shape[1]).numpy())


class Student(Recorder):
    """Sample with weights that bring each step nearest to those of a `teacher`, for the same x_T in the same order.

    The weights of a step solve least squares over all images so far: with several batches those of the first move.
    """

    def _advance(self, evaluation: Evaluation) -> Tensor:
        i, step = self._place, evaluation.step
        prior = np.array([step.x0, step.eps, *(weight for weight, _ in evaluation.history)])
        values = [evaluation.pred_original_sample(), evaluation.pred_epsilon(), *(v for _, v in evaluation.history)]
        basis = torch.stack([self.sampled(value) for value in values]).double()
        shares, nodes, batch = self.teacher.curve.at(self.angles[i + 1])[0], self.teacher.nodes, len(self.nodes[i])
        y = sum(float(shares[k]) * nodes[k % len(nodes)][batch][k // len(nodes)] for k in np.flatnonzero(shares))
        goal = math.hypot(*self.levels[i + 1]) * y.double()
        missed = (goal - torch.tensordot(torch.from_numpy(prior), basis, 1)).square().mean(1)
        counts = (missed.median() / missed).nan_to_num(1).clamp_max(1)[:, None]  # images that went elsewhere count less
        flat, heavy = basis.flatten(1), (basis * counts).flatten(1)
        sums = torch.stack([*(flat @ heavy.T), heavy @ goal.flatten()]).numpy() / goal.numel()
        self.sums[i] = self.sums.get(i, 0) + sums
        self.weights[i] = least_squares(self.sums[i][:-1], self.sums[i][-1], prior)
        x0, eps, *rest = self.weights[i].tolist()
        history = [(weight, value) for weight, (_, value) in zip(rest, evaluation.history, strict=True)]
        return super()._advance(evaluation._replace(step=step._replace(x0=x0, eps=eps), history=history))


def _fit(run: _Run, plain: Recorder, teacher: Recorder, minutes: float) -> dict[str, Any]:
    """Search times from those of `plain`, solve for the weights in the loop, and refine both for some minutes."""
    path, config, default = plain.path, plain.config, [t for t, _ in plain._pairs]
    S, order, whole = len(default), plain._values(plain._kind(None)), not path.continuous
    lowest = min(map(path.time, path.bounds)) - 1e-6
    step = (default[0] - default[-1] or default[0]) / (4 * S)
    step, least = (max(1, round(step)), 1) if whole else (step, step / 64)
    students: dict[tuple[float, ...], Student] = {}

    def cost(spread: float, times: Sequence[float]) -> float:
        angles = [math.atan2(b, a) for a, b in map(path.level, times)] if times[-1] >= lowest else None
        return math.inf if angles is None else teacher.curve.error(angles, order, spread)

    searched = [default, *(descend(default, partial(cost, spread), step, least) for spread in SPREADS)]
    for times in dict.fromkeys(map(tuple, searched)):
        student = Student.from_config(config, fitted_solvers={str(S): {"timesteps": [path.timestep(t) for t in times]}})
        student.teacher, student.sums, student.weights = teacher, {}, {}
        students[times] = run(student, S)
    times, student = min(students.items(), key=lambda each: _distance(each[1], teacher))
    known = {"solver_order": order, "prediction_type": config.prediction_type, "guidance_scale": student.scale}

    def solver(theta: Array) -> dict[str, Any]:
        times = [round(t) if whole else t for t in theta[:S].tolist()]
        noise, weights = [path.level(t).noise for t in times], iter(theta[S:].tolist())
        rows = [[next(weights) for _ in range(1 + min(i + 1, order))] for i in range(S)]
        return {"timesteps": [path.timestep(t) for t in times], "noise": noise, "weights": rows} | known

    def residual(theta: Array) -> Array:
        times = theta[:S].round() if whole else theta[:S]
        inside = lowest <= times[-1] and times[0] <= path.T + 1e-6 and (-np.diff(times, append=0) >= least).all()
        if not (inside and np.isfinite(theta).all()):
            return np.full(teacher.data.numel(), 1e3)
        made = run(Recorder.from_config(config, fitted_solvers={str(S): solver(theta)}), S)
        return np.nan_to_num((made.data - teacher.data).double().numpy().ravel(), nan=1e3, posinf=1e3, neginf=-1e3)

    theta = np.concatenate([times, *(student.weights[i] for i in range(S))])
    if minutes:
        steps = np.append(np.full(S, max(least, step / 2 // least * least)), np.full(len(theta) - S, 0.02))
        theta = refine(theta, steps, residual, time.monotonic() + 60 * minutes)
    return solver(theta)


def _distance(made: Recorder, solved: Recorder) -> float:
    """Return the geometric mean over the images of the RMS distance: a few that went elsewhere do not decide."""
    found = float((made.data - solved.data).square().mean(1).sqrt().clamp_min(1e-12).log().mean().exp())
    return found if math.isfinite(found) else math.inf
