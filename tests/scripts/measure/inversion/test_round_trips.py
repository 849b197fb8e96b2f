"""Round trips as a script: what it writes for latents and for pixels, and what it refuses."""

import json
import math
from pathlib import Path

import inversion
import numpy as np
import pytest
import tiny_stable_diffusion
import torch
from diffusers import DDIMScheduler
from measure.inversion.tables import table
from measure.inversion.trips import Trip, read_images, summary
from pictures import open_pictures
from PIL import Image
from trainer.settings import build

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler, InverseDDIMScheduler

NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
NOISE |= {"set_alpha_to_one": False, "steps_offset": 1}
QUICK = {"images": 3, "steps": (4,), "refinement": (0, 2), "batch_size": 2}
OURS, STOCK = ["plain", "k = 0", "k = 2"], ["diffusers, DDIM", "diffusers, DPM-Solver++"]


@pytest.fixture(scope="module")
def models(make_unet, tmp_path_factory):
    """Folders of a Stable Diffusion and of a pipeline of ours, and a file of prompts."""
    folder = tmp_path_factory.mktemp("inversion")
    tiny_stable_diffusion.build(folder / "tokenizer", DDIMScheduler(**NOISE)).save_pretrained(folder / "latents")
    GeneralizedDDIMPipeline(make_unet(), GeneralizedDDIMScheduler(eta=0.5)).save_pretrained(folder / "pixels")
    flow = GeneralizedDDIMScheduler(prediction_type="flow_prediction")
    GeneralizedDDIMPipeline(make_unet(), flow).save_pretrained(folder / "flow")
    (folder / "prompts.txt").write_text("a cat\n")
    return folder


def run(model, output, **settings):
    values = QUICK | {"model": str(model), "output": str(output)} | settings
    return inversion.main(build(inversion.InversionConfig, values))


def by_name(rows):
    return {row["inverse"]: row for row in rows}


def test_latents_in_the_loop_of_stable_diffusion(models, tmp_path):
    done = run(models / "latents", tmp_path, guidance=(1.0, 3.0))
    record = json.loads((tmp_path / "inversion.json").read_text())
    assert record == json.loads(json.dumps(done))
    assert (record["kind"], record["images"], record["spacing"]) == ("latents", 3, "leading")
    labels = open_pictures("digits", "test", labelled=True).labels[:3]
    assert record["prompts"] == [f"a {label}" for label in labels]
    assert [row["guidance"] for row in record["rows"]] == [1.0] * 5 + [3.0] * 5
    for rows in (record["rows"][:5], record["rows"][5:]):
        assert [row["inverse"] for row in rows] == STOCK + OURS
        found = by_name(rows)
        assert [found[name]["evaluations"] for name in STOCK + OURS[:2]] == [4] * 4
        assert found["k = 2"]["evaluations"] >= 12
        assert found["k = 2"]["error"] < 0.3 * found["plain"]["error"]
        assert found["plain"]["error"] == pytest.approx(found["diffusers, DDIM"]["error"], rel=1e-3)
        assert "not_converged" not in found["plain"]
        for row in rows:
            e = np.array(row["errors"])
            assert row["error"] == pytest.approx(math.sqrt(np.mean(e**2)))
            assert (row["median"], row["largest"]) == (pytest.approx(np.median(e)), e.max())
    assert (tmp_path / "inversion.md").read_text() == table(record)
    assert np.asarray(Image.open(tmp_path / "inversion.png")).std() > 5


def test_the_errors_are_those_of_the_pipeline_by_hand(models, tmp_path):
    prompts = {"prompts": str(models / "prompts.txt"), "guidance": (3.0,)}
    found = by_name(run(models / "latents", tmp_path, batch_size=3, **prompts)["rows"])["k = 2"]
    pipe = inversion.Latents.load(str(models / "latents"), "cpu")
    pipe.set_progress_bar_config(disable=True)
    images = read_images(open_pictures("digits", "test"), 3, (16, 16), 3, False).float() / 127.5 - 1
    with torch.no_grad():
        z = made = pipe.vae.encode(images).latent_dist.mode() * pipe.vae.config.scaling_factor
    up = InverseDDIMScheduler.from_config(pipe.scheduler.config, refinement_steps=2)
    for scheduler in (up, GeneralizedDDIMScheduler.from_config(up.config)):
        pipe.scheduler = scheduler
        settings = {"guidance_scale": 3.0, "num_inference_steps": 4, "output_type": "latent"}
        made = pipe(["a cat"] * 3, latents=made, **settings).images
    assert found["errors"] == pytest.approx((made - z).square().flatten(1).mean(1).sqrt().tolist(), rel=1e-3, abs=1e-7)


def test_pixels(models, tmp_path):
    record = run(models / "pixels", tmp_path, refinement=(0, 2), spacing="linear")
    found = by_name(record["rows"])
    assert list(found) == STOCK + OURS
    assert (record["kind"], record["spacing"], {row["guidance"] for row in record["rows"]}) == (
        "pixels",
        "linear",
        {None},
    )
    pipe = GeneralizedDDIMPipeline.from_pretrained(models / "pixels")
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = GeneralizedDDIMScheduler.from_config(pipe.scheduler.config, eta=0.0, timestep_spacing="linear")
    images = read_images(open_pictures("digits", "test"), 1, (8, 8), 3, False)
    again = pipe.reconstruct(images, 4, refinement_steps=2, output_type="pt")
    errors = (again - images / 255).square().flatten(1).mean(1)
    assert found["k = 2"]["errors"] == pytest.approx(errors.tolist(), rel=1e-2, abs=1e-12)
    assert found["k = 2"]["error"] == pytest.approx(np.mean(found["k = 2"]["errors"]))
    assert "| S | diffusers, DDIM | diffusers, DPM-Solver++ | plain | k = 0 | k = 2 |" in table(record)


def test_inverses_of_diffusers_are_left_out_for_other_paths(models, tmp_path):
    assert list(by_name(run(models / "flow", tmp_path, refinement=(0,))["rows"])) == OURS[:2]


def test_images_that_fail_are_counted():
    """One fails and is reported, one fails in silence, one is fine, and one is reported though it is fine."""
    trip = Trip(np.array([0.9, math.nan, 0.01, 0.02]), 7.0, np.array([False, True, True, False]))
    row = summary(trip, 0.05, True)
    assert (row["failed"], row["not_converged"], row["not_converged_and_failed"], row["lost_in_silence"]) == (
        2,
        2,
        1,
        1,
    )
    assert (row["error"], row["errors"]) == (None, [0.9, None, 0.01, 0.02])
    assert summary(Trip(np.array([0.5]), 7.0, None), 0.05, False).keys().isdisjoint({"not_converged"})


def test_small_pictures_are_framed_with_black():
    pictures = open_pictures("digits", "test")
    framed, own = (read_images(pictures, 3, (size, size), 2, True) for size in (12, 8))
    assert torch.equal(framed[:, :, 2:10, 2:10], own)
    assert framed.float().sum() == own.float().sum() > 0
    with pytest.raises(ValueError, match="is 8×8, larger than 4×4: leave out pad"):
        read_images(pictures, 3, (4, 4), 1, True)


@pytest.mark.parametrize(
    ("model", "values", "message"),
    [
        ("latents", {"images": 0}, "images must be distinct numbers from 1 on, not 0"),
        ("latents", {"steps": ()}, r"steps must be distinct numbers from 1 on, not \(\)"),
        ("latents", {"steps": (2, 2)}, "steps must be distinct"),
        ("latents", {"steps": (2, 2000)}, "must be an integer from 1 to 1000"),
        ("latents", {"refinement": (-1,)}, "refinement must be distinct numbers from 0 on"),
        ("latents", {"guidance": (0.5,)}, "guidance must be distinct finite numbers from 1 on"),
        ("latents", {"tolerance": math.nan}, "tolerance must be distinct finite numbers"),
        ("latents", {"class_label": 1}, "class_label is not used for a model of latents"),
        ("latents", {"prompts": "nowhere.txt"}, "there is no file nowhere.txt: pass a text file"),
        ("latents", {"spacing": "quadrtic"}, "quadrtic"),
        ("latents", {"data": "nowhere.parquet"}, "there is no file nowhere.parquet"),
        ("pixels", {"guidance": (3.0,)}, r"guidance is not used for a model of pixels: leave out guidance=\(3.0,\)"),
        ("pixels", {"class_label": 1}, "the network is unconditional: leave class_label out"),
        ("pixels", {"steps": (2, 1001)}, "must be an integer from 1 to 1000"),
        ("pixels", {"model": "nowhere/at/all"}, "there is no folder nowhere/at/all"),
    ],
)
def test_bad_settings_leave_nothing(models, tmp_path, model, values, message):
    output = tmp_path / "out"
    with pytest.raises(ValueError, match=message):
        run(**{"model": models / model, "output": output} | values)
    assert not output.exists()


def test_prompts_that_do_not_fit(models, tmp_path):
    (tmp_path / "two.txt").write_text("a cat\na dog\n")
    with pytest.raises(ValueError, match="two.txt has 2 lines for 3 images: write one prompt an image, or one for all"):
        run(models / "latents", tmp_path / "out", prompts=str(tmp_path / "two.txt"))
    Image.new("L", (8, 8)).save(tmp_path / "black.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "black.png").rename(tmp_path / "data" / "black.png")
    with pytest.raises(ValueError, match="data has no labels to make prompts of: pass --prompts FILE"):
        run(models / "latents", tmp_path / "out", data=str(tmp_path / "data"))


def test_a_pipeline_of_another_class_is_refused(models, tmp_path):
    index = models / "latents" / "model_index.json"
    (tmp_path / "model").mkdir()
    changed = index.read_text().replace("StableDiffusionPipeline", "FluxPipeline")
    (tmp_path / "model" / index.name).write_text(changed)
    with pytest.raises(ValueError, match="is a FluxPipeline, whose round trips are not measured: pass one of Stable"):
        run(tmp_path / "model", tmp_path / "out")


def test_an_earlier_run_is_kept(models, tmp_path):
    (tmp_path / "inversion.md").write_text("the one for the paper")
    with pytest.raises(ValueError, match="inversion.md exists: choose another output, or pass --overwrite"):
        run(models / "pixels", tmp_path)
    assert Path(tmp_path / "inversion.md").read_text() == "the one for the paper"
    run(models / "pixels", tmp_path, overwrite=True, refinement=(0,), steps=(2,), images=1)
    assert "| S | diffusers" in (tmp_path / "inversion.md").read_text()
