"""Chips of images and masks that lie on disk one by one, read once and checked."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rasterio.errors import NotGeoreferencedWarning

from geopeft_kit.data.chip import Chip
from geopeft_kit.data.info import DatasetInfo
from geopeft_kit.data.open_raster import open_raster
from geopeft_kit.data.pairing import Pair
from geopeft_kit.data.reading import ChipReader, Grid


def pair_chips(
    pairs: Sequence[Pair], info: DatasetInfo, numbers: Mapping[int, int]
) -> Iterator[Chip]:
    """Chips of files that lie on disk; each is read once and checked.

    Args:
        pairs: Images with masks or labels.
        info: Facts of the data set to be.
        numbers: Number in the user's masks -> number of the class; those that differ
            are renumbered. Empty where they agree.

    Yields:
        Chips whose pixels stay where they are, but for renumbered masks.

    Raises:
        ValueError: Files that do not fit the facts or each other.
    """
    reader = ChipReader(Path(), info, range(len(info.bands)))
    same = all(value == number for value, number in numbers.items())
    types: dict[str, str] = {}
    for pair in pairs:
        mask: Any = pair.mask
        plain = mask is None or info.target != "mask" or same
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            stored = reader.read(
                pair.name, str(pair.image), mask=str(mask) if mask and plain else None
            )
        types.setdefault(stored.image.dtype.name, pair.name)
        if len(types) > 1:
            (one, a), (other, b) = types.items()
            raise ValueError(
                f"image {a!r} is {one}, {b!r} is {other}; one scale cannot be right "
                "for both. Convert them alike."
            )
        if not plain:
            mask = _renumbered(pair, numbers, info, stored.grid)
        yield Chip(
            pair.name,
            pair.image.resolve(),
            mask.resolve() if isinstance(mask, Path) else mask,
            label=pair.label,
            region=pair.region or "everywhere",
            split=pair.split,
            date=pair.date,
            extra=pair.extra,
        )


def _renumbered(
    pair: Pair, numbers: Mapping[int, int], info: DatasetInfo, grid: Grid
) -> np.ndarray:
    """A mask whose values are class numbers instead of the user's own."""
    assert pair.mask is not None  # only masks are renumbered
    values = read_mask(pair.mask)
    if values.shape != (grid.height, grid.width):
        raise ValueError(
            f"chip {pair.name!r}: mask is {values.shape[0]} x {values.shape[1]} pixels,"
            f" its image {grid.height} x {grid.width}. Cut or warp both to one grid."
        )
    unknown = np.iinfo(np.int64).min
    result = np.full(values.shape, unknown, np.int64)
    result[values == info.ignore_index] = info.ignore_index
    for value, number in numbers.items():
        result[values == value] = number
    strange = np.unique(values[result == unknown]).tolist()
    if strange:
        raise ValueError(
            f"chip {pair.name!r}: mask value {strange[0]:g} is none of "
            f"{', '.join(map(str, numbers))} and {info.ignore_index} (no label). Add "
            "it to classes."
        )
    return result


def read_mask(path: Path) -> np.ndarray:
    """The first band (H, W) of a file.

    Raises:
        ValueError: It cannot be read as a raster.
    """
    with open_raster(path) as raster:
        return raster.read(1)
