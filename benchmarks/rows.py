"""The rows of a study in one CSV, written as they come, so that a cut study goes on."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

Cell = tuple[Any, ...]


@dataclass(frozen=True)
class Rows:
    """What is measured of a study: one or more rows for each of its cells.

    >>> rows = Rows(folder / "study.csv", ("label", "seed"))
    >>> for cell in rows.missing(cells, until):
    ...     rows.put(cell, [measure(*cell)])

    Attributes:
        path: The CSV. It is written whole or not at all.
        key: Columns whose values name a cell.
    """

    path: Path
    key: tuple[str, ...]

    def read(self) -> pd.DataFrame:
        """All rows; none where there is no file."""
        if not self.path.exists():
            return pd.DataFrame(columns=list(self.key))
        return pd.read_csv(self.path)

    def missing(self, cells: Iterable[Cell], until: float = math.inf) -> Iterator[Cell]:
        """The cells without a row, in order, until `time.monotonic()` is `until`."""
        for cell in cells:
            if time.monotonic() > until:
                return
            if not self._of(cell, self.read()).any():
                yield cell

    def put(self, cell: Cell, found: Sequence[Mapping[str, Any]]) -> None:
        """Write the rows of a cell, in place of older ones of it; print the last."""
        old = self.read()
        named = dict(zip(self.key, cell, strict=True))
        rows = old[~self._of(cell, old)].to_dict("records")
        rows += [{**named, **row} for row in found]
        unfinished = self.path.with_suffix(".part")
        pd.DataFrame(rows).to_csv(unfinished, index=False)
        unfinished.replace(self.path)
        print(f"{self.path.stem}: {rows[-1]}", flush=True)

    def _of(self, cell: Cell, rows: pd.DataFrame) -> pd.Series:
        """Which rows are of that cell."""
        return (rows[list(self.key)] == list(cell)).all(axis=1)
