"""The generalized process for categorical data (Song, Meng, Ermon 2021, Appendix A) as a scheduler of diffusers."""

from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from diffusers import SchedulerMixin
from diffusers.configuration_utils import ConfigMixin
from diffusers.configuration_utils import register_to_config as recorded
from diffusers.utils import BaseOutput
from torch import Tensor

from ..process import betas, categorical, paths, spacings
from .config import all_or_nothing
from .levels import edits
from .step import Randomness, at_least_float32, draw, number, numbers

# A setting of diffusers' own `DiscreteDDIMScheduler`. Its class refuses our configs, as this is no number.
MARK = {"num_inference_steps": "of set_timesteps, in ddim_plugin.DiscreteDDIMScheduler"}


@dataclass
class DiscreteDDIMSchedulerOutput(BaseOutput):
    """Return x_s and the most probable x̂0, tokens (B, …), and p(x_s|x_t), in the shape of the logits."""

    prev_sample: Tensor
    pred_original_sample: Tensor
    probabilities: Tensor


class DiscreteDDIMScheduler(SchedulerMixin, ConfigMixin):
    """The generalized process for tokens 0..K−1, along any τ: q(x_t|x_0) = Cat(α_t·x_0 + (1 − α_t)/K) (Appendix A).

    The network predicts p̂(x_0|x_t). A step samples from Σ p̂(x_0)·q(x_s|x_t, x_0), and the last one from p̂. The class of
    this name in diffusers is η = 1 with beta_schedule="jsd" and all T steps, where α_t = 1 − t/T.

    Args, with a ValueError for unknown names and values out of range:
        num_classes: K, the number of tokens. The next six are as in `GeneralizedDDIMScheduler`; α is ᾱ of the schedule.
        eta: η from 0, the least stochastic q, to 1.
        noisiest: q at η = 1. "bayes" is the posterior of the Markov chain, for ancestral sampling as in DDPM.
            "independent" is that of Appendix A with σ = 0: η stands for its σ_t = (1 − η)·(1 − α_s)/(1 − α_t).
    """

    order = 1
    has_compatibles = False  # else settings of the class of this name in diffusers would be dropped

    @recorded
    def __init__(
        self,
        num_classes: int,
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        beta_schedule: str = "squaredcos_cap_v2",
        trained_betas: list[float] | None = None,
        timestep_spacing: str = "linear",
        eta: float = 0.0,
        noisiest: str = "bayes",
    ):
        self._build()

    def register_to_config(self, **kwargs: Any) -> None:
        """Record settings. After construction, compute the tables again, and plan all T steps."""
        with all_or_nothing(self):
            super().register_to_config(**kwargs, **MARK)
            if hasattr(self, "alpha_bar"):
                self._build()

    def _build(self) -> None:
        config, self.T = self.config, self.config.num_train_timesteps
        spacings.integer("num_classes", config.num_classes, 2)
        spacings.check_name("noisiest", config.noisiest, ("bayes", "independent"))
        spacings.check_name("timestep_spacing", config.timestep_spacing, spacings.SPACINGS)
        named = config.beta_schedule, self.T, config.beta_start, config.beta_end
        known = betas.betas(*named) if config.trained_betas is None else betas.check(config.trained_betas, self.T)
        self.alpha_bar = betas.alpha_bar(known)  # the paper's α_0 = 1, …, α_T
        self._path = paths.variance_preserving(self.alpha_bar)  # for its timesteps
        self.posterior(1, 0)
        self.set_timesteps(timesteps=range(self.T - 1, -1, -1))

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any):
        """Create a scheduler. Raises ValueError for a config of diffusers' class of this name, or without K."""
        if isinstance(config, dict):
            if "corrector_selection" in config or "num_classes" not in {**config, **kwargs}:
                raise ValueError(f"this config is of diffusers' {cls.__name__}, or has no num_classes: pass another")
            config = {k: v for k, v in config.items() if k not in (*MARK, "_use_default_values")}  # these are not unset
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def set_timesteps(self, num_inference_steps: int | None = None, device: Any = None, timesteps: Any = None) -> None:
        """Plan steps of the spacing, without times that it repeats, or at descending network timesteps 0..T−1."""
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("set_timesteps takes either num_inference_steps or timesteps=[...], not both or neither")
        values = timesteps.tolist() if isinstance(timesteps, Tensor) else timesteps
        named = self.config.timestep_spacing, num_inference_steps, self.T, 0, self.alpha_bar
        self._tau = np.unique(spacings.tau(*named) if values is None else self._path.times(values))
        self.num_inference_steps = len(self._tau)
        with torch.inference_mode(False):  # else `step` cannot see where a timestep lies
            self._planned = torch.tensor(self._tau[::-1] - 1, device="cpu").to(device)
            self.timesteps = self._planned[:]

    def posterior(self, t: int, s: int, eta: float | None = None) -> categorical.Posterior:
        """Return q(x_s|x_t, x_0) for the paper's times T ≥ t > s ≥ 0."""
        config, eta = self.config, self.config.eta if eta is None else eta
        if not isinstance(eta, Real) or not 0 <= eta <= 1:
            raise ValueError(f"eta must lie in [0, 1], not {eta!r}: 0 is the least stochastic process")
        if not 0 <= s < t <= self.T:
            raise ValueError(f"there is no step from time {t} to {s}: give T = {self.T} ≥ t > s ≥ 0")
        return categorical.posterior(self.alpha_bar[t], self.alpha_bar[s], config.num_classes, eta, config.noisiest)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float | None = None,
        generator: Randomness = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DiscreteDDIMSchedulerOutput | tuple:
        """Sample x_s from p(x_s|x_t), with s the next lower time of the plan.

        `model_output` is logits of p̂(x_0|x_t): (B, K, …), (B, …, K), or (B, K·C, …) for tokens x_t, (B, C, …). Others
        are as in `GeneralizedDDIMScheduler`, but eta=0 is 0, and there is one timestep. Noise is normal, (B, …).
        Raises ValueError for what does not fit. Values on accelerators are not checked, nor waited for.
        """
        own = isinstance(timestep, Tensor) and timestep._base is self._planned and not edits(self._planned)
        value = self._tau[-1 - timestep.storage_offset()] - 1 if own and not timestep.ndim else number(timestep, True)
        self._path.check(value)
        q = self.posterior(value + 1, max([0, *self._tau[self._tau <= value]]), eta)
        shape, K, given = tuple(sample.shape), self.config.num_classes, tuple(model_output.shape)
        first, last = (*shape[:1], K, *shape[1:]), (*shape, K)
        joint = (shape[0], K * shape[1], *shape[2:]) if len(shape) > 2 else first
        if given not in (first, last, joint) or (given == first == last and len(shape) > 1):
            remedy = f"{first} or {last}; if these are equal, add an axis of 1 to the tokens"
            raise ValueError(f"logits have shape {given}, and {K} tokens of shape {shape} need {remedy}")
        logits = at_least_float32(model_output if given == last else model_output.reshape(first))
        p = logits.movedim(axis := -1 if given == last else 1, -1).softmax(-1)
        if self._check(sample) and bool(p.isnan().any()):
            raise ValueError("the logits contain NaN or infinity: in half precision, use float32")
        after = categorical.reverse(p, sample.long(), q)
        x = categorical.pick(after, categorical.uniforms(draw(sample, generator, variance_noise)))
        found = DiscreteDDIMSchedulerOutput(x, p.argmax(-1), after.movedim(-1, axis).reshape(given))
        return found if return_dict else found.to_tuple()

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor | int) -> Tensor:
        """Sample x_t ~ q(x_t|x_0) for tokens and standard normal `noise`, both (B, …), at one timestep or (B,)."""
        times = numbers(torch.as_tensor(timesteps), whole=True).view(-1, *[1] * (original_samples.ndim - 1))
        if self._check(original_samples) and times.device.type == "cpu":
            self._path.check(*times.flatten().tolist())
        uniform = categorical.uniforms(draw(original_samples, None, noise))
        flipped = torch.tensor(1 - self.alpha_bar[1:], device="cpu").to(uniform)[times.to(uniform.device)]
        return categorical.noised(original_samples, uniform, flipped, self.config.num_classes)

    def initial_sample(self, noise: Tensor) -> Tensor:
        """Make uniform tokens x_T from standard normal numbers of any shape."""
        return (categorical.uniforms(noise) * self.config.num_classes).long()

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """Convert tokens to brightness −1..1, float32, which networks for images see. Others see the tokens."""
        return sample.float() * (2 / (self.config.num_classes - 1)) - 1

    def _check(self, tokens: Tensor) -> bool:
        """Check tokens, and return whether they are on the CPU."""
        on_cpu, K = tokens.device.type == "cpu", self.config.num_classes
        if tokens.is_floating_point() or (on_cpu and tokens.numel() and not (0 <= tokens.min() <= tokens.max() < K)):
            raise ValueError(f"tokens are integers 0..{K - 1}, not {tokens.dtype} {tokens.min():g}..{tokens.max():g}")
        return on_cpu
