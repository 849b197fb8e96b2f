"""Work that processes share."""

import pytest
from accelerate.state import PartialState
from measure import parts


def test_processes_that_do_not_know_of_each_other(measure, tmp_path, monkeypatch):
    """As torch.distributed.run starts them on a CPU where Accelerate is not told so: each would do all the work."""
    monkeypatch.setattr(parts, "Accelerator", lambda **settings: PartialState(cpu=True))
    measure("alone", images=20, steps=(2,))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched that do not know of each other: on the CPU"):
        measure()
    assert not (tmp_path / "out").exists()
