"""Accelerate starts anew for each test, and only tests of the output folder plot the loss."""

import guard
import pytest
from training_runs import forget_accelerate


@pytest.fixture(autouse=True)
def fresh_accelerate():
    guard.signals.SIGNALS.__init__()  # of a script in an earlier test
    yield
    forget_accelerate()


@pytest.fixture(autouse=True)
def no_plots(request, monkeypatch):
    if request.module.__name__ != "test_output":
        monkeypatch.setattr("trainer.output.plot_loss", lambda lines, path: None)
