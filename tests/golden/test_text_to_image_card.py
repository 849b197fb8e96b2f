"""The committed Stable Diffusion of digits: it opens in diffusers, draws what prompts ask for, and is as described."""

import json
import re

import numpy as np
import pytest
import torch
from cards.weights import weights_digest
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from freeze import CARDS
from latent.captions import NAMES
from measure.extractors import open_extractor
from PIL import Image
from transformers import CLIPTextModel

from ddim_plugin import MultistepDDIMScheduler, invert

FOLDER = CARDS / "sd-mnist-32"
RECORD = json.loads((FOLDER / "training.json").read_text())
CARD = (FOLDER / "README.md").read_text()


@pytest.fixture
def pipe():
    pipe = StableDiffusionPipeline.from_pretrained(FOLDER, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompts, **call):
    seeds = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    return pipe(prompts, generator=seeds, output_type="np", **call).images


def classify(images):
    judge = open_extractor(str(CARDS.parent / "training" / "extractors" / "mnist-resnet"), "cpu", (1, 28, 28))
    gray = torch.from_numpy((images[:, 2:30, 2:30, :1] * 255).round().astype(np.uint8)).permute(0, 3, 1, 2)
    return judge(gray).logits.argmax(1)


@pytest.mark.parametrize("ours", [False, True])
def test_a_classifier_recognizes_the_digits(pipe, ours):
    if ours:
        pipe.scheduler = MultistepDDIMScheduler.from_config(pipe.scheduler.config)
    images = draw(pipe, [f"a {name}" for name in NAMES] * 2, num_inference_steps=20, guidance_scale=3.0)
    assert (classify(images) == np.tile(np.arange(10), 2)).mean() >= 0.9


def test_a_bold_digit_has_more_ink(pipe):
    thin, bold = (
        draw(pipe, [f"a {style} {name}" for name in NAMES], num_inference_steps=20, guidance_scale=3.0).mean((1, 2, 3))
        for style in ("thin", "bold")
    )
    assert (bold > thin).mean() >= 0.9


def test_other_precisions_open():
    pipe = StableDiffusionPipeline.from_pretrained(FOLDER, safety_checker=None, torch_dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.bfloat16}
    assert draw(pipe, ["a seven"], num_inference_steps=2).shape == (1, 32, 32, 3)


def test_pictures_are_inverted_and_edited(pipe):
    """Exactly, by the inverse with refinements; then "bold" adds ink to each."""
    prompts = [f"a thin {name}" for name in NAMES[:5]]
    pictures = draw(pipe, prompts, num_inference_steps=20, guidance_scale=3.0)
    with torch.no_grad():
        x = torch.from_numpy(pictures).permute(0, 3, 1, 2) * 2 - 1
        latents = pipe.vae.encode(x).latent_dist.mode() * pipe.vae.config.scaling_factor
    errors = {}
    for k in (None, 4):
        found = invert(pipe, pictures, prompts, refinement_steps=k, num_inference_steps=20, guidance_scale=1.0)
        errors[k] = float((found.decode(pipe, output_type="latent") - latents).square().mean().sqrt())
    assert errors[4] < 1e-4 < 1e-2 < errors[None]
    bold = found.decode(pipe, [f"a bold {name}" for name in NAMES[:5]], guidance_scale=3.0, output_type="np")
    assert (bold.mean((1, 2, 3)) > pictures.mean((1, 2, 3))).mean() >= 0.9


def test_the_card_has_the_figures_of_the_record():
    text = " ".join(CARD.split())
    parts = (("vae", AutoencoderKL), ("unet", UNet2DConditionModel), ("text_encoder", CLIPTextModel))
    networks = [
        cls.from_pretrained(FOLDER / name, torch_dtype=torch.float32 if cls is CLIPTextModel else torch.float16)
        for name, cls in parts
    ]
    assert weights_digest(*networks) == RECORD["sha256"]
    for network in networks:
        assert network.num_parameters() == RECORD["parameters"][type(network).__name__]
        assert f"{network.num_parameters():,}" in text
    for phase in ("autoencoder", "denoiser"):
        assert f"{RECORD[phase]['pictures_seen']:,}" in text
        assert f"{RECORD[phase]['seconds'] / 60:.0f} minutes" in text
    assert f"{RECORD['autoencoder']['rms_error']:.3f}" in text
    rows = {w: f"| {float(w):g} | {100 * share:.1f} % |" for w, share in RECORD["right"].items()}
    assert all(row in text for row in rows.values()), rows
    assert RECORD["command"] in re.sub(r"\\\s+", "", text)


def test_the_card_shows_its_pictures():
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", CARD)
    assert "samples.png" in pictures
    for name in pictures:
        Image.open(FOLDER / name).verify()


def test_the_example_of_the_card_runs(monkeypatch, tmp_path):
    code = "\n".join(re.findall(r"```python\n(.*?)```", CARD, re.DOTALL))
    monkeypatch.chdir(tmp_path)
    exec(code.replace('"user/sd-mnist-32"', repr(str(FOLDER))), names := {})
    assert names["edited"].size == (32, 32)
    ink, again, edited = (np.asarray(names[name]).astype(float).mean() for name in ("image", "again", "edited"))
    assert abs(again - ink) < 0.1 * ink
    assert edited > 1.2 * ink


def test_the_folder_is_small():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 6_000_000
    assert not [path for path in files if path.suffix in (".py", ".pt", ".bin")]
