"""A small model and a classifier to measure it with, for all tests of measuring."""

import evaluate
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from measure.grid.model import Model
from measure.grid.settings import EvaluateConfig
from measuring import classifier
from trainer.settings import build

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler


@pytest.fixture(autouse=True)
def one_thread_and_fresh_accelerate():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture(scope="module")
def places(make_unet, tmp_path_factory):
    """A model and a classifier with random weights, and a cache of what the classifier sees in the digits."""
    folder = tmp_path_factory.mktemp("evaluate")
    GeneralizedDDIMPipeline(make_unet(), GeneralizedDDIMScheduler()).save_pretrained(folder / "model")
    classifier(folder / "classifier")
    return {"model": str(folder / "model"), "extractors": (str(folder / "classifier"),), "cache": str(folder / "cache")}


@pytest.fixture
def measure(places, tmp_path):
    """Measure into a folder of that name, with settings beside the quick ones. Figures, which take long, if asked."""

    def run(name="out", figures=False, **settings):
        quick = {"reference": "digits", "steps": (2, 3), "variances": ("0", "0.5"), "images": 40, "batch_size": 16}
        with pytest.MonkeyPatch.context() as patch:
            if not figures:
                patch.setattr(evaluate, "draw", lambda result, pictures, output: {})
            return evaluate.main(build(EvaluateConfig, places | quick | {"output": str(tmp_path / name)} | settings))

    return run


@pytest.fixture
def drawn(monkeypatch):
    """The numbers of the pictures that are drawn for cells."""
    numbers, pictures, pace = [], Model.pictures, Model.pace

    def draw(model, batch, *rest):
        numbers.extend(batch)
        return pictures(model, batch, *rest)

    def quietly(model, cell):
        before = len(numbers)
        found = pace(model, cell)
        del numbers[before:]
        return found

    monkeypatch.setattr(Model, "pictures", draw)
    monkeypatch.setattr(Model, "pace", quietly)
    return numbers
