"""The comparison at few steps: real runs on the digits, and bad input."""

import shutil
import statistics
from dataclasses import replace
from pathlib import Path

import few_steps
import numpy as np
import pytest
import torch
from cards.records import read_results
from measure.comparison.bench import Bench
from measure.comparison.samplers import samplers
from measure.comparison.tables import relative_errors, table
from measure.extractors import open_extractor
from measure.metrics import fit, frechet
from measuring import classifier
from pictures.sources import load
from trainer.settings import build

from ddim_plugin import DiscreteDDIMScheduler, GeneralizedDDIMPipeline, MultistepDDIMScheduler

TRAINING = Path(__file__).parents[4] / "model_cards" / "flow-mnist-28" / "training.json"


@pytest.fixture(scope="module")
def extractor(tmp_path_factory):
    """A classifier of the digits with random weights."""
    folder = tmp_path_factory.mktemp("classifier") / "small"
    classifier(folder)
    return folder


@pytest.fixture(scope="module")
def compared(extractor, make_unet, tmp_path_factory):
    folder = tmp_path_factory.mktemp("few")
    GeneralizedDDIMPipeline(make_unet(), MultistepDDIMScheduler()).save_pretrained(folder / "model")
    settings = {
        "model": str(folder / "model"),
        "reference": "digits",
        "extractor": str(extractor),
        "output": str(folder / "out"),
        "nfe": (3, 5),
        "near": 2,
        "screen": 24,
        "images": 20,
        "draws": 2,
        "thousand": (),
        "families": ("ours", "DDIM", "DDPM"),
        "shortlist": 2,
        "margin": 100.0,
        "batch_size": 24,
    }
    return build(few_steps.FewStepsConfig, settings), few_steps.main(build(few_steps.FewStepsConfig, settings))


def test_the_best_are_measured_on_images_that_did_not_choose_them(compared):
    config, result = compared
    bench = Bench(config)
    for row in result["rows"]:
        assert {entry["images"] for entry in row["screened"]} == {24}
        assert few_steps.SCREENED > 40
        assert {"ours", "ours, η = 1", "DDIM"} <= {entry["family"] for entry in row["frechet"]}
        for entry in row["frechet"]:
            [sampler] = [each for each in samplers() if each.name == entry["sampler"]]
            sets = [range(20), range(20, 40)]
            draws = [bench.frechet(sampler, row["nfe"], numbers)["frechet"] for numbers in sets]
            assert entry["draws"] == draws
            assert entry["frechet"] == pytest.approx(statistics.fmean(draws))


def test_a_set_is_measured_as_by_hand(compared, extractor):
    """Ours without noise: x_T of image i from seed + i, by the pipeline."""
    config, result = compared
    pipe = GeneralizedDDIMPipeline.from_pretrained(config.model)
    opened = open_extractor(str(extractor), "cpu", (1, 8, 8))

    def fitted(x):
        features = opened(x).features.astype(np.float64)
        return fit(lambda: iter([features]))

    seeds = [torch.Generator().manual_seed(i) for i in range(20)]
    images = pipe(20, 5, generator=seeds, output_type="pt").images
    made = fitted((images * 255).round().to(torch.uint8))
    [entry] = [each for each in result["rows"][1]["frechet"] if each["family"] == "ours"]
    assert entry["draws"][0] == pytest.approx(frechet(made, fitted(load("digits")[0])), rel=1e-3)


def test_a_second_run_measures_nothing_again(compared, monkeypatch):
    config, result = compared
    monkeypatch.setattr(Bench, "sample", None)
    assert few_steps.main(config)["rows"] == result["rows"]


def test_the_table_and_the_results_tell_mean_and_error(compared):
    config, result = compared
    error, of_ratio = relative_errors(result)
    said = f"means over 2 sets of 20 images, which all samplers share. Standard errors: {error:.0%} of a mean, "
    assert f"{said}{of_ratio:.0%} of a ratio." in table(result)
    [entry] = [each for each in result["rows"][0]["frechet"] if each["family"] == "ours"]
    found = read_results(Path(config.output) / "results.json")
    [told] = [each for each in found if each.get("scheduler") == "ours" and each["nfe"] == 3 and "draws" in each]
    assert told["value"] == entry["frechet"]
    assert told["standard_error"] == pytest.approx(error * entry["frechet"])
    assert told["draws"] == 2
    [straight] = [each for each in found if each["metric"] == "straightness"]
    assert straight["value"] == pytest.approx(statistics.fmean(result["straightness"]))
    assert straight["standard_error"] == pytest.approx(statistics.stdev(result["straightness"]) / 2**0.5)


def test_errors_are_those_that_the_draws_were_made_with():
    """Distances that vary by 5 % from set to set for all samplers alike, and by 2 % for each."""
    rng = np.random.default_rng(0)
    sets = 0.05 * rng.standard_normal((400, 1, 3))
    values = np.exp(sets + 0.02 * rng.standard_normal((400, 6, 3)) + rng.standard_normal((400, 6, 1)))
    rows = [{"frechet": [{"draws": list(each)} for each in row]} for row in values]
    errors = relative_errors({"config": {"draws": 3}, "rows": rows})
    assert errors == pytest.approx(((0.05**2 + 0.02**2) ** 0.5 / 3**0.5, 2**0.5 * 0.02 / 3**0.5), rel=0.03)
    assert relative_errors({"config": {}, "rows": rows}) is None
    assert relative_errors({"config": {"draws": 3}, "rows": [*rows, {"frechet": []}]}) == errors
    assert relative_errors({"config": {"draws": 3}, "rows": [{"frechet": []}]}) is None


@pytest.mark.parametrize(("kind", "expected"), [("v_prediction", 2 - np.pi / 2), ("flow_prediction", 0)])
def test_straightness_of_known_trajectories(compared, make_unet, tmp_path, kind, expected):
    """A network of zeros: with v the one of normal data, whose paths bend by 2 − π/2; with flow x does not move."""
    config, _ = compared
    unet = make_unet()
    torch.nn.init.zeros_(unet.conv_out.weight), torch.nn.init.zeros_(unet.conv_out.bias)
    pipe = GeneralizedDDIMPipeline(unet, MultistepDDIMScheduler(prediction_type=kind))
    pipe.save_pretrained(tmp_path / "model")
    bench = Bench(replace(config, model=str(tmp_path / "model"), output=str(tmp_path / "out")))
    drawn = bench.trajectory(bench.unet, pipe.scheduler, range(2))
    squares = next(drawn).double().square().flatten(1).mean(1)
    assert bench.straightness()[1] == pytest.approx((expected * squares).tolist(), rel=0.02, abs=1e-9)


def test_two_models_are_compared_on_the_same_images(compared, make_unet, tmp_path):
    config, result = compared
    twin = replace(config, model=str(tmp_path / "twin"), output=str(tmp_path / "out"), nfe=(5,), families=("ours",))
    pipe = GeneralizedDDIMPipeline(make_unet(), MultistepDDIMScheduler(prediction_type="flow_prediction"))
    pipe.save_pretrained(twin.model)
    twin = replace(twin, beside=str(Path(config.output) / "few_steps.json"))
    done = few_steps.main(twin)
    [ours], [its] = (
        [each["draws"] for each in row["frechet"] if each["family"] == "ours"]
        for row in (done["rows"][0], result["rows"][1])
    )
    assert f"| {np.mean(ours):.4g} / {np.mean(its):.4g} = {np.mean(ours) / np.mean(its):.2f} |" in table(done)
    assert f"this model and of {Path(config.model).name}, from the same x_T." in table(done)
    assert done["beside"]["straightness"] == result["straightness"]
    assert table(done).count("Straightness") == 2
    with pytest.raises(ValueError, match="has images=20, not 24: measure both alike"):
        few_steps.main(replace(twin, images=24))
    with pytest.raises(ValueError, match=r"training.json is no record of this version: measure that model again"):
        few_steps.main(replace(twin, beside=str(TRAINING)))


def test_the_size_of_a_batch_changes_nothing(compared):
    """Noise comes from one generator for each image."""
    config, _ = compared
    for name in ("ours, η = 1 1.0", "DDPM leading"):
        [sampler] = [each for each in samplers() if each.name == name]
        made = []
        for size in (3, 8):
            bench = Bench(replace(config, batch_size=size))
            made.append(torch.cat(list(bench.make(bench.unet, sampler, 5, range(24, 32)))))
        assert torch.allclose(*made, atol=1e-5)


def test_what_belongs_to_another_model_or_reference_is_not_taken(compared, tmp_path):
    """Nor what another schedule, with other fitted times, was measured with; a line that a kill tore is dropped."""
    config, _ = compared
    bench = Bench(config)
    with open(bench.journal.file, "a") as file:
        file.write('{"key": "rms of ou')
    assert Bench(config).journal.known.keys() == bench.journal.known.keys()
    assert bench.journal.file.read_text().endswith("}\n")
    pipe = GeneralizedDDIMPipeline.from_pretrained(config.model)
    times = {"fitted_solvers": {"3": {"timesteps": [700, 400, 100]}}}
    pipe.scheduler = MultistepDDIMScheduler.from_config(pipe.scheduler.config, **times)
    pipe.save_pretrained(tmp_path / "fitted")
    assert not Bench(replace(config, model=str(tmp_path / "fitted"))).journal.known


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"draws": 0}, "draws must be 1 at least, not 0"),
        ({"shortlist": -1}, "shortlist must be 1 at least, not -1"),
        ({"nfe": (5, 0)}, "nfe must be 1 at least, not 0"),
        ({"margin": float("nan")}, "margin must be 1 at least, not nan"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"families": ("Euler 9",)}, "no family of samplers begins with Euler 9"),
        ({"screen": 10}, "10 --screen are too few"),
        ({"reference": "missing/set.parquet", "overwrite": True}, "there is no file"),
    ],
)
def test_bad_settings_lose_nothing(compared, settings, said, monkeypatch):
    config, _ = compared
    before = (Path(config.output) / "measured.jsonl").read_bytes()
    monkeypatch.setattr(Bench, "sample", None)
    with pytest.raises(ValueError, match=said):
        few_steps.main(replace(config, **settings))
    assert (Path(config.output) / "measured.jsonl").read_bytes() == before


def test_a_network_that_is_not_finite(compared, make_unet, tmp_path):
    config, _ = compared
    unet = make_unet()
    torch.nn.init.constant_(unet.conv_out.weight, float("nan"))
    GeneralizedDDIMPipeline(unet, MultistepDDIMScheduler()).save_pretrained(tmp_path / "model")
    settings = {"model": str(tmp_path / "model"), "output": str(tmp_path / "out"), "near": 1}
    with pytest.raises(
        ValueError, match=r"cannot solve the ODE of .*model \(images that are not finite\): check its weights"
    ):
        few_steps.main(replace(config, **settings))
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_model_of_categories_is_refused(compared, make_unet, tmp_path):
    config, _ = compared
    GeneralizedDDIMPipeline(make_unet(), DiscreteDDIMScheduler(num_classes=2)).save_pretrained(tmp_path / "model")
    with pytest.raises(
        ValueError, match="has a DiscreteDDIMScheduler: few_steps.py compares samplers of Gaussian noise"
    ):
        few_steps.main(replace(config, model=str(tmp_path / "model"), output=str(tmp_path / "out")))


@pytest.fixture
def damaged(compared, tmp_path, monkeypatch):
    """The settings of a finished run in a folder of its own, which samples nothing again."""
    config, _ = compared
    shutil.copytree(config.output, tmp_path / "out")
    monkeypatch.setattr(Bench, "sample", None)
    return replace(config, output=str(tmp_path / "out"))


@pytest.mark.parametrize("content", ["", "truncated", "text", {}, [1], {"settings": {}, "images": 1}])
def test_a_damaged_solution(damaged, content):
    file = Path(damaged.output) / "solution.pt"
    whole = file.read_bytes()
    if isinstance(content, str):
        file.write_bytes({"": b"", "truncated": whole[: len(whole) // 2], "text": b"no tensors"}[content])
    else:
        torch.save(content, file)
    with pytest.raises(ValueError, match=r"cannot read .*solution.pt .*: remove it, or pass --overwrite"):
        few_steps.main(damaged)


@pytest.mark.parametrize("line", ["{}", "[1]", "1", "null", '{"key": "a", "settings": {}}', "not JSON", "\xff"])
def test_a_damaged_journal(damaged, line):
    file = Path(damaged.output) / "measured.jsonl"
    file.write_bytes(line.encode("latin-1") + b"\n" + file.read_bytes())
    with pytest.raises(ValueError, match=r"measured.jsonl.*remove .*, or pass --overwrite"):
        few_steps.main(damaged)
