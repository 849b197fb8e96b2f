"""Schedulers with a plan, and tensors to step with."""

import torch

from ddim_plugin import GeneralizedDDIMScheduler

SHAPE = (3, 1, 4, 4)


def planned(S=10, cls=GeneralizedDDIMScheduler, **config):
    scheduler = cls(**config)
    scheduler.set_timesteps(S)
    return scheduler


def tensors(count=2, shape=SHAPE, dtype=torch.float32):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def draws(S, *shape, dtype=torch.float64, seed=0):
    """x_T and S outputs."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(S + 1, *(shape or (2, 3, 4, 4)), generator=generator, dtype=dtype).unbind(0)


def run(scheduler, outputs, x, **step):
    for t, output in zip(scheduler.timesteps, outputs, strict=True):
        x = scheduler.step(output, t, x, **step).prev_sample
    return x


def settings(scheduler):
    """The settings of a scheduler without the entries that diffusers keeps for itself."""
    return {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
