"""The command `ddim-plugin`."""

import os
import signal
import sys
from collections.abc import Sequence
from typing import Any


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status. Bad input ends with one line on stderr and status 1.

    SIGINT and SIGTERM end with one line too, at once, and with status 130 or 143.
    """
    name, run, stopped = "ddim-plugin", None, []

    def stop(number: int, frame: Any) -> None:
        line = f"{name}: stopped by {signal.Signals(number).name}\n"
        os.write(2, f"\n{line}".encode() if run else line.encode())  # below a progress bar, and not by print
        if run is None or stopped:  # libraries that are being imported may swallow an exception
            os._exit(128 + number)
        stopped.append(128 + number)
        raise KeyboardInterrupt

    handled = [each for each in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(each) != signal.SIG_IGN]
    before = [(each, signal.signal(each, stop)) for each in handled]
    try:
        from .parser import parse

        args = parse(argv)
        name = f"ddim-plugin {args.command}"
        from .commands import run

        run(args)
    except BaseException as error:
        if not stopped:
            if not isinstance(error, ValueError | OSError) and type(error).__name__ != "SafetensorError":  # a full disk
                raise
            print(f"{name}: {' '.join(str(error).splitlines())}", file=sys.stderr)
            return 1
    finally:
        for each, handler in before:
            signal.signal(each, handler)
    return stopped[0] if stopped else 0
