"""Encode, decode, reconstruct and interpolate latents x_T (Sections 5.3 and 5.4)."""

import math
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..process.gaussian import slerp
from ..process.inversion import TOLERANCE, InversionReport
from ..process.spacings import check_name, integer
from ..schedulers import sampler_class
from ..schedulers.inverse import Upwards
from .images import Images, read
from .loop import INVERSES, OUTPUT_TYPES, Condition, Loop, Timesteps, batches, finite


class Latents(Loop):
    """The deterministic process (η = 0) in both directions, for a pipeline with a scheduler of this package."""

    @torch.no_grad()
    def encode(
        self,
        images: Images,
        num_inference_steps: int | None = None,
        timesteps: Timesteps = None,
        strength: float = 1.0,
        refinement_steps: int | None = 0,
        tolerance: float = TOLERANCE,
        batch_size: int | None = None,
        return_report: bool = False,
        **labels: Any,
    ) -> Tensor | tuple[Tensor, InversionReport]:
        """Encode images as the latents x_T that they are decoded from.

        Args, the others, and `labels`, as in the call:
            images: PIL images, arrays (B, H, W, C), tensors (B, C, H, W), one of them or a list; bytes, or in [0, 1].
            strength: part of the S steps to make from the image, ⌊strength·S⌋. 1 gives x_T/b_T, and less x_t.
            refinement_steps: evaluations of a step beyond the first, at most; hard steps take a multiple. None is the
                plain inverse, as cheap as 0: decoding returns the image only as S grows (Table 2).
            tolerance: root mean square of (x_s − f(x_t))/a_s at which a step is solved.
            batch_size: images to encode together; all by default. Images do not depend on each other.
            return_report: also return an `InversionReport`, which has one row for a whole multistep path.

        Returns latents (B, C, H, W), in float32 at least. Raises ValueError for arguments that do not fit, for a
        scheduler whose steps have no inverse, and for latents that are not finite.
        """
        if not isinstance(tolerance, Real) or not 0 <= tolerance < math.inf:
            raise ValueError(f"tolerance must be a non-negative number, not {tolerance!r}")
        self._check_deterministic(invertible=True)
        x = read(images, self.image_channels, self.image_size, *self.scheduler.image_range)
        x, condition, steps, unit = self._prepare(x, num_inference_steps, timesteps, strength, **labels)
        scheduler = self.scheduler
        up = INVERSES[sampler_class(scheduler)].from_config(scheduler.config, refinement_steps=refinement_steps)
        up._shift, up._image_range, up._most = scheduler._shift, scheduler.image_range, steps
        self._set_timesteps(up, num_inference_steps, timesteps)
        parts = [self._ascend(x[rows], condition.rows(rows), up, tolerance) for rows in batches(len(x), batch_size)]
        self.maybe_free_model_hooks()
        latents, times, *measured = zip(*parts, strict=True)
        z = finite(torch.cat(latents)) / unit
        times = times[0] if len(times[0]) > 1 else scheduler.timesteps[[-steps]].tolist()
        report = InversionReport.of(times, *(np.concatenate(each, axis=1) for each in measured), tolerance, z)
        return (z, report) if return_report else z

    def _ascend(self, x: Tensor, condition: Condition, inverse: Upwards, tolerance: float) -> tuple:
        """Run the loop of the inverse: latents, timesteps, and residuals and evaluations of each step, (steps, B)."""
        inverse.set_begin_index(0)  # a new loop
        records, left, spent, output = [], np.ones(len(x), bool), np.zeros(len(x), int), torch.empty(0)
        for i, t in enumerate(self.progress_bar(inverse.timesteps), 1):
            if left.any():
                rows = slice(None) if left.all() else torch.as_tensor(left, device=x.device)
                made = self._predict(x[rows], t, condition.rows(rows))
                output = made if left.all() else output.index_put((rows,), made)
            spent = spent + left * (1 if condition.scale == 1 else 2)
            inverse.kept = ~torch.as_tensor(left, device=x.device).view(-1, 1, 1, 1)
            x = inverse.step(output, t, x).prev_sample
            residual = np.broadcast_to(inverse.residual.cpu().double().numpy(), len(x))
            left = left & ~(residual <= tolerance)
            if i in inverse._bounds:  # a step ends, or the whole path
                records.append((t.item(), residual, spent))
                left, spent = np.ones(len(x), bool), np.zeros(len(x), int)
        times, residuals, evaluations = zip(*records, strict=True)
        return x, np.array(times), np.stack(residuals), np.stack(evaluations)

    @torch.no_grad()
    def decode(
        self,
        latents: Tensor,
        num_inference_steps: int | None = None,
        timesteps: Timesteps = None,
        strength: float = 1.0,
        batch_size: int | None = None,
        output_type: str = "pil",
        **labels: Any,
    ) -> Any:
        """Decode latents to images: the call with `latents` and η = 0, bit for bit.

        `latents` are x_T, or x_t from `encode` with the same `strength`, (B, C, H, W). Other arguments are those of
        `encode` and the call. Raises ValueError for arguments that do not fit, and for a scheduler that adds noise.
        """
        check_name("output_type", output_type, OUTPUT_TYPES)
        self._check_deterministic()
        self._check_latents(latents)
        x, condition, steps, unit = self._prepare(latents, num_inference_steps, timesteps, strength, **labels)
        parts = []
        for rows in batches(len(x), batch_size):
            part, labels = x[rows] * unit, condition.rows(rows)
            for t in self.progress_bar(self.scheduler.timesteps[-steps:]):
                step, labels = self._step(part, t, labels)
                part = step.prev_sample
            parts.append(part)
        self.maybe_free_model_hooks()
        return self._images(torch.cat(parts), output_type)

    def reconstruct(
        self, images: Images, num_inference_steps: int | None = None, refinement_steps: int | None = 0, **settings: Any
    ) -> Any:
        """Encode images and decode them again (Section 5.4, Table 2), with `settings` for both.

        Returns images, or with `return_report` a tuple of images, latents and the report.
        """
        check_name("output_type", output_type := settings.pop("output_type", "pil"), OUTPUT_TYPES)
        refinement = {"refinement_steps": refinement_steps, "tolerance": settings.pop("tolerance", TOLERANCE)}
        return_report, settings["num_inference_steps"] = settings.pop("return_report", False), num_inference_steps
        z, report = self.encode(images, return_report=True, **refinement, **settings)
        again = self.decode(z, output_type=output_type, **settings)
        return (again, z, report) if return_report else again

    def interpolate(self, z0: Tensor, z1: Tensor, num: int = 11, **decoding: Any) -> Any:
        """Decode the spherical interpolation of two latents (Section 5.3, Appendix D.5, Fig. 6).

        The ends are (C, H, W), or (B, C, H, W) for B paths of `num` images, which are returned path by path.
        `decoding` are keywords of `decode`, with `class_labels` for all or for each path.
        """
        z0, z1 = (z[None] if isinstance(z, Tensor) and z.ndim == 3 else z for z in (z0, z1))
        for z in (z0, z1):
            self._check_latents(z)
        path, labels = _path(z0, z1.to(z0), num), decoding.get("class_labels")
        if labels is not None and torch.as_tensor(labels).ndim:
            decoding["class_labels"] = torch.as_tensor(labels).repeat_interleave(num, 0)
        return self.decode(path.flatten(0, 1), **decoding)

    def interpolate_grid(self, corners: Tensor, num: int | tuple[int, int] = 11, **decoding: Any) -> Any:
        """Decode the grid between four latents, the slerp of two slerps (Appendix D.5, Fig. 6).

        `corners` are top left, top right, bottom left and bottom right, (4, C, H, W). `num` is the number of rows and
        of columns, or (rows, columns), at least 2. `decoding` are keywords of `decode`, with one label for all.
        """
        rows, columns = num if isinstance(num, tuple) and len(num) == 2 else (num, num)
        self._check_latents(corners, 4)
        left, right = _path(corners[:2], corners[2:], rows)
        return self.decode(_path(left, right, columns).flatten(0, 1), **decoding)

    def _prepare(self, x: Tensor, S: int | None, timesteps: Timesteps, strength: float, **labels: Any) -> tuple:
        """Return x on the device, its condition, ⌊strength·S⌋, and the unit of the latents."""
        condition = self._condition(len(x), **labels)
        self._set_timesteps(self.scheduler, S, timesteps, eta=0.0)
        S = self.scheduler.num_inference_steps
        steps = int(strength * S + 1e-9) if isinstance(strength, Real) and 0 < strength <= 1 else 0
        if steps == 0:
            raise ValueError(f"strength must lie in (0, 1], from {1 / S:.3g} for {S} steps on, not {strength!r}")
        return x.to(**condition.state), condition, steps, self.scheduler.init_noise_sigma if steps == S else 1.0


def _path(z0: Tensor, z1: Tensor, num: int) -> Tensor:
    integer("num", num, 2)
    return torch.stack([slerp(z0, z1, i / (num - 1)) for i in range(num)], 1)
