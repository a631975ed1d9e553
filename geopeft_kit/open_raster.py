"""The one way to open a raster file: without noise, refused in plain words."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import rasterio
from rasterio.errors import NotGeoreferencedWarning, RasterioError

# GDAL lists the whole folder at each open to find side files; with thousands of chips
# that costs more than reading. For `rasterio.Env`, where a file has no side files.
ALONE = {"GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR"}


class UnreadableRaster(ValueError, RuntimeError):
    """A raster that is missing, cut short or damaged; names it, and its chip."""


@contextmanager
def open_raster(
    path: str | os.PathLike[str], chip: str = ""
) -> Iterator[rasterio.DatasetReader]:
    """A raster file for the length of a `with` block; `chip` is for messages.

    Raises:
        UnreadableRaster: It cannot be opened, or the block meets broken data in it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with rasterio.open(path) as raster:
                yield raster
    except RasterioError as error:
        what = f"chip {chip!r}: {path}" if chip else f"{path}"
        if not Path(path).exists():
            raise UnreadableRaster(
                f"{what} is missing. Copy it back, or write the chip folder again."
            ) from error
        raise UnreadableRaster(
            f"{what} cannot be read as a raster: {error}. It may be cut short or "
            "damaged; copy or download it again."
        ) from error
