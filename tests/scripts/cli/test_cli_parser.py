"""The options of the ddim-plugin command, which is run as a process once."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ddim_plugin
from ddim_plugin import cli
from ddim_plugin.cli.parser import parse


def test_it_is_installed():
    program = shutil.which("ddim-plugin", path=Path(sys.executable).parent)
    assert program is not None
    for command in ([program], [sys.executable, "-m", "ddim_plugin.cli"]):
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=120)
        assert done.stdout.strip() == ddim_plugin.__version__


@pytest.mark.parametrize("command", ["sample", "encode", "reconstruct", "edit", "fit", "push"])
def test_help_shows_an_example_that_parses(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main([command, "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    example = next(line.split() for line in text.splitlines() if line.startswith(f"  ddim-plugin {command} "))
    assert parse(example[1:]).command == command
    assert ("--seed SEED" in text) is (command in ("sample", "fit"))


@pytest.mark.parametrize(
    ("option", "wrong"),
    [
        *(("sample --timesteps", each) for each in ("foo", "900 true", "nan", "[900]", '"900"', "null")),
        *(("sample --guidance-scale", each) for each in ("nan", "inf", "true", "x")),
        ("sample --eta", "inf"),
        ("encode --strength", "nan"),
        ("encode --tolerance", "inf"),
        ("edit --new-guidance-scale", "nan"),
        ("fit --minutes", "nan"),
    ],
)
def test_what_is_no_finite_number_is_refused(option, wrong, capsys):
    command, option = option.split()
    with pytest.raises(SystemExit) as exit_:
        cli.main([command, "model", *(["a.png"] if command in ("encode", "edit") else []), option, *wrong.split()])
    assert exit_.value.code == 2
    assert f"argument {option}: invalid number value: {wrong.split()[-1]!r}" in capsys.readouterr().err


def test_whole_numbers_are_integers():
    times = parse(["sample", "model", "--timesteps", "900", "1e2", "5.0", "2.5"]).timesteps
    assert [(each, type(each)) for each in times] == [(900, int), (100, int), (5, int), (2.5, float)]


def test_flags_may_stand_anywhere(capsys):
    for command in (["encode"], ["edit", "--new-prompt", "dog"]):
        for words in ("m --steps 5 a b", "--steps 5 m a b", "m a b --steps 5"):
            args = parse([*command, *words.split()])
            assert (args.model, args.images, args.steps) == ("m", ["a", "b"], 5)
        for words, rest in (("m a b --stops 5", "--stops 5"), ("m a --steps 5 b", "b")):
            with pytest.raises(SystemExit):
                parse([*command, *words.split()])
            assert f"unrecognized arguments: {rest}\n" in capsys.readouterr().err
