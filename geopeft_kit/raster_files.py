"""The one way to open a raster: without warnings, and refused in plain words."""

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
    """A raster that is truncated, damaged or out of reach; names it, and its chip."""


class MissingRaster(UnreadableRaster, FileNotFoundError):
    """There is no such raster on this machine."""


@contextmanager
def open_raster(
    path: str | os.PathLike[str], chip: str = ""
) -> Iterator[rasterio.DatasetReader]:
    """A raster for the length of a `with` block; `chip` is for messages.

    Args:
        path: A file, or anything else that rasterio opens: a URL, the text of a VRT.
        chip: Name of the chip that the file belongs to.

    Raises:
        MissingRaster: There is no such file.
        UnreadableRaster: It cannot be opened, or the block meets broken data in it.
    """
    name = os.fspath(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            raster = rasterio.open(name)
        with raster:
            yield raster
    except RasterioError as error:
        what = f"chip {chip!r}: {name}" if chip else name[:200]
        remote = "://" in name or name.startswith(("/vsi", "<VRTDataset"))
        if not remote and not Path(name).exists():
            advice = "Copy it back, or write the chip folder again."
            raise MissingRaster(
                f"{what} is missing. {advice if chip else 'Check the path.'}"
            ) from error
        advice = "It may be truncated or damaged; copy or download it again."
        raise UnreadableRaster(
            f"{what} cannot be read as a raster: {str(error).rstrip('.')}. "
            f"{'Check the network and the address.' if remote else advice}"
        ) from error
