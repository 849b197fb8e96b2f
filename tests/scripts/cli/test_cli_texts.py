"""The commands with text-to-image models, tiny ones of four families."""

import io
import json

import diffusers
import numpy as np
import pytest
import torch
from cli_runs import latents, run
from PIL import Image
from tqdm import tqdm

from ddim_plugin import GeneralizedDDIMScheduler, Inverted, MultistepDDIMScheduler, invert, restore_scheduler
from ddim_plugin.cli import commands

FAMILIES = ["SD", "SDXL", "SD3", "Flux"]
SIZE = ["--height", 16, "--width", 16]  # that of Flux is 1024 by default
SHORT = ["--steps", 3, "--guidance-scale", 1.5]


@pytest.fixture
def cat(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "cat.png")
    return tmp_path / "cat.png"


def opened(model):
    pipe = diffusers.DiffusionPipeline.from_pretrained(model)
    pipe.scheduler = GeneralizedDDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(folder, name="samples"):
    return np.asarray(Image.open(folder / f"{name}.png")).astype(int)


@pytest.mark.parametrize("family", FAMILIES)
def test_sample_and_what_its_latents_decode_to(family, saved, tmp_path, capsys):
    model, texts = saved(family), ["--prompt", "a cat", "--prompt", "a dog"]
    one = [*SHORT, *SIZE, "--batch-size", 1, "--seed", 7]
    run("sample", model, *texts, "--num", 2, *one, "--output", tmp_path / "first")
    made = [("2 images", "samples.png"), ("their latents", "latents.safetensors"), ("settings", "sample.json")]
    said = capsys.readouterr().out.splitlines()
    assert said == [f"{what}: {tmp_path / 'first' / name}" for what, name in made]
    file = tmp_path / "first" / "latents.safetensors"
    found = Inverted.load(file)
    call = {"prompt": ["a cat", "a dog"], "guidance_scale": 1.5, "num_inference_steps": 3}
    assert found.settings["call"] == call | {"height": 16, "width": 16}
    assert found.settings["scheduler"]["_ddim_plugin"]["class"] == GeneralizedDDIMScheduler.__name__

    pipe = opened(model)
    seed = torch.Generator().manual_seed(8)
    image = pipe("a dog", height=16, width=16, num_inference_steps=3, guidance_scale=1.5, generator=seed).images[0]
    drawn = picture(tmp_path / "first")
    assert np.abs(drawn[2:66, 68:132] - np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC))).max() <= 1

    run("sample", model, "--latents", file, "--batch-size", 1, "--output", tmp_path / "again")
    assert np.array_equal(picture(tmp_path / "again"), drawn)
    assert json.loads((tmp_path / "again" / "sample.json").read_text())["call"] == found.settings["call"]
    run("edit", model, file, "--new-prompt", "a fox", "--output", tmp_path / "edited")
    cells = picture(tmp_path / "edited", "edited")
    assert np.abs(cells[2:66, 2:66] - drawn[2:66, 2:66]).max() <= 1
    assert np.abs(cells[2:66, 68:132] - cells[2:66, 2:66]).max() > 0


@pytest.mark.parametrize("family", ["SD", "Flux"])
def test_noise_does_not_depend_on_the_batch(family, saved, tmp_path):
    pictures = []
    for eta, size in ((1, 1), (1, 3), (0, 3)):
        folder, few = tmp_path / f"{eta}{size}", ["--num", 3, "--steps", 3, *SIZE]
        run("sample", saved(family), "--prompt", "a", *few, "--eta", eta, "--batch-size", size, "--output", folder)
        pictures.append(picture(folder))
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
    assert np.abs(pictures[0] - pictures[2]).max() > 9
    run("sample", saved(family), "--latents", tmp_path / "13" / "latents.safetensors", "--output", tmp_path / "again")
    assert np.array_equal(picture(tmp_path / "again"), pictures[2])  # η = 0


def test_timesteps_of_a_flow(saved, tmp_path):
    """The call of the pipeline has no timesteps: the scheduler has."""
    few = ["--prompt", "a cat", "--num", 1]
    run("sample", saved("SD3"), *few, "--timesteps", 1000, 512.5, 20.25, "--output", tmp_path / "first")
    found, pipe = Inverted.load(tmp_path / "first" / "latents.safetensors"), opened(saved("SD3"))
    assert found.settings["call"]["timesteps"] == [1000, 512.5, 20.25]
    run("sample", saved("SD3"), *few, "--steps", 3, "--output", tmp_path / "three")
    assert torch.equal(latents(tmp_path / "three"), found.latents)
    x, scheduler = found.latents, pipe.scheduler
    text = pipe.encode_prompt("a cat", None, None)
    scheduler.set_timesteps(timesteps=[1000, 512.5, 20.25])
    with torch.no_grad():
        for t in scheduler.timesteps:
            both = [torch.cat([text[k + 1], text[k]]) for k in (0, 2)]
            null, full = pipe.transformer(torch.cat([x, x]), both[0], both[1], t.expand(2)).sample.chunk(2)
            x = scheduler.step(null + 7.0 * (full - null), t, x).prev_sample
    assert torch.allclose(found.decode(pipe, output_type="latent"), x, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_reconstruct(family, saved, cat, tmp_path, capsys):
    """The error is that of the VAE: latents come back."""
    model = saved(family)
    words = ["--prompt", "a cat", "--steps", 7, "--strength", 0.6, "--guidance-scale", 1, "--refine", 9]
    run("reconstruct", model, cat, *words, "--output", tmp_path / "first")
    said, names = capsys.readouterr(), ("reconstructed.png", "latents.safetensors", "reconstruct.json")
    assert [line.split(": ")[1] for line in said.out.splitlines()] == [str(tmp_path / "first" / name) for name in names]
    assert "error of the reconstructions (RMSE in [0, 1])" in said.err
    record, pipe = json.loads((tmp_path / "first" / "reconstruct.json").read_text()), opened(model)
    assert np.max(record["report"]["residual"]) < 1e-3
    image = torch.tensor(np.asarray(Image.open(cat))).movedim(-1, 0)[None] / 255
    with torch.no_grad():
        again = pipe.vae.decode(pipe.vae.encode(2 * image - 1).latent_dist.mode()).sample.clamp(-1, 1) / 2 + 0.5
    assert record["errors"] == [pytest.approx(float((again - image).square().mean().sqrt()), abs=1e-3)]
    found = Inverted.load(tmp_path / "first" / "latents.safetensors")
    call = {"num_inference_steps": 7, "guidance_scale": 1.0}
    assert torch.allclose(found.latents, invert(pipe, Image.open(cat), "a cat", 9, 0.6, **call).latents, atol=1e-3)
    assert found.settings["call"] == call | {"prompt": "a cat", "height": 16, "width": 16}
    shown = picture(tmp_path / "first", "reconstructed")
    expected = Image.fromarray((255 * again[0].movedim(0, -1)).round().byte().numpy()).resize(
        (64, 64), Image.Resampling.BICUBIC
    )
    assert shown.shape[1] == 2 + 2 * 66
    assert np.abs(shown[2:66, 68:132] - np.asarray(expected)).max() <= 2


def test_edit(text_model, cat, tmp_path, capsys):
    words = ["--prompt", "a cat", "--new-prompt", "a dog", "--new-guidance-scale", 9]
    run("edit", text_model, cat, *words, *SHORT, "--refine", 9, "--output", tmp_path / "first")
    said, names = capsys.readouterr(), ("edited.png", "latents.safetensors", "edit.json")
    assert [line.split(": ")[1] for line in said.out.splitlines()] == [str(tmp_path / "first" / name) for name in names]
    assert "evaluations for an image" in said.err
    whole = picture(tmp_path / "first", "edited")
    cells = [whole[-66:-2, i : i + 64] for i in (2, 68, 134)]
    assert np.abs(cells[1] - cells[2]).max() > 0
    record = json.loads((tmp_path / "first" / "edit.json").read_text())
    assert record["images"] == [str(cat)]
    assert np.shape(record["report"]["residual"]) == (3, 1)
    settings = record["settings"]
    assert (settings["prompt"], settings["new_prompt"], settings["refine"]) == (["a cat"], ["a dog"], 9)
    expected = invert(opened(text_model), Image.open(cat), "a cat", 9, num_inference_steps=3, guidance_scale=1.5)
    assert torch.allclose(latents(tmp_path / "first"), expected.latents, atol=1e-4)
    kept = Inverted.load(tmp_path / "first" / "latents.safetensors").settings
    assert kept["call"] == expected.settings["call"]
    assert kept["scheduler"] == expected.settings["scheduler"]

    file = tmp_path / "first" / "latents.safetensors"
    words = ["--new-prompt", "a dog", "--new-guidance-scale", 9]
    run("edit", text_model, file, *words, "--output", tmp_path / "again")
    assert torch.equal(latents(tmp_path / "again"), latents(tmp_path / "first"))
    again = picture(tmp_path / "again", "edited")
    assert np.abs(again[-66:-2, 68:132] - cells[2]).max() <= 1


def test_many_images_and_the_scheduler(text_model, cat, tmp_path):
    Image.new("L", (40, 30), 90).save(tmp_path / "wide.png")
    texts = ["--prompt", "a cat", "--prompt", "a dog", "--multistep", "--strength", 0.5, "--steps", 6]
    for size in (1, 2):
        files = [cat, tmp_path / "wide.png", "--resize", "--batch-size", size]
        run("encode", text_model, *files, *texts, "--output", tmp_path / str(size))
    one, both = (Inverted.load(tmp_path / name / "latents.safetensors") for name in "12")
    assert both.latents.shape == (2, 4, 8, 8)
    assert torch.allclose(one.latents, both.latents, atol=1e-4)
    assert one.report.residual.shape == both.report.residual.shape == (1, 2)
    assert np.allclose(one.report.latent_std, both.report.latent_std, atol=1e-3)
    assert one.settings == both.settings
    assert both.settings["strength"] == 0.5
    assert both.settings["call"]["prompt"] == ["a cat", "a dog"]
    assert both.settings["scheduler"]["_ddim_plugin"]["class"] == MultistepDDIMScheduler.__name__


@pytest.mark.parametrize("family", ["SDXL", "Flux"])
def test_half_precision_and_one_step(family, saved, cat, tmp_path):
    """Latents in the type of the pipeline, which decode in it, and in another."""
    half, few = ["--dtype", "bfloat16"], ["--prompt", "a cat", "--steps", 1]
    run("sample", saved(family), *few, *SIZE, "--num", 1, *half, "--output", tmp_path / "first")
    file = tmp_path / "first" / "latents.safetensors"
    assert latents(tmp_path / "first").dtype == torch.bfloat16
    for name, dtype in (("half", half), ("whole", [])):
        run("sample", saved(family), "--latents", file, *dtype, "--output", tmp_path / name)
    drawn, half_again, whole = (picture(tmp_path / name) for name in ("first", "half", "whole"))
    assert np.array_equal(drawn, half_again)
    assert 0 < np.abs(drawn - whole).max() < 40
    run("encode", saved(family), cat, *few, *half, "--output", tmp_path / "encoded")
    assert latents(tmp_path / "encoded").dtype == torch.bfloat16


def test_progress_ends_with_the_work(text_model, model, cat, pictures, tmp_path, monkeypatch):
    bars = []

    def bar(**settings):
        bars.append(tqdm(**settings | {"disable": False, "file": io.StringIO()}))
        return bars[-1]

    monkeypatch.setattr(commands, "tqdm", bar)
    some = ["--num", 3, "--batch-size", 2]
    run("sample", text_model, "--prompt", "a", *some, *SHORT, "--output", tmp_path / "a")
    run("edit", text_model, cat, "--new-prompt", "a", *SHORT, "--output", tmp_path / "b")
    run("sample", model, *some, "--steps", 3, "--output", tmp_path / "c")
    run("reconstruct", model, pictures[0], "--steps", 3, "--refine", 0, "--output", tmp_path / "d")
    assert [each.total for each in bars] == [2, 7, 2, 2]
    assert [each.n for each in bars] == [pytest.approx(total) for total in (2, 7, 2, 2)]
    assert " left" in bars[0].fp.getvalue()


@pytest.mark.parametrize("family", FAMILIES)
def test_fit(family, saved, tmp_path):
    """The weights are saved as they were loaded, whatever the type of the computation."""
    (tmp_path / "prompts.txt").write_text("a dog\n")
    words = ["--prompt", "a cat", "--prompt-file", tmp_path / "prompts.txt", "--guidance-scale", 1.5, *SIZE]
    words += ["--dtype", "bfloat16"] if family == "SD" else []
    run("fit", saved(family), "--steps", 2, "--num", 4, *words, "--output", tmp_path / "out")
    record = json.loads((tmp_path / "out" / "fit.json").read_text())
    assert record["settings"]["prompt"] == ["a cat", "a dog"]
    before, pipe = (
        diffusers.DiffusionPipeline.from_pretrained(each) for each in (saved(family), tmp_path / "out" / "model")
    )
    networks = [getattr(each, "unet", None) or each.transformer for each in (before, pipe)]
    assert all(torch.equal(*pair) for pair in zip(*(network.parameters() for network in networks), strict=True))
    assert restore_scheduler(pipe).scheduler.config.fitted_solvers.keys() == {"2"}
    assert pipe.scheduler.config.fitted_solvers["2"]["guidance_scale"] == 1.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "SD"], "Provide either `prompt` or `prompt_embeds`"),
        (["sample", "SD", "--prompt", "a", "--class-label", 1], "has no class_labels: leave out --class-label"),
        (["sample", "SD", "--prompt", "a", "--height", 0], "--height must be an integer of at least 1"),
        (
            ["sample", "SD", "--prompt", "a", "--num", 3, "--prompt", "b"],
            "2 of prompt do not fit 3 picture(s): pass one, or one for each",
        ),
        (["sample", "PIXELS", "--prompt", "a"], "GeneralizedDDIMPipeline has no prompt: leave out --prompt"),
        (["sample", "SD", "--prompt", "a", "--height", 16], "one of --height and --width is missing: pass both"),
        (["sample", "PIXELS", "--height", 8], "GeneralizedDDIMPipeline has no height: leave out --height"),
        (["sample", "OTHER", "--prompt", "a"], "StableDiffusionImg2ImgPipeline does not begin with latents"),
        (["sample", "PIXELS", "--num", 3, "--class-label", 1, 2], "2 of class_labels do not fit 3 picture(s)"),
        (["sample", "SD", "--latents", "FILE", "--num", 3], "--num has no effect on latents: leave it out"),
        (["sample", "SD", "--latents", "FILE", "--spacing", "linear"], "--spacing has no effect on latents"),
        (
            ["sample", "SD", "--latents", "FLAT"],
            "these latents have no settings",
        ),
        (["encode", "SD", "ODD"], "multiples of 2"),
        (["encode", "PIXELS", "CAT", "--prompt", "a"], "GeneralizedDDIMPipeline has no prompt"),
        (
            ["reconstruct", "SD", "CAT", "--strength", 2],
            "strength must lie in (0, 1], tolerance be 0 or more, not 2 and",
        ),
        (["edit", "SD", "CAT", "--prompt", "a"], "nothing changes: pass --new-prompt"),
        (
            ["edit", "SD", "CAT", "--prompt", "a", "--prompt", "b", "--new-prompt", "c"],
            "2 of prompt do not fit 1 picture(s)",
        ),
        (["edit", "SD", "CAT", *["--new-prompt", "c"] * 3], "3 of prompt do not fit 1 picture(s)"),
        (
            ["edit", "SD", "FILE", "--new-prompt", "c", "--guidance-scale", 2],
            "--guidance-scale has no effect on latents",
        ),
        (["edit", "SD", "CAT", "FILE", "--new-prompt", "c"], "cannot read the image"),
        (["edit", "SD", "FLAT", "--new-prompt", "c"], "these latents have no settings"),
        (["fit", "SD", "--steps", 2, "--num", 4], "Provide either `prompt` or `prompt_embeds`"),
        (["fit", "PIXELS", "--prompt", "a"], "GeneralizedDDIMPipeline has no prompt: leave out --prompt"),
        (["fit", "PIXELS", "--prompt-file", "TEXTS"], "has no prompt: leave out --prompt-file"),
    ],
)
def test_errors(saved, model, cat, tmp_path, capsys, arguments, message, few_latents):
    places = {"SD": saved("SD"), "PIXELS": model, "CAT": cat, "ODD": tmp_path / "odd.png"} | few_latents
    Image.new("RGB", (17, 16)).save(tmp_path / "odd.png")
    places["TEXTS"] = tmp_path / "texts.txt"
    places["TEXTS"].write_text("a cat\n")
    words = [places.get(word, word) for word in arguments]
    run(*words, "--output", tmp_path / "out", ok=False)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ddim-plugin")]
    assert len(said) == 1
    assert message in said[0]
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def few_latents(saved, tmp_path_factory):
    """Files of latents, and folders of other pipelines."""
    folder = tmp_path_factory.mktemp("files")
    scheduler = json.loads(GeneralizedDDIMScheduler().to_json_string())
    found = {"FILE": folder / "z.safetensors", "FLAT": folder / "flat.safetensors"}
    settings = {"scheduler": scheduler, "strength": 1.0, "call": {}, "left_out": []}
    for name, known in (("FILE", settings), ("FLAT", {})):
        Inverted(torch.zeros(1, 4, 8, 8), None, known).save(found[name])
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(saved("SD"))
    other.save_pretrained(folder / "OTHER")
    found["OTHER"] = folder / "OTHER"
    return found
