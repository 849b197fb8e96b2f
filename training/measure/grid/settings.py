"""Settings of a grid, and the paper's."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

from pictures import Reading

from ..extractors import INCEPTION
from ..metrics import check_metrics
from ..parts import DTYPES

SAVED = "saved"
"""Stands for the scheduler, variance, spacing or clipping that the model was saved with."""

CLIPS = (SAVED, "always", "never", "fixed_large")

PRESETS: dict[str, dict[str, Any]] = {
    "": {"steps": (10, 20, 50, 100), "variances": ("0", "1"), "spacings": (SAVED,), "clip": SAVED},
    "table1": {
        "steps": (10, 20, 50, 100, 1000),
        "variances": ("0", "0.2", "0.5", "1", "fixed_large"),
        "spacings": ("quadratic",),
        "clip": "fixed_large",
    },
    "table3": {
        "steps": (10, 20, 50, 100),
        "variances": ("0", "1"),
        "spacings": ("linear",),
        "clip": "never",
    },
}
"""The paper's settings: τ is quadratic for CIFAR-10 and linear elsewhere (D.2). With σ̂, x̂0 is clipped."""


@dataclass(frozen=True)
class EvaluateConfig(Reading):
    """Measure a model on a grid of S × variance × τ × scheduler, against a data set, and write tables and plots.

    Start an interrupted run again to continue it. Finished cells are not measured again.
    """

    model: str = field(metadata={"help": "a folder written by save_pretrained, or a Hub id"})
    reference: str = field(metadata={"help": "data set: digits, a folder, a parquet or arrow file, or a Hub id"})
    output: str = field(default="out/evaluate", metadata={"help": "folder for the results"})
    splits: tuple[str, ...] | None = field(
        default=None, metadata={"help": "splits to measure against; by default those of train and test that exist"}
    )
    table1: bool = field(default=False, metadata={"help": "use the settings of Table 1 for those not given"})
    table3: bool = field(default=False, metadata={"help": "use the settings of Table 3 for those not given"})
    steps: tuple[int, ...] | None = field(default=None, metadata={"help": "S: columns of the table; 10 20 50 100"})
    variances: tuple[str, ...] | None = field(
        default=None,
        metadata={
            "help": "rows: η as a number, fixed_large (σ̂), learned_range, optimal or optimal:η, saved; by default 0 1"
        },
    )
    spacings: tuple[str, ...] | None = field(
        default=None, metadata={"help": "spacings of τ: linear, quadratic, …; by default the saved one"}
    )
    guidance: tuple[float, ...] | None = field(
        default=None, metadata={"help": "w of classifier-free guidance, of a model with classes; by default none"}
    )
    schedulers: tuple[str, ...] = field(
        default=("GeneralizedDDIMScheduler",),
        metadata={
            "help": "classes of this package or of diffusers, or saved; NAME:saved is not crossed with variances and "
            "spacings"
        },
    )
    clip: str | None = field(
        default=None,
        metadata={"help": "clipping of x̂0: saved (the model's), never, always, fixed_large (as Ho, for σ̂ only)"},
    )
    images: int = field(default=50_000, metadata={"help": "pictures of each cell, exactly"})
    extractors: tuple[str, ...] = field(
        default=(INCEPTION,),
        metadata={"help": "of torch-fidelity by name, or folders or Hub ids of image classifiers of transformers"},
    )
    metrics: tuple[str, ...] = field(
        default=("fd",),
        metadata={"help": "fd (Fréchet distance; FID), kid, is (inception score), pr (precision, recall), accuracy"},
    )
    kid_subset_size: int = field(default=1000, metadata={"help": "pictures in a subset of KID"})
    classes: int | None = field(
        default=None, metadata={"help": "classes of the model; by default those of its training.json, else all labels"}
    )
    seed: int = field(default=0, metadata={"help": "picture i comes from seed + i"})
    dtype: str = field(default="float32", metadata={"help": "of the network: float32, bfloat16, float16"})
    batch_size: int = field(default=100, metadata={"help": "pictures at a time, on each process"})
    part: int = field(default=1000, metadata={"help": "pictures between saves; processes share whole parts"})
    workers: int = field(default=2, metadata={"help": "threads that read the reference"})
    cache: str | None = field(default=None, metadata={"help": "folder of reference statistics; OUTPUT/references"})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, …; by default Accelerate chooses"})
    estimate: bool = field(default=False, metadata={"help": "estimate the cost, and stop"})
    overwrite: bool = field(default=False, metadata={"help": "replace results.json of other settings; cells are kept"})


FREE = ("batch_size", "part", "workers", "device", "cache", "overwrite", "estimate", "output")
"""Settings that change no number."""


def settle(config: EvaluateConfig) -> EvaluateConfig:
    """Fill in a preset or the defaults. Raises ValueError for settings that cannot work."""
    if config.table1 and config.table3:
        raise ValueError("choose one of --table1 and --table3")
    preset = PRESETS["table1" if config.table1 else "table3" if config.table3 else ""]
    config = replace(config, **{key: value for key, value in preset.items() if getattr(config, key) is None})
    for name in ("images", "batch_size", "part", "kid_subset_size", "workers"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be positive, not {getattr(config, name)}")
    for name in ("steps", "variances", "spacings", "guidance", "schedulers", "extractors", "splits"):
        values = getattr(config, name)
        if values is not None and (not values or len(set(values)) < len(values)):
            raise ValueError(f"{name} must be distinct, and one at least, not {values}")
    if min(config.steps) < 1:
        raise ValueError(f"steps must be positive numbers, not {config.steps}")
    if unusable := [w for w in config.guidance or () if not math.isfinite(w)]:
        raise ValueError(f"guidance must be finite numbers, not {unusable[0]}")
    if config.clip not in CLIPS:
        raise ValueError(f"unknown clip {config.clip!r}: use one of {', '.join(CLIPS)}")
    if config.dtype not in DTYPES:
        raise ValueError(f"unknown dtype {config.dtype!r}: use one of {', '.join(DTYPES)}")
    check_metrics(config.metrics)
    return config
