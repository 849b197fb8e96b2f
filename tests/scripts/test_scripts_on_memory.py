"""Scripts and commands with a network that sees its last x̂0: those that sample work, the others refuse."""

import evaluate
import few_steps
import inversion
import nll
import numpy as np
import pytest
import reconstruct
import sample
import torch
from measure.grid.settings import EvaluateConfig
from PIL import Image
from trainer.settings import build
from transformers import ResNetConfig, ResNetForImageClassification

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler, cli
from ddim_plugin.pipelines.loop import SELF_CONDITIONING

RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_labels": 10}


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def models(make_unet, tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    unet = make_unet(channels=2, out_channels=1, **{SELF_CONDITIONING: True})
    GeneralizedDDIMPipeline(unet, GeneralizedDDIMScheduler()).save_pretrained(folder / "model")
    torch.manual_seed(1)
    ResNetForImageClassification(ResNetConfig(**RESNET, num_channels=1)).save_pretrained(folder / "classifier")
    return folder


def test_samples_and_their_evaluation(models, tmp_path):
    quick = {"columns": 2, "steps": (3,), "etas": (0.5,), "eta_steps": (3,), "data": "digits"}
    sample.main(build(sample.SampleConfig, quick | {"model": str(models / "model"), "output": str(tmp_path)}))
    assert np.asarray(Image.open(tmp_path / "samples_by_steps.png")).std() > 5
    settings = {"model": str(models / "model"), "output": str(tmp_path), "extractors": [str(models / "classifier")]}
    settings |= {"reference": "digits", "steps": (2,), "variances": ("0",), "images": 24, "batch_size": 16}
    (value, _) = (entry["value"] for entry in evaluate.main(build(EvaluateConfig, settings))["results"])
    assert np.isfinite(value)


@pytest.mark.parametrize(
    ("main", "config", "settings"),
    [
        (nll.main, nll.NLLConfig, {"data": "digits"}),
        (reconstruct.main, reconstruct.ReconstructConfig, {"data": "digits"}),
        (inversion.main, inversion.InversionConfig, {"data": "digits"}),
        (few_steps.main, few_steps.FewStepsConfig, {"reference": "digits", "extractor": "classifier"}),
    ],
)
def test_what_needs_a_function_of_x_t_refuses(models, tmp_path, main, config, settings):
    settings = settings | {"model": str(models / "model"), "output": str(tmp_path / "out")}
    if "extractor" in settings:
        settings["extractor"] = str(models / settings["extractor"])
    with pytest.raises(ValueError, match=r"sees x̂0 of its last step \(self-conditioning\).* use evaluate.py"):
        main(build(config, settings))


def test_commands(models, tmp_path, capfd):
    model = str(models / "model")
    assert cli.main(["sample", model, "--steps", "3", "--num", "2", "--output", str(tmp_path / "out")]) == 0
    Image.new("L", (8, 8), 90).save(tmp_path / "grey.png")
    given = [model, str(tmp_path / "grey.png"), "--steps", "3", "--output", str(tmp_path / "latents")]
    assert cli.main(["encode", *given]) == 1
    assert "so no step has an inverse" in capfd.readouterr().err
