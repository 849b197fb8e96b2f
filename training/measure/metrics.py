"""Distances between sets of features: the Fréchet distance, and those that torch-fidelity computes.

Features are float32 (N, D), logits (N, K), from any extractor.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

BLOCK = 1024
"""Rows added to a covariance at a time."""

KID_SUBSETS, INCEPTION_SPLITS, NEIGHBOURS, LIBRARY_SEED = 100, 10, 3, 2020
"""Defaults of torch-fidelity, fixed here because the numbers depend on them."""


class Features(NamedTuple):
    """Features (N, D) of pictures and, from a classifier, logits (N, K); the classes (N,) that were asked for."""

    features: np.ndarray
    logits: np.ndarray | None = None
    labels: np.ndarray | None = None


class Gaussian(NamedTuple):
    """Mean (D,) and covariance (D, D, divided by N − 1) of features, in float64."""

    mean: np.ndarray
    covariance: np.ndarray


class Statistics(NamedTuple):
    """A set of pictures as an extractor sees it. A field is None if no metric needs it."""

    gaussian: Gaussian | None
    features: Features | None


Scores = dict[str, tuple[float, float | None]]
"""Values and their standard deviations, by the names of the metrics."""


# ---- the Fréchet distance ------------------------------------------------------------------------------------------


def gaussian(features: np.ndarray) -> Gaussian:
    """Compute the mean and covariance of features (N, D), as `fit` does."""
    return fit(lambda: (features[i : i + BLOCK] for i in range(0, len(features), BLOCK)))


def fit(blocks: Callable[[], Iterable[np.ndarray]]) -> Gaussian:
    """Compute the mean and then the covariance of blocks of features (n, D), in float64.

    Args:
        blocks: returns the blocks in the same order each time; it is called twice.

    Raises:
        ValueError: if there are no more rows than features, so that the covariance is singular, or if a feature is not
            finite.
    """
    count, total = 0, np.zeros(0)
    for block in blocks():
        if not np.isfinite(block).all():
            raise ValueError("the features hold NaN or infinity: the pictures or the extractor are broken")
        added = block.sum(0, dtype=np.float64)
        count, total = count + len(block), total + added if count else added
    check_count(count, len(total))
    mean = total / count
    scatter = np.zeros((len(mean), len(mean)))
    for block in blocks():
        centred = block.astype(np.float64) - mean
        scatter += centred.T @ centred
    return Gaussian(mean, scatter / (count - 1))


def check_count(count: int, dimension: int, what: str = "pictures") -> None:
    """Raise ValueError if so few pictures cannot span a covariance of this dimension."""
    if count <= dimension:
        raise ValueError(
            f"{count} {what} are too few for a Fréchet distance on {dimension} features: it needs at least "
            f"{dimension + 1}. Take more, an extractor with fewer features, or the metric kid"
        )


def frechet(one: Gaussian, other: Gaussian) -> float:
    """Compute ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½) (Dowson & Landau 1982).

    Σ₁Σ₂ has the eigenvalues of the symmetric Σ₁^½ Σ₂ Σ₁^½, which are real and not negative.
    """
    values, vectors = np.linalg.eigh(one.covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    product = root @ other.covariance @ root
    cross = np.sqrt(np.linalg.eigvalsh((product + product.T) / 2).clip(0)).sum()
    difference = one.mean - other.mean
    return float(difference @ difference + np.trace(one.covariance) + np.trace(other.covariance) - 2 * cross)


# ---- torch-fidelity ------------------------------------------------------------------------------------------------


def library(what: str) -> Any:
    """Import torch_fidelity. Raises ValueError with the remedy if it or its torchvision is missing."""
    try:
        import torch_fidelity
        import torch_fidelity.metric_isc
        import torch_fidelity.metric_kid
        import torch_fidelity.metric_prc
        import torch_fidelity.utils
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
        raise ValueError(
            f"{what} needs torch-fidelity, which cannot be imported ({error}): pip install torch-fidelity torchvision, "
            "or use --metrics fd with an image classifier of transformers in --extractors"
        ) from error
    return torch_fidelity


def kid(samples: Features, reference: Features, subset_size: int) -> Scores:
    """Compute the kernel distance (Bińkowski et al. 2018): its mean over subsets, and their deviation."""
    compute = library("the metric kid").metric_kid.kid_features_to_metric
    settings = {"kid_subsets": KID_SUBSETS, "kid_subset_size": subset_size, "rng_seed": LIBRARY_SEED, "verbose": False}
    found = compute(_tensor(samples.features), _tensor(reference.features), **settings)
    return {"kid": (found["kernel_inception_distance_mean"], found["kernel_inception_distance_std"])}


def inception_score(samples: Features) -> Scores:
    """Compute exp E KL(p(y|x) ‖ p(y)) (Salimans et al. 2016): its mean over splits, and their deviation."""
    compute = library("the metric is").metric_isc.isc_features_to_metric
    found = compute(_tensor(samples.logits), splits=INCEPTION_SPLITS, shuffle=True, rng_seed=LIBRARY_SEED)
    return {"is": (found["inception_score_mean"], found["inception_score_std"])}


def precision_recall(samples: Features, reference: Features) -> Scores:
    """Compute the shares of samples near the data, and of data near samples (Kynkäänniemi et al. 2019)."""
    compute = library("the metric pr").metric_prc.prc_features_to_metric
    settings = {"prc_neighborhood": NEIGHBOURS, "save_cpu_ram": True, "verbose": False}
    found = compute(_tensor(samples.features), _tensor(reference.features), **settings)
    return {"precision": (found["precision"], None), "recall": (found["recall"], None)}


def accuracy(samples: Features) -> Scores:
    """Compute the share of pictures to which a classifier gives the class that was asked for."""
    return {"accuracy": (float((samples.logits.argmax(1) == samples.labels).mean()), None)}


def _tensor(array: np.ndarray | None) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


# ---- by name -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metric:
    """A metric, computed from the statistics of samples and reference and the size of KID's subsets.

    `against` is whether it compares with a reference. `whole` is whether torch-fidelity computes it from all features.
    """

    compute: Callable[[Statistics, Statistics, int], Scores]
    against: bool = True
    whole: bool = True


METRICS = {
    "fd": Metric(lambda x, y, size: {"fd": (frechet(x.gaussian, y.gaussian), None)}, whole=False),
    "kid": Metric(lambda x, y, size: kid(x.features, y.features, size)),
    "is": Metric(lambda x, y, size: inception_score(x.features), against=False),
    "pr": Metric(lambda x, y, size: precision_recall(x.features, y.features)),
    "accuracy": Metric(lambda x, y, size: accuracy(x.features), against=False, whole=False),
}
"""Names of metrics: Fréchet distance, kernel distance, inception score, precision and recall, accuracy of classes."""


def check_metrics(metrics: tuple[str, ...]) -> None:
    """Raise ValueError for unknown or repeated metrics, for none, and if their library is missing."""
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or not metrics or len(set(metrics)) < len(metrics):
        wrong = f"unknown metric {unknown[0]!r}" if unknown else f"metrics must be distinct names, not {metrics}"
        raise ValueError(f"{wrong}: use some of {', '.join(METRICS)}")
    for name in metrics:
        if METRICS[name].whole:
            library(f"the metric {name}")
