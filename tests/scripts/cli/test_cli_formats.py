"""Separate pictures, pictures that are not finite, and the modes of files."""

import json
import os
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cli_runs import latents, run
from PIL import Image

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler, cli

FEW = ("--steps", 2, "--seed", 3)


def expected(model, num):
    """What the pipeline makes of each seed, as bytes."""
    pipe = GeneralizedDDIMPipeline.from_pretrained(model)
    pictures = []
    for i in range(num):
        x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(3 + i))
        pictures.append(np.asarray(pipe(latents=x, num_inference_steps=2).images[0]))
    return np.stack(pictures).astype(int)


def test_the_same_pictures_in_each_form(model, tmp_path):
    for size, form in ((2, "png"), (3, "npz")):
        run("sample", model, "--num", 5, *FEW, "--batch-size", size, "--format", form, "--output", tmp_path / form)
    assert {path.name for path in (tmp_path / "png").iterdir()} == {"samples", "sample.json"}
    assert {path.name for path in (tmp_path / "npz").iterdir()} == {"samples.npz", "sample.json"}
    files = sorted((tmp_path / "png" / "samples").iterdir())
    assert [file.name for file in files] == [f"00000{i}.png" for i in range(5)]
    pictures = expected(model, 5)
    assert np.abs(np.stack([np.asarray(Image.open(file)) for file in files]) - pictures).max() <= 1
    with np.load(tmp_path / "npz" / "samples.npz") as loaded:  # as guided-diffusion reads it
        assert loaded.files == ["arr_0"]
        assert (loaded["arr_0"].dtype, loaded["arr_0"].shape) == (np.uint8, (5, 8, 8, 3))
        assert np.abs(loaded["arr_0"] - pictures).max() <= 1
    record = json.loads((tmp_path / "npz" / "sample.json").read_text())
    assert (record["images"], record["settings"]["num"], record["settings"]["format"]) == (5, 5, "npz")


def test_latents_are_decoded_to_separate_pictures(model, tmp_path):
    run("sample", model, "--num", 3, *FEW, "--output", tmp_path / "a")
    file = tmp_path / "a" / "latents.safetensors"
    for form in ("png", "npz"):
        run("sample", model, "--latents", file, "--format", form, "--batch-size", 2, "--output", tmp_path / form)
    with np.load(tmp_path / "npz" / "samples.npz") as loaded:
        for i, picture in enumerate(loaded["arr_0"]):
            there = np.asarray(Image.open(tmp_path / "png" / "samples" / f"00000{i}.png"))
            assert np.array_equal(picture, there)
    assert len(latents(tmp_path / "a")) == 3


def test_gray_pictures_and_labels(make_unet, tmp_path):
    unet = make_unet(channels=1, num_class_embeds=2)
    GeneralizedDDIMPipeline(unet, GeneralizedDDIMScheduler()).save_pretrained(tmp_path / "gray")
    labels = ("--class-label", 0, 1, 1)
    for form in ("png", "npz"):
        run(
            "sample",
            tmp_path / "gray",
            "--num",
            3,
            *labels,
            *FEW,
            "--batch-size",
            2,
            "--format",
            form,
            "--output",
            tmp_path,
        )
        assert json.loads((tmp_path / "sample.json").read_text())["settings"]["class_label"] == [0, 1, 1]
        (tmp_path / "sample.json").unlink()
    with np.load(tmp_path / "samples.npz") as loaded:
        assert loaded["arr_0"].shape == (3, 8, 8, 1)
        for i, picture in enumerate(loaded["arr_0"]):
            there = Image.open(tmp_path / "samples" / f"00000{i}.png")
            assert there.mode == "L"
            assert np.array_equal(np.asarray(there), picture[..., 0])


@pytest.mark.parametrize("form", ["png", "npz"])
def test_memory_does_not_grow_with_the_number(model, tmp_path, monkeypatch, form):
    """Pictures of 1 MB each, of which two are made at a time."""
    picture = np.zeros((512, 512, 3), np.float32)

    def call(self, *args, latents, **settings):
        return SimpleNamespace(images=np.repeat(picture[None], len(latents), 0))

    monkeypatch.setattr(GeneralizedDDIMPipeline, "__call__", call)
    peaks = []
    for num in (2, 24):
        tracemalloc.start()
        run("sample", model, "--num", num, "--batch-size", 2, "--format", form, "--output", tmp_path / str(num))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 6 * picture.nbytes


def test_folders_of_somebody_are_not_overwritten(model, tmp_path, capsys):
    folder = tmp_path / "samples"
    few = ("sample", model, "--num", 3, *FEW, "--format", "png", "--output", tmp_path)
    run(*few)
    run(*few, ok=False)
    assert "samples exists: choose another --output, or pass --overwrite" in capsys.readouterr().err
    run("sample", model, "--num", 1, *FEW, "--format", "png", "--output", tmp_path, "--overwrite")
    assert [file.name for file in folder.iterdir()] == ["000000.png"]
    (folder / "holiday.png").write_bytes(b"precious")
    run(*few, "--overwrite", ok=False)
    assert "--overwrite replaces samples only" in capsys.readouterr().err
    assert (folder / "holiday.png").read_bytes() == b"precious"
    (folder / "holiday.png").unlink()
    folder.rename(tmp_path / "kept")
    folder.symlink_to(tmp_path / "kept")
    run(*few, "--overwrite")
    assert [file.name for file in (tmp_path / "kept").iterdir()] == ["000000.png"]
    assert len([*folder.iterdir()]) == 3


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
        ("png", "nan", "bfloat16"),
        ("npz", "large", "float16"),
        ("interpolate", "nan", "bfloat16"),
        ("interpolate", "large", "float16"),
        ("reconstruct", "nan", "float32"),
        ("reconstruct", "nan", "float16"),
    ],
)
def test_nothing_is_written_of_pictures_that_are_not_finite(broken, pictures, tmp_path, capsys, name, dtype, command):
    arguments = {"interpolate": ["--seeds", "1", "2"], "reconstruct": [str(pictures)], "sample": ["--num", "2"]}
    arguments |= {form: ["--num", "2", "--format", form] for form in ("png", "npz")}
    words = [*arguments[command], "--steps", "2", "--dtype", dtype, "--output", str(tmp_path / "out")]
    command = command if command in ("interpolate", "reconstruct") else "sample"
    assert cli.main([command, str(broken / name), *words]) == 1
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith(f"ddim-plugin {command}: ")
    assert "finite" in said
    assert "float32" in said or "weights" in said  # the remedy
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_latents_that_are_not_finite_are_not_written(broken, pictures, tmp_path, capsys):
    run("encode", broken / "nan", pictures, "--steps", 2, "--output", tmp_path / "out", ok=False)
    assert "finite" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# ---- modes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o027, 0o077])
def test_files_have_the_mode_that_the_umask_allows(model, tmp_path, umask):
    before = os.umask(umask)
    try:
        run("sample", model, "--num", 1, *FEW, "--output", tmp_path / "grid")
        run("sample", model, "--num", 1, *FEW, "--format", "png", "--output", tmp_path / "png")
    finally:
        os.umask(before)
    modes = {path: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o666 & ~umask}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o777 & ~umask}
    assert "latents.safetensors" in {path.name for path in modes}
