"""The script that trains a small Stable Diffusion of digits: a tiny run, one that is continued, and bad input."""

import json
import os
import signal

import digits
import guard
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from latent.captions import FORMS, LENGTH, NAMES, STYLES, caption, find_styles, write_tokenizer
from latent.fitting import Schedule, fit
from PIL import Image
from safetensors.torch import load_file
from trainer.settings import build

TINY = {"data": "digits", "autoencoder_channels": (4, 4, 8), "channels": (8, 16), "autoencoder_steps": 3, "steps": 3}
TINY |= {"autoencoder_batch": 4, "batch_size": 8, "save_every": 2, "test_split": "test", "samples": 1}


pytestmark = pytest.mark.usefixtures("one_thread")


def run(output, **settings):
    return digits.main(build(digits.DigitsConfig, TINY | {"output": str(output)} | settings))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits") / "tiny"
    run(folder)
    return folder


def test_the_stock_pipeline_opens_what_was_trained(trained):
    pipe = StableDiffusionPipeline.from_pretrained(trained, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    for networks in (pipe, pipe.to(torch.bfloat16)):
        images = networks(["a seven", "the bold digit 3"], num_inference_steps=2).images
        assert [image.size for image in images] == [(32, 32)] * 2
    assert pipe.scheduler.config.steps_offset == 1
    assert (pipe.vae_scale_factor, pipe.unet.config.sample_size) == (4, 8)


def test_the_folder_is_small_and_complete(trained):
    held = {path.relative_to(trained).as_posix() for path in trained.rglob("*") if path.is_file()}
    assert held >= {"model_index.json", "samples.png", "training.json", "tokenizer/vocab.json", "tokenizer/merges.txt"}
    assert not [name for name in held if name.endswith((".pt", ".lock", ".part", ".py"))]
    for name in ("vae", "unet"):
        weights = load_file(trained / name / "diffusion_pytorch_model.safetensors")
        assert {each.dtype for each in weights.values()} == {torch.float16}
    said = json.loads((trained / "training.json").read_text())
    assert said["denoiser"]["pictures_seen"] == 24
    assert 0 < said["autoencoder"]["rms_error"] < 2
    assert 1e-3 < AutoencoderKL.from_pretrained(trained / "vae").config.scaling_factor < 1e3


@pytest.fixture
def no_signal_stays():
    """Forget the signals of a test: the next run in this process would end at once."""
    kinds = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    before = {number: signal.signal(number, signal.SIG_DFL) for number in kinds}  # of a script in an earlier test
    guard.signals.SIGNALS.__init__()
    yield
    guard.signals.SIGNALS.__init__()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("no_signal_stays")
@pytest.mark.parametrize("number", [2, 5])
def test_a_run_that_was_ended_continues(trained, number, tmp_path, monkeypatch):
    """In the autoencoder or in the U-Net, with the weights of a run that was not ended."""
    add, calls = torch.optim.AdamW.step, []

    def step(optimizer, *arguments):
        calls.append(number)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return add(optimizer, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(guard.Ended):
        run(tmp_path / "ended")
    assert not (tmp_path / "ended" / "model_index.json").exists()
    with pytest.raises(ValueError, match=r"autoencoder.pt is of a run with other settings. Choose another output"):
        run(tmp_path / "ended", seed=1)
    done = run(tmp_path / "ended")
    assert done["sha256"] == json.loads((trained / "training.json").read_text())["sha256"]


def test_bad_input(trained, tmp_path):
    with pytest.raises(ValueError, match="holds a finished pipeline. Choose another output"):
        run(trained)
    for label in "01":
        (tmp_path / "two" / label).mkdir(parents=True)
        Image.new("L", (8, 8), 90).save(tmp_path / "two" / label / "a.png")
    with pytest.raises(ValueError, match="has no digits of at most 32×32 in ten classes. Choose other data"):
        run(tmp_path / "out", data=str(tmp_path / "two"))
    for name in ("steps", "autoencoder_batch"):
        with pytest.raises(ValueError, match=f"{name} must be positive, not 0"):
            run(tmp_path / "out", **{name: 0})
    with pytest.raises(ValueError, match=r"no_prompt must be in \[0, 1\], not 1.5"):
        run(tmp_path / "out", no_prompt=1.5)
    with pytest.raises(ValueError, match=r"autoencoder_channels must be three multiples of 4, not \(4, 6, 8\)"):
        run(tmp_path / "out", autoencoder_channels=(4, 6, 8))
    with pytest.raises(ValueError, match=r"channels must be two multiples of 8, not \(8,\)"):
        run(tmp_path / "out", channels=(8,))
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_ends_training(tmp_path):
    layer = torch.nn.Linear(1, 1)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 1. Lower the learning rate"):
        fit(tmp_path / "x.pt", {}, [layer], Schedule(2, 0.1, 0.9, 1, 0), lambda *_: layer.weight.sum() * float("nan"))
    assert list(tmp_path.iterdir()) == []


def test_each_word_is_a_token(tmp_path):
    tokenizer, rng = write_tokenizer(tmp_path / "tokenizer"), np.random.default_rng(0)
    for word in (*NAMES, *"0123456789", "a", "an", "digit", "number", "handwritten", "picture", "thin", "bold"):
        assert tokenizer.tokenize(word) == [f"{word}</w>"]
    found = {caption(label, style, rng) for label in range(10) for style in range(3) for _ in range(2000)}
    assert len(found) == 10 * 2 * len(FORMS) * len(STYLES)
    assert max(len(tokenizer(text).input_ids) for text in found) <= LENGTH
    assert {"7", "an eight", "the thin digit 3", "a bold eight"} <= found
    assert tokenizer("").input_ids == [len(tokenizer) - 2, len(tokenizer) - 1]


def test_styles_are_thirds_of_a_class():
    images = torch.arange(12, dtype=torch.uint8).view(12, 1, 1, 1)
    labels = np.array([0] * 6 + [1] * 6)
    assert find_styles(images, labels).tolist() == [0, 0, 1, 1, 2, 2] * 2
