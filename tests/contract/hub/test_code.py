"""The code file: what it joins, what it refuses, and that diffusers finds nothing more to copy."""

import importlib.util
import json
import pickle
import re
import sys

import diffusers
import pytest
import torch
from diffusers.utils import dynamic_modules_utils as dynamic

import ddim_plugin
from ddim_plugin.hub import code as builder


@pytest.fixture(scope="module")
def code_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("code") / f"{builder.code().name}.py"
    path.write_text(builder.code().text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def flat(code_file):
    """The file as a module."""
    spec = importlib.util.spec_from_file_location(code_file.stem, code_file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(source, namespace=None):
    namespace = {"__file__": "x.py", "__name__": "x"} if namespace is None else namespace
    exec(compile(source, "x.py", "exec"), namespace)
    return namespace


# ---- joining -------------------------------------------------------------------------------------------------------


def joined(sources, entry):
    """The names that the last module defines, of the file that is made of these sources."""
    text = "from types import SimpleNamespace\n" + builder.join(entry, sources)
    return vars(run(text)[f"ddim_{entry.replace('.', '_')}"])


def test_modules_are_joined():
    sources = {
        "a": '"""A."""\nimport math\n\nHALF = 0.5\n\n\ndef root(x):\n    return math.sqrt(x) * HALF\n',
        "b": "import math as m\n\nfrom . import a as first\nfrom .a import root\n\n\n"
        "def both(x):\n    return root(x), first.root(m.pi), first.HALF\n",
    }
    assert joined(sources, "b")["both"](4.0) == (1.0, 3.141592653589793**0.5 / 2, 0.5)


def test_modules_of_sub_packages_are_joined():
    sources = {
        "process.moves": "def move(x):\n    return 2 * x\n",
        "process.numbers": "from .moves import move\n\n\ndef twice(x):\n    return move(move(x))\n",
        "schedulers.one": "from ..process import moves\nfrom ..process import numbers as n\n\n\n"
        "def step(x):\n    return moves.move(x) + n.twice(x)\n",
        "schedulers.__init__": 'from .one import step\n\n__all__ = ["step"]\n',
        "pipelines.call": "from ..schedulers import step as one_step\n\n\n"
        "def call(x):\n    step = one_step(x)\n    return step\n",
    }
    assert joined(sources, "pipelines.call")["call"](1) == 6


def test_a_name_with_two_meanings_keeps_both():
    """Each module has its own, and the name that a function knows of itself."""
    first = "def f():\n    return 1\n\n\nT = float\n\n\ndef g(f=None):\n    return f\n"
    second = "from .a import g\n\nT = int\n\n\nclass f:\n    here = 2\n\n\n"
    second += "def sum(τ):\n    ε = (τ, τ); return f.here, T, ε\n"
    third = "from . import a, b\nfrom .b import f\nfrom .b import sum as total\n\n\ndef all():\n"
    third += "    return a.f(), f.here, b.f.__name__, a.T, b.T, total(1), a.g()\n"
    made = joined({"a": first, "b": second, "c": third}, "c")
    assert made["all"]() == (1, 2, "f", float, int, (2, int, (1, 1)), None)


def test_definitions_of_the_same_text_are_each_module_s_own():
    first = "import math\n\nTABLE = (1,)\nNAMES = tuple(TABLE)\n"
    second = "from . import a\n\nTABLE = (2,)\nNAMES = tuple(TABLE)\n\n\ndef names():\n    return a.NAMES, NAMES\n"
    assert joined({"a": first, "b": second}, "b")["names"]() == ((1,), (2,))


def test_a_name_that_a_module_does_not_define_is_refused():
    with pytest.raises(AttributeError, match="missing"):
        joined({"a": "def f():\n    return 1\n", "b": "from .a import missing\n"}, "b")


def test_modules_import_their_libraries():
    """In one line or several, under other names, and within a function."""
    first = "import os.path\nfrom math import (\n    sqrt,\n    pi as π,\n)\n\n\nclass Root:\n    half = sqrt(0.25)\n\n"
    first += "    def root(self):\n        return sqrt(π)\n"
    second = "from math import sqrt\n\nfrom .a import Root, sqrt as root\n\n\ndef both():\n    import os as o\n\n"
    second += "    return Root.half, Root().root() == root(3.141592653589793), sqrt is root, o.path\n"
    assert joined({"a": first, "b": second}, "b")["both"]()[:3] == (0.5, True, True)


# ---- the file ------------------------------------------------------------------------------------------------------


def test_its_name_is_that_of_the_version():
    assert builder.code().name == f"ddim_plugin_{ddim_plugin.__version__.replace('.', '_')}"
    assert builder.code.__wrapped__() == builder.code()
    assert builder.STALE.fullmatch(f"{builder.code().name}.py")


def test_it_holds_what_the_pipeline_imports_and_no_more():
    modules = re.findall(r"^def _ddim_(\w+)\(\):$", builder.code().text, re.MULTILINE)
    assert modules[-1] == "pipelines_generation"
    assert {"process_moves", "schedulers_config", "schedulers_multistep", "pipelines_latents"} < set(modules)
    assert {name.split("_")[0] for name in modules} == {"process", "schedulers", "pipelines"}
    assert "ddim_plugin" not in re.findall(r"^\s*(?:from|import) (\w+)", builder.code().text, re.MULTILINE)


def test_diffusers_finds_nothing_to_copy_or_to_install(code_file, monkeypatch):
    assert dynamic.get_relative_imports(code_file) == []
    asked = []
    monkeypatch.setattr(dynamic.importlib, "import_module", asked.append)
    dynamic.check_imports(code_file)
    assert {"torch", "numpy", "diffusers"} < set(asked)
    brought = {"torch", "numpy", "diffusers", "PIL", "huggingface_hub"}  # by torch and diffusers
    assert set(asked) <= sys.stdlib_module_names | brought


def test_one_pipeline_is_in_it(flat):
    assert dynamic.find_pipeline_class(flat) is flat.GeneralizedDDIMPipeline
    assert flat.GeneralizedDDIMPipeline.__module__ == builder.code().name


def test_its_objects_can_be_pickled(flat, monkeypatch):
    monkeypatch.setitem(sys.modules, flat.__name__, flat)
    scheduler = flat.MultistepDDIMScheduler()
    scheduler.set_timesteps(3)
    x = torch.ones(1, 1, 2, 2)
    step = scheduler.step(x, scheduler.timesteps[0], x)
    again, output = pickle.loads(pickle.dumps((scheduler, step)))
    assert type(again) is flat.MultistepDDIMScheduler
    assert torch.equal(output.pred_original_sample, step.pred_original_sample)


@pytest.mark.parametrize(
    "settings", [{"prediction_type": "flow_prediction", "shift": 3.0}, {"prediction_type": "score", "sigma_max": 50.0}]
)
def test_other_paths_step_as_in_the_package(flat, settings, monkeypatch):
    """Also after pickling: a class of a path has the name of one of the standard library."""
    monkeypatch.setitem(sys.modules, flat.__name__, flat)
    x, made = torch.linspace(-2, 2, 48).view(1, 3, 4, 4), []
    schedulers = [module.GeneralizedDDIMScheduler(**settings) for module in (ddim_plugin, flat)]
    schedulers += [pickle.loads(pickle.dumps(schedulers[1]))]
    for scheduler in schedulers:
        scheduler.set_timesteps(7)
        made.append(torch.stack([scheduler.step(torch.tanh(x), t, x).prev_sample for t in scheduler.timesteps]))
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])
    assert type(schedulers[2].path) is type(schedulers[1].path)


def test_running_it_again_keeps_the_classes(code_file):
    text = code_file.read_text(encoding="utf-8")
    first = run(text)
    kept = {name: value for name, value in first.items() if isinstance(value, type)}
    for _ in range(2):
        again = run(text, first)
        assert all(again[name] is value for name, value in kept.items())
    assert again["GeneralizedDDIMScheduler"](eta=0.5).config.eta == 0.5


@pytest.mark.parametrize("settings", [{}, {"eta": 1.0, "timestep_spacing": "quadratic", "clip_sample": True}])
def test_it_steps_as_the_package(flat, settings):
    x, made = torch.linspace(-2, 2, 48).view(1, 3, 4, 4), []
    for module in (ddim_plugin, flat):
        scheduler = module.GeneralizedDDIMScheduler(**settings)
        scheduler.set_timesteps(7)
        steps = [scheduler.step(torch.tanh(x), t, x, variance_noise=x.flip(1)) for t in scheduler.timesteps]
        made.append(torch.stack([step.prev_sample for step in steps]))
        with pytest.raises(ValueError, match="unknown timestep_spacing"):
            module.GeneralizedDDIMScheduler(timestep_spacing="cubic")
    assert torch.equal(*made)


def test_every_spacing_and_schedule_is_the_package_s(flat):
    """Names that two modules define are told apart in the file."""
    from ddim_plugin.process import betas, spacings

    for schedule in betas.SCHEDULES:
        schedulers = [module.GeneralizedDDIMScheduler(beta_schedule=schedule) for module in (ddim_plugin, flat)]
        assert torch.equal(*(each.alphas_cumprod for each in schedulers))
    for spacing in spacings.SPACINGS:
        schedulers = [module.GeneralizedDDIMScheduler(timestep_spacing=spacing) for module in (ddim_plugin, flat)]
        for each in schedulers:
            each.set_timesteps(7)
        assert torch.equal(*(each.timesteps for each in schedulers))


def test_other_pipelines_save_its_schedulers_as_stock(flat, tmp_path, make_unet):
    """Not under the name of the file, which readers do not have; also beside the schedulers of the package."""
    for kind, module in enumerate((flat, ddim_plugin, flat)):
        scheduler = module.MultistepDDIMScheduler(solver_order=2, beta_schedule="sigmoid")
        pipe = diffusers.DDPMPipeline(make_unet(), scheduler)
        pipe.save_pretrained(tmp_path / str(kind))
        index = json.loads((tmp_path / str(kind) / "model_index.json").read_text())
        assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
        assert index["unet"] == ["diffusers", "UNet2DModel"]
        again = diffusers.DDPMPipeline.from_pretrained(tmp_path / str(kind))
        assert type(again.scheduler) is diffusers.DDIMScheduler
        ours = ddim_plugin.restore_scheduler(again).scheduler
        assert type(ours) is ddim_plugin.MultistepDDIMScheduler
        assert ours.config.solver_order == 2
