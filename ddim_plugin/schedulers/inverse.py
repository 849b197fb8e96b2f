"""The deterministic process upwards, from an image to its latent."""

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..process import inversion, moves, spacings
from ..process.paths import Level
from .config import CONSTRAINTS, SAMPLER, StockConfig, with_settings_of
from .generalized import GeneralizedDDIMScheduler
from .levels import edits
from .planned import Kind, Pairs, Planned
from .step import Evaluation, Step
from .tensors import at_least_float32, combine


class Upwards(StockConfig):
    """Encode without noise, and without a constraint on x̂0 unless it is passed. The state is float32 at least."""

    _image_range: tuple[float, float] | None = None  # f of the step to the data is clamped to this
    _most: int | None = None  # number of steps to plan, from the data
    is_joint = False  # all steps are solved together

    def _build(self) -> None:
        k = self.config.refinement_steps
        if k is not None and not (spacings.is_integer(k) and k >= 0):
            raise ValueError(f"refinement_steps must be 0 or more, or None for the plain inverse, not {k!r}")
        super()._build()
        self.order = 1 + (k or 0)

    def set_begin_index(self, begin_index: int = 0) -> None:
        super().set_begin_index(begin_index)
        self._x = self._handed = None  # where the network is evaluated next, and the same in the type of the pipeline
        self.kept: Tensor | None = None  # mask (B,) of samples that this search leaves as they are: they are solved
        self.residual = torch.tensor(torch.nan)  # root mean square of (x_s − f(x_t))/a_s, the smallest evaluated, (B,)
        self._solution: Tensor | None = None  # x_t of the last step that is solved
        self._seen: torch.Size | None = None  # shape of a sample that the network saw with noise
        self._done: int | None = None  # place of the last evaluation
        self._records: list[tuple[float, int, Tensor]] = []  # timestep, evaluations and residual of each step

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor | int) -> Tensor:
        """Compute x_t as in the sampler; but x_0 at the first time of the plan, where encoding begins with x_0."""
        begins = self._planned is not None and self._done is None
        if begins and bool((torch.as_tensor(timesteps, device="cpu") == self._called[self._span.start]).all()):
            return original_samples
        return super().add_noise(original_samples, noise, timesteps)

    def _replan(self) -> None:
        super()._replan()
        self.init_noise_sigma = 1.0  # the loop begins with x_0
        self._from_data = self.path.level(0).noise == 0  # the first step does not determine the noise

    def report(self, tolerance: float = inversion.TOLERANCE) -> inversion.InversionReport:
        """Report the last loop, with `tolerance` the residual of a converged step. It reads the device.

        Raises ValueError if no step was solved, and for the plain inverse, which measures no residual.
        """
        if not self._records or self._x is None:
            raise ValueError("no residual was measured: run a loop, with refinement_steps (multistep: 1 or more)")
        times, spent, residual = zip(*self._records, strict=True)
        residual = torch.stack(residual).cpu().double().numpy()
        evaluations = np.repeat(np.array(spent)[:, None], residual.shape[1], 1)
        return inversion.InversionReport.of(times, residual, evaluations, tolerance, self._x)

    def _receive(self, sample: Tensor) -> Tensor:
        """Return the state for the sample of a pipeline, which may have a lower precision."""
        self._type = sample.dtype
        return self._x if sample is self._handed and not edits(sample) else at_least_float32(sample)

    def _hand(self, x: Tensor) -> Tensor:
        self._x, self._done, self._handed = x, self._place, x.to(self._type)
        return self._handed

    def _check_noise(self, variance_type: str, eta: float) -> None:
        super()._check_noise(variance_type, eta)
        if self.config.corrector_steps:
            raise ValueError(f"encoding has no corrector: set corrector_steps to 0, not {self.config.corrector_steps}")
        if moves.adds_noise(variance_type, eta):
            problem = f"with noise (eta={eta:g}, variance_type={variance_type!r}) many x_t lead to one x_s"
            remedy = "Pass eta=0.0, variance_type='fixed_small'"
            raise ValueError(f"encoding needs the deterministic process: {problem}. {remedy}")

    def _kind(self, eta: float | None) -> Kind:
        if moves.effective_eta("fixed_small", eta, 0.0)[1] > 0:
            raise ValueError(f"encoding is deterministic, and cannot use eta={eta:g}: leave it out")
        return "fixed_small", 0.0

    def _evaluate(self, *args: Any) -> Evaluation:
        config, recompute = self.config, self.config.use_clipped_model_output if args[-1] is None else args[-1]
        if recompute and (config.clip_sample or config.thresholding):
            raise ValueError("use_clipped_model_output=True needs x_t, which an inverse step computes: set it to False")
        return super()._evaluate(*args)

    def _own_settings(self) -> dict[str, Any]:
        return super()._own_settings() | {SAMPLER: dict.fromkeys(self._set_aside, True)}

    @classmethod
    def _adapt(cls, settings: dict[str, Any], own: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Switch off the constraints of a sampler, and remember them for a sampler made from this config."""
        sampler = own.pop(SAMPLER, None)
        settings, own = super()._adapt(settings, own)
        if sampler is None:
            sampler = {key: True for key in CONSTRAINTS if own.get(key, settings.get(key))}
            own |= dict.fromkeys(sampler, False)
        return settings, own | {SAMPLER: sampler}


class InverseDDIMScheduler(Upwards, GeneralizedDDIMScheduler):
    """Encode an image x_0 as the latent x_T that `GeneralizedDDIMScheduler` decodes, in the loop of any pipeline.

    Each step x_s = f(x_t) of the sampler is solved for x_t with `refinement_steps` + 1 evaluations of the (guided)
    network at t, the sampler's own time: `timesteps` ascend, each repeated. The first x_t of a step lies on the line
    through the last two solutions, x/a over b/a. A step that contracts slowly takes a multiple of the evaluations
    (`ddim_plugin.process.inversion.rounds`). `report` returns the residuals.

    The step from b_s = 0 does not determine the noise in x_t. With several evaluations it starts from a_t·x_0 + b_t·z
    with one fixed draw z, by `scale_model_input`. Flow pipelines do not call that: their first evaluation is not used.
    With `refinement_steps` 0 the hardest step of a β schedule takes up to 3 evaluations, and the last ones none.

    Args:
        refinement_steps: evaluations of a step beyond the first, or None for the plain inverse of Section 5.4, which
            evaluates the network at x_s, and whose error is that of Table 2.
        The others, and errors, are those of `GeneralizedDDIMScheduler`. Noise is refused.
    """

    @with_settings_of(GeneralizedDDIMScheduler)
    def __init__(self, refinement_steps: int | None = 0): ...

    def _make_pairs(self, times: spacings.Times) -> Pairs:
        pairs, k = moves.downwards(times)[::-1][: self._most], self.config.refinement_steps
        self._top, counts = pairs[-1][0], [1] * len(pairs)
        if k is not None:
            rounds = [inversion.rounds(self.path.level(t), self.path.level(s)) for t, s in pairs]
            counts = [(k + 1) * each for each in rounds] if k else self._spread(rounds)
        return [pair for pair, count in zip(pairs, counts, strict=True) for _ in range(count)]

    def _spread(self, rounds: list[int]) -> list[int]:
        """Spread as many evaluations as there are steps: those of the last one or two of a table go to the hardest."""
        hardest, counts = rounds.index(max(rounds)), [1] * len(rounds)
        more = min(2 if self._from_data else 1, max(rounds) - 1, (len(rounds) - 1) // 2 - hardest)
        if more > 0 and not self.path.continuous and self.config.denoising_end - self.config.denoising_start == 1:
            counts[hardest], counts[-more:] = 1 + more, [0] * more
        return counts

    def _make_step(self, t: float, s: float, kind: Kind) -> Step:
        move = moves.move(self.path, t, s)
        return Step.up(move, self._prediction(move.start))

    def _make_plan(self, kind: Kind) -> list[Step]:
        self._prediction(self.path.level(self._top))  # raises ValueError for a level that the sampler cannot use
        plan = super()._make_plan(kind)  # the same for a step without an inverse
        if self.config.refinement_steps is None:
            return plan
        steps = {pair: Planned._make_step(self, *pair, kind) for pair in dict.fromkeys(self._pairs)}
        return [steps[pair] for pair in self._pairs]

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """Return x_t at which the network is evaluated: `sample`, but a_t·x_0 + b_t·z at a first step of several."""
        begins = self._planned is not None and self._done in (None, self._span.stop - 1) and self._span.start == 0
        if not begins or self._is_new(1) or not self._from_data or self.config.refinement_steps is None:
            return sample
        self._seen = sample.shape[1:]
        return self._noised(at_least_float32(sample)).to(sample.dtype)

    def _noised(self, x: Tensor) -> Tensor:
        level, z = self.move(0).start, torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(0))
        return combine(level.signal, x, level.noise, z.to(x.device).expand(x.shape))

    def _evaluate(self, kind: Kind, step: Step, sample: Tensor, *args: Any) -> Evaluation:
        self._searches = self.config.refinement_steps is not None and self._place is not None
        if not self._searches:
            return super()._evaluate(kind, step, sample, *args)
        i, x = self._place, self._receive(sample)
        follows = self._done is not None and self._done == i - 1
        self._is_blind = self._is_new(i) and not follows  # the network was evaluated at x_s
        if self._is_new(i):
            move, self._below = self.move(i), self._solution.view(x.shape) if follows else x  # x_s
            self._search = inversion.Search(inversion.step_size(move.start, move.end))
            self._records = self._records if follows else []
            if self._is_blind and self._seen == x.shape[1:]:
                x, self._is_blind = self._noised(x), False
            self._seen = None
        elif not follows:
            problem = f"timestep {self._called[i]:g} continues a step of another loop"
            raise ValueError(f"{problem}: step along scheduler.timesteps, with one scheduler for each loop")
        return super()._evaluate(kind, step, x, *args)

    def _advance(self, evaluation: Evaluation) -> Tensor:
        if not self._searches:
            return super()._advance(evaluation)
        i, x, made = self._place, evaluation.sample, super()._advance(evaluation)
        move, is_last = self.move(i), i + 1 == self._span.stop
        ends = is_last or self._is_new(i + 1)
        if self._image_range is not None and move.s == 0:
            made = made.clamp(*self._image_range)
        if self._is_blind and self._from_data and move.s == 0 and not ends:
            return self._hand(self._noised(x))
        kept = None if self.kept is None else self.kept.view(-1, *[1] * (x.ndim - 1))
        r = self._below - made
        found = self._search.next(x, r if kept is None else torch.where(kept, torch.nan, r))
        if self._is_blind:
            found = evaluation._replace(step=self._make_step(move.t, move.s, self._kind(None))).mean()
        found = found if kept is None else torch.where(kept, x, found)
        self.residual = (self._search.best[0].flatten() / x[0].numel()).sqrt() / move.end.signal
        if not ends:
            return self._hand(found)
        self._records.append((self._called[i], self._pairs[: i + 1].count(self._pairs[i]), self.residual))
        self._solution, self.kept = found, None
        if not is_last:
            return self._hand(self._on_line(evaluation, self.move(i + 1).start))
        above = i + 1 == len(self._pairs) and self._top > move.t
        return self._hand(self._on_line(evaluation, self.path.level(self._top)) if above else found)

    def _on_line(self, evaluation: Evaluation, level: Level) -> Tensor:
        """Continue the line through the last two solutions, x/a over b/a, to a higher level."""
        x, move = self._solution, self.move(self._place)
        start, end = move.start, move.end
        if start == end:
            eps = evaluation.pred_epsilon()
        else:
            gap = start.ratio - end.ratio
            eps = combine(1 / (start.signal * gap), x, -1 / (end.signal * gap), self._below)
        scale = level.signal / start.signal
        return combine(scale, x, level.noise - scale * start.noise, eps)

    def searches(self) -> list[slice]:
        """List the places in the plan of the evaluations of each step."""
        starts = [i for i in range(len(self._pairs)) if self._is_new(i)]
        return [slice(*ends) for ends in pairwise([*starts, len(self._pairs)])]

    def _is_new(self, i: int) -> bool:
        return i == 0 or self._pairs[i - 1 : i] != self._pairs[i : i + 1]
