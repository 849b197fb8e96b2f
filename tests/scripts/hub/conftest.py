"""A Hub over HTTP, and a folder to push."""

import json

import numpy as np
import pytest
from loopback_hub import LoopbackHub
from PIL import Image
from pushing import READS, RESULTS, TOKEN, record

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler


@pytest.fixture
def hub(tmp_path):
    with LoopbackHub() as hub, hub.in_process(tmp_path / "home", TOKEN):
        hub.add_user("ada", TOKEN)
        hub.add_user("eve", READS, role="read")
        yield hub


@pytest.fixture
def folder(make_unet, tmp_path):
    """A saved pipeline with records, pictures and a card, as a training run leaves them."""
    folder = tmp_path / "out" / "digits"
    GeneralizedDDIMPipeline(make_unet(), GeneralizedDDIMScheduler(eta=0.2)).save_pretrained(folder)
    config = {"data": "/home/ada/pictures", "split": "train", "steps": 10, "batch_size": 4, "preview_steps": 7}
    (folder / "training.json").write_text(
        json.dumps({"config": config | {"output": str(folder)}, "data_from": "files"})
    )
    (folder / "previews").mkdir()
    for name in ("previews/step-00000005.png", "previews/step-00000010.png", "loss.png"):
        Image.fromarray(np.full((8, 8), len(name), np.uint8)).save(folder / name)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "optimizer.bin").write_bytes(b"not to be pushed")
    (folder / "log.jsonl").write_text("{}")
    record(folder, RESULTS)
    return folder
