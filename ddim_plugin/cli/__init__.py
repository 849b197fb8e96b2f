"""The command `ddim-plugin`."""

from .commands import main as main
