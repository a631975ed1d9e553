"""Which region a chip of the user's own belongs to: blocks, polygons or names.

A chip belongs to a region if it is wholly inside of it, half the buffer away from
its border. Two chips of different regions are then a whole buffer apart, whichever of
them is held out later. Sources: Roberts et al. 2017 (doi 10.1111/ecog.02881) on spatial
blocks, Ploton et al. 2020 (doi 10.1038/s41467-020-18321-y) on buffers.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import rasterio
import shapely
from affine import Affine
from rasterio.crs import CRS

from geopeft_kit.data.own.pairs import Pair
from geopeft_kit.data.own.shapes import AREAS, read_vector
from geopeft_kit.geodesy import (
    CYLINDER,
    apply_affine,
    crs_name,
    equal_area,
    footprint_of,
    metres_per_unit,
    placed,
    to_degrees,
)
from geopeft_kit.open_raster import open_raster

MOST_BLOCKS = 100_000
BLOCKS = 4  # along the longer side, where no block size is given


@dataclass(frozen=True)
class Cutting:
    """How chips are cut, and which regions they belong to."""

    size: int = 224  # side of a chip in pixels
    overlap: float = 0.0  # share of a chip that it has in common with the next
    regions: Any = "blocks"  # or "scene" (the raster is one), polygons with a name ...
    block_m: float | None = None  # side of a block in metres; None: a quarter
    buffer_m: float = 0.0  # metres between chips of different regions

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 <= self.overlap < 1 or self.buffer_m < 0:
            raise ValueError(
                f"size={self.size}, overlap={self.overlap}, buffer_m={self.buffer_m}: "
                "a chip has at least 1 pixel, overlap is from 0 to below 1, and a "
                "buffer is no less than 0 m."
            )
        if self.block_m is not None and self.block_m <= 0:
            raise ValueError(f"block_m is {self.block_m}; it must be above 0 m.")


def square_blocks(
    bounds: Sequence[float], side: float | None = None
) -> gpd.GeoDataFrame:
    """Columns region ("block_ROW_COLUMN") and geometry: squares of a rectangle.

    `bounds` are (left, low, right, high), the second axis counted either way; `side`
    None takes a quarter of the longer side. What is left at the far edges goes to the
    last block of its row or column.
    """
    left, low, right, high = bounds
    side = side or max(right - left, high - low) / BLOCKS
    columns = max(1, int((right - left) / side + 1e-6))
    rows = max(1, int((high - low) / side + 1e-6))
    if rows * columns > MOST_BLOCKS:
        raise ValueError(
            f"{rows} x {columns} blocks are too many; choose a larger block_m."
        )
    names, boxes = [], []
    for row in range(rows):
        for column in range(columns):
            x, y = left + column * side, low + row * side
            far_x = right if column == columns - 1 else x + side
            far_y = high if row == rows - 1 else y + side
            names.append(f"block_{row}_{column}")
            boxes.append(shapely.box(x, y, far_x, far_y))
    return gpd.GeoDataFrame({"region": names}, geometry=boxes)


def region_polygons(source: Any, crs: CRS) -> gpd.GeoDataFrame:
    """Columns region (text) and geometry, in `crs`, of regions that the user has drawn.

    Raises:
        ValueError: No column region or name, or shapes that are not polygons.
    """
    table = read_vector(source, "regions")
    column = next((name for name in ("region", "name") if name in table), None)
    if column is None:
        raise ValueError(
            f"the regions have the columns {', '.join(map(str, table))}; one called "
            "region or name has to say what each is called."
        )
    kinds = set(table.geom_type) - AREAS
    if kinds:
        raise ValueError(f"a region is a polygon, not a {sorted(kinds)[0]}.")
    table = table.to_crs(crs.to_wkt())
    named = table[[column, table.geometry.name]].set_axis(
        ["region", "geometry"], axis=1
    )
    return named.set_geometry("geometry").astype({"region": str})


def draw_regions(
    regions: Sequence[str], fraction: float = 0.2, seed: int = 0
) -> list[str]:
    """Regions to hold out, sorted, drawn until they have a share of all chips.

    `regions` has one name a chip. At least one is drawn, and never all.

    Raises:
        ValueError: There is one region only.
    """
    names, counts = np.unique(np.asarray(regions, dtype=str), return_counts=True)
    if len(names) < 2:
        raise ValueError(
            f"all {len(regions)} chips lie in one region, {names[0]!r}, so none can be "
            "held out. Say what the regions are: regions='blocks' with a smaller "
            "block_m, a column, or polygons; or ask for split='random', which is "
            "optimistic."
        )
    order = np.random.default_rng([seed, 3]).permutation(len(names))
    reached = np.cumsum(counts[order]) >= fraction * counts.sum()
    last = min(int(np.argmax(reached)) + 1, len(names) - 1)
    return sorted(names[order[:last]].tolist())


def pixel_regions(raster: rasterio.DatasetReader, cutting: Cutting) -> gpd.GeoDataFrame:
    """Columns region and geometry, in pixels (x the column, y the row) of a scene.

    Less half the buffer, so that chips of two regions are a whole buffer apart.
    """
    height, width = raster.height, raster.width
    metres = metres_per_unit(raster.crs, raster.transform, height, width)
    if isinstance(cutting.regions, str) and cutting.regions == "blocks":
        side = round(cutting.block_m / metres) if cutting.block_m else None
        table = square_blocks((0, 0, width, height), side)
    elif isinstance(cutting.regions, str) and cutting.regions == "scene":
        table = square_blocks((0, 0, width, height), max(height, width))
        table["region"] = Path(raster.name).stem
    else:
        to_pixel = ~raster.transform

        def pixels(xy: np.ndarray) -> np.ndarray:
            return np.stack(apply_affine(to_pixel, *xy.T), axis=1)  # (N, 2)

        named = region_polygons(cutting.regions, raster.crs)
        shapes = shapely.transform(named.geometry.to_numpy(), pixels)
        shapes = shapely.intersection(shapes, shapely.box(0, 0, width, height))
        table = gpd.GeoDataFrame({"region": named["region"]}, geometry=shapes)
    if cutting.buffer_m:
        # Mitred corners: the shrunken block is a block again.
        half = cutting.buffer_m / metres / 2
        table = table.set_geometry(table.buffer(-half, join_style="mitre"))
    return table[~table.is_empty]


def place_pairs(pairs: list[Pair], cutting: Cutting) -> bool:
    """Give each pair its region; changes the list in place.

    Returns whether the regions were found on the ground, not in a table or in the
    names of folders.

    Raises:
        ValueError: An image has no region, or is in none.
    """
    wanted = cutting.regions
    if wanted is None:
        wanted = "given" if any(pair.region for pair in pairs) else "blocks"
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
    asked = cutting.regions is not None
    _find_places(pairs, replace(cutting, regions=wanted), asked)
    return True


def _find_places(pairs: list[Pair], cutting: Cutting, asked: bool) -> None:
    """The region that holds the centre of each image; changes the list in place.

    With a buffer, images nearer than half of it to the region's border are taken out,
    and counted in a warning. Images without a place are "everywhere", unless regions
    were `asked` for.
    """
    table = _footprints([pair.image for pair in pairs])
    if table is None:
        if asked:
            raise ValueError(
                "images without a georeference are in no region. Sort them into a sub-"
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
            f"image {lost[0]!r} is in none of the regions. Draw them larger, or "
            "leave the image out."
        )
    for pair, name in zip(pairs, names, strict=True):
        pair.region = name
    kept = [pair for pair, inside in zip(pairs, free, strict=True) if inside]
    if len(kept) < len(pairs):
        warnings.warn(
            f"{len(pairs) - len(kept)} of {len(pairs)} images are within "
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
    shapes, systems = [], []
    for path in paths:
        with open_raster(path) as raster:
            if not placed(raster.crs):
                return None
            systems.append(raster.crs)
            shapes.append(footprint_of(raster.transform, raster.height, raster.width))
    one = len(set(map(crs_name, systems))) == 1
    if one and systems[0].is_projected:
        return gpd.GeoDataFrame(geometry=shapes, crs=systems[0].to_wkt())
    pairs = zip(shapes, systems, strict=True)
    degrees = np.concatenate([to_degrees([shape], crs) for shape, crs in pairs])
    shared = equal_area(shapely.get_coordinates(degrees))
    table = gpd.GeoDataFrame(geometry=degrees, crs="EPSG:4326")
    return table if one and shared == CYLINDER else table.to_crs(shared)
