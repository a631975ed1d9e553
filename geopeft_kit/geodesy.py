"""How large pixels are on the ground: affine transforms, footprints, metres."""

from __future__ import annotations

from typing import Any

import numpy as np
from affine import Affine
from rasterio.crs import CRS


def apply_affine(
    transform: Affine, x: np.ndarray, y: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """An affine transform of points x and y, (N,) each."""
    a, b, c, d, e, f = tuple(transform)[:6]
    return a * x + b * y + c, d * x + e * y + f


def footprint_of(transform: Affine, height: float, width: float) -> Any:
    """Polygon of a raster or window of height x width pixels, in its own CRS."""
    from shapely.geometry import Polygon

    x, y = np.array([0, width, width, 0]), np.array([0, 0, height, height])
    return Polygon(np.stack(apply_affine(transform, x, y), axis=1))


def metres_per_unit(crs: CRS, transform: Affine, height: float, width: float) -> float:
    """Metres on the ground of one step along a row or column, the shortest there is.

    Measured on the ellipsoid at the corners and the centre of height x width steps,
    since a degree or a unit of Web Mercator is not a fixed number of metres. The
    shortest keeps buffers safe. `transform` is the identity for plain coordinates.
    """
    from pyproj import Geod, Transformer

    x = np.array([0, 0, width, width, width / 2], float)
    y = np.array([0, height, 0, height, height / 2], float)
    to_degrees = Transformer.from_crs(crs.to_wkt(), "EPSG:4326", always_xy=True)
    start = to_degrees.transform(*apply_affine(transform, x, y))
    lengths = []
    for dx, dy in ((1e-3 * width, 0.0), (0.0, 1e-3 * height)):
        end = to_degrees.transform(*apply_affine(transform, x + dx, y + dy))
        step = Geod(ellps="WGS84").inv(*start, *end)[2]
        lengths.append(step / max(dx, dy))
    shortest = float(np.min(lengths))
    if not np.isfinite(shortest) or shortest <= 0:
        raise ValueError(
            f"the raster's georeference is not on the Earth in {crs}. Check its "
            "CRS and transform."
        )
    return shortest
