"""Accelerate and signals start anew for each test, and only tests of the output folder plot the loss."""

import signal

import guard
import pytest
from training_runs import forget_accelerate

DEFAULTS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGALRM: signal.SIG_DFL}


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    forget_accelerate()


@pytest.fixture(autouse=True)
def fresh_signals():
    """Without the handlers of a script that ran in this process before."""
    before = {number: signal.signal(number, handler) for number, handler in DEFAULTS.items()}
    guard.signals.SIGNALS.__init__()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def no_plots(request, monkeypatch):
    if request.module.__name__ != "test_output":
        monkeypatch.setattr("trainer.output.plot_loss", lambda lines, path: None)
