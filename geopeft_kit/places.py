"""Any place: a box on Earth becomes pixels, and pixels become a prediction on the map.

The pixels come from a local GeoTIFF or VRT, or from a STAC API; only the window that
the box needs is read. `rasterio` reads and warps, so no data-cube library is needed.
Taught in `notebooks/09_unseen_regions.ipynb`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import rasterio
from rasterio.crs import CRS
from rasterio.enums import Resampling
from rasterio.transform import from_origin
from rasterio.vrt import WarpedVRT
from rasterio.warp import transform_bounds

from .bands import resolve_bands
from .files import check_not_input
from .geodesy import placed
from .inference import predict_scene
from .map_layers import MapLayer
from .open_raster import UnreadableRaster, open_raster
from .rasters import RowWriter, SceneReader
from .stac import BandFile, band_files, cloud_file, find_item

if TYPE_CHECKING:
    from .pictures import Colours

Box = tuple[float, float, float, float]
LARGEST = 4096  # pixels along a side of a box
GRID = ("width", "height", "crs", "transform")
# What GDAL has to know to read a window of a file on the web, and no more of it.
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
        dates: First and last day; the least cloudy scene that shows the box is taken.
            For a STAC API only, like `collection`, `mask_clouds` and `modifier`.
        collection: For instance "sentinel-2-l2a" or "HLSS30.v2.0".
        resolution: Side of a pixel in units of `crs`; by default that of the raster,
            or of the first band.
        crs: Coordinate system to write; by default that of the raster or scene.
        mask_clouds: Leave out what the scene's own cloud band (SCL or Fmask) hides.
        scale: Reflectance per stored unit of a raster that does not say it.
        offset: Used together with `scale`.
        nodata: A stored value of a raster that means no data, where it does not say so.
        modifier: Signs the items of an API that asks for it.

    Returns:
        The path of the file. Its tags name the scene, its day and its cloud cover.

    Raises:
        FileNotFoundError: No such raster or folder.
        LookupError: The API has no such scene or band.
        RuntimeError: No network, or a file cannot be read.
        ValueError: A box that is none, too large, or outside of the raster.
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
            with _opened(os.fspath(source)) as raster:
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
    _write(target, image, names, grid, tags)
    return target


def predict_place(
    box: Sequence[float],
    model: Any,
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    classes: Sequence[str] | None = None,
    colours: Colours | None = None,
    name: str = "prediction",
    **options: Any,
) -> list[MapLayer]:
    """Predict a box, as layers for a map; made for `show_map(..., on_box=...)`.

    Args:
        box: West, south, east, north in degrees.
        model: A trained segmentation model; its backbone says which bands it wants.
        source: See `fetch_scene`.
        folder: Where scene and prediction are kept, numbered.
        classes: Class names; by default `model.classes`.
        colours: One per class; by default `model.colours`.
        name: Of the prediction's layer.
        **options: Of `fetch_scene`.

    Returns:
        The image, the prediction with its probabilities, and its confidence.

    Raises:
        FileNotFoundError: The folder does not exist; and all errors of `fetch_scene`.
        ValueError: Neither `classes` nor the model says what the classes are called.
    """
    classes = getattr(model, "classes", None) if classes is None else classes
    if classes is None:
        raise ValueError(
            "the model has no class names, since gk.fit did not train it on data with "
            "names. Pass classes=[...]."
        )
    folder = Path(folder)
    number = len(list(folder.glob("place_*_scene.tif"))) + 1
    scene = fetch_scene(box, folder / f"place_{number:02d}_scene.tif", source,
                        bands=model.backbone.bands, **options)  # fmt: skip
    target = folder / f"place_{number:02d}.tif"
    predict_scene(model, scene, target, scale=1.0, classes=classes, colours=colours,
                  probabilities=True, progress=False)  # fmt: skip
    chances = target.with_name(f"{target.stem}_probabilities.tif")
    sure = target.with_name(f"{target.stem}_confidence.tif")
    with rasterio.open(chances) as raster:
        highest = np.nanmax(raster.read(), axis=0, initial=0.0)[None]
        highest[highest == 0] = np.nan
        profile = raster.profile
    _write(sure, highest, [], {name: profile[name] for name in GRID}, {})
    label = f"{name} of box {number}"
    return [
        MapLayer(f"image of box {number}", scene, bands=model.backbone.bands),
        MapLayer(label, target, "classes", classes=classes, colours=colours,
                 probabilities=chances),
        MapLayer(f"confidence of {label}", sure, "values", visible=False,
                 limits=(1 / len(classes), 1.0)),
    ]  # fmt: skip


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
            f"box={values} is none in degrees: west, south, east, north, with west "
            "below east and south below north. A box does not cross 180 degrees."
        )
    return west, south, east, north


def _grid(name: str, box: Box, crs: Any, resolution: float | None) -> dict[str, Any]:
    """The pixels to read: those of the file where it is not warped."""
    with _opened(name) as raster:
        crs = crs or raster.crs
        own = raster.crs == crs
        crs = CRS.from_user_input(crs) if crs else None
        if not placed(crs):
            raise ValueError(
                f"{name} has {crs or 'no coordinate system'}, so no place is in it."
            )
        west, south, east, north = transform_bounds("EPSG:4326", crs, *box)
        side = resolution or (abs(raster.transform.a) if own else None)
        if side is None or side <= 0:
            raise ValueError(
                f"resolution={resolution} is no side of a pixel in units of {crs}; it "
                "is needed with crs=, and above 0."
            )
        # On the file's own corner, so that without warping no value is interpolated.
        x0, y0 = (raster.transform.c, raster.transform.f) if own else (0.0, 0.0)
    left = x0 + np.floor((west - x0) / side + 1e-6) * side
    top = y0 + np.ceil((north - y0) / side - 1e-6) * side
    width = max(1, round(np.ceil((east - left) / side - 1e-6)))
    height = max(1, round(np.ceil((top - south) / side - 1e-6)))
    if max(width, height) > LARGEST:
        raise ValueError(
            f"the box is {width} x {height} pixels of {side:g}; up to {LARGEST} a side "
            "are read. Draw a smaller box, or pass a coarser resolution=."
        )
    return {
        "crs": crs,
        "transform": from_origin(left, top, side, side),
        "width": width,
        "height": height,
    }


@contextlib.contextmanager
def _opened(name: str) -> Any:
    try:
        with open_raster(name) as raster:
            yield raster
    except UnreadableRaster as error:
        if not name.startswith(("http", "/vsi")):
            raise
        raise RuntimeError(
            f"{name} cannot be read: check the network ({error.__cause__})"
        ) from error


def _warped(
    name: str, indexes: Sequence[int], grid: dict[str, Any], resampling: Resampling,
    nodata: float | None,
) -> np.ndarray:  # fmt: skip
    """(C, H, W) float32 of a file on a grid, NaN where it has no data."""
    with _opened(name) as raster:
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


def _write(
    target: Path,
    image: np.ndarray,
    names: Sequence[str],
    grid: dict[str, Any],
    tags: dict[str, str],
) -> None:
    """A GeoTIFF of float32, read back before it takes its place."""
    profile = {"count": len(image), "dtype": "float32", "nodata": float("nan"), **grid}
    writer = RowWriter(target, profile, names, tags=tags)
    try:
        writer.write(image.astype(np.float32))
        writer.check()
        writer.publish()
    finally:
        writer.discard()
