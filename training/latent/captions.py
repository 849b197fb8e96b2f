"""Captions of digits, and a tokenizer with one token for each of their words."""

from pathlib import Path

import numpy as np
from guard.writing import write_file
from torch import Tensor
from trainer.settings import write_json
from transformers import CLIPTokenizer

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FORMS = ("{0}{1}", "a {0}{1}", "the {0}digit {1}", "the {0}number {1}", "a handwritten {0}{1}", "a picture of a {0}{1}")
STYLES = ("thin ", "", "bold ")
LENGTH = 10
"""Tokens of a caption at most, with its beginning and its end."""


def find_styles(images: Tensor, labels: np.ndarray) -> np.ndarray:
    """Return the style of each picture (N, C, H, W): the third of its class that has its amount of ink."""
    ink, styles = images.float().mean((1, 2, 3)).numpy(), np.zeros(len(labels), int)
    for label in np.unique(labels):
        of = labels == label
        styles[of] = np.searchsorted(np.quantile(ink[of], (1 / 3, 2 / 3)), ink[of])
    return styles


def caption(label: int, style: int, rng: np.random.Generator) -> str:
    """Describe a digit in one of several ways. Half of the captions mention its style, if it has one."""
    name, form = (NAMES[label], str(label))[rng.integers(2)], FORMS[rng.integers(len(FORMS))]
    text = form.format(STYLES[style] if rng.random() < 0.5 else "", name)
    return text.replace("a eight", "an eight").replace("a 8", "an 8")


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write the vocabulary into `folder`, and return its tokenizer. Other words are spelled by their letters."""
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789"]
    words = [*NAMES, *" ".join((*FORMS, *STYLES, "an")).replace("{0}", "").replace("{1}", "").split()]
    spelled = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    pairs = {("".join(word[:i]), word[i]) for word in spelled for i in range(1, len(word))}
    merges = sorted(pairs, key=lambda pair: (len(pair[0]), pair))
    tokens = letters + [f"{letter}</w>" for letter in letters] + ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "vocab.json", {token: i for i, token in enumerate(tokens)})
    write_file(folder / "merges.txt", "\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=LENGTH)
