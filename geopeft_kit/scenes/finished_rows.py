"""Finished rows of a prediction on disk, from which a stopped run resumes."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from geopeft_kit.files import whole_file


class FinishedRows:
    """The strips of rows of one prediction, in order, each written whole or not at all.

    Args:
        folder: Holds them; rows of another key are deleted, and a line says so.
        key: Changes with whatever the rows are computed from, see `content_key`.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = folder
        note = folder / "key.txt"
        if folder.exists() and not (note.exists() and note.read_text() == key):
            print(f"predict: {folder.name} holds rows of another job; it starts anew.")
            shutil.rmtree(folder)
        folder.mkdir(exist_ok=True)
        for unfinished in folder.glob("*.part*"):  # left by a run that was killed
            unfinished.unlink()
        with whole_file(note) as part:
            part.write_text(key)

    def __len__(self) -> int:
        """Strips that are finished, counted from the first without a gap."""
        count = 0
        while self._path(count).exists():
            count += 1
        return count

    def _path(self, number: int) -> Path:
        return self.folder / f"rows_{number:06d}.npz"

    def continued(self, strips: Iterable[list[np.ndarray]]) -> Iterator[list]:
        """Yield the finished strips, then the new ones, which are kept as they pass."""
        count = len(self)
        for number in range(count):
            with np.load(self._path(number)) as kept:
                yield [kept[name] for name in kept.files]
        for number, strip in enumerate(strips, start=count):
            with whole_file(self._path(number)) as part:
                np.savez_compressed(part, *strip)
            yield strip

    def discard(self) -> None:
        """Remove the folder: the prediction is complete."""
        shutil.rmtree(self.folder)
