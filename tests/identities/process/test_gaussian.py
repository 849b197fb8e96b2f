"""The path between two latents."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddim_plugin.process.gaussian import slerp


def latents(B=4, n=256, seed=0, dtype=torch.float64):
    return torch.randn(2, B, 1, 1, n, dtype=dtype, generator=torch.Generator().manual_seed(seed)).unbind(0)


@given(st.floats(0.001, 0.999), st.integers(0, 100))
def test_it_is_the_papers_formula_sample_by_sample(a, seed):
    """Appendix D.5, with one angle for each sample."""
    x0, x1 = latents(seed=seed)
    made = slerp(x0, x1, a)
    for i in range(len(x0)):
        u, v = x0[i].flatten(), x1[i].flatten()
        angle = math.acos(float(u @ v / u.norm() / v.norm()))
        expected = math.sin((1 - a) * angle) / math.sin(angle) * u + math.sin(a * angle) / math.sin(angle) * v
        assert torch.allclose(made[i].flatten(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_ends_are_exact(dtype):
    x0, x1 = latents(dtype=dtype)
    assert torch.equal(slerp(x0, x1, 0), x0)
    assert torch.equal(slerp(x0, x1, 1.0), x1)
    assert slerp(x0, x1, 0.5).dtype == dtype


def test_it_stays_on_the_shell_and_moves_evenly():
    """Between vectors of one norm: that norm all along, and equal angles for equal steps."""
    x0, x1 = (x / x.flatten(1).norm(dim=1).view(-1, 1, 1, 1) * 16 for x in latents())
    path = torch.stack([slerp(x0, x1, i / 10) for i in range(11)]).flatten(2)
    assert torch.allclose(path.norm(dim=2), torch.full((11, 4), 16.0, dtype=torch.float64))
    steps = (path[1:] - path[:-1]).norm(dim=2)
    assert torch.allclose(steps, steps[:1].expand_as(steps))


@pytest.mark.parametrize("gap", [0.0, 1e-12, 1e-8, 1e-5, 1e-3])
def test_nearly_parallel(gap):
    x0, other = latents()
    x1 = x0 + gap * other
    made = slerp(x0, x1, 0.3)
    assert torch.allclose(made, 0.7 * x0 + 0.3 * x1, rtol=0, atol=gap**2 + 1e-12)


@pytest.mark.parametrize("gap", [0.0, 1e-9, 1e-4])
@pytest.mark.parametrize("factor", [-1.0, -1.05])
def test_opposite_latents_have_no_shortest_path(gap, factor):
    x0, other = latents()
    with pytest.raises(ValueError, match="two latents are opposite"):
        slerp(x0, factor * x0 + gap * other, 0.5)


def test_each_sample_has_its_own_case():
    x0, x1 = latents(5)
    x1[0], x1[2] = x0[0], 0
    made = slerp(x0, x1, 0.25)
    assert torch.isfinite(made).all()
    for i in range(5):
        assert torch.allclose(made[i : i + 1], slerp(x0[i : i + 1], x1[i : i + 1], 0.25), atol=1e-12)
    assert torch.allclose(made[2], 0.75 * x0[2])


def test_shapes_must_agree():
    x0, x1 = latents()
    with pytest.raises(ValueError, match="two batches of one shape"):
        slerp(x0, x1[:2], 0.5)
    with pytest.raises(ValueError, match=r"slerp needs a in \[0, 1\], not 1.5"):
        slerp(x0, x1, 1.5)
