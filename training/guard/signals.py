"""Signals: a line at once, and an end at the next safe point, from the first import to the last."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from .processes import is_first

CAUGHT = (signal.SIGINT, signal.SIGTERM)

PATIENCE = 2.0
"""Seconds in which launchers may deliver one signal more than once."""

WRITERS = {"write_file", "replace_folder", "replace_pipeline", "set_aside", "put_in_place", "forget_after", "owned"}
WRITERS |= {"put", "rmtree", "_rmtree_safe_fd", "_rmtree", "cleanup", "copyfile"}
"""Functions that are finished before a signal ends the program: they put files in place, or delete them."""


class Ended(SystemExit):
    """A signal ended the program."""


class Signals:
    """The signals that the process received.

    In a script the first one ends the program at the next safe point, that is outside of `WRITERS`. While `polled`, the
    first is for the loop, which asks for `received`, and the second ends the program. One more does not wait for code
    that cleans up.
    """

    def __init__(self) -> None:
        self.received, self.count, self._when = 0, 0, 0.0
        self.polled, self.ready, self.hint = "", True, ""

    def catch(self, ready: bool) -> dict[int, Any]:
        """Catch signals from now on; return the handlers before. If not `ready`, imports are still running."""
        self.__init__()
        self.ready = ready
        before = {number: signal.signal(number, self.note) for number in CAUGHT}
        if hasattr(signal, "SIGALRM"):
            before[signal.SIGALRM] = signal.signal(signal.SIGALRM, lambda number, frame: self.end(frame))
        return before

    def note(self, number: int, frame: FrameType | None) -> None:
        """Note a signal, print a line, and end the program if it is time."""
        now = time.monotonic()
        if self.count and now < self._when + PATIENCE:
            return
        self.received, self._when = self.received or number, now
        self.count += 1
        again = " again" if self.count > 1 else ""
        if not self.ready:
            plan = "ended before anything was written"
        elif self.polled and self.count == 1:
            plan = self.polled
        else:
            plan = f"ending{' now' if again else ''}; what is complete is kept{self.hint}"
        if is_first():
            say(f"{signal.Signals(number).name}{again}: {plan}")
        self.end(frame)

    def end(self, frame: FrameType | None) -> None:
        """End the program, now or after the function that is writing."""
        over = self.count - bool(self.polled)
        if not self.ready:
            os._exit(128 + self.received)  # half-imported libraries cannot be relied upon to pass an exception on
        if over <= 0:
            return
        if _is_writing(frame):
            if hasattr(signal, "setitimer"):
                signal.setitimer(signal.ITIMER_REAL, 0.02)  # look again
        elif over == 1:
            raise Ended(128 + self.received)
        else:
            os._exit(128 + self.received)


SIGNALS = Signals()


def start() -> None:
    """Catch signals from here on. Scripts call this first, as imports take seconds.

    Further processes of a script end silently at once, unless in a loop: they often wait for the first in code that is
    not Python, where no handler runs.
    """
    if not is_first():
        for number in CAUGHT:
            signal.signal(number, signal.SIG_DFL)
        return
    SIGNALS.catch(ready=False)
    report = sys.unraisablehook

    def hook(found: Any) -> None:
        if issubclass(found.exc_type, Ended):  # where exceptions are dropped, such as in __del__
            signal.setitimer(signal.ITIMER_REAL, 0.02)
        else:
            report(found)

    sys.unraisablehook = hook


@contextmanager
def program(hint: str = "") -> Iterator[None]:
    """Run the main part of a script. An error is one line and status 1, a signal one line and 128 + its number.

    Args:
        hint: how to continue after a signal, for the line.
    """
    SIGNALS.ready, SIGNALS.hint = True, hint and f". {hint}"
    try:
        yield
    except (SystemExit, KeyboardInterrupt) as error:
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else error.code)
    except Exception as error:
        if SIGNALS.count:  # what it broke may raise anything, such as a lost connection
            sys.exit(128 + SIGNALS.received)
        known = isinstance(error, (ValueError, OSError, FloatingPointError, ImportError))
        if not known and type(error).__name__ != "SafetensorError":  # by its name, as its library may not be imported
            raise
        sys.exit(f"{Path(sys.argv[0]).name}: {' '.join(_line(error).split())}")


@contextmanager
def ending_after_a_step(plan: str) -> Iterator[Signals]:
    """Let the first signal wait for a loop, which reads `received`. `plan` says in the line what happens then."""
    before = {}
    if signal.getsignal(CAUGHT[0]) != SIGNALS.note:  # a program that is not one of our scripts
        try:
            before = SIGNALS.catch(ready=True)
        except ValueError:  # not in the main thread, where signals do not arrive
            SIGNALS.__init__()
    SIGNALS.polled = plan
    try:
        yield SIGNALS
    finally:
        SIGNALS.polled = ""
        for number, handler in before.items():
            signal.signal(number, handler)


def say(text: str) -> None:
    """Print a line on stderr, below a progress bar. This does not go through buffers, which a signal may interrupt."""
    bars = getattr(getattr(sys.modules.get("tqdm"), "tqdm", None), "_instances", ())
    line = ("\n" if len(bars) else "") + f"{Path(sys.argv[0]).name}: {text}\n"
    with suppress(OSError):
        os.write(2, line.encode())


def warn(text: str) -> None:
    """Print a warning on stderr, if that works: it may be a file on the disk that failed."""
    with suppress(OSError, ValueError):
        print(f"warning: {text}", file=sys.stderr, flush=True)


def _line(error: Exception) -> str:
    """Describe an error, and the file of one of the system. Errors of safetensors are about a file or the disk."""
    if type(error).__name__ == "SafetensorError":
        return f"cannot read or write a file of weights: {error}"
    file = getattr(error, "filename", None)
    return f"{error}: {file!r}" if file is not None and str(file) not in str(error) else str(error)


def _is_writing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_name in WRITERS:
            return True
        frame = frame.f_back
    return False
