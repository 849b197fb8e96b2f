"""A run over a grid: which cells are finished, what the others will cost, and sampling and measuring them."""

import json
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from guard.reading import read_object
from pictures import Frame, choose_split, open_pictures, split_names
from trainer.settings import record, write_json

from ddim_plugin import GeneralizedDDIMScheduler
from ddim_plugin.schedulers import KEY

from ..extractors import INCEPTION, Extractor, extract, open_extractor
from ..labels import in_turn
from ..metrics import METRICS, Features, Statistics, check_count, gaussian
from ..parts import Arrays, Notes, Parts, digest, join, read_arrays, save_arrays, start_processes
from ..references import Reference, open_reference, statistics
from .cells import Cell, cells, find_scheduler
from .model import Model, Sampling, synchronize
from .settings import FREE, EvaluateConfig

SHOWN = 10
"""Pictures of each cell that are kept for the grids of samples."""


class Run:
    """A model, extractors, references, and a folder with a file for each finished cell."""

    def __init__(self, config: EvaluateConfig):
        self.config, self.output = config, Path(config.output)
        self.cache = Path(config.cache) if config.cache else self.output / "references"
        self.state = start_processes(config.device)
        device = torch.device(config.device) if config.device and self.state.num_processes == 1 else self.state.device
        self.grid = cells(config)
        self.model = Model(config, device)
        self.samplings = {cell: self.model.prepare(cell) for cell in self.grid}
        shape = self.model.shape
        self.extractors = [open_extractor(name, device, shape) for name in config.extractors]
        self.check_extractors()
        self.check_output()
        self.references = self.open_references(Frame(shape[0], shape[1:]))
        self.shared = {
            "model": self.model.fingerprint,
            "images": config.images,
            "seed": config.seed,
            "dtype": config.dtype,
            "classes": self.model.classes,
            "extractors": [each.fingerprint for each in self.extractors],
            "references": [each.contents for each in self.references],
            "metrics": config.metrics,
            "kid_subset_size": config.kid_subset_size if "kid" in config.metrics else None,
        }
        self.keys = {cell: self.key(sampling) for cell, sampling in self.samplings.items()}

    # ---- before any work -----------------------------------------------------------------------------------------

    def check_extractors(self) -> None:
        """Raise ValueError if the metrics cannot be computed with these extractors."""
        if len({each.slug for each in self.extractors}) < len(self.extractors):
            raise ValueError(f"extractors must have distinct last names, not {self.config.extractors}")
        for each in self.extractors:
            if "accuracy" in self.config.metrics and each.classes != self.model.classes:
                kinds = f"{each.classes or 'no'} classes, and the model {self.model.classes or 'none'}"
                raise ValueError(f"the metric accuracy compares classes: {each.name} has {kinds}")
            if "is" in self.config.metrics and each.classes is None:
                raise ValueError(f"the metric is needs a classifier, which {each.name} is not")
            if "fd" in self.config.metrics:
                check_count(self.config.images, each.dimension)

    def check_output(self) -> None:
        """Raise ValueError if the output holds results of other settings."""
        file = self.output / "results.json"
        if self.config.overwrite or self.config.estimate or not file.exists():
            return
        before, now = read_object(file).get("config", {}), json.loads(json.dumps(asdict(self.config)))
        changed = sorted(key for key in now if key not in FREE and before.get(key) != now[key])
        if changed:
            raise ValueError(
                f"{file} holds results of other settings ({', '.join(changed)}): choose another output, or pass "
                "--overwrite; cells measured with the same settings are kept"
            )

    def open_references(self, frame: Frame) -> list[Reference]:
        """Open the splits to measure against. Raises ValueError if one is missing, empty or too small."""
        config = self.config
        name, known = config.reference, config.splits
        if known is None:
            known = split_names(name, config.data_config)
            known = [each for each in ("train", "test") if each in known] or known
        known = [choose_split(name, each, config.data_config) for each in known]
        sets = {each: open_pictures(name, each, **config.reading) for each in known}
        for split, pictures in sets.items():
            if pictures.count == 0:
                raise ValueError(f"the reference {config.reference} has no pictures in its split {split!r}")
            if "kid" in config.metrics and min(pictures.count, config.images) < config.kid_subset_size:
                raise ValueError(
                    f"KID takes subsets of {config.kid_subset_size}, of {config.images} pictures and of the "
                    f"{pictures.count} of the split {split!r}: choose a smaller --kid_subset_size"
                )
            if "fd" in config.metrics:
                for each in self.extractors:
                    what = f"pictures of the split {split!r} of {config.reference}"
                    check_count(pictures.count, each.dimension, what)
        return [
            open_reference(pictures, frame, self.cache, config.reading, config.workers) for pictures in sets.values()
        ]

    def estimate(self) -> dict[str, Any]:
        """Estimate the cost of the cells that are not finished, from a few evaluations of the network."""
        config, todo = self.config, self.todo()
        evaluations = sum(self.evaluations(cell) for cell in todo.values())
        pace = self.model.pace(next(iter(todo.values()))) if todo else 0.0
        batch = torch.zeros((min(config.batch_size, config.images), *self.model.shape), dtype=torch.uint8)
        extract(self.extractors, batch[:2])  # warms up
        start = time.perf_counter()
        extract(self.extractors, batch)
        extraction = (time.perf_counter() - start) / len(batch)
        seconds = evaluations * pace + config.images * len(todo) * extraction
        return {
            "cells": len(self.grid),
            "finished": sum(key not in todo for key in self.keys.values()),
            "evaluations": evaluations,
            "seconds_an_evaluation": pace,
            "seconds_an_extraction": extraction,
            "hours": seconds / 3600 / self.state.num_processes,
        }

    def evaluations(self, cell: Cell) -> int:
        """Return the evaluations of the network for an image, of all images of a cell."""
        return self.config.images * len(self.samplings[cell].timesteps) * (1 if cell.guidance in (None, 1) else 2)

    # ---- which cells are finished --------------------------------------------------------------------------------

    def key(self, sampling: Sampling) -> str:
        """Return the name of a cell: a digest of all that its numbers depend on.

        The timesteps are part of it and the spacing of ours is not: with S = T all spacings are one cell.
        """
        kept = {name: value for name, value in asdict(sampling).items() if name != "shown" and value is not None}
        if issubclass(find_scheduler(sampling.scheduler, self.model.saved), GeneralizedDDIMScheduler):
            for config in (kept["scheduler_config"], kept["scheduler_config"][KEY]):
                config.pop("timestep_spacing", None)
        return digest([self.shared, kept])[:32]

    def file(self, cell: Cell) -> Path:
        """Return the path of the results of a cell."""
        return self.output / "cells" / f"{self.keys[cell]}.json"

    def parts(self, cell: Cell) -> Parts:
        """Return the parts of a cell that is being sampled."""
        return Parts(self.output / "parts" / self.keys[cell], self.config.images, self.config.part)

    def todo(self) -> dict[str, Cell]:
        """Return the cells that are not finished by key. Of cells with the same key it is the last.

        Raises ValueError for damaged files of the others.
        """
        return {key: cell for cell, key in self.keys.items() if not self.is_finished(cell)}

    def is_finished(self, cell: Cell) -> bool:
        """Test whether both files of a cell exist. Raises ValueError if one is damaged."""
        file = self.file(cell)
        pictures = file.with_suffix(".safetensors")
        if not (file.exists() and pictures.exists()):
            return False
        try:
            list(read_object(file)["results"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is damaged ({error}): remove it, and start the same command again") from error
        return "pictures" in read_arrays(pictures)[0]

    def finished(self, cell: Cell) -> dict[str, Any]:
        """Read the results of a cell, with its own settings and the names of the references.

        Another cell with the same key may have been measured, and the same pictures may have had another name.
        """
        found, sampling = read_object(self.file(cell)), self.samplings[cell]
        results, places = [], Counter()
        for entry in found["results"]:
            reference = self.references[places[entry["metric"]]]  # a metric has an entry for each, in their order
            places[entry["metric"]] += 1
            dataset = described(reference, "split" in entry["dataset"])
            results.append(entry | sampling.shown | {"dataset": dataset})
        return found | {"cell": asdict(cell), "settings": asdict(sampling), "results": results}

    # ---- sampling and measuring ----------------------------------------------------------------------------------

    def sample(self, cell: Cell) -> None:
        """Draw the pictures of a cell and save their features, in parts that the processes share."""

        def compute(numbers: range) -> tuple[Arrays, Notes]:
            sampling, step = self.model.prepare(cell), self.config.batch_size
            seconds, features, shown = 0.0, [], []
            with self.model.counted() as rows:
                for batch in (numbers[i : i + step] for i in range(0, len(numbers), step)):
                    start = time.perf_counter()
                    pictures = self.model.pictures(batch, sampling)
                    synchronize(self.model.device)
                    seconds += time.perf_counter() - start
                    features.append(extract(self.extractors, pictures))
                    shown.append(pictures[: max(0, SHOWN - batch.start)].cpu().numpy())
            notes = {"seconds": seconds, "evaluations": sum(rows)}
            return join(features) | {"pictures": np.concatenate(shown)}, notes

        self.parts(cell).make(compute, f"{cell.label()}, S = {cell.steps}")

    def against(self, extractor: Extractor) -> list[Statistics]:
        """Return what an extractor sees in each reference, as far as the metrics need it."""
        metrics, fitted = self.config.metrics, "fd" in self.config.metrics
        whole = any(METRICS[name].whole and METRICS[name].against for name in metrics)
        if not whole and not fitted:
            return [Statistics(None, None) for _ in self.references]
        given = (extractor, self.cache, self.config.batch_size, fitted, whole)
        return [statistics(reference, *given) for reference in self.references]

    def measure(self, cell: Cell, against: list[list[Statistics]]) -> None:
        """Write the files of a cell from its parts.

        Args:
            against: what each extractor sees in each reference.
        """
        arrays, notes = self.parts(cell).read()
        sampling, images = self.samplings[cell], len(arrays["features-0"])
        nfe = sum(part["evaluations"] for part in notes) / images
        entry = sampling.shown | {
            "nfe": int(nfe) if nfe.is_integer() else nfe,
            "num_inference_steps": cell.steps,
            "scheduler": sampling.scheduler,
            "images": images,
            "seed": self.config.seed,
            "seconds": sum(part["seconds"] for part in notes),
        }
        results, classes = [], self.model.classes
        labels = np.array(in_turn(range(images), classes)) if classes else None
        for k, extractor in enumerate(self.extractors):
            features = Features(arrays[f"features-{k}"], arrays.get(f"logits-{k}"), labels)
            seen = Statistics(gaussian(features.features) if "fd" in self.config.metrics else None, features)
            results += [named | entry for named in self.compare(extractor, seen, against[k])]
        finished = {
            "cell": asdict(cell),
            "settings": asdict(sampling),
            "results": results,
            "versions": versions(self.config),
        }
        file = self.file(cell)
        file.parent.mkdir(exist_ok=True)
        save_arrays(file.with_suffix(".safetensors"), {"pictures": arrays["pictures"]})
        write_json(file, finished)

    def compare(self, extractor: Extractor, seen: Statistics, against: list[Statistics]) -> list[dict[str, Any]]:
        """Compute all metrics of one extractor, against each reference for those that compare."""
        results = []
        for metric in (METRICS[name] for name in self.config.metrics):
            pairs = list(zip(self.references, against, strict=True))
            for reference, stored in pairs if metric.against else pairs[:1]:
                scores = metric.compute(seen, stored, self.config.kid_subset_size)
                for name, (value, deviation) in scores.items():
                    spread = {} if deviation is None else {"standard_deviation": deviation}
                    dataset = {"dataset": described(reference, metric.against)}
                    results.append(named(name, extractor) | {"value": value} | spread | dataset)
        return results


def named(metric: str, extractor: Extractor) -> dict[str, str]:
    """Return the id and name of a metric. Those of Inception's features are FID, KID and IS."""
    name = {"fd": "FD", "kid": "KID", "is": "IS"}.get(metric, metric.capitalize())
    if extractor.name == INCEPTION:
        return {"metric": "fid", "name": "FID"} if metric == "fd" else {"metric": metric, "name": name}
    return {"metric": f"{metric}_{extractor.slug}", "name": f"{name}, {extractor.slug}"}


def described(reference: Reference, against: bool) -> dict[str, Any]:
    """Return the data set of a result, without its split for a metric that compares with none."""
    found = reference.dataset()
    return {key: value for key, value in found.items() if against or key != "split"}


def versions(config: EvaluateConfig) -> dict[str, str]:
    """Return the versions of the libraries that numbers depend on."""
    found = record(config)["versions"]
    for name in ("numpy", "transformers", "torch-fidelity"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def summary(run: Run, finished: dict[Cell, dict[str, Any]]) -> dict[str, Any]:
    """Return the content of results.json: settings, versions, references, and a list of results."""
    done = {cell: finished[cell] for cell in run.grid if cell in finished}
    return record(run.config) | {
        "versions": versions(run.config),
        "status": "finished" if len(finished) == len(run.grid) else "running",
        "model": {"name": run.config.model, "pipeline": type(run.model.pipe).__name__, "sha256": run.model.fingerprint},
        "made": {
            "shape": run.model.shape,
            "classes": run.model.classes,
            "rounded": "to 8 bits before the extractors",
        },
        "device": str(run.model.device),
        "processes": run.state.num_processes,
        "extractors": [each.record() for each in run.extractors],
        "references": [each.record() for each in run.references],
        "cells": [
            {"cell": each["cell"], "key": run.keys[cell], "versions": each["versions"]} for cell, each in done.items()
        ],
        "results": [entry for each in done.values() for entry in each["results"]],
    }
