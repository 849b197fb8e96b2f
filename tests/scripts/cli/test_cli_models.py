"""What is given as MODEL: folders, ids and addresses, right and wrong."""

import shutil

import pytest
from cli_runs import run
from loopback_hub import LoopbackHub

from ddim_plugin.cli.commands import locate


@pytest.mark.parametrize(
    "start", ["https://huggingface.co/", "http://www.huggingface.co/", "huggingface.co/", "hf.co/"]
)
@pytest.mark.parametrize(
    ("tail", "revision"),
    [
        ("", None),
        ("/", None),
        ("/tree/main", "main"),
        ("/tree/main/unet", "main"),
        ("/blob/v1.0/README.md?download=true#use", "v1.0"),
        ("/resolve/refs%2Fpr%2F1/model_index.json", "refs/pr/1"),
        ("/commit/0123abc", "0123abc"),
        ("/discussions/3", None),
        ("?library=diffusers", None),
    ],
)
def test_an_address_is_understood(start, tail, revision):
    assert locate(f"{start}ada/my-model.v1{tail}", None) == ("ada/my-model.v1", revision)
    assert locate(f"{start}ada/my-model.v1{tail}", "mine") == ("ada/my-model.v1", "mine")


@pytest.mark.parametrize(
    "model",
    ["https://example.com/ada/model", "https://huggingface.co", "ada/my model", "out/runs/3", "a//b"],
)
def test_what_is_neither_a_folder_nor_an_id(model):
    with pytest.raises(ValueError, match=r"is no folder, and no id on the Hub such as user/model: check the path"):
        locate(model, None)


def test_folders_beside_a_model_name_it(model, tmp_path):
    whole = tmp_path / "out" / "model"
    shutil.copytree(model, whole)
    assert locate(str(whole), None) == (str(whole), None)
    weights = whole / "unet" / "diffusion_pytorch_model.safetensors"
    for wrong in (whole / "unet", whole / "scheduler", whole / "model_index.json", weights, tmp_path / "out"):
        with pytest.raises(ValueError, match=rf"has no model_index\.json: pass {whole}$"):
            locate(str(wrong), None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty has no model_index\.json: pass the folder of a whole saved pipeline"):
        locate(str(tmp_path / "empty"), None)


def test_models_on_the_hub(model, tmp_path, capsys):
    files = {path.relative_to(model).as_posix(): path.read_bytes() for path in model.rglob("*") if path.is_file()}
    with LoopbackHub() as hub:
        hub.add_user("ada", "hf_ada")
        hub.add_repo("ada/model", files)
        hub.add_repo("ada/notes", {"README.md": b"# Notes\n"})
        with hub.in_process(tmp_path / "home"):
            few = ["--num", 1, "--steps", 1]
            run("sample", f"{hub.url}/ada/model/tree/main", *few, "--output", tmp_path / "out")
            assert (tmp_path / "out" / "samples.png").is_file()
            for wrong, said in {
                "ada/modle": f"ada/modle, and ada/modle was not found on {hub.url}, or it is private: log in",
                f"{hub.url}/ada/model/tree/gone": f"ada/model, and ada/model was not found on {hub.url}",
                "ada/notes": f"ada/notes, and ada/notes was not found on {hub.url}",
            }.items():
                capsys.readouterr()
                run("sample", wrong, *few, "--output", tmp_path / "not", ok=False)
                assert (
                    capsys.readouterr()
                    .err.splitlines()[-1]
                    .startswith(f"ddim-plugin sample: there is no folder {said}")
                )
    assert not (tmp_path / "not").exists()
