"""Reading checkpoints of the authors' network, and translating their weights for UNet2DModel."""

import hashlib
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

GROUPS = 32
ATTENTION_SIDE = 16
"""All published networks have attention at the level of 16×16, at no other, and in the middle."""

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
"""Names of layers in the checkpoint and in UNet2DModel."""

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
"""Settings that all networks of this layout share, and that the tensors do not determine."""

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
"""pesser's files by the MD5 published with them. Each holds one set of weights, without its kind."""


# ---- the file ------------------------------------------------------------------------------------------------------


def fingerprint(path: Path) -> dict[str, str | None]:
    """Return the name of a file, its SHA-256, and which of pesser's it is, if any. Raises OSError if it is missing."""
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            sha256.update(block)
            md5.update(block)
    return {"file": path.name, "sha256": sha256.hexdigest(), "published": PUBLISHED.get(md5.hexdigest())}


def read(path: Path) -> Any:
    """Read a checkpoint of tensors, numbers, lists and dictionaries, onto the CPU.

    Raises ValueError for anything else: no code in the file is ever run.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"not a file of safetensors, or damaged: {error}") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the reader fails in many ways on arbitrary bytes
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and asked:
            raise ValueError(
                f"it asks to load {asked[1]}, which could run code: only tensors, numbers and lists are unpickled"
            ) from error
        detail = f": {str(error).splitlines()[0]}" if isinstance(error, RuntimeError) and str(error) else ""
        raise ValueError(f"not a checkpoint of PyTorch, or damaged{detail}") from error


def sets(content: Any, published: str | None) -> dict[str, Mapping[str, Tensor]]:
    """Return the sets of weights in a file by kind: "raw", "ema", or "unlabelled" for one of unknown kind.

    The authors save a list [network, optimiser, epoch, step], with the averaged weights at its end if they keep any.
    pesser saves one set a file.

    Args:
        content: what `read` returned.
        published: name of the file if it is one of pesser's (see `fingerprint`).
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
    """Return the kind of the set that is wanted and its tensors by name.

    `wanted` is "auto" (averaged weights if there are any), "ema" or "raw". The prefix "module." of DataParallel is
    removed.
    """
    kind = wanted if wanted != "auto" else "ema" if "ema" in found else next(iter(found))
    if kind not in found and "unlabelled" in found:
        raise ValueError(f"the file holds one set of weights, which is not known to be {kind}: pass --weights auto")
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
    """Join the first few names, and the number of others."""
    names = sorted(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# ---- the network ---------------------------------------------------------------------------------------------------


def architecture(weights: Mapping[str, Tensor], resolution: int | None, dropout: float) -> dict[str, Any]:
    """Find the settings of the UNet2DModel that tensors of these names and shapes belong to.

    Args:
        resolution: side of the pictures; None finds it from the level that has attention.
        dropout: copied to the settings, as the tensors do not determine it.

    Raises:
        ValueError: for another layout, and for one that UNet2DModel does not have.
    """

    def conv(name: str) -> tuple[int, int]:
        """Return the channels out and in of a convolution."""
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
    """Count the different parts that follow a prefix: modules in a list."""
    return len({name[len(prefix) :].split(".")[0] for name in names if name.startswith(prefix)})


def layers(levels: int, blocks: int) -> dict[str, str]:
    """Map the names of all layers that the layout can have, from the checkpoint's to UNet2DModel's."""
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
    """Translate weights to the state of `unet`, in float32.

    Raises ValueError unless each tensor is used once and each parameter filled once.
    """
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
    """Build the UNet2DModel with these weights."""
    with torch.device("meta"):
        unet = UNet2DModel(**architecture(weights, resolution, dropout))
    unet.load_state_dict(translate(weights, unet), assign=True)
    return unet.eval()
