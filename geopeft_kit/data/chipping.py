"""A big raster with polygons or points -> chips, one window at a time.

Shapes are brought to the raster's CRS and burnt into each window; a pixel has the
class of the shape that holds its centre. Windows lie inside of regions, so that
overlapping chips never straddle two of them. Nothing is ever whole in memory. Taught
in `notebooks/14_your_own_data.ipynb`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import rasterio
import rasterio.features
from affine import Affine
from rasterio.errors import RasterioError
from rasterio.windows import Window

from geopeft_kit.data.chip import Chip
from geopeft_kit.data.ground import apply_affine, footprint_of, metres_per_unit
from geopeft_kit.data.info import DatasetInfo
from geopeft_kit.data.pairing import safe_name
from geopeft_kit.data.places import region_polygons, square_blocks
from geopeft_kit.data.shapes import Shapes, inside, open_scene, pixel_of, to_scene

if TYPE_CHECKING:
    import geopandas as gpd


@dataclass(frozen=True)
class Cutting:
    """How chips are cut.

    Attributes:
        size: Side of a chip in pixels.
        overlap: Share of a chip that it has in common with the next, from 0.
        regions: "blocks", "scene" (the raster is one region), or polygons with a name.
        block_m: Side of a block in metres; None takes a quarter of the scene.
        buffer_m: Distance in metres between chips of different regions.
    """

    size: int = 224
    overlap: float = 0.0
    regions: Any = "blocks"
    block_m: float | None = None
    buffer_m: float = 0.0

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 <= self.overlap < 1 or self.buffer_m < 0:
            raise ValueError(
                f"size={self.size}, overlap={self.overlap}, buffer_m={self.buffer_m}: "
                "a chip has at least 1 pixel, overlap is from 0 to below 1, and a "
                "buffer is no less than 0 m."
            )
        if self.block_m is not None and self.block_m <= 0:
            raise ValueError(f"block_m is {self.block_m}; it must be above 0 m.")


def chip_windows(
    raster: rasterio.DatasetReader, cutting: Cutting
) -> list[tuple[str, Window]]:
    """Windows of chips, region by region.

    Args:
        raster: The scene.
        cutting: How it is cut.

    Returns:
        Region and window; each lies wholly inside of its region, half the buffer from
        the border.

    Raises:
        ValueError: No chip fits into any region.
    """
    regions = pixel_regions(raster, cutting)
    found = [
        (name, window)
        for name, polygon in zip(regions["region"], regions.geometry, strict=True)
        for window in _grid(polygon, cutting)
    ]
    if not found:
        sides = regions.bounds
        widest = (sides["maxx"] - sides["minx"]).max()
        raise ValueError(
            f"no chip of {cutting.size} pixels fits into a region of {raster.name} "
            f"({raster.height} x {raster.width} pixels; the widest region, less its "
            f"buffer, has {max(widest, 0):.0f}). Choose a smaller size or buffer_m, or "
            "a larger block_m."
        )
    return found


def pixel_regions(raster: rasterio.DatasetReader, cutting: Cutting) -> gpd.GeoDataFrame:
    """Regions in pixel coordinates (x the column, y the row), less half the buffer.

    Args:
        raster: The scene.
        cutting: How it is cut.

    Returns:
        Columns region and geometry.
    """
    import geopandas as gpd
    from shapely import intersection, transform
    from shapely.geometry import box

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
        shapes = transform(named.geometry.to_numpy(), pixels)
        shapes = intersection(shapes, box(0, 0, width, height))
        table = gpd.GeoDataFrame({"region": named["region"]}, geometry=shapes)
    if cutting.buffer_m:
        # Mitred corners: the shrunken block is a block again.
        half = cutting.buffer_m / metres / 2
        table = table.set_geometry(table.buffer(-half, join_style="mitre"))
    return table[~table.is_empty]


def _grid(polygon: Any, cutting: Cutting) -> Iterator[Window]:
    """Windows of one region in rows; the last of a row is moved in, not left out."""
    from shapely import box, covers, prepare

    left, low, right, high = polygon.bounds
    columns = _starts(int(np.ceil(left - 1e-6)), int(right + 1e-6), cutting)
    rows = _starts(int(np.ceil(low - 1e-6)), int(high + 1e-6), cutting)
    prepare(polygon)
    for row in rows:
        for column in columns:
            chip = box(column, row, column + cutting.size, row + cutting.size)
            if covers(polygon, chip):
                yield Window(column, row, cutting.size, cutting.size)


def _starts(first: int, last: int, cutting: Cutting) -> list[int]:
    size = cutting.size
    if last - first < size:
        return []
    stride = max(1, round(size * (1 - cutting.overlap)))
    return sorted({*range(first, last - size + 1, stride), last - size})


def scene_chips(
    path: Path, shapes: Shapes, info: DatasetInfo, cutting: Cutting
) -> Iterator[Chip]:
    """Chips of one scene with masks; those without data or label are left out.

    Args:
        path: Of the raster.
        shapes: Polygons or points.
        info: Facts of the data set to be.
        cutting: How it is cut.

    Yields:
        Chips, read when they are asked for.

    Raises:
        ValueError: No chip fits, or the scene cannot be read.
    """
    with open_scene(path, len(info.bands)) as raster:
        table = to_scene(shapes, raster)
        for region, window in chip_windows(raster, cutting):
            transform = raster.window_transform(window)
            mask = _burn(table, shapes, info, window, transform)
            blank = np.isnan(mask) if info.task == "regression" else mask == int(
                shapes.nothing
            )  # fmt: skip
            if blank.all():
                continue
            chip = _chip(raster, path, window, region, info)
            if chip is not None:
                chip.mask = mask
                yield chip


def _burn(
    table: gpd.GeoDataFrame,
    shapes: Shapes,
    info: DatasetInfo,
    window: Window,
    transform: Affine,
) -> np.ndarray:
    """Mask of one window, (H, W)."""
    height, width = int(window.height), int(window.width)
    kind = np.float32 if info.task == "regression" else np.int16
    outline = footprint_of(transform, height, width)
    near = table.iloc[np.sort(table.sindex.query(outline, predicate="intersects"))]
    mask = np.full((height, width), shapes.fill, kind)
    if len(near):
        pairs = zip(near.geometry, near["value"].tolist(), strict=True)
        rasterio.features.rasterize(pairs, out=mask, transform=transform)
    return mask


def _chip(
    raster: rasterio.DatasetReader,
    path: Path,
    window: Window,
    region: str,
    info: DatasetInfo,
) -> Chip | None:
    """One window as a chip without target; None where all of it is nodata."""
    try:
        image = raster.read(window=window)
    except RasterioError as error:
        raise ValueError(
            f"{path} cannot be read at row {window.row_off}, column {window.col_off}: "
            f"{error}. It may be cut short; copy or download it again."
        ) from error
    nodata = info.nodata
    if nodata is not None:
        empty = np.isnan(image) if np.isnan(nodata) else image == nodata
        if empty.any(axis=0).all():
            return None
    return Chip(
        safe_name(f"{path.stem}_{int(window.row_off)}_{int(window.col_off)}"),
        image,
        region=region,
        crs=raster.crs,
        transform=raster.window_transform(window),
        extra={"scene": f"{path.stem}/{region}"},
    )


def point_chips(
    path: Path,
    table: gpd.GeoDataFrame,
    info: DatasetInfo,
    cutting: Cutting,
    own_regions: bool = False,
) -> Iterator[Chip]:
    """A chip around each labelled point.

    Near the edge of the scene a chip is moved inwards, so that the point is in it but
    not in its middle.

    Args:
        path: Of the raster.
        table: Points with the number of a class in the column value; those outside of
            the scene are another scene's.
        info: Facts of the data set to be.
        cutting: How it is cut; chips across a border of regions are left out.
        own_regions: Take regions from the points' own column of that name instead.

    Yields:
        Chips, read when they are asked for.

    Raises:
        ValueError: The scene is smaller than a chip.
    """
    from shapely.geometry import box

    with open_scene(path, len(info.bands)) as raster:
        size, points = cutting.size, table.to_crs(raster.crs.to_wkt())
        if size > min(raster.height, raster.width):
            raise ValueError(
                f"{path} is {raster.height} x {raster.width} pixels, smaller than a "
                f"chip of {size}. Choose a smaller size."
            )
        areas = None if own_regions else pixel_regions(raster, cutting)
        there = inside(points, raster)
        for number, (x, y) in enumerate(zip(*pixel_of(points, raster), strict=True)):
            if not there[number]:
                continue
            left = int(np.clip(int(x) - size // 2, 0, raster.width - size))
            top = int(np.clip(int(y) - size // 2, 0, raster.height - size))
            if areas is None:
                names = [str(points["region"].iloc[number])]
            else:
                square = box(left, top, left + size, top + size)
                names = areas["region"][areas.covers(square)].tolist()
            window = Window(left, top, size, size)
            chip = _chip(raster, path, window, names[0], info) if names else None
            if chip is not None:
                chip.name = f"{chip.name}_{number}"
                chip.label = int(points["value"].iloc[number])
                yield chip
