"""A data set as files."""

import datasets
import pytest
from painted import picture


@pytest.fixture
def parquet(tmp_path):
    """40 pictures with the columns that CIFAR-10 has on the Hub, in two files."""
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["even", "odd"])})
    for part in range(2):
        rows = range(part * 20, part * 20 + 20)
        table = {"img": [picture(i) for i in rows], "label": [i % 2 for i in rows]}
        datasets.Dataset.from_dict(table, features).to_parquet(tmp_path / f"train-{part}.parquet")
    return tmp_path
