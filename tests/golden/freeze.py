"""Freeze what later versions must make again, once, and commit it.

PYTHONPATH=training python tests/golden/freeze.py VERSION                # folders as this version saves them
PYTHONPATH=training python tests/golden/freeze.py model_cards/X          # pictures of a committed model
PYTHONPATH=training python tests/golden/freeze.py model_cards/X --card   # its card from its records
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from cards.card import fits, license_of, made
from cards.records import read_records
from diffusers import DPMSolverMultistepScheduler, UNet2DModel

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler
from ddim_plugin.hub.push import Model

GOLDEN = Path(__file__).parent
SAVED, CARDS = GOLDEN / "saved", GOLDEN.parents[1] / "model_cards"
CALL = {"num_inference_steps": 5, "class_labels": [0, 2]}


def draw(pipe):
    """Two images of a frozen model, as nested lists in [0, 1]."""
    pipe.set_progress_bar_config(disable=True)
    seeds = [torch.Generator().manual_seed(i) for i in range(2)]
    return pipe(batch_size=2, generator=seeds, output_type="np", **CALL).images


def without_package(cases, home, kind="code"):
    """What a process that cannot import the package answers to these cases of `tests/reader.py`."""
    done = subprocess.run(
        [sys.executable, str(GOLDEN.parent / "reader.py"), kind],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        env={"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def draw_card(folder):
    """Four images of a committed model in ten steps, (4, H, W, C) in [0, 1]."""
    pipe = GeneralizedDDIMPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    seeds = [torch.Generator().manual_seed(i) for i in range(4)]
    labels = {"class_labels": [0, 1, 2, 3]} if pipe.unet.config.num_class_embeds else {}
    return pipe(batch_size=4, num_inference_steps=10, generator=seeds, output_type="np", **labels).images


def made_card(folder):
    """The card of a committed model, for the id and with the licence that stand in it."""
    text = (folder / "README.md").read_text()
    title = re.search(r'from_pretrained\("([^"]+)"', text)[1]
    model, records = Model(folder), read_records(folder)
    assert fits(records, model, folder)
    return made(model, records, title, license_of(text))


def main(version, *flags):
    card = CARDS / Path(version).name
    if flags == ("--card",):
        (card / "README.md").write_text(made_card(card))
        return
    if card.is_dir():
        np.save(GOLDEN / "frozen" / f"{card.name}.npy", (draw_card(card) * 255).round().astype(np.uint8))
        return
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "layers_per_block": 1}
    unet = UNet2DModel(
        4, 1, 1, block_out_channels=(4, 4), norm_num_groups=2, num_class_embeds=4, attention_head_dim=2, **blocks
    )
    settings = {"timestep_spacing": "quadratic", "beta_schedule": "sigmoid", "eta": 0.3}
    for kind, scheduler in {
        "ours": GeneralizedDDIMScheduler(prediction_type="v_prediction", **settings),
        "stock": DPMSolverMultistepScheduler(prediction_type="v_prediction"),
    }.items():
        folder = SAVED / f"{version}-{kind}"
        pipe = GeneralizedDDIMPipeline(unet, scheduler)
        pipe.save_pretrained(folder)
        (folder / "images.json").write_text(json.dumps(draw(pipe).tolist()) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
