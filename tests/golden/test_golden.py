"""Saved files of this version, and the numbers they mean: later versions must read them and agree."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ddim_plugin import GeneralizedDDIMScheduler

HERE = Path(__file__).parent
CASES = json.loads((HERE / "frozen" / "trajectories.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_frozen_configs_give_the_frozen_trajectories(case, tmp_path):
    (tmp_path / "scheduler_config.json").write_text(json.dumps(case["saved_config"]))
    scheduler = GeneralizedDDIMScheduler.from_pretrained(tmp_path)
    scheduler.set_timesteps(case["steps"])
    assert scheduler.timesteps.tolist() == case["timesteps"]
    x = torch.tensor(case["x_T"], dtype=torch.float64)
    z = torch.tensor(case["z"], dtype=torch.float64)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.tanh(x) + 0.1 * z, t, x, variance_noise=z).prev_sample
    assert np.allclose(x.numpy(), case["x_0"], rtol=1e-10, atol=1e-12)
