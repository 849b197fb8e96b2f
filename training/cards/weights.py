"""Tell weights apart, so that figures are shown for the weights that they were measured on only."""

import hashlib

import torch


def weights_digest(*modules: torch.nn.Module) -> str:
    """Return the SHA-256 of the names, types, shapes and bytes of all weights."""
    found = hashlib.sha256()
    for module in modules:
        for name, value in module.state_dict().items():
            found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
