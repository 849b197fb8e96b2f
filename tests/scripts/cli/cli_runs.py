"""Runs of the command in this process."""

from safetensors.torch import load_file

from ddim_plugin import cli


def run(command, *arguments, ok=True):
    status = cli.main([command, *map(str, arguments)])
    assert status == (0 if ok else 1)


def latents(folder):
    return load_file(folder / "latents.safetensors")["latents"]
