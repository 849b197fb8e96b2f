"""The Fréchet distance against closed forms, and against torch-fidelity on the same features."""

import sys

import numpy as np
import pytest
import torch
from measure.metrics import (
    BLOCK,
    Features,
    Gaussian,
    accuracy,
    check_metrics,
    frechet,
    gaussian,
    inception_score,
    kid,
    precision_recall,
)

RNG = np.random.default_rng(0)


def positive(dimension, rng=RNG):
    """A random symmetric positive definite matrix."""
    root = rng.standard_normal((dimension, dimension))
    return root @ root.T / dimension + 0.1 * np.eye(dimension)


def samples(count, dimension, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    return (np.abs(rng.standard_normal((count, dimension))) @ positive(dimension, rng) + seed).astype(dtype)


def test_on_the_line():
    """(μ₁ − μ₂)² + (σ₁ − σ₂)²."""
    one = Gaussian(np.array([1.0]), np.array([[4.0]]))
    other = Gaussian(np.array([-2.0]), np.array([[0.25]]))
    assert frechet(one, other) == pytest.approx(9 + 1.5**2, abs=1e-12)


@pytest.mark.parametrize("dimension", [2, 16, 64, 256])
def test_of_a_gaussian_and_its_image_under_a_map(dimension):
    """A symmetric positive T is the optimal transport from N(μ, Σ) to N(ν, TΣT), whose cost is known."""
    sigma, T = positive(dimension), positive(dimension)
    mean, shifted = RNG.standard_normal((2, dimension))
    difference = T - np.eye(dimension)
    known = ((mean - shifted) ** 2).sum() + np.trace(difference @ sigma @ difference)
    assert frechet(Gaussian(mean, sigma), Gaussian(shifted, T @ sigma @ T)) == pytest.approx(known, rel=1e-6)
    assert frechet(Gaussian(shifted, T @ sigma @ T), Gaussian(mean, sigma)) == pytest.approx(known, rel=1e-6)
    assert frechet(Gaussian(mean, sigma), Gaussian(mean, sigma)) == pytest.approx(0, abs=1e-6)


def test_of_covariances_without_full_rank():
    """Features that are always zero, as those behind a ReLU may be: the plane that is left decides."""
    sigma, T = positive(3), positive(3)
    pad = np.zeros((5, 5))
    one, other = pad.copy(), pad.copy()
    one[:3, :3], other[:3, :3] = sigma, T @ sigma @ T
    difference = T - np.eye(3)
    known = np.trace(difference @ sigma @ difference)
    assert frechet(Gaussian(np.zeros(5), one), Gaussian(np.zeros(5), other)) == pytest.approx(known, abs=1e-6)


def test_of_samples_it_approaches_that_of_their_distributions():
    sigma, T = positive(4), positive(4)
    x = RNG.multivariate_normal(np.zeros(4), sigma, 200_000)
    known = frechet(Gaussian(np.zeros(4), sigma), Gaussian(np.ones(4), T @ sigma @ T))
    assert frechet(gaussian(x), gaussian(x @ T + 1)) == pytest.approx(known, rel=0.02)


@pytest.mark.parametrize("count", [BLOCK - 1, BLOCK, 2 * BLOCK + 5])
def test_mean_and_covariance_far_from_zero(count):
    """float32 features around 10⁴, where sums of squares in float32 would lose every digit of the variance."""
    x = (samples(count, 7) + 1e4).astype(np.float32)
    found = gaussian(x)
    assert found.mean == pytest.approx(x.astype(np.float64).mean(0), rel=1e-12)
    assert found.covariance == pytest.approx(np.cov(x.astype(np.float64), rowvar=False), rel=1e-9)
    assert found.covariance.dtype == found.mean.dtype == np.float64


def test_features_that_fit_no_gaussian():
    with pytest.raises(
        ValueError, match="7 pictures are too few for a Fréchet distance on 7 features: it needs at least 8"
    ):
        gaussian(samples(7, 7))
    gaussian(samples(8, 7))
    broken = samples(9, 3)
    broken[4, 1] = np.nan
    with pytest.raises(ValueError, match="the features hold NaN or infinity"):
        gaussian(broken)


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (("fid",), "unknown metric 'fid': use some of fd, kid, is, pr"),
        ((), "distinct names"),
        (("fd", "fd"), "distinct"),
    ],
)
def test_metrics_that_do_not_exist(metrics, message):
    with pytest.raises(ValueError, match=message):
        check_metrics(metrics)


def test_the_accuracy_of_classes():
    logits = np.array([[3, 1, 2], [0, 5, 1], [1, 2, 0], [0, 0, 9.0]])
    assert accuracy(Features(logits, logits, np.array([0, 1, 0, 2]))) == {"accuracy": (0.75, None)}


def test_a_library_that_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(
        ValueError, match="the metric kid needs torch-fidelity, .*pip install torch-fidelity torchvision"
    ):
        check_metrics(("fd", "kid"))
    check_metrics(("fd",))


# ---- torch-fidelity, where it is installed -------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-9), (np.float32, 1e-6)])
def test_it_is_that_of_torch_fidelity(dtype, tolerance):
    fid = pytest.importorskip("torch_fidelity.metric_fid", exc_type=ImportError)
    x, y = samples(900, 64, dtype, 1), samples(700, 64, dtype, 2)
    theirs = [fid.fid_features_to_statistics(torch.from_numpy(each)) for each in (x, y)]
    known = fid.fid_statistics_to_metric(*theirs, verbose=False)["frechet_inception_distance"]
    assert frechet(gaussian(x), gaussian(y)) == pytest.approx(known, rel=tolerance)


def test_what_torch_fidelity_computes_is_asked_for_as_meant():
    """KID of two samples of one distribution is nil, IS of K certain and balanced labels is K."""
    pytest.importorskip("torch_fidelity", exc_type=ImportError)
    x, y = samples(600, 8, np.float32), samples(600, 8, np.float32)[::-1] + 0
    logits = np.eye(4, dtype=np.float32)[np.arange(4000) % 4] * 1e3
    (same, _), (apart, deviation) = (kid(Features(x), Features(each), 100)["kid"] for each in (y, x + 3))
    assert abs(same) < 0.05 * apart
    assert deviation > 0
    assert inception_score(Features(x, logits))["is"][0] == pytest.approx(4, rel=0.01)
    few = x[:100]  # samples that show a part of the data: precise, and incomplete
    found = precision_recall(Features(few), Features(x))
    assert found["precision"][0] == 1
    assert found["recall"][0] < 1
