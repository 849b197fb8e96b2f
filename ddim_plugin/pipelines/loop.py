"""What all calls of the pipeline share: checks before the loop, and the loop over timesteps."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from diffusers import SchedulerMixin, UNet2DModel
from torch import Tensor

from ..process.moves import adds_noise
from ..process.spacings import is_integer
from ..schedulers import (
    GeneralizedDDIMScheduler,
    InverseDDIMScheduler,
    InverseMultistepDDIMScheduler,
    sampler_class,
)
from .conditions import Condition, Labels, check_labels

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

AfterStep = Callable[[int, Tensor, Tensor, Any], Tensor | None]
"""(number, timestep, x_t, output of `step`) ↦ the sample to continue with. None is that of the scheduler."""


class Loop:
    """Checks and the sampling loop, for a `DiffusionPipeline` with `unet` and `scheduler`."""

    unet: UNet2DModel
    scheduler: SchedulerMixin

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(H, W) of the network's images, or None if its config has no `sample_size`."""
        size = self.unet.config.sample_size
        return (size, size) if isinstance(size, int) else size and tuple(size)

    def _shape(self, batch_size: int | None, latents: Tensor | None) -> tuple[int, ...]:
        """Check the batch size and latents, and return the shape (B, C, H, W) of the images."""
        if batch_size is not None:
            check_count("batch_size", batch_size, 1)
        if latents is not None:
            self._check_latents(latents, batch_size)
            return tuple(latents.shape)
        if self.image_size is None:
            raise ValueError("the network's config has no sample_size: pass latents of the wanted size")
        return batch_size or 1, self.unet.config.in_channels, *self.image_size

    def _check_latents(self, latents: Tensor, batch_size: int | None = None) -> None:
        """Raise ValueError unless `latents` are some for this network."""
        if not isinstance(latents, Tensor):
            raise ValueError(f"latents must be a torch tensor, not {type(latents).__name__}")
        if latents.ndim != 4 or len(latents) == 0:
            raise ValueError(f"latents must be (B, C, H, W) with B ≥ 1, not of shape {tuple(latents.shape)}")
        size = self.image_size or latents.shape[2:]
        shape = (batch_size or len(latents), self.unet.config.in_channels, *size)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}; this network and batch_size need {shape}")
        if not latents.is_floating_point() or not bool(torch.isfinite(latents).all()):
            raise ValueError("latents must be finite numbers: they contain NaN, infinity or integers")

    def _condition(
        self, class_labels: Labels, guidance_scale: float, null_class_label: int | None, batch_size: int
    ) -> Condition:
        """Check labels and guidance, and look up once what is slow to look up: the network's device and type."""
        labels = check_labels(self.unet, class_labels, guidance_scale, null_class_label, batch_size)
        device = self._execution_device
        labels, null_labels = (None if each is None else each.to(device) for each in labels)
        return Condition(labels, null_labels, guidance_scale, device, self.unet.dtype)

    def _check_channels(self) -> None:
        """Raise ValueError if the network's channels do not fit the variance type of our scheduler."""
        if not isinstance(self.scheduler, GeneralizedDDIMScheduler):
            return
        predicted, channels = self.unet.config.out_channels, self.unet.config.in_channels
        learned = self.scheduler.config.variance_type == "learned_range"
        if predicted != (2 if learned else 1) * channels:
            remedy = "needs twice the channels" if learned else "needs as many; with twice use 'learned_range'"
            raise ValueError(
                f"the network predicts {predicted} channels from {channels}: "
                f"variance_type={self.scheduler.config.variance_type!r} {remedy}"
            )

    def _check_deterministic(self, invertible: bool = False) -> None:
        """Raise ValueError unless x_T determines the image, and if `invertible` the image x_T."""
        scheduler, config = self.scheduler, self.scheduler.config
        remedy = f"pipe.scheduler = {sampler_class(scheduler).__name__}.from_config(pipe.scheduler.config"
        inverse = isinstance(scheduler, InverseDDIMScheduler | InverseMultistepDDIMScheduler)
        if inverse or not isinstance(scheduler, GeneralizedDDIMScheduler):
            given = f"{type(scheduler).__module__}.{type(scheduler).__name__}"
            raise ValueError(f"latents need a GeneralizedDDIMScheduler of ddim_plugin, not {given}: {remedy})")
        if adds_noise(config.variance_type, config.eta):
            raise ValueError(
                f"latents need the deterministic process: with noise (eta={config.eta:g}, "
                f"variance_type={config.variance_type!r}) x_T does not determine the image: {remedy}, eta=0.0, "
                "variance_type='fixed_small')"
            )
        if invertible and (config.clip_sample or config.thresholding):
            key = "thresholding" if config.thresholding else "clip_sample"
            raise ValueError(
                f"the scheduler constrains x̂0 ({key}=True), and such a step has no inverse: {remedy}, {key}=False)"
            )

    def _set_timesteps(
        self,
        scheduler: SchedulerMixin,
        num_inference_steps: int | None,
        timesteps: Sequence[int] | Tensor | None,
        device: torch.device,
        eta: float | None = None,
    ) -> None:
        """Plan the scheduler's timesteps: 50 by default, or T if that is less."""
        accepted = inspect.signature(scheduler.set_timesteps).parameters
        if timesteps is None:
            steps = num_inference_steps
            if steps is None:
                steps = min(50, getattr(scheduler.config, "num_train_timesteps", 50))
            planned_for = {"eta": eta} if "eta" in accepted else {}
            scheduler.set_timesteps(steps, device=device, **planned_for)
            return
        if not hasattr(timesteps, "__len__") or getattr(timesteps, "ndim", 1) != 1:
            raise ValueError(f"timesteps must be a list of integers, not {timesteps!r}")
        if num_inference_steps is not None and num_inference_steps != len(timesteps):
            raise ValueError(
                f"num_inference_steps={num_inference_steps} and {len(timesteps)} timesteps disagree: pass one of them"
            )
        if "timesteps" not in accepted:
            raise ValueError(f"{type(scheduler).__name__} does not accept custom timesteps: pass num_inference_steps")
        scheduler.set_timesteps(timesteps=timesteps, device=device)

    def _run(
        self,
        scheduler: SchedulerMixin,
        x: Tensor,
        timesteps: Iterable[Tensor],
        condition: Condition,
        after_step: AfterStep | None = None,
        **step_kwargs: Any,
    ) -> Tensor:
        """Return x after the scheduler's steps at `timesteps`."""
        for i, t in enumerate(timesteps):
            output = self._predict(scheduler.scale_model_input(x, t), t, condition)
            step = scheduler.step(output, t, x, **step_kwargs)
            changed = None if after_step is None else after_step(i, t, x, step)
            x = step.prev_sample if changed is None else changed
        return x

    def _predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Return the network's output in the form that the scheduler accepts."""
        output = condition.predict(self.unet, x, t)
        ours = isinstance(self.scheduler, GeneralizedDDIMScheduler)
        learned = getattr(self.scheduler.config, "variance_type", None) in ("learned", "learned_range")
        if output.shape[1] == 2 * x.shape[1] and not (ours or learned):
            output = output[:, : x.shape[1]]  # stock samplers without a learned variance use the prediction alone
        return output

    def _images(self, x: Tensor, output_type: str) -> Any:
        """Convert x_0 to the output type."""
        if output_type == "latent":
            return x
        images = (x / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        array = images.permute(0, 2, 3, 1).float().cpu().numpy()
        return self.numpy_to_pil(array) if output_type == "pil" else array


def check_output_type(output_type: str) -> None:
    """Raise ValueError for an unknown output type."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"unknown output_type {output_type!r}: use one of {', '.join(OUTPUT_TYPES)}")


def batches(images: range, size: int | None) -> list[slice]:
    """Split images into batches of at most `size`; one by default."""
    size = size or len(images)
    return [slice(i, min(i + size, images.stop)) for i in range(images.start, images.stop, size)]


def check_count(name: str, value: int, least: int = 2) -> None:
    """Raise ValueError unless `value` is an integer of at least `least`."""
    if not is_integer(value) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, not {value!r}")
