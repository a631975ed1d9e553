"""Scenes (big rasters) with polygons or points -> chips, one window at a time.

Shapes are brought to the raster's CRS and burnt into each window; a pixel has the
class of the shape that holds its centre. Windows are inside of regions, so that
overlapping chips never straddle two of them. Nothing is ever whole in memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import rasterio
import rasterio.features
import shapely
from affine import Affine
from rasterio.windows import Window

from geopeft_kit.data.chip import Chip
from geopeft_kit.data.info import DatasetInfo
from geopeft_kit.data.own.pairs import RASTERS, safe_name
from geopeft_kit.data.own.regions import Cutting, pixel_regions
from geopeft_kit.data.own.shapes import (
    POINTS,
    Shapes,
    inside,
    open_scene,
    pixel_of,
    to_scene,
)
from geopeft_kit.data.reading import invalid_pixels
from geopeft_kit.geodesy import footprint_of
from geopeft_kit.open_raster import Tags, check_alike, open_raster, tags_of


def scene_files(images: Any) -> list[Path]:
    """The rasters of one path or several; a folder means all those in it."""
    single = isinstance(images, str | os.PathLike)
    files: list[Path] = []
    for path in map(Path, [images] if single else images):
        if path.is_dir():
            files += sorted(f for f in path.iterdir() if f.suffix.lower() in RASTERS)
        elif path.is_file():
            files.append(path)
        else:
            raise FileNotFoundError(f"there is no raster {path}. Check the path.")
    return files


def check_scenes(scenes: Sequence[Path], nodata_is_stated: bool) -> None:
    """Refuse scenes whose tags disagree; no nodata is a statement too."""
    first: Tags | None = None
    for path in scenes:
        with open_raster(path) as raster:
            tags = tags_of(raster)
        if nodata_is_stated:
            tags = tags._replace(nodata=None)
        first = first or tags
        check_alike(path, tags, scenes[0], first, silence=False)


def scene_chips(
    scenes: Sequence[Path],
    shapes: Shapes,
    info: DatasetInfo,
    cutting: Cutting,
    column: str | None,
) -> Iterator[Chip]:
    """Chips of all scenes, read when they are asked for.

    Raises:
        ValueError: No chip fits, a scene cannot be read, or the shapes do not suit the
            task.
    """
    if info.task != "classification":
        for path in scenes:
            yield from _mask_chips(path, shapes, info, cutting)
        return
    table = shapes.table
    if not set(table.geom_type) <= POINTS or column is None:
        raise ValueError(
            "task 'classification' takes points with a column of labels: column=... "
            "For polygons use task='segmentation'."
        )
    own = isinstance(cutting.regions, str) and cutting.regions == "region"
    if own and "region" not in table:
        raise ValueError("regions='region', but the points have no column region.")
    for path in scenes:
        yield from _point_chips(path, table, info, cutting, own)


def _mask_chips(
    path: Path, shapes: Shapes, info: DatasetInfo, cutting: Cutting
) -> Iterator[Chip]:
    """Chips of one scene with masks; those without data or label are left out."""
    with open_scene(path, len(info.bands)) as raster:
        table = to_scene(shapes, raster)
        for region, window in _windows(raster, cutting):
            mask = _burn(table, shapes, info, window, raster.window_transform(window))
            if not shapes.labelled(mask).any():
                continue
            chip, invalid = _chip(raster, window, region, info)
            mask[invalid] = shapes.nothing
            if shapes.labelled(mask).any():
                chip.mask = mask
                yield chip


def _windows(
    raster: rasterio.DatasetReader, cutting: Cutting
) -> list[tuple[str, Window]]:
    """Region and window of each chip, inside of the region less half the buffer."""
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


def _grid(polygon: Any, cutting: Cutting) -> Iterator[Window]:
    """Windows of one region in rows; the last of a row is moved in, not left out."""
    left, low, right, high = polygon.bounds
    columns = _starts(int(np.ceil(left - 1e-6)), int(right + 1e-6), cutting)
    rows = _starts(int(np.ceil(low - 1e-6)), int(high + 1e-6), cutting)
    shapely.prepare(polygon)
    for row in rows:
        for column in columns:
            chip = shapely.box(column, row, column + cutting.size, row + cutting.size)
            if shapely.covers(polygon, chip):
                yield Window(column, row, cutting.size, cutting.size)


def _starts(first: int, last: int, cutting: Cutting) -> list[int]:
    size = cutting.size
    if last - first < size:
        return []
    stride = max(1, round(size * (1 - cutting.overlap)))
    return sorted({*range(first, last - size + 1, stride), last - size})


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
    raster: rasterio.DatasetReader, window: Window, region: str, info: DatasetInfo
) -> tuple[Chip, np.ndarray]:
    """One window as a chip without target, and (H, W) bool where it has no data."""
    image = raster.read(window=window)
    invalid = invalid_pixels(raster, image, info.nodata, window=window)
    if invalid is None:
        invalid = np.zeros(image.shape[-2:], bool)
    scene = Path(raster.name).stem
    chip = Chip(
        safe_name(f"{scene}_{int(window.row_off)}_{int(window.col_off)}"),
        image,
        region=region,
        crs=raster.crs,
        transform=raster.window_transform(window),
        extra={"scene": f"{scene}/{region}"},
    )
    return chip, invalid


def _point_chips(
    path: Path,
    table: gpd.GeoDataFrame,
    info: DatasetInfo,
    cutting: Cutting,
    own_regions: bool,
) -> Iterator[Chip]:
    """A chip around each labelled point; the class number is in the column value.

    Near the edge of the scene a chip is moved inwards, so that the point is in it but
    not in its middle. Chips across a border of regions are left out, unless the points
    bring `own_regions`.
    """
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
                continue  # another scene's
            left = int(np.clip(int(x) - size // 2, 0, raster.width - size))
            top = int(np.clip(int(y) - size // 2, 0, raster.height - size))
            if areas is None:
                names = [str(points["region"].iloc[number])]
            else:
                square = shapely.box(left, top, left + size, top + size)
                names = areas["region"][areas.covers(square)].tolist()
            window = Window(left, top, size, size)
            if not names:
                continue
            chip, invalid = _chip(raster, window, names[0], info)
            if not invalid.all():
                chip.name = f"{chip.name}_{number}"
                chip.label = int(points["value"].iloc[number])
                yield chip
