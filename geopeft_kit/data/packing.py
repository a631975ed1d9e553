"""All chips of a data set in one file that is mapped into memory.

Decoding a compressed GeoTIFF costs more than using it. Packed once, an epoch reads
plain numbers, and the system keeps as much of the file in memory as there is room for.
A pack is named after the content of every file that it was made from, so it cannot go
stale: other files, another pack. Taught in `notebooks/14_your_own_data.ipynb`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib.format import header_data_from_array_1_0, write_array_header_1_0

from geopeft_kit.data.info import DatasetInfo
from geopeft_kit.data.reading import Grid, StoredChip
from geopeft_kit.files import content_key, whole_folder

VERSION = 1
PARTS = ("image", "mask", "invalid")


@dataclass
class PackedChips:
    """Chips in a pack, by row of the index.

    The folder holds image.npy, mask.npy, invalid.npy and grids.json.
    """

    folder: Path
    _open: dict[str, Any] = field(default_factory=dict, repr=False)

    def read(self, row: int) -> StoredChip:
        """One chip as `ChipReader.read` returns it; the image is a view of the file."""
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
    """Name of the pack of some files of a folder, in the order of the index.

    `facts` is a text of whatever else decides about stored values.
    """
    made_from = [VERSION, list(bands), facts, list(files)]
    return content_key(made_from, [folder / name for name in files])[:32]


def pack(
    target: Path, chips: Iterator[StoredChip], count: int, info: DatasetInfo
) -> PackedChips:
    """Write a pack of `count` chips, whole or not at all; one that is there is used.

    Raises:
        ValueError: Chips differ in size or type.
        OSError: It cannot be written; names the file and what it takes.
    """
    if (target / "grids.json").exists():
        return PackedChips(target)
    try:
        # Another process may be faster, and makes the same.
        with suppress(FileExistsError), whole_folder(target, replace=False) as part:
            grids = _write(part, chips, count, info)
            text = json.dumps([list(grid) for grid in grids])
            (part / "grids.json").write_text(text, encoding="utf-8")
    except OSError as error:
        raise OSError(
            error.errno,
            f"{error.strerror or error}; nothing of this pack is left. Free some space "
            "or pass cache(folder=...) on another disk. The pack was",
            str(target),
        ) from error
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
