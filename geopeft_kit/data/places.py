"""Regions for chips that have none: square blocks, or polygons of the user's own.

A chip belongs to a region where it lies wholly inside of it, half the buffer away from
its border. Two chips of different regions are then a whole buffer apart, whichever of
them is held out later. Sources: Roberts et al. 2017 (doi 10.1111/ecog.02881) on spatial
blocks, Ploton et al. 2020 (doi 10.1038/s41467-020-18321-y) on buffers. Taught in
`notebooks/14_your_own_data.ipynb`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import rasterio
from affine import Affine
from rasterio.crs import CRS
from rasterio.errors import NotGeoreferencedWarning, RasterioError

if TYPE_CHECKING:
    import geopandas as gpd

    from geopeft_kit.data.chipping import Cutting
    from geopeft_kit.data.pairing import Pair

MOST_BLOCKS = 100_000
BLOCKS = 4  # along the longer side, where no block size is given


def read_vector(
    source: str | os.PathLike[str] | gpd.GeoDataFrame, what: str
) -> gpd.GeoDataFrame:
    """Polygons or points, checked.

    Args:
        source: A GeoPackage, shapefile, GeoJSON or GeoParquet, a CSV with the columns
            lon and lat (degrees), or a GeoDataFrame.
        what: What they are, for messages.

    Returns:
        The features, with a CRS and a geometry in each row.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not readable, empty, without a CRS, or a row has no
            geometry.
    """
    import geopandas as gpd

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
            f"{name} has no CRS, so where it lies is not known. Set the one that it "
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
    import geopandas as gpd
    import pandas as pd
    from pyogrio.errors import DataSourceError

    from geopeft_kit.data.pairing import read_csv

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


def apply_affine(
    transform: Affine, x: np.ndarray, y: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """An affine transform of many points.

    Args:
        transform: As rasterio's.
        x: (N,) columns or eastings.
        y: (N,) rows or northings.

    Returns:
        (N,) and (N,) transformed.
    """
    a, b, c, d, e, f = tuple(transform)[:6]
    return a * x + b * y + c, d * x + e * y + f


def outline_of(transform: Affine, height: float, width: float) -> Any:
    """Footprint of a raster or window in its own CRS.

    Args:
        transform: As rasterio's.
        height: In pixels.
        width: In pixels.

    Returns:
        A polygon with four corners.
    """
    from shapely.geometry import Polygon

    x, y = np.array([0, width, width, 0]), np.array([0, 0, height, height])
    return Polygon(np.stack(apply_affine(transform, x, y), axis=1))


def metres_per_unit(crs: CRS, transform: Affine, height: float, width: float) -> float:
    """Ground length of one step along a row or column, the shortest there is.

    Measured on the ellipsoid at the corners and the centre, since a degree or a unit
    of Web Mercator is no fixed number of metres. The shortest keeps buffers safe.

    Args:
        crs: Of the raster.
        transform: Its transform; the identity for plain coordinates.
        height: Extent along the second axis, in steps.
        width: Extent along the first axis, in steps.

    Returns:
        Metres.
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
            f"the raster's georeference does not lie on the Earth in {crs}. Check its "
            "CRS and transform."
        )
    return shortest


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


def place_pairs(pairs: list[Pair], cutting: Cutting, asked: bool) -> None:
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
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", NotGeoreferencedWarning)
                with rasterio.open(path) as raster:
                    if raster.crs is None:
                        return None
                    transform = raster.transform
                    height, width = raster.height, raster.width
                    systems.append(raster.crs.to_wkt())
        except RasterioError as error:
            raise ValueError(
                f"{path} cannot be read as a raster: {error}. Copy or download it "
                "again."
            ) from error
        shapes.append(outline_of(transform, height, width))
    if len(set(systems)) == 1:
        return gpd.GeoDataFrame(geometry=shapes, crs=systems[0])
    shared = "EPSG:6933"  # metres on an equal-area cylinder, for several UTM zones
    moved = [
        gpd.GeoSeries([shape], crs=system).to_crs(shared).iloc[0]
        for shape, system in zip(shapes, systems, strict=True)
    ]
    return gpd.GeoDataFrame(geometry=moved, crs=shared)
