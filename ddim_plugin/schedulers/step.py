"""Apply one step of the sampler to x_t and the network's output: few passes over memory, and no read on the host."""

from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor
from torch.distributions import Normal
from torch.utils._pytree import register_pytree_node

from ..process import moves
from ..process.paths import Level

HALF = (torch.float16, torch.bfloat16)  # types that round timesteps
Coefficient = float | Tensor  # a number, or a tensor that broadcasts over (B, C, H, W)
Randomness = Generator | list[Generator] | None  # for the batch, for each image, or the global one


class Step(NamedTuple):
    """Coefficients of one step: numbers, or tensors (B, 1, 1, 1) if each sample has its own timestep.

    x̂0 = x0_x·x_t + x0_out·output, ε̂ = eps_x·x_t + eps_out·output and x_s = x0·x̂0 + eps·ε̂ + noise·z. A learned
    standard deviation lies between exp(log_low/2) and exp(log_high/2), and is multiplied by `noise`.
    """

    x0_x: Coefficient
    x0_out: Coefficient
    eps_x: Coefficient
    eps_out: Coefficient
    x0: Coefficient
    eps: Coefficient
    noise: Coefficient = 0.0
    log_low: Coefficient = 0.0
    log_high: Coefficient = 0.0

    @classmethod
    def down(cls, move: moves.Move, m: moves.Prediction) -> "Step":
        """Build the step x_t → x_s (Eq. 12) for the prediction at t."""
        noise = (move.noise,) if move.log_variance is None else (1.0, *move.log_variance)
        return cls(*m, move.x0, move.eps, *noise)

    @classmethod
    def up(cls, move: moves.Move, m: moves.Prediction) -> "Step":
        """Build the step x_s → x_t: `down` solved for x_t, for a given output."""
        x, out = moves.unfold(m, move)
        return cls(m.x0_x * x, m.x0_x * out + m.x0_out, m.eps_x * x, m.eps_x * out + m.eps_out, *move.start)

    @classmethod
    def from_data(cls, move: moves.Move, called: moves.Prediction) -> "Step":
        """Build the step x_0 → x_s with ε̂ from the network at the upper end. x̂0 follows from x_0 and ε̂."""
        a, b = move.start
        return cls((1 - b * called.eps_x) / a, -b * called.eps_out / a, called.eps_x, called.eps_out, move.x0, move.eps)

    def from_top(self, top: Level) -> "Step":
        """Replace ε̂ by (x_T − a_T·x̂0)/b_T, for a sample x_T evaluated at a lower timestep."""
        a, b = top
        return self._replace(eps_x=(1 - a * self.x0_x) / b, eps_out=-a * self.x0_out / b)

    def eps_of_x0(self) -> tuple[Coefficient, Coefficient]:
        """Return (a, b) with ε̂ = a·x_t + b·x̂0, for a clipped x̂0."""
        b = self.eps_out / self.x0_out
        return self.eps_x - b * self.x0_x, b


class Evaluation(NamedTuple):
    """Apply a step to one output of the network."""

    step: Step
    sample: Tensor
    output: Tensor
    variance: Tensor | None = None  # the network's choice between β̃ and β
    limit: float | None = None  # x̂0 is clipped to [−limit, limit]
    thresholding: tuple[float, float] | None = None  # ratio and largest value of dynamic thresholding
    recompute_eps: bool = False
    history: Sequence[tuple[float, Tensor]] = ()  # weights and earlier values that a multistep method adds

    def pred_original_sample(self) -> Tensor:
        """Predict x̂0, and clip or threshold it."""
        x0 = combine(self.step.x0_x, self.sample, self.step.x0_out, self.output)
        if self.thresholding is not None:
            return threshold(x0, *self.thresholding)
        return x0 if self.limit is None else x0.clamp_(-self.limit, self.limit)

    def pred_epsilon(self) -> Tensor:
        """Predict ε̂, or recompute it from the constrained x̂0."""
        if self.recompute_eps:
            a, b = self.step.eps_of_x0()
            return combine(a, self.sample, b, self.pred_original_sample())
        return combine(self.step.eps_x, self.sample, self.step.eps_out, self.output)

    def mean(self) -> Tensor:
        """Compute the mean of x_s, in two passes over memory without clipping and history."""
        s = self.step
        w, x, out = s.x0, s.eps * s.eps_x, s.eps * s.eps_out  # the mean is w·x̂0 + x·x_t + out·output
        if self.limit is None and self.thresholding is None:
            mean = combine(w * s.x0_x + x, self.sample, w * s.x0_out + out, self.output)
        else:
            if self.recompute_eps:
                a, b = s.eps_of_x0()
                w, x, out = w + s.eps * b, s.eps * a, 0.0
            mean = accumulate(accumulate(self.pred_original_sample().mul_(w), out, self.output), x, self.sample)
        for weight, value in self.history:
            mean = accumulate(mean, weight, value) if weight else mean
        return mean

    def langevin(self, ratio: float) -> "Evaluation":
        """Turn the identity into x_t − 2b·δ²·ε̂ + 2b·δ·z, δ = ratio/rms(ε̂) (Song et al. 2021, Algorithms 4 and 5)."""
        eps, noise = self.pred_epsilon(), self.step.eps  # the norm of z is taken as √d
        change = ratio / eps.flatten(1).square().mean(1).sqrt().clamp_min(0.1).view(-1, *[1] * (eps.ndim - 1))
        return self._replace(step=self.step._replace(eps=noise - 2 * noise * change**2, noise=2 * noise * change))

    def std(self) -> Coefficient:
        """Compute the standard deviation of x_s."""
        if self.variance is None:
            return self.step.noise
        log_variance = learned_log_variance(at_least_float32(self.variance), (self.step.log_low, self.step.log_high))
        return torch.exp(0.5 * log_variance) * self.step.noise


class GeneralizedDDIMSchedulerOutput:
    """Return the result of a step by attribute, key or position, of which there are `length`.

    Tensors have the shape (B, C, H, W) and dtype of the sample. All but `prev_sample` are computed when first read,
    from the step's `sample` and `model_output`. RuntimeError is raised if one of these was changed in place since.

    Attributes:
        prev_sample, pred_original_sample, pred_epsilon: x_s, x̂0 after clipping (Eq. 9), and ε̂ as used in the step.
        mean, std: mean and standard deviation of x_s given x_t (Eq. 12). The latter is a scalar, (B, 1, 1, 1) with a
            timestep for each sample, or (B, C, H, W) for a learned variance.
    """

    _KEYS = ("prev_sample", "pred_original_sample", "mean", "std", "pred_epsilon")

    def __init__(self, prev_sample: Tensor, evaluation: Evaluation, length: int | None = None):
        sample, output, self._versions = evaluation.sample, evaluation.output, None  # numbers of changes in place
        if sample.is_inference() or output.is_inference():
            variance = None if evaluation.variance is None else evaluation.variance.clone()
            evaluation = evaluation._replace(sample=sample.clone(), output=output.clone(), variance=variance)
        else:
            self._versions = sample._version, output._version
        self.prev_sample, self._evaluation, self._length = prev_sample, evaluation, length

    def __getattr__(self, name: str) -> Tensor:
        if name not in self._KEYS:
            raise AttributeError(f"a step has no {name!r}: use one of {', '.join(self._KEYS)}")
        value, like = self._read(name), self.prev_sample
        value = value if isinstance(value, Tensor) else torch.full((), value, dtype=like.dtype, device=like.device)
        return self.__dict__.setdefault(name, value.to(like.dtype))

    def log_prob(self, x: Tensor) -> Tensor:
        """Compute ln p(x_s = `x` | x_t), (B,), float32. Raises ValueError for other shapes and steps without noise."""
        if x.shape != self.prev_sample.shape:
            raise ValueError(f"x has shape {tuple(x.shape)}, the step {tuple(self.prev_sample.shape)}")
        mean, std = self._read("mean"), self._read("std")
        std = torch.as_tensor(std, dtype=mean.dtype, device=mean.device)
        if bool((std == 0).any()):
            raise ValueError("a step without noise has no density: set eta above 0, and leave out the last step")
        return Normal(mean, std, validate_args=False).log_prob(x.to(mean.dtype)).flatten(1).sum(1).float()

    def _read(self, name: str) -> Any:
        sample, output = self._evaluation.sample, self._evaluation.output
        if self._versions is not None and self._versions != (sample._version, output._version):
            raise RuntimeError(f"sample or output changed, so {name} is lost: read it before, or pass clones to step")
        return getattr(self._evaluation, name)()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_versions": None}  # copies have counts of their own

    def to_tuple(self) -> tuple[Tensor, ...]:
        """Compute all values, in the order of the keys."""
        return self[:]

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, slice):
            return tuple(getattr(self, name) for name in self._KEYS[: self._length][key])
        return getattr(self, self._KEYS[: self._length][key] if isinstance(key, int) else key)


register_pytree_node(GeneralizedDDIMSchedulerOutput, lambda result: ([*result], None), lambda each, _: tuple(each))


def combine(a: Coefficient, x: Tensor, b: Coefficient, y: Tensor) -> Tensor:
    """Compute a·x + b·y as one new tensor, in float32 at least: two passes over memory."""
    return accumulate(torch.mul(at_least_float32(x), a), b, y)


def accumulate(x: Tensor, b: Coefficient, y: Tensor) -> Tensor:
    """Add b·y to x in place."""
    if isinstance(b, Tensor):
        return x.addcmul_(b, y.to(x.dtype))
    return x.add_(y, alpha=b) if b else x


def at_least_float32(x: Tensor) -> Tensor:
    """Convert half precision to float32, and return other tensors unchanged."""
    return x if x.dtype == torch.float32 or x.dtype == torch.float64 else x.float()


def learned_log_variance(variance: Tensor, log_variance: tuple[Coefficient, Coefficient]) -> Tensor:
    """Compute v·ln β + (1 − v)·ln β̃, v = (`variance` + 1)/2, from (ln β̃, ln β) (Nichol & Dhariwal 2021, Eq. 15)."""
    return log_variance[0] + (variance + 1) * (0.5 * (log_variance[1] - log_variance[0]))


def threshold(x0: Tensor, ratio: float, max_value: float) -> Tensor:
    """Clip images (B, …) to ±s, the `ratio` quantile of |x̂0| in [1, `max_value`], over s (Saharia et al. 2022)."""
    rows = x0.abs().flatten(1)
    rank = ratio * (rows.shape[1] - 1)  # as torch.quantile, which reads the host
    low, high = int(rank), min(int(rank) + 1, rows.shape[1] - 1)
    below, above = (rows.kthvalue(each + 1, dim=1).values for each in (low, high))
    s = torch.lerp(below, above, rank - low).clamp(1, max_value).view(-1, *[1] * (x0.ndim - 1))
    return torch.clamp(x0, -s, s) / s


def number(timestep: Any, whole: bool) -> float:
    """Convert a number of Python, NumPy or torch. Raises ValueError for half precision, and if it must be `whole`."""
    exact = isinstance(timestep, Tensor) and timestep.numel() == 1 and timestep.dtype not in HALF
    value = timestep.item() if exact else timestep
    if isinstance(value, Real) and not isinstance(value, bool) and (not whole or float(value).is_integer()):
        return int(value) if whole else float(value)
    raise ValueError(f"timestep must be {'an integer' if whole else 'a number, in float32 at least'}, not {timestep!r}")


def numbers(timesteps: Tensor, whole: bool) -> Tensor:
    """Convert timesteps to integers if they must be `whole`, else to float32 at least. Raises ValueError for others."""
    if not whole and timesteps.dtype not in HALF:
        return timesteps.to(torch.promote_types(timesteps.dtype, torch.float32))
    exact = timesteps.dtype not in (*HALF, torch.bool) and not timesteps.is_complex()
    if exact and (timesteps.device.type != "cpu" or bool((timesteps == timesteps.long()).all())):
        return timesteps.long()
    raise ValueError(f"timesteps must be integers, not {timesteps!r}")


def check_generators(generator: Randomness, batch_size: int) -> None:
    """Raise ValueError unless `generator` is None, one generator, or a list of one, or with one for each image."""
    each = generator if isinstance(generator, list) else [generator]
    if generator is not None and not all(isinstance(one, Generator) for one in each):
        raise ValueError(f"generator must be a torch.Generator or a list of them, not {generator!r}")
    if isinstance(generator, list) and len(generator) not in (1, batch_size):
        raise ValueError(f"{len(generator)} generators for a batch of {batch_size}: give one, or one for each image")


def draw(sample: Tensor, generator: Randomness, noise: Tensor | None) -> Tensor:
    """Draw z for a sample, or return the `noise` given. Raises ValueError if that does not fit, or both are given."""
    if noise is None:
        check_generators(generator, sample.shape[0])
        return randn_tensor(sample.shape, generator, sample.device, torch.promote_types(sample.dtype, torch.float32))
    if generator is not None:
        raise ValueError("give either generator or variance_noise, not both")
    if noise.shape != sample.shape:
        raise ValueError(f"variance_noise has shape {tuple(noise.shape)}, the sample {tuple(sample.shape)}")
    return noise
