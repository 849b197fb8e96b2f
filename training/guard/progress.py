"""A progress bar over all the work of a script, with the time left."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Progress:
    """Show how much of the work is done and the time left, on stderr if that is a terminal.

    `done` and `total` count units, such as evaluations of a network for an image. `total` may be an estimate. A `quiet`
    one shows nothing, as all processes but the first.
    """

    def __init__(self, total: float, desc: str, unit: str = "evaluation", quiet: bool = False):
        from tqdm.auto import tqdm

        self.done, self.total = 0.0, total
        shown = {"total": total, "desc": desc, "unit": unit, "unit_scale": True, "leave": False, "mininterval": 0.5}
        self.bar = tqdm(**shown, disable=quiet or None)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.close()

    def advance(self, units: float = 1) -> None:
        """Count units that are done."""
        self.done += units
        self.bar.update(units)

    @contextmanager
    def part(self, expected: float) -> Iterator[None]:
        """Correct the total if a part of the work takes more or less than the `expected` units."""
        before = self.done
        yield
        self.total += self.done - before - expected
        self.bar.total = self.total

    @contextmanager
    def counting(self, network: Any) -> Iterator[None]:
        """Count the images of each call of a network, a torch module."""

        def count(_: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            self.advance(len(given[0] if given else named["sample"]))

        hook = network.register_forward_pre_hook(count, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def print(self, text: str) -> None:
        """Print a line on stdout, above the bar."""
        with self.bar.external_write_mode():
            print(text, flush=True)
