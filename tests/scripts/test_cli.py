"""The ddim-plugin command: as a process once, and from within for the rest."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image
from safetensors.torch import load_file, save_file

import ddim_plugin
from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler, MultistepDDIMScheduler
from ddim_plugin.cli import commands as cli


@pytest.fixture(scope="module")
def model(make_unet, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "model"
    unet = make_unet(channels=3)
    torch.nn.init.normal_(unet.conv_out.weight, std=0.01, generator=torch.Generator().manual_seed(0))
    GeneralizedDDIMPipeline(unet, GeneralizedDDIMScheduler(timestep_spacing="leading")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    for i, each in enumerate(pixels):
        Image.fromarray(each).save(folder / f"{i}.png")
    return folder


def run(command, *arguments, ok=True):
    status = cli.main([command, *map(str, arguments)])
    assert status == (0 if ok else 1)


def latents(folder):
    return load_file(folder / "latents.safetensors")["latents"]


def test_it_is_installed():
    program = shutil.which("ddim-plugin", path=Path(sys.executable).parent)
    assert program is not None
    done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == ddim_plugin.__version__


@pytest.mark.parametrize("command", ["sample", "encode", "reconstruct", "interpolate", "fit"])
def test_help_shows_an_example_that_parses(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main([command, "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    example = next(line.split() for line in text.splitlines() if line.startswith(f"  ddim-plugin {command} "))
    assert cli.parse(example[1:]).command == command
    assert ("--seed SEED" in text) is (command in ("sample", "fit"))


def test_flags_may_stand_anywhere(capsys):
    for words in (["m", "--steps", "5", "a", "b"], ["--steps", "5", "m", "a", "b"], ["m", "a", "b", "--steps", "5"]):
        args = cli.parse(["interpolate", *words])
        assert (args.model, args.images, args.steps) == ("m", ["a", "b"], 5)
    with pytest.raises(SystemExit):
        cli.parse(["interpolate", "m", "a", "b", "--stops", "5"])
    assert "unrecognized arguments: --stops 5" in capsys.readouterr().err


def test_sample(model, tmp_path):
    run("sample", model, "--num", 5, "--steps", 4, "--seed", 7, "--batch-size", 2, "--columns", 3, "--output", tmp_path)
    pipe = GeneralizedDDIMPipeline.from_pretrained(model)
    generators = [torch.Generator().manual_seed(7 + i) for i in range(5)]
    expected = torch.cat([torch.randn(1, 3, 8, 8, generator=g) for g in generators])
    assert torch.equal(latents(tmp_path), expected)
    grid = np.asarray(Image.open(tmp_path / "samples.png"))
    assert grid.shape[0] == 2 * 64 + 3 * 4
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


def test_encode_then_sample_its_latents(model, pictures, tmp_path):
    half = ["--strength", 0.5, "--steps", 10]
    run("encode", model, pictures, *half, "--refine", 8, "--batch-size", 3, "--output", tmp_path)
    record = json.loads((tmp_path / "encode.json").read_text())
    before = (tmp_path / "latents.safetensors").read_bytes()
    run("sample", model, "--latents", tmp_path / "latents.safetensors", "--steps", 2, "--output", tmp_path)
    assert (tmp_path / "latents.safetensors").read_bytes() == before  # its own input is kept
    assert record["images"] == [str(pictures / f"{i}.png") for i in range(4)]
    assert np.array(record["report"]["evaluations"]).shape == (5, 4)
    pipe = GeneralizedDDIMPipeline.from_pretrained(model)
    images = [Image.open(pictures / f"{i}.png") for i in range(4)]
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
    assert (record["settings"]["steps"], record["settings"]["strength"]) == (10, 0.5)
    for flags in (["--strength", 1], ["--steps", 4]):
        run(
            "sample", model, "--latents", tmp_path / "latents.safetensors", *flags, "--output", tmp_path / str(flags[1])
        )
        other = np.asarray(Image.open(tmp_path / str(flags[1]) / "samples.png")).astype(int)
        assert np.abs(other - grid).max() > 20


def test_reconstruct(model, pictures, tmp_path, capsys):
    files = sorted(pictures.iterdir())[:3]
    run("reconstruct", model, *files, "--strength", 0.5, "--steps", 10, "--refine", 8, "--output", tmp_path)
    record = json.loads((tmp_path / "reconstruct.json").read_text())
    assert len(record["mean_squared_error"]) == 3
    assert max(record["mean_squared_error"]) < 1e-6
    grid = np.asarray(Image.open(tmp_path / "reconstruction.png")).astype(int)
    above, below = grid[4:68, -200:], grid[72:136, -200:]
    assert np.abs(above - below).max() <= 2
    said = capsys.readouterr()
    assert "evaluations for an image" in said.err
    assert str(tmp_path / "reconstruction.png") in said.out


def test_interpolate(model, pictures, tmp_path):
    short = ["--steps", 3, "--points", 4]
    run("interpolate", model, "--seeds", 1, 2, *short, "--output", tmp_path / "path")
    run("interpolate", model, "--seeds", 1, 2, 3, 4, *short, "--output", tmp_path / "grid")
    run(
        "interpolate", model, "--latents", tmp_path / "path" / "latents.safetensors", *short, "--output", tmp_path / "l"
    )
    run("interpolate", model, pictures / "0.png", pictures / "1.png", *short, "--output", tmp_path / "images")
    path, grid, again = (np.asarray(Image.open(tmp_path / f / "interpolation.png")) for f in ("path", "grid", "l"))
    assert np.array_equal(path, again)
    assert grid.shape[1] == path.shape[1]
    assert grid.shape[0] > 3 * path.shape[0]
    assert torch.equal(latents(tmp_path / "path")[0], torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(1)))
    assert "report" in json.loads((tmp_path / "images" / "interpolate.json").read_text())


def test_fit_and_the_multistep_method(model, pictures, tmp_path, capsys):
    """A fitted model is used as it was saved; --no-multistep takes DDIM instead."""
    settings = ("--num", 4, "--teacher-steps", 12, "--batch-size", 4)
    run("fit", model, "--steps", 2, 3, *settings, "--output", tmp_path)
    assert "S = 3: distance to the solution" in capsys.readouterr().err
    result = json.loads((tmp_path / "fit.json").read_text())
    assert result["settings"]["steps"] == [2, 3]
    fitted = GeneralizedDDIMPipeline.from_pretrained(tmp_path / "model").scheduler
    assert isinstance(fitted, MultistepDDIMScheduler)
    for S in (2, 3):
        fitted.set_timesteps(S)
        assert fitted.timesteps.tolist() == result["fitted"][str(S)]["timesteps"]

    run("sample", tmp_path / "model", "--num", 2, "--steps", 3, "--output", tmp_path / "own")
    run("sample", model, "--num", 2, "--steps", 3, "--multistep", "--output", tmp_path / "asked")
    run("sample", tmp_path / "model", "--num", 2, "--steps", 3, "--no-multistep", "--output", tmp_path / "not")
    made = [np.asarray(Image.open(tmp_path / name / "samples.png")) for name in ("own", "asked", "not")]
    assert not np.array_equal(made[0], made[2])
    assert not np.array_equal(made[1], made[2])
    latent = tmp_path / "asked" / "latents.safetensors"
    run("sample", model, "--latents", latent, "--output", tmp_path / "again")  # by the method they came with
    assert np.array_equal(np.asarray(Image.open(tmp_path / "again" / "samples.png")), made[1])

    run("reconstruct", tmp_path / "model", pictures, "--steps", 3, "--refine", 4, "--output", tmp_path / "back")
    assert len(json.loads((tmp_path / "back" / "reconstruct.json").read_text())["report"]["timesteps"]) == 1
    run("fit", model, "--steps", 2, *settings, "--output", tmp_path, ok=False)
    assert "exists: choose another --output, or pass --overwrite" in capsys.readouterr().err
    run("fit", model, "--steps", 2, *settings, "--overwrite", "--output", tmp_path)
    assert list(json.loads((tmp_path / "fit.json").read_text())["fitted"]) == ["2"]
    run("fit", tmp_path / "model", "--steps", 2, *settings, "--overwrite", "--output", tmp_path, ok=False)
    assert "would put the fitted model in the place of" in capsys.readouterr().err
    (tmp_path / "other" / "model").mkdir(parents=True)
    (tmp_path / "other" / "model" / "code.py").write_text("precious")
    run("fit", model, "--steps", 2, *settings, "--overwrite", "--output", tmp_path / "other", ok=False)
    assert "is no model that --overwrite may replace" in capsys.readouterr().err
    assert (tmp_path / "other" / "model" / "code.py").exists()
    run("fit", model, "--steps", 2, *settings, "--dtype", "bfloat16", "--output", tmp_path / "half")
    weights = [
        GeneralizedDDIMPipeline.from_pretrained(folder).unet.conv_in.weight
        for folder in (model, tmp_path / "half" / "model")
    ]
    assert torch.equal(*weights)
    run("fit", model, "--steps", 0, "--output", tmp_path / "bad", ok=False)
    assert "steps must be integers from 1 to 1000" in capsys.readouterr().err
    assert not (tmp_path / "bad").exists()


def test_a_stock_model_opens_without_clipping(make_unet, pictures, tmp_path, capsys):
    DDPMPipeline(make_unet(channels=3), DDPMScheduler(clip_sample=True)).save_pretrained(tmp_path / "ddpm")
    run("encode", tmp_path / "ddpm", pictures, "--steps", 3, "--output", tmp_path / "out")
    assert "note: clip_sample=False, the model has True" in capsys.readouterr().err


def test_labels_and_guidance(make_unet, pictures, tmp_path):
    pipe = GeneralizedDDIMPipeline(make_unet(channels=3, num_class_embeds=4), GeneralizedDDIMScheduler())
    pipe.save_pretrained(tmp_path / "model")
    guided = ["--guidance-scale", 2, "--steps", 2]
    run("sample", tmp_path / "model", "--num", 3, "--class-label", 0, 1, 2, *guided, "--output", tmp_path / "s")
    run("reconstruct", tmp_path / "model", pictures, "--class-label", 1, *guided, "--output", tmp_path / "r")
    run("interpolate", tmp_path / "model", "--seeds", 0, 1, "--class-label", 1, *guided, "--output", tmp_path / "i")


def test_pictures_of_another_size_and_mode(model, tmp_path, capsys):
    Image.new("L", (30, 20), 90).save(tmp_path / "wide.jpg")
    run("encode", model, tmp_path / "wide.jpg", "--steps", 2, "--output", tmp_path / "out", ok=False)
    assert "is 30×20, the network takes 8×8 (width × height): crop and resize it (--resize)" in capsys.readouterr().err
    run("encode", model, tmp_path / "wide.jpg", "--steps", 2, "--resize", "--output", tmp_path / "out")
    assert latents(tmp_path / "out").shape == (1, 3, 8, 8)


def test_half_precision(model, pictures, tmp_path):
    run("encode", model, pictures, "--dtype", "bfloat16", "--steps", 2, "--output", tmp_path)
    assert latents(tmp_path).dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "MODEL", "--num", "0"], "--num must be positive, not 0"),
        (["sample", "MODEL", "--batch-size", "0"], "--batch-size must be positive"),
        (["sample", "PICTURES"], "is no model: it has no model_index.json"),
        (["sample", "MODEL", "--latents", "none.safetensors"], "there is no file none.safetensors"),
        (["sample", "MODEL", "--latents", "PICTURES/0.png"], "0.png"),
        (["sample", "MODEL", "--class-label", "1"], "unconditional"),
        (["sample", "MODEL", "--strength", "0.5"], "--strength needs --latents"),
        (["sample", "MODEL", "--latents", "FLAT"], "they must be (B, C, H, W)"),
        (["sample", "MODEL", "--latents", "FLAT", "--eta", "1"], "they must be (B, C, H, W)|leave it out"),
        (["sample", "MODEL", "--latents", "TEXT"], "holds no latents: it has text"),
        (["sample", "MODEL", "--seed", "99999999999999999999"], "a seed must fit 64 bits"),
        (["sample", "MODEL", "--device", "nonsense"], "--device nonsense cannot be used here"),
        (["sample", "MODEL", "--output", "PICTURES/0.png/sub"], "is no folder one may write to"),
        (["encode", "MODEL", "ODD/broken.png"], "cannot read the image"),
        (["encode", "MODEL", "ODD/clear.png"], "has transparency"),
        (["encode", "MODEL", "ODD/deep.png"], "more than 8 bits: scale it to 0..255 first"),
        (["interpolate", "MODEL", "--seeds", "1", "2", "--strength", "0.5"], "--strength needs images or --latents"),
        (["sample", "MODEL", "--num", "3", "--class-label", "1", "2"], "2 class labels for 3 images"),
        (["sample", "MODEL", "--steps", "1001"], "must be an integer from 1 to 1000"),
        (["sample", "./nowhere"], "there is no folder ./nowhere"),
        (["interpolate", "MODEL", "--seeds", "1", "2", "--refine", "3"], "--refine and --resize are for images"),
        (["encode", "MODEL", "none.png"], "there is no file none.png"),
        (["encode", "MODEL", "EMPTY"], "there is no image in"),
        (["encode", "MODEL", "PICTURES/0.png", "--refine", "-1"], "refinement_steps must be"),
        (["encode", "MODEL", "PICTURES/0.png", "--output", "PICTURES/0.png"], "is a file: give a folder"),
        (["interpolate", "MODEL"], "give the ends in one way"),
        (["interpolate", "MODEL", "PICTURES/0.png", "--seeds", "1", "2"], "give the ends in one way"),
        (["interpolate", "MODEL", "--seeds", "1", "2", "3"], "two ends for a path or four for a grid, not 3"),
        (["interpolate", "MODEL", "--seeds", "1", "2", "--points", "1"], "--points must be at least 2"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(model, pictures, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    odd = tmp_path / "odd"
    for folder in (tmp_path / "empty", odd):
        folder.mkdir()
    (odd / "broken.png").write_bytes((pictures / "0.png").read_bytes()[:100])
    Image.new("RGBA", (8, 8)).save(odd / "clear.png")
    Image.fromarray(np.full((8, 8), 30000, np.uint16)).save(odd / "deep.png")
    save_file({"latents": torch.zeros(())}, odd / "flat.safetensors")
    save_file({"text": torch.zeros(1)}, odd / "text.safetensors")
    places = {"MODEL": model, "PICTURES": pictures, "EMPTY": tmp_path / "empty", "ODD": odd}
    places |= {"FLAT": odd / "flat.safetensors", "TEXT": odd / "text.safetensors"}
    for name, place in places.items():
        arguments = [argument.replace(name, str(place)) for argument in arguments]
    assert cli.main(arguments) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ddim-plugin")]
    assert len(said) == 1
    assert any(each in said[0] for each in message.split("|"))
    assert not (tmp_path / "out").exists()


def test_an_interrupt_is_one_line(model, tmp_path, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(GeneralizedDDIMPipeline, "__call__", interrupt)
    assert cli.main(["sample", str(model), "--num", "1", "--output", str(tmp_path / "out")]) == 130
    assert "interrupted, nothing was written" in capsys.readouterr().err
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


def test_a_missing_hub_model_is_one_line(tmp_path, monkeypatch, capsys):
    """No network here: the Hub cannot be reached, and nothing is in the cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    run("sample", "nobody/nothing", "--output", tmp_path, ok=False)
    assert "ddim-plugin sample: " in capsys.readouterr().err
