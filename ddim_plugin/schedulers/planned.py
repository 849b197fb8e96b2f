"""Plan the steps over τ, and find the step of a timestep."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor

from ..process import moves, paths, spacings
from .config import all_or_nothing, defaults
from .levels import SHIFTS, Levels, Sigmas, check_sigmas, edits, shift_of
from .step import Step, number, numbers

Kind = tuple[str, float]  # variance type and η of a step
Pairs = list[tuple[float, float]]  # times (t, s) of the steps
Grid = tuple[spacings.Times, dict[float, float]]  # increasing times, and the network's timesteps at them


class Planned(Levels):
    """Plan the steps (t, s) over τ in float64, between times 0..T of the path."""

    _shift: float | None = None  # of `set_shift`
    _place: int | None = None  # position in the plan of the last step
    _eta: float | None = None  # η of the plan, None for that of the config
    _from_noise = True  # the loop begins with x_T: its plan is that of a spacing
    _solver: dict[float, Sequence[float]]  # fitted weights of the steps, by their upper times
    _in_order = False  # a step depends on those before it

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | Tensor | np.ndarray | None = None,
        eta: float | None = None,
        sigmas: Sigmas | None = None,
        mu: float | None = None,
    ) -> None:
        """Plan steps of the spacing, or at explicit `timesteps` or `sigmas`.

        Args:
            num_inference_steps: number S of steps, at most T for a table of levels.
            device: that of `self.timesteps`.
            timesteps: network timesteps, distinct and descending: 0..T−1, T·σ for flow matching, or σ.
            eta: η of the steps, None for that of the config.
            sigmas: for flow matching, σ before the shift, descending. With `timesteps` networks are evaluated there.
            mu: for flow matching with `use_dynamic_shifting`, the shift for the size of the image.

        Raises ValueError for values out of range or order, or of another path, and for steps that do not exist.
        """
        values = timesteps.tolist() if isinstance(timesteps, Tensor | np.ndarray) else timesteps
        if sigmas is None and (num_inference_steps is None) == (values is None):
            raise ValueError("set_timesteps takes either num_inference_steps or timesteps=[...], not both or neither")
        if not isinstance(self.path, paths.FlowMatching) and (sigmas is not None or mu is not None):
            raise ValueError("sigmas and mu are for flow matching, and this scheduler is not: pass timesteps instead")
        self._adopt()
        with all_or_nothing(self):  # else the old plan is kept
            self._eta, self._solver, known = eta, {}, {}
            self._from_noise = values is None and sigmas is None and not self.config.denoising_start
            if values is not None and sigmas is None:
                self._tau = self.path.times(values)
            else:
                spacing, given = self.config.timestep_spacing, {"sigmas": sigmas, "mu": mu, "timesteps": values}
                self._tau, known = self._grid(num_inference_steps, spacing, **given)
            self._pairs = self._make_pairs(self._tau)
            with torch.inference_mode(False):  # counts changes in place
                dtype = torch.float32 if self.path.continuous else torch.int64
                planned = [known.get(t or s, self.path.timestep(t or s)) for t, s in self._pairs]  # not at the data
                self._planned = torch.tensor(planned, dtype=dtype, device="cpu")
                if self._shown is None:
                    times, end = [t for t, _ in self._pairs], self._pairs[-1][1]
                    times += [end] if (times[-1] < end) == (times[0] < times[-1]) else []
                    levels = [self.path.level(t).noise for t in times]
                    self._sigmas = torch.tensor(levels, dtype=torch.float32, device="cpu")
            self._called = self._planned.tolist()
            self._first = {t: i for i, t in reversed(list(enumerate(self._called)))}
            self._moving = {self._called[i]: i for i, (t, s) in enumerate(self._pairs) if t != s}
            self._replan()
            self._cached("_make_plan", self._kind(None))
            self.num_inference_steps = len(self._tau)
            self._planned, self._span = self._planned.to(device), self._make_span()
            self.timesteps = self._planned[self._span]
            self.set_begin_index(self._span.start)

    def _make_span(self) -> slice:
        """Find the part of the plan from `denoising_start` to `denoising_end`, as the pipelines of SDXL do."""
        start, end = self.config.denoising_start, self.config.denoising_end
        high, low = (round(self.path.T * (1 - share)) for share in (start, end))
        times = np.array([max(pair) for pair in self._pairs]) - (not self.path.continuous)
        inside = np.flatnonzero((times >= low) & ((times < high) | (start == 0)))
        if not len(inside):
            raise ValueError(f"no step lies between denoising_start={start:g} and denoising_end={end:g}: add steps")
        return slice(int(inside[0]), int(inside[-1]) + 1)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin a loop at this position of the plan, as image-to-image pipelines do."""
        self._next, self._place = begin_index, None

    def _replan(self) -> None:
        if self._planned is not None and self.path.explodes and not self._encodes:
            self.init_noise_sigma = 1.0 if self.config.denoising_start else self.path.level(self._tau[-1].item()).noise
        self._cache: dict[Any, Any] = {}  # what `_cached` has computed for this plan

    def move(self, i: int) -> moves.Move:
        """Return step `i` of the plan without noise, in the order of `timesteps`."""
        return moves.move(self.path, *self._pairs[i])

    def set_shift(self, shift: float) -> None:
        """Set the shift of the noise levels of flow matching, as `FlowMatchEulerDiscreteScheduler.set_shift`."""
        if not isinstance(self.path, paths.FlowMatching) or not shift > 0:
            raise ValueError(f"set_shift takes a positive number, for flow matching only, not {shift!r}")
        self._shift = shift

    def _grid(self, S: int | None, spacing: str, sigmas: Any, mu: Any, timesteps: Any, stock: str = "") -> Grid:
        if spacing in spacings.SIGMAS:
            S, rho = spacings.integer("num_inference_steps", S, 1, self.path.T), self.config.get("rho", 7.0)
            if not rho > 0:
                raise ValueError(f"rho must be positive, not {rho!r}: 7 is that of the paper")
            return self.path.at(spacings.SIGMAS[spacing](S, *self.path.levels.noise[[1, -1]], rho))[::-1], {}
        if not isinstance(self.path, paths.FlowMatching):  # its levels are those of a stock scheduler
            return spacings.tau(spacing, S, self.path.T, self.config.steps_offset, self.alpha_bar), {}
        S = S if S is None else spacings.integer("num_inference_steps", S, 1)
        sigmas = None if sigmas is None else check_sigmas(sigmas.tolist() if isinstance(sigmas, Tensor) else sigmas)
        cls, config = getattr(diffusers, stock or self._stock), self.config
        scheduler = cls.from_config(config, **{key: shift_of(config) for key in SHIFTS if key in defaults(cls)})
        if self._shift is not None:
            scheduler.set_shift(self._shift)
        mu = mu if config.use_dynamic_shifting else None  # some pipelines give it to all
        given = {"sigmas": sigmas, "mu": mu, "timesteps": timesteps}
        scheduler.set_timesteps(S, device="cpu", **{key: value for key, value in given.items() if value is not None})
        levels = scheduler.sigmas.double().numpy()[: len(scheduler.timesteps)]
        times = (check_sigmas(1 - levels if config.get("invert_sigmas") else levels) * self.path.T).tolist()
        return np.array(times[::-1]), dict(zip(times, scheduler.timesteps.tolist(), strict=True))

    def _make_pairs(self, times: spacings.Times) -> Pairs:
        return [(t, r) for t, s in moves.downwards(times) for r in (*[t] * self.config.corrector_steps, s)]

    def _make_step(self, t: float, s: float, kind: Kind) -> Step:
        move = moves.move(self.path, t, s, kind[1], kind[0], self._eps_mean_square)
        return Step.down(move, self._prediction(move.start))

    def _prediction(self, level: paths.Level) -> moves.Prediction:
        m = moves.prediction(self.config.prediction_type, level, self.path.sigma_data)
        return m._replace(x0_out=self.path.output_sign * m.x0_out, eps_out=self.path.output_sign * m.eps_out)

    def _cached(self, method: str, *args: Any) -> Any:
        if (key := (method, *args)) not in self._cache:
            self._cache[key] = getattr(self, method)(*args)
        return self._cache[key]

    def _make_plan(self, kind: Kind) -> list[Step]:
        return [self._cached("_make_step", *pair, kind) for pair in self._pairs]

    def _kind(self, eta: float | None) -> Kind:
        return moves.effective_eta(self.config.variance_type, self._eta if eta is None else eta, self.config.eta)

    def _find(self, timestep: int | Tensor, kind: Kind, sample: Tensor) -> Step:
        """Find the step for `timestep`. The host reads no element of `self.timesteps`, and no (B,) of a table."""
        self._place = None
        timestep = torch.as_tensor(timestep, device="cpu") if isinstance(timestep, np.ndarray) else timestep
        if not isinstance(timestep, Tensor) or timestep.numel() == 1:
            return self._find_one(timestep, kind)
        dtype, device = torch.promote_types(sample.dtype, torch.float32), sample.device
        times = numbers(timestep, whole=not self.path.continuous)
        if times.shape != sample.shape[: times.ndim]:
            raise ValueError(f"timestep shape {tuple(times.shape)}: give one, or one for each of {len(sample)} samples")
        if times.device.type == "cpu" or self.path.continuous:
            values, rows = times.flatten().unique(return_inverse=True)
            steps = [self._step_at(t, kind) for t in values.tolist()]
            rows = torch.tensor(steps, dtype=torch.float64, device="cpu")[rows.cpu()].to(dtype).to(device)
        else:
            rows = self._cached("_all_steps", kind, dtype, device)[times.flatten().to(device)]
        return Step(*rows.T.reshape(-1, *times.shape, *[1] * (sample.ndim - times.ndim)).unbind())

    def _find_one(self, timestep: int | Tensor, kind: Kind) -> Step:
        if isinstance(timestep, Tensor) and timestep._base is self._planned and not edits(self._planned):
            i = timestep.storage_offset()
        elif isinstance(timestep, Tensor) and timestep.is_meta:  # it has no value
            i = self._next
        else:
            timestep = number(timestep, whole=not self.path.continuous)
            i = self._next if self._called[self._next : self._next + 1] == [timestep] else self._first.get(timestep)
        if i is None:
            return self._step_at(timestep, kind)
        self._place, self._next = i, (i + 1) % len(self._called)
        return self._cached("_make_plan", kind)[i]

    def _step_at(self, timestep: float, kind: Kind) -> Step:
        if timestep in self._moving:
            return self._cached("_make_plan", kind)[self._moving[timestep]]
        self.path.check(timestep)
        t = self.path.time(timestep)
        below = int(np.searchsorted(self._tau, t))
        return self._cached("_make_step", t, self._tau[below - 1].item() if below else 0, kind)

    def _all_steps(self, kind: Kind, dtype: torch.dtype, device: torch.device) -> Tensor:
        rows = np.full((self.path.T, len(Step._fields)), np.nan)
        for timestep in range(self.path.T):
            with suppress(ValueError):
                rows[timestep] = self._step_at(timestep, kind)
        return torch.tensor(rows, device="cpu").to(dtype).to(device)
