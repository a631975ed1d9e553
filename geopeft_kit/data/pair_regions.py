"""Which region each image of the user's own lies in.

A chip belongs to a region where it lies wholly inside of it, half the buffer away from
its border. Two chips of different regions are then a whole buffer apart, whichever of
them is held out later.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from affine import Affine
from rasterio.crs import CRS

from geopeft_kit.data.ground import footprint_of, metres_per_unit
from geopeft_kit.data.open_raster import open_raster
from geopeft_kit.data.places import BLOCKS, region_polygons

if TYPE_CHECKING:
    import geopandas as gpd

    from geopeft_kit.data.chipping import Cutting
    from geopeft_kit.data.pairing import Pair


def place_pairs(pairs: list[Pair], regions: Any, cutting: Cutting) -> bool:
    """Give each pair its region; changes the list in place.

    Args:
        pairs: Images that are chips already.
        regions: As in `ChipData.from_pairs`.
        cutting: Block size and buffer.

    Returns:
        Whether the regions were found on the ground, not in a table or folder names.

    Raises:
        ValueError: An image has no region, or lies in none.
    """
    wanted = regions
    if wanted is None:
        named = any(pair.region for pair in pairs)
        wanted = "given" if named else "blocks"
    if isinstance(wanted, str) and wanted in ("given", "folder", "region"):
        for pair in pairs:
            if wanted == "folder":
                pair.region = pair.image.parent.name
        lacking = [pair.name for pair in pairs if not pair.region]
        if lacking:
            raise ValueError(
                f"{len(lacking)} images have no region, the first is {lacking[0]!r}. "
                "Sort images into a sub-folder for each region, give the table a "
                "column region, or pass regions='blocks'."
            )
        return False
    cutting = replace(cutting, regions=wanted)
    _find_places(pairs, cutting, asked=regions is not None)
    return True


def _find_places(pairs: list[Pair], cutting: Cutting, asked: bool) -> None:
    """Find the region of images that are chips already; changes the list in place.

    A chip belongs to the region that holds its centre. With a buffer, chips nearer
    than half of it to the region's border are taken out, and counted in a warning.

    Args:
        pairs: Images; those without a place are "everywhere" unless regions are asked
            for.
        cutting: Regions, block size and buffer.
        asked: Whether the user asked for regions.

    Raises:
        ValueError: Regions are asked for and an image has no georeference, or lies in
            no region.
    """
    import shapely

    table = _footprints([pair.image for pair in pairs])
    if table is None:
        if asked:
            raise ValueError(
                "images without a georeference lie in no region. Sort them into a sub-"
                "folder for each region, or give a table with the column region."
            )
        return
    left, low, right, high = table.total_bounds
    crs = CRS.from_wkt(table.crs.to_wkt())
    grid = Affine.translation(left, low)
    metres = metres_per_unit(crs, grid, high - low, right - left)
    if isinstance(cutting.regions, str) and cutting.regions == "blocks":
        side = max(right - left, high - low) / BLOCKS
        side = cutting.block_m / metres if cutting.block_m else side
        names, holders = _blocks_of(table, side)
    else:
        names, holders = _polygons_of(table, region_polygons(cutting.regions, crs))
    half = cutting.buffer_m / metres / 2
    inner = shapely.buffer(holders, -half, join_style="mitre")
    free = (
        shapely.covers(inner, table.geometry.to_numpy())
        if half
        else [True] * len(pairs)
    )
    lost = [pair.name for pair, name in zip(pairs, names, strict=True) if not name]
    if lost:
        raise ValueError(
            f"image {lost[0]!r} lies in none of the regions. Draw them larger, or "
            "leave the image out."
        )
    for pair, name in zip(pairs, names, strict=True):
        pair.region = name
    kept = [pair for pair, inside in zip(pairs, free, strict=True) if inside]
    if len(kept) < len(pairs):
        warnings.warn(
            f"{len(pairs) - len(kept)} of {len(pairs)} images lie within "
            f"{cutting.buffer_m / 2:g} m of a region's border and are left out.",
            stacklevel=5,
        )
    if not kept:
        raise ValueError(
            f"with buffer_m={cutting.buffer_m:g} no image is left in any region. "
            "Choose a smaller buffer or larger blocks."
        )
    pairs[:] = kept


def _blocks_of(table: gpd.GeoDataFrame, side: float) -> tuple[list[str], np.ndarray]:
    """The square block around each centre; only blocks with chips are made."""
    import shapely

    left, low = table.total_bounds[:2]
    centres = shapely.centroid(table.geometry.to_numpy())
    columns = np.floor((shapely.get_x(centres) - left) / side).astype(int)
    rows = np.floor((shapely.get_y(centres) - low) / side).astype(int)
    x, y = left + columns * side, low + rows * side
    names = [f"block_{r}_{c}" for r, c in zip(rows, columns, strict=True)]
    return names, shapely.box(x, y, x + side, y + side)


def _polygons_of(
    table: gpd.GeoDataFrame, regions: gpd.GeoDataFrame
) -> tuple[list[str], np.ndarray]:
    """The first of the user's regions around each centre; "" where there is none."""
    import shapely

    centres = shapely.centroid(table.geometry.to_numpy())
    chip, region = regions.sindex.query(centres, predicate="intersects")
    first = dict(zip(chip[::-1].tolist(), region[::-1].tolist(), strict=True))
    names, holders = regions["region"].tolist(), regions.geometry.to_numpy()
    found = [first.get(number) for number in range(len(table))]
    return (
        ["" if each is None else names[each] for each in found],
        np.array([None if each is None else holders[each] for each in found]),
    )


def _footprints(paths: Sequence[Path]) -> gpd.GeoDataFrame | None:
    """Outlines of rasters in one projected CRS; None where one has no georeference."""
    import geopandas as gpd

    shapes, systems = [], []
    for path in paths:
        with open_raster(path) as raster:
            if raster.crs is None:
                return None
            systems.append(raster.crs.to_wkt())
            shapes.append(footprint_of(raster.transform, raster.height, raster.width))
    if len(set(systems)) == 1:
        return gpd.GeoDataFrame(geometry=shapes, crs=systems[0])
    shared = "EPSG:6933"  # metres on an equal-area cylinder, for several UTM zones
    moved = [
        gpd.GeoSeries([shape], crs=system).to_crs(shared).iloc[0]
        for shape, system in zip(shapes, systems, strict=True)
    ]
    return gpd.GeoDataFrame(geometry=moved, crs=shared)
