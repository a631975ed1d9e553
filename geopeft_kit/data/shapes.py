"""Polygons and points on a raster: read, checked, brought to its CRS.

Taught in `notebooks/14_your_own_data.ipynb`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import rasterio
import shapely
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.warp import transform_bounds

from geopeft_kit.data.ground import apply_affine, footprint_of
from geopeft_kit.data.info import DatasetInfo

if TYPE_CHECKING:
    import geopandas as gpd

AREAS, POINTS = {"Polygon", "MultiPolygon"}, {"Point"}


@dataclass(frozen=True)
class Shapes:
    """What is burnt: shapes with a number each.

    Attributes:
        table: GeoDataFrame with a column "value".
        fill: Value of pixels outside of all shapes.
        nothing: Value that means "no label".
    """

    table: gpd.GeoDataFrame
    fill: float
    nothing: float


def make_shapes(
    table: gpd.GeoDataFrame,
    info: DatasetInfo,
    column: str | None = None,
    background: str | None = None,
) -> Shapes:
    """Shapes with the numbers of their classes.

    Args:
        table: Polygons or points.
        info: Facts of the data set to be.
        column: Where the class or value stands; None where there is one class only.
        background: Class of the ground between the shapes; None leaves it without a
            label.

    Returns:
        The shapes, still in their own CRS.

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


def open_scene(path: Path, bands: int) -> rasterio.DatasetReader:
    """Open a big raster, and refuse one that cannot be cut.

    Args:
        path: Of the raster.
        bands: How many it has to have.

    Returns:
        The open raster.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is not readable, has no CRS or another number of bands.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no raster {path}. Check the path.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            raster = rasterio.open(path)
    except RasterioError as error:
        raise ValueError(
            f"{path} cannot be read as a raster: {error}. Copy or download it again."
        ) from error
    problem = None
    if raster.crs is None:
        problem = (
            "has no CRS, so no shape can be placed on it. Assign the right one "
            "(gdal_edit.py -a_srs EPSG:...)"
        )
    elif raster.count != bands:
        problem = f"has {raster.count} bands, but {bands} are named. Name each band"
    if problem:
        raster.close()
        raise ValueError(f"{path} {problem}.")
    return raster


def to_scene(shapes: Shapes, raster: rasterio.DatasetReader) -> gpd.GeoDataFrame:
    """Shapes near a raster, in its CRS.

    Edges are cut into steps of at most ten pixels before they are projected: a line
    that is straight in one CRS is bent in another.

    Args:
        shapes: In any CRS.
        raster: The scene.

    Returns:
        Columns value and geometry; the later of two overlapping shapes wins.
    """
    table = shapes.table
    target = raster.crs.to_wkt()
    if table.crs.equals(target):
        return table
    box = transform_bounds(raster.crs, table.crs.to_wkt(), *raster.bounds)
    near = table.iloc[np.sort(table.sindex.query(shapely.box(*box)))]
    if near.geom_type.isin(AREAS).any():
        step = 10 * min(
            (box[2] - box[0]) / raster.width, (box[3] - box[1]) / raster.height
        )
        margin = (box[0] - step, box[1] - step, box[2] + step, box[3] + step)
        cut = shapely.intersection(near.geometry.to_numpy(), shapely.box(*margin))
        near = near.set_geometry(shapely.segmentize(cut, step), crs=table.crs)
    return near[~near.is_empty].to_crs(target)


def check_places(
    paths: Sequence[Path], table: gpd.GeoDataFrame, info: DatasetInfo
) -> None:
    """Refuse points that lie in none of the scenes, and polygons that touch none.

    Args:
        paths: Of the rasters.
        table: Polygons or points.
        info: Facts of the data set to be.

    Raises:
        ValueError: Names the first point, and the scenes.
    """
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
    """Which points lie in a raster.

    Args:
        points: In the raster's CRS.
        raster: The scene.

    Returns:
        (N,) bool.
    """
    column, row = pixel_of(points, raster)
    return (column >= 0) & (column < raster.width) & (row >= 0) & (row < raster.height)


def pixel_of(
    points: gpd.GeoDataFrame, raster: rasterio.DatasetReader
) -> tuple[np.ndarray, np.ndarray]:
    """Columns and rows of points, as fractions.

    Args:
        points: In the raster's CRS.
        raster: The scene.

    Returns:
        (N,) columns and (N,) rows.
    """
    x, y = points.geometry.x.to_numpy(), points.geometry.y.to_numpy()
    return apply_affine(~raster.transform, x, y)
