"""A classifier of x_t, for guidance by its gradient (Dhariwal & Nichol 2021)."""

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.unets.unet_2d_blocks import DownBlock2D
from pictures import Frame, to_model
from torch import Generator, Tensor, nn

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler


class NoisyClassifier(ModelMixin, ConfigMixin):
    """The encoder of a U-Net and a linear layer: logits (B, classes) of x_t (B, C, H, W) and timesteps (B,).

    Args:
        channels: C of the pictures.
        classes: number of classes.
        widths: channels of each level; each but the last halves the pictures.
        layers: residual blocks of a level.
        of_sigma: whether timesteps are σ of a variance-exploding path, whose logarithm is embedded.
        time_scale: factor on other timesteps: 400 for those of EDM, ln(σ)/4.
    """

    @register_to_config
    def __init__(
        self,
        channels: int,
        classes: int,
        widths: list[int],
        layers: int = 1,
        of_sigma: bool = False,
        time_scale: float = 1.0,
    ):
        super().__init__()
        first, last, width = widths[0], widths[-1], 4 * widths[0]
        self.conv_in = nn.Conv2d(channels, first, 3, padding=1)
        self.time, self.embedding = Timesteps(first, True, 0), TimestepEmbedding(first, width)
        self.blocks = nn.ModuleList()
        for i, (before, after) in enumerate(zip([first, *widths], widths, strict=False), 1):
            groups = math.gcd(8, before, after)
            halves = {"resnet_groups": groups, "add_downsample": i < len(widths)}
            self.blocks.append(DownBlock2D(before, after, width, num_layers=layers, **halves))
        self.norm, self.head = nn.GroupNorm(math.gcd(8, last), last), nn.Linear(last, classes)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = 100 * t.float().log() if self.config.of_sigma else self.config.time_scale * t
        time = self.embedding(self.time(t.expand(len(x))).to(x.dtype))
        x = self.conv_in(x)
        for block in self.blocks:
            x, _ = block(x, time)
        return self.head(nn.functional.silu(self.norm(x)).mean((2, 3)))


class Guide(nn.Module):
    """A `NoisyClassifier` with the noise of a model, which maps uint8 pictures (B, C, H, W) to logits (B, K).

    Times are drawn uniformly from 1..T, or fixed by `at`. Raises ValueError if the model makes other pictures.
    """

    smoothing = 0.0  # its probabilities are those that the gradient is of

    def __init__(self, config: Any, frame: Frame, classes: tuple[str, ...]):
        super().__init__()
        pipe = GeneralizedDDIMPipeline.from_pretrained(config.noisy)
        made, needed = (frame.channels, *frame.size), (pipe.image_channels, *(pipe.image_size or frame.size))
        if made != needed:
            remedy = "choose them with --channels and --resolution"
            raise ValueError(f"the pictures are (C, H, W) = {made}, and {config.noisy} makes {needed}: {remedy}")
        if not isinstance(pipe.scheduler, GeneralizedDDIMScheduler):
            given = f"{config.noisy} has a {type(pipe.scheduler).__name__}"
            raise ValueError(f"{given}: a guide needs one with a GeneralizedDDIMScheduler or MultistepDDIMScheduler")
        self.path, self.range = pipe.scheduler.path, pipe.scheduler.image_range
        torch.manual_seed(config.seed)
        preconditioned = self.path.sigma_data is not None
        time = {"of_sigma": self.path.explodes and not preconditioned and self.path.bounds[0] > 0}
        time |= {"time_scale": 400.0 if preconditioned else 1.0}
        self.network = NoisyClassifier(frame.channels, len(classes), [*config.hidden_sizes], config.layers, **time)
        self.generator, self.share = Generator().manual_seed(config.seed), None

    def at(self, share: float) -> "Guide":
        """Fix the time at a share of T, with the same noise at each call. Returns itself."""
        self.share, self.generator = share, Generator().manual_seed(0)
        return self

    def forward(self, pictures: Tensor) -> Tensor:
        device, path, (low, high) = self.network.device, self.path, self.range
        x = low + (high - low) * (to_model(pictures.to(device)) + 1) / 2
        t = torch.randint(1, path.T + 1, (len(x),), generator=self.generator)
        t = t if self.share is None else torch.full_like(t, max(1, round(self.share * path.T)))
        signal, noise = (torch.as_tensor(each)[t].view(-1, 1, 1, 1).to(x) for each in path.levels)
        timesteps = torch.tensor([path.timestep(each) for each in t.tolist()], dtype=torch.float32, device=device)
        x = signal * x + noise * torch.randn(x.shape, generator=self.generator).to(device)
        return self.network(x, timesteps)

    def save(self, folder: Path) -> None:
        """Write the network, as `NoisyClassifier.from_pretrained` reads it."""
        self.network.save_pretrained(folder)
