"""A box on Earth -> its pixels, from a raster or a STAC API.

Only the window that the box needs is read. `rasterio` reads and warps, so no data-cube
library is needed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio.crs import CRS
from rasterio.enums import Resampling
from rasterio.transform import from_origin
from rasterio.vrt import WarpedVRT
from rasterio.warp import transform_bounds

from geopeft_kit.bands import resolve_bands
from geopeft_kit.files import check_not_input
from geopeft_kit.geodesy import placed
from geopeft_kit.open_raster import open_raster
from geopeft_kit.scenes.rasters import RowWriter, SceneReader
from geopeft_kit.scenes.stac import BandFile, band_files, cloud_file, find_item

Box = tuple[float, float, float, float]
MAX_SIDE = 4096  # pixels along a side of a box
# So that GDAL reads only the window it needs of a file on the web.
REMOTE = {
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "GDAL_HTTP_MAX_RETRY": "2",
    "GDAL_HTTP_TIMEOUT": "30",
}


def fetch_scene(
    box: Sequence[float],
    target: str | os.PathLike[str],
    source: str | os.PathLike[str],
    bands: str | Sequence[str] = "hls",
    dates: tuple[str, str] = ("2024-05-01", "2024-09-30"),
    collection: str = "sentinel-2-l2a",
    resolution: float | None = None,
    crs: Any = None,
    mask_clouds: bool = True,
    scale: float | None = None,
    offset: float = 0.0,
    nodata: float | None = None,
    modifier: Callable[[Any], Any] | None = None,
) -> Path:
    """Write the pixels of a box as a GeoTIFF of reflectance.

    Args:
        box: West, south, east, north in degrees.
        target: The GeoTIFF to write: float32, nodata NaN, one described band each.
        source: A raster that rasterio opens, or the address of a STAC API
            ("https://earth-search.aws.element84.com/v1").
        bands: Bands to read, by name.
        dates: First and last day; of the scenes that cover most of the box, the least
            cloudy is taken. For a STAC API only, like `collection`, `mask_clouds` and
            `modifier`.
        collection: For instance "sentinel-2-l2a" or "HLSS30.v2.0".
        resolution: Side of a pixel in units of `crs`; by default that of the raster,
            or of the first band.
        crs: Coordinate system to write; by default that of the raster or scene.
        mask_clouds: Leave out the pixels that the scene's SCL or Fmask calls cloudy.
        scale: Reflectance per stored unit, for a raster that does not state it.
        offset: Used together with `scale`.
        nodata: A stored value of a raster that means no data, where it does not say so.
        modifier: Signs the items of an API that asks for it.

    Returns:
        The path of the file. Its tags name the scene, its day and its cloud cover.

    Raises:
        FileNotFoundError: No such raster or folder.
        LookupError: The API has no such scene or band.
        RuntimeError: No network, or a file cannot be read.
        ValueError: The box is malformed, too large, or outside the raster.
    """
    box = _checked_box(box)
    names = resolve_bands(bands)
    target = Path(target)
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"The folder {str(target.parent)!r} does not exist. Create it first."
        )
    hidden, tags = None, {"source": str(source)}
    with rasterio.Env(**REMOTE):
        if is_api(source):
            item = find_item(str(source), collection, box, dates, modifier)
            files = band_files(item, names)
            if mask_clouds:
                hidden = cloud_file(item)
            tags |= {
                "scene": item.id,
                "date": str(item.properties.get("datetime", "")),
                "cloud_cover": str(item.properties.get("eo:cloud_cover", "")),
            }
            first = next(iter(files.values())).href
            grid = _grid(first, box, crs, resolution)
            image = np.stack([_read_band(file, grid) for file in files.values()])
        else:
            grid = _grid(os.fspath(source), box, crs, resolution)
            image = _read_raster(source, names, grid, scale, offset, nodata)
            with open_raster(source) as raster:
                check_not_input([target], raster.files)
        if hidden is not None:
            address, rule = hidden
            clouds = _warped(address, [1], grid, Resampling.nearest, None)[0]
            image[:, rule(np.nan_to_num(clouds)) | np.isnan(clouds)] = np.nan
    if not np.isfinite(image).any():
        raise LookupError(
            f"{tags.get('scene', source)} has no clear pixel in the box. Take other "
            "dates, or mask_clouds=False to look at the clouds."
        )
    write_values(target, image, names, grid, tags)
    return target


def is_api(source: str | os.PathLike[str]) -> bool:
    """Whether a source is the address of a STAC API and not of one raster."""
    name = os.fspath(source).lower()
    return name.startswith(("http://", "https://")) and not name.split("?")[0].endswith(
        (".tif", ".tiff", ".vrt", ".jp2")
    )


def _checked_box(box: Sequence[float]) -> Box:
    values = tuple(float(value) for value in box)
    if len(values) != 4:
        raise ValueError(f"box={values} has to be west, south, east, north.")
    west, south, east, north = values
    if not (-180 <= west < east <= 180 and -90 < south < north < 90):
        raise ValueError(
            f"box={values} is not west, south, east, north in degrees, with west "
            "below east and south below north. A box does not cross 180 degrees."
        )
    return west, south, east, north


def _grid(name: str, box: Box, crs: Any, resolution: float | None) -> dict[str, Any]:
    """The pixels to read: those of the file where it is not warped."""
    with open_raster(name) as raster:
        crs = CRS.from_user_input(crs) if crs else raster.crs
        same = raster.crs == crs
        if not placed(crs):
            raise ValueError(
                f"{name} has {crs or 'no coordinate system'}, so it has no place on "
                "Earth. Set its CRS first."
            )
        west, south, east, north = transform_bounds("EPSG:4326", crs, *box)
        side = resolution or (abs(raster.transform.a) if same else None)
        if side is None or side <= 0:
            raise ValueError(
                f"resolution={resolution} is not the side of a pixel in {crs}; "
                "it is needed with crs=, and above 0."
            )
        # Aligned with the file's pixels, so that without warping nothing is resampled.
        x0, y0 = (raster.transform.c, raster.transform.f) if same else (0.0, 0.0)
    left = x0 + np.floor((west - x0) / side + 1e-6) * side
    top = y0 + np.ceil((north - y0) / side - 1e-6) * side
    width = max(1, round(np.ceil((east - left) / side - 1e-6)))
    height = max(1, round(np.ceil((top - south) / side - 1e-6)))
    if max(width, height) > MAX_SIDE:
        raise ValueError(
            f"the box is {width} x {height} pixels of {side:g}; at most {MAX_SIDE} per "
            "side are read. Draw a smaller box, or pass a coarser resolution=."
        )
    return {
        "crs": crs,
        "transform": from_origin(left, top, side, side),
        "width": width,
        "height": height,
    }


def _warped(
    name: str, indexes: Sequence[int], grid: dict[str, Any], resampling: Resampling,
    nodata: float | None,
) -> np.ndarray:  # fmt: skip
    """(C, H, W) float32 of a file on a grid, NaN where it has no data."""
    with open_raster(name) as raster:
        empty = raster.nodata if nodata is None else nodata
        with WarpedVRT(
            raster, resampling=resampling, src_nodata=empty, dtype="float32",
            nodata=float("nan"), **grid,
        ) as warped:  # fmt: skip
            return warped.read(list(indexes))


def _read_band(file: BandFile, grid: dict[str, Any]) -> np.ndarray:
    stored = _warped(file.href, [1], grid, Resampling.bilinear, file.nodata)[0]
    return stored * file.scale + file.offset


def _read_raster(
    source: str | os.PathLike[str],
    names: Sequence[str],
    grid: dict[str, Any],
    scale: float | None,
    offset: float,
    nodata: float | None,
) -> np.ndarray:
    """A local raster; its bands and scale are read as `predict_scene` reads them."""
    with SceneReader(source, names, scale=scale, offset=offset) as reader:
        indexes, gain, shift = reader.indexes, reader.gain, reader.offset
    stored = _warped(os.fspath(source), indexes, grid, Resampling.bilinear, nodata)
    if not np.isfinite(stored).any():
        raise ValueError(
            f"{source} has no data in this box. Draw the box on the raster."
        )
    return stored * gain + shift


def write_values(
    target: Path,
    image: np.ndarray,
    names: Sequence[str],
    grid: dict[str, Any],
    tags: dict[str, str] | None = None,
) -> None:
    """A GeoTIFF of float32 (C, H, W), read back before it takes its place."""
    profile = {"count": len(image), "dtype": "float32", "nodata": float("nan"), **grid}
    with RowWriter(target, profile, names) as writer:
        writer.raster.update_tags(**tags or {})
        writer.write(image.astype(np.float32))
        writer.check()
        writer.publish()
