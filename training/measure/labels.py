"""What a network sees beside x_t: class labels, without the one that means "no class", and its last x̂0."""

from pathlib import Path
from typing import Any

import huggingface_hub
from cards.records import TRAINING
from guard.reading import read_object

from ddim_plugin.pipelines.loop import SELF_CONDITIONING


def count_classes(model: str, unet: Any, given: int | None = None) -> int | None:
    """Return the number of classes of a network, or None for an unconditional one.

    Training for guidance adds an embedding after the last class, which means "no class" and is not counted. The number
    is that of the names in the model's `training.json`; without this file it is `given`, or that of all embeddings.

    Raises:
        ValueError: if the network takes labels, and its config does not say how many there are; or if `given` is not
            possible, or differs from the number in `training.json`.
    """
    if getattr(unet, "class_embedding", None) is None:
        if given is not None:
            raise ValueError(f"{model} is unconditional: leave out classes={given}")
        return None
    embeddings = unet.config.num_class_embeds
    if not embeddings:
        raise ValueError(f"{model} takes class labels, but its config does not say how many there are")
    if given is not None and not 0 < given <= embeddings:
        raise ValueError(f"classes must be in 1..{embeddings}, the embeddings of {model}, not {given}")
    known = min(len(_trained(model)), embeddings)
    if known and given not in (None, known):
        raise ValueError(f"{model} has {known} classes by its {TRAINING}, not {given}: leave out classes={given}")
    return known or given or embeddings


def in_turn(numbers: range, classes: int) -> list[int]:
    """Return the classes of images of these numbers: each class in turn."""
    return [i % classes for i in numbers]


def check_label(model: str, unet: Any, class_label: int | None) -> None:
    """Raise ValueError if a label is missing, not needed, or not one of the classes."""
    if (getattr(unet, "class_embedding", None) is not None) != (class_label is not None):
        known = "is unconditional: leave class_label out" if class_label is not None else "needs class_label"
        raise ValueError(f"the network {known}")
    if class_label is None or not unet.config.num_class_embeds:
        return  # the labels of another embedding need not be classes
    classes = count_classes(model, unet)
    if not 0 <= class_label < classes:
        null = ', which means "no class"' if class_label in range(unet.config.num_class_embeds) else ""
        raise ValueError(f"class_label must be in 0..{classes - 1}, not {class_label}{null}")


def check_memory(model: str, unet: Any) -> None:
    """Raise ValueError for a network with self-conditioning, whose output is no function of x_t and t."""
    if SELF_CONDITIONING in unet.config:
        raise ValueError(
            f"the network of {model} sees x̂0 of its last step (self-conditioning), and this measures functions of x_t "
            "and t: use evaluate.py"
        )


def _trained(model: str) -> list[str]:
    """Return the names of the classes in the record of training, none if there is no such record."""
    file = Path(model) / TRAINING
    if not Path(model).is_dir():
        try:
            file = Path(huggingface_hub.hf_hub_download(model, TRAINING))
        except (OSError, ValueError):  # of huggingface_hub: no such file, or the Hub cannot be reached
            return []
    return list(read_object(file).get("classes") or ()) if file.is_file() else []
