"""References: cached by what they hold, and refused if they are too small."""

import datasets
import pytest
from measure.extractors import Extractor
from measure.grid import run
from measuring import classifier, values
from pictures import Pictures, load
from PIL import Image


def test_references_are_cached_by_what_they_hold(places, measure, tmp_path, monkeypatch):
    """Read again after a picture has changed, through another classifier, or at other splits; otherwise not."""
    pictures = load("digits", "test")[0][:60, 0].numpy()
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{i:03d}.png")
    looked, extractor = [], Extractor.__call__

    def look(self, batch):
        looked.append(len(batch))
        return extractor(self, batch)

    monkeypatch.setattr(Extractor, "__call__", look)
    cost = 2 + 16 + 2 * 40  # of the estimate, and of the samples

    def seen(name, **settings):
        looked.clear()
        given = {"variances": ("0",), "reference": str(folder), "cache": str(tmp_path / "cache")}
        result = measure(name, **given | settings)
        return sum(looked) - cost, values(result)

    first = seen("a")
    assert first[0] == 60
    assert seen("b") == (0, first[1])
    rows = {"img": [Image.fromarray(picture) for picture in pictures]}
    kinds = datasets.Features({"img": datasets.Image()})
    datasets.Dataset.from_dict(rows, features=kinds).to_parquet(tmp_path / "rows.parquet")
    assert seen("c", reference=str(tmp_path / "rows.parquet")) == (0, first[1])  # the same pictures in another file
    classifier(tmp_path / "other", hidden_sizes=[8, 12])
    assert seen("d", extractors=(str(tmp_path / "other"),))[0] == 60
    Image.fromarray(255 - pictures[7]).save(folder / "007.png")
    found = seen("e")
    assert found[0] == 60
    assert found[1] != first[1]


def test_references_that_are_empty_or_too_small(measure, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="there is no image in .*empty"):
        measure(reference=str(tmp_path / "empty"))
    kinds = datasets.Features({"image": datasets.Image()})
    for count, message in ((0, "corresponds to no data"), (16, "16 pictures of .* are too few .* at least 17")):
        rows = {"image": [Image.new("L", (8, 8), i) for i in range(count)]}
        datasets.Dataset.from_dict(rows, features=kinds).to_parquet(tmp_path / f"{count}.parquet")
        with pytest.raises(ValueError, match=message):
            measure(reference=str(tmp_path / f"{count}.parquet"))
    with pytest.MonkeyPatch.context() as patch:  # a set that opens, and holds nothing
        patch.setattr(run, "open_pictures", lambda name, *rest, **reading: Pictures(name, 0, None))
        with pytest.raises(ValueError, match="the reference digits has no pictures in its split 'train'"):
            measure()
    assert not (tmp_path / "out").exists()
