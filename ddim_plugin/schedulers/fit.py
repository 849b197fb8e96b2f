"""Schedulers that fit a solver in the loop of a pipeline: one records trajectories, one solves for its weights."""

import math
from functools import cache, cached_property, wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..process.fitting import Curve, least_squares
from .multistep import MultistepDDIMScheduler, guidance_scale
from .step import Evaluation

MOST_COORDINATES = 4096  # numbers of a sample that are recorded, drawn once: products are means over them


@cache
def _coordinates(number: int) -> Tensor:
    return torch.randperm(number, generator=torch.Generator().manual_seed(0))[:MOST_COORDINATES]


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
        x = x.flatten(1)
        return x[:, _coordinates(x.shape[1]).to(x.device)].float().cpu()

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
    """Sample with weights that bring each step nearest to recorded trajectories, for the same x_T in the same order.

    The weights of a step solve least squares over all images so far: with several batches those of the first move.
    """

    def follow(self, teacher: Recorder) -> "Student":
        """Set the trajectories. Returns itself."""
        self.teacher, self.sums, self.weights = teacher, {}, {}
        return self

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
