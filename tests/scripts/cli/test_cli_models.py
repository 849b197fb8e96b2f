"""What is given as MODEL: folders and ids, right and wrong."""

import pytest
from cli_runs import run
from loopback_hub import LoopbackHub

FEW = ["--num", 1, "--steps", 1]


@pytest.mark.parametrize("name", ["https://huggingface.co/ada/model", "ada/my model", "out/runs/3", "a//b"])
def test_what_is_neither_a_folder_nor_an_id(name, tmp_path, capsys):
    run("sample", name, *FEW, "--output", tmp_path / "out", ok=False)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("ddim-plugin sample: ")
    assert name in line
    assert "Repo id must" in line or "neither a valid local path nor a valid repo id" in line


def test_folders_without_an_index(model, tmp_path, capsys):
    for wrong in (model / "unet", model.parent):
        run("sample", wrong, *FEW, "--output", tmp_path / "out", ok=False)
        line = capsys.readouterr().err.splitlines()[-1]
        assert line == f"ddim-plugin sample: Error no file named model_index.json found in directory {wrong}."


def test_models_on_the_hub(model, tmp_path, capsys):
    files = {path.relative_to(model).as_posix(): path.read_bytes() for path in model.rglob("*") if path.is_file()}
    with LoopbackHub() as hub:
        hub.add_user("ada", "hf_ada")
        hub.add_repo("ada/model", files)
        hub.add_repo("ada/notes", {"README.md": b"# Notes\n"})
        with hub.in_process(tmp_path / "home"):
            run("sample", "ada/model", "--revision", "main", *FEW, "--output", tmp_path / "out")
            assert (tmp_path / "out" / "samples.png").is_file()
            for name, *revision in (("ada/modle",), ("ada/model", "--revision", "gone"), ("ada/notes",)):
                capsys.readouterr()
                run("sample", name, *revision, *FEW, "--output", tmp_path / "not", ok=False)
                said = capsys.readouterr().err.splitlines()[-1]
                assert said.startswith(f"ddim-plugin sample: {name} (no folder) on {hub.url}: 40")
                assert "Not Found" in said
    assert not (tmp_path / "not").exists()
