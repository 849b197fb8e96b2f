"""Pushing to a repository that has a model: records, cards and other weights."""

import pytest
import torch
from huggingface_hub import ModelCard
from pushing import REPO, RESULTS, card, pipeline, record

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler
from ddim_plugin.hub.code import code
from ddim_plugin.hub.push import push_folder


def test_what_was_said_of_other_weights_goes(hub, folder, make_unet):
    push_folder(folder, REPO)
    other = GeneralizedDDIMPipeline(make_unet(seed=9), GeneralizedDDIMScheduler(eta=1.0, timestep_spacing="trailing"))
    other.push_to_hub(REPO)
    files = hub.files(REPO)
    assert "4.161" not in card(hub)
    assert "| η | 1 |" in card(hub)
    assert not {"results.json", "training.json", "samples.png", "loss.png"} & files.keys()
    assert not [name for name in files if name.startswith(".eval_results")]


def test_a_card_of_somebody_stays_with_other_weights(hub, folder, make_unet):
    push_folder(folder, REPO)
    hub.change(REPO, {"README.md": b"# By hand\n"}, title="by hand")
    GeneralizedDDIMPipeline(make_unet(seed=8), GeneralizedDDIMScheduler()).push_to_hub(REPO)
    assert card(hub) == "# By hand\n"


def test_other_forms_of_the_weights_go_from_the_repo(hub, make_unet, tmp_path):
    first, second = (GeneralizedDDIMPipeline(make_unet(seed=i), GeneralizedDDIMScheduler()) for i in (1, 2))
    first.save_pretrained(tmp_path / "first", max_shard_size="50KB")
    push_folder(tmp_path / "first", REPO)
    assert len([name for name in hub.files(REPO) if "-of-" in name]) > 1
    assert torch.equal(pipeline(REPO).unet.conv_in.weight, first.unet.conv_in.weight)
    second.push_to_hub(REPO)
    assert torch.equal(pipeline(REPO).unet.conv_in.weight, second.unet.conv_in.weight)
    second.unet.half()
    second.push_to_hub(REPO, variant="fp16")  # the other variants stay
    names = {name for name in hub.files(REPO) if name.startswith("unet/diffusion")}
    assert names == {f"unet/diffusion_pytorch_model{variant}.safetensors" for variant in ("", ".fp16")}
    first.push_to_hub(REPO)
    assert {name for name in hub.files(REPO) if name.startswith("unet/diffusion")} == names


def test_a_plain_card_replaces_ours(hub, folder):
    push_folder(folder, REPO, license="mit")
    before = hub.files(REPO)
    half = pipeline(folder)
    half.unet.half()
    half.push_to_hub(REPO, variant="fp16")
    after = hub.files(REPO)
    assert after.keys() - before.keys() == {"unet/diffusion_pytorch_model.fp16.safetensors"}
    assert before.keys() - after.keys() == {"results.json", "training.json", "samples.png", "loss.png"}
    assert {name for name in before.keys() & after.keys() if before[name] != after[name]} == {"README.md"}
    assert 'variant="fp16"' in card(hub)


def test_the_licence_of_a_card_changes_only_if_one_is_given(hub, folder):
    push_folder(folder, REPO, license="mit")
    pipeline(REPO).push_to_hub(REPO)
    assert ModelCard(card(hub)).data.license == "mit"
    pipeline(REPO).push_to_hub(REPO, license="cc-by-4.0")
    assert ModelCard(card(hub)).data.license == "cc-by-4.0"


def test_files_of_others_stay(hub, folder):
    theirs = {"training.json": b"{}", "loss.png": b"x", ".eval_results/mine.yaml": b"a: 1", "README.md": b"# Theirs\n"}
    theirs |= {"unet/diffusion_pytorch_model.onnx": b"x", "model_index.json": b'{"_class_name": "DDPMPipeline"}'}
    hub.add_repo(REPO, theirs)
    (folder / "README.md").unlink()
    push_folder(folder, REPO)
    files = hub.files(REPO)
    assert {name: files.get(name) for name in theirs if name != "model_index.json"} == {
        name: content for name, content in theirs.items() if name != "model_index.json"
    }


def test_only_files_of_the_model_are_sent(hub, folder):
    for name in ("unet/notes.json", "unet/optimizer.safetensors", "notes.json", "sample.json", "unet/.env.json"):
        (folder / name).write_bytes(b"{}")
    (folder / "figure4.png").write_bytes((folder / "loss.png").read_bytes())
    push_folder(folder, REPO)
    records = {"README.md", "results.json", "training.json", "samples.png", "loss.png", "figure4.png"}
    model = {"model_index.json", "unet/config.json", "scheduler/scheduler_config.json", f"{code().name}.py"}
    model |= {"unet/diffusion_pytorch_model.safetensors", ".gitattributes"}
    assert hub.files(REPO).keys() == model | records


def test_a_card_of_the_folder_is_adapted_to_the_repo(hub, folder):
    push_folder(folder, "ada/again", license="cc-by-4.0")
    again = hub.files("ada/again")["README.md"].decode()
    assert "license: cc-by-4.0" in again
    assert 'from_pretrained("ada/again"' in again
    assert "license:" not in (folder / "README.md").read_text()


def test_somebody_elses_commit_meanwhile(hub, folder):
    push_folder(folder, REPO)
    hub.fail_next("POST", "/preupload/", call=lambda: hub.change(REPO, {"README.md": b"# Mine\n"}, title="by hand"))
    record(folder, {"results": []})
    with pytest.raises(OSError, match="(?s)412 Precondition Failed.* refresh and try again"):
        push_folder(folder, REPO)
    assert card(hub) == "# Mine\n"


def test_a_card_with_notes_of_somebody_stays(hub, folder):
    push_folder(folder, REPO)
    noted = card(hub) + "\n## My notes\n"
    hub.change(REPO, {"README.md": noted.encode()}, title="by hand")
    pipeline(folder).push_to_hub(REPO, license="mit")
    assert card(hub) == noted


# ---- cards that are kept, and the pictures in them ------------------------------------------------------------------

LINKS = {
    "markdown": "![four digits](samples.png)",
    "html": '<img src="./samples.png" width="200">',
    "address": "![](https://huggingface.co/ada/digits/resolve/main/samples.png)",
    "widget": "---\nlicense: mit\nwidget:\n- text: a digit\n  output:\n    url: samples.png\n---\n",
}


@pytest.mark.parametrize("text", LINKS.values(), ids=LINKS)
def test_pictures_in_a_card_of_somebody_stay(hub, folder, make_unet, text):
    push_folder(folder, REPO)
    hub.change(REPO, {"README.md": f"{text}\nMine.\n".encode()}, title="by hand")
    GeneralizedDDIMPipeline(make_unet(seed=9), GeneralizedDDIMScheduler()).push_to_hub(REPO)
    assert "Mine." in card(hub)
    assert {"samples.png", "loss.png", "results.json", "training.json"} <= hub.files(REPO).keys()


def test_pictures_in_a_card_of_the_folder_stay(hub, folder):
    """The card is in the folder, and the picture in the repository alone."""
    push_folder(folder, REPO)
    (folder / "samples.png").unlink()
    (folder / "README.md").write_text("# Mine\n\n![](samples.png)\n")
    push_folder(folder, REPO)
    assert card(hub).startswith("# Mine")
    assert "samples.png" in hub.files(REPO)
    assert "loss.png" in hub.files(REPO)


def test_pictures_of_an_earlier_card_go(hub, folder):
    (folder / "figure4.png").write_bytes((folder / "loss.png").read_bytes())
    record(folder, RESULTS | {"pictures": {"figure4.png": "Four"}})
    push_folder(folder, REPO)
    assert "](figure4.png)" in card(hub)
    (folder / "figure4.png").unlink()
    record(folder, RESULTS)
    push_folder(folder, REPO)
    assert "figure4.png" not in card(hub)
    assert "figure4.png" not in hub.files(REPO)
    assert {"loss.png", "results.json"} <= hub.files(REPO).keys()
