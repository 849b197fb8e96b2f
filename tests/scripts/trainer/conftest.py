"""Accelerate starts anew for each test."""

import pytest
from training_runs import forget_accelerate


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    forget_accelerate()
