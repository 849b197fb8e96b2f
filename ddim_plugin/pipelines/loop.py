"""What all calls of the pipeline share: labels and guidance, checks, and the loop over timesteps."""

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial, wraps
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from ..process.moves import adds_noise
from ..process.spacings import integer
from ..schedulers import DiscreteDDIMScheduler, GeneralizedDDIMScheduler, MultistepDDIMScheduler, sampler_class
from ..schedulers.inverse import InverseDDIMScheduler, InverseMultistepDDIMScheduler, Upwards
from ..schedulers.step import number

SELF_CONDITIONING = "_self_conditioning"  # entry in the config of a network that sees x_t and x̂0
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
Timesteps = Sequence[float] | Tensor | None
Classifier = Callable[[Tensor, Tensor], Tensor]  # of x_t (B, C, H, W) and timesteps (B,): logits (B, classes)
Labels = int | Sequence[int] | Tensor | None
INVERSES = {GeneralizedDDIMScheduler: InverseDDIMScheduler, MultistepDDIMScheduler: InverseMultistepDDIMScheduler}
FLOAT32 = ("Wan", "ZImage")  # pipelines whose latents are float32 in half precision too
STEPS = {"num_inference_steps", "timesteps", "sigmas"}  # arguments that choose the steps: one of them
FIXED = {*STEPS, "eta"}


class Condition(NamedTuple):
    """Labels and guidance (Ho & Salimans 2022), x̂0 for self-conditioning, and where the network runs."""

    labels: Tensor  # (1, B), NaN if none are given, or (2, B) with those of "no class" for guidance
    scale: float  # unless it is 1, a prediction takes two evaluations of the network
    dtype: torch.dtype  # of the network
    state: dict[str, Any]  # device and dtype of samples between the steps: only the network has half precision
    classifier: Classifier | None
    classifier_scale: float
    guess: Tensor | None  # x̂0 of the last step, at first 0, if the network sees it (Chen et al. 2022)

    def rows(self, rows: Tensor | slice) -> "Condition":
        return self._replace(labels=self.labels[:, rows])


class Loop:
    """Checks and the sampling loop, for a `DiffusionPipeline` with a `UNet2DModel` as `unet`, and a `scheduler`."""

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(H, W) of the network's images, or None if its config has no `sample_size`."""
        size = self.unet.config.sample_size
        return (size, size) if isinstance(size, int) else size and tuple(size)

    @property
    def image_channels(self) -> int:
        """C of the images, half of the network's if it sees x̂0 beside x_t."""
        return self.unet.config.in_channels // (2 if SELF_CONDITIONING in self.unet.config else 1)

    def _shape(self, batch_size: int) -> tuple[int, ...]:
        if self.image_size is None:
            raise ValueError("the network's config has no sample_size: pass latents of the wanted size, or set it")
        return batch_size, self.image_channels, *self.image_size

    def _check_latents(self, latents: Tensor, batch_size: int | None = None) -> tuple[int, ...]:
        given = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
        if isinstance(given, str) or len(given) != 4 or not given[0]:
            raise ValueError(f"latents must be a torch tensor (B, C, H, W) with B ≥ 1, not {given}")
        shape = (batch_size or given[0], self.image_channels, *(self.image_size or given[2:]))
        if given != shape:
            raise ValueError(f"latents have shape {given}; this network and batch_size need {shape}")
        if not latents.is_floating_point() or not bool(torch.isfinite(latents).all()):
            raise ValueError("latents must be finite numbers: they contain NaN, infinity or integers")
        return shape

    def _condition(
        self,
        count: int,
        class_labels: Labels = None,
        guidance_scale: float = 1.0,
        null_class_label: int | None = None,
        classifier: Classifier | None = None,
        classifier_scale: float = 1.0,
    ) -> Condition:
        self._check_channels()
        scale, dtype, device = guidance_scale, self.unet.dtype, self._execution_device
        state = {"device": device, "dtype": torch.promote_types(dtype, torch.float32)}
        labels = torch.as_tensor(math.nan if class_labels is None else class_labels, device=device)
        labels = labels.expand(count) if labels.ndim == 0 else labels
        if len(labels) != count:
            raise ValueError(f"{len(labels)} class_labels for a batch of {count}: give one, or one for each")
        whole = labels.ndim == 1 and not labels.is_floating_point() and labels.dtype != torch.bool
        labels = labels.long() if whole else labels
        for name, value in (("guidance_scale", scale), ("classifier_scale", classifier_scale)):
            if not isinstance(value, Real) or not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, not {value!r}")
        if classifier is None and classifier_scale != 1:
            raise ValueError(f"classifier_scale={classifier_scale!r} has no effect without a classifier: pass one")
        if classifier is not None and not whole:
            raise ValueError(f"a classifier needs integers as class_labels, not {class_labels!r}")
        guess = torch.zeros((), **state) if SELF_CONDITIONING in self.unet.config else None
        if classifier is not None or guess is not None:
            self._check_ours("a classifier and self-conditioning need")
        condition = Condition(labels[None], scale, dtype, state, classifier, classifier_scale, guess)
        classes = self.unet.config.num_class_embeds  # None for a custom embedding, whose labels need not be classes
        if self.unet.class_embedding is None:
            if (class_labels is not None and classifier is None) or scale != 1 or null_class_label is not None:
                raise ValueError("this network is unconditional: leave out class labels and guidance_scale")
            return condition
        null = classes and classes - 1 if null_class_label is None else null_class_label
        if class_labels is None or (scale != 1 and null is None):
            known = f"class_labels (0..{classes - 1})" if classes else "class_labels, and null_class_label for guidance"
            raise ValueError(f"this network is class-conditional: pass {known}")
        rows = labels[None] if scale == 1 else torch.stack([labels, torch.full_like(labels, null)])
        if classes and not (whole and ((rows >= 0) & (rows < classes)).all()):
            raise ValueError(f"class labels must be integers in 0..{classes - 1}, not {rows.flatten().tolist()}")
        return condition._replace(labels=rows)

    def _check_channels(self) -> None:
        if isinstance(self.scheduler, GeneralizedDDIMScheduler | DiscreteDDIMScheduler):
            given, channels, config = self.unet.config.out_channels, self.image_channels, self.scheduler.config
            K, kind = config.get("num_classes"), config.get("variance_type")
            if given != (needed := channels * (K or 1 + (kind == "learned_range"))):
                remedy = f"variance_type={kind!r} needs {needed} ('learned_range' twice as many as images have)"
                remedy = f"num_classes={K} needs {needed}" if K else remedy
                raise ValueError(f"the network predicts {given} channels from {channels}: {remedy}")

    def _check_ours(self, what: str) -> str:
        """Raise ValueError for a foreign scheduler. Returns the beginning of what makes another."""
        remedy = f"pipe.scheduler = {sampler_class(self.scheduler).__name__}.from_config(pipe.scheduler.config"
        if isinstance(self.scheduler, DiscreteDDIMScheduler):
            raise ValueError(f"{what} a Gaussian process, and this one is for categories: use another model")
        if isinstance(self.scheduler, Upwards) or not isinstance(self.scheduler, GeneralizedDDIMScheduler):
            given = f"{type(self.scheduler).__module__}.{type(self.scheduler).__name__}"
            raise ValueError(f"{what} a GeneralizedDDIMScheduler of ddim_plugin, not {given}: {remedy})")
        return remedy

    def _check_deterministic(self, invertible: bool = False) -> None:
        remedy, config = self._check_ours("latents need"), self.scheduler.config
        if invertible and SELF_CONDITIONING in self.unet.config:
            raise ValueError("this network sees x̂0 of its last step (self-conditioning), so no step has an inverse")
        needed = {"eta": 0.0, "variance_type": "fixed_small"} if adds_noise(config.variance_type, config.eta) else {}
        needed |= {"clip_sample": False, "thresholding": False} if invertible else {}
        needed |= {"corrector_steps": 0, "denoising_start": 0.0, "denoising_end": 1.0}
        if changes := [key for key in needed if config[key] != needed[key]]:
            wrong, right = (", ".join(f"{key}={each[key]!r}" for key in changes) for each in (config, needed))
            raise ValueError(f"latents need a deterministic, invertible process, not {wrong}: {remedy}, {right})")

    def _set_timesteps(self, scheduler: SchedulerMixin, S: int | None, timesteps: Timesteps, **settings: Any) -> None:
        S = min(50, scheduler.config.num_train_timesteps) if S is None and timesteps is None else S
        settings |= {"num_inference_steps": S, "timesteps": timesteps}
        scheduler.set_timesteps(**accepted(scheduler.set_timesteps, device=self._execution_device, **settings))

    def _step(self, x: Tensor, t: Tensor, condition: Condition, **settings: Any) -> tuple[Any, Condition]:
        """Make the step from x_t, and the condition of the next."""
        gradient = self._gradient(x, t, condition) if condition.classifier is not None and self._shifts_mean else None
        step = self.scheduler.step(self._predict(x, t, condition), t, x, **settings)
        if gradient is not None:
            step.prev_sample = step.prev_sample + step.std.square() * gradient
        if condition.guess is not None:
            condition = condition._replace(guess=step.pred_original_sample.clamp(*self.scheduler.image_range))
        return step, condition

    @property
    def _shifts_mean(self) -> bool:
        """Whether a classifier adds σ²·s·∇ log p(y|x_t) to x_s (Algorithm 1), as the process is Markovian (η = 1)."""
        multistep = isinstance(self.scheduler, MultistepDDIMScheduler)
        return self.scheduler._kind(None)[1] == 1 and not multistep and not self.scheduler.config.corrector_steps

    def _gradient(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Compute s·∇ log p(y|x_t) of the classifier, (B, C, H, W) (Dhariwal & Nichol 2021)."""
        classifier, classes = condition.classifier, condition.labels[0]
        like = next(classifier.parameters(), x) if isinstance(classifier, torch.nn.Module) else x
        with torch.inference_mode(False), torch.enable_grad():
            given, classes = x.detach().to(like.dtype, copy=True).requires_grad_(), classes.clone()
            logits = classifier(given, torch.as_tensor(t, device=x.device).expand(len(x)).clone())
            shape, differentiable = tuple(getattr(logits, "shape", ())), getattr(logits, "requires_grad", False)
            if len(shape) != 2 or shape[0] != len(x) or not differentiable:
                made = f"{type(logits).__name__} of shape {shape} with requires_grad={differentiable}"
                raise ValueError(f"a classifier returns differentiable logits ({len(x)}, K), not {made}")
            if not ((classes >= 0) & (classes < logits.shape[1])).all():
                raise ValueError(f"class_labels must lie in 0..{logits.shape[1] - 1}, not {classes.tolist()}")
            chosen = logits.to(x.dtype).log_softmax(1).gather(1, classes[:, None])
            return condition.classifier_scale * torch.autograd.grad(chosen.sum(), given)[0].to(x.dtype)

    def _images(self, x: Tensor, output_type: str) -> Any:
        x = x if x.is_floating_point() or output_type == "latent" else self.scheduler.scale_model_input(x)  # of tokens
        x = finite(x) if output_type in ("pil", "np") else x
        from_0 = getattr(self.scheduler, "image_range", None) == (0, 1) and output_type != "latent"
        return VaeImageProcessor().postprocess(2 * x - 1 if from_0 else x, output_type)

    def _predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Evaluate the network at x_t, with guidance. A learned variance is not guided, and dropped if not used."""
        channels = x.shape[1] * self.scheduler.config.get("num_classes", 1)
        guides = condition.classifier is not None and not self._shifts_mean
        if guides:  # ε̂ becomes ε̂ − b_t·s·∇ log p(y|x_t) (Algorithm 2)
            path = self.scheduler.path
            level = path.level(path.time(number(t, whole=not path.continuous)))
            per_output = self.scheduler._prediction(level).eps_out or math.inf  # pure noise has no class
            shift = -level.noise / per_output * self._gradient(x, t, condition)
        x = getattr(self.scheduler, "scale_model_input", lambda x, t: x)(x, t)  # stock schedulers of flows have none
        x = x if condition.guess is None else torch.cat([x, condition.guess.to(x).expand_as(x)], 1)
        x = x.to(condition.dtype)
        labels = None if self.unet.class_embedding is None else condition.labels.flatten(0, 1)
        if condition.scale == 1:
            output = self.unet(x, t, class_labels=labels).sample
        else:
            output, null = self.unet(torch.cat([x, x]), t, class_labels=labels).sample.chunk(2)
            guided = torch.lerp(null[:, :channels], output[:, :channels], condition.scale)
            output = torch.cat([guided, output[:, channels:]], dim=1)
        learned = getattr(self.scheduler.config, "variance_type", None) in ("learned", "learned_range")
        output = output[:, :channels] if not learned and output.shape[1] == 2 * channels else output
        return torch.cat([output[:, :channels] + shift, output[:, channels:]], 1) if guides else output


def accepted(method: Callable, **given: Any) -> dict[str, Any]:
    """Select the arguments that a scheduler's method has, or raise ValueError for one that has an effect elsewhere."""
    parameters = inspect.signature(method).parameters
    for name, value in given.items():
        without_effect = name == "generator" or value is None or (isinstance(value, Real) and value == 0)
        if name not in parameters and not without_effect:
            raise ValueError(f"{method.__qualname__} does not support {name}: leave it out")
    return {name: value for name, value in given.items() if value is not None and name in parameters}


def finite(x: Tensor) -> Tensor:
    if not bool(torch.isfinite(x).all()):
        raise ValueError("the output of the network or classifier is not finite: in half precision, use float32")
    return x


def batches(number: int, size: int | None) -> list[slice]:
    """Split images into batches of at most `size`; one by default."""
    integer("batch_size", size := number if size is None else size, 1)
    return [slice(i, i + size) for i in range(0, number, size)]


def part_of(call: dict[str, Any], rows: slice, number: int) -> dict[str, Any]:
    """Select arguments of a call for some pictures: one prompt is that of all, and lists have an entry for each."""
    call = {key: [each] if isinstance(each, str) and "prompt" in key else each for key, each in call.items()}
    many = {key: each for key, each in call.items() if isinstance(each, list | tuple | Tensor) and key not in FIXED}
    for key, each in many.items():
        if "prompt" in key and len(each) == 1:
            many[key] = each.expand(number, *each.shape[1:]) if isinstance(each, Tensor) else each * number
        elif ("prompt" in key or key == "class_labels") and len(each) != number:
            raise ValueError(f"{len(each)} of {key} do not fit {number} picture(s): pass one, or one for each")
    return call | {key: each[rows] for key, each in many.items() if len(each) == number}


def run_with(pipe: Any, make: Callable[[slice], Any], z: Tensor | None, size: int | None = None, **call: Any) -> Any:
    """Run a pipeline in batches, with a scheduler made for each, from latents z, or from generators for all noise."""
    known, before, made = inspect.signature(pipe.__call__).parameters, pipe.scheduler, []
    for rows in batches(number := len(call["generator"] if z is None else z), size):
        pipe.scheduler, part = make(rows), part_of(call, rows, number)
        if "timesteps" in part.keys() - known.keys():  # flow pipelines pass their own σ
            plan = partial(pipe.scheduler.set_timesteps, timesteps=part.pop("timesteps"))
            pipe.scheduler.set_timesteps = wraps(plan.func)(lambda *_, device=None, f=plan, **__: f(device=device))
        try:
            if z is None:  # flow pipelines do not pass the generators on
                step = pipe.scheduler.step
                pipe.scheduler.step = wraps(step)(partial(step, generator=part["generator"]))
                part |= {"batch_size": len(part["generator"])} if "batch_size" in known else {}
            elif not isinstance(pipe, Loop):
                kind = (getattr(pipe, "transformer", None) or pipe.unet).dtype
                part["latents"] = z[rows].to(torch.float32 if type(pipe).__name__.startswith(FLOAT32) else kind)
            decodes = isinstance(pipe, Loop) and z is not None
            made.append(pipe.decode(z[rows], **part) if decodes else pipe(return_dict=False, **part)[0])
        finally:
            pipe.scheduler = before
    if isinstance(made[0], list):
        return [image for images in made for image in images]
    return torch.cat(made) if isinstance(made[0], Tensor) else finite(torch.from_numpy(np.concatenate(made))).numpy()
