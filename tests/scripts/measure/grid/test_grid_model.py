"""The model that is measured: its numbers, any scheduler, any unconditional pipeline."""

import diffusers
import numpy as np
import pytest
import torch
from cards.card import figures
from diffusers import DDIMScheduler, LDMPipeline, VQModel
from measure.grid.model import Model
from measure.grid.tables import table
from measure.metrics import Gaussian, frechet
from measuring import values
from pictures import load
from transformers import ResNetForImageClassification

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler


@pytest.mark.parametrize("classes", [None, 3])
def test_the_numbers_are_those_of_the_pipeline_and_the_classifier(places, measure, make_unet, tmp_path, classes):
    """By hand, in one batch: picture i from seed + i, of class i modulo their number, in 8 bits."""
    model = places["model"]
    if classes:
        model = str(tmp_path / "conditional")
        unet = make_unet(num_class_embeds=classes)
        GeneralizedDDIMPipeline(unet, GeneralizedDDIMScheduler()).save_pretrained(model)
    result = measure(model=model, seed=5, splits=("test",), clip="fixed_large", variances=("0.5", "fixed_large"))
    pipe = GeneralizedDDIMPipeline.from_pretrained(model)
    network = ResNetForImageClassification.from_pretrained(places["extractors"][0]).eval()

    @torch.no_grad()
    def seen(pictures):
        return network.resnet(pictures.float() / 255).pooler_output.flatten(1).double().numpy()

    def fitted(x):
        return Gaussian(x.mean(0), np.cov(x, rowvar=False))

    real, saved = fitted(seen(load("digits", "test")[0])), pipe.scheduler.config
    for entry in result["results"]:
        S, eta = entry["num_inference_steps"], entry["eta"]
        larger = {"variance_type": "fixed_large", "clip_sample": True, "use_clipped_model_output": True}
        changes = larger if eta is None else {"eta": eta}
        pipe.scheduler = GeneralizedDDIMScheduler.from_config(saved, **changes)
        images = pipe(
            40,
            S,
            generator=[torch.Generator().manual_seed(5 + i) for i in range(40)],
            class_labels=[i % classes for i in range(40)] if classes else None,
        ).images
        pictures = torch.from_numpy(np.stack([np.asarray(image) for image in images]))[:, None]
        assert entry["value"] == pytest.approx(frechet(fitted(seen(pictures)), real), rel=1e-5)
        assert entry["nfe"] == S
    assert [(e["eta"], e["variance_type"]) for e in result["results"]] == [
        *[(0.5, "fixed_small"), (None, "fixed_large")] * 2
    ]
    assert result["made"]["classes"] == classes


def test_guidance_and_the_accuracy_of_classes(places, measure, make_unet, tmp_path):
    """By hand, with the pipeline and the classifier; a guided step costs two evaluations."""
    model = str(tmp_path / "conditional")
    pipe = GeneralizedDDIMPipeline(make_unet(num_class_embeds=11), GeneralizedDDIMScheduler())
    pipe.save_pretrained(model)
    grid = {"steps": (3,), "variances": ("0",), "guidance": (1.0, 4.0), "splits": ("test",), "classes": 10}
    result = measure(model=model, metrics=("fd", "accuracy"), **grid)
    network = ResNetForImageClassification.from_pretrained(places["extractors"][0]).eval()
    plain, guided = (
        {each["metric"].partition("_")[0]: each for each in result["results"] if each["guidance_scale"] == w}
        for w in (1, 4)
    )
    labels, seeds = [i % 10 for i in range(40)], [torch.Generator().manual_seed(i) for i in range(40)]
    made = pipe(40, 3, generator=seeds, class_labels=labels, guidance_scale=4.0, output_type="pt").images
    with torch.no_grad():
        found = network((made * 255).round() / 255).logits.argmax(1)
    assert guided["accuracy"]["value"] == pytest.approx(float((found == torch.tensor(labels)).float().mean()))
    assert guided["accuracy"]["dataset"].keys() == plain["fd"]["dataset"].keys() - {"split"}
    assert (plain["fd"]["nfe"], guided["fd"]["nfe"]) == (3, 6)
    assert plain["fd"]["value"] != guided["fd"]["value"]
    assert "| η = 0, w = 4 |" in table(result)
    assert "| evaluations | 3 or 6 |" in table(result)
    assert next(iter(figures(result["results"]).values())).keys() == {
        f"GeneralizedDDIMScheduler, variance = fixed_small, η = 0, τ = linear, w = {w}" for w in (1, 4)
    }


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"guidance": (2.0,)}, "is unconditional: leave out --guidance"),
        ({"guidance": (float("nan"),)}, "guidance must be finite numbers, not nan"),
        ({"guidance": ()}, "guidance must be distinct, and one at least"),
        ({"metrics": ("accuracy",)}, "the metric accuracy compares classes: .* has 10 classes, and the model none"),
    ],
)
def test_guidance_and_accuracy_need_classes(measure, settings, said):
    with pytest.raises(ValueError, match=said):
        measure(**settings)


def test_variances_that_a_model_brings(measure, make_unet, tmp_path):
    """E‖ε̂‖² saved with it, and half of its output."""
    table = np.linspace(0.9, 0.999, 1000).tolist()
    known = GeneralizedDDIMScheduler(eps_mean_square=table)
    learned = GeneralizedDDIMScheduler(variance_type="learned_range")
    GeneralizedDDIMPipeline(make_unet(), known).save_pretrained(tmp_path / "known")
    GeneralizedDDIMPipeline(make_unet(out_channels=2), learned).save_pretrained(tmp_path / "learned")
    given = {"steps": (3,), "splits": ("test",), "spacings": ("linear",)}
    result = measure(
        "a", model=str(tmp_path / "known"), variances=("0", "1", "optimal", "optimal:0", "optimal:1"), **given
    )
    entries = [(e["variance_type"], e["eta"]) for e in result["results"]]
    assert entries == [("fixed_small", 0.0), ("fixed_small", 1.0), *[("optimal", eta) for eta in (0.0, 0.0, 1.0)]]
    plain, posterior, optimal, same, full = values(result)
    assert optimal == same
    assert len({plain, posterior, optimal, full}) == 4
    result = measure("b", model=str(tmp_path / "learned"), variances=("learned_range", "saved", "0"), **given)
    learned, saved, plain = values(result)
    assert learned == saved != plain
    assert [e["eta"] for e in result["results"]] == [None, None, 0.0]


def test_any_scheduler(measure):
    """Stock schedulers with their own variance; evaluations are those that were made."""
    schedulers = ("DDIMScheduler", "GeneralizedDDIMScheduler", "HeunDiscreteScheduler:saved", "DDPMScheduler:saved")
    result = measure(schedulers=schedulers, splits=("test",), spacings=("leading",), clip="never")
    found = {(e["scheduler"], e["eta"], e["num_inference_steps"]): e for e in result["results"]}
    for S in (2, 3):
        for eta in (0.0, 0.5):
            pair = [found[name, eta, S]["value"] for name in schedulers[:2]]
            assert pair[0] == pytest.approx(pair[1], rel=1e-3)
        assert found["HeunDiscreteScheduler", None, S]["nfe"] == 2 * S - 1
        assert found["DDPMScheduler", None, S]["variance_type"] == "fixed_small"


def test_any_unconditional_pipeline(measure, make_unet, tmp_path, monkeypatch):
    """Latent diffusion, which this package's pipeline does not open, and which hands no generator to its steps."""
    torch.manual_seed(0)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    shapes = {"block_out_channels": (8, 8), "latent_channels": 2, "num_vq_embeddings": 16, "norm_num_groups": 4}
    decoder = VQModel(in_channels=1, out_channels=1, **kinds, **shapes).eval()
    LDMPipeline(decoder, make_unet(2, 4), DDIMScheduler(clip_sample=False)).save_pretrained(tmp_path / "ldm")
    settings = {"model": str(tmp_path / "ldm"), "splits": ("test",), "variances": ("0", "1", "fixed_large")}
    ours = measure("ours", schedulers=("GeneralizedDDIMScheduler",), **settings)
    stock = measure("stock", schedulers=("saved",), **settings | {"variances": ("0", "1"), "batch_size": 7})
    by_eta = {(e["eta"], e["num_inference_steps"]): e["value"] for e in ours["results"]}
    for entry in stock["results"]:
        assert entry["value"] == pytest.approx(by_eta[entry["eta"], entry["num_inference_steps"]], rel=1e-3)
    assert by_eta[None, 3] != pytest.approx(by_eta[1.0, 3], rel=1e-3)
    assert ours["made"]["shape"] == (1, 8, 8)
    monkeypatch.setattr(Model, "seed", lambda model, scheduler: None)  # as the pipeline does by itself
    with pytest.raises(ValueError, match="LDMPipeline with DDIMScheduler draws noise that no picture's seed decides"):
        measure("unseeded", schedulers=("saved",), **settings | {"variances": ("1",)})


def test_a_pipeline_of_text_is_refused(measure, tmp_path, monkeypatch):
    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", lambda name: {"_class_name": "TextPipeline"})
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda name: TextPipeline())
    with pytest.raises(ValueError, match="is no unconditional pipeline: its TextPipeline takes no batch_size"):
        measure(model="user/text")


class TextPipeline:
    def __call__(self, prompt, num_inference_steps, generator, output_type):
        raise AssertionError


def test_pictures_that_are_not_finite(measure, make_unet, tmp_path):
    unet = make_unet()
    unet.conv_out.bias.data.fill_(float("nan"))
    GeneralizedDDIMPipeline(unet, GeneralizedDDIMScheduler()).save_pretrained(tmp_path / "broken")
    with pytest.raises(ValueError, match="the pictures hold NaN or infinity, at S=2 with GeneralizedDDIMScheduler"):
        measure(model=str(tmp_path / "broken"))


@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_half_precision_is_another_cell(measure, dtype):
    result, half = measure(splits=("test",)), measure("half", splits=("test",), dtype=dtype)
    assert values(half) == pytest.approx(values(result), rel=0.2)
    assert values(half) != values(result)
    assert {each["key"] for each in result["cells"]}.isdisjoint(each["key"] for each in half["cells"])


def test_our_scheduler_is_restored_in_a_pipeline_of_diffusers(measure, make_unet, tmp_path):
    """It is saved as a stock one, with its own spacing and noise beside."""
    GeneralizedDDIMScheduler(timestep_spacing="quadratic", eta=0.5).save_pretrained(tmp_path / "scheduler")
    decoder = VQModel(in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4, latent_channels=1)
    pipe = LDMPipeline(decoder, make_unet(), DDIMScheduler.from_pretrained(tmp_path / "scheduler"))
    pipe.save_pretrained(tmp_path / "ldm")
    result = measure(model=str(tmp_path / "ldm"), schedulers=("saved",), variances=("saved",), splits=("test",))
    for entry in result["results"]:
        shown = [entry[key] for key in ("scheduler", "timestep_spacing", "eta")]
        assert shown == ["GeneralizedDDIMScheduler", "quadratic", 0.5]
