"""Places on the Earth: coordinate systems, footprints, sizes of pixels, areas.

Degrees come from here alone, so that 180 degrees and the poles are no special case
anywhere else. Source: RFC 7946, section 3.1.9 (shapes are cut at 180 degrees).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pyproj
import shapely
from affine import Affine
from rasterio.crs import CRS

DEGREES = "EPSG:4326"
CYLINDER = "EPSG:6933"  # of equal areas, in metres


def placed(crs: CRS | None) -> bool:
    """Whether a CRS says where on the Earth something is; a local one does not."""
    return crs is not None and (crs.is_projected or crs.is_geographic)


@lru_cache(maxsize=256)
def crs_name(crs: CRS) -> str:
    """Short name of the horizontal part of a CRS, "" for one that is not on Earth."""
    if not placed(crs):
        return ""
    system = pyproj.CRS.from_wkt(crs.to_wkt())
    if system.is_compound:  # heights change nothing about where a pixel is
        system = system.sub_crs_list[0]
    elif len(system.axis_info) > 2:
        system = system.to_2d()
    return CRS.from_wkt(system.to_wkt()).to_string()


@lru_cache(maxsize=256)
def same_crs(one: str, other: str) -> bool:
    """Whether two texts mean the same horizontal CRS."""
    return one == other or pyproj.CRS(one).equals(
        pyproj.CRS(other), ignore_axis_order=True
    )


@lru_cache(maxsize=64)
def _transformer(start: str, end: str) -> pyproj.Transformer:
    return pyproj.Transformer.from_crs(start, end, always_xy=True)


def apply_affine(
    transform: Affine, x: np.ndarray, y: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """An affine transform of points x and y, (N,) each."""
    a, b, c, d, e, f = tuple(transform)[:6]
    return a * x + b * y + c, d * x + e * y + f


def footprint_of(transform: Affine, height: float, width: float) -> shapely.Polygon:
    """Polygon of a raster or window of height x width pixels, in its own CRS."""
    x, y = np.array([0, width, width, 0]), np.array([0, 0, height, height])
    return shapely.Polygon(np.stack(apply_affine(transform, x, y), axis=1))


def metres_per_unit(crs: CRS, transform: Affine, height: float, width: float) -> float:
    """Metres on the ground of one step along a row or column, the shortest there is.

    Measured on the ellipsoid at the corners and the centre of height x width steps,
    since a degree or a unit of Web Mercator is not a fixed number of metres. The
    shortest keeps buffers safe. `transform` is the identity for plain coordinates.
    """
    x = np.array([0, 0, width, width, width / 2], float)
    y = np.array([0, height, 0, height, height / 2], float)
    to_degrees = _transformer(crs.to_wkt(), DEGREES)
    start = to_degrees.transform(*apply_affine(transform, x, y))
    lengths = []
    for dx, dy in ((1e-3 * width, 0.0), (0.0, 1e-3 * height)):
        end = to_degrees.transform(*apply_affine(transform, x + dx, y + dy))
        step = pyproj.Geod(ellps="WGS84").inv(*start, *end)[2]
        lengths.append(step / max(dx, dy))
    shortest = float(np.min(lengths))
    if not np.isfinite(shortest) or shortest <= 0:
        raise _off_the_earth(crs)
    return shortest


def _off_the_earth(crs: Any) -> ValueError:
    return ValueError(
        f"the raster's georeference is not on the Earth in {crs}. Check its CRS and "
        "transform."
    )


def to_degrees(shapes: Any, crs: CRS) -> np.ndarray:
    """Polygons (N,) in longitude and latitude, cut at 180 degrees, whole at a pole."""
    transformer = _transformer(crs.to_wkt(), DEGREES)

    def move(xy: np.ndarray) -> np.ndarray:
        return np.stack(transformer.transform(*xy.T), axis=1)  # (M, 2)

    shapes = np.asarray(shapes, dtype=object)
    found = shapely.transform(shapes, move)
    bounds = shapely.bounds(found)
    if not np.isfinite(bounds).all():
        raise _off_the_earth(crs)
    for number in np.flatnonzero(bounds[:, 2] - bounds[:, 0] > 180):
        shape = shapes[number]
        fine = shapely.segmentize(shape, shapely.length(shape) / 64)
        found[number] = _cut_at_180(shapely.transform(fine, move))
    return found


def _cut_at_180(shape: Any) -> Any:
    """Polygons whose longitudes jump -> polygons within -180 to 180."""
    pieces = []
    for polygon in shapely.get_parts(shape):
        outer = _unrolled(polygon.exterior)
        middle = outer[:, 0].mean()
        holes = [_unrolled(ring) for ring in polygon.interiors]
        for hole in holes:
            hole[:, 0] += 360 * np.round((middle - hole[:, 0].mean()) / 360)
        whole = shapely.make_valid(shapely.Polygon(outer, holes))
        for turn in (-360, 0, 360):
            part = shapely.clip_by_rect(whole, turn - 180, -90, turn + 180, 90)
            pieces.append(shapely.transform(part, lambda xy, t=turn: xy - [t, 0]))
    return shapely.union_all([p for p in pieces if shapely.area(p) > 0])


def _unrolled(ring: Any) -> np.ndarray:
    """(M, 2) of a ring without jumps, closed over the pole that it goes around."""
    lon, lat = shapely.get_coordinates(ring).T
    lon = np.unwrap(lon, period=360)
    if abs(lon[-1] - lon[0]) > 180:
        pole = np.copysign(90, lat.mean())
        lon, lat = np.append(lon, lon[[-1, 0]]), np.append(lat, [pole, pole])
    return np.stack([lon, lat], axis=1)


def centres(shapes: Any) -> np.ndarray:
    """Middles of polygons in degrees, (N, 2): longitude and latitude; NaN for None."""
    shapes = np.asarray(shapes, dtype=object)
    points = shapely.centroid(shapes)
    found = np.stack([shapely.get_x(points), shapely.get_y(points)], axis=1)
    bounds = shapely.bounds(shapes)
    for number in np.flatnonzero(bounds[:, 2] - bounds[:, 0] > 180):
        found[number] = middle_of(shapely.get_coordinates(shapes[number]))
    return found


def middle_of(lonlat: np.ndarray) -> tuple[float, float]:
    """Longitude and latitude of the mean of points (N, 2) on the sphere."""
    lon, lat = np.radians(lonlat).T
    x, y, z = np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)
    x, y, z = x.mean(), y.mean(), z.mean()
    lon, lat = np.arctan2(y, x), np.arctan2(z, np.hypot(x, y))
    return float(np.degrees(lon)), float(np.degrees(lat))


def equal_area(lonlat: np.ndarray) -> str:
    """An equal-area CRS in metres for points (N, 2) in degrees.

    A cylinder for the whole Earth; where that has its seam or its end among the
    points, a plane around their middle.
    """
    lon, lat = lonlat.T
    if np.ptp(lon) < 180 and np.abs(lat).max() < 85:
        return CYLINDER
    lon_0, lat_0 = middle_of(lonlat)
    return f"+proj=laea +lon_0={lon_0} +lat_0={lat_0} +datum=WGS84 +units=m"
