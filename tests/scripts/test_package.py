"""A model and its records, joined into a folder that can be pushed."""

import dataclasses
import json
import shutil
from pathlib import Path

import gallery
import nll
import package
import pytest
import reconstruct
from trainer.settings import build, command

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler
from ddim_plugin.cli import main as cli
from ddim_plugin.hub.card import is_written_here


@pytest.fixture(scope="module")
def measured(make_unet, tmp_path_factory):
    """A model, and folders of what the scripts wrote for it."""
    folder = tmp_path_factory.mktemp("package")
    GeneralizedDDIMPipeline(make_unet(), GeneralizedDDIMScheduler()).save_pretrained(folder / "model")
    settings = {"model": str(folder / "model"), "images": 4}
    quick = {"steps": (10,), "refinement_steps": (2,), "strip": (2, 3), "figure_steps": (1, 2), "paths": 1, "points": 3}
    quick |= {"interpolation_steps": 2, "output": str(folder / "table2")}
    reconstruct.main(reconstruct.ReconstructConfig(**settings, **quick))
    short = {"steps": (2,), "variances": ("fixed_small",), "ode_images": 2, "tolerance": 0.1, "split": "train"}
    nll.main(nll.NLLConfig(**settings, **short, output=str(folder / "nll")))
    drawn = {"data": "digits", "images": 3, "columns": 3, "steps": (1, 2), "paths": 1, "path_steps": 2, "points": 3}
    settings = {"model": str(folder / "model"), "output": str(folder / "gallery")}
    gallery.main(gallery.GalleryConfig(**settings, **drawn, inverse_steps=2, refinement_steps=1))
    sample = ["sample", str(folder / "model"), "--num", "3", "--steps", "2", "--output", str(folder / "samples")]
    assert cli(sample) == 0
    return folder


def pack(measured, output, *records, **changes):
    names = [str(measured / name) for name in records or ("table2", "nll", "samples", "gallery")]
    settings = {"model": str(measured / "model"), "output": str(output), "records": names}
    return package.main(build(package.PackageConfig, settings | changes))


def test_a_folder_that_opens_with_card_figures_and_pictures(measured, tmp_path):
    readme = tmp_path / "README.md"
    block = "<!-- cards/tiny/measured/headline.md -->\n{}<!-- end -->\n"
    readme.write_text(f"A\n{block.format('old')}B\n{block.format('')}C\n")
    joined = pack(measured, tmp_path / "cards" / "tiny", license="mit", readme=str(readme))
    folder = tmp_path / "cards" / "tiny"
    assert GeneralizedDDIMPipeline.from_pretrained(folder).unet.config.sample_size == 8
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(joined))
    assert {each["metric"] for each in joined["results"]} == {
        "reconstruction_error_naive",
        "reconstruction_error_refined",
        "bits_per_dim",
    }
    listed = {(each["metric"], each["value"]) for each in joined["results"] if each.get("listed", True)}
    assert listed == {
        (kind, min(each["value"] for each in joined["results"] if each["metric"] == kind)) for kind, _ in listed
    }
    assert len(listed) == 3
    text = (folder / "README.md").read_text()
    assert is_written_here(text)
    assert "license: mit" in text
    for name in ("samples.png", *joined["pictures"]):
        assert (folder / name).is_file()
        assert f"]({name})" in text
    assert not list(folder.rglob("*.py"))
    index = json.loads((folder / "model_index.json").read_text())
    assert (index["_class_name"], index["scheduler"]) == ("DDIMPipeline", ["diffusers", "DDIMScheduler"])
    commands = (folder / "measured" / "commands.md").read_text().splitlines()[1:-1]
    assert [line.split()[1] for line in commands] == ["training/reconstruct.py", "training/nll.py", "sample"]
    for line, config in zip(commands, (reconstruct.ReconstructConfig, nll.NLLConfig), strict=False):
        again = package.parse(config, line.split()[2:])
        assert (again.model, again.images, again.spacing) == ("cards/tiny", 4, "linear")
    assert commands[-1] == "ddim-plugin sample cards/tiny --num 3 --steps 2 --seed 0 --batch-size 16"
    for name in ("reconstruct.json", "table2.md", "nll.json", "nll.md", "headline.md", "gallery.json"):
        assert (folder / "measured" / name).is_file()
    text_of_all = "".join(path.read_text() for path in folder.rglob("*") if path.suffix in (".json", ".md"))
    assert str(tmp_path) not in text_of_all
    assert str(measured) not in text_of_all
    told = readme.read_text()
    written = block.format(f"\n{(folder / 'measured' / 'headline.md').read_text()}\n")
    assert told == f"A\n{written}B\n{written}C\n"
    assert told == package.fill(told, tmp_path)
    found = json.loads((measured / "table2" / "reconstruct.json").read_text())["table"]
    assert f"**{found[1]['mean_squared_error']:.1e}**" in told
    assert f"(plain: {found[0]['mean_squared_error']:.1e})" in told


def test_the_command_of_samples_by_class(measured, make_unet, tmp_path):
    """With the classes and the guidance, which the caption tells too."""
    model = tmp_path / "model"
    GeneralizedDDIMPipeline(make_unet(num_class_embeds=3), GeneralizedDDIMScheduler()).save_pretrained(model)
    asked = ["--num", "4", "--steps", "2", "--class-label", "0", "1", "1", "0", "--guidance-scale", "2"]
    assert cli(["sample", str(model), *asked, "--output", str(tmp_path / "samples")]) == 0
    pack(measured, tmp_path / "out", str(tmp_path / "samples"), model=str(model))
    command = (tmp_path / "out" / "measured" / "commands.md").read_text().splitlines()[1].split()
    assert command[3:] == [*asked[:4], "--seed", "0", *asked[4:], "--batch-size", "16"]
    assert "*Samples, S = 2, w = 2, the first seed = 0.*" in (tmp_path / "out" / "README.md").read_text()


def test_samples_take_the_place_of_those_of_the_training(measured, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("samples.png", "loss.png"):
        shutil.copyfile(measured / "table2" / "figure5.png", run / name)
    pack(measured, tmp_path / "both", str(run), "samples")
    pack(measured, tmp_path / "one", str(run))
    drawn = (measured / "samples" / "samples.png").read_bytes()
    assert (tmp_path / "both" / "samples.png").read_bytes() == drawn
    assert (tmp_path / "one" / "samples.png").read_bytes() == (run / "samples.png").read_bytes() != drawn


def test_what_is_refused(measured, tmp_path, make_unet):
    other = tmp_path / "other"
    GeneralizedDDIMPipeline(make_unet(seed=1), GeneralizedDDIMScheduler()).save_pretrained(other)
    with pytest.raises(ValueError, match="measured on other weights"):
        pack(measured, tmp_path / "out", model=str(other))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="there is no folder"):
        pack(measured, tmp_path / "out", "gone")
    twice = shutil.copytree(measured / "table2", tmp_path / "twice" / "table2")
    with pytest.raises(ValueError, match=r"two of the records would be measured/reconstruct\.json"):
        pack(measured, tmp_path / "out", "table2", str(twice))
    for holding in (measured / "model", measured):
        with pytest.raises(ValueError, match="holds what is read"):
            pack(measured, holding, overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(ValueError, match="not empty"):
        pack(measured, tmp_path / "mine")
    with pytest.raises(ValueError, match="is no package, or was changed since"):
        pack(measured, tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "all of it"
    readme = tmp_path / "README.md"
    readme.write_text("<!-- gone/table.md -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match=r"has a block for gone/table\.md, which is not there"):
        pack(measured, tmp_path / "out", readme=str(readme))
    escaping = shutil.copytree(measured / "table2", tmp_path / "escaping")
    found = json.loads((escaping / "results.json").read_text())
    for changes, told in (
        ({"pictures": {"../../victim.png": ""}}, "must list names such as figure4.png"),
        ({"status": "running"}, "not finished"),
    ):
        (escaping / "results.json").write_text(json.dumps(found | changes))
        with pytest.raises(ValueError, match=told):
            pack(measured, tmp_path / "out", str(escaping))
    left = ["README.md", "escaping", "mine", "other", "twice"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left


def test_a_package_that_somebody_changed_is_kept(measured, tmp_path):
    pack(measured, tmp_path / "out")
    card = tmp_path / "out" / "README.md"
    card.write_text(card.read_text().replace("An unconditional", "My unconditional"))
    with pytest.raises(ValueError, match="is no package, or was changed since"):
        pack(measured, tmp_path / "out", overwrite=True)
    assert "My unconditional" in card.read_text()


def test_an_interruption_leaves_the_package_before_it(measured, tmp_path, monkeypatch):
    pack(measured, tmp_path / "out")
    replace = Path.replace

    def interrupted(path, target):
        if path.parent.name.startswith(".out-") and path.name == "out":
            monkeypatch.setattr(Path, "replace", replace)
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack(measured, tmp_path / "out", "nll", overwrite=True)
    assert (tmp_path / "out" / "table2.png").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_package_is_replaced_whole(measured, tmp_path):
    pack(measured, tmp_path / "out")
    pack(measured, tmp_path / "out", "nll", overwrite=True)
    assert not (tmp_path / "out" / "table2.png").exists()
    assert (tmp_path / "out" / "measured" / "nll.json").is_file()


def test_a_command_is_read_back_as_its_settings():
    config = nll.NLLConfig(model="m", steps=(10, 50), ode=False, fit_data="own", clip=1.0, batch_size=3)
    line = command(config)
    assert line == "python training/nll.py --model m --steps 10 50 --clip 1.0 --no-ode --fit_data own"
    words = line.split()[2:]
    again = package.parse(nll.NLLConfig, words)
    assert again == dataclasses.replace(config, batch_size=64)


def test_two_extractors_of_one_name_are_refused(measured, tmp_path):
    """Distances compare with others of the same extractor alone."""
    digest = json.loads((measured / "nll" / "results.json").read_text())["model"]["sha256"]
    for name, fingerprint in (("a", "1"), ("b", "2")):
        found = {"model": {"sha256": digest}, "results": [], "pictures": {}}
        found["extractors"] = [{"name": f"{name}/ResNet", "fingerprint": fingerprint}]
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(found))
    few = {"config": {"extractor": "c/resnet", "seed": 0}, "model": {"extractor": "1"}, "rows": []}
    (tmp_path / "a" / "few_steps.json").write_text(json.dumps(few))
    with pytest.raises(ValueError, match="b was measured with another extractor resnet"):
        pack(measured, tmp_path / "out", tmp_path / "a", tmp_path / "b")
    pack(measured, tmp_path / "out", tmp_path / "a")
