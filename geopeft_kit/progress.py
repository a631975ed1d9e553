"""One progress bar: a widget in a notebook, a bar in a terminal, lines in a log.

tqdm counts and estimates the time left.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm as TextBar
from tqdm.auto import tqdm as Bar

REDRAW_S = 0.5
LINE_S = 60.0
_IN_NOTEBOOK = any(kind.__module__ == "tqdm.notebook" for kind in Bar.__mro__)


def progress_bar(
    items: Iterable[Any] | None = None, shown: bool = True, **options: Any
) -> Any:
    """A tqdm bar over `items`, or over a `total` that the caller counts up.

    `options` are those of tqdm: desc, total, unit, leave, delay, ...
    """
    kind = Bar if _IN_NOTEBOOK or sys.stdout.isatty() else Lines
    options = {"mininterval": REDRAW_S, "miniters": 1, "file": sys.stdout} | options
    return kind(items, disable=not shown, **options)


class Lines(TextBar):
    """A bar for a log: a line now, after 0.5, 1.5, 3.5 ... seconds, and at the end.

    The gap grows to a minute.
    """

    mininterval: float

    def __init__(self, items: Iterable[Any] | None, **options: Any) -> None:
        # gui: tqdm writes nothing by itself; ncols=0: numbers without a bar
        super().__init__(items, gui=True, ncols=0, **options)
        if not self.disable and not self.delay:
            self.display()

    def __iter__(self) -> Iterator[Any]:
        with self:  # tqdm's own loop relies on a fixed interval
            for item in self.iterable:
                yield item
                self.update()

    def update(self, n: float | None = 1) -> bool | None:
        """Count; after a line, wait twice as long for the next."""
        shown = super().update(n)
        if shown:
            self.mininterval = min(2 * self.mininterval, LINE_S)
        return shown

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Print a line."""
        print(msg or self, file=self.fp, flush=True)
        return True

    def close(self) -> None:
        """Print where it ended."""
        if not self.disable and self.leave and self.n > self.last_print_n:
            self.display()
        super().close()

    def clear(self, *_: Any, **__: Any) -> None:
        """A line stays."""

    @classmethod
    def write(
        cls, s: str, file: Any = None, end: str = "\n", nolock: bool = False
    ) -> None:
        """Print a text between two lines."""
        print(s, file=file, end=end, flush=True)
