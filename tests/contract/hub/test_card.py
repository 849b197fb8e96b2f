"""The card: every number from the records, metadata that the Hub takes, refusals of records that are not in order."""

import json
import re

import pytest
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results

from ddim_plugin.hub.card import MARK, card, is_written_here
from ddim_plugin.hub.code import code
from ddim_plugin.hub.records import GRID, Records, public, read_results
from ddim_plugin.hub.records import TRAINING as TRAINING_JSON

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
UNET = {"_class_name": "UNet2DModel", "sample_size": 32, "in_channels": 3, "out_channels": 3, "num_class_embeds": None}
SCHEDULER = {"_class_name": "GeneralizedDDIMScheduler", "num_train_timesteps": 1000, "beta_schedule": "linear"}
SCHEDULER |= {"beta_start": 0.0001, "beta_end": 0.02, "prediction_type": "epsilon", "timestep_spacing": "quadratic"}
SCHEDULER |= {"eta": 0.0, "variance_type": "fixed_small", "clip_sample": False}


def records(results=RESULTS, training=TRAINING, captions=None, **files):
    files = {f"{name}.json": content for name, content in files.items()} | (
        {TRAINING_JSON: training} if training else {}
    )
    return Records(results, files, {}, {GRID: "S = 20."} if captions is None else captions)


def make(license="mit", **changes):
    return card("ada/cifar", UNET, SCHEDULER, 1_698_337, records(**changes), license)


def make_with(unet=None, scheduler=None, known=None, **settings):
    """A card without records."""
    known = known or records([], None, {})
    return card("ada/cifar", UNET | (unet or {}), SCHEDULER | (scheduler or {}), 10, known, **settings)


def section(text, name):
    return re.search(rf"## {name}\n\n(.*?)(?=\n## |\Z)", text, re.DOTALL)[1]


def rows(text):
    """The cells of a Markdown table, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


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


def test_three_ways_to_load_with_a_pinned_revision():
    use = section(make(), "Use")
    assert 'GeneralizedDDIMPipeline.from_pretrained("ada/cifar")' in use
    assert f'"ada/cifar", custom_pipeline="{code().name}", trust_remote_code=True, revision="' in use
    assert '`DDIMPipeline.from_pretrained("ada/cifar")`' in use
    assert use.count("trust_remote_code") == 1
    for block in re.findall(r"```python\n(.*?)```", use, re.DOTALL):
        compile(block, "card", "exec")


@pytest.mark.parametrize(
    ("unet", "said"), [({"num_class_embeds": 11}, "class labels"), ({"out_channels": 6}, "learned variances")]
)
def test_what_the_stock_pipeline_cannot_do_is_said(unet, said):
    text = make_with(unet)
    assert f"`DDIMPipeline` does not support {said}" in text
    assert ("class_labels=0" in text) == ("num_class_embeds" in unet)


VARIANCE_EXPLODING = {"prediction_type": "score", "sigma_min": 0.01, "sigma_max": 50.0, "beta_schedule": "linear"}


def test_a_flow_model_names_its_settings_and_its_stock_pipeline():
    flow = {"prediction_type": "flow_prediction", "shift": 3.0}
    text = make_with(scheduler=flow, pipeline="DDPMPipeline")
    assert '`DDPMPipeline.from_pretrained("ada/cifar")` runs no code' in text
    assert "plain Euler steps of flow matching" in text
    assert "DDIMPipeline.from_pretrained" not in text.replace("GeneralizedDDIMPipeline", "")
    told = dict(row[:2] for row in rows(section(text, "Settings")))
    assert (told["prediction"], told["shift"]) == ("flow_prediction", "3")
    assert "β" not in told
    assert f'custom_pipeline="{code().name}"' in text


@pytest.mark.parametrize("channels", [1, 3])
def test_an_exploding_model_names_the_cost_of_its_stock_pipeline(channels):
    text = make_with({"in_channels": channels}, VARIANCE_EXPLODING, pipeline="ScoreSdeVePipeline")
    assert "a predictor-corrector of about 2 × 1000 evaluations" in text
    assert ("`ScoreSdeVePipeline` does not support images of 1 channels" in text) == (channels == 1)
    told = dict(row[:2] for row in rows(section(text, "Settings")))
    assert told["sigma max"] == "50"
    assert "β" not in told


def test_a_model_without_a_stock_pipeline_says_so():
    assert "No stock pipeline samples with this prediction on this path." in make_with(pipeline=None)
    text = make_with(scheduler={"beta_schedule": "sqrt"}, pipeline=None)
    assert "diffusers alone does not load this model" in text
    assert "custom_pipeline" not in text


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


def test_a_card_that_somebody_changed_is_theirs():
    text = make()
    assert is_written_here(text)
    assert is_written_here(text.replace("\n", "\r\n"))
    assert not is_written_here(text.replace("## Licence", "## My own notes\n\nHello.\n\n## Licence"))
    assert not is_written_here(text + "\nmine\n")
    assert not is_written_here("# By hand\n")


@pytest.mark.parametrize(
    ("scheduler", "said"),
    [
        ({"trained_betas": [0.1, 0.2]}, "| trained betas | 0.1, 0.2 |"),
        ({"trained_betas": [0.1] * 1000}, "| trained betas | 1000 values |"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "| β | squaredcos_cap_v2 |"),
        ({"beta_end": 0.05}, "| beta end | 0.05 |"),
        ({"rescale_betas_zero_snr": True}, "| rescale betas zero snr | True |"),
        ({"thresholding": True, "dynamic_thresholding_ratio": 0.9}, "| thresholding | True |\n| dynamic thresholding"),
        ({"clip_sample": True, "clip_sample_range": 1.0}, "| clip sample | True |"),
        ({}, "uses η = 0, order 1 and a stock spacing."),
        ({"_class_name": "InverseDDIMScheduler"}, "| scheduler | `InverseDDIMScheduler` |"),
        (
            {"_class_name": "InverseDDIMScheduler"},
            "pipe.scheduler = GeneralizedDDIMScheduler.from_config(pipe.scheduler",
        ),
    ],
)
def test_settings_are_told_as_they_are(scheduler, said):
    assert said in make_with(scheduler=scheduler)


def test_defaults_and_derived_settings_are_not_told():
    text = section(make_with(scheduler={"clip_sample": False, "beta_end": 0.02}), "Settings")
    told = dict(row[:2] for row in rows(text))
    assert not told.keys() & {"clip sample", "beta end"}
    assert {told[name] for name in ("T", "β", "prediction", "η", "τ")} == {
        "1000",
        "linear",
        "epsilon",
        "0",
        "quadratic",
    }
    derived = {"trained_betas": [0.1], "beta_schedule": "jsd", "_ddim_plugin": {"trained_betas": None}}
    text = make_with(scheduler=derived)
    assert "| β | jsd |" in text
    assert "trained betas" not in text


def test_the_snippets_fit_the_repo():
    text = make_with(variant="fp16", revision="b")
    assert 'GeneralizedDDIMPipeline.from_pretrained("ada/cifar", variant="fp16", revision="b")' in text
    assert '`DDIMPipeline.from_pretrained("ada/cifar", variant="fp16", revision="b")' in text
    assert '"ada/cifar", variant="fp16", custom_pipeline=' in text
    stock = {key: value for key, value in SCHEDULER.items() if key != "eta"} | {
        "_class_name": "UniPCMultistepScheduler"
    }
    text = card("ada/cifar", UNET, stock, 10, records([], None, {}))
    assert "| scheduler | `UniPCMultistepScheduler` |" in text
    dropped = make_with({"num_class_embeds": 11}, known=records(training=TRAINING | {"classes": ["a"] * 10}))
    assert "| classes | 10 values |" in dropped


def test_a_multistep_method_is_told_as_one():
    solver = {"_class_name": "MultistepDDIMScheduler", "timestep_spacing": "few_steps", "solver_order": 2}
    text = make_with(scheduler=solver | {"fitted_timesteps": {"10": [1], "6": [1]}})
    told = dict(row[:2] for row in rows(section(text, "Settings")))
    assert told["solver order"] == "2"
    assert told["fitted timesteps"] == "6, 10"
    told = dict(row[:2] for row in rows(section(make(), "Settings")))
    assert not told.keys() & {"solver order", "fitted timesteps"}


def test_odd_texts_do_not_break_tables():
    entry = OTHER | {"name": "a | b\nc", "dataset": {"name": "x|y"}}
    found = section(make(results=[entry]), "Figures")
    assert r"a \| b c" in found
    with pytest.raises(ValueError, match="license must be as the Hub names it"):
        make(license="mit\nand more")
