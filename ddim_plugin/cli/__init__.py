"""The command `ddim-plugin`."""

import signal
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status: 1 with one line on stderr for bad input, 130 after Ctrl-C."""
    name = "ddim-plugin"
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # removes half-written files
    try:
        from .parser import parse

        args = parse(argv)
        name = f"ddim-plugin {args.command}"
        from .commands import run

        run(args)
    except KeyboardInterrupt:
        print(f"\n{name}: stopped", file=sys.stderr)  # below a progress bar
        return 130
    except Exception as error:
        if not isinstance(error, ValueError | OSError) and type(error).__name__ != "SafetensorError":  # a full disk
            raise
        print(f"{name}: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0
