"""The log of a run: spikes, whole lines, numbers that are not finite."""

import math

import pytest
import torch
from trainer.report import Spikes, Window, read_log


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
