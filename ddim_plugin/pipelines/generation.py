"""The pipeline: a U-Net and a scheduler, from noise to images, and from images to latents and back."""

import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, SchedulerMixin, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..process.spacings import check_name, integer
from ..schedulers import KEY, DiscreteDDIMScheduler, GeneralizedDDIMScheduler, Randomness, check_generators, restored
from ..schedulers.config import CLASSES, FLOW, VE, VP, path_of
from .latents import Latents
from .loop import OUTPUT_TYPES, SELF_CONDITIONING, Classifier, Labels, Timesteps, accepted

CALLBACK_TENSORS = ("latents", "sample", "pred_original_sample", "pred_epsilon")
# The stock pipeline for each stock scheduler, and its predictions. `DDIMPipeline` would replace schedulers of flows.
STOCK = {VP: ("DDIMPipeline", ("epsilon", "sample", "v_prediction")), FLOW: ("DDPMPipeline", ("flow_prediction",))}
STOCK |= {VE: ("ScoreSdeVePipeline", ("score",))}


class GeneralizedDDIMPipeline(Latents, DiffusionPipeline):
    """Generate unconditional and class-conditional images with the generalized process, or any scheduler of diffusers.

    Args:
        unet: the network; its config gives the shape of an image, and the number of classes if it is conditional.
        scheduler: one of this package, which the methods for latents need, or one of diffusers that fits the network.
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: UNet2DModel, scheduler: SchedulerMixin):
        super().__init__()
        missing = [name for name, parameter in unet.named_parameters() if parameter.is_meta]  # no file contains them
        if missing and not hasattr(unet, "_hf_hook"):  # with a hook the weights are offloaded
            raise ValueError(f"{len(missing)} weights of the network are missing, such as {missing[0]}: add their file")
        self.register_modules(unet=unet, scheduler=restored(scheduler))

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: Timesteps = None,
        eta: float | None = None,
        generator: Randomness = None,
        latents: Tensor | None = None,
        class_labels: Labels = None,
        guidance_scale: float = 1.0,
        null_class_label: int | None = None,
        use_clipped_model_output: bool | None = None,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = CALLBACK_TENSORS,
        output_type: str = "pil",
        return_dict: bool = True,
        mu: float | None = None,
        classifier: Classifier | None = None,
        classifier_scale: float = 1.0,
    ) -> ImagePipelineOutput | tuple:
        """Generate images.

        Args, with a ValueError for those that do not fit before the network is called, and for images with NaN:
            batch_size: number of images B; 1 by default, or as many as `latents`.
            num_inference_steps: S, the number of steps; 50 by default, or T if that is less.
            timesteps: network timesteps instead, distinct and descending: 0..T−1, 1000·σ for flow matching, or σ.
            eta: η of Eq. 16. None is the scheduler's. Schedulers whose `step` has no η refuse a non-zero one.
            generator: one for the batch, or a list with one for each image, which then depends on no other image.
            latents: x_T in units of its noise, (B, C, H, W), instead of fresh noise.
            class_labels: for a class-conditional network or a classifier: one label for all, or one for each image.
            guidance_scale: w of classifier-free guidance, ε̂ = ε̂(null) + w·(ε̂(class) − ε̂(null)); two evaluations if ≠ 1.
            null_class_label: the label that means "no class"; the network's last by default.
            use_clipped_model_output: recompute ε̂ from a clipped x̂0. None is the scheduler's setting.
            callback_on_step_end: `callback(pipe, i, timestep, tensors)` after each step. Its "latents" replace x_s, and
                `pipe._interrupt = True` ends the steps.
            callback_on_step_end_tensor_inputs: which of "latents" (x_s), "sample" (x_t), "pred_original_sample" (x̂0)
                and "pred_epsilon" (ε̂) it receives, None if the scheduler does not return them.
            output_type: "pil", "np" (B, H, W, C) in [0, 1], "pt" (B, C, H, W) in [0, 1], or "latent" (x_0 itself).
            mu: logarithm of the shift of flow matching, for a scheduler with `use_dynamic_shifting`.
            classifier: a differentiable function of x_t and timesteps (B,) that returns logits (B, classes). ε̂ becomes
                ε̂ − s·b_t·∇ log p(y|x_t), except at pure noise. At η = 1 the mean of x_s moves by s·σ²·∇ log p(y|x_t)
                instead, but for multistep methods (Dhariwal & Nichol 2021, Algorithms 2 and 1).
            classifier_scale: s.
        """
        check_name("output_type", output_type, OUTPUT_TYPES)
        for name in (names := callback_on_step_end_tensor_inputs):
            check_name("tensor for the callback", name, CALLBACK_TENSORS)
        integer("batch_size", 1 if batch_size is None else batch_size, 1)
        shape = self._shape(batch_size or 1) if latents is None else self._check_latents(latents, batch_size)
        check_generators(generator, shape[0])
        guidance = class_labels, guidance_scale, null_class_label, classifier, classifier_scale
        condition = self._condition(shape[0], *guidance)
        ours = isinstance(self.scheduler, GeneralizedDDIMScheduler)  # None and 0 differ in its plan, not in its step
        self._set_timesteps(self.scheduler, num_inference_steps, timesteps, mu=mu, eta=eta if ours else None)
        settings = {"generator": generator, "use_clipped_model_output": use_clipped_model_output}
        settings = accepted(self.scheduler.step, eta=None if ours else eta, **settings)
        latents = randn_tensor(shape, generator, **condition.state) if latents is None else latents
        x = latents.to(**condition.state) * getattr(self.scheduler, "init_noise_sigma", 1.0)  # stock flows have none
        x = self.scheduler.initial_sample(x) if isinstance(self.scheduler, DiscreteDDIMScheduler) else x
        self._interrupt = False
        for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            step, condition = self._step(x, t, condition, **settings)
            known, x = {"sample": x, "latents": step.prev_sample}, step.prev_sample
            if callback_on_step_end is not None:
                tensors = {name: known[name] if name in known else getattr(step, name, None) for name in names}
                x = (callback_on_step_end(self, i, t, tensors) or {}).get("latents", x)
            if self._interrupt:
                break
        images = self._images(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any):
        """Load a pipeline. A stock scheduler becomes a `GeneralizedDDIMScheduler` with its settings, and is logged."""
        place = {"local_files_only": True, **{key: kwargs.get(key) for key in ("cache_dir", "revision")}}
        try:
            pipe = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except NotImplementedError:  # a β schedule that no stock scheduler has; its file is in the cache by now
            config = GeneralizedDDIMScheduler.load_config(pretrained_model_name_or_path, subfolder="scheduler", **place)
            kwargs["scheduler"] = CLASSES[config[KEY]["class"]].from_config(config)
            pipe = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        pipe.scheduler = stock = kwargs.get("scheduler") or pipe.scheduler  # one that is passed stays as it is
        if "scheduler" not in kwargs and not isinstance(stock, GeneralizedDDIMScheduler):
            pipeline, name = cls.load_config(pretrained_model_name_or_path, **place)["_saved_as"]
            if name in CLASSES:
                pipe.scheduler = CLASSES[name].from_config(stock.config)
            elif hasattr(diffusers, pipeline):  # in a folder of our pipeline the stock scheduler was chosen
                pipe.scheduler = GeneralizedDDIMScheduler.from_config(stock.config)
                shown = ("eta", "variance_type", "timestep_spacing", "clip_sample")
                named = ", ".join(f"{key}={pipe.scheduler.config[key]!r}" for key in shown)
                text = f"The {type(stock).__name__} of this {pipeline} became a GeneralizedDDIMScheduler with {named}."
                logging.getLogger("ddim_plugin").warning(text)
        return pipe

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike, **kwargs: Any) -> dict[str, Any]:
        index = super()._dict_from_json_file(json_file, **kwargs)  # diffusers 0.38 has keywords
        saved_as = index.get(KEY, index.get("_class_name")), index.get("scheduler")
        pipeline, scheduler = (each[-1] if isinstance(each, list) else each for each in saved_as)
        if others := index.keys() & {"vae", "vqvae", "text_encoder", "transformer"}:
            raise ValueError(f"{pipeline} has {', '.join(sorted(others))}, not pixels alone: use DiffusionPipeline")
        index |= {"_class_name": cls.__name__, "_saved_as": (pipeline, scheduler)}
        if scheduler in CLASSES:  # version 0.1 named the class itself
            index["scheduler"] = ["diffusers", "DDIMScheduler"]
        return index

    def save_pretrained(self, save_directory: str | os.PathLike, *, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save a folder that stock pipelines load too. `kwargs` are those of diffusers, and of `push_to_hub`."""
        saving = {key: kwargs.pop(key) for key in ("safe_serialization", "variant", "max_shard_size") if key in kwargs}
        if kwargs and not push_to_hub:
            raise TypeError(f"save_pretrained() got an unexpected keyword argument {min(kwargs)!r}: leave it out")
        super().save_pretrained(save_directory, **saving)
        config = Path(save_directory, "unet", "config.json")
        settings = json.loads(config.read_text(encoding="utf-8"))
        settings.pop("_name_or_path", None)  # a place on this machine
        config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for file in config.parent.glob("*.safetensors"):  # safetensors does not follow the umask
            file.chmod(config.stat().st_mode & 0o777)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), variant=saving.get("variant"), **kwargs)

    def to_json_string(self) -> str:
        """Write `model_index.json` as that of a stock pipeline, with the name of this class under `KEY`."""
        index = json.loads(super().to_json_string()) | {KEY: type(self).__name__}
        index.pop("_name_or_path", None)  # a place on this machine
        name, config = index["scheduler"][1], self.scheduler.config
        pipeline, predictions = STOCK.get(name, STOCK[VP])
        on_path = name in STOCK or (path_of(config) == VP and "num_classes" not in config)
        on_path = on_path and config.get("beta_schedule") != "sqrt"
        is_known = on_path and config.get("prediction_type", predictions[0]) in predictions
        if type(self) is GeneralizedDDIMPipeline and is_known and SELF_CONDITIONING not in self.unet.config:
            index["_class_name"] = pipeline
        return json.dumps(index, indent=2, sort_keys=True) + "\n"
