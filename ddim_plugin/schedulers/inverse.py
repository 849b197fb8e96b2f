"""The deterministic process upwards, from an image to its latent: each step, or all of a multistep method."""

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..process import inversion, moves, spacings
from .config import StockConfig, with_settings_of
from .generalized import GeneralizedDDIMScheduler
from .levels import edits
from .multistep import MultistepDDIMScheduler
from .planned import Kind, Pairs, Planned
from .step import Evaluation, Step, at_least_float32, combine


class Upwards(StockConfig):
    """Encode without noise, and without a constraint on x̂0 unless it is passed. The state is float32 at least."""

    _image_range: tuple[float, float] | None = None  # f of the step to the data is clamped to this
    _most: int | None = None  # number of steps to plan, from the data
    _encodes = True  # the loop begins with x_0

    def _build(self) -> None:
        super()._build()
        config, k, kind, eta = self.config, self.config.refinement_steps, self.config.variance_type, self.config.eta
        if k is not None and not (spacings.is_integer(k) and k >= 0):
            raise ValueError(f"refinement_steps must be 0 or more, or None for the plain inverse, not {k!r}")
        if config.corrector_steps or moves.adds_noise(kind, eta):
            given = f"eta={eta:g}, variance_type={kind!r} and corrector_steps={config.corrector_steps}"
            raise ValueError(f"many x_t lead to one x_s with {given}: pass eta=0, 'fixed_small' and 0 to encode")
        if config.use_clipped_model_output and (config.clip_sample or config.thresholding):
            raise ValueError("use_clipped_model_output=True needs x_t, which an inverse step computes: set it to False")
        self.order, self._in_order = 1 + (k or 0), isinstance(self, MultistepDDIMScheduler) or k is not None
        self._from_data = self.path.level(0).noise == 0  # the first step does not determine the noise

    def set_begin_index(self, begin_index: int = 0) -> None:
        super().set_begin_index(begin_index)
        self._x = self._handed = None  # where the network is evaluated next, and the same in the type of the pipeline
        self.residual = torch.tensor(torch.nan)  # root mean square of (x_s − f(x_t))/a_s, the smallest evaluated, (B,)
        # A mask (B, 1, …) of samples that the search leaves as they are, the last solution x_t, the shape of a sample
        # that the network saw with noise, and the place of the last evaluation.
        self.kept = self._solution = self._seen = self._done = None
        self._records: list[tuple[float, int, Tensor]] = []  # timestep, evaluations and residual of each step

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor | int) -> Tensor:
        """Compute x_t as in the sampler; but x_0 at the first time of the plan, where encoding begins with x_0."""
        begins = self._planned is not None and self._done is None
        begins = begins and bool((torch.as_tensor(timesteps, device="cpu") == self._called[self._span.start]).all())
        return original_samples if begins else super().add_noise(original_samples, noise, timesteps)

    def report(self, tolerance: float = inversion.TOLERANCE) -> inversion.InversionReport:
        """Report the last loop, with the residual `tolerance` of a converged step. Raises ValueError without one."""
        if not self._records:
            raise ValueError("no residual was measured: run a loop, with refinement_steps (multistep: 1 or more)")
        times, spent, found = zip(*self._records, strict=True)
        return inversion.InversionReport.of(times, torch.stack(found).cpu(), np.array([spent]).T, tolerance, self._x)

    def _evaluate(self, kind: Kind, step: Step, sample: Tensor, *args: Any) -> Evaluation:
        if args[-1] and (self.config.clip_sample or self.config.thresholding):
            raise ValueError("use_clipped_model_output=True needs x_t, which an inverse step computes: leave it out")
        x = self._x if sample is self._handed and not edits(sample) else at_least_float32(sample)
        self._type = sample.dtype  # of the pipeline, which may have a lower precision than the state
        return super()._evaluate(kind, step, self._begun(x) if self._in_order else x, *args)

    def _advance(self, evaluation: Evaluation) -> Tensor:
        x = super()._advance(evaluation)
        x = self._ended(evaluation, x) if self._in_order else x
        self._x, self._done, self._handed = x, self._place, x.to(self._type)
        return self._handed

    def _kind(self, eta: float | None) -> Kind:
        if moves.effective_eta("fixed_small", eta, 0.0)[1] > 0:
            raise ValueError(f"encoding is deterministic, and cannot use eta={eta:g}: leave it out")
        return "fixed_small", 0.0


class InverseDDIMScheduler(Upwards, GeneralizedDDIMScheduler):
    """Encode an image x_0 as the latent x_T that `GeneralizedDDIMScheduler` decodes, in the loop of any pipeline.

    Each step x_s = f(x_t) of the sampler is solved for x_t with `refinement_steps` + 1 evaluations of the network at t,
    and a multiple of them if it contracts slowly (`process.inversion.rounds`). `timesteps` ascend, each repeated. None
    is the plain inverse, at x_s (Section 5.4). Other settings and errors are those of `GeneralizedDDIMScheduler`.

    The step from b_s = 0 does not determine the noise in x_t. With several evaluations it starts from a_t·x_0 + b_t·z
    with one fixed draw z, by `scale_model_input`. Flow pipelines do not call that: their first evaluation is not used.
    """

    @with_settings_of(GeneralizedDDIMScheduler)
    def __init__(self, refinement_steps: int | None = 0): ...

    def _make_pairs(self, times: spacings.Times) -> Pairs:
        pairs, k = moves.downwards(times)[::-1][: self._most], self.config.refinement_steps
        self._top, counts = pairs[-1][0], [1] * len(pairs)
        self._prediction(self.path.level(self._top))  # raises ValueError for a level that the sampler cannot use
        if k is not None:
            rounds = [inversion.rounds(self.path.level(t), self.path.level(s)) for t, s in pairs]
            counts = [(k + 1) * each for each in rounds] if k else counts
            # As many evaluations as steps: those of the last one or two of a table are made in the hardest step.
            hardest, whole = rounds.index(max(rounds)), self.config.denoising_end - self.config.denoising_start == 1
            more = min(2 if self._from_data else 1, max(rounds) - 1, (len(rounds) - 1) // 2 - hardest)
            if k == 0 and more > 0 and whole and not self.path.continuous:
                counts[hardest], counts[-more:] = 1 + more, [0] * more
        self._bounds = [0, *dict.fromkeys(np.cumsum(counts).tolist())]  # in the plan, of the evaluations of each step
        return [pair for pair, count in zip(pairs, counts, strict=True) for _ in range(count)]

    def _make_step(self, t: float, s: float, kind: Kind) -> Step:
        move = moves.move(self.path, t, s)
        up = Step.up(move, self._prediction(move.start))  # raises ValueError for a step without an inverse
        return super()._make_step(t, s, kind) if self._in_order else up

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """Return x_t at which the network is evaluated: `sample`, but a_t·x_0 + b_t·z at a first step of several."""
        begins = self._planned is not None and self._done in (None, self._span.stop - 1) and self._span.start == 0
        if not begins or 1 in self._bounds or not self._from_data or self.config.refinement_steps is None:
            return super().scale_model_input(sample, timestep)
        self._seen = sample.shape[1:]
        return super().scale_model_input(self._noised(at_least_float32(sample)).to(sample.dtype), timestep)

    def _noised(self, x: Tensor) -> Tensor:
        level, z = self.move(0).start, torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(0))
        return combine(level.signal, x, level.noise, z.to(x.device).expand(x.shape))

    def _begun(self, x: Tensor) -> Tensor:
        """Return the x_t at which the network was evaluated."""
        i, follows = self._place, self._done == self._place - 1
        self._is_blind = i in self._bounds and not follows  # the network was evaluated at x_s
        if i in self._bounds:
            move, self._below = self.move(i), self._solution.view(x.shape) if follows else x  # x_s
            self._search = inversion.Search(inversion.step_size(move.start, move.end))
            self._records = self._records if follows else []
            if self._is_blind and self._seen == x.shape[1:]:
                x, self._is_blind = self._noised(x), False
            self._seen = None
        elif not follows:
            remedy = "step along scheduler.timesteps, with one scheduler for each loop"
            raise ValueError(f"timestep {self._called[i]:g} continues a step of another loop: {remedy}")
        return x

    def _ended(self, evaluation: Evaluation, made: Tensor) -> Tensor:
        """Return the x_t to evaluate next, from the x_s that was `made` of the last one."""
        i, x = self._place, evaluation.sample
        move, is_last = self.move(i), i + 1 == self._span.stop
        ends, kept = is_last or i + 1 in self._bounds, self.kept
        made = made.clamp(*self._image_range) if self._image_range is not None and move.s == 0 else made
        if self._is_blind and self._from_data and move.s == 0 and not ends:
            return self._noised(x)
        found = self._search.next(x, self._below - made, kept)
        if self._is_blind:
            found = evaluation._replace(step=Step.up(move, self._prediction(move.start))).mean()
        found = found if kept is None else torch.where(kept, x, found)
        self.residual = (self._search.best[0].flatten() / x[0].numel()).sqrt() / move.end.signal
        if not ends:
            return found
        self._records.append((self._called[i], self._pairs[: i + 1].count(self._pairs[i]), self.residual))
        self._solution, self.kept = found, None
        above = self._top if i + 1 == len(self._pairs) else move.t if is_last else self._pairs[i + 1][0]
        if above <= move.t:
            return found
        # Continue the line through the last two solutions, x/a over b/a, to the higher level.
        (signal, noise), gap = self.path.level(above), move.start.ratio - move.end.ratio
        a, b, scale = move.start.signal * gap, -move.end.signal * gap, signal / move.start.signal
        eps = combine(1 / a, found, 1 / b, self._below) if gap else evaluation.pred_epsilon()
        return combine(scale, found, noise - scale * move.start.noise, eps)


class InverseMultistepDDIMScheduler(Upwards, MultistepDDIMScheduler):
    """Encode images x_0 into the x_T that `MultistepDDIMScheduler` decodes, in the loop of any pipeline.

    A pass solves the ODE of Eq. 14 upwards with the same method. The network is evaluated at the lower end of a step,
    and at τ_1 for the first. The last of several steps ends at T if the sampler starts there. A sampler's step uses ε̂
    of noisier steps, so all steps are refined together: for every two `refinement_steps`, and once for a single one,
    the loop decodes the latent (`timesteps` descend), corrects the image that it started from by the error, the
    residual, and encodes it again. Other settings, and errors, are those of the sampler and of `InverseDDIMScheduler`.
    """

    _make_plan = Planned._make_plan

    @with_settings_of(MultistepDDIMScheduler)
    def __init__(self, refinement_steps: int | None = 0): ...

    def _make_pairs(self, times: spacings.Times) -> Pairs:
        if self.config.denoising_end < 1:
            raise ValueError(f"denoising_end={self.config.denoising_end:g} must be 1: all steps are solved together")
        self._pairs, path, k = moves.downwards(times)[::-1], [0, *times.tolist()], self.config.refinement_steps
        n = super()._make_span().stop  # steps below denoising_start
        self._whole = len(times) > 1 and self._starts_above(path[-1]) and (self._most or n) == len(times)
        path[-1] = self.path.T if self._whole else path[-1]  # a single step ends at τ_1, where the network is
        self._length = min(n, self._most or n)
        up, down = list(pairwise(path))[: self._length], moves.downwards(times)[-self._length :]
        more = max(1, k // 2) if k else 0  # that decode, and encode again
        self._bounds = [0, (1 + 2 * more) * len(up)]
        return up + (down + up) * more

    def _make_span(self) -> slice:
        return slice(0, len(self._pairs))

    def _make_step(self, t: float, s: float, kind: Kind) -> Step:
        if t > s:  # of the sampler
            step = super()._make_step(t, s, kind)
            return step.from_top(self.path.level(self.path.T)) if self._whole and t == self._tau[-1] else step
        move = moves.move(self.path, t, s)
        build, called = (Step.down, move.start) if t else (Step.from_data, move.end)
        return build(move, self._prediction(called))

    def _begun(self, x: Tensor) -> Tensor:
        if self._place == 0:
            self._image, self._begin, self._search = x, x, inversion.Search(1.0)
        if self._place % self._length == 0:
            self._forget()
        return x

    def _ended(self, evaluation: Evaluation, x: Tensor) -> Tensor:
        done = self._place + 1
        if done % self._length:
            return x
        if done // self._length % 2 == 0:  # decoded
            x = x if self._image_range is None else x.clamp(*self._image_range)
            self._begin = self._search.next(self._begin, self._image - x, self.kept)
            return self._begin
        if done > self._length:
            self.residual = (self._search.best[0].flatten() / x[0].numel()).sqrt() / self.path.level(0).signal
            self._records = [(self._called[self._length], len(self._pairs), self.residual)]
        self._solution = x if self.kept is None or self._solution is None else torch.where(self.kept, self._solution, x)
        return self._solution
