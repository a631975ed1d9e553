"""Rows that are finished stay on disk, so that a stopped prediction can go on.

`predict_scene(..., resume=True)` keeps every finished strip of rows in a folder beside
its target. A run that was stopped - by Ctrl-C, a full queue or a power cut - is
started again with the same call and computes only what is missing. Taught in notebook
09.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from .files import whole_file


class KeptRows:
    """The strips of one job, in order, each written whole or not at all.

    `job` is plain JSON that decides about their content; strips of another job are
    deleted, and a line says so.
    """

    def __init__(self, folder: Path, job: Mapping[str, Any]) -> None:
        self.folder = folder
        note, text = folder / "job.json", json.dumps(job, sort_keys=True)
        known = note.exists() and note.read_bytes() == text.encode()
        if folder.exists() and not known:
            print(f"predict: {folder.name} is of another job and starts afresh.")
            shutil.rmtree(folder)
        folder.mkdir(exist_ok=True)
        for left_over in folder.glob("*.part*"):  # a file that a killed run was at
            left_over.unlink()
        if not note.exists():
            with whole_file(note) as part:
                part.write_text(text)

    def __len__(self) -> int:
        """Strips that are finished, counted from the first without a gap."""
        count = 0
        while self._path(count).exists():
            count += 1
        return count

    def _path(self, number: int) -> Path:
        return self.folder / f"rows_{number:06d}.npz"

    def go_on(self, strips: Iterable[list[np.ndarray]]) -> Iterator[list[np.ndarray]]:
        """Yield the kept strips, then the new ones, which are kept as they pass."""
        count = len(self)
        for number in range(count):
            try:
                with np.load(self._path(number)) as kept:
                    strips_kept = [kept[name] for name in kept.files]
            except (OSError, ValueError, BadZipFile, EOFError) as error:
                raise ValueError(
                    f"{self._path(number)} is damaged: {error}. Delete {self.folder}, "
                    "then run again."
                ) from error
            yield strips_kept
        for number, strip in enumerate(strips, start=count):
            with whole_file(self._path(number)) as part:
                np.savez_compressed(part, *strip)
            yield strip

    def discard(self) -> None:
        """Remove the folder: the job is done."""
        shutil.rmtree(self.folder)
