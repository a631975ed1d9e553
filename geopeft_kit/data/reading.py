"""One row of the index -> one sample: the pixels, checked the first time they are read.

Everything that can be wrong with a file is said here, with the chip's name: a file cut
short, a band too few, an image and a mask on different grids, NaN that nobody declared,
a mask value that is not a class. Taught in `notebooks/14_your_own_data.ipynb`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import rasterio
import torch
from affine import Affine
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.windows import Window
from torch import Tensor

from geopeft_kit.data.chip import check_same_size
from geopeft_kit.data.info import DatasetInfo, mask_value_message
from geopeft_kit.geodesy import apply_affine, crs_name, same_crs
from geopeft_kit.open_raster import UNLISTED, Tags, open_raster, tags_of

NOWHERE = (float("nan"),) * 4
UNKNOWN = np.iinfo(np.int64).min  # a mask value that is no whole number, or no class

# The arguments of `ChipReader.read`: chip, image, image_after, mask, height and width.
Files = tuple[str, str, str | None, str | None, tuple[int, int] | None]


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


class About(NamedTuple):
    """What a file says about itself, asked once."""

    grid: Grid
    tags: Tags
    masked: bool  # by a mask inside or beside the file, or an alpha band


class ChipReader:
    """Reads chips of a folder: some bands, by position in `info.bands`, as stored.

    `numbers` are number in the masks -> number of the class, None for no label; empty
    where they agree.
    """

    def __init__(
        self,
        folder: Path,
        info: DatasetInfo,
        bands: Sequence[int],
        numbers: Mapping[int, int | None] | None = None,
    ) -> None:
        self.folder, self.info, self.numbers = folder, info, numbers
        self.indexes = [position + 1 for position in bands]  # rasterio counts from 1
        self.scale = self._per_band(info.scale)
        self.offset = self._per_band(info.offset)
        # Asking GDAL for CRS and tags takes as long as decoding a mask, so each file
        # is asked when it is first read, and again only if its size has changed.
        self.asked: dict[str, About] = {}

    def _per_band(self, value: float | tuple[float, ...]) -> np.ndarray:
        full = np.broadcast_to(np.asarray(value, "f4"), len(self.info.bands))
        return full[[i - 1 for i in self.indexes]]  # (C,)

    def read(
        self,
        chip: str,
        image: str,
        after: str | None = None,
        mask: str | None = None,
        size: tuple[int, int] | None = None,
    ) -> StoredChip:
        """Read and check the files of one chip, paths inside the folder.

        Args:
            chip: Its name, for messages.
            image: The image.
            after: The second date of a change pair.
            mask: The mask.
            size: Height and width that the index states.

        Raises:
            RuntimeError: A file is missing or cannot be decoded.
            ValueError: Files that do not fit the data set or each other.
        """
        return self.read_many([(chip, image, after, mask, size)])[0]

    def read_many(self, files: Iterable[Files]) -> list[StoredChip]:
        """Several chips, each given by the arguments of `read`, in one GDAL set-up."""
        with rasterio.Env(**UNLISTED):
            return [self._read(*each) for each in files]

    def _about(self, name: str, raster: rasterio.DatasetReader) -> About:
        known = self.asked.get(name)
        if known is None or known.grid[:2] != raster.shape:
            flags = raster.mask_flag_enums
            masked = any(MaskFlags.per_dataset in each for each in flags)
            known = self.asked[name] = About(_grid(raster), tags_of(raster), masked)
        return known

    def _read(
        self,
        chip: str,
        image: str,
        after: str | None,
        mask: str | None,
        size: tuple[int, int] | None,
    ) -> StoredChip:
        pixels, invalid, grid = self._read_image(chip, image, size)
        if after is not None:
            second, invalid_2, grid_2 = self._read_image(chip, after, grid[:2])
            _same_grid(chip, "image_after", grid_2, grid)
            pixels = np.stack([pixels, second], axis=1)  # (C, 2, H, W)
            if invalid is None or invalid_2 is None:
                invalid = invalid_2 if invalid is None else invalid
            else:
                invalid |= invalid_2
        target = self._read_mask(chip, mask, grid) if mask is not None else None
        if target is not None and invalid is not None:
            empty = np.nan if target.dtype.kind == "f" else self.info.ignore_index
            target[invalid] = empty
        return StoredChip(pixels, target, invalid, grid)

    def _read_image(
        self, chip: str, name: str, size: tuple[int, int] | None
    ) -> tuple[np.ndarray, np.ndarray | None, Grid]:
        count = len(self.info.bands)
        with open_raster(self.folder / name, chip) as raster:
            if raster.count != count:
                raise ValueError(
                    f"chip {chip!r}: {name} has {raster.count} bands, but the data set "
                    f"names {count}: {', '.join(self.info.bands)}. Correct the file, "
                    "or the bands of the data set."
                )
            if size is not None and raster.shape != size:
                raise ValueError(
                    f"chip {chip!r}: {name} is {raster.height} x {raster.width} pixels "
                    f"instead of {size[0]} x {size[1]}. Was the file replaced? Write "
                    "the chip folder again."
                )
            about = self._about(name, raster)
            pixels = raster.read(self.indexes)
            invalid = invalid_pixels(raster, pixels, self.info.nodata, about.masked)
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
        return pixels, invalid, about.grid

    def _read_mask(self, chip: str, name: str, image: Grid) -> np.ndarray:
        info = self.info
        with open_raster(self.folder / name, chip) as raster:
            about = self._about(name, raster)
            _same_grid(chip, f"mask {name}", about.grid, image)
            values, empty = read_target(raster, f"chip {chip!r}: mask {name}")
        if info.task == "regression":
            values = values.astype(np.float32)
            values[empty] = np.nan
            if info.ignore_index != 255:  # the default, which may be a true value
                values[values == info.ignore_index] = np.nan
            return values
        if values.dtype.kind == "f":  # class numbers saved as floats
            values = np.where(empty, 0, values)
            found = np.where(values == np.floor(values), values, UNKNOWN)
            found = found.astype(np.int64)
        else:
            found = values.astype(np.int64)
        if self.numbers:
            found = self._numbered(found)
        found[empty] = info.ignore_index
        if np.min(found) < 0 or np.max(found) >= len(info.classes):
            bad = (found < 0) | (found >= len(info.classes))
            bad &= found != info.ignore_index
            if bad.any():
                wrong = np.unique(values[bad]).tolist()
                raise ValueError(mask_value_message(chip, wrong, info, self.numbers))
        return found

    def _numbered(self, whole: np.ndarray) -> np.ndarray:
        """Numbers of classes (H, W) of the numbers in a mask."""
        found = np.full(whole.shape, UNKNOWN)
        ignore = self.info.ignore_index
        for value, number in {ignore: None, **(self.numbers or {})}.items():
            found[whole == value] = ignore if number is None else number
        return found

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


def invalid_pixels(
    raster: rasterio.DatasetReader,
    pixels: np.ndarray,
    nodata: float | None = None,
    masked: bool = True,
    window: Window | None = None,
) -> np.ndarray | None:
    """Where an open raster has no data, (H, W) bool; None where it has data everywhere.

    A pixel of `pixels` (C, H, W) is whole or it is nothing: it has none where a band
    holds `nodata` (None: the file's own value), or a mask or an alpha band hides it.
    `pixels` are of the `window`, None for the whole raster, perhaps thinned out.
    """
    nodata = raster.nodata if nodata is None else nodata
    invalid = np.zeros(pixels.shape[-2:], bool)
    if nodata is not None:
        if pixels.dtype.kind == "f":  # as the file holds it
            nodata = float(pixels.dtype.type(nodata))
        equal = np.isnan(pixels) if np.isnan(nodata) else pixels == nodata
        invalid |= equal.any(axis=0)
    if masked:
        flags = raster.mask_flag_enums
        if any(MaskFlags.per_dataset in each for each in flags):
            size = None if window else pixels.shape[-2:]
            invalid |= raster.dataset_mask(out_shape=size, window=window) == 0
    return invalid if invalid.any() else None


def read_target(
    raster: rasterio.DatasetReader, what: str
) -> tuple[np.ndarray, np.ndarray]:
    """Values (H, W) of an open mask file, and (H, W) bool where they are no label.

    Several bands are taken where they are one picture in grey, with or without alpha.
    """
    kinds = zip(raster.indexes, raster.colorinterp, strict=True)
    bands = [i for i, kind in kinds if kind is not ColorInterp.alpha]
    layers = raster.read(bands)
    if any((layer != layers[0]).any() for layer in layers[1:]):
        raise ValueError(
            f"{what} has {len(bands)} bands; expected 1 with a number for each class. "
            "Turn colours into such numbers first, or one band for each class by "
            "argmax."
        )
    values = layers[0]
    empty = invalid_pixels(raster, values[None])
    empty = np.zeros(values.shape, bool) if empty is None else empty
    return values, empty | ~np.isfinite(values) if values.dtype.kind == "f" else empty


def _grid(raster: rasterio.DatasetReader) -> Grid:
    size = raster.height, raster.width
    crs = crs_name(raster.crs) if raster.crs else ""
    if not crs:
        return Grid(*size, "", (), NOWHERE)
    return Grid(*size, crs, tuple(raster.transform)[:6], tuple(raster.bounds))


def _same_grid(chip: str, what: str, found: Grid, image: Grid) -> None:
    """Refuse two rasters of different size, CRS or place (by more than a pixel/10)."""
    check_same_size(chip, what, found, image)
    if not found.crs or not image.crs or found[2:] == image[2:]:
        return  # of a PNG mask of a GeoTIFF, the size is all there is to compare
    if not same_crs(found.crs, image.crs):
        raise ValueError(
            f"chip {chip!r}: {what} is in {found.crs}, its image in {image.crs}. Warp "
            "the mask to the image's grid (nearest neighbour)."
        )
    corners = np.array([0, image.width, 0]), np.array([0, 0, image.height])
    places = apply_affine(Affine(*found.transform), *corners)
    column, row = apply_affine(~Affine(*image.transform), *places)
    shift = np.hypot(column - corners[0], row - corners[1]).max()
    if shift > 0.1:
        raise ValueError(
            f"chip {chip!r}: {what} is {shift:.1f} pixels away from its image "
            f"(transforms {found.transform} and {image.transform}). Warp it to the "
            "image's grid."
        )
