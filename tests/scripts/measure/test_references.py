"""References: cached by what they hold, and refused if they are too small."""

import json

import datasets
import nll
import pytest
import reconstruct
from measure.comparison.bench import Journal
from measure.extractors import Extractor
from measure.grid import run
from measuring import classifier, values
from pictures import Pictures, load
from PIL import Image
from trainer.settings import build


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


def paint(folder, splits, count=40):
    """Save digits in a folder for each split, the same in all."""
    for split in splits:
        (folder / split).mkdir(parents=True)
        for i, digit in enumerate(load("digits", "test")[0][:count, 0].numpy()):
            Image.fromarray(digit).save(folder / split / f"{i:03d}.png")
    return str(folder)


def test_scripts_call_a_split_by_one_name(places, measure, tmp_path):
    """Also if the folder is not divided, or has other splits; one that does not exist is refused."""
    small = {"steps": (2,), "images": 2, "overwrite": True}
    one, ode = {"variances": ("fixed_small",), "ode": False}, {"strip": (2, 2), "figure_steps": (2,), "paths": 0}
    for splits, used, found in (
        (("",), "train", ["train"]),
        (("train", "test", "val"), "test", ["train", "test"]),
        (("val",), "validation", ["validation"]),
    ):
        name = paint(tmp_path / "-".join(("set", *splits)), splits)
        given = small | {"model": places["model"], "data": name, "output": str(tmp_path / "nll")}
        nll.main(build(nll.NLLConfig, given | one))
        record = json.loads((tmp_path / "nll" / "nll.json").read_text())
        assert record["config"]["split"] == used
        entries = json.loads((tmp_path / "nll" / "results.json").read_text())["results"]
        assert entries[0]["dataset"]["split"] == used
        assert f"--split {used}" in record["command"]
        given["output"] = str(tmp_path / "reconstruct")
        result = reconstruct.main(build(reconstruct.ReconstructConfig, given | ode))
        assert result["config"]["split"] == used
        result = measure("out", reference=name, steps=(2,), variances=("0",), overwrite=True)
        assert [each["split"] for each in result["references"]] == found
        assert sorted({entry["dataset"]["split"] for entry in result["results"]}) == sorted(found)
    for config, settings in ((nll, one), (reconstruct, ode)):
        kind = nll.NLLConfig if config is nll else reconstruct.ReconstructConfig
        with pytest.raises(ValueError, match="has no split 'nonsense': it has validation"):
            config.main(build(kind, given | settings | {"split": "nonsense", "output": str(tmp_path / "nothing")}))
    with pytest.raises(ValueError, match="has no split 'nonsense': it has validation"):
        measure("nothing", reference=name, splits=("nonsense",))


def test_a_picture_behind_a_link_is_read_again_after_a_change(measure, tmp_path):
    """And with another background, as the pictures are others then."""
    name = paint(tmp_path / "away", ("digits",))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "away" / "digits")
    given = {"reference": str(tmp_path / "set"), "steps": (2,), "variances": ("0",), "cache": str(tmp_path / "cache")}
    digests = [measure("a", **given)["references"][0]["sha256_of_pictures"]]
    Image.new("LA", (8, 8), (0, 9)).save(tmp_path / "away" / "digits" / "000.png")
    for colour in ("white", "black"):
        found = measure(colour, background=colour, **given)["references"][0]
        digests.append(found["sha256_of_pictures"])
    assert len(set(digests)) == 3
    with pytest.raises(ValueError, match=r"linked/000\.png\) has transparency"):
        measure("b", **given)
    assert name


def test_a_cut_record_is_named(measure, places, tmp_path):
    """Of evaluate.py as of the others: the file that cannot be read, not only the place in it."""
    measure("out", steps=(2,), variances=("0",))
    [cell] = (tmp_path / "out" / "cells").glob("*.json")
    for file in (cell, tmp_path / "out" / "results.json"):
        whole = file.read_text()
        file.write_text(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=f"cannot read .*{file.name}"):
            measure("out", steps=(2,), variances=("0",))
        file.write_text(whole)
    for module, config, name in ((nll, nll.NLLConfig, "nll.json"),):
        (tmp_path / name).write_text('{"config":')
        with pytest.raises(ValueError, match=f"cannot read .*{name}"):
            module.main(build(config, {"model": places["model"], "output": str(tmp_path)}))
    (tmp_path / "measured.jsonl").write_text('{"key": "a"\n')
    with pytest.raises(ValueError, match="cannot read .*measured.jsonl"):
        Journal(tmp_path / "measured.jsonl", {})


def test_damaged_files_of_a_cache(measure, tmp_path):
    cache, settings = tmp_path / "cache", {"steps": (2,), "variances": ("0",), "splits": ("test",)}
    whole = measure("whole", cache=str(cache), **settings)
    for file in cache.glob("contents-*.json"):
        file.write_text("{}")  # the pictures are read again
    [file] = cache.glob("*.safetensors")
    content = file.read_bytes()
    for damaged in (b"", content[:-8]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"cannot read {file} .*: remove it, and start the same command again"):
            measure(cache=str(cache), **settings)
    file.unlink()
    assert measure(cache=str(cache), **settings)["results"][0]["value"] == whole["results"][0]["value"]
    assert file.read_bytes() == content


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
