"""What no script that measures may touch: results of another script, and the data that it reads."""

import json
import shutil
from pathlib import Path

import evaluate
import few_steps
import gallery
import guard
import nll
import pytest
import reconstruct
import sample
from guard.keeping import check_results, writer_of
from trainer.settings import build

from ddim_plugin import GeneralizedDDIMPipeline

ROOT = Path(__file__).parents[2]
WRITTEN = {
    "evaluate": {"status": "running", "references": [], "results": [{"metric": "fd_a"}]},
    "nll": {"model": {}, "results": [{"metric": "bits_per_dim"}]},
    "few_steps": {"model": {}, "status": "finished", "results": [{"metric": "rms_to_solution"}, {"metric": "fd_a"}]},
    "reconstruct": {"model": {}, "results": [{"metric": "reconstruction_error_naive"}], "pictures": {}},
    "gallery": {"model": {}, "script": "gallery", "results": [], "pictures": {}},
    "": {"model": {}, "results": [{"metric": "fd_a"}, {"metric": "bits_per_dim"}], "pictures": {}},  # of package.py
}
MORE = {"evaluate": {"reference": "digits"}, "few_steps": {"reference": "digits", "extractor": "my/classifier"}}
SCRIPTS = {
    "evaluate": (evaluate, evaluate.EvaluateConfig),
    "nll": (nll, nll.NLLConfig),
    "few_steps": (few_steps, few_steps.FewStepsConfig),
    "reconstruct": (reconstruct, reconstruct.ReconstructConfig),
    "gallery": (gallery, gallery.GalleryConfig),
    "sample": (sample, sample.SampleConfig),
}


def start(name, output, **settings):
    script, config = SCRIPTS[name]
    given = {"model": "user/model", "output": str(output)} | MORE.get(name, {}) | settings
    return script.main(build(config, given))


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch):
    monkeypatch.setattr(GeneralizedDDIMPipeline, "from_pretrained", None)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", [name for name in WRITTEN if name])
def test_results_of_another_script_are_kept(name, overwrite, tmp_path):
    file = tmp_path / "results.json"
    for writer, content in WRITTEN.items():
        file.write_text(json.dumps(content))
        assert writer_of(content) == writer
        if writer == name:
            check_results(build(SCRIPTS[name][1], {"model": "m", "output": str(tmp_path)} | MORE.get(name, {})), name)
            continue
        by = f"{writer}.py" if writer else "another program"
        with pytest.raises(ValueError, match=rf"results.json was written by {by}, and .* choose another --output"):
            start(name, tmp_path, overwrite=overwrite)
        assert json.loads(file.read_text()) == content


@pytest.mark.parametrize("content", ["", "[1]", '{"results": [1]}', '{"results": [{}]}', '{"results": 1}'])
def test_results_that_cannot_be_read(content, tmp_path):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match=r"cannot read .*results.json .* or pass --overwrite"):
        start("nll", tmp_path)
    with pytest.raises(TypeError, match="NoneType"):  # it goes on to the model
        start("nll", tmp_path, overwrite=True)


def test_results_that_are_committed():
    for file in ROOT.glob("training/measured/*/results.json"):
        assert writer_of(json.loads(file.read_text())) == "evaluate"


@pytest.mark.parametrize(("name", "key"), [(name, MORE.get(name, {"data": 0}).keys()) for name in SCRIPTS])
def test_output_and_data_are_apart(name, key, tmp_path, monkeypatch):
    key, data = next(iter(key)), tmp_path / "pictures"
    shutil.copytree(ROOT / "training" / "configs", data / "train")
    before = sorted(tmp_path.rglob("*"))
    for output in (data, data / "out", data / "train", tmp_path):
        with pytest.raises(ValueError, match="the output .* and the data .* lie in one another: keep them apart"):
            start(name, output, **{key: str(data)}, overwrite=True)
    with pytest.raises(ValueError, match="lie in one another"):
        start(name, data, **{key: str(data / "train" / "digits.toml")})
    assert sorted(tmp_path.rglob("*")) == before  # not even a lock
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    guard.keeping.check_data(build(sample.SampleConfig, {"model": "m", "output": "digits", "data": "digits"}))


def test_the_data_that_errors_are_measured_on(tmp_path):
    with pytest.raises(ValueError, match="lie in one another"):
        start("nll", tmp_path / "out", fit_data=str(tmp_path))
