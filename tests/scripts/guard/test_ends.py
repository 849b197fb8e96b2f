"""Scripts end with the files that they made, as the user named the folder, and draw no bar into a file."""

from pathlib import Path

import pytest
from trials import Fork, script

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler

SHORT = {
    "nll": "--images 3 --steps 2 --variances fixed_small --no-ode --split train",
    "sample": "--columns 2 --steps 1 --eta_steps 2 --etas 0",
    "gallery": "--data digits --columns 2 --images 2 --paths 1 --points 2 --steps 1 --inverse_steps 1 --path_steps 1",
}
MADE = {
    "nll": ["nll.json", "nll.md", "results.json"],
    "sample": ["samples_by_steps.png", "samples_by_eta.png", "sample.json"],
    "gallery": ["one-noise.png", "exact-inverse.png", "paths.png", "held-out.png", "gallery.json", "gallery.md"],
}


def run(name, *words):
    done = Fork(script, f"training/{name}.py", *words).wait()
    assert done.returncode == 0, done.stderr
    assert "evaluation" not in done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def model(make_unet, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ends") / "model"
    GeneralizedDDIMPipeline(make_unet(), GeneralizedDDIMScheduler()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", SHORT)
def test_a_script_ends_with_its_files(name, model, tmp_path):
    lines = run(name, "--model", model, "--output", tmp_path / "out", *SHORT[name].split())
    assert lines[-len(MADE[name]) :] == [str(tmp_path / "out" / each) for each in MADE[name]]
    assert all(Path(line).is_file() for line in lines[-len(MADE[name]) :])


def test_a_package_ends_with_its_folder(model, tmp_path):
    (tmp_path / "records").mkdir()
    lines = run("package", "--model", model, "--records", tmp_path / "records", "--output", tmp_path / "out")
    assert lines[-1] == f"{tmp_path / 'out'}: the model, 0 figures and 0 pictures"
    assert (tmp_path / "out" / "README.md").is_file()
