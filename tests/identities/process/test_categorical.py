"""The theorems of the categorical process, by enumeration of all tokens in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddim_plugin.process import betas, categorical

SIZES = st.integers(2, 4)
NOISIEST = st.sampled_from(["bayes", "independent"])


@st.composite
def levels(draw):
    """A table ᾱ_0 = 1, …, ᾱ_T, which may end at 0."""
    rates = draw(st.lists(st.floats(0.01, 0.9), min_size=4, max_size=8))
    return betas.alpha_bar(np.array([*rates[:-1], draw(st.sampled_from([rates[-1], 1.0]))]))


def kernel(alpha, K):
    """q(x_t|x_0), (K, K), rows x_0."""
    return alpha * np.eye(K) + (1 - alpha) / K


def table(posterior, K):
    """q(x_s|x_t, x_0), (K, K, K), axes x_0, x_t, x_s."""
    x = torch.arange(K).expand(K, K)
    return categorical.reverse(torch.eye(K, dtype=torch.float64)[:, None].expand(K, K, K), x, posterior).numpy()


def by_bayes(alpha_t, alpha_s, K):
    joint = kernel(alpha_s, K)[:, None, :] * kernel(alpha_t / alpha_s, K).T[None]
    return joint / joint.sum(-1, keepdims=True)


@given(levels(), SIZES, st.floats(0, 1))
def test_independent_is_the_family_of_appendix_a(alpha, K, eta):
    t, s = len(alpha) - 1, len(alpha) - 3
    largest = (1 - alpha[s]) / (1 - alpha[t])
    sigma, one = (1 - eta) * largest, np.eye(K)
    rest = (1 - alpha[s]) - (1 - alpha[t]) * sigma
    expected = sigma * one[None] + (alpha[s] - sigma * alpha[t]) * one[:, None] + rest / K
    found = table(categorical.posterior(alpha[t], alpha[s], K, eta, "independent"), K)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert found.min() >= 0


@given(levels(), SIZES)
def test_eta_one_is_the_posterior_of_the_markov_chain(alpha, K):
    for t in range(2, len(alpha)):
        for s in range(t):
            found = table(categorical.posterior(alpha[t], alpha[s], K, 1.0, "bayes"), K)
            np.testing.assert_allclose(found, by_bayes(alpha[t], alpha[s], K), atol=1e-12)


@given(levels(), SIZES, st.data())
def test_the_whole_chain_has_the_marginals(alpha, K, data):
    """The joint of all x_τ, for any τ, and η and family of each step."""
    T = len(alpha) - 1
    tau = sorted(data.draw(st.sets(st.integers(1, T), min_size=2, max_size=4)), reverse=True)
    joint = kernel(alpha[tau[0]], K)  # axes x_0, x_τS, …
    for t, s in zip(tau, [*tau[1:], 0], strict=True):
        q = categorical.posterior(alpha[t], alpha[s], K, data.draw(st.floats(0, 1)), data.draw(NOISIEST))
        step = table(q, K)
        assert step.min() >= -1e-15
        between = (1,) * (joint.ndim - 2)
        joint = joint[..., None] * step.reshape(K, *between, K, K)
    for axis, t in enumerate([*tau, 0], 1):
        others = tuple(each for each in range(1, joint.ndim) if each != axis)
        np.testing.assert_allclose(joint.sum(axis=others), kernel(alpha[t], K), atol=1e-12)


@given(levels(), SIZES)
def test_eta_one_is_the_joint_of_the_markov_chain(alpha, K):
    """Backwards from x_T with the posterior, and forwards from x_0 with the kernel."""
    times = [0, 2, 3, len(alpha) - 1]
    forwards = np.ones((K, 1, 1))
    backwards = kernel(alpha[times[3]], K)[:, None, None, :]
    for t, s in ((times[3], times[2]), (times[2], times[1])):
        step = table(categorical.posterior(alpha[t], alpha[s], K), K).transpose(0, 2, 1)  # x_0, x_s, x_t
        backwards = backwards * (step[:, None] if s == times[2] else step[..., None])
    forwards = kernel(alpha[2], K)[:, :, None, None] * kernel(alpha[3] / alpha[2], K)[None, :, :, None]
    forwards = forwards * kernel(alpha[times[3]] / alpha[3], K)[None, None]
    np.testing.assert_allclose(backwards, forwards, atol=1e-12)


@given(levels(), st.integers(2, 4))
def test_the_posterior_of_bayes_is_in_the_family_for_two_tokens_only(alpha, K):
    t, s = len(alpha) - 2, len(alpha) - 3
    sigma = alpha[t] / alpha[s] * (1 - alpha[s] ** 2) / (1 - alpha[t] ** 2)
    eta = 1 - sigma * (1 - alpha[t]) / (1 - alpha[s])
    bayes = categorical.posterior(alpha[t], alpha[s], K)
    if K == 2:
        member = categorical.posterior(alpha[t], alpha[s], K, eta, "independent")
        np.testing.assert_allclose(table(member, K), table(bayes, K), atol=1e-12)
    else:  # members have third = other
        assert bayes.third / bayes.other == pytest.approx(1 + K * alpha[t] / (1 - alpha[t]))


@given(levels(), SIZES, NOISIEST, st.floats(0, 1), st.integers(0, 99))
def test_a_predicted_distribution_is_summed_exactly(alpha, K, noisiest, eta, seed):
    """The sum over x_0 of K² terms, from O(K) numbers."""
    q = categorical.posterior(alpha[-1], alpha[1], K, eta, noisiest)
    p = torch.rand(K, K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(-1)
    expected = np.einsum("xo,oxs->xs", p.numpy(), table(q, K))
    np.testing.assert_allclose(categorical.reverse(p, torch.arange(K), q).numpy(), expected, atol=1e-12)


def test_drawn_tokens_have_their_probabilities():
    """Over evenly spaced uniform numbers every count is right up to one, and 0 is never drawn."""
    N = 1000
    uniform = (torch.arange(N, dtype=torch.float64) + 0.5) / N
    p = torch.tensor([0.0, 0.123, 0.0, 0.5004, 0.3766, 0.0], dtype=torch.float64)
    counts = torch.bincount(categorical.pick(p.expand(N, 6), uniform), minlength=6) / N
    assert (counts - p).abs().max() <= 1 / N
    assert counts[p == 0].sum() == 0
    ends = torch.tensor([0.0, 1 - 2**-24])
    assert categorical.pick(p.float().expand(2, 6), ends).tolist() == [1, 4]
    for alpha, K in ((0.3, 4), (0.0, 3)):
        x = categorical.noised(torch.full((N,), 2), uniform, torch.tensor(1 - alpha), K)
        expected = torch.from_numpy(kernel(alpha, K)[2])
        assert (torch.bincount(x, minlength=K) / N - expected).abs().max() <= 2 / N


def test_normal_numbers_become_uniform_ones_below_one():
    for dtype in (torch.float16, torch.float32, torch.float64):
        found = categorical.uniforms(torch.tensor([-40.0, 0.0, 40.0], dtype=dtype))
        assert found[0] == 0
        assert found[1] == 0.5
        assert 1 - 1e-6 < found[2] < 1
