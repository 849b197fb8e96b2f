"""The commands with models of flow matching and variance exploding."""

import json

import numpy as np
import pytest
import torch
from cli_runs import latents, run
from PIL import Image

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler

PATHS = {
    "flow": {"prediction_type": "flow_prediction", "shift": 3.0},
    "exploding": {"prediction_type": "score", "sigma_max": 50.0},
}


@pytest.fixture(scope="module", params=PATHS)
def model(request, make_unet, tmp_path_factory):
    """A saved model, whose network changes little."""
    folder, settings = tmp_path_factory.mktemp(request.param) / "model", PATHS[request.param]
    kind = "fourier" if "sigma_max" in settings else "positional"
    unet = make_unet(channels=3, time_embedding_type=kind)
    torch.nn.init.normal_(unet.conv_out.weight, std=0.01, generator=torch.Generator().manual_seed(0))
    torch.nn.init.zeros_(unet.conv_out.bias)
    GeneralizedDDIMPipeline(unet, GeneralizedDDIMScheduler(**settings)).save_pretrained(folder)
    return folder


@pytest.fixture
def is_flow(model):
    return "DDPM" in (model / "model_index.json").read_text()


def cells(file, number):
    picture = np.asarray(Image.open(file))
    return np.stack([picture[4:68, 4 + 68 * i : 68 + 68 * i] for i in range(number)])


def test_sample_and_its_latents(model, tmp_path):
    run("sample", model, "--num", 3, "--steps", 5, "--eta", 1, "--output", tmp_path / "noisy")
    run("sample", model, "--num", 3, "--steps", 5, "--output", tmp_path / "a")
    drawn = torch.cat([torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)])
    assert torch.allclose(latents(tmp_path / "a"), drawn, rtol=1e-6)  # of deviation 1 on every path
    run("sample", model, "--latents", tmp_path / "a" / "latents.safetensors", "--output", tmp_path / "b")
    assert np.array_equal(*(cells(tmp_path / name / "samples.png", 3) for name in "ab"))
    run("sample", model, "--num", 1, "--steps", 4, "--multistep", "--output", tmp_path / "c")


def test_timesteps_are_real_numbers(model, is_flow, tmp_path):
    times = ["1000", "512.5", "20.25"] if is_flow else ["50", "3.25", "0.5"]
    run("sample", model, "--num", 1, "--timesteps", *times, "--output", tmp_path)
    settings = json.loads((tmp_path / "sample.json").read_text())["settings"]
    assert settings["timesteps"] == [float(time) for time in times]
    run("sample", model, "--latents", tmp_path / "latents.safetensors", "--output", tmp_path / "again")
    assert np.array_equal(*(cells(folder / "samples.png", 1) for folder in (tmp_path, tmp_path / "again")))


def test_encode(model, pictures, tmp_path, capsys):
    half = ["--steps", 10, "--strength", 0.5, "--refine", 20]
    run("encode", model, *pictures, *half, "--output", tmp_path)
    assert len(json.loads((tmp_path / "encode.json").read_text())["report"]["timesteps"]) == 5
    assert "evaluations for an image" in capsys.readouterr().err
    run("sample", model, "--latents", tmp_path / "latents.safetensors", "--output", tmp_path / "again")
    again = cells(tmp_path / "again" / "samples.png", 4).astype(int)
    for file, cell in zip(pictures, again, strict=True):
        image = Image.open(file).resize((64, 64), Image.Resampling.BICUBIC)
        assert np.abs(cell - np.asarray(image)).max() <= 3
    run("encode", model, *pictures[:2], "--steps", 3, "--refine", 0, "--output", tmp_path / "whole")
    assert latents(tmp_path / "whole").shape == (2, 3, 8, 8)
    assert json.loads((tmp_path / "whole" / "encode.json").read_text())["report"]["evaluations"] == [[1, 1]] * 3


@pytest.mark.parametrize(
    ("options", "flow", "exploding"),
    [
        (["--variance", "learned_range"], "needs a β schedule, not flow matching", "not variance exploding"),
        (["--timesteps", "10", "20"], "descending", "descending"),
        (["--timesteps", "1001.5"], "1000", "50"),
        (["--spacing", "quadratic"], "timestep_spacing for flow matching 'quadratic': use one of linear", None),
    ],
)
def test_options_that_do_not_apply(model, is_flow, tmp_path, capsys, options, flow, exploding):
    said = flow if is_flow else exploding
    run("sample", model, "--num", 1, *options, "--output", tmp_path / "out", ok=said is None)
    if said is not None:
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("ddim-plugin sample: ")
        assert said in line
        assert not (tmp_path / "out").exists()


def test_a_corrector_is_switched_off_for_latents(make_unet, pictures, tmp_path, capsys):
    scheduler = GeneralizedDDIMScheduler(corrector_steps=1, **PATHS["exploding"])
    unet = make_unet(channels=3, time_embedding_type="fourier")
    GeneralizedDDIMPipeline(unet, scheduler).save_pretrained(tmp_path / "model")
    run("sample", tmp_path / "model", "--num", 1, "--steps", 3, "--output", tmp_path / "a")
    run("encode", tmp_path / "model", pictures[0], "--steps", 3, "--output", tmp_path / "b")
    assert "note: corrector_steps=0, the model has 1" in capsys.readouterr().err


def test_latents_of_another_kind_of_model_are_refused(model, is_flow, make_unet, tmp_path, capsys):
    GeneralizedDDIMPipeline(make_unet(channels=3), GeneralizedDDIMScheduler()).save_pretrained(tmp_path / "paper")
    run("sample", model, "--num", 1, "--steps", 2, "--output", tmp_path / "made")
    latents = tmp_path / "made" / "latents.safetensors"
    run("sample", tmp_path / "paper", "--latents", latents, "--output", tmp_path / "out", ok=False)
    kind = "flow_prediction" if is_flow else "score"
    assert f"these latents are of a model that predicts '{kind}', unlike this one" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
