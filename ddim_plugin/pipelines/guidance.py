"""Guidance by the gradient of a classifier that was trained on x_t (Dhariwal & Nichol 2021)."""

import math
from collections.abc import Callable
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

Classifier = Callable[[Tensor, Tensor], Tensor]  # x_t (B, C, H, W) and its timesteps (B,) to logits (B, classes)


class Guide(NamedTuple):
    """A classifier, the scale s of its gradient, and the classes y that are asked for, (B,)."""

    classifier: Classifier
    scale: float
    labels: Tensor

    @classmethod
    def of(cls, classifier: Classifier | None, scale: float, labels: Tensor | None) -> "Guide | None":
        """Check the arguments of the call. Raises ValueError for a scale alone, and for labels that are no classes."""
        if classifier is None:
            if scale != 1:
                raise ValueError(f"classifier_scale={scale!r} has no effect without a classifier: pass one")
            return None
        if not isinstance(scale, Real) or not math.isfinite(scale):
            raise ValueError(f"classifier_scale must be a finite number, not {scale!r}")
        given = "none" if labels is None else labels.tolist()
        if labels is None or labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(f"a classifier needs class_labels, integers from 0 on, not {given}")
        return cls(classifier, float(scale), labels.cpu())

    def rows(self, rows: Tensor | slice) -> "Guide":
        return self._replace(labels=self.labels[rows.cpu() if isinstance(rows, Tensor) else rows])

    def gradient(self, x: Tensor, t: Tensor) -> Tensor:
        """Compute s·∇ log p(y|x_t), (B, C, H, W). Raises ValueError for logits that do not fit, and other labels."""
        weights = next(self.classifier.parameters(), x) if isinstance(self.classifier, torch.nn.Module) else x
        if weights.device != x.device:
            raise ValueError(f"the classifier is on {weights.device}, the images on {x.device}: move it there")
        with torch.inference_mode(False), torch.enable_grad():
            given = x.detach().to(weights.dtype, copy=True).requires_grad_()
            logits = self.classifier(given, torch.as_tensor(t, device=x.device).expand(len(x)).clone())
            shape = tuple(logits.shape)
            if len(shape) != 2 or len(logits) != len(x) or not logits.requires_grad:
                raise ValueError(f"a classifier must return differentiable logits ({len(x)}, classes), not {shape}")
            if not 0 <= int(self.labels.min()) <= int(self.labels.max()) < shape[1]:
                raise ValueError(f"class_labels must lie in 0..{shape[1] - 1}, not {self.labels.tolist()}")
            chosen = logits.to(x.dtype).log_softmax(1).gather(1, self.labels.to(x.device)[:, None].long())
            return self.scale * torch.autograd.grad(chosen.sum(), given)[0].to(x.dtype)
