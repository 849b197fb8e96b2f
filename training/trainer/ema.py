"""The average of the weights that samples are drawn with."""

import copy
from typing import Any

import torch
from diffusers import UNet2DModel


class EMA:
    """An exponential moving average of a network's weights, in float32 whatever they are trained in.

    `unet` is a copy of the network that holds the average, always in eval mode. With `warmup` the decay rises as
    1 − n^(−3/4) over the steps n, up to `decay`, so that the first, random weights are forgotten.
    """

    def __init__(self, unet: UNet2DModel, decay: float, warmup: bool):
        self.unet = copy.deepcopy(unet).float().eval().requires_grad_(False)
        self.decay, self.warmup = decay, warmup

    def follow(self, network: torch.nn.Module) -> None:
        """Average this network's parameters from now on, which may be shards (FSDP) of those of `unet`."""
        self._sources = list(network.parameters())
        self._sharded = any(hasattr(source, "full_tensor") for source in self._sources)
        self._averages: list[Any] = list(self.unet.parameters())
        if [source.shape for source in self._sources] != [average.shape for average in self._averages]:
            raise ValueError("the weights are in shards whose shapes are unknown here: use FSDP 2, or ZeRO 1 or 2")
        if self._sharded:
            self._averages = [source.detach().float().clone() for source in self._sources]

    def decay_at(self, step: int) -> float:
        """The decay of the update after optimiser step 1, 2, …"""
        return min(self.decay, 1 - step**-0.75) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """One step of the average, after optimiser step 1, 2, …"""
        sources = [source if source.dtype == torch.float32 else source.float() for source in self._sources]
        torch._foreach_lerp_(self._averages, sources, 1 - self.decay_at(step))

    @torch.no_grad()
    def gather(self) -> UNet2DModel:
        """`unet`, up to date. All processes call it: shards are put together."""
        if self._sharded:
            for whole, average in zip(self.unet.parameters(), self._averages, strict=True):
                whole.copy_(average.full_tensor())
        return self.unet

    @torch.no_grad()
    def load(self, weights: dict[str, torch.Tensor]) -> None:
        """Take over the weights of an average of before."""
        self.unet.load_state_dict(weights)
        if self._sharded:
            from torch.distributed.tensor import distribute_tensor

            for whole, average in zip(self.unet.parameters(), self._averages, strict=True):
                average.copy_(distribute_tensor(whole, average.device_mesh, average.placements))
