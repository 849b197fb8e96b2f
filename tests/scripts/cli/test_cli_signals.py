"""Ctrl-C and SIGTERM, at any time: one line, the status of the shell, and nothing half-written."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from ddim_plugin import GeneralizedDDIMPipeline, cli

STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.fixture(autouse=True)
def in_the_foreground():
    """A shell that starts these tests in the background has them ignore SIGINT, as the command then does."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_signal_that_is_ignored_stays_so(model, tmp_path, monkeypatch):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    handlers = []
    monkeypatch.setattr(Path, "replace", lambda *paths: handlers.append(signal.getsignal(signal.SIGINT)))
    assert cli.main(["sample", str(model), "--num", "1", "--steps", "1", "--output", str(tmp_path)]) == 0
    assert handlers[0] == signal.SIG_IGN


def interrupted(number):
    def call(*args, **kwargs):
        os.kill(os.getpid(), number)
        raise AssertionError("the signal did not end this")

    return call


@pytest.mark.parametrize(
    ("number", "place", "name"),
    [
        (signal.SIGINT, GeneralizedDDIMPipeline, "from_pretrained"),
        (signal.SIGTERM, GeneralizedDDIMPipeline, "__call__"),
        (signal.SIGINT, Image.Image, "save"),  # the first file is being written
        (signal.SIGTERM, Path, "replace"),  # all are complete, but not in place
    ],
)
def test_a_signal_is_one_line(model, tmp_path, monkeypatch, capfd, number, place, name):
    before = [signal.getsignal(each) for each in STATUS]
    monkeypatch.setattr(place, name, interrupted(number))
    output = tmp_path / "out"
    status = cli.main(["sample", str(model), "--num", "2", "--steps", "1", "--output", str(output)])
    assert status == STATUS[number]
    said = capfd.readouterr().err.splitlines()
    assert [line for line in said if "ddim-plugin" in line] == [f"ddim-plugin sample: stopped by {number.name}"]
    assert said[-1].startswith("ddim-plugin")
    assert not output.exists() or not any(output.iterdir())
    assert {path.name for path in tmp_path.iterdir()} <= {"out"}
    assert [signal.getsignal(each) for each in STATUS] == before


def test_a_signal_that_became_another_error_is_still_a_signal(model, tmp_path, monkeypatch, capfd):
    """Libraries wrap what their imports and callbacks raise."""

    def wrapped(*args, **kwargs):
        try:
            interrupted(signal.SIGTERM)()
        except KeyboardInterrupt as error:
            raise RuntimeError("Failed to import the network") from error

    monkeypatch.setattr(GeneralizedDDIMPipeline, "from_pretrained", wrapped)
    assert cli.main(["sample", str(model), "--output", str(tmp_path / "out")]) == 143
    assert capfd.readouterr().err.split("\n") == ["", "ddim-plugin sample: stopped by SIGTERM", ""]


def test_a_signal_that_a_library_swallows_is_still_a_signal(model, tmp_path, monkeypatch, capfd):
    load = GeneralizedDDIMPipeline.from_pretrained

    def swallowing(*args, **kwargs):
        with contextlib.suppress(KeyboardInterrupt):
            interrupted(signal.SIGINT)()
        return load(*args, **kwargs)

    monkeypatch.setattr(GeneralizedDDIMPipeline, "from_pretrained", swallowing)
    few = ["--num", "1", "--steps", "1", "--output", str(tmp_path / "out")]
    assert cli.main(["sample", str(model), *few]) == 130
    assert "ddim-plugin sample: stopped by SIGINT" in capfd.readouterr().err


def test_a_second_signal_exits_at_once(model, tmp_path):
    """In a process whose library swallows the first one, and then would wait for ever."""
    code = f"""
import os, signal, sys, time
from ddim_plugin import GeneralizedDDIMPipeline, cli

def swallowing(*args, **kwargs):
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            os.kill(os.getpid(), number)
            time.sleep(60)
        except KeyboardInterrupt:
            pass
    time.sleep(60)

signal.signal(signal.SIGINT, signal.default_int_handler)
GeneralizedDDIMPipeline.from_pretrained = swallowing
cli.main(["sample", {str(model)!r}, "--output", {str(tmp_path / "out")!r}])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert done.returncode == 143
    assert done.stderr.splitlines()[-1] == "ddim-plugin sample: stopped by SIGTERM"


def test_other_errors_keep_their_traceback(model, tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("a fault of this package")

    monkeypatch.setattr(GeneralizedDDIMPipeline, "from_pretrained", fails)
    with pytest.raises(RuntimeError, match="a fault of this package"):
        cli.main(["sample", str(model), "--output", str(tmp_path / "out")])


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("number", STATUS)
def test_a_signal_while_libraries_are_imported(tmp_path, library, number):
    """By a stand-in for a library, which swallows all exceptions."""
    stop = f"import os, signal\ntry:\n    os.kill(os.getpid(), {int(number)})\nexcept BaseException:\n    pass\n"
    (tmp_path / f"{library}.py").write_text(stop)
    command = [sys.executable, "-m", "ddim_plugin.cli", "sample", "user/model"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    said = "ddim-plugin" + (" sample" if library == "torch" else "")
    assert (done.returncode, done.stdout) == (STATUS[number], "")
    assert done.stderr == f"{said}: stopped by {number.name}\n"
