"""Tables of a grid."""

import torch
from measure.extractors import INCEPTION, Extractor
from measure.grid import run, tables


def test_a_fid_stands_beside_the_papers(measure, monkeypatch, tmp_path):
    def pooled(name, device, shape):
        call = lambda pictures: (torch.nn.functional.avg_pool2d(pictures.float(), 2).flatten(1), None)  # noqa: E731
        return Extractor(INCEPTION, 1, 16, None, {}, "pooled", call)

    monkeypatch.setattr(run, "open_extractor", pooled)
    result = measure(table1=True, steps=(10, 20), images=20, variances=None, extractors=(INCEPTION,), splits=("train",))
    assert [entry["metric"] for entry in result["results"]] == ["fid"] * 10
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| paper, CIFAR-10, η = 0 | 13.36 | 6.84 |" in table
    assert "| paper, CelebA, σ̂ | 299.71 | 183.83 |" in table


def test_an_inception_score_stands_beside_that_of_ho():
    cell = {"scheduler": "GeneralizedDDIMScheduler", "variance": "fixed_large", "spacing": "linear", "steps": 1000}
    entry = {"metric": "is", "name": "IS", "dataset": {"name": "cifar10"}, "value": 9.1, "nfe": 1000}
    entry |= {"scheduler": cell["scheduler"], "timestep_spacing": "linear"}
    config = {"table1": True, "table3": False, "images": 50_000, "seed": 0}
    result = {"config": config, "references": [], "cells": [{"cell": cell}], "results": [entry]}
    lines = tables.table(result).splitlines()
    assert lines[4:] == ["| σ̂ | 9.1 |", "| evaluations | 1000 |", "| Ho et al., CIFAR-10, σ̂ | 9.46 |"]
    assert "Ho et al." not in tables.table(result | {"config": config | {"table1": False, "table3": True}})
