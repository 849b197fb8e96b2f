"""Extractors: what they see, and how they are opened."""

import json
import shutil
import sys
import urllib.error
from types import ModuleType, SimpleNamespace

import pytest
import torch
from measure.extractors import INCEPTION, open_extractor
from measuring import classifier, values
from pictures import load
from transformers import ResNetForImageClassification, ViTConfig, ViTForImageClassification


def test_a_classifier_that_says_its_preprocessing(measure, tmp_path):
    """The size of its config; mean and deviation of its preprocessor_config.json, where there is one."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    config = ViTConfig(image_size=16, patch_size=8, num_channels=1, num_labels=5, **sizes)
    network = ViTForImageClassification(config).eval()
    network.save_pretrained(tmp_path / "vit")
    said = {"size": {"height": 16, "width": 16}, "image_mean": [0.3], "image_std": [0.2], "do_normalize": True}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(said))
    made = open_extractor(str(tmp_path / "vit"), "cpu", (1, 8, 8))
    pictures = load("digits")[0][:9]
    found = made(pictures)
    enlarged = torch.nn.functional.interpolate(pictures / 255, (16, 16), mode="bilinear", antialias=True)
    with torch.no_grad():
        logits = network((enlarged - 0.3) / 0.2).logits
        again = network.classifier(torch.from_numpy(found.features))
    assert found.logits == pytest.approx(logits.numpy(), abs=1e-5)
    assert again.numpy() == pytest.approx(logits.numpy(), abs=1e-5)
    assert (made.preprocessing["size"], made.preprocessing["mean"]) == ([16, 16], [0.3])
    said["image_mean"] = [0.1]
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(said))
    other = open_extractor(str(tmp_path / "vit"), "cpu", (1, 8, 8))
    assert other.fingerprint != made.fingerprint


def test_several_extractors_see_the_same_pictures(places, measure, tmp_path):
    classifier(tmp_path / "other", hidden_sizes=[8, 12])
    both = measure("both", extractors=(*places["extractors"], str(tmp_path / "other")))
    alone = measure("alone")
    found = [entry for entry in both["results"] if entry["metric"] == "fd_classifier"]
    assert [entry["value"] for entry in found] == values(alone)
    assert len(both["results"]) == 2 * len(alone["results"])
    shutil.copytree(places["extractors"][0], tmp_path / "again" / "classifier")
    with pytest.raises(ValueError, match="extractors must have distinct last names"):
        measure("twice", extractors=(*places["extractors"], str(tmp_path / "again" / "classifier")))


def test_extractors_that_do_not_fit(measure, tmp_path):
    classifier(tmp_path / "colour", num_channels=3)
    with pytest.raises(ValueError, match="takes pictures with 3 channels, the model makes 1"):
        measure(extractors=(str(tmp_path / "colour"),))
    classifier(tmp_path / "headless")
    network = ResNetForImageClassification.from_pretrained(tmp_path / "headless")
    network.resnet.save_pretrained(tmp_path / "headless")
    with pytest.raises(ValueError, match="does not hold all the weights of a classifier: classifier"):
        measure(extractors=(str(tmp_path / "headless"),))


def test_no_network_for_an_extractor(measure, monkeypatch):
    """What to pass instead is said, for a model of the Hub and for torch-fidelity's weights."""

    def unreachable(*args, **kwargs):
        raise OSError("We couldn't connect to 'https://huggingface.co'")

    monkeypatch.setattr("transformers.AutoModelForImageClassification.from_pretrained", unreachable)
    with pytest.raises(
        ValueError, match="couldn't connect(.|\n)*hf download user/net --local-dir FOLDER.*--extractors FOLDER"
    ):
        measure(extractors=("user/net",))

    def no_download(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    package = ModuleType("torch_fidelity")
    package.__path__, package.utils = [], SimpleNamespace(create_feature_extractor=no_download)
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    for name in ("metric_isc", "metric_kid", "metric_prc", "utils"):
        monkeypatch.setitem(sys.modules, f"torch_fidelity.{name}", ModuleType(name))
    with pytest.raises(ValueError, match=r"weights of inception-v3-compat cannot be downloaded.*--extractors FOLDER"):
        measure(extractors=(INCEPTION,))


def test_without_torch_fidelity(measure, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ValueError, match="the extractor inception-v3-compat needs torch-fidelity.*pip install"):
        measure(extractors=(INCEPTION,))
