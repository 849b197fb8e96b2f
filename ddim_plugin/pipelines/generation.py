"""The pipeline: a U-Net and a scheduler, from noise to images, and from images to latents and back."""

import inspect
import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, SchedulerMixin, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..process import inversion
from ..process import moves as process
from ..process.gaussian import slerp
from ..process.inversion import InversionReport
from ..process.spacings import is_integer
from ..schedulers.generalized import (
    GeneralizedDDIMScheduler,
    GeneralizedDDIMSchedulerOutput,
    InverseDDIMScheduler,
    InverseMultistepDDIMScheduler,
    MultistepDDIMScheduler,
    Randomness,
    check_generators,
    sampler_class,
)
from . import images as pictures

KEY = "_ddim_plugin"
STOCK_SCHEDULER = ["diffusers", "DDIMScheduler"]
"""Entry of `model_index.json` for a scheduler of this package: its config is readable as that of a stock one."""

CLASSES = {
    each.__name__: each
    for each in (
        GeneralizedDDIMScheduler,
        InverseDDIMScheduler,
        MultistepDDIMScheduler,
        InverseMultistepDDIMScheduler,
    )
}

logger = logging.getLogger("ddim_plugin")

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
CALLBACK_TENSORS = ("latents", "sample", "pred_original_sample", "pred_epsilon")

TOLERANCE = 1e-5
"""Residual of a move, in units of the network's images, at which its refinement ends."""

StepEndCallback = Callable[["GeneralizedDDIMPipeline", int, Tensor, dict[str, Tensor | None]], dict[str, Any] | None]


class Condition(NamedTuple):
    """Class labels (B,), the labels of no class where guidance is on, and its scale."""

    labels: Tensor | None
    null_labels: Tensor | None
    scale: float

    def rows(self, rows: Tensor | slice) -> "Condition":
        labels, null_labels = (None if each is None else each[rows] for each in self[:2])
        return Condition(labels, null_labels, self.scale)


class GeneralizedDDIMPipeline(DiffusionPipeline):
    """Unconditional and class-conditional images with the generalized process, or any scheduler of diffusers.

    The call draws images from noise. Where the process is deterministic (η = 0), x_T is a latent code of the image:
    `encode`, `decode`, `reconstruct`, `interpolate` and `interpolate_grid` work with it, with the scheduler of this
    package.

    Args:
        unet: a `UNet2DModel`, with `num_class_embeds` where it is class-conditional. Its `config.sample_size` (an
            integer, or height and width) and `in_channels` give the shape of an image.
        scheduler: a `GeneralizedDDIMScheduler`, or any scheduler of diffusers for ε, x0 or v prediction.
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: UNet2DModel, scheduler: SchedulerMixin):
        super().__init__()
        _check_weights(unet)
        self.register_modules(unet=unet, scheduler=scheduler)

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(H, W) of the network's images; None where its config does not say."""
        size = self.unet.config.sample_size
        return (size, size) if isinstance(size, int) else size and tuple(size)

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
        _check_output_type(output_type)
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise ValueError(f"callback_on_step_end must be a function, not {callback_on_step_end!r}")
        unknown = set(callback_on_step_end_tensor_inputs) - set(CALLBACK_TENSORS)
        if unknown:
            raise ValueError(f"unknown callback tensors {sorted(unknown)}: use some of {', '.join(CALLBACK_TENSORS)}")
        shape = self._shape(batch_size, latents)
        check_generators(generator, shape[0])
        device, network_dtype = self._execution_device, self.unet.dtype  # slow to ask for: once
        condition = self._condition(class_labels, guidance_scale, null_class_label, shape[0], device)
        self._check_channels()
        self._set_timesteps(self.scheduler, num_inference_steps, timesteps, device, eta)
        step_kwargs = self._step_kwargs(eta, generator, use_clipped_model_output)

        dtype = torch.promote_types(network_dtype, torch.float32)  # of the state
        if latents is None:
            x = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        else:
            x = latents.to(device=device, dtype=dtype)
        x = x * self.scheduler.init_noise_sigma

        x = self._descend(
            x,
            self.scheduler.timesteps,
            network_dtype,
            condition,
            step_kwargs,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )
        images = self._images(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    # ---- saving and opening --------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any):
        """Load a pipeline from a folder or from the Hub.

        Opens what this class saved, and unconditional pipelines of diffusers (`DDPMPipeline`, `DDIMPipeline`,
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
            # The index is in the cache by now: reading it again asks the Hub for nothing.
            index = cls.load_config(pretrained_model_name_or_path, **kwargs | {"local_files_only": True})
            pipe.scheduler = _opened(pipe.scheduler, *index["_saved_as"])
        return pipe

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict[str, Any]:
        """Read `model_index.json`. Whatever pipeline it names, the classes to load are this one and stock ones."""
        index = super()._dict_from_json_file(json_file)
        marked = index.get(KEY, {})
        saved_as = marked.get("class", index.get("_class_name")), marked.get("scheduler", index.get("scheduler"))
        pipeline, scheduler = (each[1] if isinstance(each, list) else each for each in saved_as)
        index |= {"_class_name": cls.__name__, "_saved_as": (pipeline, scheduler)}
        if scheduler in CLASSES:
            index["scheduler"] = STOCK_SCHEDULER
        return index

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Save into a folder that stock pipelines and this one load. Arguments are those of `DiffusionPipeline`."""
        super().save_pretrained(save_directory, safe_serialization, variant, **kwargs)
        _remove_stale_weights(Path(save_directory, "unet"), safe_serialization, variant)

    def to_json_string(self) -> str:
        """Return the index in the form that stock readers know."""
        index = json.loads(super().to_json_string())
        index.pop("_name_or_path", None)  # a place on this machine
        index[KEY] = {"class": type(self).__name__, "scheduler": type(self.scheduler).__name__}
        if type(self) is GeneralizedDDIMPipeline:
            index["_class_name"] = "DDIMPipeline"
        if isinstance(self.scheduler, GeneralizedDDIMScheduler):
            index["scheduler"] = STOCK_SCHEDULER
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    # ---- latents -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(
        self,
        images: pictures.Images,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | Tensor | None = None,
        strength: float = 1.0,
        class_labels: int | Sequence[int] | Tensor | None = None,
        guidance_scale: float = 1.0,
        null_class_label: int | None = None,
        refinement_steps: int = 0,
        tolerance: float = TOLERANCE,
        batch_size: int | None = None,
        return_report: bool = False,
    ) -> Tensor | tuple[Tensor, InversionReport]:
        """The latents x_T that images come from in the deterministic process (Sections 4.3 and 5.4).

        The naive inverse (`refinement_steps=0`) takes each move backwards with the network evaluated at its lower end:
        decoding returns to the image only as S grows (Table 2). With `refinement_steps` each move is solved for its
        upper end, so that decoding at the same S does: see `ddim_plugin.inversion`. Each image is encoded on its own;
        what is left of its neighbours is the rounding of the network at another batch size, which a move that did not
        converge can amplify.

        With a `MultistepDDIMScheduler` the naive inverse is that of its orders (`InverseMultistepDDIMScheduler`). Its
        moves depend on each other, and are refined together: the image is moved by what decoding misses it by, encoded
        again, and so on. The report then has one row, for the whole path.

        Args:
            images: PIL images, arrays (B, H, W, C), tensors (B, C, H, W), one of them or a list; bytes, or numbers in
                [0, 1], of the network's size and channels.
            num_inference_steps, timesteps: τ, as in the call; use the same to decode.
            strength: the part of the moves to make, counted from the image: ⌊strength·S⌋ of S. Less than 1 gives x_t at
                an intermediate t, for `decode` with the same `strength`.
            class_labels, guidance_scale, null_class_label: as in the call.
            refinement_steps: network evaluations to refine each move with, at most; the first move takes one more, for
                its guess. A multistep path is refined with two for each move at a time, and the first two only tell
                what the naive inverse misses.
            tolerance: residual, as a root mean square over the pixels of (x_s − f(x_t))/√ᾱ_s in units of the network's
                images (−1..1), at which a move is solved.
            batch_size: images encoded together; all by default.
            return_report: also return an `InversionReport`.

        Returns:
            Latents (B, C, H, W), in float32 at least; with `return_report` a tuple of them and the report.

        Raises:
            ValueError: before the network is called, for images, labels, times or settings that do not fit; for a
                scheduler that adds noise (η > 0) or constrains x̂0, whose moves have no inverse. Afterwards, for latents
                that are not finite.
        """
        if not is_integer(refinement_steps) or refinement_steps < 0:
            raise ValueError(f"refinement_steps must be a non-negative integer, not {refinement_steps!r}")
        if not isinstance(tolerance, Real) or not 0 <= tolerance < math.inf:
            raise ValueError(f"tolerance must be a non-negative number, not {tolerance!r}")
        self._check_deterministic(invertible=True)
        batches = _batches(batch_size)
        x = pictures.read(images, self.unet.config.in_channels, self.image_size)
        device, network_dtype = self._execution_device, self.unet.dtype
        condition = self._condition(class_labels, guidance_scale, null_class_label, len(x), device)
        self._check_channels()
        self._set_timesteps(self.scheduler, num_inference_steps, timesteps, device)
        multistep = isinstance(self.scheduler, MultistepDDIMScheduler)
        upwards = InverseMultistepDDIMScheduler if multistep else InverseDDIMScheduler
        inverse = upwards.from_config(self.scheduler.config)
        self._set_timesteps(inverse, num_inference_steps, timesteps, device)
        moves = self._moves(strength)
        ascend = self._ascend_together if multistep else self._ascend

        x = x.to(device=device, dtype=torch.promote_types(network_dtype, torch.float32))
        parts = [
            ascend(x[rows], inverse, moves, network_dtype, condition.rows(rows), refinement_steps, tolerance)
            for rows in batches(len(x))
        ]
        self.maybe_free_model_hooks()
        z = torch.cat([latents for latents, _ in parts])
        if not bool(torch.isfinite(z).all()):
            raise ValueError(
                "the latents are not finite: the network gave NaN or infinity (in half precision, try float32)"
            )
        return (z, inversion.join([report for _, report in parts])) if return_report else z

    def _ascend(
        self,
        x: Tensor,
        inverse: InverseDDIMScheduler,
        moves: int,
        network_dtype: torch.dtype,
        condition: Condition,
        refinement_steps: int,
        tolerance: float,
    ) -> tuple[Tensor, InversionReport]:
        """The first `moves` moves up from the images `x`, and their report."""
        image, cost = x, 1 if condition.null_labels is None else 2
        reports: list[inversion.MoveReport] = []
        at_x: GeneralizedDDIMSchedulerOutput | None = None  # the sampler's step from x, where it is known
        for i, t in enumerate(self.progress_bar(inverse.timesteps[:moves])):
            move = inverse.move(i)
            if move.alpha_bar_t == move.alpha_bar_s:  # the identity
                reports.append(inversion.nothing(len(x)))
                continue
            if at_x is None:
                guess = inverse.step(self._predict(x.to(network_dtype), t, condition), t, x).prev_sample
            else:
                signal, noise = math.sqrt(move.alpha_bar_t), math.sqrt(1 - move.alpha_bar_t)
                guess = signal * at_x.pred_original_sample + noise * at_x.pred_epsilon
            if refinement_steps == 0:
                x = guess
                reports.append(inversion.naive(len(x), cost))
                continue
            down = self.scheduler.timesteps[-1 - i]
            residual = partial(self._residual, x, x is image, down, network_dtype, condition)
            step, unit = inversion.step_size(move.alpha_bar_t, move.alpha_bar_s), math.sqrt(move.alpha_bar_s)
            solution = inversion.solve(residual, guess, step, tolerance * unit, refinement_steps)
            reports.append(solution.report(tolerance, unit, cost, guessed=at_x is None))
            x = solution.x
            at_x = self.scheduler.step(solution.output, down, x, eta=0.0)

        return x, inversion.report(inverse.timesteps[:moves].tolist(), reports, tolerance, x)

    def _ascend_together(
        self,
        image: Tensor,
        inverse: InverseMultistepDDIMScheduler,
        moves: int,
        network_dtype: torch.dtype,
        condition: Condition,
        refinement_steps: int,
        tolerance: float,
    ) -> tuple[Tensor, InversionReport]:
        """The first `moves` moves up from the images, refined as one, and the report of the path."""
        up, down = inverse.timesteps[:moves], self._last(moves)
        guided = 1 if condition.null_labels is None else 2
        tries = max(1, refinement_steps // 2)

        def encoded(x: Tensor, rows: Tensor | slice) -> Tensor:
            bar.update()
            return self._run(inverse, x, up, network_dtype, condition.rows(rows))

        def residual(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            z = encoded(x, rows)
            made = self._run(self.scheduler, z, down, network_dtype, condition.rows(rows))
            return image[rows] - made.clamp(-1, 1), z

        with self.progress_bar(total=tries) as bar:
            if refinement_steps == 0:
                z, made = encoded(image, slice(None)), inversion.naive(len(image), guided * moves)
            else:
                solution = inversion.solve(residual, image, 1.0, tolerance, tries)
                made = solution.report(tolerance, 1.0, guided * (moves + len(down)), guessed=False)
                z = solution.output
        return z, inversion.report([int(down[0])], [made], tolerance, z)

    def _run(
        self,
        scheduler: GeneralizedDDIMScheduler,
        x: Tensor,
        timesteps: Tensor,
        network_dtype: torch.dtype,
        condition: Condition,
        see: Callable[[int, Tensor, GeneralizedDDIMSchedulerOutput], None] | None = None,
    ) -> Tensor:
        """x after the deterministic steps of `scheduler` at these times; `see` is shown (number, x_t, step) of each."""
        for i, t in enumerate(timesteps):
            step = scheduler.step(self._predict(x.to(network_dtype), t, condition), t, x, eta=0.0)
            if see:
                see(i, x, step)
            x = step.prev_sample
        return x

    @torch.no_grad()
    def decode(
        self,
        latents: Tensor,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | Tensor | None = None,
        strength: float = 1.0,
        class_labels: int | Sequence[int] | Tensor | None = None,
        guidance_scale: float = 1.0,
        null_class_label: int | None = None,
        batch_size: int | None = None,
        output_type: str = "pil",
    ) -> Any:
        """The images of latents: the call with `latents` and η = 0, bit for bit.

        Args:
            latents: x_T, or x_t from `encode` with the same `strength`; (B, C, H, W).
            strength: the part of the moves to make, as in `encode`.
            batch_size: images decoded together; all by default.
            num_inference_steps, timesteps, class_labels, guidance_scale, null_class_label, output_type: as in the call.

        Returns:
            Images: a list of PIL images, an array or a tensor.

        Raises:
            ValueError: as `encode`.
        """
        _check_output_type(output_type)
        self._check_deterministic()
        self._check_latents(latents)
        batches = _batches(batch_size)
        device, network_dtype = self._execution_device, self.unet.dtype
        condition = self._condition(class_labels, guidance_scale, null_class_label, len(latents), device)
        self._check_channels()
        self._set_timesteps(self.scheduler, num_inference_steps, timesteps, device)
        times = self._last(self._moves(strength))
        x = latents.to(device=device, dtype=torch.promote_types(network_dtype, torch.float32))
        x = torch.cat(
            [
                self._descend(x[rows], times, network_dtype, condition.rows(rows), {"eta": 0.0})
                for rows in batches(len(x))
            ]
        )
        images = self._images(x, output_type)
        self.maybe_free_model_hooks()
        return images

    def reconstruct(
        self,
        images: pictures.Images,
        num_inference_steps: int | None = None,
        refinement_steps: int = 0,
        tolerance: float = TOLERANCE,
        output_type: str = "pil",
        return_report: bool = False,
        **settings: Any,
    ) -> Any:
        """Encode images and decode them again (Section 5.4, Table 2).

        Args:
            images, num_inference_steps, refinement_steps, tolerance: as in `encode`.
            output_type: as in the call.
            return_report: also return the latents and the `InversionReport`.
            settings: other keywords that `encode` and `decode` share.

        Returns:
            Images; with `return_report` a tuple of them, the latents, and the report.

        Raises:
            ValueError: as `encode`.
        """
        _check_output_type(output_type)
        settings["num_inference_steps"] = num_inference_steps
        unknown = settings.keys() - set(inspect.signature(self.decode).parameters)
        if unknown:
            raise TypeError(f"reconstruct() got an unexpected keyword argument {min(unknown)!r}")
        z, report = self.encode(
            images, refinement_steps=refinement_steps, tolerance=tolerance, return_report=True, **settings
        )
        again = self.decode(z, output_type=output_type, **settings)
        return (again, z, report) if return_report else again

    def interpolate(self, z0: Tensor, z1: Tensor, num: int = 11, **decoding: Any) -> Any:
        """Images along the path between two latents, by spherical interpolation (Section 5.3, Appendix D.5, Fig. 6).

        Args:
            z0, z1: the ends, (C, H, W), or (B, C, H, W) for B paths.
            num: images on a path, the ends included; at least 2.
            decoding: keywords of `decode`; of `class_labels` one for all, or one for each path.

        Returns:
            Images, path after path: a list of B·num PIL images, an array or a tensor.

        Raises:
            ValueError: for latents of different shapes, `num` below 2, and as `decode`.
        """
        _check_count("num", num)
        z0, z1 = (z[None] if isinstance(z, Tensor) and z.ndim == 3 else z for z in (z0, z1))
        for z in (z0, z1):
            self._check_latents(z)
        path = _path(z0, z1.to(z0), num)
        labels = decoding.get("class_labels")
        if labels is not None and torch.as_tensor(labels).ndim:
            if len(labels) != len(z0):
                raise ValueError(f"{len(labels)} class_labels for {len(z0)} paths: give one, or one for each")
            decoding["class_labels"] = torch.as_tensor(labels).repeat_interleave(num, 0)
        return self.decode(path.flatten(0, 1), **decoding)

    def interpolate_grid(self, corners: Tensor, num: int | tuple[int, int] = 11, **decoding: Any) -> Any:
        """Images on the grid between four latents: the slerp of two slerps (Appendix D.5, Fig. 6).

        Args:
            corners: the top left, top right, bottom left and bottom right one, (4, C, H, W).
            num: rows and columns of the grid, or (rows, columns); each at least 2.
            decoding: keywords of `decode`; of `class_labels` one for all.

        Returns:
            Images, row after row: a list of rows·columns PIL images, an array or a tensor.

        Raises:
            ValueError: for other than four latents, fewer than 2 rows or columns, and as `decode`.
        """
        rows, columns = num if isinstance(num, tuple) and len(num) == 2 else (num, num)
        _check_count("num", rows)
        _check_count("num", columns)
        self._check_latents(corners)
        if len(corners) != 4:
            raise ValueError(f"a grid lies between 4 latents, not {len(corners)}")
        left, right = _path(corners[:2], corners[2:], rows)
        return self.decode(_path(left, right, columns).flatten(0, 1), **decoding)

    # ---- before the loop ---------------------------------------------------------------------------------------

    def _check_latents(self, latents: Tensor) -> None:
        """Raise ValueError unless `latents` are some for this network."""
        if latents is None:
            raise ValueError("latents must be a torch tensor, not None")
        self._shape(None, latents)

    def _shape(self, batch_size: int | None, latents: Tensor | None) -> tuple[int, ...]:
        """(B, C, H, W) of the images to make."""
        if batch_size is not None and (not is_integer(batch_size) or batch_size < 1):
            raise ValueError(f"batch_size must be a positive integer, not {batch_size!r}")
        if latents is not None and not isinstance(latents, Tensor):
            raise ValueError(f"latents must be a torch tensor, not {type(latents).__name__}")
        if latents is not None and (latents.ndim != 4 or len(latents) == 0):
            raise ValueError(f"latents must be (B, C, H, W) with B ≥ 1, not of shape {tuple(latents.shape)}")
        size = self.image_size
        if size is None:
            if latents is None:
                raise ValueError("the network's config has no sample_size: pass latents of the wanted size")
            size = tuple(latents.shape[2:])
        shape = (batch_size or (1 if latents is None else len(latents)), self.unet.config.in_channels, *size)
        if latents is None:
            return shape
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}; this network and batch_size need {shape}")
        if not latents.is_floating_point() or not bool(torch.isfinite(latents).all()):
            raise ValueError("latents must be finite numbers: they hold NaN, infinity or integers")
        return shape

    def _condition(
        self,
        class_labels: Any,
        guidance_scale: float,
        null_class_label: int | None,
        batch_size: int,
        device: torch.device,
    ) -> Condition:
        """The labels of the images and, where guidance is on, the null labels, on the network's device."""
        classes = self.unet.config.num_class_embeds
        if self.unet.class_embedding is None:
            if class_labels is not None or guidance_scale != 1 or null_class_label is not None:
                raise ValueError("this network is unconditional: it takes no class_labels and no guidance_scale")
            return Condition(None, None, 1.0)
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
        null_labels = None if null_labels is None else null_labels.to(device)
        return Condition(labels.to(device), null_labels, guidance_scale)

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
        self,
        scheduler: SchedulerMixin,
        num_inference_steps: int | None,
        timesteps: Sequence[int] | Tensor | None,
        device: torch.device,
        eta: float | None = None,
    ) -> None:
        taken = inspect.signature(scheduler.set_timesteps).parameters
        if timesteps is None:
            steps = num_inference_steps
            if steps is None:
                steps = min(50, getattr(scheduler.config, "num_train_timesteps", 50))
            told = {"eta": eta} if "eta" in taken else {}
            scheduler.set_timesteps(steps, device=device, **told)
            return
        if not hasattr(timesteps, "__len__") or getattr(timesteps, "ndim", 1) != 1:
            raise ValueError(f"timesteps must be a list of integers, not {timesteps!r}")
        if num_inference_steps is not None and num_inference_steps != len(timesteps):
            raise ValueError(
                f"num_inference_steps={num_inference_steps} and {len(timesteps)} timesteps disagree: pass one of them"
            )
        if "timesteps" not in taken:
            raise ValueError(f"{type(scheduler).__name__} takes no timesteps of one's own: pass num_inference_steps")
        scheduler.set_timesteps(timesteps=timesteps, device=device)

    def _check_deterministic(self, invertible: bool = False) -> None:
        """Raise ValueError unless the scheduler's process makes the image a function of x_T, or also the reverse."""
        scheduler, config = self.scheduler, self.scheduler.config
        remedy = f"pipe.scheduler = {sampler_class(scheduler).__name__}.from_config(pipe.scheduler.config"
        if not isinstance(scheduler, GeneralizedDDIMScheduler) or isinstance(scheduler, InverseDDIMScheduler):
            given = f"{type(scheduler).__module__}.{type(scheduler).__name__}"
            raise ValueError(
                f"latents need a GeneralizedDDIMScheduler of {__name__.split('.')[0]}, not {given}: {remedy})"
            )
        if process.adds_noise(config.variance_type, config.eta):
            raise ValueError(
                f"latents need the deterministic process: with noise (eta={config.eta:g}, "
                f"variance_type={config.variance_type!r}) x_T does not determine the image: {remedy}, eta=0.0, "
                "variance_type='fixed_small')"
            )
        if invertible and (config.clip_sample or config.thresholding):
            key = "thresholding" if config.thresholding else "clip_sample"
            raise ValueError(
                f"the scheduler constrains x̂0 ({key}=True), and such a move has no inverse: {remedy}, {key}=False)"
            )

    def _moves(self, strength: float) -> int:
        """⌊strength·S⌋, the number of moves between the image and an intermediate t."""
        S = self.scheduler.num_inference_steps
        if not isinstance(strength, Real) or not 0 < strength <= 1:
            raise ValueError(f"strength must lie in (0, 1], not {strength!r}")
        moves = int(strength * S + 1e-9)
        if moves == 0:
            raise ValueError(f"strength={strength:g} of {S} steps is no step: use at least {1 / S:.3g}, or more steps")
        return moves

    def _last(self, moves: int) -> Tensor:
        """The times at which the last moves of the plan call the network."""
        times = self.scheduler.timesteps
        twice = len(times) > self.scheduler.num_inference_steps  # but at the first of them
        return times[-(2 * moves - 1) :] if twice else times[-moves:]

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

    def _descend(
        self,
        x: Tensor,
        timesteps: Tensor,
        network_dtype: torch.dtype,
        condition: Condition,
        step_kwargs: dict[str, Any],
        callback: StepEndCallback | None = None,
        callback_tensors: Sequence[str] = (),
    ) -> Tensor:
        """x after the steps at `timesteps`, which are the scheduler's, or the last of them."""
        for i, t in enumerate(self.progress_bar(timesteps)):
            x_t = x
            model_input = self.scheduler.scale_model_input(x_t, t).to(network_dtype)
            output = self._predict(model_input, t, condition)
            step = self.scheduler.step(output, t, x_t, **step_kwargs)
            x = step.prev_sample
            if callback is not None:
                known = {"latents": x, "sample": x_t}
                tensors = {
                    name: known[name] if name in known else getattr(step, name, None) for name in callback_tensors
                }
                x = (callback(self, i, t, tensors) or {}).get("latents", x)
        return x

    def _residual(
        self,
        x_s: Tensor,
        is_image: bool,
        t: Tensor,
        network_dtype: torch.dtype,
        condition: Condition,
        x: Tensor,
        rows: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """x_s minus what the sampler makes of `x` in its step at `t`, for some images; and the network's output.

        Where x_s is the image, what the sampler makes is clamped to −1..1 as an image is.
        """
        output = self._predict(x.to(network_dtype), t, condition.rows(rows))
        made = self.scheduler.step(output, t, x, eta=0.0).prev_sample
        return x_s[rows] - (made.clamp(-1, 1) if is_image else made), output

    def _predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The network's output, guided where there are null labels; learned variances are not guided."""
        labels, null_labels, guidance_scale = condition
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


def _check_weights(unet: torch.nn.Module) -> None:
    """Raise ValueError if weights were not in the files: diffusers warns, and leaves them without values."""
    missing = [name for name, parameter in unet.named_parameters() if parameter.is_meta]
    if missing and not hasattr(unet, "_hf_hook"):  # with a hook the weights are offloaded
        raise ValueError(f"{len(missing)} weights of the network are missing, such as {missing[0]}: load them all")


def _opened(scheduler: SchedulerMixin, saved_by: str, saved_as: str | None) -> SchedulerMixin:
    """Return the scheduler to use for one that was loaded, given the classes in the index of its pipeline."""
    if isinstance(scheduler, GeneralizedDDIMScheduler):
        return scheduler
    if saved_as in CLASSES:  # a folder of version 0.1
        return CLASSES[saved_as].from_config(scheduler.config)
    stock = type(scheduler).__name__
    if not hasattr(diffusers, str(saved_by)):  # our own pipeline: the stock scheduler was chosen
        return scheduler
    if stock not in GeneralizedDDIMScheduler._compatibles:
        raise ValueError(f"{stock} is for another family of models: pass scheduler=… that fits the network")
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


def _check_output_type(output_type: str) -> None:
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"unknown output_type {output_type!r}: use one of {', '.join(OUTPUT_TYPES)}")


def _path(z0: Tensor, z1: Tensor, num: int) -> Tensor:
    """(B, num, …): the points between each of `z0` and `z1`, (B, …), ends included."""
    return torch.stack([slerp(z0, z1, i / (num - 1)) for i in range(num)], 1)


def _batches(batch_size: int | None) -> Callable[[int], list[slice]]:
    """A function from the number of images to the slices of their batches; checks `batch_size`."""
    if batch_size is not None:
        _check_count("batch_size", batch_size, 1)
    return lambda count: [slice(i, i + (batch_size or count)) for i in range(0, count, batch_size or count)]


def _check_count(name: str, value: int, least: int = 2) -> None:
    if not is_integer(value) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, not {value!r}")
