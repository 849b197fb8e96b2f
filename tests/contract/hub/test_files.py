"""Files and folders are replaced completely or not at all."""

import os
from pathlib import Path

import pytest
from diffusers import UNet2DModel
from guard.reading import read_object
from guard.writing import replace_folder, write_file

from ddim_plugin.pipelines.generation import GeneralizedDDIMPipeline
from ddim_plugin.schedulers import GeneralizedDDIMScheduler


def test_a_folder_that_cannot_be_put_in_place_leaves_the_one_before_it(tmp_path, monkeypatch):
    there = tmp_path / "there"
    with replace_folder(there) as aside:
        (aside / "first").write_text("first")
    replace = Path.replace

    def fails(path, target):
        if path.name == "there" and path.parent != tmp_path:
            raise OSError("the disk is full")
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fails)
        with pytest.raises(OSError, match="the disk is full"), replace_folder(there) as aside:
            (aside / "second").write_text("second")
    assert (there / "first").read_text() == "first"
    with pytest.raises(FileNotFoundError), replace_folder(there) as aside:
        (aside / "missing" / "third").write_text("third")
    assert [path.name for path in there.iterdir()] == ["first"]
    with replace_folder(there) as aside:
        (aside / "fourth").write_text("fourth")
    assert [path.name for path in there.iterdir()] == ["fourth"]
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_file_that_cannot_be_written_leaves_the_one_before_it(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    write_file(file, '{"a": 1}')

    def fails(path, content):
        with open(path, "wb") as half:
            half.write(content[:3])
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fails)
        with pytest.raises(OSError, match="the disk is full"):
            write_file(file, '{"a": 2}')
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert read_object(file) == {"a": 1}
    write_file(file, b'{"a": 3}')
    assert read_object(file) == {"a": 3}
    for text in ("[1]", "{", ""):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"a\.json"):
            read_object(file)


@pytest.mark.parametrize("umask", [0o022, 0o007, 0o077])
def test_a_saved_network_has_one_mode_and_no_path(make_unet, tmp_path, umask):
    """Whole or in shards, with all its variants."""
    make_unet().save_pretrained(tmp_path / "first")
    unet = UNet2DModel.from_pretrained(tmp_path / "first")
    pipe = GeneralizedDDIMPipeline(unet, GeneralizedDDIMScheduler())
    before = os.umask(umask)
    try:
        pipe.save_pretrained(tmp_path, max_shard_size="50KB")
        pipe.save_pretrained(tmp_path, variant="fp16")
    finally:
        os.umask(before)
    files = [*(tmp_path / "unet").iterdir()]
    assert len([file for file in files if file.suffix == ".safetensors"]) > 2
    assert {file.stat().st_mode & 0o777 for file in files} == {0o666 & ~umask}
    saved, loaded = ((tmp_path / name / "config.json").read_text() for name in ("unet", "first"))
    assert saved == loaded  # the first network was not loaded from anywhere
    assert UNet2DModel.from_pretrained(tmp_path / "unet").config["sample_size"] == 8
