"""The losses of training: L_γ of Theorem 1, its variational bound, and weights that later papers introduced.

The network sees x_t = a_t·x_0 + b_t·ε, a level of any Gaussian path, at a time t in 1..T. It predicts ε, x0, v, the
velocity, the score or F of EDM. On the paper's path a = √ᾱ and b = √(1 − ᾱ) (Eq. 4). Every loss is a function of the
error of that prediction (and of the learned variance), image by image, in float32.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pictures.bits import BITS, discretized_log_likelihood, kl
from torch import Tensor

from ddim_plugin.process import moves
from ddim_plugin.process.moves import PREDICTIONS, prediction
from ddim_plugin.process.paths import Level, Path, VarianceExploding
from ddim_plugin.process.spacings import check_name
from ddim_plugin.schedulers.step import learned_log_variance

LOSSES = ("simple", "theorem1", "min_snr", "soft_min_snr", "bound", "hybrid", "edm")
"""See `Objective`."""

OF_PROCESS = ("theorem1", "bound", "hybrid")
"""Losses that belong to the process q_σ, and to uniform times."""

TIMES = ("antithetic", "uniform", "importance", "logit_normal", "log_normal")
"""Ways to draw times: in pairs t and T + 1 − t (the authors' code), independently, by their share of the loss, with a
normal logit of t/T (Esser et al. 2024), or with a normal ln σ (Karras et al. 2022)."""

LOG_SIGMA = (-1.2, 1.2)
"""Mean and deviation of that ln σ."""


class Noised(NamedTuple):
    """A batch for training: images x_0, noise ε and x_t, all (B, C, H, W), and times t in 1..T, int64 (B,)."""

    x0: Tensor
    noise: Tensor
    x: Tensor
    t: Tensor


class Objective:
    """Computes the loss of each image of a batch.

    - "simple": mean squared error of the prediction; with ε, L_γ at γ = 1 (Eq. 5). The error of a score is multiplied
      by b_t, so that the loss is E‖b_t·output + ε‖² (Song et al. 2021).
    - "theorem1": ε's squared error times γ_t = c_t²·b_t²/(2σ_t²·a_t²), s = t − 1, σ_t = σ(η),
      c_t = a_s − √(b_s² − σ_t²)·a_t/b_t: the γ for which L_γ equals J_σ up to a constant (Theorem 1), in nats per
      dimension.
    - "min_snr": x̂0's squared error times min(SNR, γ) (Hang et al. 2023), SNR = a_t²/b_t².
    - "soft_min_snr": x̂0's squared error times 1/(1/SNR + 1/γ) (Crowson et al. 2024).
    - "edm": x̂0's squared error times λ(σ) = (σ² + σ_d²)/(σ·σ_d)² (Karras et al. 2022), which is the squared error of F.
    - "bound": an unbiased estimate of the variational bound in bits per dimension: T times one KL, or at t = 1 the
      decoder's −log p(x_0|x_1) over 256 bins, and the prior's KL.
    - "hybrid": "simple" + `bound_weight`·"bound", whose gradient flows into the learned variance alone (Nichol &
      Dhariwal 2021, Eq. 16).

    As in Ho's code the decoder's variance is that of the next move up, β̃_2 (times η²), since β̃_1 = 0; for "fixed_large"
    the process has variance β, and "learned_range" lies between β̃ and β for each pixel.

    Args:
        path: the levels at the times 0..T.
        prediction_type: "epsilon", "sample" (x0), "v_prediction", "flow_prediction", "score" or "edm".
        loss: one of `LOSSES`.
        variance_type: "fixed_small", "fixed_large" or "learned_range"; the network then has 2C channels.
        eta: η of the process that "theorem1", "bound" and "hybrid" refer to.
        snr_gamma: γ of "min_snr" and "soft_min_snr".
        bound_weight: λ of "hybrid".

    Raises:
        ValueError: for unknown names, and for combinations that are undefined or cannot be learned.
    """

    def __init__(
        self,
        path: Path,
        prediction_type: str = "epsilon",
        loss: str = "simple",
        variance_type: str = "fixed_small",
        eta: float = 1.0,
        snr_gamma: float = 5.0,
        bound_weight: float = 1e-3,
        device: torch.device | str | None = None,
    ):
        check_name("prediction_type", prediction_type, PREDICTIONS)
        check_name("loss", loss, LOSSES)
        if not snr_gamma > 0 or not bound_weight > 0:
            raise ValueError(f"snr_gamma and bound_weight must be positive, not {snr_gamma!r} and {bound_weight!r}")
        self.T, self.loss, self.prediction_type, self.range = path.T, loss, prediction_type, path.image_range
        self.sigma_data = path.sigma_data
        if loss == "edm" and self.sigma_data is None:
            raise ValueError('loss "edm" weights by sigma_data: set it in [scheduler], with prediction_type = "edm"')
        self.learned, self.bound_weight = variance_type == "learned_range", bound_weight
        terminal = path.levels.signal[-1] == 0
        if terminal and prediction_type in ("epsilon", "score"):
            name, other = ("ε", "v_prediction") if prediction_type == "epsilon" else ("the score", "flow_prediction")
            raise ValueError(f'{name} does not determine x0 at zero terminal SNR: use prediction_type = "{other}"')
        if terminal and loss in ("min_snr", "soft_min_snr"):
            raise ValueError(
                f"{loss!r} gives time T the weight 0 at zero terminal SNR, as flow matching has: use loss 'simple'"
            )
        if self.learned != (loss == "hybrid") and not (self.learned and loss == "bound"):
            raise ValueError(
                f"loss {loss!r} does not fit variance_type {variance_type!r}: a learned variance needs 'hybrid' "
                "(or 'bound'), and 'hybrid' needs variance_type 'learned_range'"
            )
        with np.errstate(divide="ignore", invalid="ignore"):
            columns = _weights(path, prediction_type, loss, snr_gamma) | _x0_maps(path, prediction_type)
            if loss in OF_PROCESS:
                columns |= _bound_table(path, prediction_type, variance_type, eta)
        if loss in ("bound", "hybrid") and path.levels.noise[-1] > 1 + 1e-9:
            raise ValueError(f"{loss!r} has the prior N(0, 1), and this path ends at b = {path.levels.noise[-1]:.4g}")
        if loss == "theorem1":
            columns["weight"] = columns["mean_error"] ** 2 / (2 * np.exp(columns["log_variance_q"]))
        self._names = {name: i for i, name in enumerate(columns)}
        self._table = torch.tensor(np.stack(list(columns.values()), axis=1), dtype=torch.float32, device=device)
        timesteps = [0.0, *(float(path.timestep(t)) for t in range(1, self.T + 1))]
        self._timesteps = torch.tensor(timesteps, dtype=torch.float32, device=device)

    def timesteps(self, t: Tensor) -> Tensor:
        """Return the timesteps at which the network is evaluated at times `t` in 1..T, float32 (B,)."""
        return self._timesteps[t]

    def seen(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the network's input: x_t, or c_in·x_t with `sigma_data`, (B, C, H, W)."""
        if self.sigma_data is None:
            return x
        return x * (self._at(t, "scale")[0].square() + self.sigma_data**2).rsqrt()

    def noised(self, x0: Tensor, noise: Tensor, t: Tensor) -> Noised:
        """Make x_t from images `x0` and normal `noise`, both (B, C, H, W), at times `t` in 1..T, (B,)."""
        signal, scale = self._at(t, "signal", "scale")
        return Noised(x0, noise, torch.addcmul(scale * noise, signal, x0), t)

    def __call__(self, output: Tensor, batch: Noised) -> Tensor:
        """Return the loss of each image, (B,).

        Args:
            output: the network's output, (B, C, H, W), or (B, 2C, H, W) with a learned variance.
            batch: what the network has seen, from `noised`.
        """
        output = output.float()
        if self.learned:
            output, variance = output.chunk(2, dim=1)
        else:
            variance = None
        error = self._target(batch) - output
        if self.loss == "bound":
            return self._bound(error, variance, batch)
        (weight,) = self._at(batch.t, "weight")
        loss = error.square().flatten(1).mean(1) * weight.flatten()
        if self.loss == "hybrid":
            loss = loss + self.bound_weight * self._bound(error.detach(), variance, batch)
        return loss

    def guess(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Return x̂0 of x_t and the network's output at times `t`, (B, C, H, W), clipped to the range of images."""
        x0_x, x0_out = self._at(t, "x0_x", "x0_out")
        return (x0_x * x + x0_out * output[:, : x.shape[1]].float()).clamp(*self.range)

    def _target(self, batch: Noised) -> Tensor:
        if self.prediction_type == "epsilon":
            return batch.noise
        if self.prediction_type == "sample":
            return batch.x0
        if self.prediction_type == "flow_prediction":
            return batch.noise - batch.x0
        if self.sigma_data is not None:
            x0_x, x0_out = self._at(batch.t, "x0_x", "x0_out")
            return (batch.x0 - x0_x * batch.x) / x0_out
        signal, scale = self._at(batch.t, "signal", "scale")
        if self.prediction_type == "score":
            return -batch.noise / scale
        return signal * batch.noise - scale * batch.x0

    def _bound(self, error: Tensor, variance: Tensor | None, batch: Noised) -> Tensor:
        """Return bits per dimension, (B,), whose expectation over uniform t and ε is the bound."""
        names = ("mean_error", "log_variance_q", "log_variance_low", "log_variance_high")
        mean_error, log_variance_q, low, high = self._at(batch.t, *names)
        log_variance = low if variance is None else learned_log_variance(variance, (low, high))
        difference = mean_error * error  # of the means of q and p; at t = 1 it is x_0 − x̂0
        nats = kl(difference, log_variance_q, torch.zeros_like(difference), log_variance)
        first = (batch.t == 1).view(-1, 1, 1, 1)
        decoded = torch.where(first, batch.x0 - difference, batch.x0)
        likelihood = discretized_log_likelihood(batch.x0, decoded, torch.exp(0.5 * log_variance).expand_as(decoded))
        nats = torch.where(first, -likelihood, nats) * self.T
        signal, scale = self._row(self.T, "signal", "scale")
        prior = kl(signal * batch.x0, 2 * torch.log(scale), torch.zeros_like(batch.x0), torch.zeros_like(scale))
        return (nats + prior).flatten(1).mean(1) * BITS

    def _at(self, t: Tensor, *names: str) -> list[Tensor]:
        """Look up columns of the table at times t, each (B, 1, 1, 1)."""
        rows = self._table[t]
        return [rows[:, self._names[name]].view(-1, 1, 1, 1) for name in names]

    def _row(self, t: int, *names: str) -> list[Tensor]:
        return [self._table[t, self._names[name]] for name in names]


def _weights(path: Path, prediction_type: str, loss: str, gamma: float) -> dict[str, NDArray]:
    """Return a_t, b_t and the weight of the squared error for every t; row 0 is never read."""
    signal, noise = path.levels
    weight = noise**2 if prediction_type == "score" else np.ones_like(noise)
    if loss in ("min_snr", "soft_min_snr", "edm"):
        snr = (signal / noise) ** 2
        of_x0 = np.minimum(snr, gamma) if loss == "min_snr" else 1 / (1 / snr + 1 / gamma)
        if loss == "edm":
            of_x0 = snr + 1 / path.sigma_data**2
        weight = of_x0 * _x0_maps(path, prediction_type)["x0_out"] ** 2
    return {"signal": signal, "scale": noise, "weight": weight}


def _x0_maps(path: Path, prediction_type: str) -> dict[str, NDArray]:
    """Return the coefficients of x̂0 = x0_x·x_t + x0_out·output for every t; row 0 is never read."""
    maps = [prediction(prediction_type, path.level(t), path.sigma_data) for t in range(1, path.T + 1)]
    return {name: np.array([np.nan, *(getattr(each, name) for each in maps)]) for name in ("x0_x", "x0_out")}


def _x0_error(path: Path, prediction_type: str) -> NDArray[np.float64]:
    """Return k with x_0 − x̂0 = k·(target − output), for t = 1..T."""
    return _x0_maps(path, prediction_type)["x0_out"][1:]


def _bound_table(path: Path, prediction_type: str, variance_type: str, eta: float) -> dict[str, NDArray]:
    """Return the factor from the prediction's error to the mean's, and the log variances of q and p, for every t."""
    signal, noise = (np.asarray(each) for each in path.levels)
    if path.T < 2 or noise[0] != 0:
        raise ValueError("the variational bound needs num_train_timesteps of at least 2, and set_alpha_to_one")
    if variance_type not in ("fixed_small", "fixed_large", "learned_range"):
        raise ValueError(f"the bound of variance_type {variance_type!r} cannot be trained: use fixed_small")
    if variance_type != "fixed_small" and eta != 1:
        raise ValueError(f"variance_type {variance_type!r} requires eta = 1, not {eta!r}")
    if not eta > 0:
        raise ValueError(f"the variational bound is infinite at eta={eta!r}: use eta in (0, 1]")
    t, s = Level(signal[1:], noise[1:]), Level(signal[:-1], noise[:-1])
    weight = moves.x0_weight(t, s, eta)
    if np.isnan(weight).any():
        raise ValueError(f"eta={eta!r} is too large: σ² would exceed the variance of the noise at s; 1 always exists")
    small, large = np.asarray(moves.beta_tilde(t, s)) * eta**2, np.asarray(moves.beta(t, s))
    small[0] = small[1]  # σ_1 would be 0; Ho's code takes the next one for both kinds
    if variance_type == "fixed_large":
        large[0] = small[0]
    columns = {
        "mean_error": weight * _x0_error(path, prediction_type),
        "log_variance_q": np.log(small),
        "log_variance_low": np.log(large if variance_type == "fixed_large" else small),
        "log_variance_high": np.log(large),
    }
    return {name: np.concatenate([[np.nan], column]) for name, column in columns.items()}


def draw_times(kind: str, count: int, T: int, rng: np.random.Generator, shift: float = 1.0) -> NDArray[np.int64]:
    """Draw `count` times in 1..T: "uniform", "antithetic" (each t with T + 1 − t, in the two halves), "logit_normal".

    `shift` moves σ = t/T to shift·σ/(1 + (shift − 1)·σ) (Esser et al. 2024, Eq. 23).
    """
    if kind == "logit_normal":
        part = 1 / (1 + np.exp(-rng.standard_normal(count)))
    else:
        if kind == "uniform":
            t = rng.integers(1, T + 1, count)
        else:
            half = rng.integers(1, T + 1, (count + 1) // 2)
            t = np.concatenate([half, T + 1 - half])[:count]
        if shift == 1:
            return t
        part = (t - rng.random(count)) / T  # so that every time can be drawn
    part = shift * part / (1 + (shift - 1) * part)
    return np.minimum((T * part).astype(np.int64), T - 1) + 1


def log_normal_times(count: int, path: VarianceExploding, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw `count` times in 1..T, those nearest to a σ with normal ln σ (Karras et al. 2022, Table 1)."""
    mean, deviation = LOG_SIGMA
    times = np.rint(path.at(np.exp(mean + deviation * rng.standard_normal(count))))
    return times.clip(1, path.T).astype(np.int64)


class ImportanceTimes:
    """Draws times with p_t ∝ √E[L_t²], from the last losses at each time (Nichol & Dhariwal 2021, Section 3.3).

    Until every time has `HISTORY` losses, times are uniform. A share `UNIFORM` stays uniform throughout.
    """

    HISTORY = 10
    UNIFORM = 1e-3

    def __init__(self, T: int):
        self.losses = np.zeros((T, self.HISTORY))
        self.counts = np.zeros(T, dtype=np.int64)

    @property
    def warm(self) -> bool:
        return bool((self.counts >= self.HISTORY).all())

    def probabilities(self) -> NDArray[np.float64]:
        """Return p_t for t = 1..T."""
        T = len(self.counts)
        if not self.warm:
            return np.full(T, 1 / T)
        root = np.sqrt(np.square(self.losses).mean(axis=1))
        return (1 - self.UNIFORM) * root / root.sum() + self.UNIFORM / T

    def draw(self, count: int, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return times in 1..T and weights 1/(T·p_t) that keep the loss unbiased, both (count,)."""
        p = self.probabilities()
        drawn = rng.choice(len(p), count, p=p)
        return drawn + 1, 1 / (len(p) * p[drawn])

    def record(self, t: Tensor, losses: Tensor) -> None:
        """Record the losses, without their weights, of times `t`, both (N,). Reads them on the host."""
        for time, loss in zip(t.tolist(), losses.tolist(), strict=True):
            self.losses[time - 1, self.counts[time - 1] % self.HISTORY] = loss
            self.counts[time - 1] += 1

    def state_dict(self) -> dict[str, Tensor]:
        return {"losses": torch.from_numpy(self.losses), "counts": torch.from_numpy(self.counts)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.losses, self.counts = state["losses"].numpy().copy(), state["counts"].numpy().copy()
