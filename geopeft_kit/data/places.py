"""Regions for chips that have none: square blocks, or polygons of the user's own.

Some of them are drawn to be held out. Sources: Roberts et al. 2017 (doi
10.1111/ecog.02881) on spatial blocks, Ploton et al. 2020 (doi
10.1038/s41467-020-18321-y) on buffers. Taught in `notebooks/14_your_own_data.ipynb`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from rasterio.crs import CRS

from geopeft_kit.data.vectors import read_vector

if TYPE_CHECKING:
    import geopandas as gpd

MOST_BLOCKS = 100_000
BLOCKS = 4  # along the longer side, where no block size is given


def square_blocks(
    bounds: Sequence[float], side: float | None = None
) -> gpd.GeoDataFrame:
    """Cut a rectangle into square blocks.

    Args:
        bounds: (left, low, right, high), the second axis counted either way.
        side: Of a block; None takes a quarter of the longer side.

    Returns:
        Columns region ("block_ROW_COLUMN") and geometry. What is left at the far
        edges goes to the last block of its row or column.

    Raises:
        ValueError: There would be more blocks than anyone can mean.
    """
    import geopandas as gpd
    from shapely.geometry import box

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
            boxes.append(box(x, y, far_x, far_y))
    return gpd.GeoDataFrame({"region": names}, geometry=boxes)


def region_polygons(source: Any, crs: CRS) -> gpd.GeoDataFrame:
    """Regions that the user has drawn.

    Args:
        source: As `read_vector` takes it, with a column region or name.
        crs: To bring them to.

    Returns:
        Columns region (text) and geometry.

    Raises:
        ValueError: No such column, or shapes that are no polygons.
    """
    table = read_vector(source, "regions")
    column = next((name for name in ("region", "name") if name in table), None)
    if column is None:
        raise ValueError(
            f"the regions have the columns {', '.join(map(str, table))}; one called "
            "region or name has to say what each is called."
        )
    kinds = set(table.geom_type) - {"Polygon", "MultiPolygon"}
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
    """Regions to hold out, drawn until they have a share of all chips.

    Args:
        regions: The region of each chip.
        fraction: Share of the chips.
        seed: Of the draw.

    Returns:
        Their names, sorted: at least one, and never all.

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
