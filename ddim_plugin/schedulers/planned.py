"""Plan the steps over τ, find the step of a timestep, and compute marginals."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..process import moves, spacings
from .config import StockConfig
from .step import Step
from .tensors import combine

Kind = tuple[str, float]  # variance type and η of a step


class Planned(StockConfig):
    """Plan the steps (t, s) over τ in float64.

    Plans and pairs use the paper's times 1..T. The timestep of a network is that time minus one, 0..T−1.
    """

    _alpha_bar: np.ndarray  # ᾱ_0..ᾱ_T, float64
    _tables: dict[Any, Tensor]  # on a device, by key
    _eps_mean_square: np.ndarray | None  # E‖ε̂‖²/d for t = 0..T
    _tau: spacings.Times
    _pairs: list[tuple[int, int]]  # (t, s) of each step
    _called: list[int]  # the time at which the network is evaluated, for each step
    _plans: dict[Kind, list[Step]]
    _off_plan: dict[tuple[int, Kind], Step]  # steps from times outside the plan
    _next: int  # position in the plan of the step that follows the last one
    _place: int | None = None  # position in the plan of the last step

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | Tensor | np.ndarray | None = None,
    ) -> None:
        """Plan S = `num_inference_steps` steps of the spacing, 1 ≤ S ≤ T, or steps at explicit `timesteps`.

        Those are network timesteps 0..T−1, distinct and descending. `device` is that of `self.timesteps`. Raises
        ValueError for a step count or timesteps out of range or order, an η too large for a step, and ε prediction at
        ᾱ_t = 0.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("set_timesteps takes either num_inference_steps or timesteps=[...], not both or neither")
        if timesteps is not None:
            values = timesteps.tolist() if isinstance(timesteps, Tensor | np.ndarray) else timesteps
            times = spacings.explicit(values, self.config.num_train_timesteps, lowest=0, descending=True)
        else:
            times = self._spaced(num_inference_steps)
        kind, pairs = self._kind(None), self._make_pairs(times)
        plan = self._make_plan(pairs, kind)  # if a step does not exist, this raises and the old plan is kept
        called = self._evaluated_at(pairs)
        timesteps = torch.tensor(called, dtype=torch.int64).sub(1).to(device)
        self._tau, self._pairs, self._plans, self._off_plan, self._next = times, pairs, {kind: plan}, {}, 0
        self._called, self._first = called, {t: i for i, t in reversed(list(enumerate(called)))}
        self._moving = {t: i for i, (t, s) in enumerate(pairs) if t != s}
        self._tables = {key: table for key, table in self._tables.items() if key[0] == "marginals"}
        self.num_inference_steps = len(times)
        self.timesteps = self._planned = timesteps

    @property
    def alpha_bar(self) -> np.ndarray:
        """Return ᾱ_0..ᾱ_T, float64, (T + 1,). ᾱ_0 is that of the data."""
        return self._alpha_bar.copy()

    def move(self, i: int) -> moves.Move:
        """Return step `i` of the plan without noise, in the order of `timesteps`."""
        return moves.move(self._alpha_bar, *self._pairs[i])

    def check_eta(self, eta: float | None) -> None:
        """Raise ValueError if η is too large for a step. None is the scheduler's η."""
        self._plan(self._kind(eta))

    def _spaced(self, S: int | None, spacing: str | None = None) -> spacings.Times:
        """Compute τ of S steps, with this spacing or the scheduler's."""
        config = self.config
        T, offset = config.num_train_timesteps, config.steps_offset
        return spacings.tau(spacing or config.timestep_spacing, S, T, offset, self._alpha_bar)

    def _make_pairs(self, times: spacings.Times) -> list[tuple[int, int]]:
        """List (t, s) of each step, in the order of the loop."""
        return moves.downwards(times)

    def _evaluated_at(self, pairs: list[tuple[int, int]]) -> list[int]:
        """List the time at which the network is evaluated, for each step."""
        return [t for t, _ in pairs]

    def _make_step(self, t: int, s: int, kind: Kind) -> Step:
        move = moves.move(self._alpha_bar, t, s, kind[1], kind[0], self._eps_mean_square)
        return Step.down(move, self.config.prediction_type)

    def _make_plan(self, pairs: list[tuple[int, int]], kind: Kind) -> list[Step]:
        return [self._make_step(t, s, kind) for t, s in pairs]

    def _plan(self, kind: Kind) -> list[Step]:
        if kind not in self._plans:
            self._plans[kind] = self._make_plan(self._pairs, kind)
        return self._plans[kind]

    def _kind(self, eta: float | None) -> Kind:
        return moves.effective_eta(self.config.variance_type, eta, self.config.eta)

    # ---- lookup ------------------------------------------------------------------------------------------------

    def _find(self, timestep: int | Tensor, kind: Kind, sample: Tensor) -> Step:
        """Find the step for `timestep`. The host reads no element of `self.timesteps`, and no (B,) on a device."""
        self._place = None
        if not isinstance(timestep, Tensor):
            if not spacings.is_integer(timestep):
                raise ValueError(f"timestep must be an integer, not {timestep!r}")
            return self._next_step(int(timestep), kind)
        if timestep.is_floating_point() or timestep.is_complex() or timestep.dtype == torch.bool:
            raise ValueError(f"timestep must be an integer, not a tensor of {timestep.dtype}")
        if timestep.numel() == 1:
            # An element of `self.timesteps` is looked up by position, without synchronising the device.
            if timestep.untyped_storage().data_ptr() == self._planned.untyped_storage().data_ptr():
                return self._take(timestep.storage_offset(), kind)
            return self._next_step(int(timestep), kind)
        if timestep.shape != sample.shape[:1]:
            raise ValueError(
                f"timestep has shape {tuple(timestep.shape)}: give one, or one for each of {sample.shape[0]} samples"
            )
        dtype = torch.promote_types(sample.dtype, torch.float32)
        if timestep.device.type == "cpu":
            rows = torch.tensor([self._step_at(t, kind) for t in timestep.tolist()], dtype=torch.float64)
            rows = rows.to(dtype).to(sample.device)
        else:
            rows = self._all_steps(kind, dtype, sample.device)[timestep.to(sample.device)]
        return Step(*(column.view(-1, *[1] * (sample.ndim - 1)) for column in rows.unbind(1)))

    def _next_step(self, timestep: int, kind: Kind) -> Step:
        """Find the next step at this timestep. A plan may repeat a timestep."""
        i: int | None = self._next
        if not (i < len(self._called) and self._called[i] == timestep + 1):
            i = self._first.get(timestep + 1)
        return self._step_at(timestep, kind) if i is None else self._take(i, kind)

    def _take(self, i: int, kind: Kind) -> Step:
        self._place, self._next = i, i + 1
        return self._plan(kind)[i]

    def _step_at(self, timestep: int, kind: Kind) -> Step:
        """Find or make the step from any timestep to the next lower time."""
        T = self.config.num_train_timesteps
        if not 0 <= timestep < T:
            raise ValueError(f"timestep {timestep} is outside 0..{T - 1}: pass a network timestep in that range")
        t = timestep + 1
        if t in self._moving:
            return self._plan(kind)[self._moving[t]]
        if (t, kind) not in self._off_plan:
            below = int(np.searchsorted(self._tau, t))
            self._off_plan[t, kind] = self._make_step(t, int(self._tau[below - 1]) if below else 0, kind)
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
            self._tables[key] = torch.tensor(rows).to(dtype).to(device)
        return self._tables[key]

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor | int) -> Tensor:
        """Compute x_t = √ᾱ_t·x_0 + √(1 − ᾱ_t)·ε (Eq. 4) at network timesteps 0..T−1, an integer or (B,).

        x_0 and ε are (B, C, H, W). Raises ValueError for timesteps out of range or not integers, and samples that are
        not floating point.
        """
        signal, deviation = self._marginals(original_samples, timesteps)
        return combine(signal, original_samples, deviation, noise).to(original_samples.dtype)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor | int) -> Tensor:
        """Compute v = √ᾱ_t·ε − √(1 − ᾱ_t)·x_0 (Salimans & Ho 2022). `sample` is x_0; see `add_noise`."""
        signal, deviation = self._marginals(sample, timesteps)
        return combine(-deviation, sample, signal, noise).to(sample.dtype)

    def _marginals(self, like: Tensor, timesteps: Tensor | int) -> tuple[Tensor, Tensor]:
        """Look up (√ᾱ_t, √(1 − ᾱ_t)) for each sample, broadcasting over `like`."""
        if not like.is_floating_point():
            raise ValueError(f"samples must be floating point, not {like.dtype}")
        times = torch.as_tensor(timesteps).flatten()
        if times.is_floating_point() or times.is_complex() or times.dtype == torch.bool:
            raise ValueError(f"timesteps must be integers, not {times.dtype}")
        if len(times) not in (1, like.shape[0]):
            raise ValueError(f"{len(times)} timesteps for {like.shape[0]} samples: give one, or one for each")
        T = self.config.num_train_timesteps
        if times.device.type == "cpu" and not 0 <= int(times.min()) <= int(times.max()) < T:
            raise ValueError(f"timesteps must lie in 0..{T - 1}, not {times.tolist()}")
        dtype = torch.promote_types(like.dtype, torch.float32)
        key = ("marginals", dtype, like.device)
        if key not in self._tables:
            table = np.stack([np.sqrt(self._alpha_bar[1:]), np.sqrt(1 - self._alpha_bar[1:])])
            self._tables[key] = torch.tensor(table).to(dtype).to(like.device)
        signal, deviation = self._tables[key][:, times.to(like.device)]
        shape = (-1, *[1] * (like.ndim - 1))
        return signal.view(shape), deviation.view(shape)
