"""Likelihood in bits per dimension: the variational bound of the sampler's own process, and the ODE's value.

For σ > 0 and any τ the sampler's process has the bound (Section 4.2 and Appendix C.1, for the sampler itself)

    −log p(x_0) ≤ KL(q(x_{τ_S}|x_0) ‖ N(0, I)) + Σ_i E KL(q_σ(x_s|x_t, x_0) ‖ p(x_s|x_t)) − E log p(x_0|x_{τ_1}),

with the pairs (t, s) of τ and a decoder of 256 bins. At σ = 0 it is infinite; there the ODE of Eq. 14 gives the
likelihood itself. Networks here are functions (x_t, t) ↦ output of the paper's time t.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from ddim_plugin.process import moves as process
from ddim_plugin.process import predictions as p
from ddim_plugin.process.gaussian import BIN, BITS, discretized_log_likelihood, kl

DECODERS = ("next", "beta")
"""Variance of p(x_0|x_{τ_1}), where σ(η) is 0: that of the move above (Ho's code), or β = 1 − ᾱ_{τ_1}."""

Network = Callable[[Tensor, Tensor], Tensor]


class Terms(NamedTuple):
    """Bits per dimension of each image: prior (B,), transitions (B, S − 1) from the top down, decoder (B,)."""

    prior: Tensor
    transitions: Tensor
    decoder: Tensor

    @property
    def total(self) -> Tensor:
        """The bound, (B,)."""
        return self.prior + self.transitions.sum(1) + self.decoder


class VariationalBound:
    """The bound of a sampler's process along τ.

    Args:
        alpha_bar: ᾱ, float64 of shape (T + 1,), ᾱ_0 = 1.
        tau: times in 1..T, increasing; all of them by default.
        prediction_type: what the network predicts.
        variance_type: kind of noise, as the scheduler's.
        eta: η of the process; 1 for "fixed_large" and "learned_range".
        eps_mean_square: E‖ε̂‖²/d for t = 0..T, for "optimal".
        clip: x̂0 is clipped to ± this, and ε̂ follows it (Ho's convention: 1). None does not clip.
        decoder: one of `DECODERS`, or a variance for each t = 0..T (`Errors.decoder_variance`). Of one step "next" is
            "beta".
        density: evaluate p(x_0|x_{τ_1}) as a density, for data that are not bytes.

    Raises:
        ValueError: for a process without noise, and for settings that do not fit.
    """

    def __init__(
        self,
        alpha_bar: NDArray[np.float64],
        tau: Sequence[int] | NDArray[np.int64] | None = None,
        prediction_type: str = "epsilon",
        variance_type: str = "fixed_small",
        eta: float = 1.0,
        eps_mean_square: NDArray[np.float64] | None = None,
        clip: float | None = None,
        decoder: str | NDArray[np.float64] = "next",
        density: bool = False,
    ):
        p.check_prediction(prediction_type)
        if alpha_bar[0] != 1:
            raise ValueError("the bound needs ᾱ_0 = 1 (set_alpha_to_one): else the data have no decoder")
        times = np.arange(1, len(alpha_bar)) if tau is None else np.asarray(tau)
        if len(times) == 0 or (np.diff(times, prepend=0) <= 0).any() or times[-1] >= len(alpha_bar):
            raise ValueError(f"tau must be increasing times in 1..{len(alpha_bar) - 1}")
        if isinstance(decoder, str) and decoder not in DECODERS:
            raise ValueError(f"unknown decoder {decoder!r}: use one of {', '.join(DECODERS)}, or variances")
        if clip is not None and not clip > 0:
            raise ValueError(f"clip must be positive, not {clip!r}")
        self.clip, self.density = clip, density
        self.learned = variance_type == "learned_range"
        self.top = float(alpha_bar[times[-1]])
        self.pairs = process.downwards(times)
        rows = [_row(alpha_bar, t, s, prediction_type, variance_type, eta, eps_mean_square) for t, s in self.pairs]
        rows[-1] = _decoder_row(rows, alpha_bar, int(times[0]), decoder, variance_type)
        self._rows = torch.tensor(rows, dtype=torch.float64)

    def __len__(self) -> int:
        """S, the number of terms besides the prior."""
        return len(self.pairs)

    @torch.no_grad()
    def exact(self, network: Network, x0: Tensor, generator: Generator | list[Generator]) -> Terms:
        """Every term once, with fresh noise for each: S evaluations an image.

        Args:
            network: (x_t, t) ↦ output, x_t (B, C, H, W), t (B,) in 1..T.
            x0: images in −1..1, (B, C, H, W); 256 levels, unless `density`.
            generator: of the noise; a list with one for each image makes its terms independent of the batch.
        """
        terms = [self._term(network, x0, torch.full((len(x0),), i), generator) for i in range(len(self))]
        transitions = torch.stack(terms[:-1], 1) if len(self) > 1 else terms[0].new_zeros(len(x0), 0)
        return Terms(self._prior(x0), transitions, terms[-1])

    @torch.no_grad()
    def sampled(self, network: Network, x0: Tensor, generator: Generator | list[Generator], draws: int = 1) -> Tensor:
        """An unbiased estimate of the bound, (B,), from `draws` terms of each image, drawn uniformly."""
        if draws < 1:
            raise ValueError(f"draws must be positive, not {draws}")
        total = torch.zeros(len(x0), dtype=torch.float64)
        for _ in range(draws):
            i = _each(generator, len(x0), lambda size, one: torch.randint(len(self), size, generator=one))
            total += self._term(network, x0, i, generator).cpu()
        return self._prior(x0).cpu() + total * (len(self) / draws)

    def _term(self, network: Network, x0: Tensor, i: Tensor, generator: Generator | list[Generator]) -> Tensor:
        """Bits per dimension of the terms with index i, (B,)."""
        noise = _each(generator, len(x0), lambda size, one: torch.randn(*size, *x0.shape[1:], generator=one)).to(x0)
        t, signal, scale, x0_x, x0_out, c, log_q, low, high = (
            column.view(-1, 1, 1, 1).to(x0) for column in self._rows[i].unbind(1)
        )
        x = signal * x0 + scale * noise
        output = network(x, t.flatten().round().long()).to(x0.dtype)
        log_variance = low
        if self.learned:
            output, variance = p.split_variance(output, x0.shape[1])
            log_variance = p.learned_log_variance(variance, (low, high))
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
        """log p(x_0|x_{τ_1}) of each pixel, in nats."""
        if self.density:
            return -0.5 * (math.log(2 * math.pi) + log_variance + (x0 - guess).square() * torch.exp(-log_variance))
        return discretized_log_likelihood(x0, guess, torch.exp(0.5 * log_variance))

    def _prior(self, x0: Tensor) -> Tensor:
        """KL(q(x_{τ_S}|x_0) ‖ N(0, I)) of each image, in bits per dimension."""
        return prior_nats(self.top, x0.double().square().flatten(1).mean(1)) * BITS


def _row(
    alpha_bar: NDArray[np.float64],
    t: int,
    s: int,
    prediction_type: str,
    variance_type: str,
    eta: float,
    eps_mean_square: NDArray[np.float64] | None,
) -> list[float]:
    """(t, √ᾱ_t, √(1 − ᾱ_t), x̂0's coefficients of x_t and the output, c, ln σ², and ln of the variance or its range)."""
    kind, eta = process.effective_eta(variance_type, eta, eta)
    if eta == 0:
        raise ValueError("the bound of a process without noise (eta = 0) is infinite: use the likelihood of the ODE")
    move = process.move(alpha_bar, t, s, eta, kind, eps_mean_square)  # refuses what does not exist
    a_t, a_s = move.alpha_bar_t, move.alpha_bar_s
    predicted = p.prediction(prediction_type, a_t)
    known = [t, math.sqrt(a_t), math.sqrt(1 - a_t), predicted.x0_x, predicted.x0_out]
    if s == 0:
        return [*known, 1.0, math.nan, math.nan, math.nan]
    log_q = math.log(process.sigma(a_t, a_s, eta) ** 2)
    low, high = move.log_variance or (2 * math.log(move.noise),) * 2
    return [*known, float(process.x0_weight(a_t, a_s, eta)), log_q, low, high]


def _decoder_row(
    rows: list[list[float]],
    alpha_bar: NDArray[np.float64],
    t: int,
    decoder: str | NDArray[np.float64],
    variance_type: str,
) -> list[float]:
    """The last row, with the decoder's variance."""
    high = math.log(1 - float(alpha_bar[t]))
    if not isinstance(decoder, str):
        low = high = math.log(float(decoder[t]))
    elif decoder == "next" and len(rows) > 1:
        low = rows[-2][6]  # of q: both of Ho's kinds begin with β̃_2
        high = high if variance_type == "learned_range" else low
    else:
        low = high
    return [*rows[-1][:5], 1.0, low, low, high]


def _each(
    generator: Generator | list[Generator], count: int, draw: Callable[[tuple[int], Generator], Tensor]
) -> Tensor:
    """`count` draws from one generator, or one from each of a list."""
    if isinstance(generator, list):
        if len(generator) != count:
            raise ValueError(f"{len(generator)} generators for {count} images: give one, or one for each")
        return torch.cat([draw((1,), each) for each in generator])
    return draw((count,), generator)


# ---- from tables: any τ at once ------------------------------------------------------------------------------------


class Errors(NamedTuple):
    """What the bound of any τ follows from, for t = 0..T; entry 0 is never read.

    `x0` is E‖x_0 − x̂0(x_t, t)‖²/d, `eps_mean_square` E‖ε̂‖²/d, both (T + 1,); `decoders` −E log p(x_0|x_t)/d in nats,
    (T + 1, K), with each of the K `variances`, (T + 1, K); `x0_mean_square` is E‖x_0‖²/d of the data.
    """

    x0: NDArray[np.float64]
    eps_mean_square: NDArray[np.float64]
    variances: NDArray[np.float64]
    decoders: NDArray[np.float64]
    x0_mean_square: float

    @property
    def decoder(self) -> NDArray[np.float64]:
        """−E log p(x_0|x_t)/d with the best variance for each t, (T + 1,), in nats."""
        return self.decoders.min(axis=1)

    @property
    def decoder_variance(self) -> NDArray[np.float64]:
        """That variance, (T + 1,)."""
        return np.take_along_axis(self.variances, self.decoders.argmin(axis=1)[:, None], 1)[:, 0]

    def explained(self, alpha_bar: NDArray[np.float64]) -> NDArray[np.float64]:
        """1 − E‖ε − ε̂‖²/d for every time: equal to `eps_mean_square` where ε̂ is the exact conditional mean.

        In its place it gives the variance that minimises the bound of this network on these data.
        """
        explained = np.ones_like(alpha_bar)
        explained[1:] = 1 - alpha_bar[1:] / (1 - alpha_bar[1:]) * self.x0[1:]
        return np.clip(explained, 0.0, 1.0)


@torch.no_grad()
def measure_errors(
    network: Network,
    x0: Tensor,
    alpha_bar: NDArray[np.float64],
    prediction_type: str,
    generator: Generator | list[Generator],
    progress: Callable[[range], Iterable[int]] = iter,
) -> Errors:
    """`Errors` over a batch of images, T evaluations an image; of several batches take the mean.

    `x0` are 8-bit images in −1..1, of the data or the model's own; `progress` may wrap the times, to show them.
    """
    T = len(alpha_bar) - 1
    errors, squares = np.zeros(T + 1), np.ones(T + 1)
    variances = np.geomspace(BIN**2 / 10, np.maximum(1 - alpha_bar, BIN**2), 12, axis=1)
    decoders = np.zeros_like(variances)
    for t in progress(range(1, T + 1)):
        a_t = float(alpha_bar[t])
        predicted = p.prediction(prediction_type, a_t)
        noise = _each(generator, len(x0), lambda size, one: torch.randn(*size, *x0.shape[1:], generator=one)).to(x0)
        x = math.sqrt(a_t) * x0 + math.sqrt(1 - a_t) * noise
        output = network(x, torch.full((len(x0),), t, device=x0.device))[:, : x0.shape[1]].to(x0.dtype)
        guess = predicted.x0_x * x + predicted.x0_out * output
        errors[t] = float((x0 - guess).double().square().mean())
        squares[t] = float((predicted.eps_x * x + predicted.eps_out * output).double().square().mean())
        for k, variance in enumerate(variances[t]):
            deviation = torch.tensor(math.sqrt(variance)).to(x0)
            decoders[t, k] = -float(discretized_log_likelihood(x0, guess, deviation).double().mean())
    return Errors(errors, squares, variances, decoders, float(x0.double().square().mean()))


def transition_nats(
    alpha_bar: NDArray[np.float64],
    t: int | NDArray[np.int64],
    s: int | NDArray[np.int64],
    error: float | NDArray[np.float64],
    variance_type: str = "fixed_small",
    eta: float = 1.0,
    eps_mean_square: NDArray[np.float64] | None = None,
) -> NDArray[np.float64]:
    """E KL(q_σ(x_s|x_t, x_0) ‖ p(x_s|x_t))/d of moves t → s, s > 0, in nats; `error` is E‖x_0 − x̂0(x_t, t)‖²/d.

    The error depends on t alone, so that one table of T errors gives the bound of every τ and every fixed variance. NaN
    where η is too large for a move.
    """
    a_t, a_s = alpha_bar[t], alpha_bar[s]
    q = process.sigma(a_t, a_s, eta) ** 2
    variance = q
    if variance_type == "fixed_large":
        variance = process.beta(a_t, a_s)
    elif variance_type == "optimal":
        if eps_mean_square is None:
            raise ValueError("variance_type='optimal' needs eps_mean_square: E‖ε̂‖²/d for each time")
        variance = process.optimal_variance(a_t, a_s, eta, eps_mean_square[t])
    elif variance_type != "fixed_small":
        raise ValueError(f"the bound of {variance_type!r} follows from no table: use VariationalBound")
    c = process.x0_weight(a_t, a_s, eta)
    return 0.5 * (np.log(variance / q) + (q + c**2 * error) / variance - 1)


def prior_nats(alpha_bar_top: Any, x0_mean_square: Any) -> Any:
    """KL(q(x_t|x_0) ‖ N(0, I))/d in nats, for data with E‖x_0‖²/d = `x0_mean_square`."""
    return 0.5 * (alpha_bar_top * (x0_mean_square - 1) - np.log(1 - alpha_bar_top))


def objective_weights(
    alpha_bar: NDArray[np.float64], tau: Sequence[int], eta: float, deviation: NDArray[np.float64]
) -> NDArray[np.float64]:
    """γ_t for t = 0..T with J_{σ,τ} = Σ_t γ_t·E‖ε − ε̂‖² + C, in nats (Appendix C.1, Theorem 1 with its lost factors).

    On a move t → s of τ, γ_t = c²·(1 − ᾱ_t)/(2σ²·ᾱ_t); at τ_1 and at times that are not in τ, where the objective has
    a density of x_0 with deviation `deviation[t]`, γ_t = (1 − ᾱ_t)/(2·deviation²·ᾱ_t). J multiplies several densities
    of x_0, so it is no bound of the sampler's likelihood: for that there is `VariationalBound`.
    """
    a = np.asarray(alpha_bar)
    gamma = np.zeros_like(a)
    gamma[1:] = (1 - a[1:]) / (2 * np.asarray(deviation)[1:] ** 2 * a[1:])
    for t, s in process.downwards(np.asarray(tau))[:-1]:
        sigma, c = process.sigma(a[t], a[s], eta), process.x0_weight(a[t], a[s], eta)
        if not sigma > 0:
            raise ValueError(f"J is infinite at eta={eta!r}: use a positive η")
        gamma[t] = c**2 * (1 - a[t]) / (2 * sigma**2 * a[t])
    return gamma


# ---- the ODE -------------------------------------------------------------------------------------------------------


class ODELikelihood(NamedTuple):
    """Of each image: bits per dimension (B,), the latent x_T (B, C, H, W), and network evaluations of the batch."""

    bits: Tensor
    latents: Tensor
    evaluations: int


def ode_log_density(
    network: Network,
    x0: Tensor,
    alpha_bar: NDArray[np.float64],
    prediction_type: str = "epsilon",
    generator: Generator | list[Generator] | None = None,
    tolerance: float = 1e-5,
    top: float | None = None,
) -> tuple[Tensor, Tensor, int]:
    """log p(x_0) of the ODE of Eq. 14, (B,), in nats; the latents, and the network evaluations of the batch.

    With the angle θ, ᾱ = cos²θ, the ODE reads dx/dθ = v̂ (x = cos θ·x0 + sin θ·ε), and log p(x_0) = log N(x_θ; 0, I) +
    ∫ tr ∂v̂/∂x dθ up to the top (Song et al. 2021, Eq. 39). SciPy's RK45 chooses the steps for the whole batch.

    Args:
        network: (x_t, t) ↦ output, t (B,) real in 0..T, so that its times between the trained ones are asked for.
        x0: data, (B, C, H, W).
        alpha_bar: ᾱ, (T + 1,); between its entries t is linear in the logarithm of ᾱ/(1 − ᾱ).
        generator: of Hutchinson's probes, ±1, one for each image (a list: independent of the batch); None takes the
            exact trace, which costs an evaluation for each dimension.
        tolerance: of the solver, absolute and relative.
        top: the paper's time to end at; T by default.
    """
    try:
        from scipy.integrate import solve_ivp
    except ImportError as error:
        raise ImportError("the ODE's likelihood needs SciPy's solver: pip install scipy") from error
    angles = np.arccos(np.sqrt(alpha_bar))
    end = float(angles[-1] if top is None else np.interp(top, np.arange(len(angles)), angles))
    B, d = len(x0), x0[0].numel()
    probes = None
    if generator is not None:
        draw = _each(generator, B, lambda size, one: torch.randint(2, (*size, *x0.shape[1:]), generator=one))
        probes = draw.to(x0) * 2 - 1
    evaluations = 0

    def field(theta: float, state: NDArray[np.float64]) -> NDArray[np.float64]:
        nonlocal evaluations
        evaluations += 1
        x = torch.as_tensor(state[: B * d]).to(x0).view_as(x0)
        v, trace = _velocity(network, x, theta, angles, prediction_type, probes)
        return np.concatenate([v.double().cpu().numpy().ravel(), trace.double().cpu().numpy()])

    state = np.concatenate([x0.double().cpu().numpy().ravel(), np.zeros(B)])
    solved = solve_ivp(field, (0.0, end), state, rtol=tolerance, atol=tolerance)
    if not solved.success:
        raise ValueError(f"the ODE could not be solved: {solved.message}")
    last = torch.as_tensor(solved.y[:, -1])
    x, trace = last[: B * d].view(x0.shape), last[B * d :]
    prior = -0.5 * (x.square().flatten(1).sum(1) + d * math.log(2 * math.pi))
    return prior + trace, x.to(x0.dtype), evaluations


def _velocity(
    network: Network, x: Tensor, theta: float, angles: NDArray[np.float64], prediction_type: str, probes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """v̂ at the angle θ, and tr ∂v̂/∂x of each image: exact, or from probes."""
    cos, sin = math.cos(theta), math.sin(theta)
    t = torch.full((len(x),), time_of(theta, angles), dtype=x.dtype, device=x.device)

    with torch.enable_grad():
        x = x.requires_grad_()
        output = network(x, t).to(x.dtype)[:, : x.shape[1]]
        if prediction_type == "v_prediction":
            v = output
        elif prediction_type == "epsilon":
            v = (output - sin * x) / cos
        else:  # x0; at θ = 0 it is the image, and v̂ the noise, of which nothing is known
            v = (cos * x - output) / max(sin, 1e-6)
        if probes is not None:
            (gradient,) = torch.autograd.grad((v * probes).sum(), x)
            trace = (gradient * probes).flatten(1).sum(1)
        else:
            trace = torch.zeros(len(x), dtype=x.dtype, device=x.device)
            flat = v.flatten(1)
            for k in range(flat.shape[1]):
                (gradient,) = torch.autograd.grad(flat[:, k].sum(), x, retain_graph=k + 1 < flat.shape[1])
                trace = trace + gradient.flatten(1)[:, k]
    return v.detach(), trace.detach()


def time_of(theta: float, angles: NDArray[np.float64]) -> float:
    """The paper's time t, real, of an angle θ: linear in ln tan θ between the entries; below the first, from 0 to 1."""
    if theta <= angles[1]:
        return float(theta / angles[1])
    with np.errstate(divide="ignore"):
        logs = np.log(np.tan(angles[1:]))
    return float(np.interp(math.log(math.tan(theta)), logs, np.arange(1, len(angles))))


def ode_bits(
    network: Network,
    images: Tensor,
    alpha_bar: NDArray[np.float64],
    prediction_type: str = "epsilon",
    generator: Generator | list[Generator] | None = None,
    exact_trace: bool = False,
    tolerance: float = 1e-5,
) -> ODELikelihood:
    """Bits per dimension of 8-bit images under the ODE, by uniform dequantization (an upper bound in expectation).

    `images` are bytes, uint8 (B, C, H, W). Each is spread over its bin, x = 2(image + u)/256 − 1, u uniform on [0, 1).
    """
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"the ODE's bits are of images as bytes, uint8 (B, C, H, W), not {images.dtype}")
    if generator is None:
        raise ValueError("pass a generator, or one for each image: for the dequantization and the probes")
    u = _each(generator, len(images), lambda size, one: torch.rand(*size, *images.shape[1:], generator=one))
    x0 = 2 * (images.float() + u.to(images.device)) / 256 - 1
    probes = None if exact_trace else generator
    log_density, latents, evaluations = ode_log_density(network, x0, alpha_bar, prediction_type, probes, tolerance)
    return ODELikelihood(7 - log_density * BITS / images[0].numel(), latents, evaluations)
