"""The progress bar of scripts: all the work, the time left, and nothing if stderr is no terminal."""

import io
import re

import torch
from guard.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_the_work_and_the_time_left(monkeypatch, capsys):
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    with Progress(200, "measuring") as bar:
        bar.bar.mininterval = 0
        bar.advance(50)
        bar.print("one row")
        bar.advance(50)
    assert "measuring:  50%" in screen.getvalue()
    assert re.search(r"100/200 \[00:\d\d<\d\d:\d\d", screen.getvalue())
    assert capsys.readouterr().out == "one row\n"


def test_nothing_is_drawn_into_a_file(capsys):
    with Progress(2, "measuring") as bar:
        bar.advance()
        bar.print("one row")
    assert capsys.readouterr() == ("one row\n", "")
    assert bar.done == 1


def test_images_are_counted_in_each_call_of_a_network():
    network = torch.nn.Identity()
    with Progress(10, "measuring") as bar:
        with bar.counting(network):
            network(torch.zeros(3, 1))
            network(torch.zeros(2, 1))
        network(torch.zeros(7, 1))
    assert bar.done == 5


def test_the_total_follows_what_was_done():
    with Progress(100, "measuring") as bar:
        with bar.part(40):
            bar.advance(10)
        assert bar.total == 70
        with bar.part(60):
            bar.advance(90)
    assert (bar.done, bar.total) == (100, 100)
