"""Measurements of reconstructions and paths, on models whose answers are known."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from measure.reconstructions import entries, paths, round_trip, same_latent, table

from ddim_plugin.process.inversion import InversionReport


def test_paths_are_measured_by_their_steps():
    """A path of 0, ¼, 1 has the steps ¼ and ¾: the largest is 1.5 times the mean."""
    made = torch.tensor([[0.0, 0.25, 1.0], [0.0, 0.5, 1.0]]).view(2, 3, 1, 1, 1).expand(2, 3, 1, 2, 2)
    bench = SimpleNamespace(interpolate=lambda z0, z1, S, points: made)
    images = torch.tensor([0, 255, 0, 51], dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 1, 2, 2)
    result, found = paths(bench, images, torch.zeros(4, 1, 2, 2), 7, 3)
    assert found is made
    assert (result["S"], result["points"], result["paths"]) == (7, 3, 2)
    steps = result["largest_over_mean_step"]
    assert steps["largest"] == pytest.approx(1.5)
    assert steps["mean"] == pytest.approx(1.25)
    assert steps["share_above_3"] == 0
    assert result["mean_squared_error_of_the_ends"] == pytest.approx(0.8**2 / 4)


def test_latents_of_a_pair_are_in_succession():
    seen = []

    def interpolate(z0, z1, S, points):
        seen.append((z0.flatten().tolist(), z1.flatten().tolist()))
        return torch.zeros(2, points, 1, 1, 1)

    z = torch.arange(4.0).view(4, 1, 1, 1)
    paths(SimpleNamespace(interpolate=interpolate), torch.zeros(4, 1, 1, 1), z, 5, 2)
    assert seen == [([0.0, 2.0], [1.0, 3.0])]


def test_one_latent_is_compared_with_itself_at_other_steps():
    """Here a latent z is decoded as z + 1/S."""
    bench = SimpleNamespace(noise=lambda count, seed: torch.arange(count) + seed, decode=lambda z, S: z + 1 / S)
    result, rows = same_latent(bench, (1, 2, 4), 2, 3)
    assert [row.tolist() for row in rows] == [[4, 5], [3.5, 4.5], [3.25, 4.25]]
    assert result == {"reference_S": 4, "same_latent": {1: 0.75, 2: 0.25}, "different_latents": 1.0}
    assert same_latent(bench, (1,), 1, 0)[0] == {"reference_S": 1, "same_latent": {}, "different_latents": None}


@pytest.mark.parametrize("refinement", [None, 3])
def test_a_row_has_the_errors_of_each_image(refinement):
    """Two images of a gray of 0.2, decoded 0.1 and 0.3 too bright."""
    flags = np.array([[True, False], [False, False]])
    found = InversionReport(
        timesteps=np.array([1, 7]),
        residual=np.full((2, 2), 0.5),
        evaluations=np.array([[2, 3], [2, 2]]),
        converged=flags,
        tolerance=1e-5,
        latent_mean=np.zeros(2),
        latent_std=np.ones(2),
    )
    bench = SimpleNamespace(
        encode=lambda images, S, refinement_steps: (images, found),
        decode=lambda z, S: z / 255 + torch.tensor([0.1, 0.3]).view(2, 1, 1, 1),
        pipe=SimpleNamespace(scheduler=SimpleNamespace(timesteps=[0] * 5)),
    )
    row, again = round_trip(bench, torch.full((2, 1, 4, 4), 51, dtype=torch.uint8), 5, refinement)
    assert again.shape == (2, 1, 4, 4)
    assert row["mean_squared_error"] == pytest.approx((0.01 + 0.09) / 2)
    assert row["largest_error"] == pytest.approx(0.09)
    assert row["standard_error"] == pytest.approx(0.04)
    assert (row["evaluations_decoding"], row["latent_std"]) == (5, 1.0)
    assert (row["evaluations_encoding"], row["largest_evaluations_a_move"]) == (4.5, 3)
    solved = {"not_converged": [1, 7], "largest_residual": 0.5} if refinement else {}
    assert {key: row[key] for key in row.keys() & {"not_converged", "largest_residual"}} == solved


def test_the_table_and_the_entries_of_a_record():
    row = {"S": 10, "mean_squared_error": 0.02, "standard_error": None, "evaluations_encoding": 11.0}
    row |= {"evaluations_decoding": 10, "seconds": 1.24, "latent_std": 0.98}
    result = {"config": {"data": "digits", "split": "test"}, "images": 1, "spacing": "linear"}
    result["table"] = [row | {"refinement_steps": None}, row | {"refinement_steps": 3, "mean_squared_error": 0.001}]
    naive, refined = entries(result)
    assert (naive["metric"], refined["metric"]) == ("reconstruction_error_naive", "reconstruction_error_refined")
    assert (naive["value"], naive["nfe"], naive["dataset"]) == (0.02, 21.0, {"name": "digits", "split": "test"})
    assert "standard_error" not in naive  # unknown for one image
    line = table(result).splitlines()[-1]
    assert line == "| 10 | 0.0140 | 2.0e-02 | 11 | 1.2 | 0.980 | 1.0e-03 | 11 | 1.2 | 0.980 |"
