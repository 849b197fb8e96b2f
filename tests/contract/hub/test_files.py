"""Files and folders are replaced completely or not at all."""

from pathlib import Path

import pytest

from ddim_plugin.hub.files import read_object, replace_folder, write_file


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
    assert read_object(file) == {"a": 1}
    write_file(file, b'{"a": 3}')
    assert read_object(file) == {"a": 3}
    for text in ("[1]", "{", ""):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"a\.json"):
            read_object(file)
