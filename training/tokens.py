"""Measure a network for categorical data by S and η: its variational bound, and its pictures.

python training/tokens.py --model out/mnist_discrete --data ylecun/mnist --extractor training/extractors/mnist-resnet
"""

import guard

if __name__ == "__main__":
    guard.start()  # before the imports that take seconds

import io
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from discrete import bound_bits, quantize
from guard.progress import Progress
from guard.writing import write_file
from measure.extractors import Extractor, open_extractor
from measure.labels import check_label
from measure.metrics import check_count, frechet, gaussian
from pictures import Reading, choose_split, load_images, to_model
from pictures.grids import grid
from torch import Generator, Tensor
from trainer.settings import parse, record, write_json

from ddim_plugin import DiscreteDDIMScheduler, GeneralizedDDIMPipeline

COLUMNS = 16  # of a grid
WRITTEN = ("tokens.json", "tokens.md")


@dataclass(frozen=True)
class TokensConfig(Reading):
    """Measure bits per dimension, and the Fréchet distance of pictures to those of a data set, by S and η."""

    model: str = field(metadata={"help": "a folder that train.py wrote for num_classes in [scheduler]"})
    data: str = field(metadata={"help": "data set of the pictures that are measured"})
    split: str | None = field(default=None, metadata={"help": "its split; by default test, validation or train"})
    output: str = field(default="tokens", metadata={"help": "folder for tokens.json, tokens.md and pictures"})
    steps: tuple[int, ...] = field(default=(10, 20, 50), metadata={"help": "S of the rows"})
    etas: tuple[float, ...] = field(default=(0.0, 1.0), metadata={"help": "η of the columns"})
    noisiest: str = field(default="bayes", metadata={"help": "q at η = 1: bayes or independent"})
    bound_images: int = field(default=512, metadata={"help": "pictures for the bound, the first of the split"})
    images: int = field(default=64, metadata={"help": "pictures to draw; 64 of them are shown"})
    extractor: str | None = field(default=None, metadata={"help": "classifier for the Fréchet distance; none without"})
    batch_size: int = field(default=64, metadata={"help": "pictures at a time"})
    seed: int = field(default=0, metadata={"help": "picture i is drawn from seed + i"})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, …; by default an accelerator if any"})
    overwrite: bool = field(default=False, metadata={"help": "replace results of an earlier run"})


@guard.output(alone=True)
def main(config: TokensConfig) -> dict[str, Any]:
    """Write `tokens.json`, the table `tokens.md` and a grid for each S and η; return the content of the first."""
    if min(config.bound_images, config.images, config.batch_size) < 1:
        raise ValueError("bound_images, images and batch_size must be positive")
    if any((Path(config.output) / name).exists() for name in WRITTEN) and not config.overwrite:
        raise ValueError(f"{config.output} has results: choose another output, or pass --overwrite")
    config = replace(config, split=choose_split(config.data, config.split, config.data_config))
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    pipe = GeneralizedDDIMPipeline.from_pretrained(config.model).to(device)
    pipe.set_progress_bar_config(disable=True)
    if not isinstance(pipe.scheduler, DiscreteDDIMScheduler):
        raise ValueError(f"{config.model} has a {type(pipe.scheduler).__name__}: measure it by evaluate.py and nll.py")
    check_label(config.model, pipe.unet, None)
    pipe.scheduler = DiscreteDDIMScheduler.from_config(pipe.scheduler.config, noisiest=config.noisiest)
    for S, eta in product(config.steps, config.etas):  # before anything is measured
        pipe.scheduler.set_timesteps(S)
        pipe.scheduler.posterior(1, 0, eta)
    shape, K = (pipe.unet.config.in_channels, pipe.image_size), pipe.scheduler.config.num_classes
    count = max(config.bound_images, config.images if config.extractor else 0)
    real = quantize(to_model(load_images(config.data, config.split, *shape, count, **config.reading)), K)
    extractor = None
    if config.extractor is not None:
        extractor = open_extractor(config.extractor, device, (shape[0], *real.shape[2:]))
        check_count(min(config.images, len(real)), extractor.dimension)
    reference = None if extractor is None else features(extractor, real[: config.images], K, config.batch_size)
    rows, files, size = [], {}, config.batch_size
    measured = real[: config.bound_images]
    work = (len(measured) + config.images) * sum(config.steps) * len(config.etas)
    with Progress(work, "tokens") as bar, bar.counting(pipe.unet):
        for S, eta in product(config.steps, config.etas):
            bits = torch.cat([bound(pipe, part, S, eta, config.seed) for part in measured.split(size)])
            seeds = torch.arange(config.seed, config.seed + config.images)
            drawn = torch.cat([draw(pipe, part, S, eta) for part in seeds.split(size)])
            row = {"S": S, "eta": eta, "bits": float(bits.mean()), "bits_error": float(bits.std() / len(bits) ** 0.5)}
            if extractor is not None:
                seen = features(extractor, drawn, K, size)
                row["frechet"] = frechet(gaussian(seen), gaussian(reference))
            rows.append(row)
            shown = (drawn[:64].float() / (K - 1)).permute(0, 2, 3, 1).cpu().numpy()
            lines = [shown[i : i + COLUMNS] for i in range(0, len(shown), COLUMNS)]
            picture = grid(lines, title=f"S = {S}, eta = {eta:g}")
            picture.save(file := io.BytesIO(), format="PNG")
            files[f"samples-S{S:04}-eta{eta:g}.png"] = file.getvalue()
    for name, content in files.items():
        write_file(Path(config.output) / name, content)
    result = record(config) | {
        "results": rows,
        "pictures": sorted(files),
        "bound_images": len(measured),
    }
    write_file(Path(config.output) / WRITTEN[1], table(rows))
    write_json(Path(config.output) / WRITTEN[0], result)
    return result


def bound(pipe: GeneralizedDDIMPipeline, tokens: Tensor, S: int, eta: float, seed: int) -> Tensor:
    """Return the bound of each picture in bits per dimension, (B,)."""
    pipe.scheduler.set_timesteps(S)
    generator = Generator().manual_seed(seed)
    return bound_bits(lambda x, t: pipe.unet(x, t).sample, tokens.to(pipe.device), pipe.scheduler, generator, eta).cpu()


def draw(pipe: GeneralizedDDIMPipeline, seeds: Tensor, S: int, eta: float) -> Tensor:
    """Return tokens (B, C, H, W), each from its own seed."""
    generators = [Generator().manual_seed(seed) for seed in seeds.tolist()]
    return pipe(len(generators), S, eta=eta, generator=generators, output_type="latent").images.cpu()


def features(extractor: Extractor, tokens: Tensor, K: int, batch_size: int) -> np.ndarray:
    """Return the features of tokens shown as bytes, (N, D)."""
    pictures = (tokens * (255 / (K - 1))).round().to(torch.uint8)
    return np.concatenate([extractor(part).features for part in pictures.split(batch_size)])


def table(rows: list[dict[str, Any]]) -> str:
    """Return the results as a table of Markdown."""
    names = [name for name in ("S", "eta", "bits", "frechet") if name in rows[0]]
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    lines += [f"| {' | '.join(f'{row[name]:.4g}' for name in names)} |" for row in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    with guard.program():
        done = main(parse(TokensConfig))
        print(table(done["results"]), end="")
        for name in (*WRITTEN, *done["pictures"]):
            print(Path(done["config"]["output"]) / name)
