"""Raster files, opened without noise and refused in plain words."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import rasterio
from rasterio.errors import NotGeoreferencedWarning, RasterioError


@contextmanager
def opened(path: Path) -> Iterator[rasterio.DatasetReader]:
    """A raster file for the length of a `with` block.

    Args:
        path: Of the file.

    Yields:
        The open raster.

    Raises:
        ValueError: It cannot be opened, or the block meets broken data in it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with rasterio.open(path) as raster:
                yield raster
    except RasterioError as error:
        raise ValueError(
            f"{path} cannot be read as a raster: {error}. Copy or download it again."
        ) from error
