"""Tables of a grid."""

import torch
from measure.extractors import INCEPTION, Extractor
from measure.grid import run


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
