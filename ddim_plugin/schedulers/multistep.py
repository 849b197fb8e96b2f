"""Solve the ODE of DDIM (Eq. 14) with a multistep method."""

import inspect
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ..process import moves, spacings
from ..process.paths import FlowMatching, VarianceExploding
from .config import FLOW, with_settings_of
from .generalized import GeneralizedDDIMScheduler
from .levels import shift_of
from .planned import Grid, Kind
from .step import Evaluation, Step

SOLVER_KEYS = {"timesteps", "noise", "weights", "solver_order", "prediction_type", "guidance_scale"}
MUCH_NOISE = 0.5  # least η for which "few_steps" becomes "few_steps_noise", and a step extrapolates further
REACH = 1.5  # factor on (mean − last value) in even steps with much noise: the mean of x̂0 lacks variance
# Largest Σ|weight| of a mean of 2 to 4 values: a step much longer than the one before would extrapolate too far.
LARGEST = {False: (25, 250, 2500), True: (5, 17, 60)}  # of ε̂, of x̂0
_mean_weights = lru_cache(maxsize=4096)(moves.mean_weights)  # most plans repeat


class MultistepDDIMScheduler(GeneralizedDDIMScheduler):
    """DDIM steps with the mean of ε̂ over the step in place of its last value (Eq. 14), for few steps.

    ε̂ is the polynomial through its last `solver_order` values, and its mean is exact on any grid
    (`ddim_plugin.process.moves`). With noise, the mean is that of x̂0, in the SDE that adds η² times the noise
    variance of DDPM. The scheduler keeps the values: use one for each loop, in which a second step at one place is
    refused. The first step is of order 1, and so is one that does not follow the last, or has several timesteps.

    The first sample of a spacing is x_T, even if τ ends below T. Without noise, the first step then starts from T with
    the x̂0 predicted at τ_S. With explicit timesteps, or after `add_noise`, the first sample is that of its timestep.

    Args:
        solver_order: number of values that a step uses, 1 to 4. None is 3, or 4 from 8 steps on, or 2 with noise.
        lower_order_final: whether the last step, to the data, is of order 1.
        fitted_solvers: solvers of `fit_solver` for some step counts, which replace "few_steps" for η = 0. A pipeline
            with another guidance scale, and a scheduler with other noise levels, prediction or order, warn and do
            without. Each has the "timesteps" of the network, descending, the "noise" b at these, the "weights" of x̂0,
            ε̂ and earlier ε̂ in x_s for each step, "solver_order", "prediction_type" and "guidance_scale". One with
            "timesteps" alone has the weights of the method, and is for η < 0.5.
        The others, and errors, are those of `GeneralizedDDIMScheduler`. From η = 0.5 on, `set_timesteps` uses
            "few_steps_noise" in place of "few_steps". "learned_range" has η = 0 by default.
    """

    @with_settings_of(GeneralizedDDIMScheduler)
    def __init__(
        self,
        timestep_spacing: str = "few_steps",
        solver_order: int | None = None,
        lower_order_final: bool = False,
        fitted_solvers: dict[str, dict[str, Any]] | None = None,
    ): ...

    def _build(self) -> None:
        super()._build()
        self._order = self.config.solver_order
        if self._order is not None and not (spacings.is_integer(self._order) and 1 <= self._order <= 4):
            raise ValueError(f"solver_order must be 1, 2, 3 or 4, or None, not {self._order!r}")
        if steps := self.config.corrector_steps:
            raise ValueError(f"corrector_steps={steps} needs a GeneralizedDDIMScheduler: set it to 0")
        self._solvers = _check_solvers(self.config.fitted_solvers)
        self._forget()

    def _grid(self, S: int | None, spacing: str, **given: Any) -> Grid:
        spacing = "few_steps_noise" if spacing == "few_steps" and self._kind(None)[1] >= MUCH_NOISE else spacing
        free = given["sigmas"] is None and spacings.is_integer(S) and S > 0
        if free and spacing == "few_steps" and (times := self._fitted_times(S)) is not None:
            return times, {}
        if free and spacing != "linear" and isinstance(self.path, FlowMatching):
            shifted = self.config.use_dynamic_shifting or max(shift_of(self.config), self._shift or 1) > 1
            given["sigmas"] = spacings.few_sigmas(S, shifted, spacing == "few_steps_noise")
            given["stock"] = FLOW  # not all solvers take sigmas
        if spacing == "few_steps" and isinstance(self.path, VarianceExploding):
            S, (low, high) = spacings.integer("num_inference_steps", S, 1, self.path.T), self.path.levels.noise[[1, -1]]
            top, bottom = min(high, max(10, 3 * S)), max(low, 0.4 / S)  # for images in 0..1
            return self.path.at(np.geomspace(*((top, bottom) if bottom < top else (high, low)), S))[::-1], {}
        return super()._grid(S, spacing, **given)

    def _fitted_times(self, S: int) -> spacings.Times | None:
        """Return the times that were fitted for S steps, and use the weights, if they fit the loop."""
        solver = self._solvers.get(S)
        plain = not self.config.denoising_start and not moves.adds_noise(*self._kind(None))
        if solver is None or (solver["weights"] and not plain):
            return None
        now = {"guidance_scale": guidance_scale(), "solver_order": self._values(("fixed_small", 0.0), S)}
        now |= {"prediction_type": self.config.prediction_type}
        of_fit = {key: solver[key] or 1.0 for key in now if key in solver}  # no guidance is a scale of 1
        wrong = [f"{key}={each!r}, not {now[key]!r}" for key, each in of_fit.items() if now[key] not in (None, each)]
        try:
            times = self.path.times(solver["timesteps"])
            levels = [self.path.level(t).noise for t in times.tolist()][::-1]
            if not np.allclose(levels, solver.get("noise", levels), rtol=1e-3, atol=1e-6):
                wrong.append("other noise levels")
        except ValueError:  # timesteps of another path
            wrong.append("other timesteps")
        if wrong:
            warnings.warn(f"the solver for {S} steps was fitted for {wrong[0]}: the default is used", stacklevel=4)
            return None
        self._solver = dict(zip(times[::-1].tolist(), solver["weights"], strict=False))
        return times

    def set_begin_index(self, begin_index: int = 0) -> None:
        super().set_begin_index(begin_index)
        self._forget()

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor | int) -> Tensor:
        if self._from_noise and self._place is None and self._planned is not None:
            known = not isinstance(timesteps, Tensor) or timesteps.device.type == "cpu"
            if not known or bool((torch.as_tensor(timesteps) == self._called[0]).all()):
                self._from_noise = False  # the loop begins with this x_t, not with x_T
                self._replan()
        return super().add_noise(original_samples, noise, timesteps)

    def _make_plan(self, kind: Kind) -> list[Step]:
        plan, times = super()._make_plan(kind), ()
        t, s = self._pairs[0]
        if t > s and self._starts_above(t) and not moves.adds_noise(*kind):
            plan[0] = plan[0].from_top(self.path.level(self.path.T))
        for place, (t, _) in enumerate(self._pairs if self._order != 1 else ()):
            times = (t, *(each for each in times if each != t))[: self._values(kind)]
            self._cached("_weighed", plan[place], kind, place, times)
        return plan

    def _starts_above(self, top: float) -> bool:
        return self._from_noise and self._order != 1 and top < self.path.T and not self.path.explodes

    def _kind(self, eta: float | None) -> Kind:
        if eta is None and self._eta is None and self.config.variance_type == "learned_range":
            eta = self.config.eta  # a learned variance describes the network: the process is deterministic by default
        return super()._kind(eta)

    def _forget(self) -> None:
        self._history: list[tuple[float, Tensor]] = []  # times and values of ε̂ or x̂0, the newest first
        self._last: tuple[bool, int, torch.Size] | None = None  # of x̂0, position in the plan and shape of the newest
        self._stepped: frozenset[int] = frozenset()  # positions that this loop has stepped from; copies may share it

    def _values(self, kind: Kind, S: int | None = None) -> int:
        return self._order or (2 if moves.adds_noise(*kind) else 3 + ((S or len(self._tau)) >= spacings.MANY_STEPS))

    def _evaluate(self, kind: Kind, *args: Any) -> Evaluation:
        evaluation, place = super()._evaluate(kind, *args), self._place
        if place is None or self._order == 1:
            return evaluation
        if place in self._stepped:
            problem = f"a second step at timestep {self._called[place]:g}: the scheduler keeps the values of a loop"
            raise ValueError(f"{problem}. Use one scheduler for each loop, or set_timesteps or set_begin_index first")
        of_x0, t, like = moves.adds_noise(*kind), self._pairs[place][0], evaluation.sample
        follows = self._last == (of_x0, place - 1, like.shape)
        earlier = [each for each in self._history if each[0] != t] if follows else []  # a plan may repeat a time
        earlier = earlier[: self._values(kind) - 1]
        times = (t, *(time for time, _ in earlier))
        step, *rest = self._cached("_weighed", self._cached("_make_plan", kind)[place], kind, place, times)
        if place == len(self._pairs) - 1:  # nothing follows
            self._forget()
        else:
            value = evaluation.pred_original_sample if of_x0 else evaluation.pred_epsilon
            if not (of_x0 or evaluation.recompute_eps) and (step.eps_x, step.eps_out) == (0, 1):
                value = evaluation.output.clone  # the network may write its next output into the same memory
            self._history = [(t, value()), *earlier]
            self._last = of_x0, place, like.shape
            self._stepped |= {place}
        history = [(weight, value) for weight, (_, value) in zip(rest, earlier, strict=True)]
        return evaluation._replace(step=step, history=history)

    def _weighed(self, step: Step, kind: Kind, place: int, times: tuple[float, ...]) -> tuple[Any, ...]:
        of_x0, (t, s) = moves.adds_noise(*kind), self._pairs[place]
        fits = kind == ("fixed_small", 0.0) and t > s and (place > 0 or self._from_noise)  # an inverse goes up too
        if fits and len(fitted := self._solver.get(t, ())) == 1 + len(times):
            return step._replace(x0=fitted[0], eps=fitted[1]), *fitted[2:]
        weights, mean = np.zeros(len(times)), self._mean(of_x0, (t, s), times, kind[1])
        if len(mean) > 1:  # they are added to the DDIM step scale·x_t + slope·value
            ratio = self.path.level(t).ratio
            slope = step.x0 - step.eps / ratio if of_x0 else step.eps - step.x0 * ratio
            weights[: len(mean)] += slope * mean
            weights[0] -= slope
        first, *rest = weights.tolist()
        return step._replace(**({"x0": step.x0 + first} if of_x0 else {"eps": step.eps + first})), *rest

    def _mean(self, of_x0: bool, pair: tuple[float, float], times: Sequence[float], eta: float) -> np.ndarray:
        t, s, *known = (float(self.path.level(time).ratio) for time in (*pair, *times))
        to_data, to_noise = pair[1] == 0 and (of_x0 or self.config.lower_order_final), s == np.inf and not of_x0
        if to_data or to_noise or t == s or len(set(known)) < len(known):
            return np.ones(1)
        known = known if self._order or pair[0] > pair[1] else known[:3]  # of four it is far off upwards
        known = known[:-1] if of_x0 and known[-1] in (0, np.inf) else known  # log-SNR is infinite there
        tried = (_mean_weights(of_x0, t, s, tuple(known[:order]), eta=eta) for order in range(len(known), 1, -1))
        weights = next((each for each in tried if np.abs(each).sum() <= LARGEST[of_x0][len(each) - 2]), np.ones(1))
        is_even = pair[0] - pair[1] + 1 >= 0.9 * (times[1:] or pair)[0] - 0.9 * pair[0]
        if of_x0 and is_even and self._kind(None)[1] >= MUCH_NOISE:
            weights = REACH * weights
            weights[0] += 1 - REACH
        return weights


def sampler_class(scheduler: object) -> type[GeneralizedDDIMScheduler]:
    """Return the class that samples with the method of a scheduler. For foreign ones it is the generalized one."""
    return MultistepDDIMScheduler if isinstance(scheduler, MultistepDDIMScheduler) else GeneralizedDDIMScheduler


def keep_learned(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Leave "fixed_small" out of `changes` if the config has "learned_range": the network has twice the channels."""
    kept = config.get("variance_type") == "learned_range" and changes.get("variance_type") == "fixed_small"
    return {key: value for key, value in changes.items() if not (kept and key == "variance_type")}


def guidance_scale() -> float | None:
    """Return the guidance scale of the pipeline's call that is running, if it has one. It is read from the stack."""
    frame = inspect.currentframe()
    while frame := frame and frame.f_back:
        known = frame.f_locals
        ours = known.get("condition")  # of our pipeline
        scale = known.get("guidance_scale", getattr(ours, "scale", None))
        if isinstance(known.get("self"), DiffusionPipeline) and isinstance(scale, int | float):
            return float(scale if getattr(ours, "classifier", None) is None else "inf")  # no solver fits a classifier
    return None


def _check_solvers(solvers: dict[str, dict[str, Any]] | None) -> dict[int, dict[str, Any]]:
    if not isinstance(solvers, dict | None):
        raise ValueError(f"fitted_solvers must be a dictionary of solvers by step counts, not {solvers!r}")
    found = {}
    for key, each in (solvers or {}).items():
        try:
            S, times, weights = int(str(key)), each["timesteps"], each.get("weights", [])
            widths, noise = [len(row) for row in weights], each["noise"] if weights else []
            whole = (len(noise), len(widths)) == (S, S) and each.keys() >= SOLVER_KEYS if weights else len(each) == 1
            valid = whole and len(times) == S > 0 and all(2 <= n <= 2 + i for i, n in enumerate(widths))
            valid = valid and np.isfinite(np.concatenate([times, noise, *weights])).all()
            found[S] = {"weights": weights} | each
        except (KeyError, TypeError, ValueError):
            valid = False
        if not valid:
            raise ValueError(f"fitted_solvers[{key!r}] is no solver that fit_solver wrote: leave it out, or fit again")
    return found
