"""Folders that earlier versions saved: they load, make the images they made, and are saved again in today's format."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from freeze import CALL, SAVED, draw, without_package

from ddim_plugin import GeneralizedDDIMPipeline
from ddim_plugin.hub.code import code

FOLDERS = sorted(folder for folder in SAVED.iterdir() if folder.is_dir())
TOLERANCE = 1e-5  # convolutions differ between versions of torch and between processors


def frozen(folder):
    return np.array(json.loads((folder / "images.json").read_text()))


def test_there_are_some():
    assert FOLDERS
    for folder in FOLDERS:
        inside = frozen(folder)
        assert ((inside > 0) & (inside < 1)).mean() > 0.5
        assert not list(folder.rglob("*.py"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_with_the_package(folder):
    assert np.abs(draw(GeneralizedDDIMPipeline.from_pretrained(folder)) - frozen(folder)).max() < TOLERANCE


def test_without_it_when_saved_again(tmp_path):
    """In one process that cannot import the package, by the code file of today."""
    cases = []
    for folder in FOLDERS:
        again = tmp_path / folder.name
        GeneralizedDDIMPipeline.from_pretrained(folder).save_pretrained(again)
        (again / f"{code().name}.py").write_text(code().text)
        cases.append({"source": str(again), "call": CALL})
    answers = without_package(cases, tmp_path / "home")
    assert [answer.get("trace") for answer in answers] == [None] * len(cases)
    for folder, answer in zip(FOLDERS, answers, strict=True):
        assert answer["module"].endswith(code().name)
        assert np.abs(np.array(answer["images"]) - frozen(folder)).max() < TOLERANCE


def test_a_frozen_config_is_saved_again_with_its_settings(tmp_path):
    for folder in FOLDERS:
        pipe = GeneralizedDDIMPipeline.from_pretrained(folder)
        pipe.save_pretrained(tmp_path)
        before = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        after = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
        names = [config.pop("_class_name") for config in (before, after)]
        for config in (before, after):
            config.pop("_diffusers_version")
        betas = [config.pop("trained_betas", None) for config in (before, after)]  # numbers, of a named schedule
        if names == ["GeneralizedDDIMScheduler", "DDIMScheduler"]:
            assert after["_ddim_plugin"].pop("class") == names[0]
            stand_in = after.pop("timestep_spacing")  # for stock schedulers: the spacing of ours is not one of theirs
            assert stand_in in ("leading", "trailing", "linspace")
        else:
            assert names[0] == names[1]
        assert before == after
        assert betas == [None, None] or np.allclose(*betas, rtol=1e-12)
        assert torch.isfinite(pipe.unet.conv_in.weight).all()
        assert isinstance(DDIMScheduler.from_pretrained(tmp_path, subfolder="scheduler"), DDIMScheduler)
