"""The generalized process (Song, Meng, Ermon 2021) as a scheduler of diffusers."""

from numbers import Real
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from torch import Tensor

from ..process import moves, spacings
from .config import all_or_nothing, with_settings_of
from .planned import Kind, Planned
from .step import Evaluation, GeneralizedDDIMSchedulerOutput, Randomness, Step, accumulate, draw

DETERMINISTIC = {"eta": 0.0, "variance_type": "fixed_small", "clip_sample": False, "thresholding": False}
DETERMINISTIC |= {"corrector_steps": 0}  # then a latent and its image determine each other


class GeneralizedDDIMScheduler(Planned):
    """The generalized process of Denoising Diffusion Implicit Models, along any subsequence τ and Gaussian path.

    One step is x_s = a_s·x̂0 + √(b_s² − σ²)·ε̂ + σz (Eq. 12) with σ = σ(η) (Eq. 16), for the pairs (t, s) of τ. In the
    paper a = √ᾱ and b = √(1 − ᾱ). Settings not listed are those of `DDIMScheduler`. By default x̂0 is not clipped.
    Values out of range, and combinations that do not exist, raise a ValueError.

    Args:
        num_train_timesteps: T, the number of timesteps the network was trained on.
        beta_start, beta_end, beta_schedule: "linear", "scaled_linear", "squaredcos_cap_v2", "const", "jsd", "sigmoid"
            or "laplace", and the range of β. "sqrt" is the path x_t = x_0 + √t·ε. `trained_betas` are β_1..β_T instead.
        prediction_type: "epsilon", "sample" (x_0), "v_prediction", "flow_prediction" (ε − x_0), "score" (−ε/b), or
            "edm" (F of Karras et al. 2022).
        timestep_spacing: τ by name, such as "linear" or "quadratic", of `ddim_plugin.process.spacings.NAMES`.
        eta: η of Eq. 16, 0 for DDIM and 1 for DDPM. "fixed_large" and "learned_range" do not use it: theirs is 1.
        variance_type: "fixed_small" (σ = η·√β̃, Eq. 16), "fixed_large" (σ̂ only in the noise term, Appendix D.3),
            "learned_range" (a network with twice the channels, between β̃ and β), or "optimal" (Analytic-DPM) with
            `eps_mean_square`, E‖ε̂(x_t, t)‖²/d for t = 1..T.
        use_clipped_model_output: recompute ε̂ from a clipped x̂0, as Ho's sampler does.
        use_flow_sigmas, shift, flow_shift, use_dynamic_shifting: flow matching, which "flow_prediction" implies, and
            its noise levels, computed by diffusers' own scheduler. `flow_shift` is another name of `shift`.
        sigma_min, sigma_max: variance exploding, for a network that is evaluated at σ. `sigma_min` None is 0.01.
        sigma_data: deviation σ_d of the data of an EDM network ("edm", or "v_prediction" for −F). It is evaluated at
            ln(σ)/4, and `scale_model_input` multiplies x_t by c_in. σ is in 0.002..80 by default, images in −1..1.
        corrector_steps, corrector_snr: number and signal-to-noise ratio of Langevin steps before a step. Each is an
            evaluation: `timesteps` repeats its time.
        denoising_start, denoising_end: part of the process that the plan makes, shares of T counted from noise, as in
            the pipelines of SDXL. With `denoising_start` 0.4 the first sample is x_t at t = 0.6·T.
    """

    _compatibles: ClassVar = [each.name for each in KarrasDiffusionSchedulers]

    @with_settings_of(DDIMScheduler)
    def __init__(
        self,
        clip_sample: bool = False,
        timestep_spacing: str = "linear",
        eta: float = 0.0,
        variance_type: str = "fixed_small",
        eps_mean_square: list[float] | None = None,
        use_clipped_model_output: bool = False,
        use_flow_sigmas: bool = False,
        shift: float = 1.0,
        flow_shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        sigma_data: float | None = None,
        corrector_steps: int = 0,
        corrector_snr: float = 0.16,
        denoising_start: float = 0.0,
        denoising_end: float = 1.0,
    ): ...

    def register_to_config(self, **kwargs: Any) -> None:
        """Record settings. After construction, compute the tables again; the plan keeps its timesteps."""
        with all_or_nothing(self):
            self._derived_betas = self._derived_betas and "trained_betas" not in kwargs
            super().register_to_config(**kwargs)
            if hasattr(self, "path"):
                self._build()

    def _build(self) -> None:
        config, start, end = self.config, self.config.denoising_start, self.config.denoising_end
        T = spacings.integer("num_train_timesteps", config.num_train_timesteps, 1)
        self.order = 1 + spacings.integer("corrector_steps", config.corrector_steps)
        spacings.integer("steps_offset", config.steps_offset)
        spacings.check_name("prediction_type", config.prediction_type, moves.PREDICTIONS)
        moves.effective_eta(config.variance_type, config.eta or None, config.eta)
        if not isinstance(config.corrector_snr, Real) or not 0 < config.corrector_snr < float("inf"):
            raise ValueError(f"corrector_snr must be positive, not {config.corrector_snr!r}")
        if config.clip_sample and not (isinstance(config.clip_sample_range, Real) and config.clip_sample_range > 0):
            raise ValueError(f"clip_sample_range must be positive, not {config.clip_sample_range!r}")
        ratio, largest = config.dynamic_thresholding_ratio, config.sample_max_value
        if config.thresholding and not (0 <= ratio <= 1 and largest >= 1):
            raise ValueError(f"thresholding needs a ratio in [0, 1] and a maximum ≥ 1, not {ratio!r} and {largest!r}")
        if not 0 <= start < end <= 1:
            raise ValueError(f"denoising_start={start!r} and denoising_end={end!r} must satisfy 0 ≤ start < end ≤ 1")
        table = config.eps_mean_square
        if table is None and config.variance_type == "optimal":
            raise ValueError(f"variance_type='optimal' needs eps_mean_square: E‖ε̂‖²/d, one for each of the {T} times")
        if table is not None and not (np.shape(table) == (T,) and np.isfinite(table).all() and min(table) >= 0):
            raise ValueError(f"eps_mean_square must be {T} finite non-negative numbers, one for each time")
        self._eps_mean_square = None if table is None else np.array([0.0, *table])  # with an entry for t = 0
        path = self._make_path()
        new, old = ((type(each), each.T, each.bounds) for each in (path, getattr(self, "path", path)))
        if self._planned is None or new != old:
            self.num_inference_steps, self._planned, self._sigmas = None, None, None
            self.timesteps = torch.tensor([path.timestep(t) for t in range(T, 0, -1)], device="cpu")
        (signal, noise), self.path, self.image_range, self._tables = path.levels, path, path.image_range, {}
        self.alpha_bar, self._shown = signal**2 / (signal**2 + noise**2), None
        self.alpha_bar.setflags(write=False)
        self.init_noise_sigma = float(noise[-1]) if path.explodes and not self._encodes else 1.0
        if not path.continuous and not path.explodes:
            self._show(self.alpha_bar[1:])
        self._replan()

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """Return the network's input: x_t, or x_t/√(σ² + σ_d²) for a network with `sigma_data`."""
        if self.path.sigma_data is None:
            return sample
        times = torch.as_tensor(timestep, dtype=torch.promote_types(sample.dtype, torch.float32), device=sample.device)
        times = times.view(*times.shape, *[1] * (sample.ndim - times.ndim))
        return (sample / (self.path.sigma(times) ** 2 + self.path.sigma_data**2).sqrt()).to(sample.dtype)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float | None = None,
        use_clipped_model_output: bool | None = None,
        generator: Randomness = None,
        variance_noise: Tensor | None = None,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> GeneralizedDDIMSchedulerOutput:
        """Compute x_s from x_t, with s the next lower time of the plan (Eq. 12).

        Args:
            model_output: the network's output, (B, C, H, W), or (B, 2C, H, W) for "learned_range".
            timestep: a network timestep (0..T−1, T·σ or σ), or a tensor (B, …) with one for each sample, or each frame
                of a sample. One outside the plan steps to the nearest time of the plan below it.
            sample: x_t, (B, C, H, W). Half precision is computed in float32 and cast once at the end.
            eta: η of Eq. 16 for this step. None and 0 are that of the plan or config, since stock pipelines pass 0
                unasked. `set_timesteps(eta=0)` switches noise off.
            use_clipped_model_output: whether ε̂ is recomputed from a clipped x̂0. None is the scheduler's setting.
            generator: source of z: one generator, or a list with one for each image. Not used in a step without noise.
            variance_noise: z itself, (B, C, H, W), instead of a generator.
            per_token_timesteps: timesteps (B, N) of a flow model's tokens, with −1 times its output (LTX).
            return_dict: False returns (x_s, x̂0).

        Raises ValueError before `set_timesteps`, and for shapes, timesteps, η or generators that do not fit.
        """
        if self._planned is None:
            raise ValueError("no timesteps are set: call set_timesteps before step")
        if per_token_timesteps is not None:
            timestep, model_output = per_token_timesteps, -model_output
        self._adopt()
        learned = self.config.variance_type == "learned_range"
        output, *more = model_output.chunk(2, dim=1) if learned else (model_output,)
        if [part.shape for part in (output, *more)] != [sample.shape] * (1 + learned):
            shapes = f"shape {tuple(model_output.shape)}, and a sample of shape {tuple(sample.shape)}"
            needs = "twice the channels" if learned else "the same; twice the channels need 'learned_range'"
            raise ValueError(f"model_output has {shapes} with {self.config.variance_type!r} needs {needs}")
        kind = self._kind(eta or None)
        step = self._find(timestep, kind, sample)
        variance = more[0] if kind[0] == "learned_range" else None
        if self._place is None and (self.config.corrector_steps or self._in_order):
            given = f"timestep {timestep} is not in the plan, or not the same for all samples"
            raise ValueError(f"{given}: exact inversion and corrector_steps need the timesteps of the plan")
        corrects = self.config.corrector_steps > 0 and len({*self._pairs[self._place]}) == 1
        noisy = corrects or (kind != ("fixed_small", 0.0) and (isinstance(step.noise, Tensor) or step.noise > 0))
        z = draw(sample, generator, variance_noise) if noisy else None
        evaluation = self._evaluate(kind, step, sample, output, variance, use_clipped_model_output)
        evaluation = evaluation.langevin(self.config.corrector_snr) if corrects else evaluation
        x = self._advance(evaluation)
        x = x if z is None else accumulate(x, evaluation.std(), z)
        return GeneralizedDDIMSchedulerOutput(x.to(sample.dtype), evaluation, None if return_dict else 2)

    def _advance(self, evaluation: Evaluation) -> Tensor:
        return evaluation.mean()

    def _evaluate(
        self, kind: Kind, step: Step, sample: Tensor, output: Tensor, variance: Tensor | None, recompute: bool | None
    ) -> Evaluation:
        config, recompute = self.config, self.config.use_clipped_model_output if recompute is None else recompute
        limit = config.clip_sample_range if config.clip_sample and not config.thresholding else None
        dynamic = (config.dynamic_thresholding_ratio, config.sample_max_value) if config.thresholding else None
        return Evaluation(step, sample, output, variance, limit, dynamic, bool(recompute and (limit or dynamic)))

    def __len__(self) -> int:
        return self.config.num_train_timesteps
