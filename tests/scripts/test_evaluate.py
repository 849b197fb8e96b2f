"""Measuring a model: what the numbers are, that nothing but the settings moves them, kills, and bad input."""

import json
import os
import shutil
import subprocess
import sys
import urllib.error
from pathlib import Path
from types import ModuleType, SimpleNamespace

import datasets
import diffusers
import evaluate
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import DDIMScheduler, LDMPipeline, VQModel
from measure import extractors as features
from measure.extractors import INCEPTION, Extractor
from measure.metrics import Gaussian, frechet
from pictures.sources import Pictures, load
from PIL import Image
from trainer.settings import build
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler
from ddim_plugin.hub.card import read_results
from ddim_plugin.hub.push import Model

ROOT = Path(__file__).parents[2]
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_labels": 10}
FEATURES = 16


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


def classifier(folder, **config):
    torch.manual_seed(1)
    ResNetForImageClassification(ResNetConfig(**RESNET | {"num_channels": 1} | config)).save_pretrained(folder)


@pytest.fixture
def measure(places, tmp_path):
    """Measure into a folder of that name, with settings beside the quick ones."""

    def run(name="out", **settings):
        quick = {"reference": "digits", "steps": (2, 3), "variances": ("0", "0.5"), "images": 40, "batch_size": 16}
        return evaluate.main(
            build(evaluate.EvaluateConfig, places | quick | {"output": str(tmp_path / name)} | settings)
        )

    return run


def values(result):
    return [entry["value"] for entry in result["results"]]


# ---- the numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [None, 3])
def test_the_numbers_are_those_of_the_pipeline_and_the_classifier(places, measure, make_unet, tmp_path, classes):
    """By hand, in one batch: picture i from seed + i, of class i modulo their number, in 8 bits."""
    model = places["model"]
    if classes:
        model = str(tmp_path / "conditional")
        unet = make_unet(num_class_embeds=classes)
        GeneralizedDDIMPipeline(unet, GeneralizedDDIMScheduler()).save_pretrained(model)
    result = measure(model=model, seed=5, splits=("test",), clip="fixed_large", variances=("0.5", "fixed_large"))
    pipe = GeneralizedDDIMPipeline.from_pretrained(model)
    network = ResNetForImageClassification.from_pretrained(places["extractors"][0]).eval()

    @torch.no_grad()
    def seen(pictures):
        return network.resnet(pictures.float() / 255).pooler_output.flatten(1).double().numpy()

    def fitted(x):
        return Gaussian(x.mean(0), np.cov(x, rowvar=False))

    real, saved = fitted(seen(load("digits", "test")[0])), pipe.scheduler.config
    for entry in result["results"]:
        S, eta = entry["num_inference_steps"], entry["eta"]
        larger = {"variance_type": "fixed_large", "clip_sample": True, "use_clipped_model_output": True}
        changes = larger if eta is None else {"eta": eta}
        pipe.scheduler = GeneralizedDDIMScheduler.from_config(saved, **changes)
        images = pipe(
            40,
            S,
            generator=[torch.Generator().manual_seed(5 + i) for i in range(40)],
            class_labels=[i % classes for i in range(40)] if classes else None,
        ).images
        pictures = torch.from_numpy(np.stack([np.asarray(image) for image in images]))[:, None]
        assert entry["value"] == pytest.approx(frechet(fitted(seen(pictures)), real), rel=1e-5)
        assert entry["nfe"] == S
    assert [(e["eta"], e["variance_type"]) for e in result["results"]] == [
        *[(0.5, "fixed_small"), (None, "fixed_large")] * 2
    ]
    assert result["made"]["classes"] == classes


def test_what_is_written(measure, tmp_path, places):
    result = measure(variances=("0", "0.5", "fixed_large"), spacings=("linear", "quadratic"), part=16)
    output = tmp_path / "out"
    written = json.loads((output / "results.json").read_text())
    assert written == json.loads(json.dumps(result))
    model = Model(Path(places["model"]), output)  # what a push takes of it: records that fit the weights
    assert len(model.results) == len(result["results"])
    assert f"{result['results'][0]['value']:.4g}" in model.card("ada/digits", None, None, None)
    entries = read_results(output / "results.json")
    assert len(entries) == 2 * 3 * 2 * 2  # S, variances, spacings, splits
    assert {entry["metric"] for entry in entries} == {"fd_classifier"}
    assert {entry["dataset"]["split"] for entry in entries} == {"train", "test"}
    assert all(entry["images"] == 40 and entry["seconds"] > 0 for entry in entries)
    assert [each["images"] for each in written["references"]] == [1500, 297]
    assert written["status"] == "finished"
    table = (output / "table.md").read_text()
    assert table == evaluate.table(written)
    assert table.count("| η = 0.5 |") == table.count("| σ̂ |") == 4
    for entry in entries:
        assert f"{entry['value']:.4g}" in table
    for name in ("quality", "time", "samples-S0002", "samples-S0003"):
        assert np.asarray(Image.open(output / f"{name}.png")).std() > 5
    assert sorted(path.name for path in output.iterdir() if path.is_dir()) == ["cells"]


def test_variances_that_a_model_brings(measure, make_unet, tmp_path):
    """E‖ε̂‖² saved with it, and half of its output."""
    table = np.linspace(0.9, 0.999, 1000).tolist()
    known = GeneralizedDDIMScheduler(eps_mean_square=table)
    learned = GeneralizedDDIMScheduler(variance_type="learned_range")
    GeneralizedDDIMPipeline(make_unet(), known).save_pretrained(tmp_path / "known")
    GeneralizedDDIMPipeline(make_unet(out_channels=2), learned).save_pretrained(tmp_path / "learned")
    given = {"steps": (3,), "splits": ("test",), "spacings": ("linear",)}
    result = measure(
        "a", model=str(tmp_path / "known"), variances=("0", "1", "optimal", "optimal:0", "optimal:1"), **given
    )
    entries = [(e["variance_type"], e["eta"]) for e in result["results"]]
    assert entries == [("fixed_small", 0.0), ("fixed_small", 1.0), *[("optimal", eta) for eta in (0.0, 0.0, 1.0)]]
    plain, posterior, optimal, same, full = values(result)
    assert optimal == same
    assert len({plain, posterior, optimal, full}) == 4
    result = measure("b", model=str(tmp_path / "learned"), variances=("learned_range", "saved", "0"), **given)
    learned, saved, plain = values(result)
    assert learned == saved != plain
    assert [e["eta"] for e in result["results"]] == [None, None, 0.0]


def test_one_process_and_two_this_batch_and_that(places, measure, tmp_path):
    """The numbers are the same; a batch of another size may round the network's last bit otherwise."""
    settings = {"images": 230, "steps": (3, 5), "variances": ("0", "1"), "cache": None}
    one = measure("one", batch_size=64, **settings)
    other = measure("other", batch_size=100, part=200, **settings)
    flags = [
        "--model",
        places["model"],
        "--extractors",
        *places["extractors"],
        "--reference",
        "digits",
        "--images",
        230,
    ]
    flags += ["--steps", 3, 5, "--variances", 0, 1, "--output", tmp_path / "two", "--part", 50, "--batch_size", 64]
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "training/evaluate.py")
    done = python(*launch, *flags, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stdout + done.stderr
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    assert two["processes"] == 2
    assert done.stdout.count("4 cells, of which 0 are finished") == 1
    assert values(two) == pytest.approx(values(one), rel=1e-9)
    assert values(other) == pytest.approx(values(one), rel=1e-5)
    tables = [(tmp_path / name / "table.md").read_text() for name in ("one", "other", "two")]
    assert tables[0] == tables[1] == tables[2]


def python(*arguments, **env):
    command = [sys.executable, *map(str, arguments)]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | env
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=300)


def test_processes_that_do_not_know_of_each_other(measure, tmp_path, monkeypatch):
    """As torch.distributed.run starts them on a CPU where Accelerate is not told so: each would do all the work."""
    monkeypatch.setattr(evaluate, "Accelerator", lambda **settings: PartialState(cpu=True))
    measure("alone", images=20, steps=(2,))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched that do not know of each other: on the CPU"):
        measure()
    assert not (tmp_path / "out").exists()


def test_any_scheduler(measure):
    """Stock schedulers with their own variance; evaluations are those that were made."""
    schedulers = ("DDIMScheduler", "GeneralizedDDIMScheduler", "HeunDiscreteScheduler:saved", "DDPMScheduler:saved")
    result = measure(schedulers=schedulers, splits=("test",), spacings=("leading",), clip="never")
    found = {(e["scheduler"], e["eta"], e["num_inference_steps"]): e for e in result["results"]}
    for S in (2, 3):
        for eta in (0.0, 0.5):
            pair = [found[name, eta, S]["value"] for name in schedulers[:2]]
            assert pair[0] == pytest.approx(pair[1], rel=1e-3)
        assert found["HeunDiscreteScheduler", None, S]["nfe"] == 2 * S - 1
        assert found["DDPMScheduler", None, S]["variance_type"] == "fixed_small"


def test_any_unconditional_pipeline(measure, make_unet, tmp_path, monkeypatch):
    """Latent diffusion, which this package's pipeline does not open, and which hands no generator to its steps."""
    torch.manual_seed(0)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    shapes = {"block_out_channels": (8, 8), "latent_channels": 2, "num_vq_embeddings": 16, "norm_num_groups": 4}
    decoder = VQModel(in_channels=1, out_channels=1, **kinds, **shapes).eval()
    LDMPipeline(decoder, make_unet(2, 4), DDIMScheduler(clip_sample=False)).save_pretrained(tmp_path / "ldm")
    settings = {"model": str(tmp_path / "ldm"), "splits": ("test",), "variances": ("0", "1", "fixed_large")}
    ours = measure("ours", schedulers=("GeneralizedDDIMScheduler",), **settings)
    stock = measure("stock", schedulers=("saved",), **settings | {"variances": ("0", "1"), "batch_size": 7})
    by_eta = {(e["eta"], e["num_inference_steps"]): e["value"] for e in ours["results"]}
    for entry in stock["results"]:
        assert entry["value"] == pytest.approx(by_eta[entry["eta"], entry["num_inference_steps"]], rel=1e-3)
    assert by_eta[None, 3] != pytest.approx(by_eta[1.0, 3], rel=1e-3)
    assert ours["made"]["shape"] == (1, 8, 8)
    monkeypatch.setattr(evaluate.Model, "seed", lambda model, scheduler: None)  # as the pipeline does by itself
    with pytest.raises(ValueError, match="LDMPipeline with DDIMScheduler draws noise that no picture's seed decides"):
        measure("unseeded", schedulers=("saved",), **settings | {"variances": ("1",)})


# ---- presets -------------------------------------------------------------------------------------------------------


def test_presets_are_the_papers_settings():
    def settled(**values):
        return evaluate.settle(build(evaluate.EvaluateConfig, {"model": "m", "reference": "r"} | values))

    one, three = settled(table1=True), settled(table3=True)
    assert (one.steps, one.variances) == ((10, 20, 50, 100, 1000), ("0", "0.2", "0.5", "1", "fixed_large"))
    assert (one.images, one.extractors, one.metrics) == (50_000, (INCEPTION,), ("fd",))
    assert (one.spacings, three.spacings) == (("quadratic",), ("linear",))
    assert (three.steps, three.variances) == ((10, 20, 50, 100), ("0", "1"))
    assert settled(table1=True, steps=(10,), spacings=("linear",)).spacings == ("linear",)
    saved = GeneralizedDDIMScheduler(clip_sample=True)
    for config, clips in ((one, [False] * 4 + [True]), (three, [False] * 2)):
        cells = [evaluate.Cell("GeneralizedDDIMScheduler", each, config.spacings[0], 10) for each in config.variances]
        made = [evaluate.make_scheduler(cell, saved, config.clip)[0] for cell in cells]
        assert [scheduler.config.clip_sample for scheduler in made] == clips
    with pytest.raises(ValueError, match="choose one of"):
        settled(table1=True, table3=True)


def test_a_fid_stands_beside_the_papers(measure, monkeypatch, tmp_path):
    def pooled(name, device, shape):
        call = lambda pictures: (torch.nn.functional.avg_pool2d(pictures.float(), 2).flatten(1), None)  # noqa: E731
        return Extractor(INCEPTION, 1, 16, None, {}, "pooled", call)

    monkeypatch.setattr(evaluate, "open_extractor", pooled)
    result = measure(table1=True, steps=(10, 20), variances=None, extractors=(INCEPTION,), splits=("train",))
    assert [entry["metric"] for entry in result["results"]] == ["fid"] * 10
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| paper, CIFAR-10, η = 0 | 13.36 | 6.84 |" in table
    assert "| paper, CelebA, σ̂ | 299.71 | 183.83 |" in table


def test_an_estimate_costs_little_and_leaves_nothing(measure, tmp_path, capsys):
    cost = measure(images=1000, steps=(10, 100), variances=("0", "1"), estimate=True)["estimate"]
    assert cost["evaluations"] == 1000 * 2 * (10 + 100)
    assert 0 < cost["hours"] < 1
    assert "4 cells, of which 0 are finished; for the others 220,000 evaluations" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


# ---- going on ------------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch):
    """The numbers of the pictures that are drawn for cells."""
    numbers, pictures, pace = [], evaluate.Model.pictures, evaluate.Model.pace

    def draw(model, batch, *rest):
        numbers.extend(batch)
        return pictures(model, batch, *rest)

    def quietly(model, cell):
        before = len(numbers)
        found = pace(model, cell)
        del numbers[before:]
        return found

    monkeypatch.setattr(evaluate.Model, "pictures", draw)
    monkeypatch.setattr(evaluate.Model, "pace", quietly)
    return numbers


def test_what_was_finished_is_not_measured_again(measure, drawn, monkeypatch, tmp_path):
    whole = measure("whole")
    assert sorted(drawn) == sorted([*range(40)] * 4)
    drawn.clear()
    with monkeypatch.context() as patch:
        extract, calls = evaluate.extract, []

        def fail(extractors, pictures):
            calls.append(len(pictures))
            if len(calls) == 2 + 3 + 3 + 3:  # two of the estimate; the third cell's second part
                raise KeyboardInterrupt
            return extract(extractors, pictures)

        patch.setattr(evaluate, "extract", fail)
        with pytest.raises(KeyboardInterrupt):
            measure(part=16)
    before = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (before["status"], len(before["cells"])) == ("running", 2)
    drawn.clear()
    again = measure(part=16)
    assert sorted(drawn) == sorted([*range(32, 40), *range(40)])  # two parts of the third cell were there
    assert values(again) == pytest.approx(values(whole), rel=1e-5)
    drawn.clear()
    assert measure(part=16, batch_size=9)["results"] == again["results"]
    assert drawn == []
    with pytest.raises(ValueError, match=r"holds results of other settings \(steps\).*--overwrite"):
        measure(steps=(2, 3, 4))
    wider = measure(steps=(2, 3, 4), overwrite=True)
    assert len(drawn) == 2 * 40
    assert values(wider)[: len(values(again))] == values(again)
    drawn.clear()
    measure(seed=1, overwrite=True)
    assert len(drawn) == 4 * 40


def test_at_all_steps_the_spacings_are_one(measure, drawn, make_unet, tmp_path):
    model = str(tmp_path / "model")
    GeneralizedDDIMPipeline(
        make_unet(), GeneralizedDDIMScheduler(6, beta_schedule="squaredcos_cap_v2")
    ).save_pretrained(model)
    grid = {"model": model, "variances": ("0.5",), "spacings": ("linear", "quadratic", "leading")}
    result = measure(steps=(3, 6), **grid)
    assert sorted(drawn) == sorted([*range(40)] * (3 + 1))
    entries = [(e["num_inference_steps"], e["timestep_spacing"], e["value"]) for e in result["results"]]
    assert [spacing for S, spacing, _ in entries[::2] if S == 6] == ["linear", "quadratic", "leading"]
    assert len({value for S, _, value in entries[::2] if S == 6}) == 1
    assert len({value for S, _, value in entries[::2] if S == 3}) == 3
    assert "\n| GeneralizedDDIMScheduler, τ quadratic |" in (tmp_path / "out" / "table.md").read_text()
    drawn.clear()
    assert measure(steps=(3, 6), **grid)["results"] == result["results"]
    assert drawn == []


KILLER = """
import json, os, random, signal, sys, time
from pathlib import Path

sys.path.insert(0, "training")
import evaluate, torch
from trainer.settings import build
from sklearn.datasets import load_digits
from transformers import AutoModelForImageClassification

settings, kills, rng = json.loads(sys.argv[1]), int(sys.argv[2]), random.Random(0)
output = Path(settings["output"])


def progress():
    return len(list(output.glob("parts/*/*.safetensors"))) + 1000 * len(list(output.glob("cells/*.json")))


for trial in range(kills + 1):
    before, child = progress(), os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            evaluate.main(build(evaluate.EvaluateConfig, settings))
            os._exit(0)
        finally:
            os._exit(1)
    if trial < kills:
        while progress() <= before and os.waitpid(child, os.WNOHANG)[0] == 0:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.15))
        try:
            os.kill(child, signal.SIGKILL)
        except ProcessLookupError:
            sys.exit("ended before it was killed")
        print("\\nkilled at", progress(), flush=True)
    status = os.waitpid(child, 0)[1]
    if trial == kills:
        sys.exit(status and "the last run failed")
"""


def test_a_run_killed_again_and_again(places, measure, tmp_path):
    """SIGKILL at random moments: the numbers and the pictures of the run that was not."""
    settings = {"images": 120, "steps": (5, 10), "variances": ("0", "0.5", "fixed_large"), "part": 20, "cache": None}
    whole = measure("whole", **settings)
    killed = places | settings | {"reference": "digits", "batch_size": 16, "output": str(tmp_path / "killed")}
    done = python("-c", KILLER, json.dumps(killed), 3)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("killed at") == 3
    again = json.loads((tmp_path / "killed" / "results.json").read_text())
    assert again["status"] == "finished"
    assert values(again) == pytest.approx(values(whole), rel=1e-9)
    for S in (5, 10):
        grids = [(tmp_path / name / f"samples-S{S:04d}.png").read_bytes() for name in ("whole", "killed")]
        assert grids[0] == grids[1]
    assert not list((tmp_path / "killed").rglob("*.part"))
    assert not (tmp_path / "killed" / "parts").exists()


# ---- references ----------------------------------------------------------------------------------------------------


def test_references_are_cached_by_what_they_hold(places, measure, tmp_path, monkeypatch):
    """Read again after a picture has changed, through another classifier, or at other splits; otherwise not."""
    pictures = load("digits", "test")[0][:60, 0].numpy()
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{i:03d}.png")
    looked, extractor = [], Extractor.__call__

    def look(self, batch):
        looked.append(len(batch))
        return extractor(self, batch)

    monkeypatch.setattr(features.Extractor, "__call__", look)
    cost = 2 + 16 + 2 * 40  # of the estimate, and of the samples

    def seen(name, **settings):
        looked.clear()
        given = {"variances": ("0",), "reference": str(folder), "cache": str(tmp_path / "cache")}
        result = measure(name, **given | settings)
        return sum(looked) - cost, values(result)

    first = seen("a")
    assert first[0] == 60
    assert seen("b") == (0, first[1])
    rows = {"img": [Image.fromarray(picture) for picture in pictures]}
    kinds = datasets.Features({"img": datasets.Image()})
    datasets.Dataset.from_dict(rows, features=kinds).to_parquet(tmp_path / "rows.parquet")
    assert seen("c", reference=str(tmp_path / "rows.parquet")) == (0, first[1])  # the same pictures in another file
    classifier(tmp_path / "other", hidden_sizes=[8, 12])
    assert seen("d", extractors=(str(tmp_path / "other"),))[0] == 60
    Image.fromarray(255 - pictures[7]).save(folder / "007.png")
    found = seen("e")
    assert found[0] == 60
    assert found[1] != first[1]


def test_a_classifier_that_says_its_preprocessing(measure, tmp_path):
    """The size of its config; mean and deviation of its preprocessor_config.json, where there is one."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    config = ViTConfig(image_size=16, patch_size=8, num_channels=1, num_labels=5, **sizes)
    network = ViTForImageClassification(config).eval()
    network.save_pretrained(tmp_path / "vit")
    said = {"size": {"height": 16, "width": 16}, "image_mean": [0.3], "image_std": [0.2], "do_normalize": True}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(said))
    made = features.open_extractor(str(tmp_path / "vit"), "cpu", (1, 8, 8))
    pictures = load("digits")[0][:9]
    found = made(pictures)
    enlarged = torch.nn.functional.interpolate(pictures / 255, (16, 16), mode="bilinear", antialias=True)
    with torch.no_grad():
        logits = network((enlarged - 0.3) / 0.2).logits
        again = network.classifier(torch.from_numpy(found.features))
    assert found.logits == pytest.approx(logits.numpy(), abs=1e-5)
    assert again.numpy() == pytest.approx(logits.numpy(), abs=1e-5)
    assert (made.preprocessing["size"], made.preprocessing["mean"]) == ([16, 16], [0.3])
    said["image_mean"] = [0.1]
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(said))
    other = features.open_extractor(str(tmp_path / "vit"), "cpu", (1, 8, 8))
    assert other.fingerprint != made.fingerprint


def test_several_extractors_see_the_same_pictures(places, measure, tmp_path):
    classifier(tmp_path / "other", hidden_sizes=[8, 12])
    both = measure("both", extractors=(*places["extractors"], str(tmp_path / "other")))
    alone = measure("alone")
    found = [entry for entry in both["results"] if entry["metric"] == "fd_classifier"]
    assert [entry["value"] for entry in found] == values(alone)
    assert len(both["results"]) == 2 * len(alone["results"])
    shutil.copytree(places["extractors"][0], tmp_path / "again" / "classifier")
    with pytest.raises(ValueError, match="extractors must have distinct last names"):
        measure("twice", extractors=(*places["extractors"], str(tmp_path / "again" / "classifier")))


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": (2, 1001)}, r"S=1001 is more than T=1000"),
        ({"steps": (0,)}, "steps must be positive numbers"),
        ({"steps": (2, 2)}, "steps must be distinct"),
        ({"schedulers": ("DDIMScheduler",), "steps": (2000,)}, "DDIMScheduler, variance 0, S=2000: .*more than T=1000"),
        ({"schedulers": ("HeunDiscreteScheduler",)}, "knows no variance '0': measure HeunDiscreteScheduler:saved"),
        ({"schedulers": ("DDIMScheduler",), "spacings": ("quadratic",)}, "DDIMScheduler knows no spacing 'quadratic'"),
        ({"schedulers": ("UNet2DModel",)}, "unknown scheduler 'UNet2DModel'"),
        ({"spacings": ("cubic",)}, "cubic"),
        ({"variances": ("-0.5",)}, "unknown variance '-0.5': use a number"),
        ({"variances": ("learned_range",)}, "variance_type='learned_range' needs twice the channels"),
        ({"variances": ("optimal",)}, "variance_type='optimal' needs eps_mean_square"),
        ({"clip": "sometimes"}, "unknown clip 'sometimes'"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"metrics": ("fvd",)}, "unknown metric 'fvd': use some of fd, kid, is, pr"),
        ({"images": 0}, "images must be positive"),
        ({"images": FEATURES}, "16 pictures are too few for a Fréchet distance on 16 features: it needs at least 17"),
        ({"reference": "nowhere.parquet"}, "there is no file nowhere.parquet"),
        ({"splits": ("validation",)}, "unknown split 'validation'"),
        ({"model": "/nowhere"}, "there is no folder /nowhere"),
        ({"extractors": ("/nowhere",)}, "there is no folder /nowhere: an extractor is one of inception-v3-compat"),
    ],
)
def test_bad_settings_leave_nothing(measure, tmp_path, settings, message):
    with pytest.raises((ValueError, OSError), match=message):
        measure(**settings)
    assert not (tmp_path / "out").exists()


def test_references_that_are_empty_or_too_small(measure, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="there is no image in .*empty"):
        measure(reference=str(tmp_path / "empty"))
    kinds = datasets.Features({"image": datasets.Image()})
    for count, message in ((0, "corresponds to no data"), (FEATURES, "16 pictures of .* are too few .* at least 17")):
        rows = {"image": [Image.new("L", (8, 8), i) for i in range(count)]}
        datasets.Dataset.from_dict(rows, features=kinds).to_parquet(tmp_path / f"{count}.parquet")
        with pytest.raises(ValueError, match=message):
            measure(reference=str(tmp_path / f"{count}.parquet"))
    with pytest.MonkeyPatch.context() as patch:  # a set that opens, and holds nothing
        patch.setattr(evaluate, "open_pictures", lambda name, *rest: Pictures(name, 0, None))
        with pytest.raises(ValueError, match="the reference digits has no pictures in its split 'train'"):
            measure()
    assert not (tmp_path / "out").exists()


def test_extractors_that_do_not_fit(measure, tmp_path):
    classifier(tmp_path / "colour", num_channels=3)
    with pytest.raises(ValueError, match="takes pictures with 3 channels, the model makes 1"):
        measure(extractors=(str(tmp_path / "colour"),))
    classifier(tmp_path / "headless")
    network = ResNetForImageClassification.from_pretrained(tmp_path / "headless")
    network.resnet.save_pretrained(tmp_path / "headless")
    with pytest.raises(ValueError, match="does not hold all the weights of a classifier: classifier"):
        measure(extractors=(str(tmp_path / "headless"),))


def test_a_pipeline_of_text_is_refused(measure, tmp_path, monkeypatch):
    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", lambda name: {"_class_name": "TextPipeline"})
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda name: TextPipeline())
    with pytest.raises(ValueError, match="is no unconditional pipeline: its TextPipeline takes no batch_size"):
        measure(model="user/text")


class TextPipeline:
    def __call__(self, prompt, num_inference_steps, generator, output_type):
        raise AssertionError


def test_no_network_for_an_extractor(measure, monkeypatch):
    """What to pass instead is said, for a model of the Hub and for torch-fidelity's weights."""

    def unreachable(*args, **kwargs):
        raise OSError("We couldn't connect to 'https://huggingface.co'")

    monkeypatch.setattr("transformers.AutoModelForImageClassification.from_pretrained", unreachable)
    with pytest.raises(
        ValueError, match="couldn't connect(.|\n)*hf download user/net --local-dir FOLDER.*--extractors FOLDER"
    ):
        measure(extractors=("user/net",))

    def no_download(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    package = ModuleType("torch_fidelity")
    package.__path__, package.utils = [], SimpleNamespace(create_feature_extractor=no_download)
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    for name in ("metric_isc", "metric_kid", "metric_prc", "utils"):
        monkeypatch.setitem(sys.modules, f"torch_fidelity.{name}", ModuleType(name))
    with pytest.raises(ValueError, match=r"weights of inception-v3-compat cannot be downloaded.*--extractors FOLDER"):
        measure(extractors=(INCEPTION,))


def test_pictures_that_are_not_finite(measure, make_unet, tmp_path):
    unet = make_unet()
    unet.conv_out.bias.data.fill_(float("nan"))
    GeneralizedDDIMPipeline(unet, GeneralizedDDIMScheduler()).save_pretrained(tmp_path / "broken")
    with pytest.raises(ValueError, match="the pictures hold NaN or infinity, at S=2 with GeneralizedDDIMScheduler"):
        measure(model=str(tmp_path / "broken"))


def test_without_torch_fidelity(measure, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ValueError, match="the extractor inception-v3-compat needs torch-fidelity.*pip install"):
        measure(extractors=(INCEPTION,))


@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_half_precision_is_another_cell(measure, dtype):
    result, half = measure(splits=("test",)), measure("half", splits=("test",), dtype=dtype)
    assert values(half) == pytest.approx(values(result), rel=0.2)
    assert values(half) != values(result)
    assert {each["key"] for each in result["cells"]}.isdisjoint(each["key"] for each in half["cells"])
