"""The card that the package writes: snippets that load the model, its settings, and metadata that the Hub takes."""

import re

import pytest
from card_text import SCHEDULER, UNET, rows, section
from huggingface_hub import ModelCard

from ddim_plugin.hub.card import MARK, adapt, card, is_written_here
from ddim_plugin.hub.code import code


def make_with(unet=None, scheduler=None, **settings):
    return card("ada/cifar", UNET | (unet or {}), SCHEDULER | (scheduler or {}), 10, **settings)


def test_a_card_of_a_model_alone():
    text = make_with(license="mit")
    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag) == ("diffusers", "unconditional-image-generation")
    assert (data.license, data.model_name, data.eval_results) == ("mit", "cifar", None)
    assert ModelCard(make_with()).data.license is None
    assert "No sample grid was made" in text
    assert "## Figures" not in text
    assert "## Training" not in text
    assert MARK in text
    assert "None" not in section(text, "Settings")


def test_samples_sections_and_metadata_are_added():
    text = make_with(samples="S = 20.", sections="## Notes\n\nMine.", datasets=["uoft-cs/cifar10"])
    assert "![samples.png](samples.png)\n\n*S = 20.*\n" in text
    assert section(text, "Notes") == "Mine.\n"
    assert ModelCard(text).data.datasets == ["uoft-cs/cifar10"]
    assert is_written_here(text)


@pytest.mark.parametrize("license", [None, "cc-by-4.0"])
def test_a_card_is_adapted_to_another_repo(license):
    """Only the id in the snippets, the name of the code file and the licence differ."""
    old = make_with(license="mit", sections="## Notes\n\nada/cifar is mine.").replace(code().name, "ddim_plugin_0_1_9")
    again = adapt(old, "eve/mine", license)
    assert is_written_here(again)
    assert 'GeneralizedDDIMPipeline.from_pretrained("eve/mine")' in again
    assert '"ada/cifar"' not in again
    assert "ada/cifar is mine." in again
    assert "ddim_plugin_0_1_9" not in again
    assert ModelCard(again).data.license == (license or "mit")
    assert f"The weights: {license or 'mit'}. The training data" in again
    assert adapt(again, "eve/mine", license) == again
    assert adapt(make_with(license="mit"), "ada/cifar") == make_with(license="mit")


def test_three_ways_to_load_with_a_pinned_revision():
    use = section(make_with(), "Use")
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
    text = make_with({"in_channels": 2, "_self_conditioning": True}, pipeline=None)
    assert "No stock pipeline gives the network its last x̂0" in text
    assert "with this prediction" not in text


def test_a_card_that_somebody_changed_is_theirs():
    text = make_with()
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
    text = card("ada/cifar", UNET, stock, 10)
    assert "| scheduler | `UniPCMultistepScheduler` |" in text


def test_a_multistep_method_is_told_as_one():
    solver = {"_class_name": "MultistepDDIMScheduler", "timestep_spacing": "few_steps", "solver_order": 2}
    fitted = {"10": {"error": 0.02, "default_error": 0.05}, "6": {}}
    fitted |= {"8": {"error": 0.01, "default_error": 0.05, "guidance_scale": 2.0}}
    text = make_with(scheduler=solver | {"fitted_solvers": fitted})
    told = dict(row[:2] for row in rows(section(text, "Settings")))
    assert told["solver order"] == "2"
    assert told["fitted solvers"] == "8 (error × 0.20 at w = 2), 10 (error × 0.40)"
    told = dict(row[:2] for row in rows(section(make_with(), "Settings")))
    assert not told.keys() & {"solver order", "fitted solvers"}
