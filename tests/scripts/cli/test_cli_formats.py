"""Folders in the way, pictures that are not finite, and the modes of files."""

import os

import pytest
import torch
from cli_runs import run

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler, cli

FEW = ("--steps", 2, "--seed", 3)


def test_folders_are_not_overwritten(model, tmp_path, capsys):
    few = ("sample", model, "--num", 1, *FEW, "--output", tmp_path)
    (tmp_path / "samples.png").mkdir()
    (tmp_path / "samples.png" / "holiday.png").write_bytes(b"precious")
    run(*few, "--overwrite", ok=False)
    assert capsys.readouterr().err.endswith("samples.png exists: choose another --output\n")  # no use of --overwrite
    assert (tmp_path / "samples.png" / "holiday.png").read_bytes() == b"precious"


# ---- pictures that are not finite -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def broken(make_unet, tmp_path_factory):
    """A network of which one weight is NaN, and one that overflows in half precision."""
    folder = tmp_path_factory.mktemp("broken")
    for name, value in (("nan", float("nan")), ("large", 1e30)):
        unet = make_unet(channels=3)
        torch.nn.init.constant_(unet.conv_out.bias, value)
        GeneralizedDDIMPipeline(unet, GeneralizedDDIMScheduler()).save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize(
    ("command", "name", "dtype"),
    [
        ("sample", "nan", "float32"),
        ("sample", "large", "float16"),
        ("sample", "nan", "bfloat16"),
        ("encode", "nan", "float32"),
        ("encode", "nan", "float16"),
        ("encode", "large", "float16"),
    ],
)
def test_nothing_is_written_of_pictures_that_are_not_finite(broken, pictures, tmp_path, capsys, name, dtype, command):
    arguments = {"encode": map(str, pictures), "sample": ["--num", "2"]}
    words = [*arguments[command], "--steps", "2", "--dtype", dtype, "--output", str(tmp_path / "out")]
    assert cli.main([command, str(broken / name), *words]) == 1
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith(f"ddim-plugin {command}: ")
    assert "finite" in said
    assert "float32" in said or "weights" in said  # the remedy
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


# ---- modes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o027, 0o077])
def test_files_have_the_mode_that_the_umask_allows(model, tmp_path, umask):
    before = os.umask(umask)
    try:
        run("sample", model, "--num", 1, *FEW, "--output", tmp_path / "grid")
    finally:
        os.umask(before)
    modes = {path: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o666 & ~umask}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o777 & ~umask}
    assert "latents.safetensors" in {path.name for path in modes}
