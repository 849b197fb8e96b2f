"""The classifier that comparisons are measured with: real runs on the digits, and bad input."""

import json
from pathlib import Path

import classifier
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from classifiers.noisy import NoisyClassifier
from measure.extractors import open_extractor
from pictures.sources import load
from PIL import Image
from trainer.settings import build

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler, MultistepDDIMScheduler

ROOT = Path(__file__).parents[2]
SMALL = {"data": "digits", "hidden_sizes": (16, 16), "layers": 1, "steps": 150, "batch_size": 64, "shift": 0}
SMALL |= {"learning_rate": 1e-2, "test_split": "test", "device": "cpu"}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True, scope="module")
def fresh_accelerate():
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture(scope="module")
def extractor(tmp_path_factory):
    """A classifier of the digits, trained for seconds."""
    folder = tmp_path_factory.mktemp("classifier") / "small"
    classifier.main(build(classifier.ClassifierConfig, SMALL | {"output": str(folder)}))
    return folder


def test_a_classifier_learns_and_is_an_extractor(extractor):
    said = json.loads((extractor / "training.json").read_text())
    opened = open_extractor(str(extractor), "cpu", (1, 8, 8))
    images, labels = load("digits", "test")
    features, logits, _ = opened(images)
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
        ({"test_split": "tests"}, "has no split 'tests': it has train, test"),
        ({"learning_rate": 1e30}, "lower --learning_rate"),
        ({"data": "missing/labelled.parquet"}, "there is no file"),
    ],
)
def test_bad_settings_of_a_classifier(settings, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        classifier.main(build(classifier.ClassifierConfig, SMALL | {"output": str(tmp_path / "out")} | settings))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "scheduler",
    [
        MultistepDDIMScheduler(prediction_type="v_prediction"),
        GeneralizedDDIMScheduler(prediction_type="edm", sigma_data=0.5),
    ],
    ids=["table", "edm"],
)
def test_a_classifier_of_noisy_pictures_guides_its_model(make_unet, tmp_path, scheduler):
    """It knows the digits but where all is noise, at the timesteps of the model, and opens for the pipeline."""
    pipe = GeneralizedDDIMPipeline(make_unet(), scheduler)
    pipe.save_pretrained(tmp_path / "model")
    settings = SMALL | {"output": str(tmp_path / "guide"), "noisy": str(tmp_path / "model"), "steps": 100}
    said = classifier.main(build(classifier.ClassifierConfig, settings))
    early, *_, late = said["accuracy_at"].values()
    assert early > 0.35
    assert early > said["accuracy"] > late
    guide = NoisyClassifier.from_pretrained(tmp_path / "guide")
    images, labels = load("digits", "test")
    low, high = scheduler.image_range
    x0 = low + (high - low) * images.float() / 255
    scheduler.set_timesteps(10)
    noise, t = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)), scheduler.timesteps[-1:]
    x = scheduler.add_noise(x0, noise, t)
    accuracy = float((guide(x, t).argmax(1) == labels).double().mean())
    assert accuracy > 0.7 * early
    pipe.set_progress_bar_config(disable=True)
    call = {"generator": torch.Generator().manual_seed(0), "class_labels": 3, "output_type": "latent"}
    assert pipe(2, 3, classifier=guide, classifier_scale=2.0, **call).images.isfinite().all()
    again = classifier.main(build(classifier.ClassifierConfig, settings | {"steps": 2, "overwrite": True}))
    assert again["sha256"] != said["sha256"]
    GeneralizedDDIMPipeline(make_unet(channels=3), scheduler).save_pretrained(tmp_path / "colours")
    settings |= {"noisy": str(tmp_path / "colours"), "output": str(tmp_path / "other")}
    with pytest.raises(ValueError, match=r"\(C, H, W\) = \(1, 8, 8\), and .* makes \(3, 8, 8\)"):
        classifier.main(build(classifier.ClassifierConfig, settings))


def test_what_is_there_is_kept(extractor, make_unet, tmp_path):
    """An earlier classifier unless told otherwise, anything else always."""
    with pytest.raises(ValueError, match="pass --overwrite"):
        classifier.main(build(classifier.ClassifierConfig, SMALL | {"output": str(extractor)}))
    (tmp_path / "file").write_text("kept")
    GeneralizedDDIMPipeline(make_unet(), MultistepDDIMScheduler()).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "training.json").write_text("{}")
    for name, said in (("file", "is a file: choose a folder"), ("model", "no classifier that was made here")):
        settings = SMALL | {"output": str(tmp_path / name), "overwrite": True}
        with pytest.raises(ValueError, match=said):
            classifier.main(build(classifier.ClassifierConfig, settings))
    settings = SMALL | {"output": str(tmp_path / "again"), "steps": 2}
    before = classifier.main(build(classifier.ClassifierConfig, settings))
    after = classifier.main(build(classifier.ClassifierConfig, settings | {"overwrite": True, "seed": 1}))
    assert after["sha256"] == json.loads((tmp_path / "again" / "training.json").read_text())["sha256"]
    assert after["sha256"] != before["sha256"]
    mode = (tmp_path / "file").stat().st_mode  # of a new file, whatever the mask
    assert {each.stat().st_mode for each in (tmp_path / "again").iterdir()} == {mode}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "file", "model"]


def test_splits_are_not_classes(tmp_path):
    for i, name in enumerate(("train/0", "train/1", "test/0", "test/1")):
        (tmp_path / "set" / name).mkdir(parents=True)
        Image.new("L", (8, 8), 90 * i).save(tmp_path / "set" / name / "a.png")
    settings = SMALL | {"data": str(tmp_path / "set"), "output": str(tmp_path / "out"), "steps": 2, "batch_size": 2}
    said = classifier.main(build(classifier.ClassifierConfig, settings))
    assert (said["images"], said["dataset"]) == (2, {"name": "set", "split": "train"})
    assert open_extractor(str(tmp_path / "out"), "cpu", (1, 8, 8)).classes == 2
    settings |= {"data": str(tmp_path / "set" / "train"), "output": str(tmp_path / "again")}
    with pytest.raises(ValueError, match="has no split 'test': it has train"):
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
