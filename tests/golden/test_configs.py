"""Configs that version 0.1 wrote are read as it read them, by every class."""

import json
from inspect import signature
from pathlib import Path

import pytest
from freeze_configs import CLASSES, read

import ddim_plugin

FROZEN = json.loads((Path(__file__).parent / "frozen" / "configs.json").read_text())
CASES = FROZEN["cases"]
SINCE = ("use_flow_sigmas", "shift", "flow_shift", "use_dynamic_shifting", "sigma_min", "sigma_max")
SINCE += ("sigma_data",)
SINCE += ("corrector_steps", "corrector_snr", "denoising_start", "denoising_end", "refinement_steps", "fitted_solvers")
"""Settings that 0.1 did not have."""
REMOVED = ("solver_quantity", "solver_coordinate", "solver_corrector", "solver_extrapolation", "start_from_top")


def test_there_are_configs():
    assert len(CASES) > 70
    assert sum(each["read"][name] is not None for each in CASES for name in CLASSES) > 200


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("place", range(len(CASES)))
def test_configs_are_read_as_0_1_read_them(place, name):
    expected = CASES[place]["read"][name]
    if expected is not None:
        expected = {k: v for k, v in (FROZEN["defaults"][name] | expected).items() if k not in REMOVED}
        expected |= {k: v for k, v in CASES[place]["config"].items() if k == "steps_offset"}  # 0.1 dropped it in part
    found = read(name, CASES[place]["config"])
    if expected is not None:
        later = {k: found.pop(k) for k in SINCE if k in found}
        if times := expected.pop("fitted_timesteps", None):
            assert later.pop("fitted_solvers") == {S: {"timesteps": each} for S, each in times.items()}
            later["fitted_solvers"] = None
        assert later == {
            k: each.default for k, each in signature(getattr(ddim_plugin, name)).parameters.items() if k in SINCE
        }
        expected = {k: v for k, v in expected.items() if k not in SINCE}  # settings of other samplers
    assert found == expected
