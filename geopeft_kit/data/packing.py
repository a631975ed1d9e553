"""All chips of a data set in one file that is mapped into memory.

Decoding a compressed GeoTIFF costs more than using it. Packed once, an epoch reads
plain numbers, and the system keeps as much of the file in memory as there is room for.
A pack is named after the content of every file that it was made from, so it cannot go
stale: other files, another pack. Taught in `notebooks/14_your_own_data.ipynb`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib.format import header_data_from_array_1_0, write_array_header_1_0

from geopeft_kit.data.info import DatasetInfo
from geopeft_kit.data.reading import Grid, StoredChip

VERSION = 1
PARTS = ("image", "mask", "invalid")


@dataclass
class PackedChips:
    """Chips in a pack, by row of the index.

    Attributes:
        folder: Holds image.npy, mask.npy, invalid.npy and grids.json.
    """

    folder: Path
    _open: dict[str, Any] = field(default_factory=dict, repr=False)

    def read(self, row: int) -> StoredChip:
        """One chip, as `ChipReader.read` would return it.

        Args:
            row: Of the index.

        Returns:
            The stored values; the image is a view of the file.
        """
        if not self._open:
            self._open = self._map()
        arrays, grids = self._open["arrays"], self._open["grids"]
        mask = invalid = None
        if "mask" in arrays:
            kind = arrays["mask"].dtype.kind
            mask = arrays["mask"][row].astype(np.float32 if kind == "f" else np.int64)
        if "invalid" in arrays and arrays["invalid"][row].any():
            invalid = arrays["invalid"][row]
        return StoredChip(arrays["image"][row], mask, invalid, grids[row])

    def _map(self) -> dict[str, Any]:
        files = [p for p in PARTS if (self.folder / f"{p}.npy").exists()]
        arrays = {
            part: np.load(self.folder / f"{part}.npy", mmap_mode="r") for part in files
        }
        texts = json.loads((self.folder / "grids.json").read_text(encoding="utf-8"))
        grids = [Grid(h, w, crs, tuple(t), tuple(b)) for h, w, crs, t, b in texts]
        return {"arrays": arrays, "grids": grids}

    def __getstate__(self) -> dict[str, Any]:
        # A worker process maps the file itself instead of receiving a copy of it.
        return {"folder": self.folder, "_open": {}}


def pack_key(
    folder: Path, files: Sequence[str], bands: Sequence[str], facts: str
) -> str:
    """Name of the pack of some files: a hash of their content.

    Args:
        folder: That they lie in.
        files: Their paths in it, in the order of the index.
        bands: That are read.
        facts: Text of whatever else decides about stored values.

    Returns:
        64 hexadecimal digits.
    """
    total = hashlib.sha256(json.dumps([VERSION, list(bands), facts]).encode())
    for name in files:
        with (folder / name).open("rb") as file:
            total.update(name.encode())
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def pack(
    target: Path, chips: Iterator[StoredChip], count: int, info: DatasetInfo
) -> PackedChips:
    """Write a pack, whole or not at all; one that is there is used.

    Args:
        target: Folder to write, named after the content.
        chips: Read one at a time.
        count: How many there are.
        info: Facts of the data set.

    Returns:
        The pack.

    Raises:
        ValueError: Chips differ in size or type.
        OSError: It cannot be written; names the file and what it takes.
    """
    if (target / "grids.json").exists():
        return PackedChips(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{target.name[:16]}.", dir=target.parent))
    try:
        grids = _write(part, chips, count, info)
        text = json.dumps([list(grid) for grid in grids])
        (part / "grids.json").write_text(text, encoding="utf-8")
        part.chmod(0o755)
        try:
            os.replace(part, target)
        except OSError:
            if not (target / "grids.json").exists():  # else another process was faster
                raise
    except OSError as error:
        raise OSError(
            error.errno,
            f"{error.strerror or error}; nothing of this pack is left. Free some space "
            "or pass cache(folder=...) on another disk. The pack was",
            str(target),
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return PackedChips(target)


def _write(
    folder: Path, chips: Iterator[StoredChip], count: int, info: DatasetInfo
) -> list[Grid]:
    """Plain writes, which fail loudly on a full disk where a mapping would crash."""
    grids: list[Grid] = []
    with ExitStack() as stack:
        files: dict[str, IO[bytes]] = {}
        kinds: dict[str, tuple[Any, ...]] = {}
        for number, chip in enumerate(chips):
            arrays = _arrays(chip, info)
            if not files:
                for name, array in arrays.items():
                    files[name] = stack.enter_context(
                        (folder / f"{name}.npy").open("wb")
                    )
                    kinds[name] = array.shape, array.dtype
                    header = header_data_from_array_1_0(array)
                    write_array_header_1_0(
                        files[name], header | {"shape": (count, *array.shape)}
                    )
            found = {name: (a.shape, a.dtype) for name, a in arrays.items()}
            if found != kinds:
                name = next(n for n in PARTS if found.get(n) != kinds.get(n))
                raise ValueError(
                    f"chip {number} has {_words(found.get(name))} as its {name}, the "
                    f"first has {_words(kinds.get(name))}. Only chips of one size and "
                    "type can be packed: cut them alike, or do without cache()."
                )
            for name, array in arrays.items():
                files[name].write(array.tobytes())
            grids.append(chip.grid)
    return grids


def _words(kind: tuple[Any, ...] | None) -> str:
    if kind is None:
        return "nothing"
    return f"{' x '.join(map(str, kind[0]))} {kind[1]}"


def _arrays(chip: StoredChip, info: DatasetInfo) -> dict[str, np.ndarray]:
    """The parts of a chip in their smallest types."""
    none = np.zeros(chip.image.shape[-2:], bool)
    arrays = {
        "image": np.ascontiguousarray(chip.image),
        "invalid": none if chip.invalid is None else chip.invalid,
    }
    if chip.mask is not None and chip.mask.dtype.kind == "f":
        arrays["mask"] = chip.mask
    elif chip.mask is not None:
        values = (0, len(info.classes), info.ignore_index)
        small = np.result_type(*(np.min_scalar_type(value) for value in values))
        arrays["mask"] = chip.mask.astype(small)
    return arrays
