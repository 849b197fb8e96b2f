"""The comparison at few steps, and the classifier that it is measured with: real runs on the digits, and bad input."""

import json
import statistics

import classifier
import few_steps
import numpy as np
import pytest
import torch
from config import build
from data import load
from features import open_extractor

from ddim_plugin import GeneralizedDDIMPipeline, MultistepDDIMScheduler
from ddim_plugin.card import read_results

SMALL = {"data": "digits", "hidden_sizes": (16, 16), "layers": 1, "steps": 150, "batch_size": 64, "shift": 0}
SMALL["learning_rate"] = 1e-2


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def extractor(tmp_path_factory):
    """A classifier of the digits, trained for seconds."""
    folder = tmp_path_factory.mktemp("classifier") / "small"
    classifier.main(build(classifier.ClassifierConfig, SMALL | {"output": str(folder)}))
    return folder


# ---- the classifier ------------------------------------------------------------------------------------------------


def test_a_classifier_learns_and_is_an_extractor(extractor):
    said = json.loads((extractor / "training.json").read_text())
    opened = open_extractor(str(extractor), "cpu", (1, 8, 8))
    images, labels = load("digits", "test")
    features, logits = opened(images)
    accuracy = float((logits.argmax(1) == labels.numpy()).mean())
    assert opened.dimension == 16
    assert features.shape == (len(images), 16)
    assert accuracy == pytest.approx(said["accuracy"])  # by its saved preprocessing
    assert accuracy > 0.5


def test_the_same_command_makes_the_same_classifier(extractor, tmp_path):
    said = classifier.main(build(classifier.ClassifierConfig, SMALL | {"output": str(tmp_path / "again")}))
    assert said["sha256"] == json.loads((extractor / "training.json").read_text())["sha256"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"steps": 0}, "steps must be positive, not 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive, not nan"),
        ({"shift": -1}, "shift must not be negative, as -1 is"),
        ({"hidden_sizes": (8, 0)}, "hidden_sizes must be positive"),
        ({"data": "missing/labelled.parquet"}, "there is no file"),
    ],
)
def test_bad_settings_of_a_classifier(settings, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        classifier.main(build(classifier.ClassifierConfig, SMALL | {"output": str(tmp_path / "out")} | settings))
    assert not (tmp_path / "out").exists()


def test_an_earlier_classifier_is_kept(extractor):
    with pytest.raises(ValueError, match="pass --overwrite"):
        classifier.main(build(classifier.ClassifierConfig, SMALL | {"output": str(extractor)}))


def test_pictures_are_moved_with_black_coming_in():
    batch = torch.arange(1, 17, dtype=torch.uint8).view(1, 1, 4, 4)
    seen = {tuple(classifier.shifted(batch, 1, np.random.default_rng(i)).flatten().tolist()) for i in range(60)}
    assert len(seen) == 9
    assert tuple(batch.flatten().tolist()) in seen
    assert (6, 7, 8, 0, 10, 11, 12, 0, 14, 15, 16, 0, 0, 0, 0, 0) in seen


# ---- the comparison ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(extractor, make_unet, tmp_path_factory):
    folder = tmp_path_factory.mktemp("few")
    GeneralizedDDIMPipeline(make_unet(), MultistepDDIMScheduler()).save_pretrained(folder / "model")
    settings = {
        "model": str(folder / "model"),
        "reference": "digits",
        "extractor": str(extractor),
        "output": str(folder / "out"),
        "nfe": (3, 5),
        "near": 2,
        "screen": 24,
        "images": 20,
        "draws": 2,
        "thousand": (),
        "families": ("ours", "DDIM", "DDPM"),
        "shortlist": 2,
        "margin": 100.0,
        "batch_size": 8,
    }
    return build(few_steps.FewStepsConfig, settings), few_steps.main(build(few_steps.FewStepsConfig, settings))


def test_the_best_are_measured_on_images_that_did_not_choose_them(compared):
    config, result = compared
    bench = few_steps.Bench(config)
    for row in result["rows"]:
        assert {entry["images"] for entry in row["screened"]} == {24}
        assert {"ours", "ours, η = 1", "DDIM"} <= {entry["family"] for entry in row["frechet"]}
        for entry in row["frechet"]:
            [sampler] = [each for each in few_steps.samplers() if each.name == entry["sampler"]]
            sets = [range(24, 44), range(44, 64)]
            draws = [bench.frechet(sampler, row["nfe"], numbers)["frechet"] for numbers in sets]
            assert entry["draws"] == draws
            assert entry["frechet"] == pytest.approx(statistics.fmean(draws))
            assert entry["standard_error"] == pytest.approx(abs(draws[0] - draws[1]) / 2)


def test_a_set_is_measured_as_by_hand(compared, extractor):
    """Ours without noise: x_T of image i from seed + i, by the pipeline."""
    config, result = compared
    pipe = GeneralizedDDIMPipeline.from_pretrained(config.model)
    opened = open_extractor(str(extractor), "cpu", (1, 8, 8))

    def fitted(x):
        features = opened(x).features.astype(np.float64)
        return few_steps.fit(lambda: iter([features]))

    seeds = [torch.Generator().manual_seed(i) for i in range(24, 44)]
    images = pipe(20, 5, generator=seeds, output_type="pt").images
    made = fitted((images * 255).round().to(torch.uint8))
    [entry] = [each for each in result["rows"][1]["frechet"] if each["family"] == "ours"]
    assert entry["draws"][0] == pytest.approx(few_steps.frechet(made, fitted(load("digits")[0])), rel=1e-3)


def test_a_second_run_measures_nothing_again(compared, monkeypatch):
    config, result = compared
    monkeypatch.setattr(few_steps.Bench, "sample", None)
    assert few_steps.main(config)["rows"] == result["rows"]


def test_the_table_and_the_results_tell_mean_and_error(compared):
    config, result = compared
    text = few_steps.table(result)
    [entry] = [each for each in result["rows"][0]["frechet"] if each["family"] == "ours"]
    assert f"{entry['frechet']:.4g} ± {entry['standard_error']:.2g}" in text
    found = read_results(few_steps.Path(config.output) / "results.json")
    [told] = [each for each in found if each.get("scheduler") == "ours" and each["nfe"] == 3 and "draws" in each]
    assert told["standard_error"] == entry["standard_error"]
