"""The inverse of a multistep sampler, all steps together."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..process import inversion, moves, spacings
from .config import with_settings_of
from .inverse import Upwards
from .multistep import MultistepDDIMScheduler
from .planned import Kind, Pairs, Planned
from .step import Evaluation, Step


class InverseMultistepDDIMScheduler(Upwards, MultistepDDIMScheduler):
    """Encode images x_0 into the x_T that `MultistepDDIMScheduler` decodes, in the loop of any pipeline.

    A pass solves the ODE of Eq. 14 upwards with the same method. The network is evaluated at the lower end of a step,
    and at τ_1 for the first. If the sampler starts from T and has more than one step, the last step ends at T.

    A step of the sampler uses ε̂ of noisier steps, which are not known on the way up. So all steps are refined together:
    the loop decodes the latent, corrects the image that the pass starts from by the error, and encodes it again.
    `timesteps` descend in between. The residual is the error of the decoded image.

    Args:
        refinement_steps: evaluations of a step beyond the first, two for each round, at least one round. None is 0.
        The others, and errors, are those of `MultistepDDIMScheduler` and `InverseDDIMScheduler`.
    """

    is_joint = True
    _make_plan = Planned._make_plan

    @with_settings_of(MultistepDDIMScheduler)
    def __init__(self, refinement_steps: int | None = 0): ...

    def _make_pairs(self, times: spacings.Times) -> Pairs:
        if self.config.denoising_end < 1:
            raise ValueError(f"denoising_end={self.config.denoising_end:g} must be 1: all steps are solved together")
        T, start, k = self.path.T, self.config.denoising_start, self.config.refinement_steps or 0
        high = round(T * (1 - start)) + (not self.path.continuous)
        n = sum(1 for t in times if t < high or not start)
        if n == 0:
            raise ValueError(f"no step lies below denoising_start={start:g}: use more steps, or a larger part")
        path = [0, *times.tolist()]
        self._whole = len(times) > 1 and self._starts_above(path[-1]) and (self._most or n) == len(times)
        if self._whole:
            path[-1] = T  # a single step ends at τ_1, where the network was evaluated
        self._length = min(n, self._most or n)
        up, down = list(pairwise(path))[: self._length], moves.downwards(times)[-self._length :]
        return up + (down + up) * (max(1, k // 2) if k else 0)

    def _make_span(self) -> slice:
        return slice(0, len(self._pairs))

    def _make_step(self, t: float, s: float, kind: Kind) -> Step:
        if t > s:  # of the sampler
            step = super()._make_step(t, s, kind)
            return step.from_top(self.path.level(self.path.T)) if self._whole and t == self._tau[-1] else step
        move = moves.move(self.path, t, s)
        build, called = (Step.down, move.start) if t else (Step.from_data, move.end)
        return build(move, self._prediction(called))

    def searches(self) -> list[slice]:
        """List the places in the plan of the first pass, and of each that decodes and encodes."""
        n, end = self._length, len(self._pairs)
        return [slice(0, n), *(slice(i, i + 2 * n) for i in range(n, end, 2 * n))]

    def _evaluate(self, kind: Kind, step: Step, sample: Tensor, *args: Any) -> Evaluation:
        i = self._place
        if i is None:
            return super()._evaluate(kind, step, sample, *args)
        x = self._receive(sample)
        if i == 0:
            self._image = self._begin = x
            self._search = inversion.Search(1.0)
        if i % self._length == 0:
            self._forget()
        return super()._evaluate(kind, step, x, *args)

    def _advance(self, evaluation: Evaluation) -> Tensor:
        x, i = super()._advance(evaluation), self._place
        if i is None or (i + 1) % self._length:
            return x if i is None else self._hand(x)
        if (i + 1) // self._length % 2 == 0:  # decoded
            x = x if self._image_range is None else x.clamp(*self._image_range)
            self._begin = self._search.next(self._begin, self._image - x)
            size = (self._search.best[0].flatten() / x[0].numel()).sqrt() / self.path.level(0).signal
            self.residual = torch.fmin(size, self.residual)
            self._records = [(self._called[self._length], len(self._pairs), self.residual)]
            return self._hand(self._begin)
        if self.kept is not None and self._solution is not None:
            x = torch.where(self.kept.view(-1, *[1] * (x.ndim - 1)), self._solution, x)
        self._solution = x
        return self._hand(x)

    def _step_at(self, timestep: float, kind: Kind) -> Step:
        raise ValueError(f"timestep {timestep:g} is not in the plan, or not the same for all samples: encode along τ")

    def _all_steps(self, kind: Kind, dtype: torch.dtype, device: torch.device) -> Tensor:
        raise ValueError("inverse multistep steps need one timestep for all samples: use those of scheduler.timesteps")
