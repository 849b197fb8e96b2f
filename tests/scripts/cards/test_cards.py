"""Cards with figures: every number from the records, and refusals of records that are not in order."""

import json
from types import SimpleNamespace

import pytest
from card_text import SCHEDULER, UNET, rows, section
from cards.card import made, write_card
from cards.records import TRAINING as TRAINING_JSON
from cards.records import Records, public, read_records, read_results
from cards.weights import weights_digest
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results
from PIL import Image

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler
from ddim_plugin.hub.card import MARK, card, is_written_here
from ddim_plugin.hub.push import GRID

RESULT = {"metric": "fid", "name": "FID", "value": 4.1613, "nfe": 100, "num_inference_steps": 100, "eta": 0.0}
RESULT |= {"variance_type": "fixed_small", "timestep_spacing": "quadratic", "images": 50000, "seed": 3}
RESULT |= {"dataset": {"name": "CIFAR-10", "id": "uoft-cs/cifar10", "split": "train"}}
OTHER = {"metric": "bits_per_dim", "value": 3.70123, "standard_error": 0.0123, "nfe": 1000, "dataset": {"name": "mine"}}
RESULTS = [RESULT, RESULT | {"value": 13.3612, "nfe": 10, "num_inference_steps": 10}, OTHER]

TRAINING = {
    "config": {
        "data": "uoft-cs/cifar10",
        "split": "train",
        "steps": 1234,
        "batch_size": 64,
        "loss": "simple",
        "seed": 7,
    }
    | {"optimizer": "adam", "learning_rate": 0.0002, "ema_decay": 0.999},
    "data_from": "hub",
    "images": 50000,
    "seconds": 5400.0,
    "images_per_second": 14.6,
    "processes": 1,
    "device": "a CPU, 2 threads",
    "mixed_precision": "bf16",
    "loss": 0.0314159,
    "revision": "abc1234",
    "status": "finished",
}


def records(results=RESULTS, training=TRAINING, captions=None, **files):
    files = {f"{name}.json": content for name, content in files.items()} | (
        {TRAINING_JSON: training} if training else {}
    )
    return Records(results, files, {}, {GRID: "S = 20."} if captions is None else captions)


def make(license="mit", **changes):
    model = SimpleNamespace(card=lambda id, license, **more: card(id, UNET, SCHEDULER, 1_698_337, license, **more))
    return made(model, records(**changes), "ada/cifar", license)


def test_the_metadata_is_that_of_the_records():
    data = ModelCard(make()).data
    assert (data.library_name, data.pipeline_tag, data.license) == (
        "diffusers",
        "unconditional-image-generation",
        "mit",
    )
    assert data.datasets == ["uoft-cs/cifar10"]
    assert data.model_name == "cifar"
    found = [(each.metric_type, each.metric_value, each.dataset_name) for each in data.eval_results]
    assert found == [("fid", 4.1613, "CIFAR-10"), ("fid", 13.3612, "CIFAR-10"), ("bits_per_dim", 3.70123, "mine")]
    assert [each.metric_args["nfe"] for each in data.eval_results] == [100, 10, 1000]
    assert data.eval_results[0].metric_args["timestep_spacing"] == "quadratic"
    index = data.to_dict()["model-index"]
    assert len(model_index_to_eval_results(index)[1]) == 3
    assert isinstance(ModelCardData(**data.to_dict()), ModelCardData)


def test_the_figures_equal_the_json():
    """A table for each metric and data set: settings by S."""
    noisy = RESULT | {"value": 5.784, "eta": 1.0, "nfe": 99}
    text = section(make(results=[*RESULTS, noisy]), "Figures")
    fid, bits = text.split("**BITS_PER_DIM**")
    assert fid.startswith("**FID**, CIFAR-10 train, images = 50000, seed = 3\n")
    assert rows(fid) == [
        ["sampler", "S = 10", "S = 100"],
        ["---"] * 3,
        ["variance = fixed_small, η = 0, τ = quadratic", "13.36", "4.161"],
        ["variance = fixed_small, η = 1, τ = quadratic", "", "5.784 (99)"],
    ]
    assert bits.startswith(", mine\n")
    assert rows(bits) == [["sampler", "NFE = 1000"], ["---"] * 2, ["", "3.701 ± 0.012"]]


def test_what_is_not_listed_stands_in_the_tables_alone():
    text = make(results=[RESULT, OTHER | {"listed": False}])
    assert [each.metric_type for each in ModelCard(text).data.eval_results] == ["fid"]
    assert "3.701 ± 0.012" in section(text, "Figures")


def test_pictures_stand_below_the_figures_with_their_captions():
    text = make(captions={"figure4.png": "Time against S."})
    assert "![figure4.png](figure4.png)\n\n*Time against S.*\n" in section(text, "Figures")


def test_the_training_is_that_of_the_record():
    told = dict(row[:2] for row in rows(section(make(), "Training")))
    assert (told["steps"], told["batch size"], told["images"]) == ("1234", "64", "50000")
    assert (told["seconds"], told["device"]) == ("5400", "a CPU, 2 threads")
    assert told["loss"] == "0.0314159"  # of the outcome, the last one
    assert "| loss | simple |" in section(make(), "Training")
    assert told["seed"] == "7"
    assert (told["data"], told["split"]) == ("uoft-cs/cifar10", "train")


def test_what_was_not_recorded_is_said_to_be_so():
    text = make(results=[], training=None, captions={}, license=None)
    data = ModelCard(text).data
    assert data.eval_results is None
    assert data.license is None
    assert "None have been measured for these weights." in text
    assert "How these weights were trained was not recorded." in text
    assert "No sample grid was made" in text
    assert MARK in text
    assert is_written_here(text)
    assert "None" not in section(text, "Settings") + section(text, "Training")


def test_a_conversion_is_told():
    source = {"file": "model-790000.ckpt", "sha256": "0123abcd", "published": "ema_cifar10", "step": 790000}
    text = make(training=None, conversion={"source": source, "weights": "ema"})
    told = dict(row[:2] for row in rows(section(text, "Training")))
    assert (told["file"], told["sha256"]) == ("model-790000.ckpt", "0123abcd")
    assert (told["weights"], told["step"]) == ("ema", "790000")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"fid": 3}, 'no list under "results"'),
        ([], "contains no JSON object"),
        ({"results": [RESULT, {}]}, "entry 1 of results has metric=None: it must be an id such as fid"),
        ({"results": [RESULT | {"value": "4.16"}]}, "value='4.16': it must be a finite number"),
        ({"results": [RESULT | {"value": True}]}, "must be a finite number"),
        ({"results": [RESULT | {"value": float("nan")}]}, "must be a finite number"),
        ({"results": [RESULT | {"nfe": 0}]}, "nfe=0: it must be a positive number"),
        ({"results": [RESULT | {"standard_error": "x"}]}, "standard_error='x'"),
        (
            {"results": [RESULT | {"dataset": "CIFAR-10"}]},
            "dataset='CIFAR-10': it must be an object of texts",
        ),
        ({"results": [{k: v for k, v in RESULT.items() if k != "nfe"}]}, "has nfe=None: it must be a positive number"),
        ({"results": ["4.16"]}, "is no object"),
        ({"results": [RESULT | {"value": 10**400}]}, "must be a finite number"),
        ({"results": [RESULT | {"dataset": {"name": "x", "id": 3}}]}, "'id': 3}: it must be an object of texts"),
    ],
)
def test_results_that_are_not_in_order(content, said, tmp_path):
    file = tmp_path / "results.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=said):
        read_results(file)


def test_half_a_file_of_results(tmp_path):
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"results": RESULTS})[:50])
    with pytest.raises(ValueError, match=r"cannot read .*results\.json"):
        read_results(file)


def test_no_place_of_this_machine_is_published():
    record = {"config": {"output": "/home/ada/out/run", "data": "~/pictures", "files": ["/a/b.png", 3]}, "loss": 0.1}
    expected = {"config": {"output": "run", "data": "pictures", "files": ["b.png", 3]}, "loss": 0.1}
    assert public(record) == expected
    assert public({"/home/ada/x": 1}) == {"x": 1}
    for text, left in [
        ("cannot read /home/ada/secret/x.png: damaged", "cannot read x.png: damaged"),
        ("file:///home/ada/x", "x"),
        (r"C:\Users\ada\x", "x"),
        ("../private/photos", "photos"),
        ("uoft-cs/cifar10", "uoft-cs/cifar10"),
        ("https://huggingface.co/datasets/a/b", "https://huggingface.co/datasets/a/b"),
        ("1,670 images/s at 1/2", "1,670 images/s at 1/2"),
        ("/home/ada lovelace/My Pictures/secret set", "secret set"),
        (r"C:\Users\Ada Lovelace\pics", "pics"),
        ("data:/home/ada/x", "data:x"),
        ("(a+b)/2 images / second, σ̂/σ, 100%/0%", "(a+b)/2 images / second, σ̂/σ, 100%/0%"),
        ("https://x.co/g/-/tree/main?next=/b", "https://x.co/g/-/tree/main?next=/b"),
        ("[x](/datasets/y)", "[x](/datasets/y)"),
    ]:
        assert public(text) == left


def test_odd_texts_do_not_break_tables():
    entry = OTHER | {"name": "a | b\nc", "dataset": {"name": "x|y"}}
    found = section(make(results=[entry]), "Figures")
    assert r"a \| b c" in found
    with pytest.raises(ValueError, match="license must be as the Hub names it"):
        make(license="mit\nand more")


def test_classes_of_the_training_are_in_the_card():
    assert "| classes | 10 values |" in make(training=TRAINING | {"classes": ["a"] * 10})


# ---- in a folder ----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(make_unet, tmp_path):
    """A saved pipeline with records and previews, as a training run leaves them."""
    folder = tmp_path / "out" / "digits"
    GeneralizedDDIMPipeline(make_unet(), GeneralizedDDIMScheduler()).save_pretrained(folder)
    config = {"data": "/home/ada/pictures", "output": str(folder), "preview_steps": 7}
    (folder / "training.json").write_text(json.dumps({"config": config, "data_from": "files"}))
    (folder / "results.json").write_text(json.dumps({"results": RESULTS}))
    (folder / "previews").mkdir()
    for name in ("previews/step-00000005.png", "previews/step-00000010.png", "loss.png"):
        Image.new("L", (8, 8), len(name)).save(folder / name)
    return folder


def test_a_card_is_written_beside_its_records(folder):
    write_card(folder, "ada/digits", "mit")
    text = (folder / "README.md").read_text()
    assert is_written_here(text)
    assert 'from_pretrained("ada/digits")' in text
    assert "| data | pictures |" in text
    assert "4.161" in section(text, "Figures")
    assert "*Samples, S = 7, η = 0.*" in text
    assert (folder / GRID).read_bytes() == (folder / "previews" / "step-00000010.png").read_bytes()
    assert str(folder.parent) not in "".join(file.read_text() for file in folder.rglob("*.json"))
    write_card(folder, "ada/digits")
    assert ModelCard.load(folder / "README.md").data.license == "mit"


def test_places_in_results_are_not_published(folder):
    entry = RESULT | {"dataset": {"name": "/home/ada/faces", "split": "train"}}
    (folder / "results.json").write_text(json.dumps({"results": [entry]}))
    write_card(folder, "ada/digits")
    assert "/home/ada" not in (folder / "results.json").read_text() + (folder / "README.md").read_text()
    assert "**FID**, faces train" in (folder / "README.md").read_text()


def test_a_card_of_somebody_stays_in_the_folder(folder):
    (folder / "README.md").write_text("# By hand\n")
    write_card(folder, "ada/digits", "mit")
    assert (folder / "README.md").read_text() == "# By hand\n"
    assert "/home/ada" not in (folder / "training.json").read_text()


def test_figures_of_other_weights_are_refused(folder, make_unet):
    """Figures of another variant in the folder are not."""
    pipe = GeneralizedDDIMPipeline(make_unet(seed=9), GeneralizedDDIMScheduler())
    found = {"results": RESULTS, "model": {"sha256": weights_digest(pipe.unet)}}
    (folder / "results.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match=r"results\.json was measured on other weights"):
        write_card(folder, "ada/digits")
    assert not (folder / "README.md").exists()
    pipe.save_pretrained(folder, variant="raw")
    write_card(folder, "ada/digits")


@pytest.mark.parametrize("name", ["results.json", "training.json", "conversion.json", "sample.json"])
@pytest.mark.parametrize("content", ["", '{"results": [', "[1, 2]", '"text"', "null", "\x00\x01", "[" * 100_000])
def test_a_record_that_cannot_be_read_is_named(folder, name, content):
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=rf"(cannot read )?{folder / name}(: | contains no JSON object)"):
        read_records(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("training.json", {"config": ["--data", "faces"]}),  # of other programs
        ("training.json", {"config": None}),
        ("training.json", {"config": {}, "classes": 10}),
        ("training.json", {"config": {}, "loss": float("nan")}),
        ("results.json", {"all": {"acc": 0.9}}),
        ("results.json", {"results": {"fid": 4.2}}),
        ("results.json", {"results": [], "model": "ddim"}),
        ("results.json", {"results": [], "pictures": "figure4.png"}),
        ("results.json", {"results": [], "pictures": ["../secret.png"]}),
        ("results.json", {"results": [RESULT | {"num_inference_steps": "ten"}]}),
        ("conversion.json", {"source": "model.pt"}),
        ("sample.json", {"settings": [1]}),
    ],
)
def test_a_record_of_another_program_is_named(folder, name, content):
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=str(folder / name)):
        write_card(folder, "ada/digits")
    assert not (folder / "README.md").exists()
