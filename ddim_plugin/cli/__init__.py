"""The command `ddim-plugin`."""

import os
import signal
import sys
from collections.abc import Sequence
from typing import Any


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status. Bad input ends with one line on stderr and status 1.

    SIGINT and SIGTERM exit with one line too, and with status 130 or 143.
    """
    name = "ddim-plugin"

    def stop(number: int, frame: Any) -> None:
        os.write(2, f"\n{name}: stopped by {signal.Signals(number).name}\n".encode())  # below a progress bar
        raise SystemExit(128 + number)

    handled = [each for each in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(each) != signal.SIG_IGN]
    before = {each: signal.signal(each, stop) for each in handled}
    try:
        from .parser import parse

        args = parse(argv)
        name = f"ddim-plugin {args.command}"
        from .commands import run

        run(args)
    except Exception as error:
        if not isinstance(error, ValueError | OSError) and type(error).__name__ != "SafetensorError":  # a full disk
            raise
        print(f"{name}: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 1
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    return 0
