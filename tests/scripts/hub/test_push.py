"""What a push sends, by the real client to a Hub over HTTP."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from pushing import REPO, RESULTS, card, digest, pipeline, record

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler
from ddim_plugin.hub.code import code
from ddim_plugin.hub.push import push_folder


def test_one_commit_with_everything(hub, folder):
    before = digest(folder)
    commit = push_folder(folder, REPO, license="mit", commit_message="Digits")
    assert digest(folder) == before
    assert [each.title for each in hub.commits(REPO)] == ["Digits", "initial commit"]
    assert commit.oid == hub.commits(REPO)[0].sha
    weights = {"unet/config.json", "unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"}
    records = {"results.json", "training.json", "samples.png", "loss.png"}
    files = hub.files(REPO)
    assert files.keys() == weights | records | {"model_index.json", "README.md", ".gitattributes", f"{code().name}.py"}
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
    assert "![samples.png](samples.png)" in text
    assert "S = 7, η = 0" in text  # of the previews
    assert f"{pipeline(folder).unet.num_parameters():,} parameters" in text
    assert "| data | pictures |" in text
    assert "| η | 0.2 |" in text
    assert {each.status for each in hub.asked("POST", "/validate-yaml")} == {200}  # the client asks before it commits


def test_the_same_again_makes_no_commit(hub, folder):
    first = push_folder(folder, REPO)
    assert push_folder(folder, REPO).oid == first.oid
    assert len(hub.commits(REPO)) == 2
    record(folder, {"results": RESULTS["results"] * 2})
    push_folder(folder, REPO)
    assert len(hub.commits(REPO)) == 3
    for _ in range(2):
        pipeline(folder).push_to_hub(REPO)
        assert len(hub.commits(REPO)) == 4


def test_a_pipeline_in_memory(hub, make_unet):
    pipe = GeneralizedDDIMPipeline(make_unet(channels=3), GeneralizedDDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    pipe.push_to_hub(REPO)
    assert "## Figures" not in card(hub)
    with pytest.raises(TypeError, match="safe_serialization"):
        pipe.push_to_hub(REPO, safe_serialization=False)
    assert len(hub.commits(REPO)) == 2


def test_a_model_alone_gets_a_plain_card(hub, make_unet):
    pipe = GeneralizedDDIMPipeline(make_unet(), GeneralizedDDIMScheduler())
    pipe.push_to_hub(REPO)
    configs = {"model_index.json", "unet/config.json", "scheduler/scheduler_config.json", ".gitattributes"}
    weights = {"unet/diffusion_pytorch_model.safetensors"}
    assert hub.files(REPO).keys() == configs | weights | {f"{code().name}.py", "README.md"}
    assert "No sample grid was made" in card(hub)
    pipe.push_to_hub(REPO, license="mit")
    pipe.push_to_hub(REPO)
    assert ModelCard(card(hub)).data.license == "mit"


def test_records_without_a_card_are_not_pushed(hub, folder):
    """A card in the folder shows that its records are meant for the Hub. A plain card shows samples.png alone."""
    (folder / "README.md").unlink()
    push_folder(folder, REPO)
    assert not {"loss.png", "results.json", "training.json"} & hub.files(REPO).keys()
    assert hub.files(REPO)["samples.png"] == (folder / "samples.png").read_bytes()
    assert "![samples.png](samples.png)\n\n## Use" in card(hub)
    assert "## Figures" not in card(hub)
    (folder / "samples.png").unlink()
    push_folder(folder, REPO)
    assert "samples.png" not in hub.files(REPO)
    assert "No sample grid was made" in card(hub)


def test_save_pretrained_pushes_too(hub, make_unet, tmp_path):
    pipe = GeneralizedDDIMPipeline(make_unet(), GeneralizedDDIMScheduler())
    pipe.save_pretrained(tmp_path / "digits", push_to_hub=True, private=True)
    assert hub.repos[REPO].private
    assert f"{code().name}.py" in hub.files(REPO)
    assert sorted(path.name for path in (tmp_path / "digits").glob("*")) == ["model_index.json", "scheduler", "unet"]


def test_variants_go_along(hub, folder):
    pipe = pipeline(folder)
    pipe.unet.half()
    pipe.save_pretrained(folder, variant="fp16")
    push_folder(folder, REPO)
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in hub.files(REPO)
    pipe.push_to_hub("ada/half", variant="fp16")
    names = {name for name in hub.files("ada/half") if name.endswith(".safetensors")}
    assert names == {"unet/diffusion_pytorch_model.fp16.safetensors"}
    again = GeneralizedDDIMPipeline.from_pretrained("ada/half", variant="fp16", torch_dtype=torch.float16)
    assert torch.equal(again.unet.conv_in.weight, pipe.unet.conv_in.weight)


def test_code_of_another_version_goes(hub, folder):
    """Also the entry files and the copies of version 0.1."""
    push_folder(folder, REPO)
    old = {"ddim_plugin_0_1_9.py": b""} | {f"ddim_plugin_0_1_0_01234567{end}.py": b"" for end in ("", "_pipeline")}
    old |= {f"scheduler/ddim_plugin_0_1_0_01234567{end}.py": b"" for end in ("", "_scheduler")}
    theirs = {"notes.md": b"of somebody", "scheduler/my_scheduler.py": b"", "my_ddim_plugin_0_1_0.py": b""}
    hub.change(REPO, old | theirs, title="by hand")
    push_folder(folder, REPO)
    assert len(hub.commits(REPO)) == 4
    names = {name for name in hub.files(REPO) if name.endswith(".py")}
    assert names == {f"{code().name}.py", "my_ddim_plugin_0_1_0.py", "scheduler/my_scheduler.py"}
    assert "notes.md" in hub.files(REPO)


@pytest.mark.parametrize("name", ["0.1.0-ours", "0.1.0-stock"])
def test_a_folder_of_version_0_1_is_pushed_in_the_format_of_today(hub, name):
    folder = Path(__file__).parents[2] / "golden" / "saved" / name
    before = digest(folder)
    push_folder(folder, REPO)
    assert digest(folder) == before
    index = json.loads(hub.files(REPO)["model_index.json"])
    assert index["_class_name"] == "DDIMPipeline"
    assert index["scheduler"][0] == "diffusers"
    assert [each for each in hub.files(REPO) if each.endswith(".py")] == [f"{code().name}.py"]
    assert type(pipeline(REPO).scheduler) is type(pipeline(folder).scheduler)


def test_cards_of_somebody_stay(hub, folder):
    push_folder(folder, REPO)
    (folder / "README.md").unlink()
    hub.change(REPO, {"README.md": b"# By hand\n"}, title="by hand")
    push_folder(folder, REPO)
    assert card(hub) == "# By hand\n"
    (folder / "README.md").write_text("# Of the folder\n")
    push_folder(folder, REPO)
    assert card(hub) == "# Of the folder\n"


def test_branches_and_requests(hub, folder):
    push_folder(folder, REPO)
    record(folder, {"results": []})
    push_folder(folder, REPO, revision="without")
    assert len(hub.commits(REPO)) == 2
    assert "None have been measured" in card(hub, "without")
    commit = push_folder(folder, REPO, create_pr=True)
    assert len(hub.commits(REPO)) == 2
    assert "None have been measured" in card(hub, commit.pr_revision)
    assert "/discussions/1" in commit.pr_url


@pytest.mark.parametrize(
    ("settings", "pipeline_class", "said"),
    [
        ({"prediction_type": "flow_prediction", "shift": 3.0}, "DDPMPipeline", "plain Euler steps of flow matching"),
        (
            {"prediction_type": "score", "sigma_max": 50.0},
            "ScoreSdeVePipeline",
            "does not support images of 1 channels",
        ),
        ({"beta_schedule": "sqrt"}, "GeneralizedDDIMPipeline", "diffusers alone does not load this model"),
    ],
)
def test_models_of_other_paths(hub, make_unet, settings, pipeline_class, said):
    kind = "fourier" if "sigma_max" in settings else "positional"
    pipe = GeneralizedDDIMPipeline(make_unet(time_embedding_type=kind), GeneralizedDDIMScheduler(**settings))
    pipe.set_progress_bar_config(disable=True)
    pipe.push_to_hub(REPO)
    assert json.loads(hub.files(REPO)["model_index.json"])["_class_name"] == pipeline_class
    assert said in card(hub)
    again = pipeline(REPO)
    assert type(again.scheduler) is GeneralizedDDIMScheduler
    made = [
        each(2, 3, generator=torch.Generator().manual_seed(0), output_type="latent").images for each in (pipe, again)
    ]
    assert torch.equal(*made)
    again.push_to_hub(REPO)
    assert len(hub.commits(REPO)) == 2  # it is the same
