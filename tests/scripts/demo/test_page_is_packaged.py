"""A wheel carries the page and its model, and the command finds them outside of a clone."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
MODEL = ROOT / "model_cards" / "ddim-mnist-28"
FILES = ["model_index.json", "held-out.png", "scheduler/scheduler_config.json", "unet/config.json"]
FILES += ["unet/diffusion_pytorch_model.safetensors"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel, built from a copy of what it needs: a build leaves folders behind."""
    pytest.importorskip("setuptools", "77", reason="wheels are built by setuptools 77 or later")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("ddim_plugin", "training/page", "model_cards/ddim-mnist-28"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "from setuptools.build_meta import build_wheel; build_wheel('..')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The wheel, unpacked into folders as an installer does."""
    folder = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--prefix", folder, wheel]
    command.insert(-3, "--ignore-installed")  # else pip removes the one that is tested
    subprocess.run(command, check=True, capture_output=True)
    return folder


def ask(installed, code, **environment):
    """What a program prints that imports the installed package, far from the clone."""
    (package,) = installed.rglob("ddim_plugin/__init__.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(package.parents[1]), **environment}
    return subprocess.run([sys.executable, "-c", code], cwd=installed, env=environment, text=True, capture_output=True)


def test_a_wheel_carries_the_page_and_its_model(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name.partition(".data/data/")[2]: name for name in archive.namelist() if ".data/data/" in name}
        content = {name: archive.read(whole) for name, whole in names.items()}
        assert [name for name in archive.namelist() if name.startswith(("training", "model_cards", "tests"))] == []
    share = "share/ddim-plugin"
    expected = {f"{share}/ddim-mnist-28/{name}": MODEL / name for name in FILES}
    expected |= {f"{share}/{name}": ROOT / "training" / "page" / name for name in ("app.py", "space.py")}
    assert content == {name: path.read_bytes() for name, path in expected.items()}


def test_an_installation_finds_them(installed):
    code = (
        "import ddim_plugin; from ddim_plugin.cli.commands import _page; app = _page('app.py')\n"
        "for each in ddim_plugin.__file__, app.__file__, _page('space.py').__file__, app.default_model(): print(each)"
    )
    pytest.importorskip("gradio", reason='the page needs Gradio: pip install "ddim-plugin[demo]"')
    done = ask(installed, code)
    package, page, space, model = (Path(line).resolve() for line in done.stdout.splitlines())
    assert package.is_relative_to(installed)
    assert page == installed / "share" / "ddim-plugin" / "app.py"
    assert space == page.with_name("space.py")
    assert model == installed / "share" / "ddim-plugin" / "ddim-mnist-28"
    assert (model / "model_index.json").is_file()


def test_without_gradio_one_line_names_the_remedy(installed):
    code = "import sys; sys.modules['gradio'] = None; from ddim_plugin.cli import main; sys.exit(main(['demo']))"
    done = ask(installed, code)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert re.fullmatch(r'ddim-plugin demo: the page needs gradio: pip install "ddim-plugin\[demo\]"', line)
