"""Parts of the text of a card, and configs to make one of."""

import re

UNET = {"_class_name": "UNet2DModel", "sample_size": 32, "in_channels": 3, "out_channels": 3, "num_class_embeds": None}
SCHEDULER = {"_class_name": "GeneralizedDDIMScheduler", "num_train_timesteps": 1000, "beta_schedule": "linear"}
SCHEDULER |= {"beta_start": 0.0001, "beta_end": 0.02, "prediction_type": "epsilon", "timestep_spacing": "quadratic"}
SCHEDULER |= {"eta": 0.0, "variance_type": "fixed_small", "clip_sample": False}


def section(text, name):
    return re.search(rf"## {name}\n\n(.*?)(?=\n## |\Z)", text, re.DOTALL)[1]


def rows(text):
    """The cells of a Markdown table, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
