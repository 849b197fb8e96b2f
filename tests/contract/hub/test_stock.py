"""A stock pipeline with a scheduler of this package: saved plainly, it loads for everybody."""

import json
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import tiny_stable_diffusion
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline

from ddim_plugin import (
    GeneralizedDDIMScheduler,
    InverseDDIMScheduler,
    MultistepDDIMScheduler,
    restore_scheduler,
)

READER = Path(__file__).parents[2] / "reader.py"
OFFSET = {"steps_offset": 1}  # Stable Diffusion sets it when it loads
SCHEDULERS = {
    "noisy": GeneralizedDDIMScheduler(eta=0.4, timestep_spacing="quadratic", beta_schedule="sigmoid", **OFFSET),
    "multistep": MultistepDDIMScheduler(solver_order=2, fitted_solvers={"2": {"timesteps": [700, 300]}}, **OFFSET),
    "inverse": InverseDDIMScheduler(timestep_spacing="paper_linear", **OFFSET),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of Stable Diffusion by the name of their scheduler."""
    place = tmp_path_factory.mktemp("stock")
    pipe = tiny_stable_diffusion.build(place / "tokenizer", SCHEDULERS["noisy"])
    for name, scheduler in SCHEDULERS.items():
        pipe.scheduler = scheduler
        pipe.save_pretrained(place / name)
    return place


def settings(scheduler):
    return {key: value for key, value in scheduler.config.items() if not key.startswith("_")}


def test_it_loads_without_the_package(saved, tmp_path):
    names = [(name, pipeline) for name in SCHEDULERS for pipeline in ("StableDiffusionPipeline", "DiffusionPipeline")]
    cases = [{"source": str(saved / name), "pipeline": pipeline} for name, pipeline in names]
    cases[0]["save_to"] = str(tmp_path / "again")
    done = subprocess.run(
        [sys.executable, str(READER), "diffusers"],
        input=json.dumps(cases),
        env={"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for answer in json.loads(done.stdout.splitlines()[-1]):
        assert answer.get("trace") is None
        assert (answer["pipeline"], answer["scheduler"]) == ("StableDiffusionPipeline", "DDIMScheduler")
        assert answer["said"] == []
    again = restore_scheduler(StableDiffusionPipeline.from_pretrained(tmp_path / "again"))  # saved by stock classes
    assert settings(again.scheduler) == settings(SCHEDULERS["noisy"])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_ours_is_restored_with_its_settings(saved, name, quiet_diffusers):
    index = json.loads((saved / name / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    pipe = DiffusionPipeline.from_pretrained(saved / name)
    assert type(pipe.scheduler) is DDIMScheduler
    assert restore_scheduler(pipe) is pipe
    assert type(pipe.scheduler) is type(SCHEDULERS[name])
    assert settings(pipe.scheduler) == settings(SCHEDULERS[name])
    assert quiet_diffusers == []


def test_the_restored_scheduler_makes_the_same_images(saved):
    pipe = StableDiffusionPipeline.from_pretrained(saved / "noisy")
    pipe.set_progress_bar_config(disable=True)
    made = []
    for scheduler in (SCHEDULERS["noisy"], restore_scheduler(pipe).scheduler):
        pipe.scheduler = scheduler
        seed = torch.Generator().manual_seed(0)
        made.append(pipe("a", num_inference_steps=3, generator=seed, output_type="latent").images)
    assert torch.equal(*made)


def test_pipelines_without_ours_are_saved_as_before(make_unet, tmp_path):
    pipe = DDIMPipeline(make_unet(), DDIMScheduler())
    assert pipe.to_json_string() == diffusers.ConfigMixin.to_json_string(pipe)
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "model_index.json").read_text() == diffusers.ConfigMixin.to_json_string(pipe)
