"""The house: small files and folders, and imports that go down only."""

import ast
import importlib.util
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE, TRAINING, TESTS = ROOT / "ddim_plugin", ROOT / "training", ROOT / "tests"
FLOORS = ("process", "schedulers", "pipelines", "hub", "cli")
"""Sub-packages from the ground up: each may import those before it."""

ROOMS = {"pictures": {"pictures"}, "discrete": {"discrete", "pictures"}, "measure": {"measure", "pictures"}}
ROOMS |= {"trainer": {"trainer", "pictures", "discrete"}}
"""What a sub-package of training may import of training, beside `trainer.settings`. `trainer` also trains on tokens."""

TAKEN = {"evaluate", "datasets", "data", "config", "metrics", "utils", "models", "losses", "train_utils"}
"""Names of libraries, or names that a library may own: none of our modules may be imported by one."""


def modules(folder):
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def names(paths):
    return [path.relative_to(ROOT).as_posix() for path in paths]


def lines(path):
    return len(path.read_text().splitlines())


def imported(path):
    """The absolute names that a module imports, anywhere in it: of `from a import b` both a and a.b."""
    package = path.relative_to(ROOT if PACKAGE in path.parents else TRAINING).with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            up = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*up, *([node.module] if node.module else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def floor_of(path):
    return path.relative_to(PACKAGE).parts[0]


def scripts():
    return sorted(TRAINING.glob("*.py"))


def test_there_is_a_house():
    assert {floor_of(path) for path in modules(PACKAGE)} >= set(FLOORS)
    assert len(modules(PACKAGE)) > 20
    assert len(scripts()) >= 8
    assert len(modules(TESTS)) > 40


@pytest.mark.parametrize("path", [*modules(PACKAGE), *modules(TRAINING)], ids=lambda path: names([path])[0])
def test_no_file_is_over_350_lines(path):
    assert lines(path) <= 350


@pytest.mark.parametrize("path", scripts(), ids=lambda path: path.name)
def test_no_script_is_over_200_lines(path):
    assert lines(path) <= 200


def test_the_package_is_at_most_4500_lines():
    assert sum(map(lines, modules(PACKAGE))) <= 4500


@pytest.mark.parametrize("folder", [PACKAGE, TRAINING, TESTS], ids=lambda folder: folder.name)
def test_no_folder_is_over_eleven_files(folder):
    """The scripts of training are at most 14."""
    counts = Counter(path.parent.relative_to(ROOT).as_posix() for path in modules(folder))
    assert {name: count for name, count in counts.items() if count > (14 if name == TRAINING.name else 11)} == {}


def test_no_generated_code_is_kept():
    kept = [*ROOT.glob("model_cards/**/*.py"), *TESTS.glob("golden/saved/**/*.py")]
    assert names(kept) == []


def test_test_files_have_names_of_their_own():
    """pytest imports them by their bare names."""
    counts = Counter(path.name for path in modules(TESTS) if path.name != "conftest.py" and "saved" not in path.parts)
    assert {name: count for name, count in counts.items() if count > 1} == {}


@pytest.mark.parametrize("path", modules(PACKAGE), ids=lambda path: names([path])[0])
def test_imports_of_the_package_go_down(path):
    if path.parent == PACKAGE:
        return  # the root offers all that a user imports
    allowed = set(FLOORS[: FLOORS.index(floor_of(path)) + 1]) | {"version"}
    ours = {name for name in imported(path) if name.split(".")[0] == "ddim_plugin" and name != "ddim_plugin"}
    assert {name for name in ours if name.split(".")[1] not in allowed} == set()


@pytest.mark.parametrize("path", modules(PACKAGE / "process"), ids=lambda path: path.name)
def test_the_ground_floor_imports_numpy_and_torch_only(path):
    libraries = {name.split(".")[0] for name in imported(path)} - set(sys.stdlib_module_names)
    assert libraries <= {"numpy", "torch", "ddim_plugin"}


@pytest.mark.parametrize("path", modules(TRAINING), ids=lambda path: names([path])[0])
def test_imports_of_training_go_down(path):
    """Scripts import no script; sub-packages import no script, and each other as `ROOMS` says."""
    found = imported(path)
    assert {name.split(".")[0] for name in found} & {script.stem for script in scripts()} == set()
    room = path.relative_to(TRAINING).parts[0]
    if room in ROOMS:
        others = {name for name in found if name.split(".")[0] in ROOMS.keys() - ROOMS[room]}
        others -= {"trainer"} if any(name.startswith("trainer.settings") for name in found) else set()
        assert {name for name in others if not name.startswith("trainer.settings")} == set()


@pytest.mark.parametrize("path", [*modules(PACKAGE), *modules(TRAINING)], ids=lambda path: names([path])[0])
def test_no_module_of_ours_is_imported_by_a_name_that_a_library_may_own(path):
    """A bare `import evaluate` takes ours or the library, by what is first on the path."""
    own = {each.stem for each in TRAINING.iterdir()}
    for name in {name.split(".")[0] for name in imported(path)} & TAKEN:
        assert name not in own, name
        assert importlib.util.find_spec(name) is not None, name


def test_sub_packages_have_names_of_their_own():
    """None has the name of one in `diffusers.pipelines`, nor of a library."""
    import diffusers.pipelines

    taken = {path.stem for path in Path(diffusers.pipelines.__file__).parent.iterdir()}
    assert not taken & set(FLOORS)
    assert not (taken | TAKEN) & set(ROOMS)
