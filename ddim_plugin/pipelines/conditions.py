"""Class labels and classifier-free guidance (Ho & Salimans 2022)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from diffusers import UNet2DModel
from torch import Tensor

Labels = int | Sequence[int] | Tensor | None


class Condition(NamedTuple):
    """How the network is called: labels (B,), those of "no class" if guidance is on, its scale; and where it runs."""

    labels: Tensor | None
    null_labels: Tensor | None
    scale: float
    device: torch.device
    dtype: torch.dtype  # of the network

    @property
    def state_dtype(self) -> torch.dtype:
        """Type of samples between the steps: only the network computes in half precision."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def evaluations(self) -> int:
        """Network evaluations for one prediction: guidance takes two."""
        return 1 if self.null_labels is None else 2

    def rows(self, rows: Tensor | slice) -> "Condition":
        """Return the condition of some of the images."""
        labels, null_labels = (None if each is None else each[rows] for each in self[:2])
        return self._replace(labels=labels, null_labels=null_labels)

    def predict(self, unet: UNet2DModel, x: Tensor, t: Tensor) -> Tensor:
        """Return the network's output, guided if guidance is on. Learned variances are not guided."""
        x = x.to(self.dtype)
        if self.null_labels is None:
            return unet(x, t, class_labels=self.labels).sample
        labels = torch.cat([self.labels, self.null_labels])
        output, null = unet(torch.cat([x, x]), t, class_labels=labels).sample.chunk(2)
        channels = x.shape[1]
        guided = torch.lerp(null[:, :channels], output[:, :channels], self.scale)
        return torch.cat([guided, output[:, channels:]], dim=1)
