"""What the commands write."""

import json

import numpy as np
import pytest
import torch
from cli_runs import latents, run
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler, MultistepDDIMScheduler
from ddim_plugin.cli import commands


def test_sample(model, tmp_path):
    run("sample", model, "--num", 5, "--steps", 4, "--seed", 7, "--batch-size", 2, "--output", tmp_path)
    pipe = GeneralizedDDIMPipeline.from_pretrained(model)
    generators = [torch.Generator().manual_seed(7 + i) for i in range(5)]
    expected = torch.cat([torch.randn(1, 3, 8, 8, generator=g) for g in generators])
    assert torch.equal(latents(tmp_path), expected)
    grid = np.asarray(Image.open(tmp_path / "samples.png"))
    assert grid.shape[0] == 64 + 2 * 4
    first = pipe(latents=expected[:1], num_inference_steps=4).images[0].resize((64, 64), Image.Resampling.BICUBIC)
    assert np.array_equal(grid[4:68, 4:68], np.asarray(first))
    record = json.loads((tmp_path / "sample.json").read_text())
    assert (record["images"], record["settings"]["steps"], record["settings"]["seed"]) == (5, 4, 7)


@pytest.mark.parametrize("noise", [["--eta", 1], ["--variance", "fixed_large", "--clip"]])
def test_noise_does_not_depend_on_the_batch(model, tmp_path, noise):
    pictures = []
    for size in (1, 3):
        run("sample", model, "--num", 3, "--steps", 5, *noise, "--batch-size", size, "--output", tmp_path / str(size))
        pictures.append(np.asarray(Image.open(tmp_path / str(size) / "samples.png")).astype(int))
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
    pipe = GeneralizedDDIMPipeline.from_pretrained(model)
    changes = {"eta": 1.0} if "--eta" in noise else {"variance_type": "fixed_large", "clip_sample": True}
    pipe.scheduler = GeneralizedDDIMScheduler.from_config(pipe.scheduler.config, **changes)
    generator = [torch.Generator().manual_seed(0)]
    expected = pipe(1, 5, generator=generator).images[0].resize((64, 64), Image.Resampling.BICUBIC)
    assert np.abs(pictures[0][4:68, 4:68] - np.asarray(expected).astype(int)).max() <= 1


def test_encode_then_sample_its_latents(model, pictures, tmp_path, capsys):
    half = ["--strength", 0.5, "--steps", 10]
    run("encode", model, *pictures, *half, "--refine", 8, "--batch-size", 3, "--output", tmp_path)
    said = capsys.readouterr()
    assert "evaluations for an image" in said.err
    made = [("latents", "latents.safetensors"), ("settings", "encode.json")]
    assert said.out.splitlines() == [f"{what}: {tmp_path / name}" for what, name in made]
    record = json.loads((tmp_path / "encode.json").read_text())
    before = (tmp_path / "latents.safetensors").read_bytes()
    run("sample", model, "--latents", tmp_path / "latents.safetensors", "--output", tmp_path)
    assert (tmp_path / "latents.safetensors").read_bytes() == before  # its own input is kept
    assert record["images"] == list(map(str, pictures))
    assert np.array(record["report"]["evaluations"]).shape == (5, 4)
    pipe = GeneralizedDDIMPipeline.from_pretrained(model)
    images = list(map(Image.open, pictures))
    expected = pipe.encode(images, 10, strength=0.5, refinement_steps=8)
    assert torch.allclose(latents(tmp_path), expected, atol=1e-3)

    # The file knows how it was made: S and the strength, so that decoding gives the images.
    run("sample", model, "--latents", tmp_path / "latents.safetensors", "--output", tmp_path / "again")
    assert not (tmp_path / "again" / "latents.safetensors").exists()
    grid = np.asarray(Image.open(tmp_path / "again" / "samples.png")).astype(int)
    for i, image in enumerate(images):
        cell = np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(grid[4:68, 4 + 68 * i : 68 + 68 * i] - cell).max() <= 2
    record = json.loads((tmp_path / "again" / "sample.json").read_text())
    assert (record["call"]["num_inference_steps"], record["call"]["strength"]) == (10, 0.5)
    for steps in (["--steps", 5], ["--timesteps", 500, 300, 1]):  # x_t would be taken for another level
        output = ["--output", tmp_path / "other"]
        run("sample", model, "--latents", tmp_path / "latents.safetensors", *steps, *output, ok=False)
        assert "these latents belong to their inversion's steps: leave out" in capsys.readouterr().err


def test_latents_with_other_steps(model, tmp_path, capsys):
    """Steps replace timesteps of the file, and timesteps its steps."""
    run("sample", model, "--num", 1, "--steps", 4, "--output", tmp_path / "count")
    assert capsys.readouterr().out.startswith("1 image: ")
    run("sample", model, "--num", 1, "--timesteps", 900, 400, 30, "--output", tmp_path / "times")
    file, record = (tmp_path / name / "latents.safetensors" for name in ("count", "times")), "sample.json"
    count, times = (["--latents", each] for each in file)
    run("sample", model, *count, "--timesteps", 900, 400, 30, "--output", tmp_path / "a")
    run("sample", model, *times, "--steps", 4, "--output", tmp_path / "b")
    for one, other, call in (("count", "b", {"num_inference_steps": 4}), ("times", "a", {"timesteps": [900, 400, 30]})):
        pictures = (np.asarray(Image.open(tmp_path / name / "samples.png")) for name in (one, other))
        assert np.array_equal(*pictures)
        known = json.loads((tmp_path / other / record).read_text())["call"]
        assert {key: known[key] for key in ("num_inference_steps", "timesteps") if key in known} == call


def test_the_multistep_method(model, pictures, tmp_path):
    """A model with fitted timesteps is used as it was saved; --no-multistep takes DDIM instead."""
    pipe = GeneralizedDDIMPipeline.from_pretrained(model)
    pipe.scheduler = MultistepDDIMScheduler.from_config(
        pipe.scheduler.config, fitted_solvers={3: {"timesteps": [900, 400, 30]}}
    )
    pipe.save_pretrained(tmp_path / "model")
    run("sample", tmp_path / "model", "--num", 2, "--steps", 3, "--output", tmp_path / "own")
    run("sample", model, "--num", 2, "--steps", 3, "--multistep", "--output", tmp_path / "asked")
    run("sample", tmp_path / "model", "--num", 2, "--steps", 3, "--no-multistep", "--output", tmp_path / "not")
    made = [np.asarray(Image.open(tmp_path / name / "samples.png")) for name in ("own", "asked", "not")]
    assert not np.array_equal(made[0], made[1])
    assert not np.array_equal(made[0], made[2])
    assert not np.array_equal(made[1], made[2])
    latent = tmp_path / "asked" / "latents.safetensors"
    run("sample", model, "--latents", latent, "--output", tmp_path / "again")  # by the method they came with
    assert np.array_equal(np.asarray(Image.open(tmp_path / "again" / "samples.png")), made[1])

    run("encode", tmp_path / "model", *pictures, "--steps", 3, "--refine", 4, "--output", tmp_path / "back")
    assert len(json.loads((tmp_path / "back" / "encode.json").read_text())["report"]["timesteps"]) == 1


def test_a_stock_model_opens_without_clipping(make_unet, pictures, tmp_path, capsys):
    DDPMPipeline(make_unet(channels=3), DDPMScheduler(clip_sample=True)).save_pretrained(tmp_path / "ddpm")
    run("encode", tmp_path / "ddpm", *pictures, "--steps", 3, "--output", tmp_path / "out")
    assert "note: clip_sample=False, the model has True" in capsys.readouterr().err


def test_labels_and_guidance(make_unet, pictures, tmp_path):
    pipe = GeneralizedDDIMPipeline(make_unet(channels=3, num_class_embeds=4), GeneralizedDDIMScheduler())
    pipe.save_pretrained(tmp_path / "model")
    guided = ["--guidance-scale", 2, "--steps", 2]
    run("sample", tmp_path / "model", "--num", 3, "--class-label", 0, 1, 2, *guided, "--output", tmp_path / "s")
    plain = ["--class-label", 1, *guided, "--refine", 0]
    run("encode", tmp_path / "model", *pictures, *plain, "--output", tmp_path / "e")
    run("sample", tmp_path / "model", "--latents", tmp_path / "e" / "latents.safetensors", "--output", tmp_path / "r")
    known = json.loads((tmp_path / "r" / "sample.json").read_text())["call"]
    assert (known["class_labels"], known["guidance_scale"], known["num_inference_steps"]) == (1, 2, 2)
    call = {"class_labels": [1] * 4, "guidance_scale": 2.0}
    expected = pipe.encode(list(map(Image.open, pictures)), 2, **call)
    assert torch.allclose(latents(tmp_path / "e"), expected, rtol=1e-3, atol=1e-3)


def test_reconstruct_and_edit(make_unet, pictures, tmp_path):
    """As with a text-to-image model: `edit` draws with another label."""
    unet = make_unet(channels=3, num_class_embeds=4)
    torch.nn.init.normal_(unet.conv_out.weight, std=0.01, generator=torch.Generator().manual_seed(0))
    GeneralizedDDIMPipeline(unet, GeneralizedDDIMScheduler()).save_pretrained(tmp_path / "model")
    few = ["--class-label", 0, 1, 2, 3, "--steps", 8, "--strength", 0.5, "--refine", 8, "--batch-size", 3]
    run("reconstruct", tmp_path / "model", *pictures, *few, "--output", tmp_path / "r")
    record = json.loads((tmp_path / "r" / "reconstruct.json").read_text())
    assert len(record["errors"]) == 4
    assert max(record["errors"]) < 5e-3
    grid = np.asarray(Image.open(tmp_path / "r" / "reconstructed.png")).astype(int)
    assert grid.shape[:2] == (4 + 4 * 68, 4 + 2 * 68)
    assert np.abs(grid[4:, 4:68] - grid[4:, 72:136]).max() <= 9
    file, other = tmp_path / "r" / "latents.safetensors", ["--new-class-label", 3]
    run("edit", tmp_path / "model", file, *other, "--output", tmp_path / "e")
    run("edit", tmp_path / "model", *pictures, *few, *other, "--output", tmp_path / "f")
    edits = [np.asarray(Image.open(tmp_path / name / "edited.png")).astype(int) for name in "ef"]
    assert np.abs(edits[0][:, :-68] - grid[:, 68:]).max() <= 1
    assert np.abs(edits[0] - edits[1][:, 68:]).max() <= 1
    pipe = GeneralizedDDIMPipeline.from_pretrained(tmp_path / "model")
    again = pipe.decode(latents(tmp_path / "r")[:1], 8, strength=0.5, class_labels=3)[0].resize(
        (64, 64), Image.Resampling.BICUBIC
    )
    assert np.abs(edits[0][4:68, 72:136] - np.asarray(again)).max() <= 1
    assert np.abs(edits[0][4:68, 4:68] - edits[0][4:68, 72:136]).max() > 0


@pytest.mark.parametrize(
    ("classes", "options", "message"),
    [
        (None, ["--new-class-label", 1], "this network is unconditional"),
        (None, ["--new-guidance-scale", 2], "this network is unconditional"),
        (4, ["--class-label", 1, "--new-class-label", 4], "class labels must be integers in 0..3, not [4]"),
        (4, ["--class-label", 1, "--new-class-label", 1, 2], "2 of class_labels do not fit 1 picture(s)"),
        (4, ["--new-guidance-scale", 2], "this network is class-conditional"),
    ],
)
def test_an_edit_is_refused_before_work(make_unet, pictures, tmp_path, monkeypatch, capsys, classes, options, message):
    pipe = GeneralizedDDIMPipeline(make_unet(channels=3, num_class_embeds=classes), GeneralizedDDIMScheduler())
    pipe.save_pretrained(tmp_path / "model")
    first = ["--class-label", 0] if classes else []
    run("encode", tmp_path / "model", pictures[0], "--steps", 2, *first, "--output", tmp_path / "e")
    monkeypatch.setattr("diffusers.UNet2DModel.forward", lambda *args, **kwargs: pytest.fail("it was called"))
    run("edit", tmp_path / "model", pictures[0], *options, "--output", tmp_path / "out", ok=False)
    assert message in capsys.readouterr().err.splitlines()[-1]
    if options[0] == "--new-class-label":
        file = tmp_path / "e" / "latents.safetensors"
        run("edit", tmp_path / "model", file, *options, "--output", tmp_path / "out", ok=False)
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_pictures_of_another_size_and_mode(model, tmp_path, capsys):
    Image.new("L", (30, 20), 90).save(tmp_path / "wide.jpg")
    run("encode", model, tmp_path / "wide.jpg", "--steps", 2, "--output", tmp_path / "out", ok=False)
    assert "20×30 (height × width), not 8×8 as the network is: crop or resize it" in capsys.readouterr().err
    run("encode", model, tmp_path / "wide.jpg", "--steps", 2, "--resize", "--output", tmp_path / "out")
    assert latents(tmp_path / "out").shape == (1, 3, 8, 8)


def test_half_precision(model, pictures, tmp_path):
    run("encode", model, *pictures, "--dtype", "bfloat16", "--steps", 2, "--output", tmp_path)
    assert latents(tmp_path).dtype == torch.float32


def test_fit(model, tmp_path, capsys):
    fit = ["fit", model, "--steps", 4, 3, "--num", 8, "--batch-size", 4, "--seed", 5, "--output", tmp_path]
    run(*fit)
    said = capsys.readouterr()
    made = [("model", "model"), ("settings", "fit.json")]
    assert said.out.splitlines() == [f"{what}: {tmp_path / name}" for what, name in made]
    assert [line.split(":")[0] for line in said.err.splitlines() if line.startswith("S = ")] == ["S = 3", "S = 4"]
    record = json.loads((tmp_path / "fit.json").read_text())
    assert (record["settings"]["steps"], record["settings"]["seed"]) == ([4, 3], 5)
    better = {S for S, each in record["fitted"].items() if 0 < each["error"] < each["default_error"]}
    pipe = GeneralizedDDIMPipeline.from_pretrained(tmp_path / "model")
    assert type(pipe.scheduler) is MultistepDDIMScheduler
    assert pipe.scheduler.config.fitted_solvers.keys() == better == {"3", "4"}
    run("sample", tmp_path / "model", "--num", 1, "--steps", 3, "--output", tmp_path / "own")
    timesteps = pipe.scheduler.config.fitted_solvers["3"]["timesteps"]
    pipe.scheduler.set_timesteps(3)
    assert pipe.scheduler.timesteps.tolist() == timesteps


def test_fit_is_refused_before_work(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("diffusers.UNet2DModel.forward", lambda *args, **kwargs: pytest.fail("it was called"))
    run("fit", model, "--steps", 3, 0, "--output", tmp_path / "out", ok=False)
    assert capsys.readouterr().err.splitlines()[-1].startswith("ddim-plugin fit: steps must be integers from 1 to")
    (tmp_path / "out" / "model").mkdir(parents=True)
    monkeypatch.setattr(commands, "_load", lambda *args: pytest.fail("it was loaded"))
    run("fit", model, "--steps", 3, "--output", tmp_path / "out", ok=False)
    assert "model exists: choose another --output" in capsys.readouterr().err
    run("fit", model, "--prompt-file", tmp_path / "none.txt", "--output", tmp_path / "other", ok=False)
    assert "No such file" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
