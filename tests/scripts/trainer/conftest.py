"""Accelerate starts anew for each test, and only tests of the output folder plot the loss."""

import pytest
from training_runs import forget_accelerate


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    forget_accelerate()


@pytest.fixture(autouse=True)
def no_plots(request, monkeypatch):
    if request.module.__name__ != "test_output":
        monkeypatch.setattr("trainer.output.plot_loss", lambda lines, path: None)
