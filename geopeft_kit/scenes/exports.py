"""A prediction as files for other tools: COG, polygons, picture.

Every file is written whole or not at all. `gk.save_map` writes a web page.

Source:
    COG, a GeoTIFF that can be read in part over the web: https://cogeo.org.
    GeoJSON, in longitude and latitude: RFC 7946.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import rasterio
import rasterio.shutil
from rasterio.enums import Resampling

from geopeft_kit.files import check_not_input, whole_file
from geopeft_kit.geodesy import equal_area, footprint_of, placed, to_degrees
from geopeft_kit.open_raster import open_raster
from geopeft_kit.pictures import Colours, rgb_of
from geopeft_kit.scenes.rasters import check_whole, class_look, write_classes

MAX_POLYGONS = 2_000_000  # a larger file is too slow to open
MAX_SIDE = 4096  # pixels of a picture


def export_prediction(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    classes: Sequence[str] | None = None,
    colours: Colours | None = None,
    smallest_m2: float = 0.0,
) -> dict[str, Path]:
    """Write a class map as COG, GeoJSON and PNG.

    Args:
        source: A GeoTIFF of class numbers, as `gk.predict_scene` writes it.
        folder: Where to write; the files are named after the source.
        classes: Class names; by default those in the file.
        colours: One per class; by default the file's colour table.
        smallest_m2: Polygons of less area are left out of the GeoJSON.

    Returns:
        "cog", "geojson" and "png", each with its path.

    Raises:
        FileNotFoundError: No such raster or folder.
        ValueError: No class names, or more polygons than make sense.
    """
    source, folder = Path(source), Path(folder)
    if not source.is_file() or not folder.is_dir():
        lost = source if not source.is_file() else folder
        raise FileNotFoundError(f"{str(lost)!r} does not exist. Check the path.")
    names, table = class_look(source, classes, colours, f"{source.name}")
    check_not_input([folder / f"{source.stem}.png"], [str(source)])
    written = {
        "cog": folder / f"{source.stem}_cog.tif",
        "geojson": folder / f"{source.stem}.geojson",
        "png": folder / f"{source.stem}.png",
    }
    save_cog(source, written["cog"], names, table)
    save_polygons(source, written["geojson"], names, smallest_m2)
    save_picture(source, written["png"], table)
    return written


def save_cog(
    source: Path, target: Path, names: Sequence[str], colours: Sequence[str]
) -> Path:
    """A cloud-optimised GeoTIFF with colour table, class names and overviews.

    `source` is a GeoTIFF of class numbers; `colours` are "#rrggbb", one per class.
    """
    with (
        whole_file(target) as part,
        tempfile.TemporaryDirectory(dir=target.parent) as box,
    ):
        painted = Path(box) / "painted.tif"
        # A copy by blocks: GDAL crashes if it opens a damaged file to change it.
        with open_raster(source) as raster:
            profile = raster.profile | {"driver": "GTiff", "count": 1}
            with rasterio.open(painted, "w", **profile) as copy:
                for _, window in raster.block_windows(1):
                    copy.write(raster.read(1, window=window), 1, window=window)
                write_classes(copy, names, colours)
        # Overviews take the most frequent class: class numbers have no mean.
        rasterio.shutil.copy(painted, part, driver="COG", compress="deflate",
                             overview_resampling="mode", blocksize=256)  # fmt: skip
        check_whole(part)
    return target


def save_polygons(
    source: Path, target: Path, names: Sequence[str], smallest_m2: float = 0.0
) -> Path:
    """Patches of one class as GeoJSON polygons in longitude and latitude.

    Each feature has `class`, `number` and `area_m2`, computed in an equal-area
    projection; those below `smallest_m2` are left out. Raises ValueError for too many
    polygons.
    """
    import geopandas as gpd
    import shapely
    from rasterio.features import shapes

    with open_raster(source) as raster:
        if not placed(raster.crs):
            raise ValueError(
                f"{source} has {raster.crs or 'no coordinate system'}, so its polygons "
                "have no place on Earth. Set its CRS first."
            )
        outline = footprint_of(raster.transform, raster.height, raster.width)
        place = to_degrees([outline], raster.crs)
        band = rasterio.band(raster, 1)
        found, numbers = [], []
        for shape, number in shapes(band, mask=raster.dataset_mask(), connectivity=4):
            found.append(shapely.geometry.shape(shape))
            if not 0 <= number < len(names):
                raise ValueError(
                    f"{source} holds class {number:g}, but {len(names)} classes are "
                    f"named: {', '.join(names)}. Pass classes= with a name for each."
                )
            numbers.append(int(number))
            if len(found) > MAX_POLYGONS:
                raise ValueError(
                    f"{source} has more than {MAX_POLYGONS} patches. Smooth the "
                    "prediction, or cut it into parts."
                )
        crs = raster.crs
    table = gpd.GeoDataFrame(
        {"class": [names[n] for n in numbers], "number": numbers},
        geometry=found, crs=crs,
    )  # fmt: skip
    plane = equal_area(shapely.get_coordinates(place))
    table["area_m2"] = table.to_crs(plane).area.round(1)
    kept = table[table["area_m2"] >= smallest_m2]
    kept = kept.set_geometry(to_degrees(kept.geometry, crs), crs="EPSG:4326")
    with whole_file(target) as part:
        part.write_text(kept.to_json(drop_id=True), encoding="utf-8")
    return target


def save_picture(source: Path, target: Path, colours: Sequence[str]) -> Path:
    """A class map as PNG, transparent where there is no prediction.

    Sides of more than 4096 pixels are thinned out.
    """
    from PIL import Image

    with open_raster(source) as raster:
        thin = max(1.0, max(raster.width, raster.height) / MAX_SIDE)
        shape = (
            max(1, round(raster.height / thin)),
            max(1, round(raster.width / thin)),
        )
        numbers = raster.read(1, out_shape=shape, resampling=Resampling.nearest)
        known = raster.dataset_mask(out_shape=shape) > 0
    table = np.zeros((256, 3), np.uint8)
    table[: len(colours)] = rgb_of(colours)
    alpha = np.where(known, np.uint8(255), np.uint8(0))[..., None]
    rgba = np.concatenate([table[numbers] * (alpha > 0), alpha], axis=2)  # (h, w, 4)
    with whole_file(target) as part:
        Image.fromarray(rgba).save(part, "PNG")
    return target
