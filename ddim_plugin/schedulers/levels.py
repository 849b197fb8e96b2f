"""The levels of noise of a scheduler: its path, what diffusers reads of it, and samples with noise."""

from collections.abc import Sequence
from itertools import pairwise
from numbers import Real
from typing import Any

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..process import betas as schedules
from ..process import paths, spacings
from .config import EDM, FLOW, OF_PATH, STOCK_SCHEDULES, VE, VP, StockConfig, defaults, path_of
from .step import HALF, combine, numbers

OF_FLOW = ("linear", "few_steps", "few_steps_noise")  # spacings of flow matching: stock, and for multistep methods
SHIFTS = ("shift", "flow_shift")  # names of one setting
Sigmas = Sequence[float] | NDArray[np.floating]
PATHS = {VP: "the path of a β schedule", FLOW: "flow matching", VE: "variance exploding", EDM: "variance exploding"}


class Levels(StockConfig):
    """Make the path of a config, show its levels as diffusers does, and add noise to samples."""

    alpha_bar: np.ndarray  # ᾱ_0..ᾱ_T, float64, of the path scaled to a² + b² = 1. It is read-only
    _derived_betas = False  # trained_betas were computed from a schedule that stock schedulers do not have
    _shown: Tensor | None = None  # ᾱ_1..ᾱ_T, float32
    _planned: Tensor | None = None  # the timesteps of the plan
    _sigmas: Tensor | None = None  # b at its levels, not for the paper's path

    def _make_path(self) -> paths.Path:
        config, kind, T = self.config, path_of(self.config), self.config.num_train_timesteps
        for key in {key for keys in OF_PATH.values() for key in keys} - {*OF_PATH[kind]}:
            if isinstance(config[key], list | np.ndarray) or config[key] != defaults(type(self))[key]:
                raise ValueError(f"{key}={config[key]!r} has no effect on {PATHS[kind]}: leave it out")
        if kind != VP and config.variance_type in ("learned_range", "optimal"):
            raise ValueError(f"variance_type={config.variance_type!r} needs a β schedule, not {PATHS[kind]}")
        allowed = {VP: spacings.SPACINGS, FLOW: OF_FLOW}.get(kind, spacings.NAMES)
        spacings.check_name(f"timestep_spacing for {PATHS[kind]}", config.timestep_spacing, allowed)
        if kind == FLOW:
            shift_of(config)
            return paths.flow_matching(T, bool(config.get("invert_sigmas")))
        if kind in (VE, EDM):
            of_stock = defaults(getattr(diffusers, kind))
            super().register_to_config(**{key: of_stock[key] for key in OF_PATH[VE] if config[key] is None})
            low, high, sigma_data = self.config.sigma_min, self.config.sigma_max, config.sigma_data
            positive = isinstance(sigma_data, Real) and 0 < sigma_data < float("inf")
            if kind == EDM and not (positive and config.prediction_type in ("edm", "v_prediction")):
                given = f"{sigma_data!r} and {config.prediction_type!r}"
                raise ValueError(f"'edm' and 'v_prediction' take a positive sigma_data, and no others, not {given}")
            if T < 2 or not (isinstance(low, Real) and isinstance(high, Real) and 0 < low < high < float("inf")):
                raise ValueError(f"sigma_min must be positive and less than sigma_max, T ≥ 2, not {low!r} and {high!r}")
            return paths.variance_exploding(T, low, high, sigma_data)
        if config.beta_schedule == "sqrt":
            if config.trained_betas is not None or config.rescale_betas_zero_snr or not config.set_alpha_to_one:
                raise ValueError("beta_schedule='sqrt' has no β: leave out trained_betas and the other settings of β")
            return paths.square_root(T)
        known = None if self._derived_betas else config.trained_betas
        named = config.beta_schedule, T, config.beta_start, config.beta_end
        betas = schedules.betas(*named) if known is None else schedules.check(known, T)
        alpha_bar = schedules.alpha_bar(betas)
        alpha_bar = schedules.rescale_zero_terminal_snr(alpha_bar) if config.rescale_betas_zero_snr else alpha_bar
        if not config.set_alpha_to_one:
            alpha_bar[0] = alpha_bar[1]
        if (derived := known is None and config.beta_schedule not in STOCK_SCHEDULES) or self._derived_betas:
            self._derived_betas = derived
            super().register_to_config(trained_betas=betas.tolist() if derived else None)
        return paths.variance_preserving(alpha_bar)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor | int) -> Tensor:
        """Compute x_t = a_t·x_0 + b_t·ε (Eq. 4) at network timesteps.

        x_0 and ε are (B, C, H, W), or one image for several, and `timesteps` one, (B,), or (B, …) for leading axes.
        Raises ValueError for timesteps out of range and integer samples, RuntimeError for shapes that do not fit.
        """
        x, signal, deviation = self._marginals(original_samples, noise, timesteps)
        return combine(signal, x, deviation, noise).to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: Tensor | float, noise: Tensor) -> Tensor:
        """Compute x_t as `add_noise`, under the name that pipelines for flow matching use."""
        return self.add_noise(sample, noise, timestep)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor | int) -> Tensor:
        """Compute v = a_t·ε − b_t·x_0 (Salimans & Ho 2022). `sample` is x_0; see `add_noise`."""
        x, signal, deviation = self._marginals(sample, noise, timesteps)
        return combine(-deviation, x, signal, noise).to(sample.dtype)

    def _marginals(self, x: Tensor, noise: Tensor, timesteps: Tensor | int) -> tuple[Tensor, Tensor, Tensor]:
        self._adopt()
        if not x.is_floating_point():
            raise ValueError(f"samples must be floating point, not {x.dtype}")
        times = timesteps if isinstance(timesteps, Tensor) else torch.tensor(timesteps, device="cpu")
        times = numbers(times, whole=not self.path.continuous)
        times = times.flatten() if times.numel() == 1 else times
        axes = (*times.shape, *[1] * (x.ndim - times.ndim))
        if times.device.type == "cpu":
            self.path.check(times.min().item(), times.max().item())
        levels = self._levels_at(times.flatten().to(x.device), torch.promote_types(x.dtype, torch.float32))
        return x.expand(torch.broadcast_shapes(axes, x.shape, noise.shape)), *levels.view(2, *axes)

    def _levels_at(self, times: Tensor, dtype: torch.dtype) -> Tensor:
        if not self.path.continuous:
            if (key := (dtype, times.device)) not in self._tables:  # of a and b for all timesteps
                self._tables[key] = torch.tensor(np.stack(self.path.levels)[:, 1:], dtype=dtype, device=times.device)
            return self._tables[key][:, times]
        exploding = isinstance(self.path, paths.VarianceExploding)
        sigma = self.path.sigma(times) if exploding else self.path.time(times) / self.path.T
        if self._planned is not None:
            here = times[:, None] == self._planned.to(times)
            sigma = torch.where(here.any(1), self._sigmas[: len(self._planned)].to(sigma)[here.long().argmax(1)], sigma)
        return torch.stack([torch.ones_like(sigma) if exploding else 1 - sigma, sigma])

    def _offered(self, table: Tensor | None, other: str) -> Tensor:
        if table is None:
            raise AttributeError(f"this scheduler has no such levels: its levels are {other}")
        return table

    # b at the levels of the plan, ending with that of the last step, and on the paper's path ᾱ_1..ᾱ_T instead.
    sigmas = property(lambda self: self._offered(self._sigmas, "alphas_cumprod"))
    alphas_cumprod = property(lambda self: self._offered(self._shown, "sigmas"), lambda self, new: self._assign(new))
    alphas = property(lambda self: 1 - self.betas, lambda self, value: self._assign(np.cumprod(_numbers(value))))
    betas = property(
        lambda self: torch.tensor(schedules.from_alpha_bars(self.alpha_bar[1:]), dtype=torch.float32, device="cpu"),
        lambda self, value: self._assign(np.cumprod(1 - _numbers(value))),
    )
    final_alpha_cumprod = property(lambda self: torch.tensor(self.alpha_bar[0], dtype=torch.float32, device="cpu"))

    def _assign(self, value: Any) -> None:
        alpha_bar, dtype = _numbers(value), value.dtype if getattr(value, "dtype", None) in HALF else torch.float32
        known = torch.tensor(self.alpha_bar[1:], device="cpu").to(dtype)
        if not np.array_equal(_numbers(known), _numbers(torch.tensor(alpha_bar, device="cpu").to(dtype))):
            known = {"trained_betas": schedules.from_alpha_bars(alpha_bar).tolist(), "rescale_betas_zero_snr": False}
            self.register_to_config(**known)
        self._show(value)

    def _show(self, value: Any) -> None:
        with torch.inference_mode(False):  # counts changes in place
            shown = value.detach().float() if isinstance(value, Tensor) else torch.tensor(value, device="cpu")
            self._shown = shown.to(torch.float32, copy=True)

    def _adopt(self) -> None:
        if self._shown is not None and edits(self._shown):
            self._assign(self._shown)
        if self._sigmas is not None and edits(self._sigmas):
            times = (self._sigmas.double() * self.path.T).tolist()
            if not isinstance(self.path, paths.FlowMatching) or times[0] < times[-1]:
                raise ValueError("sigmas were changed in place: call set_timesteps instead")
            self._sigmas, self._pairs = self._sigmas.clone(), list(pairwise(times))
            self._replan()


def edits(x: Tensor) -> int:
    """Return how often a tensor was changed in place, as far as torch counts it."""
    return 0 if x.is_inference() else x._version


def _numbers(value: Any) -> np.ndarray:
    return np.asarray(value.detach().cpu().double() if isinstance(value, Tensor) else value, dtype=np.float64)


def shift_of(config: dict[str, Any]) -> float:
    """Return the shift of the noise levels, a setting with two names. Raises ValueError if they disagree."""
    shifts = [config[key] for key in SHIFTS if config[key] != 1] or [1.0]
    if len({*shifts}) > 1 or not all(isinstance(value, Real) and value > 0 for value in shifts):
        raise ValueError(f"shift and flow_shift must be one positive number, not {shifts}")
    return shifts[0]


def check_sigmas(sigmas: Sigmas) -> NDArray[np.float64]:
    """Convert σ to a float64 array, and check that they fall and lie in (0, 1]. The last of several may be 0."""
    levels = np.asarray(sigmas, dtype=np.float64)
    falls = levels.ndim == 1 and len(levels) > 0 and bool((np.diff(levels) < 0).all())
    if not falls or not 0 < levels[0] <= 1 or levels[-1] < 0:
        raise ValueError(f"sigmas must fall and lie in (0, 1], only the last of several may be 0, not {sigmas}")
    return levels
