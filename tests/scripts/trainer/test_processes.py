"""Several processes train one model."""

import json
from pathlib import Path

import numpy as np
import pytest
import train
from pictures import Share
from PIL import Image
from trainer import run as run_
from trainer.config import TrainConfig
from trainer.report import read_log
from trainer.settings import build
from training_runs import SMALL, fit, losses, same_weights
from trials import digests, ranks, ranks_of, script


def two_ranks(settings):
    """Train on two ranks; return what each holds."""
    ranks_of(2, ranks, settings)
    files = sorted(Path(settings["output"]).glob("rank-*.json"))
    held = [json.loads(path.read_text()) for path in files]
    for path in files:
        path.unlink()
    return held


def test_two_processes_train_as_one_does_and_resume(tmp_path):
    settings = SMALL | {"preview_every": 3, "preview_images": 5, "preview_steps": 2, "times": "importance"}
    held = two_ranks(settings | {"output": str(tmp_path / "whole")})
    assert held[0]["unet"] == held[1]["unet"]
    assert held[0]["ema"] == held[1]["ema"]
    pictures, to_model = [], run_.to_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_, "to_model", lambda images: pictures.append(digests(images)) or to_model(images))
        fit(tmp_path / "one")
    alone = [line["learning_rate"] for line in read_log(tmp_path / "one" / "log.jsonl")]
    assert held[0]["lr"] == held[1]["lr"] == alone
    log = read_log(tmp_path / "whole" / "log.jsonl")
    assert [line["images"] for line in log] == [8] * 6
    for step in range(6):  # together the ranks see the pictures that one process sees, each its own half
        mine, other = held[0]["pictures"][step], held[1]["pictures"][step]
        assert len(mine) == len(other) == 4
        assert sorted(mine + other) == sorted(pictures[step])

    broken = settings | {"output": str(tmp_path / "broken")}
    two_ranks(broken | {"steps": 3})
    held = two_ranks(broken | {"resume": "latest"})
    assert held[0]["unet"] == held[1]["unet"]
    assert len(held[0]["lr"]) == 3
    same_weights(tmp_path / "whole", tmp_path / "broken")
    assert losses(tmp_path / "whole") == losses(tmp_path / "broken")

    settings = broken | {"resume": "latest", "steps": 7}  # with one process it goes on too
    assert train.main(build(TrainConfig, settings))["status"] == "finished"


def test_a_preview_is_the_same_at_any_number_of_processes(tmp_path):
    settings = SMALL | {"preview_every": 6, "preview_images": 5, "preview_steps": 2, "learning_rate": 1e-12}
    two_ranks(settings | {"output": str(tmp_path / "two")})
    fit(tmp_path / "one", **{key: settings[key] for key in settings})
    pictures = [
        np.asarray(Image.open(tmp_path / n / "previews" / "step-00000006.png")).astype(int) for n in ("one", "two")
    ]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
    assert pictures[0].std() > 10


def test_shares_make_up_the_batch():
    batch = np.arange(24)
    shares = [Share(4, 2, rank, 3) for rank in range(3)]
    assert all(share.batch == 24 for share in shares)
    parts = [np.concatenate([share.of(batch, part) for share in shares]) for part in range(2)]
    assert np.concatenate(parts).tolist() == batch.tolist()


SHARDED = """
import sys; sys.path[:0] = ["tests", "training"]
import os, torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from diffusers import UNet2DModel
from trainer.run import _whole, make_average, restore_average
dist.init_process_group("gloo")
torch.manual_seed(0)
unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1,
    down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, norm_num_groups=4, attention_head_dim=8)
whole_source = __import__("copy").deepcopy(unet)
fully_shard(unet, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
sharded, whole = make_average(unet, 0.9, False), make_average(whole_source, 0.9, False)
assert all(hasattr(p, "full_tensor") for p in sharded.shadow_params)
def check():
    pairs = zip(sharded.shadow_params, whole.shadow_params, strict=True)
    assert all(torch.equal(_whole(a), b) for a, b in pairs)
with torch.no_grad():
    for a, b in zip(unet.parameters(), whole_source.parameters()): a.mul_(1.5); b.mul_(1.5)
for step in (1, 2, 3): sharded.step(unet.parameters()); whole.step(whole_source.parameters())
check()
names = [name for name, _ in whole_source.named_parameters()]
state = {n: v.clone() for n, v in zip(names, whole.shadow_params, strict=True)}
restore_average(sharded, unet, {n: torch.zeros_like(v) for n, v in state.items()}, 3)
assert all((_whole(v) == 0).all() for v in sharded.shadow_params)
restore_average(sharded, unet, state, 3)
check()
sharded.step(unet.parameters()); whole.step(whole_source.parameters())
check()
if dist.get_rank() == 0: print("equal")
dist.barrier(); dist.destroy_process_group()
"""


def test_the_average_of_shards_is_the_average(tmp_path):
    """Weights in shards, as FSDP keeps them, on two processes."""
    file = tmp_path / "sharded.py"
    file.write_text(SHARDED)
    assert "equal" in ranks_of(2, script, file).stdout
