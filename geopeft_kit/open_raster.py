"""The one way to open a raster: without noise, refused in plain words.

A file is opened by the driver that its name states, so that an image of a data set
cannot be a VRT that reads other files or the network.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import rasterio
from rasterio._err import CPLE_BaseError
from rasterio.errors import NotGeoreferencedWarning, RasterioError

from geopeft_kit.bands import resolve_bands

# GDAL lists the whole folder at each open to find side files; with thousands of chips
# that costs more than reading. So it asks for each of them by name.
UNLISTED = {"GDAL_DISABLE_READDIR_ON_OPEN": "TRUE"}
PICTURES = ("GTiff", "PNG", "JPEG", "JP2OpenJPEG", "BMP", "GIF", "WEBP")
DRIVERS = {
    ".tif": ("GTiff",),
    ".tiff": ("GTiff",),
    ".png": ("PNG",),
    ".jpg": ("JPEG",),
    ".jpeg": ("JPEG",),
    ".jp2": ("JP2OpenJPEG",),
    ".img": ("HFA", "ENVI"),
}  # tried first; a picture under another picture's name is read too
BROKEN = (RasterioError, CPLE_BaseError)


class UnreadableRaster(ValueError, RuntimeError):
    """A raster that is missing, cut short or damaged; names it, and its chip."""


@contextmanager
def open_raster(
    source: str | os.PathLike[str], chip: str = ""
) -> Iterator[rasterio.DatasetReader]:
    """A raster for the length of a `with` block.

    Args:
        source: A file, or any name that GDAL opens (NETCDF:..., /vsizip/...).
        chip: Name of the chip that it belongs to: only the formats above are taken.

    Raises:
        FileNotFoundError: There is no such file.
        UnreadableRaster: It cannot be opened, or the block meets broken data in it.
    """
    name = os.fspath(source)
    what = f"chip {chip!r}: {name}" if chip else name[:200]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with _opened(name, bool(chip)) as raster:
                yield raster
    except BROKEN as error:
        local = "://" not in name and not name.startswith(("/vsi", "<"))
        if chip and not Path(name).exists():
            raise UnreadableRaster(
                f"{what} is missing. Copy it back, or write the chip folder again."
            ) from error
        if local and ":" not in name and not Path(name).exists():
            raise FileNotFoundError(
                f"There is no raster at {name!r}. Check the path."
            ) from error
        advice = "It may be truncated or damaged; copy or download it again."
        raise UnreadableRaster(
            f"{what} cannot be read as a raster: {str(error).rstrip('.')}. "
            f"{advice if local else 'Check the network and the address.'}"
        ) from error


def _opened(name: str, strict: bool) -> rasterio.DatasetReader:
    own = DRIVERS.get(Path(name.split("?")[0]).suffix.lower(), ())
    remote = name.startswith(("http://", "https://", "s3://", "gs://"))
    if not (own or strict) or not (remote or Path(name).exists()):
        return rasterio.open(name)
    if strict and Path(f"{name}.msk").exists():
        # GDAL opens the mask beside a raster by any driver, a VRT among them.
        rasterio.open(f"{name}.msk", driver="GTiff").close()
    errors = []
    for driver in dict.fromkeys((*own, *PICTURES)):
        try:
            return rasterio.open(name, driver=driver)
        except BROKEN as error:
            errors.append(error)
    raise errors[0]


class Tags(NamedTuple):
    """What a raster file says about its numbers; None where it says nothing."""

    band_count: int
    dtype: str
    bands: tuple[str, ...] | None
    scaling: tuple[tuple[float, float], ...] | None  # scale and offset of each band
    nodata: float | None


def tags_of(raster: rasterio.DatasetReader) -> Tags:
    """The tags of an open raster; complex numbers are refused."""
    dtype = raster.dtypes[0]
    if np.dtype(dtype).kind == "c":
        raise ValueError(
            f"{raster.name} holds complex numbers ({dtype}), as radar scenes in slant "
            "range do. Write their amplitude or intensity to a file first."
        )
    scaling = tuple(zip(raster.scales, raster.offsets, strict=True))
    stated = None if set(scaling) == {(1.0, 0.0)} else scaling
    bands = band_names(raster.descriptions)
    return Tags(raster.count, dtype, bands, stated, raster.nodata)


def band_names(descriptions: Sequence[str | None]) -> tuple[str, ...] | None:
    """Descriptions of all bands in the kit's spelling; None where one is no name."""
    try:
        return resolve_bands([str(name) for name in descriptions])
    except ValueError:
        return None


def check_alike(
    path: Path, tags: Tags, first_path: Path, first: Tags, silence: bool = True
) -> None:
    """Refuse a file whose tags disagree with those of the first file of its set.

    With `silence`, a file without a tag agrees with all.
    """
    for what, here, there in zip(Tags._fields, tags, first, strict=True):
        unsaid = here is None or there is None
        same = here == there or str(here) == str(there)  # NaN is not itself
        if same or (unsaid and (silence or what != "nodata")):
            continue
        words = {"band_count": "bands", "dtype": "values", "scaling": "(scale, offset)"}
        raise ValueError(
            f"{path} holds {here} {words.get(what, what)}, {first_path} {there}. One "
            "set of files needs one meaning: convert them alike."
        )
