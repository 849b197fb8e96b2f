"""Invert pictures in the pipelines of diffusers that begin with latents, and decode them with another prompt."""

import inspect
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import SchedulerMixin
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..process.inversion import InversionReport
from ..schedulers import sampler_class
from ..schedulers.config import CLASSES, KEY
from .images import Images, read
from .loop import INVERSES, finite

DEFAULTS = ("num_inference_steps", "guidance_scale")  # arguments whose defaults are kept with the latents
FLOAT32 = ("Wan", "ZImage")  # pipelines whose latents are float32 in half precision too
OWN = {"latents", "output_type", "return_dict", "denoising_start", "denoising_end"}  # arguments that `invert` sets
FIXED = {"num_inference_steps", "timesteps", "sigmas", "eta"}  # arguments that corrections depend on
LOST = "not kept"  # stands for a tensor


@dataclass(frozen=True)
class Inverted:
    """Latents of pictures, with a report (None if no residual was measured) and the settings that decode them.

    `settings` are ready for JSON: "scheduler" (config of the sampler), "strength", "call" (arguments of the call), and
    "left_out" (its tensors and pictures, not kept). `corrections` (S, B, …) to x_s are for the call of `decode_with`.
    """

    latents: Tensor
    report: InversionReport | None
    settings: dict[str, Any]
    corrections: Tensor | None = None

    def decode(self, pipe: Any, prompt: str | list[str] | None = None, **changes: Any) -> Any:
        """Decode the latents: to the pictures themselves, or with another prompt to edited ones.

        `changes` replace arguments of the inversion's call. Pass its tensors, such as `prompt_embeds`, again.
        """
        if "call" not in self.settings:
            raise ValueError("these latents have no settings of an inversion: use those of invert, or decode of a pipe")
        changes, missed = changes | ({} if prompt is None else {"prompt": prompt}), self.corrections
        texts = [key for key in self.settings["left_out"] if prompt and "prompt" in key and "negative" not in key]
        if lost := [key for key in self.settings["left_out"] if key not in {*changes, *texts}]:
            raise ValueError(f"the inversion had {', '.join(lost)}, which is not kept with latents: pass it again")
        replaced = {key.removesuffix("_embeds") for key in changes}
        call = {key: None if key in replaced else value for key, value in self.settings["call"].items()} | changes
        if missed is not None and (fixed := changes.keys() & FIXED):
            raise ValueError(f"the corrections are those of other steps: leave out {', '.join(fixed)}, or invert again")
        sampler = _sampler(self.settings, lambda i, x: x if missed is None else x + missed[i].to(x.device))
        return _run(pipe, sampler, self.latents, **call)

    def save(self, path: str | Path) -> None:
        """Save as a safetensors file."""
        known = {"settings": self.settings, "report": self.report and self.report.to_dict()}
        content = {k: x.cpu().contiguous() for k in ("latents", "corrections") if (x := vars(self)[k]) is not None}
        Path(path).write_bytes(save(content, {"ddim_plugin": json.dumps(known)}))

    @classmethod
    def load(cls, path: str | Path) -> "Inverted":
        """Load a file that `save` wrote, or one of latents alone. Raises ValueError for others."""
        try:
            with safe_open(path, "pt") as file:
                known = json.loads((file.metadata() or {}).get("ddim_plugin", "{}"))
                latents, *corrections = map(file.get_tensor, ["latents", *{"corrections"}.intersection(file.keys())])
        except SafetensorError as error:
            raise ValueError(f"cannot read latents from {path}: {error}") from error
        report = {k: np.array(v, float if k == "residual" else None) for k, v in (known.get("report") or {}).items()}
        settings = known.get("settings", known)  # earlier files have nothing else
        return cls(latents, InversionReport(**report) if report else None, settings, *corrections)


@torch.no_grad()
def invert(
    pipe: Any,
    images: Images,
    prompt: str | list[str] | None = None,
    refinement_steps: int | None = 4,
    strength: float = 1.0,
    tolerance: float = 1e-2,
    decode_with: dict[str, Any] | None = None,
    **call: Any,
) -> Inverted:
    """Find the latents from which a pipeline makes pictures, in its own loop.

    Args, with a ValueError for those that do not fit, before any long work:
        pipe: a pipeline with a `vae` whose call takes `latents`: Stable Diffusion, XL, 3, Flux, PixArt, Qwen-Image, …
        images: PIL images, arrays (B, H, W, C), tensors (B, C, H, W), one of them or a list; bytes, or in [0, 1].
        prompt: for all pictures, or a list with one for each. None is the empty prompt.
        refinement_steps: network evaluations of a step beyond the first; None is the plain inverse (Section 5.4).
        strength: share of the process to invert, in (0, 1]. Less keeps more of a picture in an edit.
        tolerance: residual of a step, in units of latents (of deviation 1), above which a warning is logged.
        decode_with: arguments of the call that decodes, if they differ. What its steps miss is kept as `corrections`.
        call: other arguments of the pipeline's call. `guidance_scale=1` is the most exact.
    """
    parameters, packs = inspect.signature(pipe.__call__).parameters, hasattr(pipe, "_pack_latents")
    form = 5 if not packs else len(inspect.signature(pipe._pack_latents).parameters)  # 5 arguments in Flux, Qwen-Image
    if "latents" not in parameters or "strength" in parameters or getattr(pipe, "vae", None) is None or form != 5:
        remedy = "use a text-to-image pipeline with a vae, or GeneralizedDDIMPipeline.encode for a model of pixels"
        raise ValueError(f"{type(pipe).__name__} does not begin with latents of a form that invert knows: {remedy}")
    if not (isinstance(strength, Real) and 0 < strength <= 1 and isinstance(tolerance, Real) and tolerance >= 0):
        raise ValueError(f"strength must lie in (0, 1], tolerance be 0 or more, not {strength!r} and {tolerance!r}")
    changed = decode_with or {}
    if wrong := (call.keys() | changed) - parameters.keys() | (call.keys() | changed) & OWN | changed.keys() & FIXED:
        raise ValueError(f"{', '.join(sorted(wrong))} cannot be passed on to {type(pipe).__name__}: leave it out")
    part = {"refinement_steps": refinement_steps, "denoising_start": 1 - strength}
    up = INVERSES[sampler_class(pipe.scheduler)].from_config(pipe.scheduler.config, **part)
    network = getattr(pipe, "transformer", None) or pipe.unet
    H, W = (x := read(images, pipe.vae.config.get("in_channels", 3), None)).shape[2:]
    scale = getattr(pipe, "vae_scale_factor", None) or getattr(pipe, "vae_scale_factor_spatial", 8)
    factor = scale * max(int(np.max(network.config.get("patch_size") or 1)), 2 if packs else 1)
    if H % factor or W % factor:
        raise ValueError(f"pictures are {H}×{W} (height × width): crop or resize them to multiples of {factor}")
    call |= {} if prompt is None and "prompt_embeds" in call else {"prompt": "" if prompt is None else prompt}
    size = {"height": H, "width": W, "use_resolution_binning": False}
    call = {key: size.get(key, parameters[key].default) for key in (*DEFAULTS, *size) if key in parameters} | call
    z_0 = _encode(pipe, x).to(torch.float32 if type(pipe).__name__.startswith(FLOAT32) else network.dtype)
    z = finite(_run(pipe, up, z_0, output_type="latent", **call))
    report = up.report(tolerance) if up._records else None
    if report is not None and not report.converged.all():
        text = "%d of %d images did not converge (residual %.1e): use more steps or refinement_steps, or less guidance"
        logging.getLogger("ddim_plugin").warning(text, (~report.converged.all(0)).sum(), len(x), report.residual.max())
    sampler = sampler_class(pipe.scheduler).from_config(up.config)
    known = {"scheduler": json.loads(sampler.to_json_string()), "strength": strength}
    corrections = None if decode_with is None else _missed(pipe, known, z, z_0, call, changed)
    call |= changed
    kept = {key: value for key, value in call.items() if LOST not in json.dumps(value, default=lambda _: LOST)}
    left_out = [key for key, value in call.items() if key not in kept and not callable(value)]
    return Inverted(z, report, known | {"call": kept, "left_out": left_out}, corrections)


def _missed(pipe: Any, known: dict[str, Any], z: Tensor, z_0: Tensor, call: dict[str, Any], changed: Any) -> Tensor:
    """Decode z, and return what each step of the call that is `changed` misses of the way to z_0, (S, B, …)."""
    states, missed = {}, {}

    def follow(i: int, x: Tensor) -> Tensor:
        missed[i] = states.setdefault(i, x) - x  # 0 the first time
        return states[i]

    _run(pipe, _sampler(known, follow), z, output_type="latent", **call)
    states[max(states)] = z_0
    _run(pipe, _sampler(known, follow), z, output_type="latent", **call | changed)
    return finite(torch.stack([*missed.values()]))


def _sampler(settings: dict[str, Any], change: Callable[[int, Tensor], Tensor]) -> SchedulerMixin:
    """Make the sampler that decodes. `change` replaces x_s, in float32 at least, in step i of the loop."""
    config, places = settings["scheduler"], count()
    scheduler = CLASSES[config[KEY]["class"]].from_config(config)
    advance = scheduler._advance
    scheduler._advance = lambda evaluation: change(next(places), advance(evaluation))
    return scheduler


def _encode(pipe: Any, x: Tensor) -> Tensor:
    """Encode pictures by the VAE: the mode of its distribution, in the units and form of the pipeline, in float32."""
    vae, config, kind = pipe.vae, pipe.vae.config, pipe.vae.dtype
    x = x[:, :, None] if max(weight.ndim for weight in vae.parameters()) == 5 else x  # a video of one frame
    upcast = [vae] if config.get("force_upcast") and kind.itemsize < 4 else []  # it overflows in half precision
    try:
        torch.nn.ModuleList(upcast).to(torch.float32)
        coded = vae.encode(x.to(pipe._execution_device, vae.dtype))
    finally:
        torch.nn.ModuleList(upcast).to(kind)
    z = (coded.latent_dist.mode() if "latent_dist" in coded else coded[0]).float()
    mean, std = config.get("latents_mean") or config.get("shift_factor") or 0.0, config.get("latents_std") or 1.0
    mean, std = (torch.as_tensor(each, device=z.device).view(-1, *[1] * (z.ndim - 2)) for each in (mean, std))
    z = (z - mean) * (config.get("scaling_factor") or 1.0) / std
    return pipe._pack_latents(z, *z.shape[:2], *z.shape[-2:]) if hasattr(pipe, "_pack_latents") else z


def _run(pipe: Any, scheduler: SchedulerMixin, latents: Tensor, **call: Any) -> Any:
    """Run the pipeline with another scheduler, and with one prompt for all latents or one for each."""
    prompts = next(each for each in (call.get("prompt"), call.get("prompt_embeds"), "") if each is not None)
    number = 1 if isinstance(prompts, str) else len(prompts)
    if not number or len(latents) % number:
        raise ValueError(f"{number} prompts do not fit {len(latents)} pictures: pass one, or a list with one for each")
    names = [key for key in inspect.signature(pipe.__call__).parameters if key.endswith("s_per_prompt")]  # of images
    before, pipe.scheduler = pipe.scheduler, scheduler
    try:
        return pipe(latents=latents, return_dict=False, **dict.fromkeys(names, len(latents) // number) | call)[0]
    finally:
        pipe.scheduler = before
