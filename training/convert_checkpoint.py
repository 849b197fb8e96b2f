"""Convert a checkpoint of the authors' code, or of pesser's port of Ho's weights, into a pipeline folder.

python training/convert_checkpoint.py --checkpoint ema_diffusion_cifar10_model/model-790000.ckpt --output out/cifar10
"""

import hashlib
import pickle
import re
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from trainer.settings import move_in, parse, record, write_json

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler

WEIGHTS = ("auto", "ema", "raw")
GROUPS = 32
ATTENTION_SIDE = 16
"""All published networks attend where the picture is 16×16, there alone, and in the middle."""

ENDS = {
    "temb.dense.0": "time_embedding.linear_1",
    "temb.dense.1": "time_embedding.linear_2",
    "conv_in": "conv_in",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
}
MIDDLE_BLOCKS = {"mid.block_1": "mid_block.resnets.0", "mid.block_2": "mid_block.resnets.1"}
MIDDLE_ATTENTION = {"mid.attn_1": "mid_block.attentions.0"}
BLOCK = {
    "norm1": "norm1",
    "conv1": "conv1",
    "temb_proj": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "nin_shortcut": "conv_shortcut",
}
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
"""Layers by their names in the checkpoint and in UNet2DModel."""

POINTWISE = ("q", "k", "v", "proj_out")
"""Convolutions 1×1 in the checkpoint, linear layers in UNet2DModel."""

FIXED = {
    "act_fn": "silu",
    "attention_head_dim": None,  # one head, as wide as the level
    "downsample_padding": 0,  # that is (0, 1, 0, 1)
    "flip_sin_to_cos": False,
    "freq_shift": 1,  # frequencies 10000^(−i/(n−1)), i = 0, …, n−1
    "norm_eps": 1e-6,
    "norm_num_groups": GROUPS,
}
"""What all networks of this layout share, and no tensor tells."""

PUBLISHED = {
    "82ed3067fd1002f5cf4c339fb80c4669": "cifar10",
    "1fa350b952534ae442b1d5235cce5cd3": "ema_cifar10",
    "f70280ac0e08b8e696f42cb8e948ff1c": "lsun_bedroom",
    "1921fa46b66a3665e450e42f36c2720f": "ema_lsun_bedroom",
    "bbee0e7c3d7abfb6e2539eaf2fb9987b": "lsun_cat",
    "646f23f4821f2459b8bafc57fd824558": "ema_lsun_cat",
    "eb619b8a5ab95ef80f94ce8a5488dae3": "lsun_church",
    "fdc68a23938c2397caba4a260bc2445f": "ema_lsun_church",
}
"""pesser's files by the MD5 published with them. Each holds one set of weights, and does not say which."""

RECORD, PART = "conversion.json", "pipeline.part"


@dataclass(frozen=True)
class ConvertConfig:
    """Convert a PyTorch checkpoint of the authors' network (CIFAR-10, CelebA, LSUN, or your own) into a pipeline.

    The network's layout is found from its tensors. Nothing but tensors, numbers and lists of them is ever unpickled.
    """

    checkpoint: str = field(metadata={"help": "ckpt.pth of the authors, model-….ckpt of pesser, or .safetensors"})
    output: str = field(metadata={"help": "folder for the pipeline"})
    weights: str = field(
        default="auto", metadata={"help": "ema, raw, or auto: the averaged ones where the file has two sets"}
    )
    resolution: int | None = field(
        default=None, metadata={"help": "side of the pictures; by default the one at which attention is at 16×16"}
    )
    dropout: float = field(default=0.0, metadata={"help": "for training on; the authors have 0.1, for LSUN 0"})
    num_train_timesteps: int = field(default=1000, metadata={"help": "T"})
    beta_schedule: str = field(default="linear", metadata={"help": "β by name; linear in all published networks"})
    beta_start: float = field(default=1e-4, metadata={"help": "the first β"})
    beta_end: float = field(default=0.02, metadata={"help": "the last β"})
    overwrite: bool = field(default=False, metadata={"help": "replace an earlier conversion"})


def check(config: ConvertConfig) -> None:
    """Raise ValueError for settings that cannot work, before anything is read."""
    if config.weights not in WEIGHTS:
        raise ValueError(f"unknown weights {config.weights!r}: use {', '.join(WEIGHTS)}")
    if config.resolution is not None and config.resolution < 1:
        raise ValueError(f"resolution must be positive, not {config.resolution}")
    if not 0 <= config.dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), not {config.dropout}")
    output = Path(config.output)
    if Path(config.checkpoint).resolve().is_relative_to(output.resolve()):
        raise ValueError(f"the checkpoint {config.checkpoint} lies in the output {config.output}: keep them apart")
    if output.exists() and not output.is_dir():
        raise ValueError(f"the output {config.output} is a file: choose a folder")
    there = {part.name for part in output.iterdir()} - {PART} if output.exists() else set()
    if there and RECORD not in there:
        raise ValueError(f"the output {config.output} holds something else than a conversion: choose another folder")
    if there and not config.overwrite:
        raise ValueError(f"the output {config.output} holds a conversion: choose another folder, or pass --overwrite")


# ---- the file ------------------------------------------------------------------------------------------------------


def fingerprint(path: Path) -> dict[str, str | None]:
    """The name of a file, its SHA-256, and which of pesser's it is, if any. Raises OSError where there is none."""
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            sha256.update(block)
            md5.update(block)
    return {"file": path.name, "sha256": sha256.hexdigest(), "published": PUBLISHED.get(md5.hexdigest())}


def read(path: Path) -> Any:
    """What a checkpoint holds: tensors on the CPU, numbers, lists and dictionaries. Raises ValueError for any other."""
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"not a file of safetensors, or damaged: {error}") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes of any kind reach the reader, which fails in as many ways
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and asked:
            raise ValueError(
                f"it asks for {asked[1]} to be loaded, which could run code: nothing but tensors, numbers and lists of "
                "them is ever unpickled"
            ) from error
        detail = f": {str(error).splitlines()[0]}" if isinstance(error, RuntimeError) and str(error) else ""
        raise ValueError(f"not a checkpoint of PyTorch, or damaged{detail}") from error


def sets(content: Any, published: str | None) -> dict[str, Mapping[str, Tensor]]:
    """The sets of weights in a file, by kind: "raw", "ema", or "unlabelled" where there is one and nothing says which.

    The authors save a list [network, optimiser, epoch, step], and the averaged weights after it if they keep any;
    pesser one set a file.
    """
    if isinstance(content, list) and len(content) in (4, 5):
        both = zip(("raw", "ema"), (content[0], *content[4:]), strict=False)
        found = {kind: weights for kind, weights in both if weights is not None}
    else:
        kind = "unlabelled" if published is None else "ema" if published.startswith("ema_") else "raw"
        found = {kind: content}
    for kind, weights in found.items():
        tensors = isinstance(weights, Mapping) and all(isinstance(each, Tensor) for each in weights.values())
        if not tensors or not weights or not all(isinstance(name, str) for name in weights):
            what = "this file" if len(found) == 1 else f"the set of {kind} weights"
            raise ValueError(
                f"{what} is no dictionary of tensors by name, nor a list [network, optimiser, epoch, step, averages]"
            )
    return found


def choose(found: dict[str, Mapping[str, Tensor]], wanted: str) -> tuple[str, dict[str, Tensor]]:
    """The kind of the set that is wanted, and its tensors, by names without the "module." of several devices."""
    kind = wanted if wanted != "auto" else "ema" if "ema" in found else next(iter(found))
    if kind not in found and "unlabelled" in found:
        raise ValueError(
            f"the file holds one set of weights and does not say whether it is {kind}: pass --weights auto"
        )
    if kind not in found:
        raise ValueError(f"the file has no {kind} weights, only {', '.join(found)}")
    prefix = "module." if all(name.startswith("module.") for name in found[kind]) else ""
    return kind, {name.removeprefix(prefix): value for name, value in found[kind].items()}


def check_values(weights: Mapping[str, Tensor]) -> None:
    """Raise ValueError for tensors that are not dense, real and finite in float32."""
    for name, value in weights.items():
        if value.layout != torch.strided or not value.is_floating_point() or value.device.type != "cpu":
            raise ValueError(f"{name} is no dense tensor of real numbers, but {value.dtype}, {value.layout}")
    broken = [name for name, value in weights.items() if not value.float().isfinite().all()]
    if broken:
        raise ValueError(f"{listed(broken)}: not finite")


def listed(names: Iterable[str], most: int = 3) -> str:
    """The first few names, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# ---- the network ---------------------------------------------------------------------------------------------------


def architecture(weights: Mapping[str, Tensor], resolution: int | None, dropout: float) -> dict[str, Any]:
    """The settings of the UNet2DModel that tensors of these names and shapes belong to.

    `resolution` and `dropout` are not in them; None finds the former, from the level that has attention.
    Raises ValueError for another layout, and for what the layout allows and UNet2DModel does not.
    """

    def conv(name: str) -> tuple[int, int]:
        """Channels out and in of a convolution."""
        if f"{name}.weight" not in weights or weights[f"{name}.weight"].ndim != 4:
            raise ValueError(f"there is no convolution {name}: this is no network of the authors' layout")
        return tuple(weights[f"{name}.weight"].shape[:2])

    levels = count(weights, "down.")
    (first, channels), (out_channels, _) = conv("conv_in"), conv("conv_out")
    widths = [conv(f"down.{i}.block.0.conv1")[0] for i in range(levels)]
    if first not in widths[:1]:
        raise ValueError(f"conv_in has {first} channels and the levels {widths}: UNet2DModel needs the first two equal")
    if any(width % GROUPS or not width for width in widths):
        raise ValueError(f"the levels have {widths} channels: {GROUPS} groups need multiples of {GROUPS}")
    if out_channels != channels:
        raise ValueError(f"the network has {channels} channels in and {out_channels} out: ε needs as many as x_t")
    if levels > 1 and not any("sample.conv" in name for name in weights):
        raise ValueError("the network has no convolutions between its levels: UNet2DModel always has")
    attending = [i for i in range(levels) if count(weights, f"down.{i}.attn.")]
    if resolution is None:
        if len(attending) != 1:
            raise ValueError(f"there is attention at {len(attending)} levels, not at one of 16×16: pass --resolution")
        resolution = ATTENTION_SIDE * 2 ** attending[0]
    if resolution % 2 ** (levels - 1):
        raise ValueError(f"pictures of {resolution}×{resolution} cannot be halved {levels - 1} times")
    prefixes = ["Attn" if i in attending else "" for i in range(levels)]
    return FIXED | {
        "sample_size": resolution,
        "in_channels": channels,
        "out_channels": out_channels,
        "block_out_channels": widths,
        "layers_per_block": count(weights, "down.0.block."),
        "down_block_types": [f"{prefix}DownBlock2D" for prefix in prefixes],
        "up_block_types": [f"{prefix}UpBlock2D" for prefix in reversed(prefixes)],
        "dropout": dropout,
    }


def count(names: Iterable[str], prefix: str) -> int:
    """How many different parts follow a prefix: modules in a list."""
    return len({name[len(prefix) :].split(".")[0] for name in names if name.startswith(prefix)})


def layers(levels: int, blocks: int) -> dict[str, str]:
    """Every layer that a network of this layout can have: its name in the checkpoint, its name in UNet2DModel."""
    found, residual, attention = dict(ENDS), dict(MIDDLE_BLOCKS), dict(MIDDLE_ATTENTION)
    for i in range(levels):
        down, up = f"down_blocks.{i}", f"up_blocks.{levels - 1 - i}"
        for theirs, ours, number in ((f"down.{i}", down, blocks), (f"up.{i}", up, blocks + 1)):
            residual |= {f"{theirs}.block.{j}": f"{ours}.resnets.{j}" for j in range(number)}
            attention |= {f"{theirs}.attn.{j}": f"{ours}.attentions.{j}" for j in range(number)}
        found |= {f"down.{i}.downsample.conv": f"{down}.downsamplers.0.conv"}
        found |= {f"up.{i}.upsample.conv": f"{up}.upsamplers.0.conv"}
    for places, inside in ((residual, BLOCK), (attention, ATTENTION)):
        found |= {f"{theirs}.{a}": f"{ours}.{b}" for theirs, ours in places.items() for a, b in inside.items()}
    return found


def translate(weights: Mapping[str, Tensor], unet: UNet2DModel) -> dict[str, Tensor]:
    """The state of `unet`, in float32: each tensor used once, each parameter filled once. Raises ValueError if not."""
    parameters, names = unet.state_dict(), {}
    for theirs, ours in layers(len(unet.config.block_out_channels), unet.config.layers_per_block).items():
        names |= {f"{theirs}.{kind}": f"{ours}.{kind}" for kind in ("weight", "bias") if f"{ours}.{kind}" in parameters}
    for what, those in (("missing", names.keys() - weights.keys()), ("unexpected", weights.keys() - names.keys())):
        if those:
            raise ValueError(f"{len(those)} tensors are {what}: {listed(those)}")
    state = {}
    for theirs, ours in names.items():
        value, shape = weights[theirs], tuple(parameters[ours].shape)
        needed = (*shape, 1, 1) if theirs.split(".")[-2] in POINTWISE and len(shape) == 2 else shape
        if tuple(value.shape) != needed:
            raise ValueError(f"{theirs} has shape {tuple(value.shape)}, not {needed}")
        state[ours] = value.reshape(shape).to(torch.float32, copy=True).contiguous()
    return state


def network(weights: Mapping[str, Tensor], resolution: int | None, dropout: float) -> UNet2DModel:
    """The UNet2DModel with these weights."""
    with torch.device("meta"):
        unet = UNet2DModel(**architecture(weights, resolution, dropout))
    unet.load_state_dict(translate(weights, unet), assign=True)
    return unet.eval()


# ---- the conversion ------------------------------------------------------------------------------------------------


def main(config: ConvertConfig) -> dict[str, Any]:
    """Write the pipeline and `conversion.json`; return what the latter holds."""
    check(config)
    keys = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end")
    scheduler = GeneralizedDDIMScheduler(**{key: getattr(config, key) for key in keys})
    path = Path(config.checkpoint)
    source = fingerprint(path)
    try:
        content = read(path)
        kind, weights = choose(sets(content, source["published"]), config.weights)
        check_values(weights)
        unet = network(weights, config.resolution, config.dropout)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    trained = {"epoch": content[2], "step": content[3]} if isinstance(content, list) else {}
    settings = {key: value for key, value in unet.config.items() if not key.startswith("_")}
    result = record(config) | {
        "source": source | {key: value for key, value in trained.items() if type(value) is int},
        "weights": kind,
        "tensors": len(weights),
        "parameters": unet.num_parameters(),
        "unet": settings,
    }
    save(GeneralizedDDIMPipeline(unet, scheduler), result, Path(config.output))
    return result


def save(pipe: GeneralizedDDIMPipeline, result: dict[str, Any], output: Path) -> None:
    """The pipeline and its record, written aside and moved into place, the record first. Other files there stay."""
    aside = output / PART
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        pipe.save_pretrained(aside)
        write_json(aside / RECORD, result)
        (aside / RECORD).replace(output / RECORD)
        move_in(aside, output)
    except SafetensorError as error:
        raise OSError(f"cannot save the pipeline: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


if __name__ == "__main__":
    arguments = parse(ConvertConfig)
    try:
        done = main(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"convert_checkpoint.py: {error}")
    side = done["unet"]["sample_size"]
    print(
        f"{arguments.output}: {done['weights']} weights, {done['parameters']:,} parameters, pictures of {side}×{side}"
    )
