"""The commands invert and edit, on a tiny Stable Diffusion."""

import json

import diffusers
import numpy as np
import pytest
import torch
from cli_runs import latents, run
from PIL import Image

from ddim_plugin import GeneralizedDDIMScheduler, Inverted, MultistepDDIMScheduler, invert

SHORT = ["--steps", 3, "--guidance-scale", 1.5]


@pytest.fixture
def cat(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "cat.png")
    return tmp_path / "cat.png"


def test_edit(text_model, cat, tmp_path, capsys):
    words = ["--prompt", "a cat", "--new-prompt", "a dog", "--new-guidance-scale", 9]
    run("edit", text_model, cat, *words, *SHORT, "--refine", 9, "--output", tmp_path / "first")
    said, names = capsys.readouterr(), ("edited.png", "latents.safetensors", "edit.json")
    assert said.out.split() == [str(tmp_path / "first" / name) for name in names]
    assert "evaluations for an image" in said.err
    picture = np.asarray(Image.open(tmp_path / "first" / "edited.png")).astype(int)
    cells = [picture[-66:-2, i : i + 64] for i in (2, 68, 134)]
    assert np.abs(cells[1] - cells[2]).max() > 0
    record = json.loads((tmp_path / "first" / "edit.json").read_text())
    assert record["images"] == [str(cat)]
    assert np.shape(record["report"]["residual"]) == (3, 1)
    settings = record["settings"]
    assert (settings["prompt"], settings["new_prompt"], settings["refine"]) == (["a cat"], ["a dog"], 9)
    pipe = diffusers.DiffusionPipeline.from_pretrained(text_model)
    pipe.scheduler = GeneralizedDDIMScheduler.from_config(pipe.scheduler.config)
    expected = invert(pipe, Image.open(cat), "a cat", 9, num_inference_steps=3, guidance_scale=1.5)
    assert torch.allclose(latents(tmp_path / "first"), expected.latents, atol=1e-4)
    kept = Inverted.load(tmp_path / "first" / "latents.safetensors").settings
    assert kept["call"] == expected.settings["call"] | {"prompt": ["a cat"]}
    assert kept["scheduler"] == expected.settings["scheduler"]

    file = tmp_path / "first" / "latents.safetensors"
    words = ["--new-prompt", "a dog", "--new-guidance-scale", 9]
    run("edit", text_model, file, *words, "--output", tmp_path / "again")
    assert torch.equal(latents(tmp_path / "again"), latents(tmp_path / "first"))
    again = np.asarray(Image.open(tmp_path / "again" / "edited.png")).astype(int)
    assert np.abs(again[-66:-2, 68:132] - cells[2]).max() <= 1


def test_invert_then_edit(text_model, cat, tmp_path, capsys):
    run("invert", text_model, cat, "--prompt", "a cat", *SHORT, "--refine", 9, "--output", tmp_path / "first")
    said = capsys.readouterr()
    assert said.out.split() == [str(tmp_path / "first" / name) for name in ("latents.safetensors", "invert.json")]
    assert "evaluations for an image" in said.err
    record = json.loads((tmp_path / "first" / "invert.json").read_text())
    assert (record["command"], record["images"], np.shape(record["report"]["residual"])) == (
        "invert",
        [str(cat)],
        (3, 1),
    )
    file = tmp_path / "first" / "latents.safetensors"
    found, pipe = Inverted.load(file), diffusers.DiffusionPipeline.from_pretrained(text_model)
    assert (found.settings["call"]["prompt"], found.settings["call"]["guidance_scale"]) == (["a cat"], 1.5)
    pipe.scheduler = GeneralizedDDIMScheduler.from_config(pipe.scheduler.config)
    expected = invert(pipe, Image.open(cat), "a cat", 9, num_inference_steps=3, guidance_scale=1.5)
    assert torch.allclose(found.latents, expected.latents, atol=1e-4)

    run("edit", text_model, file, "--new-prompt", "a dog", "--output", tmp_path / "again")
    assert torch.equal(latents(tmp_path / "again"), found.latents)
    assert (tmp_path / "again" / "edited.png").is_file()


def test_many_images_and_the_scheduler(text_model, cat, tmp_path):
    Image.new("L", (40, 30), 90).save(tmp_path / "wide.png")
    texts = ["--prompt", "a cat", "--prompt", "a dog", "--new-prompt", "a fox"]
    texts += ["--multistep", "--strength", 0.5, "--steps", 6]
    run("edit", text_model, cat, tmp_path / "wide.png", "--resize", *texts, "--output", tmp_path / "out")
    inverted = Inverted.load(tmp_path / "out" / "latents.safetensors")
    assert inverted.latents.shape == (2, 4, 8, 8)
    assert inverted.settings["strength"] == 0.5
    assert inverted.settings["call"]["prompt"] == ["a cat", "a dog"]
    assert inverted.settings["scheduler"]["_ddim_plugin"]["class"] == MultistepDDIMScheduler.__name__


def test_errors(text_model, model, cat, tmp_path, capsys):
    Image.new("RGB", (17, 16)).save(tmp_path / "odd.png")
    run("encode", model, cat, "--resize", "--steps", 2, "--output", tmp_path / "other")
    other = tmp_path / "other" / "latents.safetensors"
    for folder, words, message in (
        (text_model, [tmp_path / "odd.png"], "multiples of 2"),
        (text_model, [cat, "--strength", 2], "strength must lie in (0, 1], tolerance be 0 or more, not 2.0 and"),
        (text_model, [cat, "--prompt", "a", "--prompt", "b"], "2 of --prompt for 1 images"),
        (model, [cat], "DDIMPipeline does not begin with latents"),
        (text_model, [other], "--guidance-scale has no effect on latents"),
        (text_model, [cat, other], "cannot read the image"),
    ):
        run("edit", folder, *words, "--new-prompt", "a dog", *SHORT, "--output", tmp_path / "out", ok=False)
        assert message in capsys.readouterr().err
    run("edit", text_model, other, "--new-prompt", "a dog", "--output", tmp_path / "out", ok=False)
    assert "latents.safetensors has no settings of an inversion" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
