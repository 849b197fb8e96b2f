"""Tensor work of a step: few passes over memory, float32 at least, and no read on the host."""

from numbers import Real
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor

HALF = (torch.float16, torch.bfloat16)  # types that round timesteps
Coefficient = float | Tensor  # a number, or a tensor that broadcasts over (B, C, H, W)
Randomness = Generator | list[Generator] | None  # for the batch, for each image, or the global one


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
