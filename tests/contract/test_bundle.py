"""The package as one file: what it joins, what it refuses, and that diffusers finds nothing more to copy."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from diffusers.utils import dynamic_modules_utils as dynamic

import ddim_plugin
from ddim_plugin.hub import code as bundle


@pytest.fixture(scope="module")
def code_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("code") / f"{bundle.code().name}.py"
    path.write_text(bundle.code().text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def flat(code_file):
    """The file as a module."""
    spec = importlib.util.spec_from_file_location(code_file.stem, code_file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(source):
    namespace = {"__file__": "x.py", "__name__": "x"}
    exec(compile(source, "x.py", "exec"), namespace)
    return namespace


def test_modules_are_joined():
    sources = {
        "a": '"""A."""\nimport math\n\nHALF = 0.5\n\n\ndef root(x):\n    return math.sqrt(x) * HALF\n',
        "b": "import math as m\n\nfrom . import a as first\nfrom .a import root\n\n\n"
        "def both(x):\n    return root(x), first.root(m.pi), first.HALF\n",
    }
    assert run(bundle.join(sources))["both"](4.0) == (1.0, 3.141592653589793**0.5 / 2, 0.5)


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ("def f():\n    return 2\n\n\ndef h():\n    return f()\n", "a and b both define f, which a uses"),
        ("from .a import f as g\n", "b renames what it takes from a"),
        ("from math import floor as f\n\n\ndef h():\n    return f()\n", "both define f"),
        ("from . import a as f\n", "both define f"),
    ],
)
def test_a_name_with_two_meanings_is_refused(second, said):
    with pytest.raises(ValueError, match=said):
        bundle.join({"a": "def f():\n    return 1\n\n\ndef g():\n    return f()\n", "b": second})


def test_names_used_at_once_may_be_the_same():
    second = "def f():\n    return 2\n\n\nSECOND = [f()]\n"
    made = run(bundle.join({"a": "def f():\n    return 1\n\n\nFIRST = [f()]\n", "b": second}))
    assert (made["FIRST"], made["SECOND"]) == ([1], [2])


def test_the_name_changes_with_the_content(monkeypatch):
    first = bundle.code()
    assert re.fullmatch(r"ddim_plugin_\d+_\d+_\d+_[0-9a-f]{8}", first.name)
    assert bundle.code.__wrapped__() == first
    monkeypatch.setattr(bundle, "HEADER", bundle.HEADER + "\n# Another version.\n")
    assert bundle.code.__wrapped__().name != first.name


def test_every_module_of_the_pipeline_is_in_it():
    folder = Path(ddim_plugin.__file__).parent
    needed, left = set(), ["pipeline"]
    while left:
        name = left.pop()
        if name not in needed and name != "bundle":
            needed.add(name)
            source = (folder / f"{name}.py").read_text()
            left += re.findall(r"^from \.(\w+) import", source, re.MULTILINE)
            for names in re.findall(r"^from \. import (.+)$", source, re.MULTILINE):
                left += [each.split(" as ")[0].strip() for each in names.split(",")]
    assert needed == set(bundle.MODULES)


def test_diffusers_finds_nothing_to_copy_or_to_install(code_file, monkeypatch):
    assert dynamic.get_relative_imports(code_file) == []
    asked = []
    monkeypatch.setattr(dynamic.importlib, "import_module", asked.append)
    dynamic.check_imports(code_file)
    assert {"torch", "numpy", "diffusers"} < set(asked)
    standard = {"collections", "contextlib", "dataclasses", "functools", "itertools", "numbers", "pathlib", "typing"}
    standard |= {
        "hashlib",
        "importlib",
        "inspect",
        "io",
        "json",
        "logging",
        "math",
        "os",
        "re",
        "string",
        "sys",
        "tempfile",
        "types",
        "warnings",
    }
    brought = {"torch", "numpy", "diffusers", "PIL", "huggingface_hub"}  # by torch and diffusers
    assert set(asked) <= standard | brought


def test_it_tells_its_own_text(flat, code_file):
    assert flat.code() == (code_file.stem, code_file.read_text(encoding="utf-8"))
    assert flat.GeneralizedDDIMPipeline.__module__ == code_file.stem


@pytest.mark.parametrize("settings", [{}, {"eta": 1.0, "timestep_spacing": "quadratic", "clip_sample": True}])
def test_it_steps_as_the_package(flat, settings):
    x, made = torch.linspace(-2, 2, 48).view(1, 3, 4, 4), []
    for module in (ddim_plugin, flat):
        scheduler = module.GeneralizedDDIMScheduler(**settings)
        scheduler.set_timesteps(7)
        made.append([scheduler.step(torch.tanh(x), t, x, variance_noise=x.flip(1)).prev_sample for t in (999, 500, 0)])
        with pytest.raises(ValueError, match="unknown timestep_spacing"):
            module.GeneralizedDDIMScheduler(timestep_spacing="cubic")
    assert all(map(torch.equal, *made))
