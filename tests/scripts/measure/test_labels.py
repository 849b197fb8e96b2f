"""Labels of a model: its classes, without the one that means "no class", in each script that measures."""

import json

import few_steps
import nll
import pytest
import reconstruct
import torch
from measure.comparison.bench import Bench
from measure.labels import count_classes
from measuring import classifier
from trainer.settings import build

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler


@pytest.fixture(scope="module")
def guided(make_unet, tmp_path_factory):
    """A model as training for guidance saves it: two classes, and an embedding for none."""
    folder = tmp_path_factory.mktemp("labels") / "model"
    scheduler = GeneralizedDDIMScheduler(30, beta_start=0.003, beta_end=0.4)
    GeneralizedDDIMPipeline(make_unet(num_class_embeds=3), scheduler).save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps({"classes": ["cat", "dog"]}))
    return folder


@pytest.fixture
def labels(monkeypatch):
    """The labels that pipelines and networks are called with."""
    seen, forward = set(), torch.nn.Embedding.forward
    monkeypatch.setattr(
        torch.nn.Embedding, "forward", lambda self, given: (seen.update(given.tolist()), forward(self, given))[1]
    )
    return seen


def test_classes_are_counted_without_the_null_label(guided, make_unet, tmp_path):
    assert count_classes(str(guided), make_unet(num_class_embeds=3)) == 2
    assert count_classes(str(tmp_path), make_unet(num_class_embeds=3)) == 3  # without a record of training
    assert count_classes(str(tmp_path), make_unet(num_class_embeds=3), 2) == 2  # as --classes says
    assert count_classes(str(guided), make_unet()) is None
    for unet, given, said in ((make_unet(), 2, "is unconditional"), (make_unet(num_class_embeds=3), 4, r"in 1\.\.3")):
        with pytest.raises(ValueError, match=said):
            count_classes(str(guided), unet, given)
    with pytest.raises(ValueError, match="does not say how many"):
        count_classes("nowhere", make_unet(class_embed_type="timestep"))


@pytest.mark.parametrize("given", [3, 1])
def test_a_number_of_classes_that_differs_from_the_record(guided, measure, make_unet, tmp_path, given):
    """With 3 the label that means "no class" would be drawn."""
    said = f"has 2 classes by its training.json, not {given}: leave out classes={given}"
    assert count_classes(str(guided), make_unet(num_class_embeds=3), 2) == 2
    with pytest.raises(ValueError, match=said):
        measure(model=str(guided), images=20, steps=(2,), variances=("0",), classes=given)
    settings = {"model": str(guided), "reference": "digits", "extractor": "my/classifier", "classes": given}
    with pytest.raises(ValueError, match=said):
        few_steps.main(build(few_steps.FewStepsConfig, settings | {"output": str(tmp_path / "out")}))
    assert not (tmp_path / "out").exists()


def test_evaluate_draws_no_null_label(guided, measure, labels):
    result = measure(model=str(guided), images=20, steps=(2,), variances=("0",))
    assert result["made"]["classes"] == 2
    assert labels == {0, 1}


def test_few_steps_draws_no_null_label(guided, labels, tmp_path):
    classifier(tmp_path / "classifier")
    settings = {"model": str(guided), "reference": "digits", "extractor": str(tmp_path / "classifier")}
    settings |= {"output": str(tmp_path / "out"), "images": 20, "screen": 20, "near": 3, "device": "cpu"}
    bench = Bench(build(few_steps.FewStepsConfig, settings))
    scheduler = GeneralizedDDIMScheduler(30)
    scheduler.set_timesteps(2)
    bench.sample(bench.unet, scheduler, range(1, 4))
    assert labels == {0, 1}


@pytest.mark.parametrize(
    ("script", "config"), [(nll.main, nll.NLLConfig), (reconstruct.main, reconstruct.ReconstructConfig)]
)
def test_a_null_label_is_refused(guided, tmp_path, script, config):
    settings = {"model": str(guided), "output": str(tmp_path / "out"), "steps": (3,)}
    settings |= {"strip": (2, 3), "figure_steps": (2,)} if config is reconstruct.ReconstructConfig else {}
    for label, said in ((2, r'in 0\.\.1, not 2, which means "no class"'), (3, r"in 0\.\.1, not 3$"), (-1, "not -1$")):
        with pytest.raises(ValueError, match=said):
            script(build(config, settings | {"class_label": label, "images": 2}))
    with pytest.raises(ValueError, match="needs class_label"):
        script(build(config, settings))


def test_the_model_that_nll_saves_has_its_classes(guided, make_unet, tmp_path):
    settings = {"model": str(guided), "output": str(tmp_path / "out"), "save_model": str(tmp_path / "saved")}
    settings |= {"class_label": 1, "steps": (3,), "images": 2, "fit_images": 2, "ode": False, "variances": ("optimal",)}
    nll.main(build(nll.NLLConfig, settings))
    assert count_classes(str(tmp_path / "saved"), make_unet(num_class_embeds=3)) == 2
