"""diffusers' own scheduler for categorical data, which is ours at η = 1 with α_t = 1 − t/T."""

import diffusers
import pytest
import torch

from ddim_plugin import DiscreteDDIMScheduler

if not hasattr(diffusers, "DiscreteDDIMScheduler"):
    pytest.skip("this version of diffusers has no DiscreteDDIMScheduler", allow_module_level=True)

K, S = 3, 5
SETTINGS = {"num_train_timesteps": S, "beta_schedule": "jsd", "eta": 1.0}


@pytest.fixture
def schedulers():
    ours, stock = DiscreteDDIMScheduler(K, **SETTINGS), diffusers.DiscreteDDIMScheduler(S)
    ours.set_timesteps(S)
    return ours, stock


def logits_at(x, step):
    """A network whose prediction depends on the token and the step."""
    return torch.sin(torch.arange(K) * 1.7 + x[..., None] * 2.3 + step)


def stock_probabilities(stock, step, monkeypatch):
    """p(x_s|x_t), (K, K), from the routes that the stock scheduler draws from, for each x_0 and x_t."""
    x, x0 = torch.arange(K).repeat(K, 1), torch.arange(K)[:, None].expand(K, K)
    drawn = []
    original = torch.multinomial
    monkeypatch.setattr(torch, "multinomial", lambda p, **settings: drawn.append(p) or original(p, **settings))
    certain = torch.full((K, K, K), -1e9).scatter_(-1, x0[..., None], 0.0)
    stock.step(certain, step, x)  # temperature 0: it takes x_0 for granted
    monkeypatch.undo()
    clean, stay, noise = drawn[0].view(K, K, 3)[..., None].unbind(-2)
    q = clean * torch.eye(K)[x0] + stay * torch.eye(K)[x] + noise / K  # x_0, x_t, x_s
    return torch.einsum("xo,oxs->xs", logits_at(torch.arange(K), step).softmax(-1), q)


def test_each_step_has_the_same_probabilities(schedulers, monkeypatch):
    ours, stock = schedulers
    for step, t in enumerate(ours.timesteps):
        x = torch.arange(K)[:, None]
        found = ours.step(logits_at(x, step), t, x).probabilities[:, 0]
        torch.testing.assert_close(found, stock_probabilities(stock, step, monkeypatch), atol=1e-6, rtol=0)


def test_whole_loops_have_the_same_distribution(schedulers):
    ours, stock = schedulers
    N, generator = 40000, torch.Generator().manual_seed(0)
    start = torch.randint(K, (N, 1), generator=generator)
    results = []
    for scheduler, times in ((ours, ours.timesteps), (stock, range(S))):
        x, settings = start, {} if scheduler is ours else {"temperature": 1.0}
        for step, t in enumerate(times):
            x = scheduler.step(logits_at(x, step), t, x, generator=generator, **settings).prev_sample
        results.append(torch.bincount(x.flatten(), minlength=K) / N)
    torch.testing.assert_close(*results, atol=4 * (0.5 / N) ** 0.5, rtol=0)


def test_neither_class_loads_the_config_of_the_other(schedulers, tmp_path):
    ours, stock = schedulers
    ours.save_pretrained(tmp_path / "ours")
    stock.save_pretrained(tmp_path / "stock")
    for config in (ours.config, tmp_path / "ours"):
        load = stock.from_config if config is ours.config else stock.from_pretrained
        with pytest.raises(TypeError, match="arange"):
            load(config)
    with pytest.raises(ValueError, match="is of diffusers' DiscreteDDIMScheduler"):
        DiscreteDDIMScheduler.from_config(stock.config, num_classes=K)
    with pytest.raises(ValueError, match="is of diffusers' DiscreteDDIMScheduler"):
        DiscreteDDIMScheduler.from_pretrained(tmp_path / "stock")
    import ddim_plugin

    assert ddim_plugin.DiscreteDDIMScheduler.__module__.startswith("ddim_plugin")
