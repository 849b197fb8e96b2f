"""Pushing by the real client to a Hub over HTTP: from Python, the command line and the training script."""

import hashlib
import json
import logging
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import train
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import DDPMPipeline, DDPMScheduler
from huggingface_hub import ModelCard
from loopback_hub import LoopbackHub
from PIL import Image
from trainer.settings import build

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler
from ddim_plugin.cli import commands as cli
from ddim_plugin.hub import code as bundle
from ddim_plugin.hub.push import push_folder
from ddim_plugin.hub.reading import weights_digest

TOKEN = "hf_ada_writes"
READS = "hf_eve_reads"
REPO = "ada/digits"
RESULTS = {
    "results": [{"metric": "fid", "name": "FID", "value": 4.1613, "nfe": 10, "num_inference_steps": 10, "eta": 0.0}]
}
RESULTS["results"][0]["dataset"] = {"name": "CIFAR-10", "id": "uoft-cs/cifar10"}


@pytest.fixture
def hub(tmp_path):
    with LoopbackHub() as hub, hub.in_process(tmp_path / "home", TOKEN):
        hub.add_user("ada", TOKEN)
        hub.add_user("eve", READS, role="read")
        yield hub


@pytest.fixture
def folder(make_unet, tmp_path):
    """A saved pipeline with records and pictures, as a training run leaves them."""
    folder = tmp_path / "out" / "digits"
    GeneralizedDDIMPipeline(make_unet(), GeneralizedDDIMScheduler(eta=0.2)).save_pretrained(folder)
    config = {"data": "/home/ada/pictures", "split": "train", "steps": 10, "batch_size": 4, "preview_steps": 7}
    (folder / "training.json").write_text(
        json.dumps({"config": config | {"output": str(folder)}, "data_from": "files"})
    )
    (folder / "results.json").write_text(json.dumps(RESULTS))
    (folder / "previews").mkdir()
    for name in ("previews/step-00000005.png", "previews/step-00000010.png", "loss.png"):
        Image.fromarray(np.full((8, 8), len(name), np.uint8)).save(folder / name)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "optimizer.bin").write_bytes(b"not to be pushed")
    (folder / "log.jsonl").write_text("{}")
    return folder


def pipeline(folder):
    pipe = GeneralizedDDIMPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def digest(folder):
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.rglob("*") if file.is_file()}


def card(hub, revision="main"):
    return hub.files(REPO, revision)["README.md"].decode()


# ---- what is pushed ------------------------------------------------------------------------------------------------


def test_one_commit_with_everything(hub, folder):
    before = digest(folder)
    commit = push_folder(folder, REPO, license="mit", commit_message="Digits")
    assert digest(folder) == before
    assert [each.title for each in hub.commits(REPO)] == ["Digits", "initial commit"]
    assert commit.oid == hub.commits(REPO)[0].sha
    name = bundle.code().name
    code = {f"{name}.py", f"{name}_pipeline.py", f"scheduler/{name}.py", f"scheduler/{name}_scheduler.py"}
    weights = {"unet/config.json", "unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"}
    records = {"results.json", "training.json", ".eval_results/uoft-cs--cifar10.yaml", "samples.png", "loss.png"}
    files = hub.files(REPO)
    if not hasattr(huggingface_hub, "EvalResultEntry"):
        records.remove(".eval_results/uoft-cs--cifar10.yaml")
    assert files.keys() == code | weights | records | {"model_index.json", "README.md", ".gitattributes"}
    assert files["samples.png"] == (folder / "previews" / "step-00000010.png").read_bytes()
    assert (
        files["unet/diffusion_pytorch_model.safetensors"]
        == (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    )
    assert b"/home/ada" not in b"".join(files.values())
    assert str(folder).encode() not in b"".join(files.values())


def test_the_card_that_is_pushed(hub, folder):
    push_folder(folder, REPO, license="mit")
    text, files = card(hub), hub.files(REPO)
    data = ModelCard(text).data
    pushed = json.loads(files["results.json"])["results"][0]
    assert [each.metric_value for each in data.eval_results] == [pushed["value"]]
    assert data.license == "mit"
    assert "![samples](samples.png)" in text
    assert "S = 7, η = 0" in text  # of the previews
    assert f"{pipeline(folder).unet.num_parameters():,} parameters" in text
    assert "| data | pictures, train |" in text
    assert "| η | 0.2 |" in text
    assert [each.status for each in hub.asked("POST", "/validate-yaml")] == [200]  # the client asks before it commits
    for entries in (yaml.safe_load(files[name]) for name in files if name.startswith(".eval_results/")):
        assert entries[0]["value"] == pushed["value"]


def test_the_same_again_makes_no_commit(hub, folder):
    first = push_folder(folder, REPO)
    assert push_folder(folder, REPO).oid == first.oid
    assert len(hub.commits(REPO)) == 2
    pipe = pipeline(folder)
    pipe.push_to_hub(REPO)
    assert len(hub.commits(REPO)) == 2
    (folder / "results.json").write_text(json.dumps({"results": RESULTS["results"] * 2}))
    push_folder(folder, REPO)
    assert len(hub.commits(REPO)) == 3


def test_a_pipeline_in_memory(hub, make_unet):
    pipe = GeneralizedDDIMPipeline(make_unet(channels=3), GeneralizedDDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    pipe.push_to_hub(REPO)
    assert "16 pictures" not in card(hub)
    assert "GeneralizedDDIMScheduler, S = 20, η = 0, seeds 0 to 15." in card(hub)
    assert hub.files(REPO)["samples.png"].startswith(b"\x89PNG")
    assert "None have been measured" in card(hub)
    with pytest.raises(ValueError, match="pickles are not pushed"):
        pipe.push_to_hub(REPO, safe_serialization=False)
    assert len(hub.commits(REPO)) == 2


def test_save_pretrained_pushes_too(hub, make_unet, tmp_path):
    pipe = GeneralizedDDIMPipeline(make_unet(), GeneralizedDDIMScheduler())
    pipe.save_pretrained(tmp_path / "digits", push_to_hub=True, samples=0, private=True)
    assert hub.repos[REPO].private
    assert sorted(path.name for path in (tmp_path / "digits").glob("*")) == sorted(
        [f"{bundle.code().name}.py", f"{bundle.code().name}_pipeline.py", "model_index.json", "scheduler", "unet"]
    )


def test_variants_go_along(hub, folder):
    pipe = pipeline(folder)
    pipe.unet.half()
    pipe.save_pretrained(folder, variant="fp16")
    push_folder(folder, REPO)
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in hub.files(REPO)
    pipe.push_to_hub("ada/half", variant="fp16", samples=0)
    names = {name for name in hub.files("ada/half") if name.endswith(".safetensors")}
    assert names == {"unet/diffusion_pytorch_model.fp16.safetensors"}
    again = GeneralizedDDIMPipeline.from_pretrained("ada/half", variant="fp16", torch_dtype=torch.float16)
    assert torch.equal(again.unet.conv_in.weight, pipe.unet.conv_in.weight)


def test_code_of_another_version_goes(hub, folder):
    push_folder(folder, REPO)
    old = {f"ddim_plugin_0_0_9_01234567{end}.py": b"" for end in ("", "_pipeline")}
    old |= {f"scheduler/{name}": b"" for name in ("ddim_plugin_0_0_9_01234567_scheduler.py", "my_scheduler.py")}
    hub.change(REPO, old | {"notes.md": b"of somebody"}, title="by hand")
    push_folder(folder, REPO)
    assert not [name for name in hub.files(REPO) if "0_0_9" in name]
    assert {"notes.md", "scheduler/my_scheduler.py"} < hub.files(REPO).keys()


def test_a_folder_without_code_gets_it(hub, folder):
    for file in (*folder.glob("*.py"), *folder.glob("scheduler/*.py")):
        file.unlink()
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": "GeneralizedDDIMPipeline", "scheduler": ["ddim_plugin", "GeneralizedDDIMScheduler"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    push_folder(folder, REPO)
    assert json.loads(hub.files(REPO)["model_index.json"])["_class_name"][0] == f"{bundle.code().name}_pipeline"
    assert f"scheduler/{bundle.code().name}.py" in hub.files(REPO)


def test_cards_of_somebody_stay(hub, folder, make_unet):
    push_folder(folder, REPO)
    hub.change(REPO, {"README.md": b"# By hand\n"}, title="by hand")
    push_folder(folder, REPO)
    assert card(hub) == "# By hand\n"
    (folder / "README.md").write_text("# Of the folder\n")
    push_folder(folder, REPO)
    assert card(hub) == "# Of the folder\n"
    (folder / "README.md").unlink()
    push_folder(folder, "ada/other")
    GeneralizedDDIMPipeline(make_unet(), GeneralizedDDIMScheduler()).push_to_hub("ada/other", samples=0)
    assert "4.161" in hub.files("ada/other")["README.md"].decode()  # the new push has nothing to say of it


def test_branches_and_requests(hub, folder):
    push_folder(folder, REPO)
    (folder / "results.json").unlink()
    push_folder(folder, REPO, revision="without")
    assert len(hub.commits(REPO)) == 2
    assert "None have been measured" in card(hub, "without")
    commit = push_folder(folder, REPO, create_pr=True)
    assert len(hub.commits(REPO)) == 2
    assert "None have been measured" in card(hub, commit.pr_revision)
    assert "/discussions/1" in commit.pr_url


# ---- other weights in the repo -------------------------------------------------------------------------------------


def test_what_was_said_of_other_weights_goes(hub, folder, make_unet):
    push_folder(folder, REPO)
    other = GeneralizedDDIMPipeline(make_unet(seed=9), GeneralizedDDIMScheduler(eta=1.0, timestep_spacing="trailing"))
    other.push_to_hub(REPO, samples=0)
    files = hub.files(REPO)
    assert "4.161" not in card(hub)
    assert "| η | 1.0 |" in card(hub)
    assert not {"results.json", "training.json", "samples.png", "loss.png"} & files.keys()
    assert not [name for name in files if name.startswith(".eval_results")]


def test_other_forms_of_the_weights_go_from_the_repo(hub, make_unet, tmp_path):
    first, second = (GeneralizedDDIMPipeline(make_unet(seed=i), GeneralizedDDIMScheduler()) for i in (1, 2))
    first.save_pretrained(tmp_path / "first", max_shard_size="50KB")
    push_folder(tmp_path / "first", REPO)
    assert len([name for name in hub.files(REPO) if "-of-" in name]) > 1
    assert torch.equal(pipeline(REPO).unet.conv_in.weight, first.unet.conv_in.weight)
    second.push_to_hub(REPO, samples=0)
    assert torch.equal(pipeline(REPO).unet.conv_in.weight, second.unet.conv_in.weight)
    second.unet.half()
    second.push_to_hub(REPO, variant="fp16", samples=0)  # another form of the same model: the first stays
    names = {name for name in hub.files(REPO) if name.startswith("unet/diffusion")}
    assert names == {f"unet/diffusion_pytorch_model{variant}.safetensors" for variant in ("", ".fp16")}
    first.push_to_hub(REPO, samples=0)
    assert {name for name in hub.files(REPO) if name.startswith("unet/diffusion")} == {
        "unet/diffusion_pytorch_model.safetensors"
    }


def test_records_are_of_the_weights_they_were_measured_on(hub, folder, make_unet):
    pipe = pipeline(folder)
    pipe.push_to_hub("ada/same")
    assert "4.161" in hub.files("ada/same")["README.md"].decode()
    pipe.unet = make_unet(seed=9)
    pipe.push_to_hub("ada/swapped", samples=0)
    assert "4.161" not in hub.files("ada/swapped")["README.md"].decode()
    assert "results.json" not in hub.files("ada/swapped")


def test_from_the_hub_and_back_loses_nothing(hub, folder):
    push_folder(folder, REPO, license="mit")
    before = hub.files(REPO)
    pipeline(REPO).push_to_hub(REPO)
    assert len(hub.commits(REPO)) == 2  # the same weights, and nothing new to say of them
    half = pipeline(folder)
    half.unet.half()
    half.push_to_hub(REPO, variant="fp16")
    after = hub.files(REPO)
    assert after.keys() - before.keys() == {"unet/diffusion_pytorch_model.fp16.safetensors"}
    assert {name for name in before if before[name] != after[name]} == set()


def test_the_licence_stays(hub, folder):
    push_folder(folder, REPO, license="mit")
    (folder / "results.json").write_text(json.dumps({"results": RESULTS["results"] * 2}))
    push_folder(folder, REPO)
    assert ModelCard(card(hub)).data.license == "mit"


def test_figures_of_other_weights_are_refused(hub, folder, make_unet):
    """The scripts that measure note the digest of the weights."""
    mine = weights_digest(pipeline(folder).unet)
    (folder / "results.json").write_text(json.dumps(RESULTS | {"model": {"sha256": mine}}))
    push_folder(folder, REPO)
    GeneralizedDDIMPipeline(make_unet(seed=4), GeneralizedDDIMScheduler()).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"results\.json was measured on other weights"):
        push_folder(folder, REPO)


def test_another_model_as_a_variant_takes_the_first_away(hub, make_unet):
    """Its config would not fit the weights that were there."""
    GeneralizedDDIMPipeline(make_unet(), GeneralizedDDIMScheduler()).push_to_hub(REPO, samples=0)
    other = GeneralizedDDIMPipeline(make_unet(channels=3, seed=2), GeneralizedDDIMScheduler())
    other.push_to_hub(REPO, variant="big", samples=0)
    names = {name for name in hub.files(REPO) if name.startswith("unet/diffusion")}
    assert names == {"unet/diffusion_pytorch_model.big.safetensors"}
    assert 'variant="big"' in card(hub)
    again = GeneralizedDDIMPipeline.from_pretrained(REPO, variant="big")
    assert torch.equal(again.unet.conv_in.weight, other.unet.conv_in.weight)


def test_files_of_others_stay(hub, folder):
    theirs = {"training.json": b"{}", "loss.png": b"x", ".eval_results/mine.yaml": b"a: 1", "README.md": b"# Theirs\n"}
    theirs |= {"unet/diffusion_pytorch_model.onnx": b"x", "model_index.json": b'{"_class_name": "DDPMPipeline"}'}
    hub.add_repo(REPO, theirs)
    for name in ("training.json", "results.json", "loss.png"):
        (folder / name).unlink()
    push_folder(folder, REPO)
    files = hub.files(REPO)
    assert {name: files.get(name) for name in theirs if name != "model_index.json"} == {
        name: content for name, content in theirs.items() if name != "model_index.json"
    }


def test_pictures_that_were_listed_go_with_their_model(hub, folder, make_unet):
    (folder / "results.json").write_text(json.dumps(RESULTS | {"pictures": ["figure4.png"]}))
    (folder / "figure4.png").write_bytes((folder / "loss.png").read_bytes())
    push_folder(folder, REPO)
    GeneralizedDDIMPipeline(make_unet(seed=9), GeneralizedDDIMScheduler()).push_to_hub(REPO, samples=0)
    assert not [name for name in hub.files(REPO) if name.endswith(".png")]


def test_figures_against_another_set_replace_the_old(hub, folder):
    push_folder(folder, REPO)
    entry = RESULTS["results"][0] | {"dataset": {"name": "MNIST", "id": "ylecun/mnist"}}
    (folder / "results.json").write_text(json.dumps({"results": [entry]}))
    push_folder(folder, REPO)
    assert not [name for name in hub.files(REPO) if "cifar10" in name]


def test_only_files_of_the_model_are_sent(hub, folder):
    for name in ("unet/notes.json", "unet/optimizer.safetensors", "holiday.png", "figure4.png", "unet/.env.json"):
        (folder / name).write_bytes(b"{}")
    listed = RESULTS | {"pictures": ["figure4.png", "gone.png"]}
    (folder / "results.json").write_text(json.dumps(listed))
    push_folder(folder, REPO)
    assert "figure4.png" in hub.files(REPO)
    assert not [name for name in hub.files(REPO) if "notes" in name or "optimizer" in name or "holiday" in name]
    assert not [name for name in hub.files(REPO) if ".env" in name]
    (folder / "results.json").write_text(json.dumps(RESULTS | {"pictures": ["../secret.png"]}))
    with pytest.raises(ValueError, match="must list names such as figure4.png"):
        push_folder(folder, REPO)


def test_the_licence_in_a_card_of_the_folder_goes_with_it(hub, folder):
    push_folder(folder, REPO, license="cc-by-4.0")
    (folder / "README.md").write_text(card(hub))
    (folder / "samples.png").unlink(missing_ok=True)
    push_folder(folder, "ada/again")
    again = hub.files("ada/again")["README.md"].decode()
    assert "license: cc-by-4.0" in again
    assert 'from_pretrained("ada/again"' in again


def test_places_in_results_are_not_published(hub, folder):
    entry = RESULTS["results"][0] | {"dataset": {"name": "/home/ada/faces", "split": "train"}}
    (folder / "results.json").write_text(json.dumps({"results": [entry]}))
    push_folder(folder, REPO)
    assert b"/home/ada" not in b"".join(hub.files(REPO).values())
    assert "**FID**, faces train" in card(hub)


def test_somebody_elses_commit_meanwhile(hub, folder):
    push_folder(folder, REPO)
    hub.fail_next("POST", "/preupload/", call=lambda: hub.change(REPO, {"README.md": b"# Mine\n"}, title="by hand"))
    (folder / "results.json").unlink()
    with pytest.raises(OSError, match="somebody else pushed to ada/digits at the same time"):
        push_folder(folder, REPO)
    assert card(hub) == "# Mine\n"


def test_a_card_with_notes_of_somebody_stays(hub, folder):
    push_folder(folder, REPO)
    noted = card(hub) + "\n## My notes\n"
    hub.change(REPO, {"README.md": noted.encode()}, title="by hand")
    (folder / "results.json").write_text(json.dumps({"results": RESULTS["results"] * 2}))
    push_folder(folder, REPO)
    assert card(hub) == noted


# ---- refusals ------------------------------------------------------------------------------------------------------


def broken(folder, problem):
    """The folder with something in it that is not right."""
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    if problem == "results":
        (folder / "results.json").write_text('{"results": [{"metric": "fid"}]}')
    elif problem == "training":
        (folder / "training.json").write_text("{")
    elif problem == "truncated":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif problem == "unfit":
        config = json.loads((folder / "unet" / "config.json").read_text())
        (folder / "unet" / "config.json").write_text(json.dumps(config | {"layers_per_block": 2}))
    elif problem == "pickles":
        weights.rename(weights.with_suffix(".bin"))
    elif problem == "empty":
        (folder / "model_index.json").unlink()
    elif problem == "tampered":
        [code] = [file for file in folder.glob("ddim_plugin_*.py") if "pipeline" not in file.name]
        code.write_text(code.read_text() + "\nprint('mine')\n")
    elif problem == "mine":
        index = json.loads((folder / "model_index.json").read_text()) | {"unet": ["my_nets", "MyNet"]}
        (folder / "model_index.json").write_text(json.dumps(index))
    elif problem == "component":
        index = json.loads((folder / "model_index.json").read_text()) | {"../secret": ["diffusers", "UNet2DModel"]}
        (folder / "model_index.json").write_text(json.dumps(index))
    elif problem in ("config", "seconds"):
        record = {"config": None} if problem == "config" else {"config": {}, "seconds": "x"}
        (folder / "training.json").write_text(json.dumps(record))
    elif problem == "nan":
        (folder / "training.json").write_text('{"config": {}, "loss": NaN}')
    elif problem == "foreign":
        DDPMPipeline(pipeline(folder).unet, DDPMScheduler()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        ("results", "entry 0 of results has no value"),
        ("training", r"cannot read .*training\.json"),
        ("truncated", "cannot load the network"),
        ("unfit", "do not fit its config"),
        ("pickles", "no weights as safetensors"),
        ("empty", r"no model_index\.json"),
        ("foreign", "is a DDPMPipeline: open it with"),
        ("tampered", "was changed since it was saved"),
        ("mine", "names MyNet of my_nets for unet, which others do not have"),
        ("component", r"for \.\./secret, which others do not have"),
        ("config", "are not as the scripts write them"),
        ("seconds", "are not as the scripts write them"),
        ("nan", "not finite, which JSON does not have"),
    ],
)
def test_nothing_is_sent_of_what_is_not_right(hub, folder, problem, said):
    with pytest.raises((ValueError, OSError), match=said):
        push_folder(broken(folder, problem), REPO)
    assert hub.requests == []


def test_settings_are_checked_first(hub, folder):
    pipe = pipeline(folder)
    for settings, said in [
        ({"samples": -1}, "samples must be a non-negative integer"),
        ({"samples": 1.5}, "samples must be a non-negative integer"),
        ({"records": "nowhere", "samples": 0}, "there is no folder nowhere"),
        ({"license": "my own"}, "license must be as the Hub names it"),
    ]:
        with pytest.raises(ValueError, match=said):
            pipe.push_to_hub(REPO, **settings)
    assert hub.requests == []


def test_code_that_is_missing_is_made_anew(hub, folder):
    for file in folder.glob("*.py"):
        file.unlink()
    push_folder(folder, REPO)
    assert f"{bundle.code().name}.py" in hub.files(REPO)


def test_ids_are_checked_first(hub, folder):
    for bad in ("a/b/c", "two words", "ada/x..y", ""):
        with pytest.raises(OSError, match="is no id of a repo"):
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
        (READS, "the token may not write to ada/digits"),
        ("hf_nobody", "needs another token for ada/digits"),
        (False, "log in with"),
        ("hf_bad\ntoken", "characters that no token has"),
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
    with hub.in_process(tmp_path / "home", TOKEN), pytest.raises(OSError, match=f"{hub.url} cannot be reached"):
        push_folder(folder, REPO)


# ---- interruptions -------------------------------------------------------------------------------------------------


@pytest.fixture
def no_waits(monkeypatch):
    """The client's pauses between its attempts."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)


@pytest.mark.parametrize(("method", "part"), [("PUT", "/lfs/"), ("POST", "/commit/"), ("POST", "/preupload/")])
def test_an_interrupted_push_leaves_the_branch(hub, folder, method, part, no_waits):
    hub.add_repo(REPO, {"notes.md": b""})
    hub.fail_next(method, part, status=507, times=3)
    with pytest.raises(OSError, match="status 507"):
        push_folder(folder, REPO)
    hub.wait()
    assert hub.files(REPO) == {"notes.md": b""}
    hub._faults.clear()
    push_folder(folder, REPO)
    assert len(hub.commits(REPO)) == 2
    assert torch.equal(pipeline(REPO).unet.conv_in.weight, pipeline(folder).unet.conv_in.weight)


@pytest.mark.parametrize(("method", "part"), [("PUT", "/lfs/"), ("POST", "/commit/")])
def test_a_killed_push_leaves_the_branch(hub, folder, method, part, tmp_path):
    hub.add_repo(REPO, {"notes.md": b""})
    before = digest(folder)
    environment = hub.environment(tmp_path / "child", TOKEN) | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ddim_plugin.cli", "push", str(folder), REPO]
    child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    hub.fail_next(method, part, status=507, call=child.kill)
    assert child.wait(120) == -signal.SIGKILL
    hub.wait()
    assert hub.files(REPO) == {"notes.md": b""}
    assert digest(folder) == before


# ---- the command line ----------------------------------------------------------------------------------------------


def test_the_command(hub, folder, tmp_path):
    environment = hub.environment(tmp_path / "child") | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ddim_plugin.cli", "push", str(folder), REPO, "--private", "--token", TOKEN]
    done = subprocess.run([*command, "--license", "mit"], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{hub.url}/{REPO}/commit/{hub.commits(REPO)[0].sha}"
    assert hub.repos[REPO].private
    assert TOKEN not in done.stdout + done.stderr
    assert not (tmp_path / "out" / "sample.json").exists()


def test_the_command_draws_and_opens_requests(hub, folder, capsys):
    for file in folder.rglob("*.png"):
        file.unlink()
    assert cli.main(["push", str(folder), REPO, "--samples", "3", "--message", "Three"]) == 0
    assert hub.commits(REPO)[0].title == "Three"
    assert "seeds 0 to 2." in card(hub)
    assert cli.main(["push", str(folder), REPO, "--create-pr", "--revision", "main", "--license", "mit"]) == 0
    assert "/discussions/1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere", REPO], "there is no folder nowhere"),
        (["FOLDER", "a b"], "is no id of a repo"),
        (["FOLDER", REPO, "--samples", "-1"], "samples must be a non-negative integer"),
        (["FOLDER", REPO, "--records", "nowhere"], "there is no folder nowhere"),
        (["FOLDER", REPO, "--token", "hf_nobody"], "needs another token"),
    ],
)
def test_the_command_says_what_is_wrong(hub, folder, arguments, said, capsys):
    assert cli.main(["push", *(str(folder) if each == "FOLDER" else each for each in arguments)]) == 1
    told = capsys.readouterr().err
    assert said in told
    assert "Traceback" not in told
    assert "hf_nobody" not in told


# ---- the training script -------------------------------------------------------------------------------------------

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
    assert f"| last loss | {record['loss']:.4g} |" in card(hub)
    assert "| pictures seen | 24 in 3 steps of 8 |" in card(hub)
    assert "S = 5, η = 0" in card(hub)
    assert json.loads(files["training.json"])["config"]["output"] == "run"
    for file in (tmp_path / "run").rglob("*"):
        assert not file.is_file() or TOKEN.encode() not in file.read_bytes(), file
    assert TOKEN not in json.dumps(result)


def test_training_asks_for_the_repo_first(hub, fit, tmp_path):
    for settings, said in [
        ({"push_to_hub": "no id"}, "is no id of a repo"),
        ({"push_to_hub": "eve/digits"}, "may not write|no eve/digits"),
    ]:
        with pytest.raises(OSError, match=said):
            fit(**settings)
    assert not (tmp_path / "run").exists()


def test_training_keeps_what_could_not_be_pushed(hub, fit, tmp_path, capsys):
    hub.fail_next("POST", "/commit/", status=507)
    result = fit()
    assert "status 507" in result["not_pushed"]
    assert f"The pipeline is saved: ddim-plugin push {tmp_path / 'run'} {REPO}" in capsys.readouterr().err
    assert result["status"] == "finished"
    assert [each.title for each in hub.commits(REPO)] == ["initial commit"]
    assert cli.main(["push", str(tmp_path / "run"), REPO, "--token", TOKEN]) == 0
    assert len(hub.commits(REPO)) == 2


def test_the_script_ends_with_an_error_where_it_could_not_push(hub, tmp_path):
    """As a process: the pipeline is there, the status says that the push is not."""
    config = tmp_path / "config.toml"
    lines = [f"{key} = {json.dumps(value)}" for key, value in TRAIN.items() if key != "unet"]
    lines += ["[unet]", *(f"{key} = {json.dumps(value)}" for key, value in TRAIN["unet"].items())]
    config.write_text("\n".join(lines))
    hub.fail_next("POST", "/commit/", status=507)
    environment = hub.environment(tmp_path / "child", TOKEN) | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, str(Path(train.__file__)), "--config", str(config), "--output", str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "not pushed: " in done.stderr
    assert "Traceback" not in done.stderr
    assert pipeline(tmp_path / "run").unet is not None
    assert TOKEN not in done.stdout + done.stderr
