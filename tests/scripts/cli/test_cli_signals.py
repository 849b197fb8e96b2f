"""Ctrl-C and SIGTERM: the status of the shell, and nothing half-written."""

import os
import signal
from pathlib import Path

import pytest
from PIL import Image

from ddim_plugin import GeneralizedDDIMPipeline, cli


@pytest.fixture(autouse=True)
def in_the_foreground():
    """A shell that starts these tests in the background has them ignore SIGINT, as the command then does."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (GeneralizedDDIMPipeline, "from_pretrained"),
        (GeneralizedDDIMPipeline, "_predict"),
        (Image.Image, "save"),  # the first file is being written
        (Path, "replace"),  # all are complete, but not in place
    ],
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing(model, tmp_path, monkeypatch, capfd, number, place, name):
    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), number)
        raise AssertionError("the signal did not end this")

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(place, name, interrupted)
    output = tmp_path / "out"
    command = ["sample", str(model), "--num", "2", "--steps", "1", "--output", str(output)]
    if number == signal.SIGINT:
        assert cli.main(command) == 130
        assert capfd.readouterr().err.splitlines()[-1] == "ddim-plugin sample: stopped"
    else:
        with pytest.raises(SystemExit) as end:
            cli.main(command)
        assert end.value.code == 143
    assert not output.exists() or not any(output.iterdir())
    assert {path.name for path in tmp_path.iterdir()} <= {"out"}
    assert signal.getsignal(signal.SIGTERM) is before


def test_other_errors_keep_their_traceback(model, tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("a fault of this package")

    monkeypatch.setattr(GeneralizedDDIMPipeline, "from_pretrained", fails)
    with pytest.raises(RuntimeError, match="a fault of this package"):
        cli.main(["sample", str(model), "--output", str(tmp_path / "out")])
