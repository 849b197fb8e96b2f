"""The command `ddim-plugin`."""

from .commands import main

__all__ = ["main"]
