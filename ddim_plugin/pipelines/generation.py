"""The pipeline: a U-Net and a scheduler, from noise to images, and from images to latents and back."""

import inspect
import json
import logging
import os
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, SchedulerMixin, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import hf_hub_download
from torch import Tensor

from ..schedulers import KEY, GeneralizedDDIMScheduler, Randomness, check_generators, restored
from ..schedulers.config import CLASSES
from .conditions import Labels
from .latents import Latents
from .loop import AfterStep, check_output_type

CALLBACK_TENSORS = ("latents", "sample", "pred_original_sample", "pred_epsilon")

STOCK_SCHEDULER = ["diffusers", "DDIMScheduler"]
"""Entry of `model_index.json` for a scheduler of this package: its config is readable as that of a stock one."""

StepEndCallback = Callable[["GeneralizedDDIMPipeline", int, Tensor, dict[str, Tensor | None]], dict[str, Any] | None]

logger = logging.getLogger("ddim_plugin")


class GeneralizedDDIMPipeline(Latents, DiffusionPipeline):
    """Unconditional and class-conditional images with the generalized process, or any scheduler of diffusers.

    The call generates images from noise. In the deterministic process (η = 0), x_T is a latent code of the image:
    `encode`, `decode`, `reconstruct`, `interpolate` and `interpolate_grid` work with it, with a scheduler of this
    package.

    Args:
        unet: a `UNet2DModel`, with `num_class_embeds` if it is class-conditional. Its `config.sample_size` (an integer,
            or height and width) and `in_channels` give the shape of an image.
        scheduler: a `GeneralizedDDIMScheduler`, or any scheduler of diffusers for ε, x0 or v prediction. A stock one
            that was saved from a scheduler of this package is restored to that.

    Raises:
        ValueError: if weights of the network are missing.
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: UNet2DModel, scheduler: SchedulerMixin):
        super().__init__()
        _check_weights(unet)
        self.register_modules(unet=unet, scheduler=restored(scheduler))

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | Tensor | None = None,
        eta: float | None = None,
        generator: Randomness = None,
        latents: Tensor | None = None,
        class_labels: Labels = None,
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
            num_inference_steps: S, the number of steps; 50 by default, or T if that is less.
            timesteps: network timesteps, distinct and descending, instead of `num_inference_steps`.
            eta: η of Eq. 16. None is the scheduler's. Schedulers whose `step` has no η refuse a non-zero one.
            generator: one for the batch, or a list with one for each image. With a list an image depends on its own
                generator only, at any batch size and position.
            latents: x_T, (B, C, H, W), instead of fresh noise.
            class_labels: for a class-conditional network: one label for all, or one for each image.
            guidance_scale: w of classifier-free guidance, ε̂ = ε̂(null) + w·(ε̂(class) − ε̂(null)) (Ho & Salimans 2022).
                Other values than 1 take two evaluations of the network a step.
            null_class_label: the label that means "no class"; the network's last by default.
            use_clipped_model_output: recompute ε̂ from a clipped x̂0. None is the scheduler's setting.
            callback_on_step_end: called as `callback(pipe, i, timestep, tensors)` after each step. If it returns
                "latents", they replace x_s.
            callback_on_step_end_tensor_inputs: which of "latents" (x_s), "sample" (x_t), "pred_original_sample" (x̂0)
                and "pred_epsilon" (ε̂) it receives. The last two are None if the scheduler does not return them.
            output_type: "pil", "np" (B, H, W, C) in [0, 1], "pt" (B, C, H, W) in [0, 1], or "latent" (x_0 itself).
            return_dict: False returns a tuple.

        Returns:
            `ImagePipelineOutput` with `images`.

        Raises:
            ValueError: for any argument that does not fit, before the network is called.
        """
        check_output_type(output_type)
        after_step = self._after_step(callback_on_step_end, callback_on_step_end_tensor_inputs)
        shape = self._shape(batch_size, latents)
        check_generators(generator, shape[0])
        condition = self._condition(class_labels, guidance_scale, null_class_label, shape[0])
        self._check_channels()
        self._set_timesteps(self.scheduler, num_inference_steps, timesteps, condition.device, eta)
        step_kwargs = self._step_kwargs(eta, generator, use_clipped_model_output)

        if latents is None:
            latents = randn_tensor(shape, generator, condition.device, condition.state_dtype)
        x = latents.to(condition.device, condition.state_dtype) * self.scheduler.init_noise_sigma
        steps = self.progress_bar(self.scheduler.timesteps)
        x = self._run(self.scheduler, x, steps, condition, after_step, **step_kwargs)
        images = self._images(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _after_step(self, callback: StepEndCallback | None, names: Sequence[str]) -> AfterStep | None:
        """Check the callback, and wrap it for the loop."""
        if callback is not None and not callable(callback):
            raise ValueError(f"callback_on_step_end must be a function, not {callback!r}")
        unknown = set(names) - set(CALLBACK_TENSORS)
        if unknown:
            raise ValueError(f"unknown callback tensors {sorted(unknown)}: use some of {', '.join(CALLBACK_TENSORS)}")
        if callback is None:
            return None

        def after_step(i: int, t: Tensor, x_t: Tensor, step: Any) -> Tensor | None:
            known = {"latents": step.prev_sample, "sample": x_t}
            tensors = {name: known[name] if name in known else getattr(step, name, None) for name in names}
            return (callback(self, i, t, tensors) or {}).get("latents")

        return after_step

    def _step_kwargs(
        self, eta: float | None, generator: Randomness, use_clipped_model_output: bool | None
    ) -> dict[str, Any]:
        """Select the arguments that the scheduler's `step` accepts, and refuse those it does not."""
        given = {"eta": eta, "generator": generator, "use_clipped_model_output": use_clipped_model_output}
        if isinstance(self.scheduler, GeneralizedDDIMScheduler):
            self.scheduler.check_eta(eta)
            return given
        if eta is not None and not (isinstance(eta, Real) and eta >= 0):
            raise ValueError(f"eta must be a non-negative number, not {eta!r}")
        accepted = inspect.signature(self.scheduler.step).parameters
        for name, value in (("eta", eta), ("use_clipped_model_output", use_clipped_model_output)):
            if value and name not in accepted:
                raise ValueError(f"{type(self.scheduler).__name__} does not support {name}: leave it out")
        return {key: value for key, value in given.items() if value is not None and key in accepted}

    # ---- saving and loading --------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any):
        """Load a pipeline from a folder or from the Hub.

        Loads what this class saved, and unconditional pipelines of diffusers (`DDPMPipeline`, `DDIMPipeline`,
        `PNDMPipeline`). The scheduler of the latter becomes a `GeneralizedDDIMScheduler` with its settings, which is
        logged.

        Args:
            pretrained_model_name_or_path: a folder, or the id of a repository.
            kwargs: those of `DiffusionPipeline.from_pretrained`.

        Raises:
            ValueError: if weights are missing, or the scheduler belongs to another family of models.
        """
        pipe = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if "scheduler" not in kwargs:
            file = Path(pretrained_model_name_or_path, cls.config_name)
            if not file.is_file():  # it is in the cache by now
                place = {key: kwargs.get(key) for key in ("cache_dir", "revision")}
                file = hf_hub_download(pretrained_model_name_or_path, cls.config_name, **place, local_files_only=True)
            pipe.scheduler = _opened(pipe.scheduler, *cls._dict_from_json_file(file)["_saved_as"])
        return pipe

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike, **kwargs: Any) -> dict[str, Any]:
        """Read `model_index.json` with this class and stock classes in it, and those it was saved with beside them."""
        index = super()._dict_from_json_file(json_file, **kwargs)  # diffusers 0.38 has keywords
        saved_as = index.get(KEY, index.get("_class_name")), index.get("scheduler")
        pipeline, scheduler = (each[-1] if isinstance(each, list) else each for each in saved_as)
        index |= {"_class_name": cls.__name__, "_saved_as": (pipeline, scheduler)}
        if scheduler in CLASSES:  # version 0.1 named the class itself
            index["scheduler"] = STOCK_SCHEDULER
        return index

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save into a folder that stock pipelines and this one load. Arguments are those of `DiffusionPipeline`.

        With `push_to_hub`, `kwargs` are those of that method; `repo_id` is the name of the folder by default.
        """
        super().save_pretrained(save_directory, safe_serialization, variant, max_shard_size)
        _remove_stale_weights(Path(save_directory, "unet"), safe_serialization, variant)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), variant=variant, **kwargs)

    def to_json_string(self) -> str:
        """Write `model_index.json` as that of a stock pipeline, with the name of this class under `KEY`."""
        index = json.loads(super().to_json_string()) | {KEY: type(self).__name__}
        index.pop("_name_or_path", None)  # a place on this machine
        if type(self) is GeneralizedDDIMPipeline:
            index["_class_name"] = "DDIMPipeline"
        if isinstance(self.scheduler, GeneralizedDDIMScheduler):
            index["scheduler"] = STOCK_SCHEDULER
        return json.dumps(index, indent=2, sort_keys=True) + "\n"


def _check_weights(unet: torch.nn.Module) -> None:
    """Raise ValueError if weights have no values. diffusers only warns of weights that no file contains."""
    missing = [name for name, parameter in unet.named_parameters() if parameter.is_meta]
    if missing and not hasattr(unet, "_hf_hook"):  # with a hook the weights are offloaded
        raise ValueError(
            f"{len(missing)} weights of the network are missing, such as {missing[0]}: use files that contain them"
        )


def _opened(scheduler: SchedulerMixin, saved_by: str, saved_as: str) -> SchedulerMixin:
    """Return the scheduler to use for one that was loaded, given the pipeline and scheduler it was saved as."""
    if isinstance(scheduler, GeneralizedDDIMScheduler):
        return scheduler
    if saved_as in CLASSES:
        return CLASSES[saved_as].from_config(scheduler.config)
    if not hasattr(diffusers, saved_by):  # saved by our pipeline: the stock scheduler was chosen
        return scheduler
    stock = type(scheduler).__name__
    if stock not in GeneralizedDDIMScheduler._compatibles:
        raise ValueError(f"{stock} belongs to another family of models: pass scheduler=… that fits the network")
    ours = GeneralizedDDIMScheduler.from_config(scheduler.config)
    settings = ("eta", "variance_type", "timestep_spacing", "clip_sample")
    named = ", ".join(f"{key}={ours.config[key]!r}" for key in settings)
    logger.warning("The %s of this %s became a GeneralizedDDIMScheduler with %s.", stock, saved_by, named)
    return ours


def _remove_stale_weights(folder: Path, safe_serialization: bool, variant: str | None) -> None:
    """Delete weights of an earlier save that would be loaded instead of those just written.

    diffusers prefers an index of shards to one file, and safetensors to pickles. When it saves, it deletes old shards,
    but not their index, nor safetensors when it writes a pickle.
    """
    ending = "" if variant is None else f".{variant}"
    if not safe_serialization:
        (folder / f"diffusion_pytorch_model{ending}.safetensors").unlink(missing_ok=True)
    for kind in ("safetensors", "bin"):
        if not any(folder.glob(f"diffusion_pytorch_model{ending}-*-of-*.{kind}")):
            (folder / f"diffusion_pytorch_model.{kind}.index{ending}.json").unlink(missing_ok=True)
