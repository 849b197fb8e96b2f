"""Small models of every kind that the page shows."""

import torch

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler, MultistepDDIMScheduler

V = {"prediction_type": "v_prediction"}  # with random weights its samples are not far from pictures
KINDS = {
    "paper": V,
    "fitted": V | {"fitted_solvers": {"4": {"timesteps": [900, 600, 300, 50]}}},
    "classes": V,
    "learned": V | {"variance_type": "learned_range"},
    "flow": {"prediction_type": "flow_prediction", "shift": 3.0},
    "exploding": {"prediction_type": "score", "sigma_max": 50.0},
    "EDM": {"prediction_type": "edm", "sigma_data": 0.5},
}


def model(make_unet, kind):
    network = {"classes": {"num_class_embeds": 4}, "learned": {"out_channels": 2}}.get(kind, {})
    unet = make_unet(**network)
    spread = 0.0005 if kind == "exploding" else 0.02  # a score is ε/σ
    torch.nn.init.normal_(unet.conv_out.weight, std=spread, generator=torch.Generator().manual_seed(0))
    scheduler = MultistepDDIMScheduler if kind == "fitted" else GeneralizedDDIMScheduler
    return GeneralizedDDIMPipeline(unet, scheduler(**KINDS[kind]))


def drain(run):
    """The last result of a run."""
    return list(run)[-1]
