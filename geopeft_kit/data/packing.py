"""All chips of a data set in one file that is mapped into memory.

Decoding a compressed GeoTIFF costs more than using it. Packed once, an epoch reads
plain numbers, and the system keeps as much of the file in memory as there is room for.
A pack is named after the content of every file that it was made from, so it cannot go
stale: other files, another pack. Taught in `notebooks/14_your_own_data.ipynb`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from geopeft_kit.array_store import ArrayStore
from geopeft_kit.data.info import DatasetInfo
from geopeft_kit.data.reading import Grid, StoredChip
from geopeft_kit.files import content_key

VERSION = 2
PARTS = ("image", "mask", "invalid")


class PackedChips:
    """Chips in a pack, by row of the index."""

    def __init__(self, store: ArrayStore) -> None:
        self.store = store

    def read(self, row: int) -> StoredChip:
        """One chip as `ChipReader.read` returns it; the image is a view of the file."""
        parts = self.store.row(row)
        mask = parts.get("mask")
        if mask is not None:
            mask = mask.astype(np.float32 if mask.dtype.kind == "f" else np.int64)
        invalid = parts["invalid"] if parts["invalid"].any() else None
        height, width, crs, transform, bounds = self.store.facts[row]
        grid = Grid(height, width, crs, tuple(transform), tuple(bounds))
        return StoredChip(parts["image"], mask, invalid, grid)


def pack_key(
    folder: Path, files: Sequence[str], bands: Sequence[str], facts: str
) -> str:
    """Name of the pack of some files of a folder, in the order of the index.

    `facts` is a text of whatever else decides about stored values.
    """
    made_from = [VERSION, list(bands), facts, list(files)]
    return content_key(made_from, [folder / name for name in files])[:32]


def pack(
    target: Path, chips: Iterator[StoredChip], count: int, info: DatasetInfo
) -> PackedChips:
    """Write a pack of `count` chips, whole or not at all; one that exists is used.

    Raises:
        ValueError: Chips differ in size or type.
        OSError: It cannot be written; names the folder and the remedy.
    """
    grids: list[list[Any]] = []
    try:
        store = ArrayStore.write(target, _parts(chips, info, grids), count, grids)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{error.strerror or error}; nothing of this pack is left. Free some space "
            "or pass cache(folder=...) on another disk. The pack was",
            str(target),
        ) from error
    return PackedChips(store)


def _parts(
    chips: Iterator[StoredChip], info: DatasetInfo, grids: list[list[Any]]
) -> Iterator[dict[str, np.ndarray]]:
    """The arrays of each chip, (1, ...); its grid goes to `grids`."""
    kinds: dict[str, tuple[Any, ...]] = {}
    for number, chip in enumerate(chips):
        arrays = _arrays(chip, info)
        found = {name: (array.shape, array.dtype) for name, array in arrays.items()}
        kinds = kinds or found
        if found != kinds:
            name = next(n for n in PARTS if found.get(n) != kinds.get(n))
            raise ValueError(
                f"chip {number} has {_words(found.get(name))} as its {name}, the first "
                f"has {_words(kinds.get(name))}. Only chips of one size and type can "
                "be packed: cut them alike, or do without cache()."
            )
        grids.append(list(chip.grid))
        yield {name: array[None] for name, array in arrays.items()}


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
