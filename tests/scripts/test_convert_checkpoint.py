"""Checkpoints of the authors' network become pipelines that compute the same."""

import hashlib
import json
import math
import pickle
import re
import runpy
import sys
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import convert_checkpoint as script
import pytest
import torch
import torch.nn.functional as F
import trials
from diffusers import UNet2DModel
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from trainer import convert as convert_
from trainer.settings import build, read_toml

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler

ROOT = Path(__file__).parents[2]
TIMES = (0, 1, 250, 499, 998, 999)

# ---- the authors' network: their names for its parts, since checkpoints have them, and the mathematics of each -------


def norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


class Residual(nn.Module):
    def __init__(self, channels_in, channels_out, features):
        super().__init__()
        self.norm1, self.conv1 = norm(channels_in), nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.temb_proj = nn.Linear(features, channels_out)
        self.norm2, self.conv2 = norm(channels_out), nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else None

    def forward(self, x, time):
        h = self.conv1(F.silu(self.norm1(x))) + self.temb_proj(F.silu(time))[..., None, None]
        return self.conv2(F.silu(self.norm2(h))) + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class Attention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x, time):
        q, k, v = (each(self.norm(x)).flatten(2) for each in (self.q, self.k, self.v))
        share = (torch.einsum("bci, bcj -> bij", q, k) / math.sqrt(q.shape[1])).softmax(-1)
        return x + self.proj_out(torch.einsum("bij, bcj -> bci", share, v).view_as(x))


def level(blocks, attends, **resample):
    """A level of the U-Net: blocks, each with attention after it or none."""
    attention = [Attention(block.conv2.out_channels) for block in blocks] if attends else []
    parts = {"block": nn.ModuleList(blocks), "attn": nn.ModuleList(attention)}
    return nn.ModuleDict(parts | {key: nn.ModuleDict({"conv": conv}) for key, conv in resample.items()})


class AuthorsNetwork(nn.Module):
    """ε(x_t, t); `attention` are the levels that have it, level i of pictures 2^i times smaller."""

    def __init__(self, ch, ch_mult, blocks, attention, channels=3):
        super().__init__()
        self.ch, widths, features = ch, [ch * factor for factor in ch_mult], 4 * ch
        self.temb = nn.ModuleDict({"dense": nn.ModuleList([nn.Linear(ch, features), nn.Linear(features, features)])})
        self.conv_in = nn.Conv2d(channels, ch, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        width, skips = ch, [ch]
        for i, wider in enumerate(widths):
            inputs = [width] + [wider] * (blocks - 1)
            last = i == len(widths) - 1
            resample = {} if last else {"downsample": nn.Conv2d(wider, wider, 3, stride=2)}
            made = [Residual(each, wider, features) for each in inputs]
            self.down.append(level(made, i in attention, **resample))
            skips += [wider] * (blocks + (not last))
            width = wider
        block_1, attn_1, block_2 = Residual(width, width, features), Attention(width), Residual(width, width, features)
        self.mid = nn.ModuleDict({"block_1": block_1, "attn_1": attn_1, "block_2": block_2})
        for i, narrower in reversed(list(enumerate(widths))):
            made = []
            for _ in range(blocks + 1):
                made.append(Residual(width + skips.pop(), narrower, features))
                width = narrower
            resample = {"upsample": nn.Conv2d(width, width, 3, padding=1)} if i else {}
            self.up.insert(0, level(made, i in attention, **resample))
        self.norm_out, self.conv_out = norm(width), nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x, t):
        def attended(each, j, h):
            return each["attn"][j](h, time) if len(each["attn"]) else h

        n = self.ch // 2
        angles = t.double()[:, None] * 10000.0 ** (-torch.arange(n, dtype=torch.float64) / (n - 1))
        first, second = self.temb["dense"]
        time = second(F.silu(first(torch.cat([angles.sin(), angles.cos()], 1).to(x.dtype))))
        h = self.conv_in(x)
        skips = [h]
        for each in self.down:
            for j, block in enumerate(each["block"]):
                h = attended(each, j, block(h, time))
                skips.append(h)
            if "downsample" in each:
                h = each["downsample"]["conv"](F.pad(h, (0, 1, 0, 1)))  # a row below, a column to the right
                skips.append(h)
        for part in self.mid.values():
            h = part(h, time)
        for each in reversed(self.up):
            for j, block in enumerate(each["block"]):
                h = attended(each, j, block(torch.cat([h, skips.pop()], 1), time))
            if "upsample" in each:
                h = each["upsample"]["conv"](h.repeat_interleave(2, -1).repeat_interleave(2, -2))
        return self.conv_out(F.silu(self.norm_out(h)))


class Shape(NamedTuple):
    """A network, and the side of its pictures."""

    ch: int
    ch_mult: tuple[int, ...]
    blocks: int
    attention: tuple[int, ...]
    side: int
    channels: int = 3

    def network(self):
        return AuthorsNetwork(*self[:4], self.channels)


CIFAR10 = Shape(32, (1, 2, 2, 2), 2, (1,), 32)
SMALL = {
    "cifar10": CIFAR10,
    "celeba": Shape(32, (1, 2, 2, 2, 4), 1, (2,), 64),
    "lsun": Shape(32, (1, 1, 2, 2, 4, 4), 1, (4,), 256),
    "grey": Shape(64, (1, 3), 3, (0,), 16, channels=1),
}
PUBLISHED = {
    "cifar10": (Shape(128, (1, 2, 2, 2), 2, (1,), 32), 35_746_307),
    "celeba64": (Shape(128, (1, 2, 2, 2, 4), 2, (2,), 64), 78_700_803),
    "lsun_bedroom256": (Shape(128, (1, 1, 2, 2, 4, 4), 2, (4,), 256), 113_673_219),
    "lsun_church256": (Shape(128, (1, 1, 2, 2, 4, 4), 2, (4,), 256), 113_673_219),
}


def random_network(shape, seed=0):
    """No weight is zero or one; attention is far from even; a first picture so faint that the norms' ε counts.

    Times count less: in float32 the angle t is uncertain by 5e-5 at t = 999, in the authors' code as in diffusers.
    """
    network, generator = shape.network(), torch.Generator().manual_seed(seed)
    for name, weight in network.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        gain = 2.0 if re.search(r"\.[qk]\.", name) else 1.0
        scaled = gain * noise / math.sqrt(weight[0].numel()) if weight.ndim > 1 else 0.2 * noise
        weight.data = 1 + scaled if "norm" in name and name.endswith("weight") else scaled
    for weight, factor in (
        (network.conv_in.weight, 0.02),
        (network.conv_in.bias, 0.02),
        (network.temb["dense"][0].weight, 0.1),
    ):
        weight.data *= factor
    return network.eval().requires_grad_(False)


def several_devices(weights):
    """Names as `DataParallel` has them."""
    return OrderedDict((f"module.{name}", value) for name, value in weights.items())


def training_state(raw, ema=None):
    """What the authors' training saves."""
    wrapped = nn.ModuleDict({"module": raw})
    optimizer = torch.optim.Adam(wrapped.requires_grad_(True).parameters(), lr=2e-4)
    sum(weight.sum() for weight in raw.parameters()).backward()
    optimizer.step()
    raw.requires_grad_(False)
    averages = [] if ema is None else [{name: value.data for name, value in ema.named_parameters()}]
    return [several_devices(raw.state_dict()), optimizer.state_dict(), 3, 790, *averages]


def convert(checkpoint, output, **settings):
    values = {"checkpoint": str(checkpoint), "output": str(output)} | settings
    return script.main(build(script.ConvertConfig, values))


def difference(network, unet, side):
    """The largest |ε − ε̂| of pictures at `TIMES`, and the standard deviation of ε, in float64."""
    channels, t = network.conv_in.in_channels, torch.tensor(TIMES)
    x = torch.randn((len(TIMES), channels, side, side), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        eps = network.double()(x, t)
        off = (unet.double()(x, t).sample - eps).abs().amax((1, 2, 3))
    network.float(), unet.float()
    return off, float(eps.std())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A training checkpoint of a small network, with averages: the file, the network, and that of the averages."""
    raw, ema = random_network(CIFAR10), random_network(CIFAR10, seed=1)
    path = tmp_path_factory.mktemp("checkpoint") / "ckpt.pth"
    torch.save(training_state(raw, ema), path)
    return path, raw, ema


@pytest.fixture(scope="module")
def weights():
    """A state dictionary to spoil, the smallest that the layout allows."""
    return random_network(Shape(32, (1, 1), 1, (0,), 16)).state_dict()


# ---- the same function -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_the_pipeline_computes_what_the_network_does(name, tmp_path):
    shape = SMALL[name]
    network = random_network(shape)
    torch.save(network.state_dict(), tmp_path / "model-790000.ckpt")
    result = convert(tmp_path / "model-790000.ckpt", tmp_path / "out")
    pipe = GeneralizedDDIMPipeline.from_pretrained(tmp_path / "out")
    assert pipe.image_size == (shape.side, shape.side)
    assert result["weights"] == "unlabelled"
    assert result["parameters"] == sum(weight.numel() for weight in network.parameters())
    off, scale = difference(network, pipe.unet, 2 ** len(shape.ch_mult))  # 2×2 at the lowest level
    assert 0.3 < scale < 30
    assert off.max() < 1e-5
    assert off[0] < 1e-12  # at t = 0, where no angle is rounded


def test_the_comparison_sees_every_peculiarity():
    """Each setting that no tensor tells, and each exchange of equal shapes, is far beyond the tolerance."""
    network = random_network(CIFAR10)
    state = network.state_dict()
    right = convert_.network(state, None, 0.0)
    assert difference(network, right, 16)[0].max() < 1e-5
    others = {
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "downsample_padding": 1,
        "norm_eps": 1e-5,
        "norm_num_groups": 16,
        "attention_head_dim": 8,
        "act_fn": "gelu",
    }
    assert others.keys() == convert_.FIXED.keys()
    for key, value in others.items():
        unet = UNet2DModel.from_config(dict(right.config) | {key: value}).eval()
        unet.load_state_dict(right.state_dict())
        assert difference(network, unet, 16)[0].max() > 1e-3, key
    for one, other in (("q", "k"), ("k", "v"), ("v", "proj_out")):
        swapped = state | {
            f"down.1.attn.0.{a}.weight": state[f"down.1.attn.0.{b}.weight"] for a, b in ((one, other), (other, one))
        }
        assert difference(network, convert_.network(swapped, None, 0.0), 16)[0].max() > 1e-3, one


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_are_those_of_the_presets(name):
    """At full size, without numbers: names and shapes fit, and the layout found is the preset's."""
    shape, parameters = PUBLISHED[name]
    with torch.device("meta"):
        state = shape.network().state_dict()
    unet = convert_.network(state, None, 0.0)
    assert unet.num_parameters() == parameters
    assert unet.config.sample_size == shape.side
    for key, value in read_toml(ROOT / "training" / "configs" / f"{name}.toml")["unet"].items():
        expected = {"none": None}.get(value, value) if isinstance(value, str) else value
        assert unet.config[key] == expected or key == "dropout", key


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wanted", "kind"), [("auto", "ema"), ("ema", "ema"), ("raw", "raw")])
def test_a_training_checkpoint_has_two_sets(checkpoint, tmp_path, wanted, kind):
    path, raw, ema = checkpoint
    result = convert(path, tmp_path / "out", weights=wanted)
    assert result["weights"] == kind
    unet = GeneralizedDDIMPipeline.from_pretrained(tmp_path / "out").unet
    right, wrong = (raw, ema) if kind == "raw" else (ema, raw)
    assert difference(right, unet, 16)[0].max() < 1e-5
    assert difference(wrong, unet, 16)[0].max() > 1e-2


def test_a_process_writes_a_pipeline_and_its_record(checkpoint, tmp_path):
    path, _, ema = checkpoint
    command = ["training/convert_checkpoint.py", "--checkpoint", path, "--output", tmp_path / "new" / "out"]
    command += ["--dropout", "0.1", "--beta_end", "0.03", "--num_train_timesteps", "500", "--resolution", "16"]
    done = trials.Fork(trials.script, *command).wait()
    assert done.returncode == 0, done.stdout + done.stderr
    parameters = sum(weight.numel() for weight in ema.parameters())
    assert f"out: ema weights, {parameters:,} parameters, pictures of 16×16" in done.stdout
    record = json.loads((tmp_path / "new" / "out" / "conversion.json").read_text())
    assert record["source"]["file"] == "ckpt.pth"
    assert re.fullmatch(r"[0-9a-f]{64}", record["source"]["sha256"])
    assert (record["source"]["epoch"], record["source"]["step"], record["source"]["published"]) == (3, 790, None)
    assert record["tensors"] == len(ema.state_dict())
    assert record["unet"]["block_out_channels"] == [32, 64, 64, 64]
    assert record["versions"].keys() >= {"torch", "diffusers", "ddim-plugin"}
    pipe = GeneralizedDDIMPipeline.from_pretrained(tmp_path / "new" / "out")
    assert isinstance(pipe.scheduler, GeneralizedDDIMScheduler)
    assert not pipe.scheduler.config.clip_sample
    assert (pipe.scheduler.config.num_train_timesteps, pipe.scheduler.config.beta_end) == (500, 0.03)
    assert pipe.unet.config.dropout == 0.1
    assert not pipe.unet.training
    assert pipe(2, 2, output_type="np").images.shape == (2, 16, 16, 3)


def test_an_error_is_one_line(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["x", "--checkpoint", str(checkpoint[0]), "--output", str(tmp_path), "--dropout", "2"]
    )
    with pytest.raises(SystemExit, match=r"^convert_checkpoint\.py: dropout must be in \[0, 1\), not 2.0$"):
        runpy.run_path(script.__file__, run_name="__main__")


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors", "devices", "half"])
def test_kinds_of_files(weights, tmp_path, kind):
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.ckpt")
    if kind == "safetensors":
        save_file(weights, path)
    else:
        given = several_devices(weights) if kind == "devices" else weights
        given = {name: value.half() for name, value in given.items()} if kind == "half" else given
        torch.save(given, path, _use_new_zipfile_serialization=kind != "legacy")
    convert(path, tmp_path / "out")
    state = GeneralizedDDIMPipeline.from_pretrained(tmp_path / "out").unet.state_dict()
    assert len(state) == len(weights)
    given = weights["conv_in.weight"].half().float() if kind == "half" else weights["conv_in.weight"]
    assert torch.equal(state["conv_in.weight"], given)


def test_tensors_that_share_memory(weights, tmp_path):
    """Parameters may be views of one vector."""
    vector = torch.cat([value.flatten() for value in weights.values()])
    parts = vector.split([value.numel() for value in weights.values()])
    views = {name: part.view_as(value) for (name, value), part in zip(weights.items(), parts, strict=True)}
    torch.save(views, tmp_path / "w.ckpt")
    convert(tmp_path / "w.ckpt", tmp_path / "out")
    state = GeneralizedDDIMPipeline.from_pretrained(tmp_path / "out").unet.state_dict()
    assert torch.equal(state["conv_out.bias"], weights["conv_out.bias"])


def test_published_files_are_known(weights, tmp_path, monkeypatch):
    torch.save(weights, tmp_path / "w.ckpt")
    md5 = hashlib.md5((tmp_path / "w.ckpt").read_bytes()).hexdigest()
    for name, kind, other in (("ema_lsun_cat", "ema", "raw"), ("lsun_cat", "raw", "ema")):
        monkeypatch.setitem(convert_.PUBLISHED, md5, name)
        result = convert(tmp_path / "w.ckpt", tmp_path / name)
        assert (result["weights"], result["source"]["published"]) == (kind, name)
        with pytest.raises(ValueError, match=f"the file has no {other} weights, only {kind}"):
            convert(tmp_path / "w.ckpt", tmp_path / "out", weights=other)


# ---- refusals --------------------------------------------------------------------------------------------------------


class Malice:
    """A file that is made when this is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "optimiser"])
def test_no_code_is_run(weights, tmp_path, kind):
    target, path, malice = tmp_path / "made", tmp_path / "w.ckpt", {**weights, "x": Malice(tmp_path / "made")}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(malice, protocol=2))
    elif kind == "optimiser":  # a part of the file that is not needed
        torch.save([weights, malice["x"], 0, 0], path)
    else:
        torch.save(malice, path, _use_new_zipfile_serialization=kind == "zip")
    asked = r"torch.storage\S+" if kind == "pickle" else r"\w+.open"
    with pytest.raises(ValueError, match=rf"w.ckpt: it asks to load {asked}, which could run code"):
        convert(path, tmp_path / "out")
    assert not target.exists()
    assert not (tmp_path / "out").exists()
    pickle.loads(path.read_bytes()) if kind == "pickle" else torch.load(path, weights_only=False)
    assert target.exists()  # it would have been


def shortened(weights, *names):
    return {name: value for name, value in weights.items() if not name.startswith(names)}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda w: shortened(w, "mid.block_2.norm1"), r"2 tensors are missing: mid.block_2.norm1.bias, mid.block_2"),
        (lambda w: shortened(w, "up.0"), r"\d\d tensors are missing: up.0.attn.0.k.bias, .* and \d\d more"),
        (lambda w: shortened(w, "conv_in"), "there is no convolution conv_in: this is no network of the authors'"),
        (lambda w: shortened(w, "down.0.block"), "there is no convolution down.0.block.0.conv1"),
        (lambda w: shortened(w, "down.0.downsample", "up.1.upsample"), "no convolutions between its levels"),
        (lambda w: shortened(w, "down.0.attn", "up.0.attn"), "attention at 0 levels, .* pass --resolution"),
        (lambda w: w | {"logvar": torch.zeros(1000)}, "1 tensors are unexpected: logvar"),
        (lambda w: w | {"module.conv_in.weight": w["conv_in.weight"]}, "unexpected: module.conv_in.weight"),
        (lambda w: w | {"conv_in.weight": w["conv_in.weight"][:, :, 0]}, "there is no convolution conv_in"),
        (
            lambda w: w | {"mid.attn_1.q.weight": w["mid.attn_1.q.weight"][:, :, 0, 0]},
            r"mid.attn_1.q.weight has shape \(32, 32\), not \(32, 32, 1, 1\)",
        ),
        (lambda w: w | {"temb.dense.0.bias": torch.ones(64)}, r"temb.dense.0.bias has shape \(64,\), not \(128,\)"),
        (
            lambda w: w | {"conv_in.weight": torch.ones(64, 3, 3, 3)},
            r"conv_in has 64 channels and the levels \[32, 32\]",
        ),
        (lambda w: w | {"conv_out.weight": torch.ones(6, 32, 3, 3)}, "3 channels in and 6 out: ε needs as many as x_t"),
        (lambda w: w | {"down.1.block.0.conv1.weight": torch.ones(48, 32, 3, 3)}, "32 groups need multiples of 32"),
        (lambda w: w | {"conv_in.bias": torch.full((32,), math.nan)}, "conv_in.bias: not finite"),
        (lambda w: w | {"conv_in.bias": torch.full((32,), 1e300, dtype=torch.float64)}, "conv_in.bias: not finite"),
        (lambda w: w | {"conv_in.bias": torch.ones(32).int()}, "conv_in.bias is no dense tensor .* torch.int32"),
        (lambda w: w | {"conv_in.bias": torch.ones(32).to_sparse()}, "conv_in.bias is no dense tensor .*sparse"),
        (lambda w: w | {"conv_in.bias": torch.ones(32, device="meta")}, "conv_in.bias is no dense tensor"),
        (lambda w: {}, "this file is no dictionary of tensors by name"),
        (lambda w: {"state_dict": w}, "this file is no dictionary of tensors by name"),
        (lambda w: w["conv_in.weight"], "this file is no dictionary of tensors by name"),
        (lambda w: [w], "this file is no dictionary of tensors by name"),
        (lambda w: {1: w["conv_in.weight"]}, "this file is no dictionary of tensors by name"),
        (lambda w: [w, {}, 1, 2, 3], "the set of ema weights is no dictionary of tensors by name"),
    ],
)
def test_other_tensors_are_refused(weights, tmp_path, spoil, message):
    torch.save(spoil(weights), tmp_path / "w.ckpt")
    with pytest.raises(ValueError, match=f"w.ckpt: .*{message}"):
        convert(tmp_path / "w.ckpt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["w.ckpt", "w.safetensors"])
@pytest.mark.parametrize("kind", ["short", "empty", "text", "page"])
def test_what_is_no_checkpoint(weights, tmp_path, name, kind):
    path = tmp_path / name
    save_file(weights, path) if path.suffix == ".safetensors" else torch.save(weights, path)
    whole = path.read_bytes()
    path.write_bytes({"short": whole[:-999], "empty": b"", "text": b"hello", "page": b"<!DOCTYPE html>"}[kind])
    with pytest.raises(ValueError, match=f"{name}: not a (checkpoint of PyTorch|file of safetensors), or damaged"):
        convert(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weights": "averaged"}, "unknown weights 'averaged': use auto, ema, raw"),
        ({"weights": "ema"}, "holds one set of weights, which is not known to be ema: pass --weights auto"),
        ({"resolution": 0}, "resolution must be positive, not 0"),
        ({"resolution": 9}, "pictures of 9×9 cannot be halved 1 times"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), not 1.0"),
        ({"dropout": math.nan}, r"dropout must be in \[0, 1\), not nan"),
        ({"beta_schedule": "wavy"}, "wavy"),
        ({"beta_end": 2.0}, "beta|β"),
        ({"num_train_timesteps": 0}, "num_train_timesteps"),
    ],
)
def test_bad_settings(weights, tmp_path, values, message):
    torch.save(weights, tmp_path / "w.ckpt")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "w.ckpt", tmp_path / "out", **values)
    assert not (tmp_path / "out").exists()


def test_no_averages_in_the_file(tmp_path):
    network = random_network(Shape(32, (1, 1), 1, (0,), 16))
    torch.save(training_state(network), tmp_path / "ckpt.pth")
    with pytest.raises(ValueError, match=r"ckpt.pth: the file has no ema weights, only raw"):
        convert(tmp_path / "ckpt.pth", tmp_path / "out", weights="ema")
    assert convert(tmp_path / "ckpt.pth", tmp_path / "out")["weights"] == "raw"


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.ckpt"):
        convert(tmp_path / "nowhere.ckpt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- the output ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_file(weights, tmp_path):
    torch.save(weights, tmp_path / "w.ckpt")
    return tmp_path / "w.ckpt"


def test_an_output_that_exists(small_file, tmp_path):
    output = tmp_path / "out"
    output.mkdir()  # an empty folder is as good as none
    convert(small_file, output)
    with pytest.raises(ValueError, match="holds a conversion: choose another folder, or pass --overwrite"):
        convert(small_file, output)
    (output / "README.md").write_text("by hand")
    (output / "unet" / "stale.bin").write_text("")
    convert(small_file, output, overwrite=True, dropout=0.5)
    assert GeneralizedDDIMPipeline.from_pretrained(output).unet.config.dropout == 0.5
    assert (output / "README.md").exists()
    assert not (output / "unet" / "stale.bin").exists()
    for taken, said in ((tmp_path, "keep them apart"), (small_file, "is a file: choose a folder")):
        with pytest.raises(ValueError, match=said):
            convert(small_file, taken, overwrite=True)
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.txt").write_text("one")
    with pytest.raises(ValueError, match="holds something else than a conversion"):
        convert(small_file, other, overwrite=True)
    with pytest.raises(ValueError, match="is a file: choose a folder"):
        convert(small_file, other / "chapter.txt")


@pytest.mark.parametrize(
    ("cause", "error"), [(KeyboardInterrupt, KeyboardInterrupt), (OSError, OSError), (SafetensorError, OSError)]
)
def test_an_interrupted_conversion_leaves_nothing(small_file, tmp_path, monkeypatch, cause, error):
    def interrupted(*args, **kwargs):
        raise cause

    with monkeypatch.context() as patch:
        patch.setattr(script, "write_json", interrupted)
        with pytest.raises(error):
            convert(small_file, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out" / script.PART).mkdir(parents=True)  # as after SIGKILL
    convert(small_file, tmp_path / "out")
    before = (tmp_path / "out" / "conversion.json").read_text()
    monkeypatch.setattr(script, "write_json", interrupted)
    with pytest.raises(error):
        convert(small_file, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "conversion.json").read_text() == before
    GeneralizedDDIMPipeline.from_pretrained(tmp_path / "out")
    assert not (tmp_path / "out" / script.PART).exists()
