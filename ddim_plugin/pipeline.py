"""The pipeline: a U-Net and a scheduler, from noise to images."""

import inspect
import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, SchedulerMixin, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .schedulers import GeneralizedDDIMScheduler, Randomness, check_generators
from .tau import is_integer

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
CALLBACK_TENSORS = ("latents", "sample", "pred_original_sample", "pred_epsilon")

StepEndCallback = Callable[["GeneralizedDDIMPipeline", int, Tensor, dict[str, Tensor | None]], dict[str, Any] | None]


class GeneralizedDDIMPipeline(DiffusionPipeline):
    """Unconditional and class-conditional images with the generalized process, or any scheduler of diffusers.

    Args:
        unet: a `UNet2DModel`, with `num_class_embeds` where it is class-conditional. Its `config.sample_size` (an
            integer, or height and width) and `in_channels` give the shape of an image.
        scheduler: a `GeneralizedDDIMScheduler`, or any scheduler of diffusers for ε, x0 or v prediction.
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: UNet2DModel, scheduler: SchedulerMixin):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | Tensor | None = None,
        eta: float | None = None,
        generator: Randomness = None,
        latents: Tensor | None = None,
        class_labels: int | Sequence[int] | Tensor | None = None,
        guidance_scale: float = 1.0,
        null_class_label: int | None = None,
        use_clipped_model_output: bool | None = None,
        callback_on_step_end: StepEndCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = CALLBACK_TENSORS,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Generate images.

        Args:
            batch_size: number of images B; 1 by default, or as many as `latents`.
            num_inference_steps: S, the number of steps; 50 by default, or T where that is less.
            timesteps: τ itself: network times, distinct and descending; instead of `num_inference_steps`.
            eta: η of Eq. 16; None is the scheduler's. Schedulers whose `step` has no η refuse a non-zero one.
            generator: one for the batch, or a list with one for each image. With a list an image depends on its own
                generator only, at any batch size and position.
            latents: x_T, (B, C, H, W), instead of fresh noise.
            class_labels: for a class-conditional network: one label for all, or one for each image.
            guidance_scale: w of classifier-free guidance, ε̂ = ε̂(null) + w·(ε̂(class) − ε̂(null)) (Ho & Salimans 2022);
                1 is none, and costs one evaluation a step instead of two.
            null_class_label: the label that stands for no class; the network's last by default.
            use_clipped_model_output: recompute ε̂ from a clipped x̂0; None is the scheduler's setting.
            callback_on_step_end: called as `callback(pipe, i, timestep, tensors)` after each step; what it returns
                under "latents" takes the place of x_s.
            callback_on_step_end_tensor_inputs: which of "latents" (x_s), "sample" (x_t), "pred_original_sample" (x̂0)
                and "pred_epsilon" (ε̂) it is given; the last two are None where the scheduler does not tell them.
            output_type: "pil", "np" (B, H, W, C) in [0, 1], "pt" (B, C, H, W) in [0, 1], or "latent" (x_0 as it is).
            return_dict: False returns a tuple.

        Returns:
            `ImagePipelineOutput` with `images`.

        Raises:
            ValueError: for any argument that does not fit, before the network is called.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"unknown output_type {output_type!r}: use one of {', '.join(OUTPUT_TYPES)}")
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise ValueError(f"callback_on_step_end must be a function, not {callback_on_step_end!r}")
        unknown = set(callback_on_step_end_tensor_inputs) - set(CALLBACK_TENSORS)
        if unknown:
            raise ValueError(f"unknown callback tensors {sorted(unknown)}: use some of {', '.join(CALLBACK_TENSORS)}")
        shape = self._shape(batch_size, latents)
        check_generators(generator, shape[0])
        device, network_dtype = self._execution_device, self.unet.dtype  # slow to ask for: once
        labels, null_labels = self._labels(class_labels, guidance_scale, null_class_label, shape[0], device)
        self._check_channels()
        self._set_timesteps(num_inference_steps, timesteps, device)
        step_kwargs = self._step_kwargs(eta, generator, use_clipped_model_output)

        dtype = torch.promote_types(network_dtype, torch.float32)  # of the state
        if latents is None:
            x = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        else:
            x = latents.to(device=device, dtype=dtype)
        x = x * self.scheduler.init_noise_sigma

        for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            x_t = x
            model_input = self.scheduler.scale_model_input(x_t, t).to(network_dtype)
            output = self._predict(model_input, t, labels, null_labels, guidance_scale)
            step = self.scheduler.step(output, t, x_t, **step_kwargs)
            x = step.prev_sample
            if callback_on_step_end is not None:
                known = {"latents": x, "sample": x_t}
                tensors = {
                    name: known[name] if name in known else getattr(step, name, None)
                    for name in callback_on_step_end_tensor_inputs
                }
                x = (callback_on_step_end(self, i, t, tensors) or {}).get("latents", x)

        images = self._images(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    # ---- before the loop ---------------------------------------------------------------------------------------

    def _shape(self, batch_size: int | None, latents: Tensor | None) -> tuple[int, ...]:
        """(B, C, H, W) of the images to make."""
        if batch_size is not None and (not is_integer(batch_size) or batch_size < 1):
            raise ValueError(f"batch_size must be a positive integer, not {batch_size!r}")
        if latents is not None and not isinstance(latents, Tensor):
            raise ValueError(f"latents must be a torch tensor, not {type(latents).__name__}")
        if latents is not None and (latents.ndim != 4 or len(latents) == 0):
            raise ValueError(f"latents must be (B, C, H, W) with B ≥ 1, not of shape {tuple(latents.shape)}")
        size = self.unet.config.sample_size
        if size is None:
            if latents is None:
                raise ValueError("the network's config has no sample_size: pass latents of the wanted size")
            size = latents.shape[2:]
        size = (size, size) if isinstance(size, int) else tuple(size)
        shape = (batch_size or (1 if latents is None else len(latents)), self.unet.config.in_channels, *size)
        if latents is None:
            return shape
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}; this network and batch_size need {shape}")
        if not latents.is_floating_point() or not bool(torch.isfinite(latents).all()):
            raise ValueError("latents must be finite numbers: they hold NaN, infinity or integers")
        return shape

    def _labels(
        self,
        class_labels: Any,
        guidance_scale: float,
        null_class_label: int | None,
        batch_size: int,
        device: torch.device,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The labels of the images and, where guidance is on, the null labels: (B,), on the network's device."""
        classes = self.unet.config.num_class_embeds
        if self.unet.class_embedding is None:
            if class_labels is not None or guidance_scale != 1 or null_class_label is not None:
                raise ValueError("this network is unconditional: it takes no class_labels and no guidance_scale")
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
                raise ValueError("pass null_class_label: this network does not say how many classes it has")
            null_labels = torch.full_like(labels, classes - 1 if null_class_label is None else null_class_label)
        for values in (labels, null_labels):
            if classes is None or values is None:
                continue  # an embedding of one's own, whose labels need not be classes
            whole = not values.is_floating_point() and values.dtype != torch.bool and values.ndim == 1
            if not whole or not ((values >= 0) & (values < classes)).all():
                raise ValueError(f"class labels must be integers in 0..{classes - 1}, not {values.tolist()}")
        return labels.to(device), None if null_labels is None else null_labels.to(device)

    def _check_channels(self) -> None:
        """Raise ValueError where the network's channels are not those our scheduler's variance type needs."""
        made, channels = self.unet.config.out_channels, self.unet.config.in_channels
        if not isinstance(self.scheduler, GeneralizedDDIMScheduler):
            return
        learned = self.scheduler.config.variance_type == "learned_range"
        if made != (2 if learned else 1) * channels:
            remedy = "needs twice the channels" if learned else "needs as many; with twice use 'learned_range'"
            raise ValueError(
                f"the network makes {made} channels from {channels}: "
                f"variance_type={self.scheduler.config.variance_type!r} {remedy}"
            )

    def _set_timesteps(
        self, num_inference_steps: int | None, timesteps: Sequence[int] | Tensor | None, device: torch.device
    ) -> None:
        if timesteps is None:
            steps = num_inference_steps
            if steps is None:
                steps = min(50, getattr(self.scheduler.config, "num_train_timesteps", 50))
            self.scheduler.set_timesteps(steps, device=device)
            return
        if not hasattr(timesteps, "__len__") or getattr(timesteps, "ndim", 1) != 1:
            raise ValueError(f"timesteps must be a list of integers, not {timesteps!r}")
        if num_inference_steps is not None and num_inference_steps != len(timesteps):
            raise ValueError(
                f"num_inference_steps={num_inference_steps} and {len(timesteps)} timesteps disagree: pass one of them"
            )
        if "timesteps" not in inspect.signature(self.scheduler.set_timesteps).parameters:
            raise ValueError(
                f"{type(self.scheduler).__name__} takes no timesteps of one's own: pass num_inference_steps"
            )
        self.scheduler.set_timesteps(timesteps=timesteps, device=device)

    def _step_kwargs(
        self, eta: float | None, generator: Randomness, use_clipped_model_output: bool | None
    ) -> dict[str, Any]:
        """What the scheduler's `step` takes of η, the generator and the switch for clipping."""
        given = {"eta": eta, "generator": generator, "use_clipped_model_output": use_clipped_model_output}
        if isinstance(self.scheduler, GeneralizedDDIMScheduler):
            self.scheduler.check_eta(eta)
            return given
        if eta is not None and not (isinstance(eta, Real) and eta >= 0):
            raise ValueError(f"eta must be a non-negative number, not {eta!r}")
        known = inspect.signature(self.scheduler.step).parameters
        for name, value in (("eta", eta), ("use_clipped_model_output", use_clipped_model_output)):
            if value and name not in known:
                raise ValueError(f"{type(self.scheduler).__name__} knows no {name}: leave it out")
        return {key: value for key, value in given.items() if value is not None and key in known}

    # ---- the loop ----------------------------------------------------------------------------------------------

    def _predict(
        self, x: Tensor, t: Tensor, labels: Tensor | None, null_labels: Tensor | None, guidance_scale: float
    ) -> Tensor:
        """The network's output, guided where `null_labels` are given; learned variances are not guided."""
        if null_labels is None:
            output = self.unet(x, t, class_labels=labels).sample
        else:
            both = self.unet(torch.cat([x, x]), t, class_labels=torch.cat([labels, null_labels])).sample
            output, null = both.chunk(2)
            channels = x.shape[1]
            guided = torch.lerp(null[:, :channels], output[:, :channels], guidance_scale)
            output = torch.cat([guided, output[:, channels:]], dim=1)
        ours = isinstance(self.scheduler, GeneralizedDDIMScheduler)
        learned = getattr(self.scheduler.config, "variance_type", None) in ("learned", "learned_range")
        if output.shape[1] == 2 * x.shape[1] and not (ours or learned):
            output = output[:, : x.shape[1]]  # stock samplers that know no variance take the prediction alone
        return output

    def _images(self, x: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return x
        images = (x / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        array = images.permute(0, 2, 3, 1).float().cpu().numpy()
        return self.numpy_to_pil(array) if output_type == "pil" else array
