"""Pushing to a repository that has a model: records, cards and other weights."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from pushing import REPO, RESULTS, card, pipeline

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler
from ddim_plugin.hub.files import weights_digest
from ddim_plugin.hub.push import push_folder


def test_what_was_said_of_other_weights_goes(hub, folder, make_unet):
    push_folder(folder, REPO)
    other = GeneralizedDDIMPipeline(make_unet(seed=9), GeneralizedDDIMScheduler(eta=1.0, timestep_spacing="trailing"))
    other.push_to_hub(REPO, samples=0)
    files = hub.files(REPO)
    assert "4.161" not in card(hub)
    assert "| η | 1 |" in card(hub)
    assert not {"results.json", "training.json", "samples.png", "loss.png"} & files.keys()
    assert not [name for name in files if name.startswith(".eval_results")]


def test_a_card_of_other_weights_goes_even_if_none_is_wanted(hub, folder, make_unet):
    push_folder(folder, REPO)
    pipe = GeneralizedDDIMPipeline(make_unet(seed=9), GeneralizedDDIMScheduler())
    pipe.push_to_hub(REPO, card=False)
    assert "README.md" not in hub.files(REPO)
    hub.change(REPO, {"README.md": b"# By hand\n"}, title="by hand")
    GeneralizedDDIMPipeline(make_unet(seed=8), GeneralizedDDIMScheduler()).push_to_hub(REPO, card=False)
    assert card(hub) == "# By hand\n"


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
    pipe.push_to_hub("ada/same", records=folder)
    assert "4.161" in hub.files("ada/same")["README.md"].decode()
    pipe.unet = make_unet(seed=9)
    pipe.push_to_hub("ada/swapped", samples=0)
    assert "README.md" not in hub.files("ada/swapped")
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
    GeneralizedDDIMPipeline(make_unet(), GeneralizedDDIMScheduler()).push_to_hub(REPO, card=True)
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
    files = hub.files(REPO)
    assert "Mine." in card(hub)
    assert "samples.png" in files
    assert not {"loss.png", "results.json", "training.json"} & files.keys()  # the card does not show these


def test_pictures_in_a_card_of_the_folder_stay(hub, folder):
    """The card is in the folder, and the picture in the repository alone."""
    (folder / "results.json").write_text(json.dumps(RESULTS | {"pictures": ["figure4.png"]}))
    (folder / "figure4.png").write_bytes((folder / "loss.png").read_bytes())
    push_folder(folder, REPO)
    (folder / "figure4.png").unlink()
    (folder / "loss.png").unlink()
    (folder / "README.md").write_text("# Mine\n\n![](figure4.png)\n")
    push_folder(folder, REPO)
    assert card(hub).startswith("# Mine")
    assert "figure4.png" in hub.files(REPO)
    assert "loss.png" not in hub.files(REPO)


def test_pictures_in_a_card_of_ours_that_is_kept_stay(hub, folder):
    """No new card is wanted, and the pushed records have one picture less."""
    (folder / "results.json").write_text(json.dumps(RESULTS | {"pictures": {"figure4.png": "Four"}}))
    (folder / "figure4.png").write_bytes((folder / "loss.png").read_bytes())
    push_folder(folder, REPO)
    (folder / "figure4.png").unlink()
    push_folder(folder, REPO, card=False)
    assert "](figure4.png)" in card(hub)
    assert "figure4.png" in hub.files(REPO)
    push_folder(folder, REPO)
    assert "figure4.png" not in card(hub)
    assert "figure4.png" not in hub.files(REPO)
