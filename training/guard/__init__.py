"""Guards that all scripts share: signals, errors, output folders, processes. None imports slow libraries at the top."""

from .folder import LOCK, output, owned
from .processes import check_processes, is_first
from .signals import Ended, Signals, ending_after_a_step, program, start, warn

__all__ = [
    "LOCK",
    "Ended",
    "Signals",
    "check_processes",
    "ending_after_a_step",
    "is_first",
    "output",
    "owned",
    "program",
    "start",
    "warn",
]
