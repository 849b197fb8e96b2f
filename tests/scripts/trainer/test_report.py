"""The log of a run: spikes, whole lines, numbers that are not finite."""

import math

import pytest
import torch
from trainer import report as report_
from trainer.report import Log, Spikes, Window, read_log


def test_spikes():
    spikes = Spikes()
    assert spikes.find([9.0] + [1.0] * 24, [1.0] * 25, 25) == []  # a beginning has nothing before it
    assert spikes.find([1.1, 6.0, 1.0], [1.0, 1.0, 7.0], 28) == [
        {"step": 27, "loss": 6.0, "grad_norm": 1.0},
        {"step": 28, "loss": 1.0, "grad_norm": 7.0},
    ]


def test_only_whole_lines_of_a_log_are_read_and_later_ones_forgotten(tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert read_log(file) == [{"step": 1}, {"step": 2}]
    assert read_log(tmp_path / "none") == []


def test_a_log_on_a_full_disk_loses_nothing(tmp_path, capsys):
    """Half of a line is written, then nothing, then there is room."""

    class Alone:
        is_main_process, trackers, log = True, (), staticmethod(lambda values, step: None)

    class Disk:
        """A file on a disk with room for `room` bytes."""

        def __init__(self, path, room):
            self.file, self.room = open(path, "r+b", buffering=0), room  # noqa: SIM115

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            if not self.room:
                raise OSError(28, "No space left on device")
            return self.file.write(data[: self.room])

    log, file = Log(tmp_path / "log.jsonl", Alone(), 0, 9), tmp_path / "log.jsonl"
    for step, room in ((1, 99), (2, 5), (3, 0), (4, 0), (5, 99)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(report_, "open", lambda path, *mode, room=room, **how: Disk(path, room), raising=False)
            log.write(step, loss=1.0)
    assert [line["step"] for line in read_log(file)] == [1, 2, 3, 4, 5]
    assert len(file.read_text().splitlines()) == 5
    assert capsys.readouterr().err.count("has no line for step") == 1
    file.unlink()  # somebody tidied up
    log.write(6, loss=1.0)
    assert [line["step"] for line in read_log(file)] == [1, 2, 3, 4, 5, 6]
    log.close()


def test_a_window_names_the_first_step_that_is_not_finite():
    class Alone:
        @staticmethod
        def reduce(tensor, how):
            return tensor

    window = Window(Alone())
    for loss, norm in ((1.0, 2.0), (1.0, math.inf), (math.nan, 1.0)):
        window.add(torch.tensor(loss), torch.tensor(norm))
    with pytest.raises(FloatingPointError, match="the norm of the gradient is inf at step 9"):
        window.read(10)
