"""Draw and invert pictures in the pipelines that begin with latents, and decode them, also with another prompt."""

import inspect
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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

from ..process.inversion import TOLERANCE, InversionReport
from ..schedulers import GeneralizedDDIMScheduler, keep_learned, sampler_class
from ..schedulers.config import CLASSES, KEY
from .images import Images, read
from .loop import FIXED, INVERSES, STEPS, Loop, batches, finite, run_with

DEFAULTS = ("num_inference_steps", "guidance_scale")  # arguments whose defaults are kept with the latents
OWN = {"latents", "output_type", "return_dict", "denoising_start", "denoising_end"}  # arguments that `invert` sets
LOST = "not kept"  # stands for a tensor
Prompt = str | list[str] | None


@dataclass(frozen=True)
class Inverted:
    """Latents of pictures, with a report (None if no residual was measured) and the settings that decode them.

    `settings` are ready for JSON: "scheduler" (config of the sampler), "strength", "call" (arguments that decode),
    and "left_out" (its tensors and pictures, not kept). `corrections` (S, B, …) to x_s are for those of `decode_with`.
    """

    latents: Tensor
    report: InversionReport | None
    settings: dict[str, Any]
    corrections: Tensor | None = None

    def decode(self, pipe: Any, prompt: Prompt = None, batch_size: int | None = None, **changes: Any) -> Any:
        """Decode the latents: to the pictures themselves, or with another prompt to edited ones.

        `changes` replace arguments of the inversion's call. Pass its tensors, such as `prompt_embeds`, again. With
        `batch_size`, so many pictures are decoded at a time.
        """
        call, missed = self.call(pipe, prompt, **changes), self.corrections

        def correct(rows: slice, i: int, _: Tensor, x: Tensor) -> Tensor:
            return x if missed is None else x + missed[i, rows].to(x.device)

        return run_with(pipe, lambda r: _sampler(self.settings, partial(correct, r)), self.latents, batch_size, **call)

    def call(self, pipe: Any, prompt: Prompt = None, **changes: Any) -> dict[str, Any]:
        """Return the arguments that `decode` passes on. Raises ValueError for changes that do not fit."""
        if "call" not in self.settings:
            raise ValueError("these latents have no settings of an inversion: use those of invert, or decode of a pipe")
        theirs, ours = map(GeneralizedDDIMScheduler.from_config, (self.settings["scheduler"], pipe.scheduler.config))
        if (kind := theirs.config.prediction_type) != ours.config.prediction_type:
            raise ValueError(f"these latents are of a model that predicts {kind!r}, unlike this one: load that model")
        changes |= {} if prompt is None else {"prompt": prompt}
        texts = [key for key in self.settings["left_out"] if prompt and "prompt" in key and "negative" not in key]
        if lost := [key for key in self.settings["left_out"] if key not in {*changes, *texts}]:
            raise ValueError(f"the inversion had {', '.join(lost)}, which is not kept with latents: pass it again")
        bound = FIXED if self.corrections is not None else STEPS if self.settings["strength"] < 1 else {*()}
        if fixed := ", ".join(changes.keys() & bound):
            raise ValueError(f"these latents belong to their inversion's steps: leave out {fixed}, or invert again")
        replaced = {key.removesuffix("_embeds") for key in changes}
        gone = STEPS if replaced & STEPS else {*()}
        return {k: None if k in replaced else v for k, v in self.settings["call"].items() if k not in gone} | changes

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
        except (SafetensorError, OSError) as error:
            raise ValueError(f"cannot read latents from {path}: {error}") from error
        report = {k: np.array(v, float if k == "residual" else None) for k, v in (known.get("report") or {}).items()}
        return cls(latents, InversionReport(**report) if report else None, known.get("settings", {}), *corrections)


@torch.no_grad()
def draw(pipe: Any, seeds: Sequence[int], batch_size: int | None = None, **call: Any) -> tuple[Any, Inverted]:
    """Sample a picture from each seed, in the pipeline's own loop, whatever the batch.

    Returns pictures (B, H, W, C) in [0, 1], and the latents x_T of which `decode` makes the same pictures if η = 0.
    """
    check(pipe)
    config, known, z = pipe.scheduler.config, settings_of(pipe, pipe.scheduler, call), []
    call |= {"generator": [torch.Generator().manual_seed(seed) for seed in seeds], "output_type": "np"}

    def keep(i: int, sample: Tensor, x: Tensor) -> Tensor:
        z.extend([] if i else [sample / pipe.scheduler.init_noise_sigma])
        return x

    images = run_with(pipe, lambda _: _sampler(known, keep), None, batch_size, **call)
    changes = keep_learned(config, {"eta": 0.0, "variance_type": "fixed_small", "corrector_steps": 0})
    known["scheduler"] = json.loads(type(pipe.scheduler).from_config(config, **changes).to_json_string())
    return images, Inverted(torch.cat(z), None, known)


@torch.no_grad()
def invert(
    pipe: Any,
    images: Images,
    prompt: Prompt = None,
    refinement_steps: int | None = 4,
    strength: float = 1.0,
    tolerance: float | None = None,
    decode_with: dict[str, Any] | None = None,
    batch_size: int | None = None,
    **call: Any,
) -> Inverted:
    """Find the latents from which a pipeline makes pictures, in its own loop.

    Args, with a ValueError for those that do not fit, before any long work:
        pipe: with a `vae`, and `latents` in its call (Stable Diffusion, XL, 3, Flux, …), or `GeneralizedDDIMPipeline`.
        images: PIL images, arrays (B, H, W, C), tensors (B, C, H, W), one of them or a list; bytes, or in [0, 1].
        prompt: for all pictures, or a list with one for each. None is the empty prompt.
        refinement_steps: network evaluations of a step beyond the first; None is the plain inverse (Section 5.4).
        strength: share of the process to invert, in (0, 1]. Less keeps more of a picture in an edit.
        tolerance: residual of a step, in units of latents (deviation 1), that logs a warning: 1e-2, or as in `encode`.
        decode_with: arguments of the call that decodes, if they differ. What its steps miss is kept as `corrections`.
        batch_size: number of pictures to invert at a time; all by default.
        call: other arguments of the pipeline's call. `guidance_scale=1` is the most exact.
    """
    parameters, packs = check(pipe), hasattr(pipe, "_pack_latents")
    tolerance = (TOLERANCE if isinstance(pipe, Loop) else 1e-2) if tolerance is None else tolerance
    if isinstance(pipe, Loop):
        if prompt is not None or decode_with is not None:
            raise ValueError(f"{type(pipe).__name__} has no prompts and no decode_with: leave them out")
        given = {"batch_size": batch_size, "tolerance": tolerance, "return_report": True}
        z, found = pipe.encode(images, strength=strength, refinement_steps=refinement_steps, **given, **call)
        return Inverted(z, found, settings_of(pipe, pipe.scheduler, call | {"strength": strength}, strength))
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
    call = {key: value for key, value in size.items() if key in parameters} | call
    known = settings_of(pipe, sampler_class(pipe.scheduler).from_config(up.config), call | changed, strength)
    ups = [type(up).from_config(up.config) for _ in batches(len(x), batch_size)]
    waiting, z_0 = iter(ups), torch.cat([_encode(pipe, x[rows]) for rows in batches(len(x), batch_size)])
    z = finite(run_with(pipe, lambda _: next(waiting), z_0, batch_size, output_type="latent", **call))
    z = z / ups[0].path.level(ups[0]._tau[-1].item()).noise if ups[0].path.explodes and strength == 1 else z
    reports = [each.report(tolerance) for each in ups if each._records]
    measured = [np.concatenate([vars(each)[k] for each in reports], 1) for k in ("residual", "evaluations") if reports]
    report = InversionReport.of(reports[0].timesteps, *measured, tolerance, z) if reports else None
    if report and not report.converged.all():
        text = "%d of %d images did not converge (residual %.1e): use more steps or refinement_steps, or less guidance"
        logging.getLogger("ddim_plugin").warning(text, (~report.converged.all(0)).sum(), len(x), report.residual.max())
    return Inverted(z, report, known, None if decode_with is None else _missed(pipe, known, z, z_0, call, changed))


def check(pipe: Any) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a pipeline's call. Raises ValueError if it does not begin with latents."""
    parameters, packs = inspect.signature(pipe.__call__).parameters, hasattr(pipe, "_pack_latents")
    form = 5 if not packs else len(inspect.signature(pipe._pack_latents).parameters)  # 5 arguments in Flux, Qwen-Image
    known = "latents" in parameters and "strength" not in parameters and form == 5
    if not isinstance(pipe, Loop) and not (known and getattr(pipe, "vae", None) is not None):
        remedy = "use a text-to-image pipeline with a vae, or GeneralizedDDIMPipeline for a model of pixels"
        raise ValueError(f"{type(pipe).__name__} does not begin with latents of a form that is known: {remedy}")
    return parameters


def settings_of(pipe: Any, scheduler: SchedulerMixin, call: dict[str, Any], strength: float = 1.0) -> dict[str, Any]:
    """Return the settings of `Inverted` with which a pipeline decodes."""
    parameters = inspect.signature(pipe.__call__).parameters
    call = {key: parameters[key].default for key in DEFAULTS if key in parameters} | call
    kept = {key: value for key, value in call.items() if LOST not in json.dumps(value, default=lambda _: LOST)}
    lost = [key for key, value in call.items() if key not in kept and not callable(value)]
    return {"scheduler": json.loads(scheduler.to_json_string()), "strength": strength, "call": kept, "left_out": lost}


def _missed(pipe: Any, known: dict[str, Any], z: Tensor, z_0: Tensor, call: dict[str, Any], changed: Any) -> Tensor:
    """Decode z, and return what each step of the call that is `changed` misses of the way to z_0, (S, B, …)."""
    states, missed = {}, {}

    def follow(i: int, _: Tensor, x: Tensor) -> Tensor:
        missed[i] = states.setdefault(i, x) - x  # 0 the first time
        return states[i]

    run_with(pipe, lambda _: _sampler(known, follow), z, output_type="latent", **call)
    states[max(states)] = z_0
    run_with(pipe, lambda _: _sampler(known, follow), z, output_type="latent", **call | changed)
    return finite(torch.stack([*missed.values()]))


def _sampler(settings: dict[str, Any], change: Callable[[int, Tensor, Tensor], Tensor]) -> SchedulerMixin:
    """Make the sampler that decodes. `change` replaces x_s, in float32 at least, given i, x_t and x_s of the step."""
    config, places = settings["scheduler"], count()
    scheduler = CLASSES[config[KEY]["class"]].from_config(config)
    advance = scheduler._advance
    scheduler._advance = lambda evaluation: change(next(places), evaluation.sample, advance(evaluation))
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
