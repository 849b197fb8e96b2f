"""What all calls of the pipeline share: labels and guidance, checks, and the loop over timesteps."""

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from diffusers import SchedulerMixin, UNet2DModel
from diffusers.image_processor import VaeImageProcessor
from torch import Generator, Tensor

from ..process.moves import adds_noise
from ..process.spacings import is_integer
from ..schedulers import GeneralizedDDIMScheduler, sampler_class
from ..schedulers.inverse import Upwards

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
Timesteps = Sequence[float] | Tensor | None
Labels = int | Sequence[int] | Tensor | None
AfterStep = Callable[[int, Tensor, Tensor, Any], Tensor | None]  # (number, timestep, x_t, output of `step`) ↦ a new x_s


class Condition(NamedTuple):
    """Labels and the scale of guidance (Ho & Salimans 2022), and where the network runs."""

    labels: Tensor | None  # (1, B), or (2, B) with those of "no class" for guidance
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
        return 1 if self.labels is None else len(self.labels)

    def rows(self, rows: Tensor | slice) -> "Condition":
        """Return the condition of some of the images."""
        return self if self.labels is None else self._replace(labels=self.labels[:, rows])

    def predict(self, unet: UNet2DModel, x: Tensor, t: Tensor) -> Tensor:
        """Return the network's output, guided if guidance is on. Learned variances are not guided."""
        x, labels = x.to(self.dtype), None if self.labels is None else self.labels.flatten(0, 1)
        if self.evaluations == 1:
            return unet(x, t, class_labels=labels).sample
        output, null = unet(torch.cat([x, x]), t, class_labels=labels).sample.chunk(2)
        channels = x.shape[1]
        guided = torch.lerp(null[:, :channels], output[:, :channels], self.scale)
        return torch.cat([guided, output[:, channels:]], dim=1)


class Loop:
    """Checks and the sampling loop, for a `DiffusionPipeline` with a `UNet2DModel` as `unet`, and a `scheduler`."""

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(H, W) of the network's images, or None if its config has no `sample_size`."""
        size = self.unet.config.sample_size
        return (size, size) if isinstance(size, int) else size and tuple(size)

    @property
    def _image_range(self) -> tuple[float, float]:
        """Black and white in x_0."""
        return getattr(self.scheduler, "image_range", (-1.0, 1.0))

    def _noise(self, seeds: Iterable[int]) -> tuple[list[Generator], Tensor]:
        """Draw latents, (B, C, H, W), each with the generator of its seed."""
        generators = [Generator().manual_seed(seed) for seed in seeds]
        return generators, torch.cat([torch.randn(self._shape(1), generator=each) for each in generators])

    def _shape(self, batch_size: int) -> tuple[int, ...]:
        """Return the shape of new latents, or raise ValueError if the network's config has no `sample_size`."""
        if self.image_size is None:
            raise ValueError("the network's config has no sample_size: pass latents of the wanted size, or set it")
        return batch_size, self.unet.config.in_channels, *self.image_size

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
        """Check network, labels and guidance, and look up device and dtype once."""
        self._check_channels()
        device, dtype = self._execution_device, self.unet.dtype
        classes = self.unet.config.num_class_embeds  # None for a custom embedding, whose labels need not be classes
        if self.unet.class_embedding is None:
            if class_labels is not None or guidance_scale != 1 or null_class_label is not None:
                raise ValueError("this network is unconditional: leave out class labels and guidance_scale")
            return Condition(None, guidance_scale, device, dtype)
        if class_labels is None:
            raise ValueError(f"this network is class-conditional: pass class_labels (0..{(classes or 0) - 1})")
        if not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale must be a finite number, not {guidance_scale!r}")
        labels = torch.as_tensor(class_labels)
        labels = labels.expand(batch_size) if labels.ndim == 0 else labels
        if len(labels) != batch_size:
            raise ValueError(f"{len(labels)} class_labels for a batch of {batch_size}: give one, or one for each")
        rows = [labels]
        if guidance_scale != 1:
            if null_class_label is None and classes is None:
                raise ValueError("the network's config has no num_class_embeds: pass null_class_label")
            rows.append(torch.full_like(labels, classes - 1 if null_class_label is None else null_class_label))
        for values in rows if classes else ():
            whole = not values.is_floating_point() and values.dtype != torch.bool and values.ndim == 1
            if not whole or not ((values >= 0) & (values < classes)).all():
                raise ValueError(f"class labels must be integers in 0..{classes - 1}, not {values.tolist()}")
        return Condition(torch.stack(rows).to(device), guidance_scale, device, dtype)

    def _check_channels(self) -> None:
        """Raise ValueError if the network's channels do not fit the variance type of our scheduler."""
        if not isinstance(self.scheduler, GeneralizedDDIMScheduler):
            return
        made, channels = self.unet.config.out_channels, self.unet.config.in_channels
        kind = self.scheduler.config.variance_type
        factor = 2 if kind == "learned_range" else 1
        if made != factor * channels:
            remedy = "needs twice the channels" if factor == 2 else "needs as many; with twice use 'learned_range'"
            raise ValueError(f"the network predicts {made} channels from {channels}: variance_type={kind!r} {remedy}")

    def _check_deterministic(self, invertible: bool = False) -> None:
        """Raise ValueError unless x_T determines the image, and if `invertible` the image x_T."""
        scheduler, config, change = self.scheduler, self.scheduler.config, ""
        if isinstance(scheduler, Upwards) or not isinstance(scheduler, GeneralizedDDIMScheduler):
            given = f"{type(scheduler).__module__}.{type(scheduler).__name__}"
            problem = f"latents need a GeneralizedDDIMScheduler of ddim_plugin, not {given}"
        elif adds_noise(config.variance_type, config.eta):
            noise = f"eta={config.eta:g}, variance_type={config.variance_type!r}"
            problem = f"latents need the deterministic process: with noise ({noise}) x_T does not determine the image"
            change = ", eta=0.0, variance_type='fixed_small'"
        elif config.corrector_steps:
            problem, change = "latents need the deterministic process, without a corrector", ", corrector_steps=0"
        elif invertible and (config.clip_sample or config.thresholding):
            key = "thresholding" if config.thresholding else "clip_sample"
            problem = f"the scheduler constrains x̂0 ({key}=True), and such a step has no inverse"
            change = f", {key}=False"
        else:
            return
        remedy = f"pipe.scheduler = {sampler_class(scheduler).__name__}.from_config(pipe.scheduler.config{change})"
        raise ValueError(f"{problem}: {remedy}")

    def _set_timesteps(
        self, scheduler: SchedulerMixin, S: int | None, timesteps: Timesteps, device: torch.device, eta: float | None
    ) -> None:
        """Plan the scheduler's timesteps: 50 by default, or T if that is less."""
        accepted, plan = inspect.signature(scheduler.set_timesteps).parameters, {"timesteps": timesteps}
        if timesteps is None:
            plan = {"num_inference_steps": min(50, scheduler.config.num_train_timesteps) if S is None else S}
        elif S is not None and len(timesteps) != S:
            raise ValueError(f"num_inference_steps={S} and {len(timesteps)} timesteps disagree: pass one of them")
        elif "timesteps" not in accepted:
            raise ValueError(f"{type(scheduler).__name__} does not accept custom timesteps: pass num_inference_steps")
        scheduler.set_timesteps(device=device, **plan, **({"eta": eta} if "eta" in accepted else {}))

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
        self._interrupt = False
        scale = getattr(scheduler, "scale_model_input", lambda x, t: x)  # stock schedulers of flow matching have none
        for i, t in enumerate(timesteps):
            output = self._predict(scale(x, t), t, condition)
            step = scheduler.step(output, t, x, **step_kwargs)
            changed = None if after_step is None else after_step(i, t, x, step)
            x = step.prev_sample if changed is None else changed
            if self._interrupt:
                break
        return x

    def _images(self, x: Tensor, output_type: str) -> Any:
        """Convert x_0 to images of an output type. Raises ValueError for "pil" and "np" if a number is not finite."""
        x = finite(x) if output_type in ("pil", "np") else x
        x = 2 * x - 1 if self._image_range == (0, 1) and output_type != "latent" else x
        return VaeImageProcessor().postprocess(x, output_type)

    def _predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Return the network's output in the form that the scheduler accepts."""
        output = condition.predict(self.unet, x, t)
        learned = getattr(self.scheduler.config, "variance_type", None) in ("learned", "learned_range")
        unused = not learned and output.shape[1] == 2 * x.shape[1]  # a variance that a stock sampler does not use
        return output[:, : x.shape[1]] if unused else output


def finite(x: Tensor) -> Tensor:
    """Return x_0 or x_T, or raise ValueError if a number in it is not finite."""
    if not bool(torch.isfinite(x).all()):
        raise ValueError("the network's output is not finite, nor are the images: in half precision, use float32")
    return x


def check_output_type(output_type: str) -> None:
    """Raise ValueError for an unknown output type."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"unknown output_type {output_type!r}: use one of {', '.join(OUTPUT_TYPES)}")


def batches(images: range, size: int | None) -> list[slice]:
    """Split images into batches of at most `size`; one by default."""
    size = len(images) if size is None else size
    check_count("batch_size", size, 1)
    return [slice(i, min(i + size, images.stop)) for i in range(images.start, images.stop, size)]


def check_count(name: str, value: int, least: int = 2) -> None:
    """Raise ValueError unless `value` is an integer of at least `least`."""
    if not is_integer(value) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, not {value!r}")
