"""The comparison at few steps, and the classifier that it is measured with: real runs on the digits, and bad input."""

import json
import statistics
from dataclasses import replace
from pathlib import Path

import classifier
import few_steps
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from measure.extractors import open_extractor
from pictures.sources import load
from PIL import Image
from trainer.settings import build

from ddim_plugin import GeneralizedDDIMPipeline, MultistepDDIMScheduler
from ddim_plugin.hub.card import read_results

ROOT = Path(__file__).parents[2]
SMALL = {"data": "digits", "hidden_sizes": (16, 16), "layers": 1, "steps": 150, "batch_size": 64, "shift": 0}
SMALL |= {"learning_rate": 1e-2, "test_split": "test", "device": "cpu"}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


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
        ({"learning_rate": float("inf")}, "learning_rate must be positive, not inf"),
        ({"shift": -1}, "shift and seed must not be negative, as one of -1 and 0 is"),
        ({"shift": 8}, "shift=8 moves pictures of 8×8 out of sight"),
        ({"batch_size": 1}, "batch_size must be 2 at least"),
        ({"hidden_sizes": (8, 0)}, "hidden_sizes must be positive"),
        ({"hidden_sizes": ()}, "hidden_sizes must be positive"),
        ({"test_split": "tests"}, "unknown split 'tests'"),
        ({"learning_rate": 1e30}, "lower --learning_rate"),
        ({"data": "missing/labelled.parquet"}, "there is no file"),
    ],
)
def test_bad_settings_of_a_classifier(settings, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        classifier.main(build(classifier.ClassifierConfig, SMALL | {"output": str(tmp_path / "out")} | settings))
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_kept(extractor, make_unet, tmp_path):
    """An earlier classifier unless told otherwise, anything else always."""
    with pytest.raises(ValueError, match="pass --overwrite"):
        classifier.main(build(classifier.ClassifierConfig, SMALL | {"output": str(extractor)}))
    (tmp_path / "file").write_text("kept")
    GeneralizedDDIMPipeline(make_unet(), MultistepDDIMScheduler()).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "training.json").write_text("{}")
    for name in ("file", "model"):
        settings = SMALL | {"output": str(tmp_path / name), "overwrite": True}
        with pytest.raises(ValueError, match="no classifier that was made here"):
            classifier.main(build(classifier.ClassifierConfig, settings))
    settings = SMALL | {"output": str(tmp_path / "again"), "steps": 2}
    before = classifier.main(build(classifier.ClassifierConfig, settings))
    after = classifier.main(build(classifier.ClassifierConfig, settings | {"overwrite": True, "seed": 1}))
    assert after["sha256"] == json.loads((tmp_path / "again" / "training.json").read_text())["sha256"]
    assert after["sha256"] != before["sha256"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "file", "model"]


def test_splits_are_not_classes(tmp_path):
    for name in ("train/0", "train/1", "test/0", "test/1"):
        (tmp_path / "set" / name).mkdir(parents=True)
        Image.new("L", (8, 8), 9).save(tmp_path / "set" / name / "a.png")
    settings = SMALL | {"data": str(tmp_path / "set"), "output": str(tmp_path / "out"), "test_split": None}
    with pytest.raises(ValueError, match="classes of .* are test, train"):
        classifier.main(build(classifier.ClassifierConfig, settings))
    settings["data"] += "/train"
    with pytest.raises(ValueError, match="all of one colour"):
        classifier.main(build(classifier.ClassifierConfig, settings))


def test_channels_are_those_of_the_model(tmp_path):
    for label in (0, 1):
        (tmp_path / "set" / str(label)).mkdir(parents=True)
        Image.new("RGB", (8, 8), (250 * label, 9, 9)).save(tmp_path / "set" / str(label) / "a.png")
    settings = SMALL | {"data": str(tmp_path / "set"), "output": str(tmp_path / "out"), "test_split": None, "steps": 2}
    classifier.main(build(classifier.ClassifierConfig, settings | {"channels": 1}))
    assert open_extractor(str(tmp_path / "out"), "cpu", (1, 8, 8)).channels == 1


def test_the_committed_extractor_is_the_one_that_was_measured_with():
    folder = ROOT / "training" / "extractors" / "mnist-resnet"
    opened = open_extractor(str(folder), "cpu", (1, 28, 28))
    for name in ("table1", "few_steps"):
        record = json.loads((ROOT / "model_cards" / "ddim-mnist-28" / "measured" / f"{name}.json").read_text())
        used = record["model"]["extractor"] if name == "few_steps" else record["extractors"][0]["fingerprint"]
        assert opened.fingerprint == used


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
        assert few_steps.SCREENED > 40
        assert {"ours", "ours, η = 1", "DDIM"} <= {entry["family"] for entry in row["frechet"]}
        for entry in row["frechet"]:
            [sampler] = [each for each in few_steps.samplers() if each.name == entry["sampler"]]
            sets = [range(20), range(20, 40)]
            draws = [bench.frechet(sampler, row["nfe"], numbers)["frechet"] for numbers in sets]
            assert entry["draws"] == draws
            assert entry["frechet"] == pytest.approx(statistics.fmean(draws))


def test_a_set_is_measured_as_by_hand(compared, extractor):
    """Ours without noise: x_T of image i from seed + i, by the pipeline."""
    config, result = compared
    pipe = GeneralizedDDIMPipeline.from_pretrained(config.model)
    opened = open_extractor(str(extractor), "cpu", (1, 8, 8))

    def fitted(x):
        features = opened(x).features.astype(np.float64)
        return few_steps.fit(lambda: iter([features]))

    seeds = [torch.Generator().manual_seed(i) for i in range(20)]
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
    error, of_ratio = few_steps.relative_errors(result)
    said = f"means over 2 sets of 20 images, which all samplers share. Standard errors: {error:.0%} of a mean, "
    assert f"{said}{of_ratio:.0%} of a ratio." in few_steps.table(result)
    [entry] = [each for each in result["rows"][0]["frechet"] if each["family"] == "ours"]
    found = read_results(Path(config.output) / "results.json")
    [told] = [each for each in found if each.get("scheduler") == "ours" and each["nfe"] == 3 and "draws" in each]
    assert told["value"] == entry["frechet"]
    assert told["standard_error"] == pytest.approx(error * entry["frechet"])
    assert told["draws"] == 2


def test_errors_are_those_that_the_draws_were_made_with():
    """Distances that vary by 5 % from set to set for all samplers alike, and by 2 % for each."""
    rng = np.random.default_rng(0)
    sets = 0.05 * rng.standard_normal((400, 1, 3))
    values = np.exp(sets + 0.02 * rng.standard_normal((400, 6, 3)) + rng.standard_normal((400, 6, 1)))
    rows = [{"frechet": [{"draws": list(each)} for each in row]} for row in values]
    errors = few_steps.relative_errors({"config": {"draws": 3}, "rows": rows})
    assert errors == pytest.approx(((0.05**2 + 0.02**2) ** 0.5 / 3**0.5, 2**0.5 * 0.02 / 3**0.5), rel=0.03)
    assert few_steps.relative_errors({"config": {}, "rows": rows}) is None
    assert few_steps.relative_errors({"config": {"draws": 3}, "rows": [*rows, {"frechet": []}]}) == errors
    assert few_steps.relative_errors({"config": {"draws": 3}, "rows": [{"frechet": []}]}) is None


def test_the_size_of_a_batch_changes_nothing(compared):
    """Noise comes from one generator for each image."""
    config, _ = compared
    for name in ("ours, η = 1 1.0", "DDPM leading"):
        [sampler] = [each for each in few_steps.samplers() if each.name == name]
        made = []
        for size in (3, 8):
            bench = few_steps.Bench(replace(config, batch_size=size))
            made.append(torch.cat(list(bench.make(bench.unet, sampler, 5, range(24, 32)))))
        assert torch.allclose(*made, atol=1e-5)


def test_what_belongs_to_another_model_or_reference_is_not_taken(compared, tmp_path):
    """Nor what another schedule, with other fitted times, was measured with; a line that a kill tore is dropped."""
    config, _ = compared
    bench = few_steps.Bench(config)
    with open(bench.file, "a") as file:
        file.write('{"key": "rms of ou')
    assert few_steps.Bench(config).known.keys() == bench.known.keys()
    assert bench.file.read_text().endswith("}\n")
    pipe = GeneralizedDDIMPipeline.from_pretrained(config.model)
    times = {"fitted_timesteps": {"3": [700, 400, 100]}}
    pipe.scheduler = MultistepDDIMScheduler.from_config(pipe.scheduler.config, **times)
    pipe.save_pretrained(tmp_path / "fitted")
    assert not few_steps.Bench(replace(config, model=str(tmp_path / "fitted"))).known


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"draws": 0}, "draws must be 1 at least, not 0"),
        ({"shortlist": -1}, "shortlist must be 1 at least, not -1"),
        ({"nfe": (5, 0)}, "nfe must be 1 at least, not 0"),
        ({"margin": float("nan")}, "margin must be 1 at least, not nan"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"families": ("Euler 9",)}, "no family of samplers begins with Euler 9"),
        ({"screen": 10}, "10 --screen are too few"),
        ({"reference": "missing/set.parquet", "overwrite": True}, "there is no file"),
    ],
)
def test_bad_settings_lose_nothing(compared, settings, said, monkeypatch):
    config, _ = compared
    before = (Path(config.output) / "measured.jsonl").read_bytes()
    monkeypatch.setattr(few_steps.Bench, "sample", None)
    with pytest.raises(ValueError, match=said):
        few_steps.main(replace(config, **settings))
    assert (Path(config.output) / "measured.jsonl").read_bytes() == before
