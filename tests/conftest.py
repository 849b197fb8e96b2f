"""Shared pieces: small networks that need no training, and settings that make failures repeatable."""

import pytest
import torch
from diffusers import UNet2DModel
from hypothesis import settings
from torch.utils._python_dispatch import TorchDispatchMode

settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("repeatable")


@pytest.fixture
def network():
    """A smooth function of (x_t, t) that stands in for a trained network."""

    def call(x, t):
        return torch.tanh(0.9 * x + 0.1) + 0.05 * torch.sin(3 * x.flip(-1)) + 0.0001 * t

    return call


@pytest.fixture
def fresh_accelerate():
    """Accelerate keeps its settings for the whole process."""
    yield
    from accelerate.state import AcceleratorState, GradientState, PartialState  # few tests need it

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture(scope="session")
def make_unet():
    """A builder of tiny U-Nets with random weights that are not zero anywhere."""

    def build(channels=1, size=8, out_channels=None, seed=0, **config):
        torch.manual_seed(seed)
        unet = UNet2DModel(
            sample_size=size,
            in_channels=channels,
            out_channels=out_channels or channels,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            attention_head_dim=8,
            **config,
        )
        return unet.eval()

    return build


@pytest.fixture(scope="module")
def one_thread():
    """Compute with one thread, so that sums have one order, while the tests of a module run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def streams_end_at_once(monkeypatch):
    """`datasets` waits for seconds at the end of each epoch of a stream, for threads of its own."""
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


@pytest.fixture
def quiet_diffusers():
    """Collect what diffusers logs at the level of warnings: its conversions warn there, not through `warnings`."""
    import logging

    records = []

    class Handler(logging.Handler):
        def emit(self, record):
            records.append(record.getMessage())

    logger, handler = logging.getLogger("diffusers"), Handler(logging.WARNING)
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


class RefuseHostReads(TorchDispatchMode):
    """Fails on any operation that would make the host wait for a device: reading a value, or asking where one is."""

    BANNED = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "equal", "masked_select", "_to_cpu", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").split(".")[0]
        if name in self.BANNED:
            raise AssertionError(f"{name} reads a tensor on the host")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def refuse_host_reads():
    """A context in which no tensor's value may be read on the host."""
    return RefuseHostReads()
