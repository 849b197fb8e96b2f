"""Plan the steps over τ, find the step of a timestep, and compute marginals."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..process import betas, moves, paths, predictions, spacings
from . import flow
from .config import FLOW, StockConfig
from .step import Step
from .tensors import HALF, combine, integers, number, whole

Kind = tuple[str, float]  # variance type and η of a step
Pairs = list[tuple[float, float]]  # times (t, s) of the steps


class Planned(StockConfig):
    """Plan the steps (t, s) over τ in float64.

    Plans and pairs use times 0..T of the path, and the paper's on its own. `path.timestep` computes what the network is
    evaluated at: the time minus one, T·σ for flow matching, or σ.
    """

    path: paths.Path
    _planned: Tensor | None = None  # the timesteps of the plan
    _shift: float | None = None  # of `set_shift`
    _sigmas: Tensor | None = None  # noise levels of the plan
    _place: int | None = None  # position in the plan of the last step
    _eta: float | None = None  # η of the plan, None for that of the config
    _from_noise = True  # the loop begins with x_T: its plan is that of a spacing

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | Tensor | np.ndarray | None = None,
        eta: float | None = None,
        sigmas: flow.Sigmas | None = None,
        mu: float | None = None,
    ) -> None:
        """Plan S = `num_inference_steps` steps of the spacing, or steps at explicit `timesteps`, or `sigmas`.

        Args:
            num_inference_steps: S, at most T for a table of levels.
            device: that of `self.timesteps`.
            timesteps: network timesteps, distinct and descending: 0..T−1, T·σ for flow matching, or σ.
            eta: η of the steps, None for that of the config.
            sigmas: for flow matching, σ of the steps before the shift, descending. They replace the grid, and with
                `timesteps` the network is evaluated at those.
            mu: for flow matching with `use_dynamic_shifting`, the shift for the size of the image.

        Raises ValueError for a step count, timesteps or sigmas out of range or order, an η too large for a step,
        predictions that divide by zero at a level, and arguments of another path.
        """
        values = timesteps.tolist() if isinstance(timesteps, Tensor | np.ndarray) else timesteps
        values = None if values is None else list(values) if isinstance(values, Sequence) else values
        if sigmas is None and (num_inference_steps is None) == (values is None):
            raise ValueError("set_timesteps takes either num_inference_steps or timesteps=[...], not both or neither")
        if not isinstance(self.path, paths.FlowMatching) and (sigmas is not None or mu is not None):
            name = "mu" if sigmas is None else "sigmas"
            raise ValueError(f"{name} is for flow matching, and this scheduler is not: leave it out, or pass timesteps")
        self._adopt()
        before = dict(self.__dict__)
        try:
            self._eta, self._from_noise, known = eta, values is None and sigmas is None, {}
            if values is not None and sigmas is None:
                self._tau = self._explicit(values)
            elif isinstance(self.path, paths.FlowMatching):
                self._tau, known = self._flow_times(num_inference_steps, sigmas, mu=mu, timesteps=values)
            else:
                self._tau = self._spaced(num_inference_steps)
            self._pairs = self._make_pairs(self._tau)
            evaluated = self._evaluated_at(self._pairs)  # times at which the network is evaluated
            with torch.inference_mode(False):  # counts changes in place
                dtype = torch.int64 if type(self.path) is paths.Path else torch.float32
                planned = [known.get(t, self.path.timestep(t)) for t in evaluated]
                self._planned = torch.tensor(planned, dtype=dtype, device="cpu")
                if self._shown is None:
                    levels = [self.path.level(t).noise for t in (*(t for t, _ in self._pairs), self._pairs[-1][1])]
                    self._sigmas = torch.tensor(levels, dtype=torch.float32, device="cpu")
            self._called = self._planned.tolist()
            self._first = {t: i for i, t in reversed(list(enumerate(self._called)))}
            self._moving = {self._called[i]: i for i, (t, s) in enumerate(self._pairs) if t != s}
            self._replan()
            self._plan(self._kind(None))
            self.num_inference_steps = len(self._tau)
            self.timesteps = self._planned = self._planned.to(device)
            self.set_begin_index(0)
        except BaseException:  # the old plan is kept
            self.__dict__ = before
            raise

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin a loop at this position of the plan, as image-to-image pipelines do."""
        self._next, self._place = begin_index, None

    def _replan(self) -> None:
        """Drop the steps that were computed."""
        self._plans: dict[Kind, list[Step]] = {}
        self._off_plan: dict[tuple[float, Kind], Step] = {}  # steps from times outside the plan
        self._tables = {key: table for key, table in self._tables.items() if key[0] == "marginals"}

    @property
    def alpha_bar(self) -> np.ndarray:
        """Return ᾱ_0..ᾱ_T, float64, (T + 1,), of the path scaled to a² + b² = 1. ᾱ_0 is that of the data."""
        return self._alpha_bar.copy()

    @property
    def image_range(self) -> tuple[float, float]:
        """Return the values of black and white in x_0. With σ as timestep they are 0 and 1, as for NCSN++."""
        return (0.0, 1.0) if isinstance(self.path, paths.VarianceExploding) else (-1.0, 1.0)

    def move(self, i: int) -> moves.Move:
        """Return step `i` of the plan without noise, in the order of `timesteps`."""
        return moves.move(self.path, *self._pairs[i])

    def set_shift(self, shift: float) -> None:
        """Set the shift of the noise levels of flow matching, as `FlowMatchEulerDiscreteScheduler.set_shift`."""
        self._shift = shift

    def _explicit(self, timesteps: Sequence[float]) -> spacings.Times:
        """Check explicit timesteps, and return their times."""
        if type(self.path) is paths.Path:
            return spacings.explicit(timesteps, self.path.T)
        values = spacings.descending(timesteps, *self.path.bounds)
        return np.array([self.path.time(value) for value in values[::-1]])

    def _flow_times(
        self, S: int | None, sigmas: flow.Sigmas | None, **given: Any
    ) -> tuple[spacings.Times, dict[float, float]]:
        """Return the times of flow matching for the arguments of `set_timesteps`, and their timesteps."""
        if S is not None and not (spacings.is_integer(S) and S > 0):
            raise ValueError(f"num_inference_steps must be a positive integer, not {S!r}")
        own = self._own_sigmas(S) if sigmas is None and S is not None else None
        stock, sigmas = (self._stock, sigmas) if own is None else (FLOW, own)  # not all solvers take sigmas
        levels, timesteps = flow.grid(self.config, stock, self._shift, S, sigmas, **given)
        times = (levels * self.path.T).tolist()
        return np.array(times[::-1]), dict(zip(times, timesteps, strict=True))

    def _own_sigmas(self, S: int) -> flow.Sigmas | None:
        """Return the grid of σ before the shift, or None for that of the stock scheduler."""
        return None

    def _spaced(self, S: int | None, spacing: str | None = None) -> spacings.Times:
        """Compute τ of S steps, with this spacing or the scheduler's."""
        config = self.config
        T, offset = config.num_train_timesteps, config.steps_offset
        return spacings.tau(spacing or config.timestep_spacing, S, T, offset, self._alpha_bar)

    def _make_pairs(self, times: spacings.Times) -> Pairs:
        return moves.downwards(times)

    def _evaluated_at(self, pairs: Pairs) -> list[float]:
        return [t for t, _ in pairs]

    def _make_step(self, t: float, s: float, kind: Kind) -> Step:
        move = moves.move(self.path, t, s, kind[1], kind[0], self._eps_mean_square)
        return Step.down(move, self._prediction(move.start))

    def _prediction(self, level: paths.Level) -> predictions.Prediction:
        """Return the linear map from x_t and the output to x̂0 and ε̂ at a level."""
        found = predictions.prediction(self.config.prediction_type, level)
        inverted = isinstance(self.path, paths.FlowMatching) and self.path.inverted  # the output is x_0 − ε
        return found._replace(x0_out=-found.x0_out, eps_out=-found.eps_out) if inverted else found

    def _make_plan(self, pairs: Pairs, kind: Kind) -> list[Step]:
        return [self._make_step(t, s, kind) for t, s in pairs]

    def _plan(self, kind: Kind) -> list[Step]:
        if kind not in self._plans:
            self._plans[kind] = self._make_plan(self._pairs, kind)
        return self._plans[kind]

    def _kind(self, eta: float | None) -> Kind:
        eta = self._eta if eta is None else eta
        return moves.effective_eta(self.config.variance_type, eta, self.config.eta)

    def _find(self, timestep: int | Tensor, kind: Kind, sample: Tensor) -> Step:
        """Find the step for `timestep`. The host reads no element of `self.timesteps`, and no (B,) on a device."""
        self._place = None
        timestep = torch.as_tensor(timestep, device="cpu") if isinstance(timestep, np.ndarray) else timestep
        dtype, device, known = torch.promote_types(sample.dtype, torch.float32), sample.device, self._planned
        if not isinstance(timestep, Tensor) or timestep.numel() == 1:
            if not torch.compiler.is_compiling() or not (self._any_order or isinstance(timestep, Tensor)):
                return self._find_one(timestep, kind)
            if not self._any_order:
                return self._take(self._next, kind)
            # One graph for all timesteps: the value is not known yet. A time outside the plan gives NaN.
            if not isinstance(timestep, Tensor):
                timestep = torch.full((), timestep, dtype=known.dtype, device=device)
            here = known.to(device) == timestep.to(device)
            plan = torch.tensor([tuple(step) for step in self._plan(kind)], dtype=dtype, device=device)
            row = torch.where(here.any(), plan[here.long().argmax()[None]][0], torch.nan)
            return Step(*row.view(-1, *[1] * sample.ndim).unbind())
        is_table = type(self.path) is paths.Path
        times = integers(timestep) if is_table else timestep
        if times.shape != sample.shape[: times.ndim]:
            raise ValueError(
                f"timestep has shape {tuple(times.shape)}: give one, or one for each of {sample.shape[0]} samples"
            )
        if times.device.type == "cpu" or not is_table:
            values, rows = times.flatten().unique(return_inverse=True)
            steps = [self._step_at(t, kind) for t in values.tolist()]
            rows = torch.tensor(steps, dtype=torch.float64, device="cpu")[rows.cpu()].to(dtype).to(device)
        else:
            rows = self._all_steps(kind, dtype, device)[times.flatten().to(device)]
        return Step(*rows.T.reshape(-1, *times.shape, *[1] * (sample.ndim - times.ndim)).unbind())

    def _find_one(self, timestep: int | Tensor, kind: Kind) -> Step:
        """Find the step at one timestep for all samples. If the plan repeats it, that is the next one."""
        if isinstance(timestep, Tensor):
            # An element of `self.timesteps` is looked up by position, without synchronising the device.
            if timestep._base is self._planned and not _edits(self._planned):
                return self._take(timestep.storage_offset(), kind)
            if timestep.is_meta:  # it has no value
                return self._take(self._next, kind)
        timestep = self._number(timestep)
        follows = self._called[self._next : self._next + 1] == [timestep]
        i = self._next if follows else self._first.get(timestep)
        return self._step_at(timestep, kind) if i is None else self._take(i, kind)

    def _take(self, i: int, kind: Kind) -> Step:
        self._place, self._next = i, (i + 1) % len(self._called)
        return self._plan(kind)[i]

    def _number(self, timestep: Any) -> float:
        """Convert a timestep to a number, whole for a table of levels."""
        return whole(timestep) if type(self.path) is paths.Path else number(timestep)

    def _step_at(self, timestep: float, kind: Kind) -> Step:
        """Find or make the step from any timestep to the next lower time."""
        if timestep in self._moving:
            return self._plan(kind)[self._moving[timestep]]
        low, high = self.path.bounds
        if not low * (1 - 1e-6) <= timestep <= high * (1 + 1e-6):  # σ in float32 is rounded
            message = f"timestep {timestep:g} is outside {low:g}..{high:g}: pass a network timestep in that range"
            raise ValueError(message)
        t = self.path.time(timestep)
        if (t, kind) not in self._off_plan:
            below = int(np.searchsorted(self._tau, t))
            self._off_plan[t, kind] = self._make_step(t, self._tau[below - 1].item() if below else 0, kind)
        return self._off_plan[t, kind]

    def _all_steps(self, kind: Kind, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Make a table of the steps from all timesteps, NaN if one does not exist."""
        key = ("steps", kind, dtype, device)
        if key not in self._tables:
            rows = np.full((self.config.num_train_timesteps, len(Step._fields)), np.nan)
            for timestep in range(len(rows)):
                try:
                    rows[timestep] = self._step_at(timestep, kind)
                except ValueError:
                    continue
            self._tables[key] = torch.tensor(rows, device="cpu").to(dtype).to(device)
        return self._tables[key]

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor | int) -> Tensor:
        """Compute x_t = √ᾱ_t·x_0 + √(1 − ᾱ_t)·ε (Eq. 4) at network timesteps 0..T−1.

        x_0 and ε are (B, C, H, W), and `timesteps` one, (B,), or (B, …) for leading axes of the samples. One image may
        have several timesteps or noises. Raises ValueError for timesteps out of range or not integers, shapes that do
        not fit together, and samples that are not floating point.
        """
        x, signal, deviation = self._marginals(original_samples, noise, timesteps)
        return combine(signal, x, deviation, noise).to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: Tensor | float, noise: Tensor) -> Tensor:
        """Compute x_t as `add_noise`, under the name that pipelines for flow matching use."""
        return self.add_noise(sample, noise, timestep)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor | int) -> Tensor:
        """Compute v = √ᾱ_t·ε − √(1 − ᾱ_t)·x_0 (Salimans & Ho 2022). `sample` is x_0; see `add_noise`."""
        x, signal, deviation = self._marginals(sample, noise, timesteps)
        return combine(-deviation, x, signal, noise).to(sample.dtype)

    def _marginals(self, x: Tensor, noise: Tensor, timesteps: Tensor | int) -> tuple[Tensor, Tensor, Tensor]:
        """Expand x_0 over timesteps and noises, and look up √ᾱ_t and √(1 − ᾱ_t), which broadcast over it."""
        compiling = torch.compiler.is_compiling()
        if not compiling:
            self._adopt()
        if not x.is_floating_point():
            raise ValueError(f"samples must be floating point, not {x.dtype}")
        is_table = type(self.path) is paths.Path
        times = timesteps if isinstance(timesteps, Tensor) else torch.tensor(timesteps, device="cpu")
        times = integers(times) if is_table else times.to(torch.promote_types(times.dtype, torch.float32))
        times = times.flatten() if times.numel() == 1 else times
        axes = (*times.shape, *[1] * (x.ndim - times.ndim))
        try:
            shape = torch.broadcast_shapes(axes, x.shape, noise.shape)
        except RuntimeError as error:
            given = f"{times.numel()} timesteps for samples {tuple(x.shape)} and noise {tuple(noise.shape)}"
            raise ValueError(f"{given}: give one timestep, or one for each sample") from error
        low, high = self.path.bounds
        inside = compiling or times.device.type != "cpu" or low <= times.min() * (1 + 1e-6)
        if not inside or not (compiling or times.device.type != "cpu" or times.max() * (1 - 1e-6) <= high):
            raise ValueError(f"timesteps must lie in {low:g}..{high:g}, not {times.tolist()}")
        if not is_table:
            return x.expand(shape), *self._levels_at(times, x).view(2, *axes)
        key = ("marginals", torch.promote_types(x.dtype, torch.float32), x.device)
        if key not in self._tables:
            table = np.stack(self.path.levels)[:, 1:]
            self._tables[key] = torch.tensor(table, device="cpu").to(key[1]).to(x.device)
        signal, deviation = self._tables[key][:, times.to(x.device)].view(2, *axes)
        return x.expand(shape), signal, deviation

    def _levels_at(self, times: Tensor, like: Tensor) -> Tensor:
        """Compute signal and noise at timesteps that are no table's, (2, N). Those of the plan have its levels."""
        times = times.flatten().to(like.device)
        sigma = self.path.sigma(times)
        if self._planned is not None:
            here = times[:, None] == self._planned.to(times)
            planned = self._sigmas[: len(self._planned)].to(sigma)
            sigma = torch.where(here.any(1), planned[here.long().argmax(1)], sigma)
        return torch.stack([1 - sigma if isinstance(self.path, paths.FlowMatching) else torch.ones_like(sigma), sigma])

    @property
    def sigmas(self) -> Tensor:
        """Return the noise b at the levels of the plan, ending with that of the last step. Not for the paper's path."""
        if self._sigmas is None:
            raise AttributeError("this scheduler has no sigmas: its levels are alphas_cumprod")
        return self._sigmas

    def _get_variance(self, timestep: int | Tensor, prev_timestep: int | Tensor) -> Tensor:
        """Compute β̃ between two network timesteps, as pipelines ask for it. −1 is the data."""
        t, s = whole(timestep) + 1, whole(prev_timestep) + 1
        return torch.tensor(float(moves.beta_tilde(self.path.level(t), self.path.level(max(s, 0)))), device="cpu")

    @property
    def alphas_cumprod(self) -> Tensor:
        """Return ᾱ_1..ᾱ_T, float32. Other paths have no ᾱ."""
        if self._shown is None:
            raise AttributeError("this scheduler has no ᾱ: its levels are sigmas")
        return self._shown

    @alphas_cumprod.setter
    def alphas_cumprod(self, value: Any) -> None:
        self._assign(value)

    alphas = property(lambda self: 1 - self.betas, lambda self, value: self._assign(np.cumprod(_numbers(value))))
    betas = property(
        lambda self: torch.tensor(betas.from_alpha_bars(self._alpha_bar[1:]), dtype=torch.float32, device="cpu"),
        lambda self, value: self._assign(np.cumprod(1 - _numbers(value))),
    )

    @property
    def final_alpha_cumprod(self) -> Tensor:
        """Return ᾱ_0, float32."""
        return torch.tensor(self._alpha_bar[0], dtype=torch.float32, device="cpu")

    @final_alpha_cumprod.setter
    def final_alpha_cumprod(self, value: Any) -> None:
        if float(value) not in (1.0, float(self.alphas_cumprod[0])):
            raise ValueError(f"final_alpha_cumprod must be 1 or ᾱ_1 = {self.alphas_cumprod[0]:g}, not {float(value):g}")
        self.register_to_config(set_alpha_to_one=float(value) == 1)

    def _assign(self, value: Any) -> None:
        """Use these ᾱ_1..ᾱ_T from now on, and record their β in the config."""
        alpha_bar, dtype = _numbers(value), value.dtype if getattr(value, "dtype", None) in HALF else torch.float32
        known = torch.tensor(self._alpha_bar[1:], device="cpu").to(dtype)
        if not np.array_equal(_numbers(known), _numbers(torch.tensor(alpha_bar, device="cpu").to(dtype))):
            known = {"trained_betas": betas.from_alpha_bars(alpha_bar).tolist(), "rescale_betas_zero_snr": False}
            self.register_to_config(**known)
        self._show(value)

    def _show(self, value: Any) -> None:
        with torch.inference_mode(False):  # counts changes in place
            shown = value.detach().float() if isinstance(value, Tensor) else torch.tensor(value, device="cpu")
            self._shown = shown.to(torch.float32, copy=True)

    def _adopt(self) -> None:
        """Use what was written into `alphas_cumprod` or `sigmas` in place."""
        if self._shown is not None and _edits(self._shown):
            self._assign(self._shown)
        if self._sigmas is not None and _edits(self._sigmas):
            times = (self._sigmas.double() * self.path.T).tolist()
            if not isinstance(self.path, paths.FlowMatching) or times[0] < times[-1]:
                raise ValueError("sigmas were changed in place: call set_timesteps instead")
            self._sigmas, self._pairs = self._sigmas.clone(), list(pairwise(times))
            self._replan()


def _edits(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _numbers(value: Any) -> np.ndarray:
    value = value.detach().cpu().double().numpy() if isinstance(value, Tensor) else value
    return np.asarray(value, dtype=np.float64)
