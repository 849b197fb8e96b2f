"""The paper written out again, in NumPy and float64, from its equations alone: nothing of the package is used.

α here is the paper's α_t (ᾱ elsewhere), a list with α[0] = 1; τ increases and ends at the sampler's first time.
"""

import math

import numpy as np


def alphas(betas):
    """α_t = ∏ (1 − β_i), α_0 = 1."""
    table = [1.0]
    for beta in betas:
        table.append(table[-1] * (1.0 - float(beta)))
    return table


def linear_betas(T=1000, start=1e-4, end=0.02):
    return [start + (end - start) * i / (T - 1) for i in range(T)]


def sigma(alpha, t, s, eta):
    """Eq. 16."""
    return eta * math.sqrt((1 - alpha[s]) / (1 - alpha[t])) * math.sqrt(1 - alpha[t] / alpha[s])


def sample(network, x, alpha, tau, eta=0.0, larger=False, noises=None, clip=None):
    """x_0 by Eq. 12 along τ, from x_T = `x`. `network(x, t)` is ε at the paper's time t.

    `larger` adds σ̂ z (Appendix D.3) where σ(1) stays in the coefficient of ε. `noises` holds one z for each move.
    """
    times = [0, *tau]
    for i in range(len(tau), 0, -1):
        t, s = times[i], times[i - 1]
        eps = network(x, t)
        x0 = (x - math.sqrt(1 - alpha[t]) * eps) / math.sqrt(alpha[t])
        if clip is not None:
            x0 = np.clip(x0, -clip, clip)
        sig = sigma(alpha, t, s, 1.0 if larger else eta)
        x = math.sqrt(alpha[s]) * x0 + math.sqrt(max(0.0, 1 - alpha[s] - sig**2)) * eps
        deviation = (math.sqrt(1 - alpha[t] / alpha[s]) if s > 0 else 0.0) if larger else sig
        if noises is not None:
            x = x + deviation * noises[len(tau) - i]
    return x


class Gaussian:
    """Data N(mean, variance) for each pixel: its exact ε, and the exact solution of the ODE (Eq. 14)."""

    def __init__(self, mean, variance, alpha):
        self.mean, self.variance, self.alpha = mean, variance, alpha

    def eps(self, x, t):
        a = self.alpha[t]
        return math.sqrt(1 - a) * (x - math.sqrt(a) * self.mean) / (a * self.variance + 1 - a)

    def solution(self, x, t, s):
        """x_s on the ODE's path through x_t: (x − √α·mean)/√(α·variance + 1 − α) is constant along it."""
        a, b = self.alpha[t], self.alpha[s]
        units = (x - math.sqrt(a) * self.mean) / math.sqrt(a * self.variance + 1 - a)
        return math.sqrt(b) * self.mean + units * math.sqrt(b * self.variance + 1 - b)


class Mixture:
    """Data from Σ w_k N(m_k, v_k) in one dimension, and its exact ε."""

    def __init__(self, weights, means, variances, alpha):
        self.parts = list(zip(weights, means, variances, strict=True))
        self.alpha = alpha

    def eps_at(self, x, a):
        """ε at α = a: −√(1 − a) times the score of x_t's density."""
        logs, scores = [], []
        for weight, mean, variance in self.parts:
            v = a * variance + 1 - a
            d = x - math.sqrt(a) * mean
            logs.append(math.log(weight) - 0.5 * math.log(v) - 0.5 * d * d / v)
            scores.append(-d / v)
        logs = np.stack(logs)
        responsibilities = np.exp(logs - logs.max(0))
        responsibilities /= responsibilities.sum(0)
        return -math.sqrt(1 - a) * (responsibilities * np.stack(scores)).sum(0)

    def eps(self, x, t):
        return self.eps_at(x, self.alpha[t])


def outputs(level, x0, eps):
    """What a perfect network of each prediction type gives at (a, b), from the definitions."""
    a, b = level
    return {
        "epsilon": eps,
        "sample": x0,
        "v_prediction": a * eps - b * x0,
        "flow_prediction": eps - x0,
        "score": -eps / b,
    }
