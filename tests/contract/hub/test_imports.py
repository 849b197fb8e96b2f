"""The package in a fresh process: what an import loads, and what is complete when it returns."""

import ast
import copy
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import ddim_plugin

HEAVY = ("torch", "diffusers", "transformers")


def fresh(code, *arguments):
    """Run code in a process of its own, and return its lines."""
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["sample", "--help"], ["push", "--help"], ["sampel"]])
def test_arguments_are_read_before_torch_is_imported(words):
    code = """
    import sys
    from ddim_plugin.cli import main
    try:
        main(sys.argv[1:])
    except SystemExit:
        pass
    print([name for name in ("torch", "diffusers", "transformers") if name in sys.modules])
    """
    assert fresh(code, *words)[-1] == "[]"


def test_names_are_known_before_they_are_imported():
    code = """
    import sys
    import ddim_plugin
    print({*ddim_plugin.__all__} <= {*dir(ddim_plugin)}, hasattr(ddim_plugin, "nothing"), "torch" in sys.modules)
    """
    assert fresh(code) == ["True False False"]


def test_every_way_in_finds_complete_classes():
    """Whichever of the names is imported first: push_to_hub, the index of stock pipelines, and the module of all."""
    ways = [
        "from ddim_plugin.schedulers import GeneralizedDDIMScheduler",
        "from ddim_plugin.pipelines.generation import GeneralizedDDIMPipeline",
        "import ddim_plugin.hub.code",
        "import pickle; pickle.loads(b'cddim_plugin\\nMultistepDDIMScheduler\\n.')",
        "import ddim_plugin; ddim_plugin.process.moves",
        "import ddim_plugin; ddim_plugin.SchedulerMixin",
    ]
    code = """
    import sys
    import diffusers
    stock = diffusers.DiffusionPipeline.to_json_string
    for way in sys.argv[1:]:
        diffusers.DiffusionPipeline.to_json_string = stock
        for name in [name for name in sys.modules if name.split(".")[0] == "ddim_plugin"]:
            del sys.modules[name]
        exec(way)
        pipeline = sys.modules["ddim_plugin.pipelines.generation"].GeneralizedDDIMPipeline
        classes = sys.modules["ddim_plugin.schedulers.config"].CLASSES
        public = [each for name, each in classes.items() if name in sys.modules["ddim_plugin"].__all__]
        print(
            pipeline.push_to_hub.__module__,
            len(public),
            {each.__module__ for each in (pipeline, *public)},
            diffusers.DiffusionPipeline.to_json_string is not stock,
        )
    """
    assert fresh(code, *ways) == ["ddim_plugin.hub.push 4 {'ddim_plugin'} True"] * len(ways)


def test_the_public_names_are_those_of_their_modules():
    from diffusers import ModelMixin, SchedulerMixin

    from ddim_plugin.pipelines.generation import GeneralizedDDIMPipeline

    namespace = {}
    exec("from ddim_plugin import *", namespace)
    assert {name for name in namespace if name != "__builtins__"} == {*ddim_plugin.__all__}
    assert ddim_plugin.GeneralizedDDIMPipeline is GeneralizedDDIMPipeline
    assert (ddim_plugin.ModelMixin, ddim_plugin.SchedulerMixin) == (ModelMixin, SchedulerMixin)
    with pytest.raises(ImportError, match="cannot import name 'DDIMScheduler'"):
        exec("from ddim_plugin import DDIMScheduler")
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        ddim_plugin.nothing  # noqa: B018


def test_schedulers_can_be_pickled_and_copied():
    scheduler = ddim_plugin.MultistepDDIMScheduler(solver_order=2)
    for again in (pickle.loads(pickle.dumps(scheduler)), copy.deepcopy(scheduler)):
        assert type(again) is ddim_plugin.MultistepDDIMScheduler
        assert again.config.solver_order == 2
    assert b"ddim_plugin\n" in pickle.dumps(ddim_plugin.GeneralizedDDIMPipeline, protocol=0)


def test_editors_know_the_public_names():
    stub = ast.parse(Path(ddim_plugin.__file__).with_suffix(".pyi").read_text())
    names = [each.asname for node in stub.body if isinstance(node, ast.ImportFrom) for each in node.names]
    assert sorted(names) == sorted(ddim_plugin.__all__)
