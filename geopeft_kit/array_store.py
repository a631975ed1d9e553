"""A store of arrays on disk: written whole or not at all, and checked when it is read.

A store is a folder, named after what its content was made from (`files.content_key`).
It holds one .npy file per array and an index with a checksum of every row. Rows are
mapped into memory, so that only those in use take room there.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
from numpy.lib.format import header_data_from_array_1_0, write_array_header_1_0

from geopeft_kit.files import content_key, whole_folder

INDEX = "index.json"
Rows = Mapping[str, np.ndarray]
"""Name -> some rows of an array, (n, ...)."""


class DamagedStoreError(RuntimeError):
    """A store does not hold what was written."""


class ArrayStore:
    """The arrays of a folder, row by row; `facts` is what `write` was given.

    A row is checked when it is read for the first time; DamagedStoreError if its
    content is not what was written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        content = index["content"]
        if content_key(content) != index["sha256"]:
            raise self._damaged(INDEX)
        self.facts: Any = content["facts"]
        self.sums: dict[str, list[int]] = content["sums"]
        self.arrays = {name: self._map(name) for name in self.sums}
        rows = len(next(iter(self.sums.values())))
        self._checked = np.zeros(rows, bool)

    @classmethod
    def write(
        cls, folder: Path, parts: Iterable[Rows], rows: int, facts: Any = None
    ) -> Self:
        """Write a store of `rows` rows, a few at a time; one that exists is used.

        `facts` is plain JSON, and may be completed while `parts` are drawn. Raises
        OSError if there is no room: nothing is left of it then.
        """
        if not (folder / INDEX).exists():
            # Another process may be faster, and makes the same.
            with suppress(FileExistsError), whole_folder(folder, replace=False) as part:
                sums = _write_arrays(part, parts, rows)
                content = {"facts": facts, "sums": sums}
                text = json.dumps({"content": content, "sha256": content_key(content)})
                (part / INDEX).write_text(text, encoding="utf-8")
        return cls(folder)

    def row(self, index: int) -> dict[str, np.ndarray]:
        """One row of every array, as views of the files."""
        found = {name: array[index] for name, array in self.arrays.items()}
        if not self._checked[index]:
            for name, values in found.items():
                if _checksum(values) != self.sums[name][index]:
                    raise self._damaged(f"row {index} of {name}.npy")
            self._checked[index] = True
        return found

    def whole(self) -> dict[str, np.ndarray]:
        """All rows of every array, each of them checked."""
        for index in range(len(self._checked)):
            self.row(index)
        return self.arrays

    def _map(self, name: str) -> np.ndarray:
        try:  # "c": what is written stays in this process; torch wants writable arrays
            return np.load(self.folder / f"{name}.npy", mmap_mode="c")
        except ValueError as error:
            raise self._damaged(f"{name}.npy") from error

    def _damaged(self, what: str) -> DamagedStoreError:
        return DamagedStoreError(
            f"{what} of {self.folder} was damaged after it was written: it does not "
            "match its checksum. Delete this folder; its content is then made again."
        )

    def __reduce__(self) -> tuple[type[Self], tuple[Path]]:
        # A worker process maps the files itself instead of receiving a copy of them.
        return type(self), (self.folder,)


def _write_arrays(
    folder: Path, parts: Iterable[Rows], rows: int
) -> dict[str, list[int]]:
    """Write the rows; return their checksums.

    Plain writes fail loudly on a full disk, where a memory map would end the process.
    """
    sums: dict[str, list[int]] = {}
    with ExitStack() as stack:
        files: dict[str, IO[bytes]] = {}
        for part in parts:
            for name, values in part.items():
                if name not in files:
                    path = folder / f"{name}.npy"
                    files[name] = stack.enter_context(path.open("wb"))
                    header = header_data_from_array_1_0(np.ascontiguousarray(values))
                    shape = (rows, *values.shape[1:])
                    write_array_header_1_0(files[name], header | {"shape": shape})
                    sums[name] = []
                files[name].write(values.tobytes())
                sums[name] += [_checksum(row) for row in values]
    return sums


def _checksum(row: np.ndarray) -> int:
    """CRC-32 of a row's bytes, and of how they are to be read."""
    start = zlib.crc32(f"{row.dtype.str} {row.shape}".encode())
    return zlib.crc32(np.ascontiguousarray(row).data, start)
