"""Make round trips with an inverse: in the loop of Stable Diffusion, or with a pipeline of ours in pixel space."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import numpy as np
import torch
from cards.weights import weights_digest
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from pictures import Frame, Pictures
from torch import Tensor

from ddim_plugin import GeneralizedDDIMScheduler, InverseDDIMScheduler
from ddim_plugin.process.inversion import InversionReport
from ddim_plugin.schedulers.config import STAND_IN, STOCK_SPACINGS

from ..reconstructions import Bench

PIXELS = ("GeneralizedDDIMPipeline", "DDIMPipeline", "DDPMPipeline")
"""Classes of pipelines that are measured in pixel space."""

UNCLAMPED = {"clip_sample": False, "thresholding": False}


class Inverse(NamedTuple):
    """An inverse: its name in tables, our `refinement_steps`, or diffusers' classes for the way up and down."""

    name: str
    refinement_steps: int | None = None
    stock: tuple[str, str] | None = None

    def cost(self, guidance: float | None, S: int) -> int:
        """Return about the evaluations of the network for a round trip of an image."""
        return (1 if (guidance or 1) == 1 else 2) * S * (2 + (self.refinement_steps or 0))


class Trip(NamedTuple):
    """Errors of images (B,), evaluations of the network to encode one, and whether the report calls it solved (B,)."""

    errors: np.ndarray
    evaluations: float
    solved: np.ndarray | None


PLAIN = Inverse("plain")
STOCK = (
    Inverse("diffusers, DDIM", stock=("DDIMInverseScheduler", "DDIMScheduler")),
    Inverse("diffusers, DPM-Solver++", stock=("DPMSolverMultistepInverseScheduler", "DPMSolverMultistepScheduler")),
)


def inverses(refinement: Sequence[int]) -> list[Inverse]:
    """List the inverses to compare: those of diffusers, the plain one, and ours with k refinements."""
    return [*STOCK, PLAIN, *(Inverse(f"k = {k}", k) for k in refinement)]


def kind_of(model: str) -> str:
    """Return "latents" for Stable Diffusion and "pixels" for our pipelines. Raises ValueError for other models."""
    name = DiffusionPipeline.load_config(model)["_class_name"]
    if name != "StableDiffusionPipeline" and name not in PIXELS:
        known = f"StableDiffusionPipeline, {', '.join(PIXELS)}"
        raise ValueError(f"{model} is a {name}, whose round trips are not measured: pass one of {known}")
    return "pixels" if name in PIXELS else "latents"


def parts(count: int, size: int) -> Iterator[slice]:
    """Yield the slices of batches."""
    yield from (slice(start, start + size) for start in range(0, count, size))


def solved(report: InversionReport) -> np.ndarray | None:
    """Return whether all steps of an image converged, (B,); None if residuals were not measured."""
    return None if np.isnan(report.residual).all() else report.converged.all(0)


def stock_scheduler(name: str, config: dict[str, Any]) -> Any:
    """Build a scheduler of diffusers from a config without constraints, with its own spacing if it has the config's."""
    spacing = config["timestep_spacing"] if config["timestep_spacing"] in STOCK_SPACINGS else STAND_IN
    return getattr(diffusers, name).from_config(config, timestep_spacing=spacing, **UNCLAMPED)


# ---- pixel space ---------------------------------------------------------------------------------------------------


class Pixels:
    """Round trips of images uint8 (B, C, H, W). Errors are mean squares on [0, 1]."""

    def __init__(self, bench: Bench, images: Tensor):
        self.bench, self.pipe, self.images = bench, bench.pipe, images
        self.digest, self.spacing = weights_digest(bench.pipe.unet), bench.pipe.scheduler.config.timestep_spacing

    @classmethod
    def size_of(cls, bench: Bench) -> tuple[int, tuple[int, int]]:
        """Return channels and (H, W) of its images."""
        return bench.pipe.unet.config.in_channels, bench.pipe.image_size

    def trip(self, inverse: Inverse, S: int, guidance: float) -> Trip:
        """Encode and decode all images."""
        if inverse.stock:
            made, calls = self._stock(inverse.stock, S)
            return Trip(self._errors(made), calls, None)
        z, report = self.bench.encode(self.images, S, inverse.refinement_steps)
        return Trip(self._errors(self.bench.decode(z, S)), float(report.total_evaluations.mean()), solved(report))

    def _stock(self, names: tuple[str, str], S: int) -> tuple[Tensor, int]:
        pipe, made, calls = self.bench.pipe, [], 0
        for rows in parts(len(self.images), self.bench.shared["batch_size"]):
            x = (self.images[rows].float() / 127.5 - 1).to(self.bench.device)
            label = self.bench.shared["class_labels"]
            labels = None if label is None else torch.full((len(x),), label, device=x.device)
            for name in names:
                scheduler = stock_scheduler(name, dict(pipe.scheduler.config))
                scheduler.set_timesteps(S)
                calls = calls or len(scheduler.timesteps)
                for t in scheduler.timesteps:
                    with torch.no_grad():
                        output = pipe.unet(scheduler.scale_model_input(x, t), t, class_labels=labels).sample
                    x = scheduler.step(output, t, x).prev_sample
            made.append((x.clamp(-1, 1) / 2 + 0.5).cpu())
        return torch.cat(made), calls

    def _errors(self, made: Tensor) -> np.ndarray:
        return (made - self.images.float() / 255).double().square().flatten(1).mean(1).numpy()


# ---- Stable Diffusion ----------------------------------------------------------------------------------------------


class Latents:
    """Round trips of latents in the loop of StableDiffusionPipeline. Errors are root mean squares of latents.

    Args:
        pipe: the pipeline, in float32.
        images: uint8 (B, 3, H, W), which its autoencoder encodes.
        prompts: one for each image.
        spacing: spacing of the timesteps; None keeps the model's.
        tolerance: residual at which a step counts as solved.
        batch_size: images at a time.
    """

    def __init__(
        self,
        pipe: StableDiffusionPipeline,
        images: Tensor,
        prompts: list[str],
        spacing: str | None,
        tolerance: float,
        batch_size: int,
    ):
        self.pipe, self.prompts, self.tolerance, self.batch_size = pipe, prompts, tolerance, batch_size
        changes = {"eta": 0.0} | ({} if spacing is None else {"timestep_spacing": spacing})
        self.sampler = GeneralizedDDIMScheduler.from_config(pipe.scheduler.config, **UNCLAMPED, **changes)
        self.spacing = self.sampler.config.timestep_spacing
        self.digest = weights_digest(pipe.vae, pipe.unet, pipe.text_encoder)
        self.latents = torch.cat([self._encoded(images[rows]) for rows in parts(len(images), batch_size)])
        pipe.set_progress_bar_config(disable=True)

    @classmethod
    def load(cls, model: str, device: str) -> StableDiffusionPipeline:
        """Load the pipeline in float32, without its safety checker."""
        pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
        pipe.text_encoder.float()  # transformers may load it in the precision of its file
        return pipe.to(device)

    @classmethod
    def size_of(cls, pipe: StableDiffusionPipeline) -> tuple[int, tuple[int, int]]:
        """Return channels and (H, W) of its images."""
        side = pipe.unet.config.sample_size * pipe.vae_scale_factor
        return pipe.vae.config.in_channels, (side, side)

    def trip(self, inverse: Inverse, S: int, guidance: float) -> Trip:
        """Encode and decode all latents, with the prompts and the same guidance both ways."""
        names, changes = inverse.stock, {"refinement_steps": inverse.refinement_steps}
        if names:
            up, down = (stock_scheduler(name, dict(self.sampler.config)) for name in names)
        else:
            up, down = InverseDDIMScheduler.from_config(self.sampler.config, **changes), self.sampler
        errors, flags, calls = [], [], 0
        for rows in parts(len(self.latents), self.batch_size):
            z = self._run(up, self.latents[rows], self.prompts[rows], S, guidance)
            calls = len(up.timesteps)
            if inverse.refinement_steps is not None:
                flags.append(up.report(tolerance=self.tolerance).converged.all(0))
            again = self._run(down, z, self.prompts[rows], S, guidance)
            errors.append((again - self.latents[rows]).double().square().flatten(1).mean(1).sqrt().cpu().numpy())
        return Trip(np.concatenate(errors), calls, np.concatenate(flags) if flags else None)

    def _run(self, scheduler: Any, x: Tensor, prompts: list[str], S: int, guidance: float) -> Tensor:
        self.pipe.scheduler = scheduler
        settings = {"num_inference_steps": S, "guidance_scale": guidance, "output_type": "latent"}
        return self.pipe(prompts, latents=x, **settings).images

    @torch.no_grad()
    def _encoded(self, images: Tensor) -> Tensor:
        vae = self.pipe.vae
        return vae.encode((images.float() / 127.5 - 1).to(vae.device)).latent_dist.mode() * vae.config.scaling_factor


# ---- pictures and prompts ------------------------------------------------------------------------------------------


def read_images(pictures: Pictures, channels: int, size: tuple[int, int], count: int, pad: bool) -> Tensor:
    """Read the first images as uint8 (N, C, H, W), scaled to `size`, or if `pad` framed with black."""
    frame, (height, width) = Frame(channels, size), size
    if not pad:
        return torch.from_numpy(np.stack([frame.read(pictures, i) for i in range(min(count, pictures.count))]))
    made = torch.zeros(min(count, pictures.count), channels, height, width, dtype=torch.uint8)
    for i in range(len(made)):
        own = pictures.picture(i).size[::-1]
        if own[0] > height or own[1] > width:
            raise ValueError(f"{pictures.where(i)} is {own[0]}×{own[1]}, larger than {height}×{width}: leave out pad")
        top, left = (height - own[0]) // 2, (width - own[1]) // 2
        picture = torch.tensor(Frame(channels, own).read(pictures, i))
        made[i, :, top : top + own[0], left : left + own[1]] = picture
    return made


def read_prompts(file: str, count: int) -> list[str]:
    """Read one prompt a line, for each of `count` images or one for all. Raises ValueError for another number."""
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"there is no file {file}: pass a text file with one prompt a line")
    lines = path.read_text(encoding="utf-8").splitlines()
    if len(lines) not in (1, count):
        raise ValueError(f"{file} has {len(lines)} lines for {count} images: write one prompt an image, or one for all")
    return lines * (count if len(lines) == 1 else 1)


def prompts_of(pictures: Pictures, form: str, count: int) -> list[str]:
    """Write a prompt for each image: `form` with the name of its class for {}."""
    assert pictures.labels is not None
    return [form.replace("{}", pictures.classes[label]) for label in pictures.labels[:count]]


def summary(trip: Trip, failure: float, latents: bool) -> dict[str, Any]:
    """Summarize the errors of images, and count those that failed: an error above `failure`, or one that is not finite.

    "Lost in silence" are those that failed though the report calls all of their steps converged.
    """
    e, bad = trip.errors, ~(trip.errors <= failure)
    found = {"error": np.sqrt(np.mean(e**2)) if latents else e.mean(), "mean": e.mean(), "median": np.median(e)}
    row = {key: _finite(value) for key, value in (found | {"largest": e.max()}).items()}
    row |= {"evaluations": trip.evaluations, "failed": int(bad.sum()), "errors": [_finite(each) for each in e]}
    if trip.solved is not None:
        row |= {"not_converged": int((~trip.solved).sum()), "not_converged_and_failed": int((~trip.solved & bad).sum())}
        row["lost_in_silence"] = int((trip.solved & bad).sum())
    return row


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
