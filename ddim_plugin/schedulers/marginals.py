"""Noisy samples of any level: what training and image-to-image pipelines ask a scheduler for."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .config import StockConfig
from .tensors import combine


class Marginals(StockConfig):
    """q(x_t | x_0) = N(√ᾱ_t·x_0, (1 − ᾱ_t)·I) of the variance-preserving path (Eq. 4)."""

    _alpha_bar: np.ndarray  # ᾱ_0..ᾱ_T, float64
    _tables: dict[Any, Tensor]  # on a device, by key

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
        times = timesteps if isinstance(timesteps, Tensor) else torch.as_tensor(timesteps)
        if times.is_floating_point() or times.is_complex() or times.dtype == torch.bool:
            raise ValueError(f"timesteps must be integers, not {times.dtype}")
        times = times.flatten()
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
