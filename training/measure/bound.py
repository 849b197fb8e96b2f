"""The variational bound of a sampler's own process, in bits per dimension, and the τ that minimises it.

For σ > 0 and any τ the process has the bound (Section 4.2 and Appendix C.1, for the sampler itself)

    −log p(x_0) ≤ KL(q(x_{τ_S}|x_0) ‖ N(0, I)) + Σ_i E KL(q_σ(x_s|x_t, x_0) ‖ p(x_s|x_t)) − E log p(x_0|x_{τ_1}),

with the pairs (t, s) of τ and a decoder of 256 bins, on any Gaussian path that ends near N(0, I). At σ = 0 the bound is
infinite: see `likelihood` for the ODE. Networks are functions (x_t, t) ↦ output of the time t = 1..T.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pictures.bits import BITS, discretized_log_likelihood, kl
from torch import Generator, Tensor

from ddim_plugin.process import moves
from ddim_plugin.process.moves import prediction
from ddim_plugin.process.paths import Level, Path
from ddim_plugin.schedulers.step import learned_log_variance

DECODERS = ("next", "beta")
"""Variance of p(x_0|x_{τ_1}), where σ(η) is 0: of the move before (Ho's code; if any), or β = b_{τ_1}²."""

Array = NDArray[np.float64]
Network = Callable[[Tensor, Tensor], Tensor]
Generators = Generator | list[Generator]


class Terms(NamedTuple):
    """Bits per dimension of each image: prior (B,), transitions (B, S − 1) from the highest time, decoder (B,)."""

    prior: Tensor
    transitions: Tensor
    decoder: Tensor

    @property
    def total(self) -> Tensor:
        """Return the bound, (B,)."""
        return self.prior + self.transitions.sum(1) + self.decoder


class VariationalBound:
    """Estimate the bound of a sampler's process along τ.

    Args:
        path: the levels at the times 0..T, with b_0 = 0.
        tau: times in 1..T, increasing; all of them by default.
        prediction_type: what the network predicts.
        variance_type: kind of noise, one of the scheduler's.
        eta: η of the process; 1 for "fixed_large" and "learned_range".
        eps_mean_square: E‖ε̂‖²/d for t = 0..T, for "optimal".
        clip: bound of |x̂0|, to which x̂0 is clipped and ε̂ follows (Ho's convention: 1). None does not clip.
        decoder: one of `DECODERS`, or a variance for each t = 0..T (`Errors.decoder_variance`).
        density: evaluate p(x_0|x_{τ_1}) as a density, for data that are not bytes.

    Raises ValueError if the process has no noise, or settings exclude each other.
    """

    def __init__(
        self,
        path: Path,
        tau: Sequence[int] | NDArray[np.int64] | None = None,
        prediction_type: str = "epsilon",
        variance_type: str = "fixed_small",
        eta: float = 1.0,
        eps_mean_square: Array | None = None,
        clip: float | None = None,
        decoder: str | Array = "next",
        density: bool = False,
    ):
        if (first := path.level(0).noise) != 0:
            raise ValueError(f"the bound requires ᾱ_0 = 1, not {1 - first**2:g}: use set_alpha_to_one")
        if (last := path.level(path.T).noise) > 1 + 1e-9:
            raise ValueError(f"the bound has the prior N(0, I), and this path ends with the noise {last:.4g}")
        times = np.arange(1, path.T + 1) if tau is None else np.asarray(tau)
        if len(times) == 0 or (np.diff(times, prepend=0) <= 0).any() or times[-1] > path.T:
            raise ValueError(f"tau must be increasing times in 1..{path.T}, not {times.tolist()}")
        if isinstance(decoder, str) and decoder not in DECODERS:
            raise ValueError(f"unknown decoder {decoder!r}: use one of {', '.join(DECODERS)}, or variances")
        if clip is not None and not clip > 0:
            raise ValueError(f"clip must be positive, not {clip!r}")
        self.variance_type, self.eta = moves.effective_eta(variance_type, eta, eta)
        if self.eta == 0:
            raise ValueError("the bound of a process without noise (eta = 0) is infinite: use the ODE's likelihood")
        self.clip, self.density, self.learned = clip, density, self.variance_type == "learned_range"
        self.pairs = moves.downwards(times)
        self.top = path.level(int(times[-1]))
        rows = self._moves(path, prediction_type, eps_mean_square)
        rows[-1, 7:] = _decoder(rows, decoder, self.learned)
        self._rows = torch.from_numpy(rows)

    def __len__(self) -> int:
        """Return S, the number of terms besides the prior."""
        return len(self.pairs)

    @torch.no_grad()
    def exact(self, network: Network, x0: Tensor, generator: Generators) -> Terms:
        """Evaluate every term once, each with its own noise: S evaluations an image.

        Args:
            x0: images in −1..1, (B, C, H, W); 256 levels, unless `density`.
            generator: of the noise; a list with one for each image makes its terms independent of the batch.
        """
        terms = [self._term(network, x0, torch.full((len(x0),), i), generator) for i in range(len(self))]
        transitions = torch.stack(terms[:-1], 1) if len(self) > 1 else terms[0].new_zeros(len(x0), 0)
        return Terms(self._prior(x0), transitions, terms[-1])

    @torch.no_grad()
    def sampled(self, network: Network, x0: Tensor, generator: Generators, draws: int = 1) -> Tensor:
        """Estimate the bound without bias, (B,), from `draws` uniformly drawn terms of each image."""
        if draws < 1:
            raise ValueError(f"draws must be positive, not {draws}")
        total = torch.zeros(len(x0), dtype=torch.float64)
        for _ in range(draws):
            i = draw(generator, len(x0), lambda size, one: torch.randint(len(self), size, generator=one))
            total += self._term(network, x0, i, generator).cpu()
        return self._prior(x0).cpu() + total * (len(self) / draws)

    def _moves(self, path: Path, prediction_type: str, eps_mean_square: Array | None) -> Array:
        """Return a row for each move, (S, 9), without the variances of the move to the data.

        It holds t, a_t, b_t, x̂0's coefficients of (x_t, output), c, ln σ², and the sampler's range of ln σ².
        """
        t, s = np.array(self.pairs).T
        rows = np.full((len(t), 9), np.nan)
        for row, (one, other) in zip(rows, self.pairs, strict=True):
            level = path.level(one)
            if self.eta > (largest := moves.max_eta(level, path.level(other))) * (1 + 1e-12):
                raise ValueError(f"eta={self.eta:g} is too large for the move {one, other}: use at most {largest:.6g}")
            row[:5] = one, *level, *prediction(prediction_type, level)[:2]
        rows[-1, 5] = 1.0
        start, end = at(path, t[:-1]), at(path, s[:-1])
        rows[:-1, 5] = moves.x0_weight(start, end, self.eta)
        rows[:-1, 6] = np.log(moves.sigma(start, end, self.eta) ** 2)
        if self.learned:
            variances = moves.beta_tilde(start, end), moves.beta(start, end)
        else:
            variances = (_variance(start, end, t[:-1], self.variance_type, self.eta, eps_mean_square),) * 2
        rows[:-1, 7:] = np.log(np.stack(variances, 1))
        return rows

    def _term(self, network: Network, x0: Tensor, i: Tensor, generator: Generators) -> Tensor:
        """Return bits per dimension of the terms with index i, (B,)."""
        noise = draw(generator, len(x0), lambda size, one: torch.randn(*size, *x0.shape[1:], generator=one)).to(x0)
        t, signal, scale, x0_x, x0_out, c, log_q, low, high = self._rows[i].T.reshape(9, -1, 1, 1, 1).to(x0)
        x = signal * x0 + scale * noise
        output = network(x, t.flatten().round().long()).to(x0.dtype)
        log_variance = low
        if self.learned:
            output, variance = output.chunk(2, dim=1)
            log_variance = learned_log_variance(variance, (low, high))
        guess = x0_x * x + x0_out * output
        if self.clip is not None:
            guess = guess.clamp(-self.clip, self.clip)
        zero = torch.zeros_like(x0)
        nats = kl(c * (x0 - guess), log_q, zero, log_variance + zero)
        last = (i == len(self) - 1).to(x0.device)
        if bool(last.any()):
            nats[last] = -self._decode(x0[last], guess[last], (log_variance + zero)[last])
        return nats.flatten(1).mean(1).double() * BITS

    def _decode(self, x0: Tensor, guess: Tensor, log_variance: Tensor) -> Tensor:
        """Return log p(x_0|x_{τ_1}) of each pixel, in nats."""
        if self.density:
            return -0.5 * (math.log(2 * math.pi) + log_variance + (x0 - guess).square() * torch.exp(-log_variance))
        return discretized_log_likelihood(x0, guess, torch.exp(0.5 * log_variance))

    def _prior(self, x0: Tensor) -> Tensor:
        """Return KL(q(x_{τ_S}|x_0) ‖ N(0, I)) of each image, in bits per dimension."""
        return prior_nats(self.top, x0.double().square().flatten(1).mean(1)) * BITS


def at(path: Path, times: Any) -> Level:
    """Return the levels at whole times, as arrays."""
    return Level(np.asarray(path.levels.signal)[times], np.asarray(path.levels.noise)[times])


def _variance(t: Level, s: Level, times: Any, variance_type: str, eta: float, eps_mean_square: Array | None) -> Any:
    """Return the variance of p(x_s|x_t), s > 0, of a kind that the network does not choose."""
    if variance_type == "fixed_small":
        return moves.sigma(t, s, eta) ** 2
    if variance_type == "fixed_large":
        return moves.beta(t, s)
    if variance_type != "optimal":
        raise ValueError(f"the bound of {variance_type!r} follows from no table: use VariationalBound")
    if eps_mean_square is None:
        raise ValueError("variance_type='optimal' needs eps_mean_square: E‖ε̂‖²/d for each time")
    if np.any(np.equal(t.signal, 0)):
        raise ValueError("variance_type='optimal' is undefined at pure noise, a = 0: use times τ below the top")
    return moves.optimal_variance(t, s, eta, eps_mean_square[times])


def _decoder(rows: Array, decoder: str | Array, learned: bool) -> tuple[float, float]:
    """Return the range of ln of the decoder's variance in the last of the rows."""
    beta = 2 * math.log(rows[-1, 2])
    if not isinstance(decoder, str):
        return (math.log(decoder[int(rows[-1, 0])]),) * 2
    if decoder == "beta" or len(rows) == 1:
        return beta, beta
    low = float(rows[-2, 6])  # of q: both of Ho's kinds begin with β̃_2
    return low, beta if learned else low


def draw(generator: Generators, count: int, one: Callable[[tuple[int], Generator], Tensor]) -> Tensor:
    """Draw `count` samples from one generator, or one sample from each of a list."""
    if not isinstance(generator, list):
        return one((count,), generator)
    if len(generator) != count:
        raise ValueError(f"{len(generator)} generators for {count} images: pass one, or one for each image")
    return torch.cat([one((1,), each) for each in generator])


# ---- from tables: the bound of any τ --------------------------------------------------------------------------------


class Errors(NamedTuple):
    """Errors of a network at t = 0..T, from which the bound of any τ follows; entry 0 is never read.

    `x0` is E‖x_0 − x̂0(x_t, t)‖²/d, `eps_mean_square` E‖ε̂‖²/d, both (T + 1,); `decoders` −E log p(x_0|x_t)/d in nats,
    (T + 1, K), with each of the K `variances`, (T + 1, K); `x0_mean_square` is E‖x_0‖²/d of the data.
    """

    x0: Array
    eps_mean_square: Array
    variances: Array
    decoders: Array
    x0_mean_square: float

    @property
    def decoder(self) -> Array:
        """Return −E log p(x_0|x_t)/d with the best variance for each t, (T + 1,), in nats."""
        return self.decoders.min(axis=1)

    @property
    def decoder_variance(self) -> Array:
        """Return the best variance for each t, (T + 1,)."""
        return np.take_along_axis(self.variances, self.decoders.argmin(axis=1)[:, None], 1)[:, 0]

    def explained(self, path: Path) -> Array:
        """Return 1 − E‖ε − ε̂‖²/d for every time, which equals `eps_mean_square` if ε̂ is the conditional mean.

        Used in its place, it gives the variance that minimises the bound of this network on these data.
        """
        return np.append(1.0, np.clip(1 - self.x0[1:] / at(path, slice(1, None)).ratio ** 2, 0.0, 1.0))


def transition_nats(
    path: Path,
    t: Any,
    s: Any,
    error: Any,
    variance_type: str = "fixed_small",
    eta: float = 1.0,
    eps_mean_square: Array | None = None,
) -> Array:
    """Return E KL(q_σ(x_s|x_t, x_0) ‖ p(x_s|x_t))/d of moves t → s, s > 0, in nats.

    `error` is E‖x_0 − x̂0(x_t, t)‖²/d. It depends on t alone, so one table of T errors gives the bound of every τ and
    every fixed variance. The result is NaN if η is too large for a move.
    """
    start, end = at(path, t), at(path, s)
    q, c = moves.sigma(start, end, eta) ** 2, moves.x0_weight(start, end, eta)
    variance = _variance(start, end, t, variance_type, eta, eps_mean_square)
    return 0.5 * (np.log(variance / q) + (q + c**2 * error) / variance - 1)


def prior_nats(top: Level, x0_mean_square: Any) -> Any:
    """Return KL(q(x_t|x_0) ‖ N(0, I))/d in nats at a level, for data with E‖x_0‖²/d = `x0_mean_square`."""
    return 0.5 * (top.signal**2 * x0_mean_square + top.noise**2 - 1) - np.log(top.noise)


def objective_weights(path: Path, tau: Sequence[int], eta: float, deviation: Array) -> Array:
    """Return γ_t for t = 0..T with J_{σ,τ} = Σ_t γ_t·E‖ε − ε̂‖² + C, in nats (Appendix C.1, Theorem 1).

    Factors that Theorem 1 drops are kept. On a move t → s of τ, γ_t = c²·ς_t²/(2σ²) with ς² = 1/ᾱ − 1. At τ_1 and at
    times outside τ the objective has a density of x_0 with deviation `deviation[t]`, and γ_t = ς_t²/(2·deviation²).
    J multiplies several densities of x_0, so it does not bound the sampler's likelihood; `VariationalBound` does.
    """
    ratio, gamma = np.asarray(path.levels.ratio), np.zeros(path.T + 1)
    gamma[1:] = ratio[1:] ** 2 / (2 * np.asarray(deviation)[1:] ** 2)
    for t, s in moves.downwards(np.asarray(tau))[:-1]:
        sigma, c = (each(path.level(t), path.level(s), eta) for each in (moves.sigma, moves.x0_weight))
        if not sigma > 0:
            raise ValueError(f"J is infinite at eta={eta!r}: use a positive η")
        gamma[t] = c**2 * ratio[t] ** 2 / (2 * sigma**2)
    return gamma


class Found(NamedTuple):
    """The best τ, S increasing times in 1..T, and its cost."""

    tau: NDArray[np.int64]
    cost: float


def best_paths(costs: Array, start: Array, largest: int) -> list[Found]:
    """Find the τ of S = 1..`largest` moves with the smallest total cost (Watson et al. 2021).

    costs[t, s] is that of a move from t down to s < t, (T + 1, T + 1), and start[t] of beginning at t, (T + 1,).

    Raises ValueError if no path of that many moves exists.
    """
    T = len(costs) - 1
    if not 1 <= largest <= T:
        raise ValueError(f"a path over {T} times has 1..{T} moves, not {largest}")
    allowed = np.tri(T + 1, k=-1, dtype=bool) & ~np.isnan(costs)
    costs, best = np.where(allowed, costs, np.inf), np.array(start, dtype=np.float64)
    best[0] = np.inf
    origins, found = [], []
    for S in range(1, largest + 1):
        total = best[:, None] + costs
        origins.append(total.argmin(axis=0))
        best = total.min(axis=0)
        if not np.isfinite(best[0]):
            raise ValueError(f"there is no path of {S} moves with finite costs")
        times = [0]
        for origin in reversed(origins):
            times.append(int(origin[times[-1]]))
        found.append(Found(np.array(times[1:], dtype=np.int64), float(best[0])))
    return found


def bound_costs(
    path: Path, errors: Errors, variance_type: str = "fixed_small", eta: float = 1.0
) -> tuple[Array, Array]:
    """Return the costs of all moves, (T + 1, T + 1), and of all starts, (T + 1,), in bits per dimension.

    Their sum over a path is the variational bound of the sampler along it, with the best decoder in `errors`.
    """
    T = path.T
    t, s = np.arange(1, T + 1)[:, None], np.arange(T + 1)[None, :]
    costs = np.full((T + 1, T + 1), np.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        nats = transition_nats(path, t, s, errors.x0[1:, None], variance_type, eta, errors.eps_mean_square)
        costs[1:] = np.where((s < t) & (s > 0), nats, np.inf)
        costs[1:, 0] = errors.decoder[1:]
        start = prior_nats(at(path, slice(None)), errors.x0_mean_square)
    return costs * BITS, start * BITS


def bound_of(tau: NDArray[np.int64], costs: Array, start: Array) -> float:
    """Return the bound along τ, in bits per dimension, from `bound_costs`."""
    pairs = moves.downwards(np.asarray(tau))
    return float(start[pairs[0][0]] + sum(costs[t, s] for t, s in pairs))
