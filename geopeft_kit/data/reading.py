"""One row of the index -> one sample: the pixels, checked the first time they are read.

Everything that can be wrong with a file is said here, with the chip's name: a file cut
short, a band too few, an image and a mask on different grids, NaN that nobody declared,
a mask value that is not a class. Taught in `notebooks/14_your_own_data.ipynb`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import rasterio
import torch
from rasterio.crs import CRS
from torch import Tensor

from geopeft_kit.data.chip import check_same_size
from geopeft_kit.data.info import DatasetInfo, mask_value_message
from geopeft_kit.open_raster import ALONE, open_raster

NOWHERE = (float("nan"),) * 4


class Grid(NamedTuple):
    """Size and place of a raster."""

    height: int
    width: int
    crs: str
    transform: tuple[float, ...]
    bounds: tuple[float, float, float, float]


@dataclass
class StoredChip:
    """A chip as it is kept in memory: stored values, so 8 bit stay 8 bit."""

    image: np.ndarray  # (C, H, W), or (C, 2, H, W) for a change pair
    mask: np.ndarray | None  # (H, W), int64 class numbers or float32 values
    invalid: np.ndarray | None  # (H, W) bool, True for no data; None: all is data
    grid: Grid  # of the image


class ChipReader:
    """Reads chips of a folder: some bands, by position in `info.bands`, as stored."""

    def __init__(self, folder: Path, info: DatasetInfo, bands: Sequence[int]) -> None:
        self.folder, self.info = folder, info
        self.indexes = [position + 1 for position in bands]  # rasterio counts from 1
        self.scale = self._per_band(info.scale)
        self.offset = self._per_band(info.offset)
        # Asking GDAL for CRS and nodata takes as long as decoding a mask, so each file
        # is asked when it is first read, and again only if its size has changed.
        self._asked: dict[str, tuple[Grid, float | None]] = {}

    def _per_band(self, value: float | tuple[float, ...]) -> np.ndarray:
        full = np.broadcast_to(np.asarray(value, "f4"), len(self.info.bands))
        return full[[i - 1 for i in self.indexes]]  # (C,)

    def read(
        self, chip: str, image: str, after: str | None = None, mask: str | None = None
    ) -> StoredChip:
        """Read and check the files of one chip, paths inside the folder.

        Args:
            chip: Its name, for messages.
            image: The image.
            after: The second date of a change pair.
            mask: The mask.

        Raises:
            RuntimeError: A file is missing or cannot be decoded.
            ValueError: Files that do not fit the data set or each other.
        """
        return self.read_many([(chip, image, after, mask)])[0]

    def read_many(
        self, files: Iterable[tuple[str, str, str | None, str | None]]
    ) -> list[StoredChip]:
        """Several chips, each given by the arguments of `read`, in one GDAL set-up."""
        with rasterio.Env(**ALONE):
            return [self._read(*each) for each in files]

    def _about(
        self, name: str, raster: rasterio.DatasetReader
    ) -> tuple[Grid, float | None]:
        """Size and place of a file, and its own nodata value."""
        known = self._asked.get(name)
        if known is None or known[0][:2] != raster.shape:
            known = self._asked[name] = _grid(raster), raster.nodata
        return known

    def _read(
        self, chip: str, image: str, after: str | None, mask: str | None
    ) -> StoredChip:
        pixels, invalid, grid = self._read_image(chip, image)
        if after is not None:
            second, invalid_2, grid_2 = self._read_image(chip, after)
            _same_grid(chip, "image_after", grid_2, grid)
            pixels = np.stack([pixels, second], axis=1)  # (C, 2, H, W)
            if invalid is not None or invalid_2 is not None:
                none = np.zeros(pixels.shape[-2:], bool)
                invalid = (none if invalid is None else invalid) | (
                    none if invalid_2 is None else invalid_2
                )
        target = self._read_mask(chip, mask, grid) if mask is not None else None
        if target is not None and invalid is not None:
            empty = np.nan if target.dtype.kind == "f" else self.info.ignore_index
            target[invalid] = empty
        return StoredChip(pixels, target, invalid, grid)

    def _read_image(
        self, chip: str, name: str
    ) -> tuple[np.ndarray, np.ndarray | None, Grid]:
        count = len(self.info.bands)
        with open_raster(self.folder / name, chip) as raster:
            if raster.count != count:
                raise ValueError(
                    f"chip {chip!r}: {name} has {raster.count} bands, but the data set "
                    f"names {count}: {', '.join(self.info.bands)}. Correct the file, "
                    "or the bands of the data set."
                )
            pixels = raster.read(self.indexes)
            grid, own = self._about(name, raster)
            nodata = own if self.info.nodata is None else self.info.nodata
        invalid: np.ndarray | None = None
        if nodata is not None:
            # (H, W): a pixel is whole or it is nothing
            invalid = np.any(_equals(pixels, nodata), axis=0)
            if not invalid.any():
                invalid = None
        if pixels.dtype.kind == "f":
            bad = ~np.isfinite(pixels)
            if invalid is not None:
                bad &= ~invalid
            if bad.any():
                raise ValueError(
                    f"chip {chip!r}: {int(bad.sum())} of {bad.size} values of {name} "
                    "are NaN or infinite, and nodata is not declared so. Fill them, or "
                    "write the folder with nodata=float('nan') in its facts."
                )
        return pixels, invalid, grid

    def _read_mask(self, chip: str, name: str, image: Grid) -> np.ndarray:
        info = self.info
        with open_raster(self.folder / name, chip) as raster:
            if raster.count != 1:
                raise ValueError(
                    f"chip {chip!r}: mask {name} has {raster.count} bands; expected 1."
                )
            values = raster.read(1)
            grid, nodata = self._about(name, raster)
            _same_grid(chip, f"mask {name}", grid, image)
        if info.task == "regression":
            values = values.astype(np.float32)
            if nodata is not None:
                values[_equals(values, float(np.float32(nodata)))] = np.nan
            values[~np.isfinite(values)] = np.nan
            return values
        if values.dtype.kind == "f":  # class numbers saved as floats
            whole = np.where(values == np.floor(values), values, -1).astype(np.int64)
        else:
            whole = values.astype(np.int64)
        if nodata is not None and nodata != info.ignore_index:
            whole[_equals(values, nodata)] = info.ignore_index
        if np.min(whole) < 0 or np.max(whole) >= len(info.classes):
            self._check_classes(chip, values, whole)
        return whole

    def _check_classes(self, chip: str, values: np.ndarray, whole: np.ndarray) -> None:
        """Say which mask values are not a class."""
        bad = (whole < 0) | (whole >= len(self.info.classes))
        bad &= whole != self.info.ignore_index
        if bad.any():
            wrong = np.unique(values[bad]).tolist()
            raise ValueError(mask_value_message(chip, wrong, self.info))

    def reflectance(self, stored: StoredChip) -> Tensor:
        """(C, H, W) or (C, 2, H, W) float32 reflectance, 0 where there is no data."""
        shape = (-1, *(1,) * (stored.image.ndim - 1))
        scale, offset = self.scale.reshape(shape), self.offset.reshape(shape)
        # torch's memory, filled in one pass: half the time of casting and scaling.
        image = torch.empty(stored.image.shape)
        values = image.numpy()
        np.multiply(stored.image, scale, out=values, dtype="f4", casting="unsafe")
        if offset.any():
            values += offset
        if stored.invalid is not None:
            values[..., stored.invalid] = 0.0
        return image


def _equals(values: np.ndarray, nodata: float) -> np.ndarray:
    """Where values are nodata, which may be NaN."""
    return np.isnan(values) if np.isnan(nodata) else values == nodata


def _grid(raster: rasterio.DatasetReader) -> Grid:
    size = raster.height, raster.width
    if raster.crs is None:
        return Grid(*size, "", (), NOWHERE)
    crs = _crs_text(raster.crs)
    return Grid(*size, crs, tuple(raster.transform)[:6], tuple(raster.bounds))


@lru_cache(maxsize=256)
def _crs_text(crs: CRS) -> str:
    """Short name of a CRS; looking it up takes longer than a chip's mask."""
    return crs.to_string()


def _same_grid(chip: str, what: str, found: Grid, image: Grid) -> None:
    """Refuse two rasters of different size, CRS or place (by more than a pixel/10)."""
    check_same_size(chip, what, found, image)
    if not found.crs or not image.crs:
        return  # a PNG mask of a GeoTIFF: the size is all there is to compare
    if found.crs != image.crs:
        raise ValueError(
            f"chip {chip!r}: {what} is in {found.crs}, its image in {image.crs}. Warp "
            "the mask to the image's grid (nearest neighbour)."
        )
    pixel = abs(image.transform[0]) + abs(image.transform[1])
    shift = max(abs(a - b) for a, b in zip(found.bounds, image.bounds, strict=True))
    if shift > 0.1 * pixel:
        raise ValueError(
            f"chip {chip!r}: {what} is {shift / pixel:.1f} pixels away from its "
            f"image (bounds {found.bounds} and {image.bounds}). Warp it to the image's "
            "grid."
        )
