"""Commands that fail: one line, status 1, and no file is written or lost."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_runs import latents, run
from PIL import Image
from safetensors.torch import save_file

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler, cli


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "MODEL", "--num", "0"], "--num must be an integer of at least 1, not 0"),
        (["sample", "MODEL", "--batch-size", "0"], "--batch-size must be an integer of at least 1, not 0"),
        (["sample", "PICTURES"], "no file named model_index.json found in directory"),
        (["sample", "MODEL", "--latents", "none.safetensors"], "No such file or directory: none.safetensors"),
        (["sample", "MODEL", "--latents", "PICTURES/0.png"], "0.png"),
        (["sample", "MODEL", "--class-label", "1"], "unconditional"),
        (["sample", "MODEL", "--latents", "FLAT"], "these latents have no settings"),
        (["sample", "MODEL", "--latents", "FLAT", "--eta", "1"], "--eta has no effect on latents: leave it out"),
        (["sample", "MODEL", "--latents", "TEXT"], "text.safetensors: File does not contain tensor latents"),
        (["sample", "MODEL", "--device", "nonsense"], "--device nonsense is not available"),
        (["sample", "MODEL", "--device", "meta"], "--device meta is not available"),
        (["sample", "MODEL", "--seed", "-1"], "--seed must be an integer from 0 to"),
        (["fit", "MODEL", "--seed", "99999999999999999999"], "--seed must be an integer from 0 to"),
        (["fit", "MODEL", "--steps", "2", "--num", "4", "--minutes", "-1"], "minutes must be a finite number"),
        (["sample", "MODEL", "--latents", "PICTURES"], "cannot read latents from"),
        (
            ["sample", "MODEL", "--output", "PICTURES/0.png/sub"],
            "/0.png, which is no folder, or protected: choose another",
        ),
        (["encode", "MODEL", "ODD/broken.png"], "cannot read the image"),
        (["encode", "MODEL", "ODD/clear.png"], "has transparency"),
        (["encode", "MODEL", "ODD/deep.png"], "more than 8 bits: scale it to 0..255 first"),
        (["sample", "MODEL", "--num", "3", "--class-label", "1", "2"], "2 of class_labels do not fit 3 picture(s)"),
        (["sample", "MODEL", "--steps", "1001"], "must be an integer from 1 to 1000"),
        (["sample", "./nowhere"], "Repo id must use alphanumeric chars"),
        (["encode", "MODEL", "none.png"], "cannot read the image none.png"),
        (["encode", "MODEL", "PICTURES"], "cannot read the image"),
        (["encode", "MODEL", "PICTURES/0.png", "--refine", "-1"], "refinement_steps must be"),
        (["encode", "MODEL", "PICTURES/0.png", "--output", "PICTURES/0.png"], "0.png is in "),
        (
            ["encode", "MODEL", "PICTURES/0.png", "--tolerance", "-1"],
            "tolerance must be a non-negative number, not -1",
        ),
        (["edit", "MODEL", "PICTURES/0.png", "FLAT", "--new-guidance-scale", "2"], "cannot read the image"),
        (["edit", "MODEL", "PICTURES/0.png", "--new-prompt", "dog"], "has no prompt: leave out --new-prompt"),
        (["edit", "MODEL", "FLAT", "--new-prompt", "dog", "--tolerance", "0.1"], "--tolerance has no effect"),
        (["edit", "MODEL", "FLAT", "--new-guidance-scale", "2"], "these latents have no settings"),
        (["push", "nowhere", "user/model"], "nowhere"),
        (["sample", "MODEL", "--revision", "v1"], "--revision v1 has no effect on the folder "),
        (["demo", "MODEL", "--revision", "v1"], "--revision v1 has no effect on the folder "),
        (["demo", "--revision", "v1"], "has no effect on the folder of the installed digits: leave it out"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(model, pictures, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    odd = tmp_path / "odd"
    odd.mkdir()
    (odd / "broken.png").write_bytes(pictures[0].read_bytes()[:100])
    Image.new("RGBA", (8, 8)).save(odd / "clear.png")
    Image.fromarray(np.full((8, 8), 30000, np.uint16)).save(odd / "deep.png")
    save_file({"latents": torch.zeros(1, 3, 8, 8)}, odd / "flat.safetensors")
    save_file({"text": torch.zeros(1)}, odd / "text.safetensors")
    places = {"MODEL": model, "PICTURES": pictures[0].parent, "ODD": odd}
    places |= {"FLAT": odd / "flat.safetensors", "TEXT": odd / "text.safetensors"}
    for name, place in places.items():
        arguments = [argument.replace(name, str(place)) for argument in arguments]
    assert cli.main(arguments) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ddim-plugin")]
    assert len(said) == 1
    assert any(each in said[0] for each in message.split("|"))
    assert ".ddim-plugin-" not in said[0]
    assert not (tmp_path / "out").exists()


def test_networks_without_pictures_are_refused_before_sampling(make_unet, tmp_path, capsys):
    GeneralizedDDIMPipeline(make_unet(channels=4), GeneralizedDDIMScheduler()).save_pretrained(tmp_path / "model")
    run("sample", tmp_path / "model", "--output", tmp_path / "out", ok=False)
    assert "the network takes 4 channels: pictures have 1 or 3" in capsys.readouterr().err


def test_earlier_files_are_kept(model, tmp_path, capsys):
    run("sample", model, "--num", 1, "--steps", 1, "--output", tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    run("sample", model, "--num", 2, "--steps", 1, "--output", tmp_path, ok=False)
    assert "samples.png exists: choose another --output, or pass --overwrite" in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    run("sample", model, "--num", 2, "--steps", 1, "--output", tmp_path, "--overwrite")
    assert len(latents(tmp_path)) == 2


def test_an_output_without_the_right_to_write_is_refused_before_work(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write everywhere
    monkeypatch.setattr(GeneralizedDDIMPipeline, "from_pretrained", lambda *args, **kwargs: pytest.fail("loaded"))
    run("sample", model, "--output", tmp_path / "out", ok=False)
    assert f"{tmp_path}, which is no folder, or protected: choose another" in capsys.readouterr().err
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    run("sample", model, "--output", tmp_path / "link", ok=False)
    assert f"{tmp_path / 'link'}, which is no folder" in capsys.readouterr().err


def test_of_two_runs_into_one_folder_the_later_loses_nothing(model, tmp_path):
    """Two processes that both find the folder empty."""
    command = [sys.executable, "-m", "ddim_plugin.cli", "sample", str(model), "--num", "4", "--steps", "100"]
    command += ["--device", "cpu", "--output", str(tmp_path / "out")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([*command, "--seed", str(seed)], **pipes) for seed in (1, 5)]
    said = [each.communicate(timeout=300) for each in both]
    assert sorted(each.returncode for each in both) == [0, 1]
    (late,) = (i for i, each in enumerate(both) if each.returncode)
    seeds, line = (1, 5), said[late][1].splitlines()[-1]
    kept = tmp_path / "out" / f"sample-{both[late].pid}"
    assert line.endswith(f"samples.png was written by another run meanwhile: the files of this one are in {kept}")
    for seed, folder in ((seeds[1 - late], tmp_path / "out"), (seeds[late], kept)):
        assert json.loads((folder / "sample.json").read_text())["settings"]["seed"] == seed
        assert len(latents(folder)) == 4
        assert Image.open(folder / "samples.png").size == (4 + 4 * 68, 4 + 68)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


@pytest.mark.parametrize("name", ["nobody/nothing", "out/digitz", "digits"])
def test_a_missing_model_is_one_line(tmp_path, monkeypatch, capsys, name):
    """No network here: the Hub cannot be reached, and nothing is in the cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    run("sample", name, "--output", tmp_path, ok=False)
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"ddim-plugin sample: {name} (no folder) on https://")
    assert "offline mode is enabled" in said


def test_a_full_disk_is_one_line(model, tmp_path, monkeypatch, capsys):
    def write(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write)
    run("sample", model, "--num", 1, "--steps", 2, "--output", tmp_path / "out", ok=False)
    assert "No space left on device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
