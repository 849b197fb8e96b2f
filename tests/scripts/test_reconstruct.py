"""Table 2 and Figs. 5 and 6 as a script, and the image sets it reads."""

import json

import numpy as np
import pytest
import reconstruct
import torch
from exact import exact_pipe
from oracle import Mixture, alphas, linear_betas
from pictures import load
from PIL import Image
from trainer.settings import build
from trials import Fork, script

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler
from ddim_plugin.process.inversion import MOST_ROUNDS

QUICK = {
    "images": 5,
    "steps": (2, 3),
    "refinement_steps": (3,),
    "strip": (2, 3),
    "figure_steps": (1, 2),
    "paths": 2,
    "points": 3,
    "interpolation_steps": 2,
    "columns": 4,
    "batch_size": 3,
}


@pytest.fixture(scope="module")
def model(make_unet, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reconstruct") / "model"
    pipe = GeneralizedDDIMPipeline(make_unet(), GeneralizedDDIMScheduler(eta=0.5, clip_sample=True))
    pipe.save_pretrained(folder)
    return folder


def test_it_writes_tables_and_pictures(model, tmp_path):
    flags = []
    for key, value in QUICK.items():
        flags += [f"--{key}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    done = Fork(script, "training/reconstruct.py", "--model", model, "--output", tmp_path, *flags).wait()
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "reconstruct.json").read_text())
    assert [(row["S"], row["refinement_steps"]) for row in record["table"]] == [(2, None), (2, 3), (3, None), (3, 3)]
    assert record["images"] == 5
    for row in record["table"]:
        assert 0 < row["mean_squared_error"] < 1
        calls, S, k = row["evaluations_encoding"], row["S"], row["refinement_steps"]
        assert calls == S if k is None else S < calls <= MOST_ROUNDS * S * (k + 1)
        assert row["seconds"] > 0
    table = (tmp_path / "table2.md").read_text()
    assert table == reconstruct.table(record)
    assert f"{record['table'][1]['mean_squared_error']:.1e}" in table
    assert record["figure_6"]["largest_over_mean_step"]["largest"] >= 1
    assert record["figure_5"]["different_latents"] > 0
    for name in ("table2", "reconstructions", "figure5", "figure6", "interpolations"):
        assert np.asarray(Image.open(tmp_path / f"{name}.png")).std() > 5


def test_the_numbers_are_those_of_the_pipeline(tmp_path, monkeypatch):
    """On a network that knows its data, against encode and decode by hand; refined beats naive by far."""
    data = Mixture((0.3, 0.7), (-0.6, 0.5), (0.02, 0.03), alphas(linear_betas()))
    made = exact_pipe(data, GeneralizedDDIMScheduler(timestep_spacing="leading"), torch.float32, sample_size=8)
    monkeypatch.setattr(GeneralizedDDIMPipeline, "from_pretrained", lambda name: made)
    settings = {"model": "x", "output": str(tmp_path), "steps": (10, 40), "figure_steps": (10, 100)}
    record = json.loads(json.dumps(reconstruct.main(build(reconstruct.ReconstructConfig, QUICK | settings))))
    naive, refined, finer, _ = (row["mean_squared_error"] for row in record["table"])
    images = load("digits", "test")[0][:5]
    pipe = exact_pipe(data, GeneralizedDDIMScheduler(timestep_spacing="leading"), torch.float32, sample_size=8)
    again = pipe.reconstruct(images, 10, refinement_steps=None, output_type="pt")
    assert naive == pytest.approx(float((again - images / 255).pow(2).mean()), rel=1e-3)
    assert refined < 0.5 * naive
    assert finer < 0.5 * naive
    assert record["table"][1]["largest_evaluations_a_move"] <= MOST_ROUNDS * (QUICK["refinement_steps"][0] + 1)
    figure = record["figure_5"]
    assert figure["same_latent"]["10"] < 0.5 * figure["different_latents"]


def test_refinements_follow_the_steps(model, tmp_path):
    """Any steps can be given alone; the record has the refinements that were used."""
    settings = {key: value for key, value in QUICK.items() if key != "refinement_steps"} | {"model": str(model)}
    for steps, used in (((3,), (14,)), ((2, 25, 4), (14, 9, 14))):
        given = settings | {"steps": steps, "output": str(tmp_path / str(len(steps))), "images": 1, "paths": 0}
        result = reconstruct.main(build(reconstruct.ReconstructConfig, given))
        assert result["config"]["refinement_steps"] == used
        assert [row["refinement_steps"] for row in result["table"][1::2]] == list(used)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"images": 0}, "images must be positive"),
        ({"batch_size": -1}, "batch_size must be positive"),
        ({"refinement_steps": (1, 2, 3)}, "refinement_steps has 3 entries for 2 steps"),
        ({"refinement_steps": (0,)}, "refinement_steps must be positive numbers"),
        ({"steps": ()}, "steps must be positive numbers"),
        ({"steps": (2, 2)}, "steps must be distinct"),
        ({"steps": (2, 1001)}, "must be an integer from 1 to 1000"),
        ({"figure_steps": (0,)}, "figure_steps must be positive"),
        ({"strip": (2, 2000)}, "must be an integer from 1 to 1000"),
        ({"tolerance": -1.0}, "tolerance must be a non-negative"),
        ({"class_label": 1}, "the network is unconditional: leave class_label out"),
        ({"strip": (1, 2, 3)}, "strip takes two"),
        ({"points": 1}, "points must be at least 2"),
        ({"data": "nowhere.parquet"}, "there is no file nowhere.parquet"),
    ],
)
def test_bad_settings_leave_nothing(model, tmp_path, values, message):
    output = tmp_path / "out"
    with pytest.raises(ValueError, match=message):
        reconstruct.main(
            build(reconstruct.ReconstructConfig, QUICK | {"model": str(model), "output": str(output)} | values)
        )
    assert not output.exists()


def test_an_earlier_run_is_kept(model, tmp_path, monkeypatch):
    (tmp_path / "table2.md").write_text("the one for the paper")
    settings = QUICK | {"model": str(model), "output": str(tmp_path)}
    with pytest.raises(ValueError, match="table2.md exists: choose another output, or pass --overwrite"):
        reconstruct.main(build(reconstruct.ReconstructConfig, settings))
    assert (tmp_path / "table2.md").read_text() == "the one for the paper"
    again = settings | {"overwrite": True, "paths": 0, "images": 1}
    with monkeypatch.context() as patch:
        patch.setattr(
            GeneralizedDDIMPipeline, "encode", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            reconstruct.main(build(reconstruct.ReconstructConfig, again))
    assert (tmp_path / "table2.md").read_text() == "the one for the paper"  # until there is something better
    reconstruct.main(build(reconstruct.ReconstructConfig, again))
    assert "| S | paper" in (tmp_path / "table2.md").read_text()


def test_a_class_conditional_network(make_unet, tmp_path):
    GeneralizedDDIMPipeline(make_unet(num_class_embeds=3), GeneralizedDDIMScheduler()).save_pretrained(tmp_path / "m")
    settings = QUICK | {"model": str(tmp_path / "m"), "output": str(tmp_path / "out")}
    with pytest.raises(ValueError, match="the network needs class_label"):
        reconstruct.main(build(reconstruct.ReconstructConfig, settings))
    reconstruct.main(build(reconstruct.ReconstructConfig, settings | {"class_label": 2}))
    assert (tmp_path / "out" / "figure6.png").exists()
