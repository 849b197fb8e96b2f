"""Class labels and classifier-free guidance (Ho & Salimans 2022)."""

import math
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


def check_labels(
    unet: UNet2DModel, class_labels: Labels, guidance_scale: float, null_class_label: int | None, batch_size: int
) -> tuple[Tensor | None, Tensor | None]:
    """Return the labels of a batch, and those of "no class" if guidance is on. Raises ValueError if they do not fit."""
    classes = unet.config.num_class_embeds
    if unet.class_embedding is None:
        if class_labels is not None or guidance_scale != 1 or null_class_label is not None:
            raise ValueError("this network is unconditional: leave out class_labels, guidance_scale and null labels")
        return None, None
    if class_labels is None:
        raise ValueError(f"this network is class-conditional: pass class_labels (0..{(classes or 0) - 1})")
    if not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale must be a finite number, not {guidance_scale!r}")
    labels = torch.as_tensor(class_labels)
    labels = labels.expand(batch_size) if labels.ndim == 0 else labels
    if labels.shape[:1] != (batch_size,):
        raise ValueError(f"{labels.shape[0]} class_labels for a batch of {batch_size}: give one, or one for each")
    null_labels = None
    if guidance_scale != 1:
        if null_class_label is None and classes is None:
            raise ValueError("the network's config has no num_class_embeds: pass null_class_label")
        null_labels = torch.full_like(labels, classes - 1 if null_class_label is None else null_class_label)
    for values in (labels, null_labels):
        if classes is None or values is None:
            continue  # the labels of a custom embedding need not be classes
        whole = not values.is_floating_point() and values.dtype != torch.bool and values.ndim == 1
        if not whole or not ((values >= 0) & (values < classes)).all():
            raise ValueError(f"class labels must be integers in 0..{classes - 1}, not {values.tolist()}")
    return labels, null_labels
