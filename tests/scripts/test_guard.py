"""The guard of all scripts: signals, errors, output folders, processes, names of models."""

import ast
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import classifier
import evaluate
import few_steps
import guard
import nll
import pytest
import reconstruct
import sample
import train
from guard.names import check_model
from trainer.settings import build
from trials import Fork

from ddim_plugin import GeneralizedDDIMPipeline

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "training").glob("*.py"))
BOTH = pytest.mark.parametrize("number", guard.signals.CAUGHT)


def python(code, *arguments, **env):
    """Run code that finds our modules, as a script of the name of the test."""
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'training')!r}); sys.argv[0] = 'tried.py'\n{code}"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | env, cwd=ROOT, timeout=120)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_every_script_is_guarded_from_its_first_import_on(path):
    _, first, second, *others = ast.parse(path.read_text()).body
    assert ast.unparse(first) == "import guard"
    assert ast.unparse(second) == "if __name__ == '__main__':\n    guard.start()"
    (main,) = [each for each in others if getattr(each, "name", None) == "main"]
    assert [ast.unparse(each).split("(")[0] for each in main.decorator_list] == ["guard.output"]
    assert ast.unparse(others[-1]).startswith("if __name__ == '__main__':\n    with guard.program(")


# ---- signals -------------------------------------------------------------------------------------------------------

IMPORTING = """
import os, runpy
script, module, number = sys.argv[1:]
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            os.kill(os.getpid(), int(number))
sys.meta_path.insert(0, Finder())
sys.argv = [script]
runpy.run_path(script, run_name="__main__")
"""


@BOTH
@pytest.mark.parametrize(
    ("script", "module"), [("train.py", "torch"), ("nll.py", "numpy"), ("demo.py", "trainer.settings")]
)
def test_a_signal_during_imports_is_a_line(script, module, number):
    done = python(IMPORTING, ROOT / "training" / script, module, int(number))
    assert done.returncode == 128 + number
    assert done.stderr == f"{script}: {number.name}: ended before anything was written\n"
    assert done.stdout == ""


SCRIPT = """
import guard
guard.start()
import os, signal
guard.signals.PATIENCE = 0.0
def send(): os.kill(os.getpid(), {number})
class Gone:
    def __del__(self): send()
def write_file():
    send()
    for i in range(9): print(i, end="", flush=True)
with guard.program("Start it again"):
    {body}
"""


def tried(number, body, **env):
    return python(SCRIPT.format(number=int(number), body=body.replace("\n", "\n    ")), **env)


@BOTH
@pytest.mark.parametrize(
    ("body", "printed"),
    [
        ("print('a', flush=True)\nsend()\nprint('b')", "a\n"),
        ("try: send()\nfinally: print('cleaned')", "cleaned\n"),
        ("write_file()\nimport time; time.sleep(9)\nprint('b')", "012345678"),  # a file is written to its end
        ("Gone()\nimport time; time.sleep(9)\nprint('b')", ""),  # an exception that is dropped is raised again
        ("try: send()\nexcept Exception: print('b')", ""),
    ],
)
def test_a_signal_ends_a_script_at_the_next_safe_point(number, body, printed):
    done = tried(number, body)
    assert (done.returncode, done.stdout) == (128 + number, printed)
    assert done.stderr == f"tried.py: {number.name}: ending; what is complete is kept. Start it again\n"


@BOTH
def test_a_loop_ends_after_its_step_and_a_second_signal_before(number):
    step = "with guard.ending_after_a_step('ending after this step') as found:\n  send()\n  print(found.received)"
    done = tried(number, step + "\nprint('saved')")
    assert (done.returncode, done.stdout) == (0, f"{int(number)}\nsaved\n")
    assert done.stderr == f"tried.py: {number.name}: ending after this step\n"
    done = tried(number, step + "\n  send()\n  print('b')")
    assert (done.returncode, done.stdout) == (128 + number, f"{int(number)}\n")
    assert done.stderr.splitlines()[1] == (
        f"tried.py: {number.name} again: ending now; what is complete is kept. Start it again"
    )
    done = tried(number, f"guard.signals.PATIENCE = 99.0\n{step}\n  send()\n  print('once')")  # by launchers, twice
    assert (done.returncode, done.stdout) == (0, f"{int(number)}\nonce\n")
    done = tried(number, f"{step}\n  try: send()\n  finally:\n   send()\n   print('b')")  # code that cleans up too long
    assert (done.returncode, done.stdout) == (128 + number, f"{int(number)}\n")


def test_the_line_is_below_a_progress_bar():
    done = tried(signal.SIGINT, "from tqdm.auto import tqdm\nfor i in tqdm(range(9)): send()")
    assert "tried.py: SIGINT: ending; what is complete is kept. Start it again" in done.stderr.split("\n")


@BOTH
def test_other_processes_of_a_script_end_in_silence(number):
    """At once, but after the step of a loop."""
    done = tried(number, "send()\nprint('b')", RANK="1")
    assert (done.returncode, done.stdout, done.stderr) == (-number, "", "")
    done = tried(number, "with guard.ending_after_a_step('x') as found:\n  send()\n  print(found.received)", RANK="1")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{int(number)}\n", "")


def test_what_a_signal_breaks_is_no_traceback():
    done = tried(signal.SIGTERM, "try: send()\nexcept BaseException: raise RuntimeError('connection lost')")
    assert (done.returncode, done.stderr.count("\n")) == (143, 1)


@pytest.mark.parametrize("error", ["ValueError('a\\n  b')", "OSError('a b')", "ModuleNotFoundError('a b')"])
def test_an_error_is_a_line(error):
    done = tried(signal.SIGTERM, f"raise {error}")
    assert (done.returncode, done.stderr) == (1, "tried.py: a b\n")


FAILING = """
import guard, numpy, resource
from guard.writing import write_file
from safetensors.numpy import load_file, save_file
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
path = sys.argv[1]
open(path + "c", "w").close()
for work in (
    lambda: write_file(path + "b.json", b"0" * 5000),
    lambda: write_file(path + "no/b.json", b""),
    lambda: save_file({"a": numpy.zeros(5000)}, path + "b.safetensors"),
    lambda: load_file(path + "c"),
):
    try:
        with guard.program(): work()
    except SystemExit as end: print(end)
"""


def test_a_disk_that_fails_is_a_line(tmp_path):
    done = python(FAILING, f"{tmp_path}/")
    weights = "cannot read or write a file of weights: Error while"
    assert done.stderr == ""
    for line, begin in zip(
        done.stdout.splitlines(),
        (
            f"[Errno 27] File too large: '{tmp_path}/b.json'",
            f"[Errno 2] No such file or directory: '{tmp_path}/no/b.json.part'",
            f"{weights} serializing: I/O error: File too large",
            f"{weights} deserializing",
        ),
        strict=True,
    ):
        assert line.startswith(f"tried.py: {begin}")
    assert [each.name for each in tmp_path.iterdir()] == ["c"]


def test_a_mistake_of_ours_keeps_its_traceback():
    assert "Traceback" in tried(signal.SIGTERM, "{}['a']").stderr


def test_stderr_on_a_disk_that_is_full():
    """Neither a warning nor the line of a signal raises."""
    body = "os.dup2(os.open('/dev/full', os.O_WRONLY), 2)\nguard.warn('a')\nsend()"
    assert tried(signal.SIGTERM, body).returncode == 143


# ---- output folders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("", "the output '' names no folder"),
        (" ", "the output ' ' names no folder"),
        ("file", "the output file is a file: choose a folder"),
        ("file/a/b", r"the output file/a/b would be in .*/file, which is a file: choose a folder"),
    ],
)
def test_an_output_that_can_be_no_folder(output, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("kept")
    for script, config, values in CONFIGS:
        with pytest.raises(ValueError, match=message):
            main(script, config, values, output, overwrite=True)
    with pytest.raises(ValueError, match=message):
        classifier.main(classifier.ClassifierConfig("digits", output, overwrite=True))
    with pytest.raises(ValueError, match=message):
        nll.main(nll.NLLConfig("user/model", "out", save_model=output))
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("whole", [False, True])
def test_a_folder_has_one_owner(tmp_path, whole):
    folder = tmp_path / "a" / "b"
    with guard.owned(folder, whole):
        assert folder.exists() is not whole
        with pytest.raises(ValueError, match=rf"{folder} is in use by process {os.getpid()} on "):
            guard.owned(folder, whole).__enter__()
        done = python("import guard; guard.owned(sys.argv[1], bool(int(sys.argv[2]))).__enter__()", folder, int(whole))
        assert f"is in use by process {os.getpid()} on " in done.stderr
        with guard.owned(tmp_path / "a" / "c", whole):
            pass
    assert list(tmp_path.iterdir()) == []  # what it created and nobody filled
    with guard.owned(folder, whole):
        folder.mkdir(exist_ok=True)
        (folder / "result").touch()
    assert [each.name for each in (tmp_path / "a").rglob("*")] == ["b", "result"]


def test_the_lock_of_a_killed_owner_is_free(tmp_path):
    done = python(
        "import guard, os; owner = guard.owned(sys.argv[1]); owner.__enter__(); os.kill(os.getpid(), 9)", tmp_path
    )
    assert done.returncode == -9
    assert (tmp_path / guard.LOCK).exists()
    with guard.owned(tmp_path):
        assert json.loads((tmp_path / guard.LOCK).read_text())["process"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


CONFIGS = [
    (train, "TrainConfig", {}),
    (sample, "SampleConfig", {"model": "user/model"}),
    (nll, "NLLConfig", {"model": "user/model"}),
    (reconstruct, "ReconstructConfig", {"model": "user/model"}),
    (evaluate, "EvaluateConfig", {"model": "user/model", "reference": "digits"}),
]
EACH = pytest.mark.parametrize(("script", "config", "values"), CONFIGS, ids=[each[0].__name__ for each in CONFIGS])


def main(script, config, values, output, **changes):
    return script.main(build(getattr(script, config), values | {"output": str(output)} | changes))


@EACH
def test_no_script_writes_into_the_folder_of_a_live_run(script, config, values, tmp_path):
    with guard.owned(tmp_path), pytest.raises(ValueError, match="is in use by process"):
        main(script, config, values, tmp_path, overwrite=True)


DEVICES = [each for each in CONFIGS if each[0] is not train]
DEVICES += [(classifier, "ClassifierConfig", {"data": "digits"})]
DEVICES += [(few_steps, "FewStepsConfig", {"model": "user/model", "reference": "digits", "extractor": "a"})]


@pytest.mark.parametrize("device", ["nonsense", "", "cuda:99", "meta"])
def test_every_script_checks_its_device(device, tmp_path):
    for script, config, values in DEVICES:
        with pytest.raises(ValueError, match=f"the device '{device}' is not available: .*. Pass --device cpu, or "):
            main(script, config, values, tmp_path / "out", device=device)
    assert list(tmp_path.iterdir()) == []


def print_device(name):
    from measure.parts import start_processes

    print(start_processes(name).device)


def test_a_process_alone_works_on_its_device():
    assert Fork(print_device, "cpu:0").wait().stdout == "cpu:0\n"


# ---- processes -----------------------------------------------------------------------------------------------------

LAUNCHED = [{"WORLD_SIZE": "2", "RANK": "0"}, {"OMPI_COMM_WORLD_SIZE": "4"}, {"PMI_SIZE": "3", "PMI_RANK": "0"}]
LAUNCHED += [{"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}]


@pytest.mark.parametrize("env", LAUNCHED, ids=lambda env: next(iter(env)))
def test_processes_that_do_not_know_of_each_other(env, monkeypatch):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=rf"processes were launched that do not .* unset {next(iter(env))}"):
        guard.check_processes()
    guard.check_processes(2)
    assert guard.is_first()


def test_a_batch_script_of_slurm_is_one_process(monkeypatch):
    for name, value in {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7"}.items():
        monkeypatch.setenv(name, value)
    guard.check_processes()


@pytest.mark.parametrize(("script", "config", "values"), CONFIGS[:4], ids=[each[0].__name__ for each in CONFIGS[:4]])
def test_scripts_refuse_processes_that_do_not_know_of_each_other(script, config, values, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(ValueError, match="2 processes were launched that do not know of each other"):
        main(script, config, values, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# ---- models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("https://huggingface.co/user/model/tree/main", "is an address: pass its id, user/model, or a folder"),
        ("hf.co/user/model", "is an address: pass its id, user/model"),
        ("https://example.com/model", "is an address: pass an id such as user/model"),
        ("./out/digitz", r"there is no folder ./out/digitz: pass the folder of a saved pipeline"),
        ("training/digitz", "there is no folder training/digitz"),
        ("out/digits/modell", "there is no folder"),
        ("README.md", "is a file: pass the folder"),
    ],
)
def test_a_model_that_is_none(name, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match=message):
        check_model(name)
    for known in ("user/model", "model", "training"):
        check_model(known)


@EACH
def test_every_script_checks_the_name_of_its_model(script, config, values, tmp_path):
    name = {"init_from" if script is train else "model": "https://huggingface.co/user/model"}
    with pytest.raises(ValueError, match="is an address: pass its id, user/model"):
        main(script, config, values | name, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_the_hub_does_not_have(tmp_path, monkeypatch):
    def missing(name, **settings):
        raise OSError(f"Cannot load model {name}: the model is not fully cached locally and\nan error occurred")

    monkeypatch.setattr(GeneralizedDDIMPipeline, "from_pretrained", missing)
    for script, config, values in CONFIGS[1:4]:
        with pytest.raises(OSError, match="user/model is no folder here, and was not found on the Hub"):
            main(script, config, values, tmp_path / "out")
