"""Training with self-conditioning: what the network sees, resuming, and loading."""

import json
from types import SimpleNamespace

import convert_checkpoint
import numpy as np
import pytest
import torch
from trainer.objective import Objective
from trainer.run import Run
from trainer.settings import build
from training_runs import UNET, fit, losses, same_weights

from ddim_plugin import GeneralizedDDIMPipeline
from ddim_plugin.process.moves import PREDICTIONS, prediction
from ddim_plugin.process.paths import variance_exploding, variance_preserving

PATH = variance_preserving(np.linspace(1, 0.1, 11))
WITHOUT_DROPOUT = UNET | {"dropout": 0.0}


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize(("first", "rows"), [(0, [0, 2, 4]), (1, [1, 3])])
def test_the_network_sees_a_guess_of_every_second_image(kind, first, rows):
    """x̂0 is that of a pass that sees 0, has no gradient, and is clipped. The other images see 0."""
    path = variance_exploding(10, 0.1, 20.0, 0.5) if kind == "edm" else PATH
    objective = Objective(path, kind)
    batch = objective.noised(torch.randn(5, 1, 2, 2), torch.randn(5, 1, 2, 2), torch.tensor([1, 4, 6, 9, 10]))

    scaled = objective.seen(batch.x, batch.t)

    def predict(network, x, t, labels):
        assert not torch.is_grad_enabled()
        assert torch.equal(x, torch.cat([scaled[rows], torch.zeros(len(rows), 1, 2, 2)], 1))
        assert (t.tolist(), labels.tolist()) == (batch.t[rows].tolist(), rows)
        return x[:, :1] / 3

    run = SimpleNamespace(config=SimpleNamespace(self_conditioning=True), objective=objective, _predict=predict)
    seen = Run._input(run, None, batch, torch.arange(5), first)
    expected = torch.zeros_like(batch.x)
    for row in rows:
        maps = prediction(kind, path.level(int(batch.t[row])), path.sigma_data)
        expected[row] = (maps.x0_x * batch.x[row] + maps.x0_out * scaled[row] / 3).clamp(-1, 1)
    assert torch.allclose(seen, torch.cat([scaled, expected], 1), atol=1e-4)


def test_a_resumed_run_is_the_run_that_was_not_stopped(tmp_path):
    """Bit for bit, with dropout and averages. The first pass draws from the same generators."""
    settings = {"self_conditioning": True, "class_conditional": True, "eval_every": 3}
    fit(tmp_path / "whole", **settings)
    fit(tmp_path / "parts", **settings, steps=3)
    fit(tmp_path / "parts", **settings, resume="latest")
    same_weights(tmp_path / "whole", tmp_path / "parts")
    with pytest.raises(ValueError, match="another self_conditioning: it was True, now False"):
        fit(tmp_path / "parts", **settings | {"self_conditioning": False}, resume="latest", steps=8)


def test_a_batch_in_parts_sees_the_same_guesses(tmp_path):
    fit(tmp_path / "whole", unet=WITHOUT_DROPOUT, self_conditioning=True)
    fit(tmp_path / "parts", unet=WITHOUT_DROPOUT, self_conditioning=True, gradient_accumulation_steps=2)
    whole, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert parts == pytest.approx(whole, rel=1e-4)
    fit(tmp_path / "plain", unet=WITHOUT_DROPOUT)
    assert losses(tmp_path / "plain") != pytest.approx(whole, rel=1e-4)


def test_the_pipeline_knows_its_network(tmp_path):
    """Saved, and converted from a checkpoint: only our pipeline opens it, and it draws images of C channels."""
    fit(
        tmp_path / "run",
        self_conditioning=True,
        channels=3,
        loss="hybrid",
        scheduler={"variance_type": "learned_range"},
    )
    values = {
        "checkpoint": str(tmp_path / "run" / "checkpoints" / "step-00000006"),
        "output": str(tmp_path / "converted"),
    }
    convert_checkpoint.main(build(convert_checkpoint.ConvertConfig, values))
    made = []
    for name in ("run", "converted"):
        pipe = GeneralizedDDIMPipeline.from_pretrained(tmp_path / name)
        channels = pipe.unet.config.in_channels, pipe.unet.config.out_channels, pipe.image_channels
        assert channels == (6, 6, 3)
        made.append(pipe(2, 4, generator=torch.Generator().manual_seed(0), output_type="np").images)
        assert json.loads((tmp_path / name / "model_index.json").read_text())["_class_name"] == type(pipe).__name__
    assert made[0].shape == (2, 8, 8, 3)
    assert np.array_equal(*made)


def test_a_table_that_contradicts_self_conditioning(tmp_path):
    with pytest.raises(ValueError, match=r"sample_size \(1, 1, 8\); the images need \(2, 1, 8\)"):
        fit(tmp_path / "run", self_conditioning=True, unet=UNET | {"in_channels": 1})
