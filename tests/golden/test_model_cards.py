"""The models that are committed: they open, make the pictures they made, and their cards say what was measured."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import package
import pytest
import torch
from freeze import CARDS, GOLDEN, draw_card, made_card, without_package
from measure.comparison.samplers import PLAIN
from measure.comparison.tables import entries

from ddim_plugin import GeneralizedDDIMPipeline
from ddim_plugin.hub.code import code

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
ALL = sorted(folder for folder in CARDS.iterdir() if folder.is_dir())
PIPELINES = {each: json.loads((each / "model_index.json").read_text())["_class_name"] for each in ALL}
FOLDERS = [folder for folder, name in PIPELINES.items() if name != "StableDiffusionPipeline"]
TOLERANCE = 0.01
"""Of a pixel in [0, 1]: ten steps carry on what convolutions on other processors differ by."""

each_folder = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


def call(folder):
    """Arguments for two images."""
    labels = json.loads((folder / "unet" / "config.json").read_text()).get("num_class_embeds")
    return {"batch_size": 2, "num_inference_steps": 3} | ({"class_labels": [0, 1]} if labels else {})


def test_there_is_one():
    assert "ddim-mnist-28" in [folder.name for folder in FOLDERS]


@each_folder
def test_it_makes_the_pictures_it_made(folder):
    frozen = np.load(GOLDEN / "frozen" / f"{folder.name}.npy")
    images = draw_card(folder)
    assert images.std() > 0.2
    assert np.abs(images - frozen / 255).max() < TOLERANCE + 0.5 / 255


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """What a process without the package makes of each folder: by stock classes, and by the code file of a push."""
    place, cases = tmp_path_factory.mktemp("pushed"), []
    for folder in FOLDERS:
        shutil.copytree(folder, place / folder.name)
        (place / folder.name / f"{code().name}.py").write_text(code().text)
        cases.append({"source": str(folder), "call": call(folder), "kind": "diffusers"})
    cases += [{"source": str(place / folder.name), "call": call(folder), "kind": "code"} for folder in FOLDERS]
    answers = without_package(cases, place / "home")
    return {folder: (answers[i], answers[i + len(FOLDERS)]) for i, folder in enumerate(FOLDERS)}


@each_folder
def test_it_opens_without_the_package(folder, opened):
    """By the stock sampler as it is, if there is one, and as ours by the code file, which a push adds."""
    answer, by_code = opened[folder]
    if "class_labels" in call(folder):
        assert "unexpected keyword argument 'class_labels'" in answer["trace"]  # no stock pipeline takes them
    else:
        assert answer.get("trace") is None
        assert (answer["pipeline"], answer["said"]) == (PIPELINES[folder], [])
        assert np.array(answer["images"]).std() > 0.1
    assert not list(folder.rglob("*.py"))
    assert by_code.get("trace") is None
    assert by_code["scheduler"] == "MultistepDDIMScheduler"
    assert np.array(by_code["images"]).std() > 0.2
    pipe = GeneralizedDDIMPipeline.from_pretrained(folder)
    seeds = [torch.Generator().manual_seed(i) for i in range(2)]
    assert np.abs(pipe(generator=seeds, output_type="np", **call(folder)).images - by_code["images"]).max() < 1e-5


@each_folder
def test_the_card_is_made_of_the_records(folder):
    text = (folder / "README.md").read_text()
    assert f'from_pretrained("user/{folder.name}")' in text
    assert text == made_card(folder)  # which refuses figures of other weights
    for name in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text):
        assert (folder / name).is_file()


@pytest.mark.parametrize("folder", ALL, ids=lambda folder: folder.name)
def test_nothing_is_too_large_or_private(folder):
    for path in folder.rglob("*"):
        assert path.is_dir() or path.stat().st_size < 10_000_000
        if path.suffix in (".json", ".md"):
            assert not re.search(r"/(home|work|tmp|root)/", path.read_text())


@each_folder
def test_the_hub_lists_figures_of_this_model_alone(folder):
    """Not those of the samplers of diffusers that ours are compared with."""
    kept = json.loads((folder / "results.json").read_text())["results"]
    few = folder / "measured" / "few_steps.json"
    made = entries(json.loads(few.read_text())) if few.is_file() else []
    assert len(made) == sum((each.get("name") or "").startswith("Few steps") for each in kept)
    shown = [each.get("scheduler") or "" for each in kept if each.get("listed", True)]
    assert not any(name.startswith(("the best of", *PLAIN)) for name in shown)


@each_folder
def test_the_headline_is_made_of_the_records(folder):
    name = folder.relative_to(ROOT).as_posix()
    found = [(folder / package.MEASURED / file).read_text() for file in (package.HEADLINE, package.COMMANDS)]
    assert found == list(package.headline(folder, name))


def test_the_blocks_of_the_readme_are_the_files_they_name():
    blocks = package.BLOCK.findall(README)
    assert f"model_cards/ddim-mnist-28/measured/{package.HEADLINE}" in [name for _, name, _ in blocks]
    assert package.fill(README, ROOT) == README


@each_folder
def test_it_knows_the_times_that_were_fitted_to_it(folder):
    """If they are better than the default of the fit, on draws that they were not fitted to."""
    found = json.loads((folder / "measured" / "fit.json").read_text())["fitted"]
    assert set(found) >= {"5", "8", "10", "15", "20"}
    scheduler = GeneralizedDDIMPipeline.from_pretrained(folder).scheduler
    kept = scheduler.config.fitted_solvers or {}
    assert kept.keys() == {S for S, fitted in found.items() if fitted["error"] < fitted["default_error"]}
    for S in kept:
        scheduler.set_timesteps(int(S))
        assert scheduler.timesteps.tolist() == pytest.approx(found[S]["timesteps"], rel=1e-6)  # float32 on flows
