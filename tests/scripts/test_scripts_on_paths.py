"""All scripts that read a model, with one of flow matching and one of variance exploding."""

import evaluate
import few_steps
import numpy as np
import package
import pytest
import reconstruct
import sample
import torch
from cards.records import read_results
from measure.grid.settings import EvaluateConfig
from PIL import Image
from trainer.settings import build
from transformers import ResNetConfig, ResNetForImageClassification

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler, MultistepDDIMScheduler

FLOW = {"prediction_type": "flow_prediction", "shift": 2.0}
EXPLODING = {"prediction_type": "score", "sigma_max": 20.0}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_labels": 10}


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def models(make_unet, tmp_path_factory):
    folder = tmp_path_factory.mktemp("paths")
    GeneralizedDDIMPipeline(make_unet(), MultistepDDIMScheduler(**FLOW)).save_pretrained(folder / "flow")
    unet, scheduler = make_unet(time_embedding_type="fourier"), GeneralizedDDIMScheduler(**EXPLODING)
    GeneralizedDDIMPipeline(unet, scheduler).save_pretrained(folder / "exploding")
    torch.manual_seed(1)
    ResNetForImageClassification(ResNetConfig(**RESNET, num_channels=1)).save_pretrained(folder / "classifier")
    return folder


@pytest.mark.parametrize("name", ["flow", "exploding"])
def test_samples(models, tmp_path, name):
    quick = {"columns": 2, "steps": (3,), "etas": (0.0, 0.5), "eta_steps": (3,), "data": "digits"}
    sample.main(build(sample.SampleConfig, quick | {"model": str(models / name), "output": str(tmp_path)}))
    for file in ("samples_by_steps.png", "samples_by_eta.png"):
        assert np.asarray(Image.open(tmp_path / file)).std() > 5


@pytest.mark.parametrize("name", ["flow", "exploding"])
def test_reconstructions_and_a_package_of_them(models, tmp_path, name):
    quick = {"images": 3, "steps": (4,), "refinement_steps": (8,), "strip": (2, 3), "figure_steps": (1, 2), "paths": 1}
    quick |= {"points": 3, "interpolation_steps": 2, "columns": 3, "output": str(tmp_path / "table")}
    model = {"model": str(models / name)}
    rows = reconstruct.main(build(reconstruct.ReconstructConfig, quick | model))["table"]
    assert [row["S"] for row in rows] == [4, 4]
    if name == "flow":  # far from the data a random network has no inverse
        assert rows[1]["mean_squared_error"] < rows[0]["mean_squared_error"]
    known = {"records": [str(tmp_path / "table")], "output": str(tmp_path / "card")}
    package.main(build(package.PackageConfig, model | known))
    pipe = GeneralizedDDIMPipeline.from_pretrained(tmp_path / "card")
    assert type(pipe.scheduler.path) is type(GeneralizedDDIMPipeline.from_pretrained(models / name).scheduler.path)
    assert "table2.png" in (tmp_path / "card" / "README.md").read_text()


@pytest.mark.parametrize("name", ["flow", "exploding"])
def test_evaluation(models, tmp_path, name):
    settings = {"model": str(models / name), "output": str(tmp_path), "extractors": [str(models / "classifier")]}
    settings |= {"reference": "digits", "steps": (2,), "variances": ("0", "0.5"), "images": 24, "batch_size": 16}
    result = evaluate.main(build(EvaluateConfig, settings))
    values = [entry["value"] for entry in result["results"]]
    assert len(values) == 4
    assert np.isfinite(values).all()
    assert values[0] != values[2]


def test_few_steps_of_flow_matching(models, tmp_path):
    settings = {"reference": "digits", "extractor": str(models / "classifier"), "output": str(tmp_path), "nfe": (3,)}
    settings |= {"near": 2, "screen": 24, "images": 20, "shortlist": 2, "margin": 1e9, "batch_size": 24}
    settings |= {"families": ("ours", "Flow", "UniPC 2"), "thousand": ()}
    result = few_steps.main(build(few_steps.FewStepsConfig, settings | {"model": str(models / "flow")}))
    (row,) = result["rows"]
    found = {entry["family"] for entry in row["rms"]}
    assert found == {"ours", "Flow Euler", "Flow Heun", "UniPC 2"}
    assert {entry["family"] for entry in row["frechet"]} >= {"ours", "ours, η = 1", "Flow Euler"}
    assert "| 3 |" in (tmp_path / "few_steps.md").read_text()
    assert {"ours", "Flow Euler"} <= {entry.get("scheduler") for entry in read_results(tmp_path / "results.json")}
    with pytest.raises(ValueError, match="has 20·ε at the top"):
        few_steps.main(build(few_steps.FewStepsConfig, settings | {"model": str(models / "exploding")}))
