"""Pushing from the command line and the training script."""

import json

import pytest
import train
from accelerate.state import AcceleratorState, GradientState, PartialState
from pushing import REPO, TOKEN, card
from trainer.settings import build

from ddim_plugin import cli


def test_the_command(hub, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert cli.main(["push", str(folder), REPO, "--private", "--token", TOKEN, "--license", "mit"]) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == f"pushed {folder}: {hub.url}/{REPO}/commit/{hub.commits(REPO)[0].sha}"
    assert hub.repos[REPO].private
    assert TOKEN not in printed.out + printed.err
    assert not (tmp_path / "out" / "sample.json").exists()


def test_the_command_opens_requests(hub, folder, capsys):
    assert cli.main(["push", str(folder), REPO, "--message", "Three"]) == 0
    assert hub.commits(REPO)[0].title == "Three"
    assert cli.main(["push", str(folder), REPO, "--create-pr", "--revision", "main", "--license", "mit"]) == 0
    assert "/discussions/1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere", REPO], "nowhere has no model_index.json"),
        (["FOLDER", "a b"], "Repo id must"),
        (["FOLDER", REPO, "--token", "hf_nobody"], "401 Unauthorized"),
    ],
)
def test_the_command_says_what_is_wrong(hub, folder, arguments, said, capsys):
    assert cli.main(["push", *(str(folder) if each == "FOLDER" else each for each in arguments)]) == 1
    told = capsys.readouterr().err
    assert said in told
    assert "Traceback" not in told
    assert "hf_nobody" not in told


# ---- the training script --------------------------------------------------------------------------------------------

TRAIN = {
    "unet": {
        "block_out_channels": [8, 16],
        "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D"],
        "norm_num_groups": 4,
    },
    "steps": 3,
    "batch_size": 8,
    "preview_every": 3,
    "preview_images": 4,
    "preview_steps": 5,
    "checkpoint_every": 2,
    "push_to_hub": REPO,
    "hub_license": "cc-by-4.0",
}


@pytest.fixture
def fit(tmp_path):
    yield lambda **settings: train.main(build(train.TrainConfig, TRAIN | {"output": str(tmp_path / "run")} | settings))
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def test_training_pushes_what_it_made(hub, fit, tmp_path):
    result = fit(hub_private=True)
    assert result["not_pushed"] is None
    assert hub.repos[REPO].private
    files, record = hub.files(REPO), json.loads((tmp_path / "run" / "training.json").read_text())
    assert {"README.md", "samples.png", "loss.png", "training.json"} < files.keys()
    assert "unet/diffusion_pytorch_model.non_ema.safetensors" in files
    assert not [name for name in files if name.startswith(("checkpoints", "trackers", "previews", "log"))]
    assert f"| loss | {record['loss']:.6g} |" in card(hub)
    assert "| steps | 3 |\n| batch size | 8 |" in card(hub)
    assert "S = 5, η = 0" in card(hub)
    assert json.loads(files["training.json"])["config"]["output"] == "run"
    for file in (tmp_path / "run").rglob("*"):
        assert not file.is_file() or TOKEN.encode() not in file.read_bytes(), file
    assert TOKEN not in json.dumps(result)


def test_training_asks_for_the_repo_first(hub, fit, tmp_path):
    for settings, said in [
        ({"push_to_hub": "no id"}, "Repo id must"),
        ({"push_to_hub": "eve/digits"}, "403 Forbidden"),
    ]:
        with pytest.raises(OSError, match=said):
            fit(**settings)
    assert not (tmp_path / "run").exists()


def test_training_keeps_what_could_not_be_pushed(hub, fit, tmp_path, capsys):
    hub.fail_next("POST", "/commit/", status=507)
    result = fit()
    assert "507" in result["not_pushed"]
    assert train.exit_status(result) == 1
    assert f"The pipeline is saved: ddim-plugin push {tmp_path / 'run'} {REPO}" in capsys.readouterr().err
    assert result["status"] == "finished"
    assert [each.title for each in hub.commits(REPO)] == ["initial commit"]
    assert cli.main(["push", str(tmp_path / "run"), REPO, "--token", TOKEN]) == 0
    assert len(hub.commits(REPO)) == 2
