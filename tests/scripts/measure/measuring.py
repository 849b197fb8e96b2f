"""What tests of measuring share: a classifier with random weights, and scripts as processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers import ResNetConfig, ResNetForImageClassification

ROOT = Path(__file__).parents[3]
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_labels": 10}


def classifier(folder, **config):
    torch.manual_seed(1)
    ResNetForImageClassification(ResNetConfig(**RESNET | {"num_channels": 1} | config)).save_pretrained(folder)


def values(result):
    return [entry["value"] for entry in result["results"]]


def python(*arguments, **env):
    command = [sys.executable, *map(str, arguments)]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | env
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=300)
