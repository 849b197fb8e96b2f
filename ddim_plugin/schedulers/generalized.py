"""Schedulers of the generalized process for diffusers.

A network's `timestep` is the paper's time minus one: 0..T−1. That shift lives in this file only.
"""

import inspect
import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from itertools import pairwise
from numbers import Real
from typing import Any, ClassVar, NamedTuple

import diffusers
import numpy as np
import torch
from diffusers import DDIMScheduler, SchedulerMixin
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor

from ..process import betas as schedules
from ..process import moves as process
from ..process import multistep as ode
from ..process import predictions as p
from ..process import spacings as tau

OWN = "_ddim_plugin"
"""Key of a saved config that keeps what stock schedulers have no word for; they carry it along unread."""

SAMPLER = "sampler"
"""Key in there for what an inverse scheduler switched off, and a sampler made from it switches on again."""

CONSTRAINTS = ("clip_sample", "thresholding", "use_clipped_model_output")
"""Settings that change x̂0, which no inverse can undo."""

DETERMINISTIC = {"eta": 0.0, "variance_type": "fixed_small", "clip_sample": False, "thresholding": False}
"""Settings under which a latent and its image determine each other."""

SOLVER = (
    "solver_order",
    "solver_quantity",
    "solver_coordinate",
    "solver_corrector",
    "solver_extrapolation",
    "lower_order_final",
    "start_from_top",
    "fitted_timesteps",
)
"""Settings of `MultistepDDIMScheduler` beside those of the process."""

CORRECTORS = ("pec", "pece")
"""Predict, evaluate, correct; and evaluate again."""

COORDINATE = {"epsilon": "bounded", "sample": "log_snr"}
"""The coordinate in which ε̂, or x̂0, is held as a polynomial where none is said."""

MUCH_NOISE = 0.5
"""η from which on τ and the extrapolation are those for noise."""

_OWN_KEYS = ("eta", "eps_mean_square", "use_clipped_model_output")
_STOCK_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
STOCK_SPACINGS = ("leading", "trailing", "linspace")
_STOCK_VARIANCES = ("fixed_large", "learned_range")  # "fixed_small" is what they take where nothing is said

Randomness = Generator | list[Generator] | None

_mean_weights = lru_cache(maxsize=4096)(ode.mean_weights)  # of one plan after the other, mostly the same


class Step(NamedTuple):
    """All coefficients of one step: numbers, or tensors (B, 1, 1, 1) where each sample has its own time."""

    x0_x: p.Coefficient
    x0_out: p.Coefficient
    eps_x: p.Coefficient
    eps_out: p.Coefficient
    x0: p.Coefficient
    eps: p.Coefficient
    noise: p.Coefficient
    log_low: p.Coefficient
    log_high: p.Coefficient
    fold_x: p.Coefficient  # the whole move as fold_x·x_t + fold_out·output
    fold_out: p.Coefficient
    eps_x_again: p.Coefficient  # ε̂ recomputed as eps_x_again·x_t + eps_x0_again·x̂0
    eps_x0_again: p.Coefficient
    again_x: p.Coefficient  # the move with it as again_x·x_t + again_x0·x̂0
    again_x0: p.Coefficient


def _step(move: process.Move, prediction_type: str) -> Step:
    """The step of a move down, x_t ↦ x_s."""
    prediction = p.prediction(prediction_type, move.alpha_bar_t)
    learned = move.log_variance is not None
    log_low, log_high = move.log_variance or (0.0, 0.0)
    noise = 1.0 if learned else move.noise  # a learned deviation is multiplied by this
    eps_x, eps_x0 = p.eps_from_x0(move.alpha_bar_t)
    again = (eps_x, eps_x0, move.eps * eps_x, move.x0 + move.eps * eps_x0)
    return Step(*prediction, move.x0, move.eps, noise, log_low, log_high, *p.fold(prediction, move), *again)


def _from_top(step: Step, alpha_bar_T: float) -> Step:
    """The step for a sample x_T that the network saw at a lower time: ε̂ = (x_T − √ᾱ_T·x̂0)/√(1 − ᾱ_T)."""
    x, x0 = p.eps_from_x0(alpha_bar_T)
    eps_x, eps_out = x + x0 * step.x0_x, x0 * step.x0_out
    return step._replace(
        eps_x=eps_x,
        eps_out=eps_out,
        fold_x=step.x0 * step.x0_x + step.eps * eps_x,
        fold_out=step.x0 * step.x0_out + step.eps * eps_out,
        eps_x_again=x,
        eps_x0_again=x0,
        again_x=step.eps * x,
        again_x0=step.x0 + step.eps * x0,
    )


def _inverse_step(move: process.Move, prediction_type: str) -> Step:
    """The step back, x_s ↦ x_t: the move solved for x_t, the network's output at time t taken as known.

    `Prediction` is then in terms of x_s, and x_t = √ᾱ_t·x̂0 + √(1 − ᾱ_t)·ε̂.
    """
    prediction = p.prediction(prediction_type, move.alpha_bar_t)
    x, out = p.unfold(prediction, move)
    inverse = p.Prediction(
        prediction.x0_x * x,
        prediction.x0_x * out + prediction.x0_out,
        prediction.eps_x * x,
        prediction.eps_x * out + prediction.eps_out,
    )
    x0, eps = float(np.sqrt(move.alpha_bar_t)), float(np.sqrt(1 - move.alpha_bar_t))
    nan = float("nan")
    return Step(*inverse, x0, eps, 0.0, 0.0, 0.0, x, out, nan, nan, nan, nan)


def _step_from_data(move: process.Move, prediction_type: str) -> Step:
    """The step up from x_0, with ε̂ as the network sees x_0 at the upper end; x̂0 follows from x_0 and ε̂."""
    called = p.prediction(prediction_type, move.alpha_bar_s)
    signal, noise = float(np.sqrt(move.alpha_bar_t)), float(np.sqrt(1 - move.alpha_bar_t))
    x0 = (1 - noise * called.eps_x) / signal, -noise * called.eps_out / signal
    prediction = p.Prediction(*x0, called.eps_x, called.eps_out)
    nan = float("nan")
    return Step(*prediction, move.x0, move.eps, 0.0, 0.0, 0.0, *p.fold(prediction, move), nan, nan, nan, nan)


class GeneralizedDDIMSchedulerOutput:
    """What a step gives. All tensors are (B, C, H, W) in the sample's dtype; all but the first are made when asked for.

    It reads as diffusers' outputs do: by attribute, by key, by position, `to_tuple()`. What is made later is made from
    the step's `sample` and `model_output`: do not change those in place before.

    Attributes:
        prev_sample: x_s, the sample after the move.
        pred_original_sample: x̂0, after clipping or thresholding (Eq. 9).
        pred_epsilon: ε̂ as it entered the move.
        mean: the mean of x_s given x_t (Eq. 12 without its last term).
        std: standard deviation of x_s given x_t: a scalar tensor, (B, 1, 1, 1) with times for each sample, or
            (B, C, H, W) where the variance is learned.
    """

    _KEYS = ("prev_sample", "pred_original_sample", "mean", "std", "pred_epsilon")

    def __init__(self, prev_sample: Tensor, evaluation: "_Evaluation"):
        self.prev_sample = prev_sample
        self._evaluation = evaluation

    @cached_property
    def pred_original_sample(self) -> Tensor:
        return self._evaluation.x0().to(self.prev_sample.dtype)

    @cached_property
    def pred_epsilon(self) -> Tensor:
        return self._evaluation.eps().to(self.prev_sample.dtype)

    @cached_property
    def mean(self) -> Tensor:
        return self._evaluation.mean().to(self.prev_sample.dtype)

    @cached_property
    def std(self) -> Tensor:
        std = self._evaluation.std()
        if not isinstance(std, Tensor):
            return torch.full((), std, dtype=self.prev_sample.dtype, device=self.prev_sample.device)
        return std.to(self.prev_sample.dtype)

    def keys(self) -> tuple[str, ...]:
        return self._KEYS

    def items(self) -> tuple[tuple[str, Tensor], ...]:
        return tuple(zip(self._KEYS, self.to_tuple(), strict=True))

    def get(self, key: str, default: Any = None) -> Any:
        return getattr(self, key) if key in self._KEYS else default

    def __iter__(self) -> Iterator[str]:
        return iter(self._KEYS)

    def to_tuple(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, key) for key in self._KEYS)

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, slice):
            return self.to_tuple()[key]
        name = self._KEYS[key] if isinstance(key, int) else key
        if name not in self._KEYS:
            raise KeyError(name)
        return getattr(self, name)

    def __len__(self) -> int:
        return len(self._KEYS)

    def __contains__(self, key: str) -> bool:
        return key in self._KEYS


class _Evaluation(NamedTuple):
    """One evaluation of the network, and what follows from it for one step."""

    step: Step
    sample: Tensor
    output: Tensor
    variance: Tensor | None  # the network's choice between β̃ and β
    limit: float | None  # x̂0 is clipped to ± this
    thresholding: tuple[float, float] | None  # ratio and largest value of dynamic thresholding
    recompute_eps: bool
    others: Sequence[tuple[float, Tensor]] = ()  # what a multistep method adds: weights, and values of g

    def x0(self) -> Tensor:
        x0 = p.combine(self.step.x0_x, self.sample, self.step.x0_out, self.output)
        if self.thresholding is not None:
            return p.threshold(x0, *self.thresholding)
        return x0 if self.limit is None else x0.clamp_(-self.limit, self.limit)

    def eps(self) -> Tensor:
        if self.recompute_eps:
            return p.combine(self.step.eps_x_again, self.sample, self.step.eps_x0_again, self.x0())
        return p.combine(self.step.eps_x, self.sample, self.step.eps_out, self.output)

    def mean(self) -> Tensor:
        mean = self.first_order()
        for weight, value in self.others:
            mean = p.accumulate(mean, weight, value)
        return mean

    def first_order(self) -> Tensor:
        step = self.step
        if self.limit is None and self.thresholding is None:
            return p.combine(step.fold_x, self.sample, step.fold_out, self.output)
        # x0·x̂0 + eps·ε̂ as w·x̂0 + u·x_t + v·output
        if self.recompute_eps:
            w, u, v = step.again_x0, step.again_x, 0.0
        else:
            w, u, v = step.x0, step.eps * step.eps_x, step.eps * step.eps_out
        a, b = w * step.x0_x, w * step.x0_out
        if self.thresholding is not None or isinstance(a, Tensor) or a == 0:
            mean = p.accumulate(w * self.x0(), v, self.output)
        else:  # w·clip(x̂0) = a·clip(x_t + b/a·output, ± limit·w/a), in one new tensor
            bound = abs(w / a) * self.limit
            x = p.at_least_float32(self.sample)
            mean = p.rescale(torch.add(x, self.output, alpha=b / a).clamp_(-bound, bound), a, v, self.output)
        return p.accumulate(mean, u, self.sample)

    def std(self) -> p.Coefficient:
        if self.variance is None:
            return self.step.noise
        variance = self.variance.to(torch.promote_types(self.variance.dtype, torch.float32))
        return p.learned_std(variance, (self.step.log_low, self.step.log_high)) * self.step.noise


class GeneralizedDDIMScheduler(SchedulerMixin, ConfigMixin):
    """The generalized process of Denoising Diffusion Implicit Models, along any subsequence τ.

    One step is x_s = √ᾱ_s·x̂0 + √(1 − ᾱ_s − σ²)·ε̂ + σz (Eq. 12), σ = σ(η) (Eq. 16), for the pairs (t, s) of τ.
    Understands every key of diffusers' `DDIMScheduler`; defaults follow the paper: nothing is clipped.

    Args:
        num_train_timesteps: T, the number of times the network was trained on.
        beta_start, beta_end: range of β for the schedules that have one.
        beta_schedule: "linear", "scaled_linear", "squaredcos_cap_v2", "const", "jsd", "sigmoid", "laplace", "exp".
        trained_betas: β_1..β_T given outright, instead of a named schedule.
        clip_sample, clip_sample_range: clip x̂0 to ±`clip_sample_range` in each step.
        set_alpha_to_one: ᾱ_0 = 1 (the paper). False keeps ᾱ_0 = ᾱ_1, as Stable Diffusion was configured.
        steps_offset: added to the times of "leading" spacing.
        prediction_type: what the network predicts: "epsilon", "sample" (x0) or "v_prediction".
        thresholding, dynamic_thresholding_ratio, sample_max_value: dynamic thresholding of x̂0 (instead of clipping).
        timestep_spacing: τ by name: "linear", "quadratic", "leading", "trailing", "linspace", "paper_linear",
            "paper_quadratic", and for few steps "few_steps", "few_steps_noise", "few_steps_power", "log_snr" (see
            `ddim_plugin.tau`).
        rescale_betas_zero_snr: rescale β so that ᾱ_T = 0 (Lin et al. 2023).
        eta: η of Eq. 16 where a step is not given one: 0 is DDIM, 1 is DDPM. Not used by "fixed_large" and
            "learned_range", which stand at η = 1.
        variance_type: "fixed_small" (σ = η·√β̃, Eq. 16), "fixed_large" (σ̂, Appendix D.3: noise only, ε̂ keeps σ(1)),
            "learned_range" (a network with twice the channels, between β̃ and β), "optimal" (Analytic-DPM).
        eps_mean_square: E‖ε̂(x_t, t)‖²/d for t = 1..T, for "optimal".
        use_clipped_model_output: where x̂0 is clipped, recompute ε̂ from it so that the two agree on x_t, as Ho's
            sampler does; False (the authors' code and diffusers' DDIM) keeps the network's ε̂.

    Raises:
        ValueError: for any value that is unknown, out of range, or impossible together with another.
    """

    _upwards = False
    _derived_betas = False
    _compatibles: ClassVar = [scheduler.name for scheduler in KarrasDiffusionSchedulers]
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        clip_sample: bool = False,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "linear",
        rescale_betas_zero_snr: bool = False,
        eta: float = 0.0,
        variance_type: str = "fixed_small",
        eps_mean_square: list[float] | None = None,
        use_clipped_model_output: bool = False,
    ):
        T = num_train_timesteps
        schedules.check_length(T)
        if trained_betas is not None:
            betas = schedules.check(trained_betas, T)
        else:
            betas = schedules.betas(beta_schedule, T, beta_start, beta_end)
            if schedules.made_for_1000(beta_schedule, T, beta_start, beta_end):
                message = (
                    f"beta_start={beta_start:g} and beta_end={beta_end:g} were made for 1000 steps; at "
                    f"num_train_timesteps={T} they leave ᾱ_T = {np.prod(1 - betas):.3g}. Scale them by 1000/{T}, "
                    "or take a schedule without a range, such as squaredcos_cap_v2."
                )
                warnings.warn(message, stacklevel=3)
        p.check_prediction(prediction_type)
        tau.check_spacing(timestep_spacing)
        tau.check_offset(steps_offset)
        self._check_noise(variance_type, eta)
        if clip_sample and not (isinstance(clip_sample_range, Real) and clip_sample_range > 0):
            raise ValueError(f"clip_sample_range must be positive, not {clip_sample_range!r}")
        if thresholding and not (0 <= dynamic_thresholding_ratio <= 1 and sample_max_value >= 1):
            raise ValueError(
                "thresholding needs dynamic_thresholding_ratio in [0, 1] and sample_max_value ≥ 1, not "
                f"{dynamic_thresholding_ratio!r} and {sample_max_value!r}"
            )
        self._eps_mean_square = _eps_table(variance_type, eps_mean_square, T)

        alpha_bar = schedules.alpha_bar(betas)
        if rescale_betas_zero_snr:
            alpha_bar = schedules.rescale_zero_terminal_snr(alpha_bar)
        if not set_alpha_to_one:
            alpha_bar[0] = alpha_bar[1]
        self._alpha_bar = alpha_bar
        if trained_betas is None and beta_schedule not in _STOCK_SCHEDULES:
            self._derived_betas = True  # stock schedulers know this schedule only as numbers
            self.register_to_config(trained_betas=betas.tolist())

        # Attributes that pipelines of diffusers read.
        alphas_cumprod = alpha_bar[1:]
        alphas = alphas_cumprod / np.concatenate([[1.0], alphas_cumprod[:-1]])
        self.alphas_cumprod = torch.tensor(alphas_cumprod, dtype=torch.float32)
        self.alphas = torch.tensor(alphas, dtype=torch.float32)
        self.betas = torch.tensor(1 - alphas, dtype=torch.float32)
        self.final_alpha_cumprod = torch.tensor(alpha_bar[0], dtype=torch.float32)
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.timesteps = self._planned = torch.arange(T - 1, -1, -1)

        self._tau = np.empty(0, dtype=np.int64)
        self._pairs: list[tuple[int, int]] = []
        self._first: dict[int, int] = {}
        self._moving: dict[int, int] = {}
        self._plans: dict[tuple[str, float], list[Step]] = {}
        self._off_plan: dict[tuple[str, float, int], Step] = {}
        self._tables: dict[Any, Tensor] = {}
        self._next = 0
        self._place: int | None = None  # in the plan, of the step that was found last

    def _check_noise(self, variance_type: str, eta: float) -> None:
        """Raise ValueError for a process that does not exist, or not in this class."""
        process.effective_eta(variance_type, None, eta)
        if variance_type in process.ETA_FREE and eta not in (0, 1):
            raise ValueError(f"variance_type={variance_type!r} stands at η = 1: eta={eta!r} has no meaning with it")

    # ---- configuration -----------------------------------------------------------------------------------------

    def register_to_config(self, **kwargs: Any) -> None:
        """Record `kwargs` in the config, and keep it readable for stock schedulers.

        What they have no word for is listed in `_use_default_values`, which diffusers drops when it converts a config,
        and kept under an underscored key, which it carries along. All else is said outright, since defaults
        (`clip_sample`) differ from class to class. In memory `_class_name` names the stock scheduler whose keys these
        are: diffusers looks there which of them another class may drop in silence.
        """
        super().register_to_config(**kwargs)
        own = self._own_settings()
        hidden = [key for key in own if key != "trained_betas"]
        hints = {"_use_default_values": hidden, "_class_name": DDIMScheduler.__name__}
        super().register_to_config(**{OWN: own} | hints)

    def _own_settings(self) -> dict[str, Any]:
        own = {key: self.config[key] for key in _OWN_KEYS}
        if self.config.timestep_spacing not in STOCK_SPACINGS:
            own["timestep_spacing"] = self.config.timestep_spacing
        if self.config.variance_type not in _STOCK_VARIANCES:
            own["variance_type"] = self.config.variance_type
        if self._derived_betas:
            own["trained_betas"] = None
        return own

    @classmethod
    def from_config(cls, config: FrozenDict | dict[str, Any] | None = None, return_unused_kwargs=False, **kwargs):
        """A scheduler from the config of this or any compatible scheduler; `kwargs` override its entries.

        Our own settings survive a stay in a stock scheduler; an entry that was set explicitly there wins. From a
        scheduler that never was ours "fixed_small" and "fixed_large" are not taken over: they belong to its sampler,
        and the deterministic process is the default here. "learned_range" is a property of the network, and is.
        """
        if isinstance(config, dict):
            config = dict(config)
            own = config.pop(OWN, None)
            carried = config.get("variance_type")
            if carried is None or (own is None and carried.startswith("fixed_")):
                config.pop("variance_type", None)
            if own is not None:
                if SOLVER[0] in own and SOLVER[0] not in inspect.signature(cls.__init__).parameters:
                    own = dict(own)
                    if own.get("timestep_spacing") in ("few_steps", "few_steps_noise"):  # for the multistep method
                        del own["timestep_spacing"]
                said = _said(config) - {"trained_betas"}
                sampler = {} if cls._upwards else own.get(SAMPLER, {})
                if any(config.get(key) for key in CONSTRAINTS):
                    sampler = {}  # one was set in between
                known = inspect.signature(cls.__init__).parameters.keys() - said
                kwargs = {k: v for k, v in own.items() if k in known} | sampler | kwargs
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def to_json_string(self) -> str:
        """The config as JSON, in words that stock schedulers read without a warning; ours are under `_ddim_plugin`."""
        live = self._internal_dict
        try:
            hidden = live["_use_default_values"]
            self._internal_dict = FrozenDict({k: v for k, v in live.items() if k not in hidden})
            return super().to_json_string()
        finally:
            self._internal_dict = live

    # ---- planning ----------------------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | Tensor | np.ndarray | None = None,
    ) -> None:
        """Plan the moves over τ: `num_inference_steps` of the spacing, or an explicit list of network times.

        Args:
            num_inference_steps: S, 1 ≤ S ≤ T.
            device: where `self.timesteps` is put.
            timesteps: network times 0..T−1, distinct, descending; instead of `num_inference_steps`.

        Raises:
            ValueError: for a step count or times out of range or order, η too large for a move, or ε prediction on a
                move from ᾱ_t = 0.
        """
        T = self.config.num_train_timesteps
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("set_timesteps takes either num_inference_steps or timesteps=[...], not both or neither")
        if timesteps is not None:
            values = timesteps.tolist() if isinstance(timesteps, Tensor | np.ndarray) else timesteps
            times = tau.explicit(values, T, lowest=0, descending=True)
        else:
            times = self._spaced(num_inference_steps)
        kind = self._kind(None)
        pairs = self._make_pairs(times)
        plan = self._make_plan(pairs, *kind)

        self._tau, self._pairs, self._plans, self._off_plan, self._next = times, pairs, {kind: plan}, {}, 0
        upper = self._called(pairs)
        self._first = {t: i for i, t in reversed(list(enumerate(upper)))}
        self._moving = {t: i for i, (t, s) in enumerate(pairs) if t != s}
        self._tables = {key: value for key, value in self._tables.items() if key[0] == "marginals"}
        self.num_inference_steps = len(times)
        self.timesteps = self._planned = torch.tensor(upper, dtype=torch.int64).sub(1).to(device)

    @property
    def alpha_bar(self) -> np.ndarray:
        """ᾱ_0..ᾱ_T, float64, shape (T + 1,): ᾱ_0 belongs to the data."""
        return self._alpha_bar.copy()

    def move(self, i: int) -> process.Move:
        """The i-th move of the plan, in the order of `timesteps`, without noise."""
        return process.move(self._alpha_bar, *self._pairs[i])

    def check_eta(self, eta: float | None) -> None:
        """Raise ValueError where a step of the current plan could not be made at this η (None: the scheduler's)."""
        self._plan(self._kind(eta))

    def _spaced(self, S: int | None, spacing: str | None = None) -> tau.Times:
        """τ of S steps by this spacing, or by the scheduler's."""
        config = self.config
        spacing = spacing or config.timestep_spacing
        return tau.tau(spacing, S, config.num_train_timesteps, config.steps_offset, self._alpha_bar)

    def _make_pairs(self, times: tau.Times) -> list[tuple[int, int]]:
        """(t, s) of each move, in the order they are made."""
        return process.downwards(times)[:: -1 if self._upwards else 1]

    def _called(self, pairs: list[tuple[int, int]]) -> list[int]:
        """The time at which the network is called, for each move."""
        return [t for t, _ in pairs]

    def _make_plan(self, pairs: list[tuple[int, int]], kind: str, eta: float) -> list[Step]:
        return [self._make_step(t, s, kind, eta) for t, s in pairs]

    def _make_step(self, t: int, s: int, kind: str, eta: float) -> Step:
        move = process.move(self._alpha_bar, t, s, eta, kind, self._eps_mean_square)
        return _step(move, self.config.prediction_type)

    def _kind(self, eta: float | None) -> tuple[str, float]:
        return process.effective_eta(self.config.variance_type, eta, self.config.eta)

    def _plan(self, kind: tuple[str, float]) -> list[Step]:
        if kind not in self._plans:
            self._plans[kind] = self._make_plan(self._pairs, *kind)
        return self._plans[kind]

    def _step_at(self, timestep: int, kind: tuple[str, float]) -> Step:
        """The step between any network time and the nearest time of the plan below it."""
        T = self.config.num_train_timesteps
        if not 0 <= timestep < T:
            raise ValueError(f"timestep {timestep} is outside 0..{T - 1}")
        t = timestep + 1
        if t in self._moving:
            return self._plan(kind)[self._moving[t]]
        key = (*kind, t)
        if key not in self._off_plan:
            below = int(np.searchsorted(self._tau, t))
            s = int(self._tau[below - 1]) if below else 0
            self._off_plan[key] = self._make_step(t, s, *kind)
        return self._off_plan[key]

    def _next_step_at(self, timestep: int, kind: tuple[str, float]) -> Step:
        """`_step_at`, but of a time that the plan repeats, each call takes the next: all but one stay in place."""
        i = self._next
        if i >= len(self._pairs) or self._pairs[i][0] != timestep + 1:  # not the next one: go to the first of its kind
            if timestep + 1 not in self._first:
                return self._step_at(timestep, kind)
            i = self._first[timestep + 1]
        return self._take(i, kind)

    def _take(self, i: int, kind: tuple[str, float]) -> Step:
        self._place, self._next = i, i + 1
        return self._plan(kind)[i]

    def _find(self, timestep: int | Tensor, kind: tuple[str, float], sample: Tensor) -> Step:
        """The step for `timestep`: one for all, or one for each sample. Never reads a tensor of a device."""
        self._place = None
        if not isinstance(timestep, Tensor):
            if not tau.is_integer(timestep):
                raise ValueError(f"timestep must be an integer, not {timestep!r}")
            return self._next_step_at(int(timestep), kind)
        if timestep.is_floating_point() or timestep.is_complex() or timestep.dtype == torch.bool:
            raise ValueError(f"timestep must be an integer, not a tensor of {timestep.dtype}")
        if timestep.numel() == 1:
            # An element of our own timesteps is told by its place, not by its value: nothing waits for a device.
            if timestep.untyped_storage().data_ptr() == self._planned.untyped_storage().data_ptr():
                return self._take(timestep.storage_offset(), kind)
            return self._next_step_at(int(timestep), kind)
        if timestep.shape != sample.shape[:1]:
            raise ValueError(
                f"timestep has shape {tuple(timestep.shape)}: give one, or one for each of {sample.shape[0]} samples"
            )
        dtype = torch.promote_types(sample.dtype, torch.float32)
        if timestep.device.type == "cpu":
            steps = [self._step_at(t, kind) for t in timestep.tolist()]
            rows = torch.tensor(steps, dtype=torch.float64).to(dtype).to(sample.device)
        else:
            rows = self._all_steps(kind, dtype, sample.device)[timestep.to(sample.device)]
        return Step(*(column.view(-1, *[1] * (sample.ndim - 1)) for column in rows.unbind(1)))

    def _all_steps(self, kind: tuple[str, float], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The steps from every network time, one in a row, kept on the device; NaN where there is none."""
        key = ("steps", kind, dtype, device)
        if key not in self._tables:
            rows = np.full((self.config.num_train_timesteps, len(Step._fields)), np.nan)
            for timestep in range(len(rows)):
                try:
                    rows[timestep] = self._step_at(timestep, kind)
                except ValueError:
                    continue
            self._tables[key] = torch.tensor(rows).to(dtype).to(device)
        return self._tables[key]

    # ---- stepping ----------------------------------------------------------------------------------------------

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """The network's input: `sample` as it is."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float | None = None,
        use_clipped_model_output: bool | None = None,
        generator: Randomness = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> GeneralizedDDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """One move from `timestep` to the next time of the plan below it (Eq. 12).

        Args:
            model_output: the network's output, (B, C, H, W), or (B, 2C, H, W) with "learned_range".
            timestep: a network time 0..T−1, or an integer tensor (B,) with one for each sample. A time that is not in
                the plan moves to the nearest one below it. Elements of `self.timesteps` are told by their place in
                it, so that no device is ever waited for. Of a time that the plan repeats (the `paper_` spacings), a
                plain integer is the next one in order.
            sample: x_t, (B, C, H, W). Half precision is computed in float32 and cast once at the end.
            eta: η of Eq. 16 for this step; None is the scheduler's process. With "fixed_large" and "learned_range" 0
                (deterministic) and 1 (their own noise) exist.
            use_clipped_model_output: whether ε̂ is recomputed from a clipped x̂0; None is the scheduler's setting.
            generator: source of z: a generator, or one for each sample.
            variance_noise: z itself, (B, C, H, W), instead of a generator.
            return_dict: False returns the tuple (x_s, x̂0).

        Raises:
            ValueError: before `set_timesteps`; for shapes, times, η or generators that do not fit.
        """
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps before step: there is no plan of moves yet")
        output, variance = self._split(model_output, sample)
        _check_noise(sample, generator, variance_noise)
        kind = self._kind(eta)
        step = self._find(timestep, kind, sample)
        evaluation = self._evaluate(
            kind, step, sample, output, variance if kind[0] == "learned_range" else None, use_clipped_model_output
        )
        x = evaluation.mean()
        if kind != ("fixed_small", 0.0) and (isinstance(step.noise, Tensor) or step.noise > 0):
            z = variance_noise
            if z is None:  # drawn in float32 at least
                z = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=x.dtype)
            x = p.accumulate(x, evaluation.std(), z)
        if x.dtype != sample.dtype:
            x = x.to(sample.dtype)
        result = GeneralizedDDIMSchedulerOutput(x, evaluation)
        return result if return_dict else (result.prev_sample, result.pred_original_sample)

    def _split(self, model_output: Tensor, sample: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.config.variance_type != "learned_range":
            if model_output.shape != sample.shape:
                hint = ""
                if model_output.shape[:1] + model_output.shape[2:] == sample.shape[:1] + sample.shape[2:]:
                    hint = "; a network with twice the channels needs variance_type='learned_range'"
                raise ValueError(
                    f"model_output has shape {tuple(model_output.shape)}, the sample {tuple(sample.shape)}: "
                    f"they must agree{hint}"
                )
            return model_output, None
        B, C, *size = sample.shape
        if model_output.shape != (B, 2 * C, *size):
            raise ValueError(
                f"variance_type='learned_range' needs a model_output of shape {(B, 2 * C, *size)} (prediction and "
                f"variance), not {tuple(model_output.shape)}"
            )
        return p.split_variance(model_output, C)

    def _evaluate(
        self,
        kind: tuple[str, float],
        step: Step,
        sample: Tensor,
        output: Tensor,
        variance: Tensor | None,
        recompute_eps: bool | None,
    ) -> _Evaluation:
        """The evaluation under the constraint on x̂0 that the live config asks for."""
        config = self.config
        limit = config.clip_sample_range if config.clip_sample and not config.thresholding else None
        thresholding = None
        if config.thresholding:
            thresholding = (config.dynamic_thresholding_ratio, config.sample_max_value)
        if recompute_eps is None:
            recompute_eps = config.use_clipped_model_output
        recompute_eps = recompute_eps and (limit is not None or thresholding is not None)
        return _Evaluation(step, sample, output, variance, limit, thresholding, recompute_eps)

    # ---- marginals ---------------------------------------------------------------------------------------------

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor | int) -> Tensor:
        """x_t = √ᾱ_t·x_0 + √(1 − ᾱ_t)·ε (Eq. 4) at network times `timesteps`, an integer or (B,)."""
        signal, deviation = self._marginals(original_samples, timesteps)
        return p.combine(signal, original_samples, deviation, noise).to(original_samples.dtype)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor | int) -> Tensor:
        """v = √ᾱ_t·ε − √(1 − ᾱ_t)·x_0 at network times `timesteps`, an integer or (B,); `sample` is x_0."""
        signal, deviation = self._marginals(sample, timesteps)
        return p.combine(-deviation, sample, signal, noise).to(sample.dtype)

    def _marginals(self, like: Tensor, timesteps: Tensor | int) -> tuple[Tensor, Tensor]:
        """(√ᾱ_t, √(1 − ᾱ_t)) for each sample, broadcasting over `like`."""
        if not like.is_floating_point():
            raise ValueError(f"samples must be floating point, not {like.dtype}")
        times = timesteps if isinstance(timesteps, Tensor) else torch.as_tensor(timesteps)
        if times.is_floating_point() or times.is_complex() or times.dtype == torch.bool:
            raise ValueError(f"timesteps must be integers, not {times.dtype}")
        times = times.flatten()
        if len(times) not in (1, like.shape[0]):
            raise ValueError(f"{len(times)} timesteps for {like.shape[0]} samples: give one, or one for each")
        T = self.config.num_train_timesteps
        if times.device.type == "cpu" and not 0 <= int(times.min()) <= int(times.max()) < T:
            raise ValueError(f"timesteps must lie in 0..{T - 1}, not {times.tolist()}")
        dtype = torch.promote_types(like.dtype, torch.float32)
        key = ("marginals", dtype, like.device)
        if key not in self._tables:
            table = np.stack([np.sqrt(self._alpha_bar[1:]), np.sqrt(1 - self._alpha_bar[1:])])
            self._tables[key] = torch.tensor(table).to(dtype).to(like.device)
        signal, deviation = self._tables[key][:, times.to(like.device)]
        shape = (-1, *[1] * (like.ndim - 1))
        return signal.view(shape), deviation.view(shape)

    def __len__(self) -> int:
        return self.config.num_train_timesteps


class InverseDDIMScheduler(GeneralizedDDIMScheduler):
    """The deterministic process upwards: encodes an image x_0 into its latent x_T (Sections 4.3 and 5.4).

    The moves are those of `GeneralizedDDIMScheduler` on the same τ, solved for their upper end: `timesteps` ascend, and
    `step(model_output, timestep, sample)` takes x_s to x_t, s < t the next two of 0, τ_1, τ_2, …, `timestep` = t − 1.
    Each is the exact inverse of the sampler's step for the same `model_output`, but where that hardly depends on x_t
    (`ddim_plugin.prediction.unfold`). Since x_t is not known before, the network is called with x_s in its place, in
    the loop of any sampler. `GeneralizedDDIMPipeline.encode` can go on from there to the x_t that solves the move.

    `from_config` takes the config of any sampler, and a sampler's takes this one's. Noise is refused: with η > 0, x_t
    is no function of x_s. Clipping and thresholding have no inverse: where a sampler's config has them they are
    switched off here (and on again on the way back), unless they are asked for, as in `from_config(config,
    clip_sample=True)`. The output's `prev_sample` is x_t.

    Args and errors are those of `GeneralizedDDIMScheduler`.
    """

    _upwards = True
    _set_aside: tuple[str, ...] = ()  # the sampler's constraints that are switched off

    def _check_noise(self, variance_type: str, eta: float) -> None:
        super()._check_noise(variance_type, eta)
        if process.adds_noise(variance_type, eta):
            raise ValueError(
                f"encoding needs the deterministic process: with noise (eta={eta:g}, variance_type={variance_type!r}) "
                "many x_t lead to one x_s, and no latent is determined. Pass eta=0.0, variance_type='fixed_small'"
            )

    def _own_settings(self) -> dict[str, Any]:
        return super()._own_settings() | {SAMPLER: dict.fromkeys(self._set_aside, True)}

    @classmethod
    def from_config(cls, config: FrozenDict | dict[str, Any] | None = None, return_unused_kwargs=False, **kwargs):
        """An inverse scheduler from the config of a sampler, or of this class; `kwargs` override its entries.

        A sampler's clipping, thresholding and `use_clipped_model_output` are switched off unless `kwargs` set them.
        """
        aside: tuple[str, ...] = ()
        if isinstance(config, dict):
            own = config.get(OWN) or {}
            aside = tuple(key for key in own.get(SAMPLER, ()) if key not in kwargs)
            if SAMPLER not in own:
                aside = tuple(key for key in CONSTRAINTS if config.get(key, own.get(key)) and key not in kwargs)
                kwargs = dict.fromkeys(aside, False) | kwargs
        made = super().from_config(config, return_unused_kwargs, **kwargs)
        scheduler = made[0] if return_unused_kwargs else made
        scheduler._set_aside = aside
        scheduler.register_to_config()
        return made

    def _kind(self, eta: float | None) -> tuple[str, float]:
        if process.effective_eta("fixed_small", eta, 0.0)[1] > 0:
            raise ValueError(f"encoding is deterministic: eta={eta:g} would make x_t no function of x_s; leave it out")
        return "fixed_small", 0.0

    def _make_step(self, t: int, s: int, kind: str, eta: float) -> Step:
        return _inverse_step(process.move(self._alpha_bar, t, s), self.config.prediction_type)

    def _evaluate(self, *args: Any) -> _Evaluation:
        evaluation = super()._evaluate(*args)
        if evaluation.recompute_eps:
            raise ValueError("use_clipped_model_output takes ε̂ from x_t, which an inverse move is only looking for")
        return evaluation


class MultistepDDIMScheduler(GeneralizedDDIMScheduler):
    """The ODE of Eq. 14 by a multistep method: what DDIM needs many steps for in a few, on the same weights.

    A move is a step of DDIM with the mean of g over the move in place of its last value. g is ε̂ or x̂0, taken as the
    polynomial through its last `solver_order` values in a coordinate u(ς), ς = √(1/ᾱ − 1), and its mean is exact on any
    grid (`ddim_plugin.ode`). The first moves have fewer values; order 1 is `GeneralizedDDIMScheduler`. A step at a time
    that does not follow the one before, or of another shape, begins anew, as does one with times for each sample. The
    values are kept in the scheduler: two loops that take turns need one each. With η > 0 the mean of the stochastic
    move is made in the same way, of x̂0 in the SDE that adds η² times the noise (variance) of DDPM.

    The first sample is x_T, also where τ ends below T, as it should for few steps: the network sees x_T at τ_S, where
    it tells nearly the same x̂0, and the first move of the deterministic process is made from T with it. Elsewhere than
    at the beginning of the plan a sample is what its time says.

    `from_config` takes the config of any sampler, but not its τ, noise and clipping: what stands there was chosen for
    another.

    Args:
        solver_order: values that a move is made from, 1 to 4. None is 3 for the deterministic process, 2 with noise.
        solver_quantity: what is held as a polynomial, "epsilon" or "sample" (x̂0, after clipping and thresholding),
            whatever the network predicts. None is ε̂ for the deterministic process, and x̂0 with noise, since there ε̂
            changes with every draw.
        solver_coordinate: u: "nsr" (ς), "log_snr", "angle" (arctan ς) or "bounded" (ς/(1 + ς)). None is "bounded" for ε̂
            and "log_snr" for x̂0.
        solver_corrector: None; "pec": each new value also corrects the move that led to it, at no cost in evaluations
            (as in UniPC); or "pece": the network is then called again at the corrected sample, so that S steps take
            2S − 1 evaluations. With `solver_order=1` that is Heun's method. "pec" helps order 2 on some models and not
            on others; with order 3 of ε̂ it can be unstable at few steps.
        solver_extrapolation: how far a move goes from the last value of g towards the mean of the polynomial; 1 is all
            the way. None is 1, but 1.5 with noise that τ was planned for (η ≥ 0.5): the mean of x̂0 lacks the variance
            that x_0 has given x_t, and going further makes up for some of it. A corrector takes it back.
        lower_order_final: whether the last move, to the data, is of order 1 (that of x̂0 to ᾱ = 1 always is). An ε̂
            extrapolated there leaves what it is wrong by in the picture, but keeps detail that x̂0 lacks.
        start_from_top: whether the first sample is x_T; False takes it as x at τ_S, as other schedulers, order 1,
            "pece" and the process with noise do.
        fitted_timesteps: τ for some numbers of steps, {"S": network times, descending}, as `ddim_plugin.fit_timesteps`
            finds them for a model in the deterministic process; it takes the place of the spacing "few_steps" there,
            where η < 0.5.
        The others are those of `GeneralizedDDIMScheduler`. With η ≥ 0.5 the spacing "few_steps" is "few_steps_noise";
        with "learned_range" eta=0, the default, is the deterministic process here.

    Raises:
        ValueError: as there, and for settings of the solver that are unknown.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        clip_sample: bool = False,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "few_steps",
        rescale_betas_zero_snr: bool = False,
        eta: float = 0.0,
        variance_type: str = "fixed_small",
        eps_mean_square: list[float] | None = None,
        use_clipped_model_output: bool = False,
        solver_order: int | None = None,
        solver_quantity: str | None = None,
        solver_coordinate: str | None = None,
        solver_corrector: str | None = None,
        solver_extrapolation: float | None = None,
        lower_order_final: bool = False,
        start_from_top: bool = True,
        fitted_timesteps: dict[str, list[int]] | None = None,
    ):
        if solver_order is not None and not (tau.is_integer(solver_order) and 1 <= solver_order <= 4):
            raise ValueError(f"solver_order must be 1, 2, 3 or 4, or None, not {solver_order!r}")
        ode.check_solver(solver_quantity or "epsilon", solver_coordinate or "bounded")
        if solver_corrector not in (None, *CORRECTORS):
            raise ValueError(f"unknown solver_corrector {solver_corrector!r}: use pec, pece or None")
        reach = solver_extrapolation
        if reach is not None and not (isinstance(reach, Real) and 0 <= reach < float("inf")):
            raise ValueError(f"solver_extrapolation must be a number from 0 on, or None, not {solver_extrapolation!r}")
        super().__init__(
            num_train_timesteps,
            beta_start,
            beta_end,
            beta_schedule,
            trained_betas,
            clip_sample,
            set_alpha_to_one,
            steps_offset,
            prediction_type,
            thresholding,
            dynamic_thresholding_ratio,
            clip_sample_range,
            sample_max_value,
            timestep_spacing,
            rescale_betas_zero_snr,
            eta,
            variance_type,
            eps_mean_square,
            use_clipped_model_output,
        )
        self._fitted = _fitted(fitted_timesteps, num_train_timesteps)
        if fitted_timesteps is not None:  # as they are read from a file
            kept = {str(S): (times[::-1] - 1).tolist() for S, times in self._fitted.items()}
            self.register_to_config(fitted_timesteps=kept)
        self._kept = (solver_order or 3) - 1 + (solver_corrector is not None)  # values, beside the newest
        self.order = 2 if solver_corrector == "pece" else 1  # times for each step, to pipelines that count
        self._much_noise = False
        self._forget()

    def _own_settings(self) -> dict[str, Any]:
        return super()._own_settings() | {key: self.config[key] for key in SOLVER if key in self.config}

    @classmethod
    def from_config(cls, config: FrozenDict | dict[str, Any] | None = None, return_unused_kwargs=False, **kwargs):
        """A scheduler from the config of this or any compatible scheduler; `kwargs` override its entries.

        From another class τ, noise and clipping are not taken over, but for "learned_range", which the network asks
        for, and thresholding.
        """
        return super().from_config(cls._adopted(config), return_unused_kwargs, **kwargs)

    @staticmethod
    def _adopted(config: Any) -> Any:
        """The config without what belongs to another sampler; that of this class as it is."""
        if not isinstance(config, dict) or SOLVER[0] in (config.get(OWN) or {}):
            return config
        own = config.get(OWN)
        learned = "learned_range" in (config.get("variance_type"), (own or {}).get("variance_type"))
        dropped = {"timestep_spacing", "steps_offset", "eta", "clip_sample", "use_clipped_model_output", *SOLVER}
        dropped |= set() if learned else {"variance_type"}

        def left(settings: dict[str, Any]) -> dict[str, Any]:
            return {key: value for key, value in settings.items() if key not in dropped}

        config = left(config)
        if own is not None:
            config[OWN] = left(own)
            if SAMPLER in own:
                config[OWN][SAMPLER] = left(own[SAMPLER])
        return config

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | Tensor | np.ndarray | None = None,
        eta: float | None = None,
    ) -> None:
        """Plan the moves over τ; see `GeneralizedDDIMScheduler.set_timesteps`. "pece" takes S steps in 2S − 1 times.

        `eta` is that of the steps to come, where it is not the scheduler's: from 0.5 on "few_steps" is
        "few_steps_noise", `fitted_timesteps` are not used, and a move goes 1.5 times as far. A loop that tells η to
        `step` alone has the times of the deterministic process, which end too near to the data for noise: set η in the
        config there.
        """
        self._much_noise = self._kind(eta)[1] >= MUCH_NOISE
        super().set_timesteps(num_inference_steps, device, timesteps)
        self._forget()

    def _spaced(self, S: int | None, spacing: str | None = None) -> tau.Times:
        if self.config.timestep_spacing == "few_steps":
            if self._much_noise:
                spacing = "few_steps_noise"
            elif tau.is_integer(S) and S in self._fitted:
                return self._fitted[S]
        return super()._spaced(S, spacing)

    def _make_pairs(self, times: tau.Times) -> list[tuple[int, int]]:
        pairs = super()._make_pairs(times)
        if self.config.solver_corrector != "pece":
            return pairs
        return [pairs[0], *(pair for t, s in pairs[1:] for pair in ((t, t), (t, s)))]

    def _make_plan(self, pairs: list[tuple[int, int]], kind: str, eta: float) -> list[Step]:
        plan = super()._make_plan(pairs, kind, eta)
        if self._starts_above(pairs, kind, eta):
            plan[0] = _from_top(plan[0], float(self._alpha_bar[-1]))
        return plan

    def _starts_above(self, pairs: list[tuple[int, int]], kind: str = "fixed_small", eta: float = 0.0) -> bool:
        """Whether the first move is made from T, above the first time, where no noise is added."""
        config = self.config
        allowed = config.start_from_top and config.solver_order != 1 and config.solver_corrector != "pece"
        return allowed and pairs[0][0] < config.num_train_timesteps and not process.adds_noise(kind, eta)

    def _forget(self) -> None:
        self._values: list[Tensor] = []  # of g, the newest first
        self._times: tuple[int, ...] = ()  # that they belong to
        self._last: tuple[str, int] | None = None  # what g is, and the place of the newest in the plan
        self._moved: tuple[str, float] | None = None  # the kind of the move from there
        self._rows: dict[tuple[tuple[str, float], int, tuple[int, ...], bool], tuple[Step, float, list[float]]] = {}

    def _kind(self, eta: float | None) -> tuple[str, float]:
        if eta is None and self.config.variance_type == "learned_range":
            eta = self.config.eta  # the network has a variance; the process is the deterministic one unless asked
        kind = super()._kind(eta)
        noisy = process.adds_noise(*kind)
        if noisy and self.config.solver_quantity == "epsilon" and self._kept:
            raise ValueError(
                f"with noise (eta={kind[1]:g}, variance {kind[0]!r}) ε̂ changes with every draw and is no polynomial: "
                "take solver_quantity='sample', or None"
            )
        return kind

    def _evaluate(self, kind: tuple[str, float], *args: Any) -> _Evaluation:
        evaluation, place = super()._evaluate(kind, *args), self._place
        if place is None or not self._kept:
            return evaluation
        quantity = self.config.solver_quantity or ("sample" if process.adds_noise(*kind) else "epsilon")
        g, t = self._value(evaluation, quantity), self._pairs[place][0]
        follows = self._last == (quantity, place - 1) and self._values[0].shape == g.shape
        again = int(follows and self._times[0] == t)  # in place of the value that was there
        older = slice(again, again + self._kept if follows else 0)
        self._values, self._times = [g, *self._values[older]], (t, *self._times[older])
        corrected = bool(self.config.solver_corrector) and follows and self._moved == kind
        self._last, self._moved = (quantity, place), kind
        values = self._values[1:]
        if place == len(self._pairs) - 1:
            self._values, self._last = [], None  # nothing follows: they can go

        key = kind, place, self._times, corrected
        if key not in self._rows:
            first, *rest = self._row(quantity, *key)
            step = evaluation.step
            x, out = (step.x0_x, step.x0_out) if quantity == "sample" else (step.eps_x, step.eps_out)
            step = step._replace(fold_x=step.fold_x + first * x, fold_out=step.fold_out + first * out)
            self._rows[key] = step, first, rest
        step, first, rest = self._rows[key]
        others = [(weight, value) for weight, value in zip(rest, values, strict=True) if weight]
        if first and not (evaluation.limit is None and evaluation.thresholding is None):
            others.append((first, g))
        return evaluation._replace(step=step, others=others)

    def _value(self, evaluation: _Evaluation, quantity: str) -> Tensor:
        """g at the sample of this evaluation."""
        step = evaluation.step
        if quantity == "sample":
            return evaluation.x0()
        if step.eps_x == 0 and step.eps_out == 1 and not evaluation.recompute_eps:
            return evaluation.output
        return evaluation.eps()

    def _row(
        self, quantity: str, kind: tuple[str, float], place: int, known: tuple[int, ...], corrected: bool
    ) -> list[float]:
        """What the values of g at the times `known`, the newest first, add to the step of DDIM.

        That step is scale·x_t + slope·g: the mean of g stands in place of its last value. Where the move that led to
        x_t is corrected, x_t has changed by its slope times the change of its mean.
        """
        noisy = process.adds_noise(*kind)
        order = self.config.solver_order or (2 if noisy else 3)
        reach = self.config.solver_extrapolation
        reach = (1.5 if noisy and self._much_noise else 1.0) if reach is None else reach
        row = np.zeros(len(known))
        mean = self._mean(quantity, self._pairs[place], known[:order], kind[1], reach)
        if len(mean) > 1:
            slope = self._linear(quantity, kind, place)[1]
            row[: len(mean)] += slope * mean
            row[0] -= slope
        if corrected and self._is_corrected(quantity, kind, place, known):
            before = self._pairs[place - 1]
            factor = self._linear(quantity, kind, place)[0] * self._linear(quantity, kind, place - 1)[1]
            old = self._mean(quantity, before, known[1 : order + 1], kind[1], reach)
            new = self._mean(quantity, before, known[: max(2, order)], kind[1])
            row[: len(new)] += factor * new
            row[1 : len(old) + 1] -= factor * old
        return row.tolist()

    def _is_corrected(self, quantity: str, kind: tuple[str, float], place: int, known: tuple[int, ...]) -> bool:
        """Whether the move before this place is one of the process, and is corrected here."""
        if len(known) == 1 or (place == 1 and self._starts_above(self._pairs, *kind)):
            return False
        t = self._pairs[place - 1][0]
        return t != known[0] and (quantity == "sample" or self._alpha_bar[t] > 0)

    def _linear(self, quantity: str, kind: tuple[str, float], place: int) -> tuple[float, float]:
        """(scale, slope) of a step of the plan as scale·x_t + slope·g."""
        step, alpha_bar = self._plan(kind)[place], self._alpha_bar[self._pairs[place][0]]
        alpha, sigma = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
        if quantity == "sample":
            return float(step.eps / sigma), float(step.x0 - step.eps * alpha / sigma)
        return float(step.x0 / alpha), float(step.eps - step.x0 * sigma / alpha)

    def _mean(
        self, quantity: str, move: tuple[int, int], times: tuple[int, ...], eta: float, reach: float = 1.0
    ) -> ode.Array:
        """Weights of g at these times, or at the first of them, for its mean over a move, gone so far towards it."""
        ends = [float(self._alpha_bar[time]) for time in move]
        known = [float(self._alpha_bar[time]) for time in times]
        to_data = (quantity == "sample" and ends[1] == 1) or (self.config.lower_order_final and move[1] == 0)
        to_noise = quantity == "epsilon" and ends[1] == 0
        if to_data or to_noise or ends[0] == ends[1] or len(set(known)) < len(known):
            known = known[:1]  # x̂0 or ε̂ as it is, a time that is repeated
        coordinate = self.config.solver_coordinate or COORDINATE[quantity]
        if (known[-1] == 0 and coordinate in ("nsr", "log_snr")) or (known[-1] == 1 and coordinate == "log_snr"):
            known = known[:-1]  # the top, or the data, where these are infinite
        if len(known) < 2:
            return np.ones(1)
        weights = reach * _mean_weights(quantity, coordinate, *ends, tuple(known), eta)
        weights[0] += 1 - reach
        return weights


class InverseMultistepDDIMScheduler(InverseDDIMScheduler, MultistepDDIMScheduler):
    """The ODE of Eq. 14 upwards by a multistep method: encodes an image x_0 into x_T in few steps.

    A move from s up to t is made from the last values of g, at s and below, in the loop of any sampler: nothing is
    called twice, and at the same number of evaluations decoding returns nearer to the image than with
    `InverseDDIMScheduler`, which is of order 1. The network is called at the lower end of a move; on the first, from
    the data, at τ_1. Where the sampler starts from the top, the last move goes there.

    `from_config` takes the config of a `MultistepDDIMScheduler`, and the other way round. Args and errors are those of
    that and of `InverseDDIMScheduler`. A corrector is not used.
    """

    def _make_pairs(self, times: tau.Times) -> list[tuple[int, int]]:
        path = [0, *(int(t) for t in times)]
        if len(times) > 1 and self._starts_above([(path[-1], path[-2])]):
            path[-1] = self.config.num_train_timesteps  # a single step ends at τ_1, where the network was called
        return list(pairwise(path))

    def _called(self, pairs: list[tuple[int, int]]) -> list[int]:
        return [t or s for t, s in pairs]

    _make_plan = GeneralizedDDIMScheduler._make_plan  # no move is made from the top

    def _make_step(self, t: int, s: int, kind: str, eta: float) -> Step:
        move, prediction_type = process.move(self._alpha_bar, t, s), self.config.prediction_type
        return _step(move, prediction_type) if t else _step_from_data(move, prediction_type)

    @classmethod
    def from_config(cls, config: FrozenDict | dict[str, Any] | None = None, return_unused_kwargs=False, **kwargs):
        """An inverse scheduler from the config of any sampler, as `MultistepDDIMScheduler` takes it over."""
        return super().from_config(cls._adopted(config), return_unused_kwargs, **kwargs)

    def _step_at(self, timestep: int, kind: tuple[str, float]) -> Step:
        raise ValueError(f"timestep {timestep} is not in the plan, or not the same for all samples: encode along τ")

    def _all_steps(self, kind: tuple[str, float], dtype: torch.dtype, device: torch.device) -> Tensor:
        raise ValueError("a time for each sample is not the same for all samples: encode along τ")

    def _is_corrected(self, *args: Any) -> bool:
        return False


def sampler_class(scheduler: SchedulerMixin) -> type[GeneralizedDDIMScheduler]:
    """The class that samples with the method of a scheduler, whichever way that goes; of others the generalized one."""
    return MultistepDDIMScheduler if isinstance(scheduler, MultistepDDIMScheduler) else GeneralizedDDIMScheduler


def keep_learned(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` to a config without "fixed_small" where it says "learned_range": the network has two halves."""
    if config.get("variance_type") == "learned_range" and changes.get("variance_type") == "fixed_small":
        return {key: value for key, value in changes.items() if key != "variance_type"}
    return changes


def _said(config: dict[str, Any]) -> set[str]:
    """The keys of a config that were set, not left to the default of the class that wrote it.

    In memory diffusers keeps a list of those left; on disk only a value equal to that class's default tells.
    """
    if "_use_default_values" in config:
        return config.keys() - set(config["_use_default_values"])
    writer = getattr(diffusers, str(config.get("_class_name")), None)
    if writer is None:
        return set(config)
    defaults = {name: parameter.default for name, parameter in inspect.signature(writer.__init__).parameters.items()}
    return {key for key, value in config.items() if key not in defaults or defaults[key] != value}


def _fitted(timesteps: dict[str, list[int]] | None, T: int) -> dict[int, tau.Times]:
    """τ by the number of steps, checked."""
    found = {}
    if not isinstance(timesteps or {}, dict):
        raise ValueError(f"fitted_timesteps must be a dictionary of lists by numbers of steps, not {timesteps!r}")
    for S, times in (timesteps or {}).items():
        if not (tau.is_integer(S) or (isinstance(S, str) and S.isdecimal())):
            raise ValueError(f"fitted_timesteps has lists of times by numbers of steps: {S!r} is none")
        found[int(S)] = tau.explicit(times, T, lowest=0, descending=True)
        if len(found[int(S)]) != int(S):
            raise ValueError(f"fitted_timesteps has {len(times)} times for {S} steps: give as many as there are steps")
    return found


def _eps_table(variance_type: str, eps_mean_square: Sequence[float] | None, T: int) -> np.ndarray | None:
    """E‖ε̂‖²/d with one entry for each time 0..T, checked."""
    if eps_mean_square is None:
        if variance_type == "optimal":
            raise ValueError(f"variance_type='optimal' needs eps_mean_square: E‖ε̂‖²/d, one for each of the {T} times")
        return None
    table = np.asarray(eps_mean_square, dtype=np.float64)
    if table.shape != (T,) or not (np.isfinite(table) & (table >= 0)).all():
        raise ValueError(f"eps_mean_square must be {T} finite non-negative numbers, one for each time")
    return np.concatenate([[0.0], table])


def check_generators(generator: Randomness, batch_size: int) -> None:
    """Raise ValueError unless `generator` is one, none, or a list with one for each image."""
    each = generator if isinstance(generator, list) else [generator]
    if generator is not None and not all(isinstance(one, Generator) for one in each):
        raise ValueError(f"generator must be a torch.Generator or a list of them, not {generator!r}")
    if isinstance(generator, list) and len(generator) != batch_size:
        raise ValueError(f"{len(generator)} generators for a batch of {batch_size}: give one, or one for each image")


def _check_noise(sample: Tensor, generator: Randomness, variance_noise: Tensor | None) -> None:
    """Raise ValueError unless z can be drawn, or was given, for this sample."""
    if generator is not None:
        check_generators(generator, sample.shape[0])
        if variance_noise is not None:
            raise ValueError("give either generator or variance_noise, not both")
    if variance_noise is not None and variance_noise.shape != sample.shape:
        raise ValueError(f"variance_noise has shape {tuple(variance_noise.shape)}, the sample {tuple(sample.shape)}")
