"""What a push refuses, and what is left of one that was interrupted."""

import json
import logging
import signal
import subprocess
import sys
import traceback

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from loopback_hub import LoopbackHub
from pushing import READS, REPO, TOKEN, digest, pipeline

from ddim_plugin.hub.code import code
from ddim_plugin.hub.push import push_folder


def broken(folder, problem):
    """The folder with something in it that is not right."""
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    if problem == "truncated":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif problem == "unfit":
        config = json.loads((folder / "unet" / "config.json").read_text())
        (folder / "unet" / "config.json").write_text(json.dumps(config | {"layers_per_block": 2}))
    elif problem == "pickles":
        weights.rename(weights.with_suffix(".bin"))
    elif problem == "empty":
        (folder / "model_index.json").unlink()
    elif problem == "mine":
        index = json.loads((folder / "model_index.json").read_text()) | {"unet": ["my_nets", "MyNet"]}
        (folder / "model_index.json").write_text(json.dumps(index))
    elif problem == "foreign":
        DDPMPipeline(pipeline(folder).unet, DDPMScheduler()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        ("truncated", "Unable to load weights"),
        ("unfit", "expected shape"),
        ("pickles", "no weights as safetensors"),
        ("empty", r"no model_index\.json"),
        ("foreign", "is a DDPMPipeline: load it with"),
        ("mine", "my_nets is not one of the libraries"),
    ],
)
def test_nothing_is_sent_of_what_is_not_right(hub, folder, problem, said):
    with pytest.raises((ValueError, OSError), match=said):
        push_folder(broken(folder, problem), REPO)
    assert hub.requests == []


@pytest.mark.parametrize("content", ["{", "[1, 2]", '{"all": {"acc": 0.9}}'])
def test_records_are_pushed_as_they_are(hub, folder, content):
    (folder / "results.json").write_text(content)
    push_folder(folder, REPO)
    assert hub.files(REPO)["results.json"].decode() == content


def test_components_that_the_pipeline_does_not_have_are_not_pushed(hub, folder):
    index = json.loads((folder / "model_index.json").read_text()) | {"../secret": ["diffusers", "UNet2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    push_folder(folder, REPO)
    assert "../secret" not in json.loads(hub.files(REPO)["model_index.json"])


def test_a_licence_that_the_hub_does_not_know(hub, folder):
    """The Hub refuses the card before a file is sent."""
    with pytest.raises(OSError, match='"license" must be one of'):
        pipeline(folder).push_to_hub(REPO, license="my own")
    assert "README.md" not in hub.files(REPO)
    assert not hub.asked("PUT", "/lfs/")


def test_code_in_the_folder_is_not_pushed(hub, folder):
    """The code file on the Hub is always the one of this package."""
    for name in (f"{code().name}.py", "ddim_plugin_0_1_0_01234567.py", "pipeline.py"):
        (folder / name).write_text("print('mine')\n")
    push_folder(folder, REPO)
    assert hub.files(REPO)[f"{code().name}.py"].decode() == code().text
    assert [name for name in hub.files(REPO) if name.endswith(".py")] == [f"{code().name}.py"]


def test_ids_are_checked_first(hub, folder):
    for bad in ("a/b/c", "two words", "ada/x..y", ""):
        with pytest.raises(OSError, match="(?i)repo.id"):
            push_folder(folder, bad)
    assert hub.requests == []


def test_a_public_repo_does_not_get_what_is_private(hub, folder):
    hub.add_repo(REPO, {"notes.md": b""})
    with pytest.raises(ValueError, match="is public, and private=True"):
        push_folder(folder, REPO, private=True)
    assert hub.files(REPO) == {"notes.md": b""}
    push_folder(folder, "ada/secret", private=True)
    push_folder(folder, "ada/secret", private=True)
    assert hub.repos["ada/secret"].private


@pytest.mark.parametrize(
    ("token", "said"),
    [
        (READS, "(?s)ada/digits on .*403 Forbidden.*Make sure your token has the correct permissions"),
        ("hf_nobody", "ada/digits on .*401 Unauthorized"),
        (False, "(?s)Not Found.* make sure you are authenticated"),
        ("hf_bad\ntoken", "contains invalid characters"),
        ("", "the token is empty"),
    ],
)
def test_tokens(hub, folder, token, said, caplog):
    caplog.set_level(logging.DEBUG)
    hub.add_repo(REPO, {"notes.md": b""})
    with pytest.raises(OSError, match=said) as caught:
        push_folder(folder, REPO, token=token)
    assert hub.files(REPO) == {"notes.md": b""}
    told = "".join(traceback.format_exception(caught.value)) + caplog.text
    for secret in (TOKEN, READS, "hf_nobody", "hf_bad"):
        assert secret not in told


def test_no_hub(folder, tmp_path):
    with LoopbackHub() as hub:
        pass
    with hub.in_process(tmp_path / "home", TOKEN), pytest.raises(OSError, match=f"{REPO} on {hub.url}: .*refused"):
        push_folder(folder, REPO)


# ---- interruptions ------------------------------------------------------------------------------------------------


@pytest.fixture
def no_waits(monkeypatch):
    """The client's pauses between its attempts."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)


@pytest.mark.parametrize(("method", "part"), [("PUT", "/lfs/"), ("POST", "/commit/"), ("POST", "/preupload/")])
def test_an_interrupted_push_leaves_the_branch(hub, folder, method, part, no_waits):
    hub.add_repo(REPO, {"notes.md": b""})
    hub.fail_next(method, part, status=507, times=3)
    with pytest.raises(OSError, match="507"):
        push_folder(folder, REPO)
    hub.wait()
    assert hub.files(REPO) == {"notes.md": b""}
    hub._faults.clear()
    push_folder(folder, REPO)
    assert len(hub.commits(REPO)) == 2
    assert torch.equal(pipeline(REPO).unet.conv_in.weight, pipeline(folder).unet.conv_in.weight)


def test_a_killed_push_leaves_the_branch(hub, folder, tmp_path):
    hub.add_repo(REPO, {"notes.md": b""})
    before = digest(folder)
    environment = hub.environment(tmp_path / "child", TOKEN) | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ddim_plugin.cli", "push", str(folder), REPO]
    child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    hub.fail_next("POST", "/commit/", status=507, call=child.kill)
    assert child.wait(120) == -signal.SIGKILL
    hub.wait()
    assert hub.files(REPO) == {"notes.md": b""}
    assert digest(folder) == before
