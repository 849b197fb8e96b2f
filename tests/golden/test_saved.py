"""Folders that earlier versions saved, code and all: they open, and make the pictures they made."""

import json

import numpy as np
import pytest
import torch
from freeze import CALL, SAVED, draw, without_package

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler
from ddim_plugin.hub import code as bundle

FOLDERS = sorted(folder for folder in SAVED.iterdir() if folder.is_dir())
TOLERANCE = 1e-5  # convolutions differ between versions of torch and between processors


def frozen(folder):
    return np.array(json.loads((folder / "images.json").read_text()))


def test_there_are_some():
    assert FOLDERS
    for folder in FOLDERS:
        inside = frozen(folder)
        assert ((inside > 0) & (inside < 1)).mean() > 0.5


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_with_the_package(folder):
    assert np.abs(draw(GeneralizedDDIMPipeline.from_pretrained(folder)) - frozen(folder)).max() < TOLERANCE


def test_without_it_all_versions_in_one_process(tmp_path, make_unet):
    """Those that are frozen, by their own code, and the one at hand."""
    now = tmp_path / "now"
    GeneralizedDDIMPipeline(make_unet(), GeneralizedDDIMScheduler(prediction_type="sample")).save_pretrained(now)
    cases = [{"source": str(folder), "call": CALL} for folder in FOLDERS]
    cases += [{"source": str(now), "call": {"num_inference_steps": 3}}, *cases]
    answers = without_package(cases, tmp_path / "home")
    assert [answer.get("trace") for answer in answers] == [None] * len(cases)
    for folder, answer in zip([*FOLDERS, None, *FOLDERS], answers, strict=True):
        if folder is None:
            assert answer["module"] == bundle.code().name
        else:
            [entry] = folder.glob("ddim_plugin_*_pipeline.py")
            assert answer["module"] == entry.stem.removesuffix("_pipeline")
            assert np.abs(np.array(answer["images"]) - frozen(folder)).max() < TOLERANCE


def test_a_frozen_config_is_saved_again_as_it_was(tmp_path):
    for folder in FOLDERS:
        pipe = GeneralizedDDIMPipeline.from_pretrained(folder)
        pipe.save_pretrained(tmp_path)
        before = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        after = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
        for config in (before, after):
            config.pop("_diffusers_version")
        betas = [config.pop("trained_betas", None) for config in (before, after)]  # numbers, of a named schedule
        assert before == after
        assert betas == [None, None] or np.allclose(*betas, rtol=1e-12)
        assert torch.isfinite(pipe.unet.conv_in.weight).all()
