"""The user's polygons and points: read, checked, and brought to a raster's CRS."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import rasterio
import shapely
from pyogrio.errors import DataSourceError
from rasterio.warp import transform_bounds

from geopeft_kit.data.info import DatasetInfo
from geopeft_kit.data.own.tables import read_csv
from geopeft_kit.geodesy import apply_affine, footprint_of, placed
from geopeft_kit.open_raster import open_raster

AREAS, POINTS = {"Polygon", "MultiPolygon"}, {"Point"}
VECTORS = (".gpkg", ".shp", ".geojson", ".json", ".parquet", ".csv", ".fgb")


def is_vector(source: Any) -> bool:
    """Whether this is a GeoDataFrame, or a file with a vector format's ending."""
    if hasattr(source, "geometry") and hasattr(source, "crs"):
        return True
    single = isinstance(source, str | os.PathLike)
    return single and Path(source).suffix.lower() in VECTORS


def read_vector(
    source: str | os.PathLike[str] | gpd.GeoDataFrame, what: str
) -> gpd.GeoDataFrame:
    """Polygons or points of a file or GeoDataFrame, with a CRS and a geometry each.

    A GeoPackage, shapefile, GeoJSON or GeoParquet, or a CSV with the columns lon and
    lat (degrees); `what` they are is for messages.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not readable, empty, without a CRS, or a row has no
            geometry.
    """
    if isinstance(source, gpd.GeoSeries):
        source = gpd.GeoDataFrame(geometry=source)
    if isinstance(source, gpd.GeoDataFrame):
        table, name = source, f"the {what}"
    else:
        name = os.fspath(source)
        table = _read_file(Path(name), what)
    if table.empty:
        raise ValueError(f"{name} has no features; give at least one of the {what}.")
    if table.crs is None:
        raise ValueError(
            f"{name} has no CRS, so its place is not known. Set the one that it "
            'was drawn in: geopandas.read_file(...).set_crs("EPSG:...").'
        )
    lacking = np.flatnonzero((table.geometry.isna() | table.geometry.is_empty).array)
    if len(lacking):
        raise ValueError(
            f"{name}: {len(lacking)} of {len(table)} rows have no geometry or an empty "
            f"one, the first is row {lacking[0]}. Remove them: "
            "table[~(table.geometry.isna() | table.is_empty)]."
        )
    return table.reset_index(drop=True)


def _read_file(path: Path, what: str) -> gpd.GeoDataFrame:
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path} of {what}. Check the path.")
    if path.suffix.lower() == ".csv":
        table = read_csv(path)
        if not {"lon", "lat"} <= set(table):
            raise ValueError(
                f"{path} has the columns {', '.join(map(str, table))}; points need lon "
                "and lat, in degrees."
            )
        degrees = table[["lon", "lat"]].apply(pd.to_numeric, errors="coerce")
        bad = np.flatnonzero(
            degrees.isna().any(axis=1)
            | degrees.abs().gt({"lon": 180, "lat": 90}).any(axis=1)
        )
        if len(bad):
            raise ValueError(
                f"{path}: row {bad[0]} has no longitude from -180 to 180 and latitude "
                "from -90 to 90. Correct it, or check that they are not swapped."
            )
        places = gpd.points_from_xy(degrees["lon"], degrees["lat"], crs="EPSG:4326")
        return gpd.GeoDataFrame(table, geometry=places)
    read = gpd.read_parquet if path.suffix == ".parquet" else gpd.read_file
    try:
        table = read(path)
    except (DataSourceError, OSError, ValueError) as error:
        raise ValueError(
            f"{path} is not readable as {what}: {error}. Pass a GeoPackage, shapefile, "
            "GeoJSON or GeoParquet."
        ) from error
    if not isinstance(table, gpd.GeoDataFrame):
        raise ValueError(f"{path} has no geometry, so it holds no {what}.")
    return table


@dataclass(frozen=True)
class Shapes:
    """What is burnt: shapes with a number each."""

    table: gpd.GeoDataFrame  # with a column "value"
    fill: float  # of pixels outside of all shapes
    nothing: float  # means "no label"

    def labelled(self, mask: np.ndarray) -> np.ndarray:
        """Where a mask has a label."""
        return ~np.isnan(mask) if np.isnan(self.nothing) else mask != self.nothing


def make_shapes(
    table: gpd.GeoDataFrame,
    info: DatasetInfo,
    column: str | None = None,
    background: str | None = None,
) -> Shapes:
    """Shapes with the numbers of their classes, still in their own CRS.

    `column` holds the class or value, None where there is one class only; `background`
    is the class of the ground between the shapes, None leaves it without a label.

    Raises:
        ValueError: Shapes of another kind, no such column, or a value that is no
            class.
    """
    kinds = set(table.geom_type)
    if not (kinds <= AREAS or kinds <= POINTS):
        raise ValueError(
            f"the shapes are {', '.join(sorted(kinds))}; allowed are polygons alone or "
            "points alone. Lines become polygons with table.buffer(metres), several "
            "points in one row become rows with table.explode()."
        )
    if kinds <= AREAS:  # a bow-tie becomes two triangles, a spike goes
        whole = shapely.make_valid(
            table.geometry.to_numpy(), method="structure", keep_collapsed=False
        )
        table = table.set_geometry(whole, crs=table.crs)
    nothing = np.nan if info.task == "regression" else float(info.ignore_index)
    fill = nothing if background is None else float(info.class_number(background))
    return Shapes(
        table.assign(value=_values(table, info, column, background)), fill, nothing
    )


def _values(
    table: gpd.GeoDataFrame,
    info: DatasetInfo,
    column: str | None,
    background: str | None,
) -> list[float]:
    if column is None:
        rest = [name for name in info.classes if name != background]
        if len(rest) != 1:
            raise ValueError(
                "which column of the shapes holds the class or value? Pass column=... "
                "(it may be left out where one class is all there is)."
            )
        return [float(info.class_number(rest[0]))] * len(table)
    if column not in table:
        raise ValueError(f"the shapes have no column {column!r}.")
    values = []
    for row, value in enumerate(table[column].tolist()):
        try:
            number = (
                float(value) if info.task == "regression" else info.class_number(value)
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"row {row} of the shapes: {error}") from error
        if number != number or abs(number) == np.inf:
            raise ValueError(f"row {row} of the shapes has no number in {column!r}.")
        values.append(float(number))
    return values


@contextmanager
def open_scene(path: Path, bands: int) -> Iterator[rasterio.DatasetReader]:
    """A big raster, open; one without a CRS or with other bands cannot be cut.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is not readable, has no CRS or another number of bands.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no raster {path}. Check the path.")
    with open_raster(path) as raster:
        if not placed(raster.crs):
            what = f"a local CRS ({raster.crs})" if raster.crs else "no CRS"
            raise ValueError(
                f"{path} has {what}, so no shape can be placed on it. Assign the right "
                "one (gdal_edit.py -a_srs EPSG:...)."
            )
        if raster.count != bands:
            raise ValueError(
                f"{path} has {raster.count} bands, but {bands} are named. Name each "
                "band."
            )
        yield raster


def to_scene(shapes: Shapes, raster: rasterio.DatasetReader) -> gpd.GeoDataFrame:
    """Shapes near a raster, in its CRS; the later of two overlapping shapes wins.

    Edges are cut into steps of at most ten pixels before they are projected: a line
    that is straight in one CRS is bent in another.
    """
    table = shapes.table
    target, drawn = raster.crs.to_wkt(), table.crs.to_wkt()
    if table.crs.equals(target):
        return table
    left, low, right, high = transform_bounds(raster.crs, drawn, *raster.bounds)
    across = right < left  # a raster across 180 degrees
    step = 10 * min(
        (right - left + 360 * across) / raster.width, (high - low) / raster.height
    )
    left, low, right, high = left - step, low - step, right + step, high + step
    frame = shapely.box(left, low, right, high)
    if across:
        east = shapely.box(left, low, 180, high)
        frame = shapely.union(east, shapely.box(-180, low, right, high))
    near = table.iloc[np.sort(table.sindex.query(frame, predicate="intersects"))]
    if near.geom_type.isin(AREAS).any():
        cut = shapely.intersection(near.geometry.to_numpy(), frame)
        near = near.set_geometry(shapely.segmentize(cut, step), crs=table.crs)
    return near[~near.is_empty].to_crs(target)


def check_places(
    paths: Sequence[Path], table: gpd.GeoDataFrame, info: DatasetInfo
) -> None:
    """Refuse points that are in none of the scenes, and polygons that touch none."""
    found = np.zeros(len(table), bool)
    for path in paths:
        with open_scene(path, len(info.bands)) as raster:
            near = table.to_crs(raster.crs.to_wkt())
            outline = footprint_of(raster.transform, raster.height, raster.width)
            if set(near.geom_type) <= POINTS:
                found |= inside(near, raster)
            else:
                found |= near.intersects(outline).to_numpy()
    scenes = ", ".join(map(str, paths[:3])) + (", ..." if len(paths) > 3 else "")
    if not found.any():
        raise ValueError(
            f"no shape touches {scenes}. Is the CRS of the shapes "
            f"({table.crs.to_string()[:60]}) the one that they were drawn in?"
        )
    if set(table.geom_type) <= POINTS and not found.all():
        raise ValueError(
            f"{(~found).sum()} of {len(found)} points lie outside of {scenes}, the "
            f"first is row {int(np.argmin(found))}. Leave them out, as "
            "points.clip(...) does with a box around the scene, or check their CRS."
        )


def inside(points: gpd.GeoDataFrame, raster: rasterio.DatasetReader) -> np.ndarray:
    """Which points, in the raster's CRS, are in the raster: (N,) bool."""
    column, row = pixel_of(points, raster)
    return (column >= 0) & (column < raster.width) & (row >= 0) & (row < raster.height)


def pixel_of(
    points: gpd.GeoDataFrame, raster: rasterio.DatasetReader
) -> tuple[np.ndarray, np.ndarray]:
    """Columns and rows (N,) of points in the raster's CRS, as fractions."""
    x, y = points.geometry.x.to_numpy(), points.geometry.y.to_numpy()
    return apply_affine(~raster.transform, x, y)
