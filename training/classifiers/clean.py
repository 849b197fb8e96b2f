"""A small ResNet of transformers, for clean pictures."""

from pathlib import Path
from typing import Any

import torch
from pictures import Frame
from torch import Tensor, nn
from trainer.settings import write_json


def moments(images: Tensor, name: str) -> tuple[list[float], list[float]]:
    """Measure the mean and the standard deviation of each channel, in [0, 1]; 1 for a channel of one value."""
    some = images[:: 1 + len(images) // 10_000].double() / 255
    mean, std = (found(some, dim=(0, 2, 3)).tolist() for found in (torch.mean, torch.std))
    if max(std) < 1e-6:
        raise ValueError(f"the pictures of {name} are all of one colour: a classifier cannot learn from them")
    return mean, [each if each > 1e-6 else 1.0 for each in std]


class Classifier(nn.Module):
    """A ResNet of transformers with its preprocessing, which maps uint8 pictures (B, C, H, W) to logits (B, K)."""

    smoothing = 0.1

    def __init__(self, config: Any, frame: Frame, classes: tuple[str, ...], mean: list, std: list):
        super().__init__()
        try:
            from transformers import ResNetConfig, ResNetForImageClassification
        except ImportError as error:
            raise ValueError(f"a classifier needs transformers ({error}): pip install transformers") from error
        torch.manual_seed(config.seed)
        self.network: Any = ResNetForImageClassification(
            ResNetConfig(
                num_channels=frame.channels,
                embedding_size=config.hidden_sizes[0],
                hidden_sizes=list(config.hidden_sizes),
                depths=[config.layers] * len(config.hidden_sizes),
                layer_type="basic",
                id2label=dict(enumerate(classes)),
                label2id={name: i for i, name in enumerate(classes)},
            )
        )
        self.frame, self.mean, self.std = frame, mean, std

    def forward(self, pictures: Tensor) -> Tensor:
        x = pictures.to(self.network.device).float() / 255
        mean, std = (x.new_tensor(each).view(1, -1, 1, 1) for each in (self.mean, self.std))
        return self.network(pixel_values=(x - mean) / std).logits

    def save(self, folder: Path) -> None:
        """Write the network and its preprocessing, as transformers reads them."""
        self.network.save_pretrained(folder)
        size = dict(zip(("height", "width"), self.frame.size, strict=True))
        processor = {"image_processor_type": "ViTImageProcessor", "do_resize": True, "size": size, "resample": 2}
        processor |= {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
        write_json(folder / "preprocessor_config.json", processor | {"image_mean": self.mean, "image_std": self.std})
