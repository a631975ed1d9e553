"""One chip on its way into a chip folder, and the place of its pixels."""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from affine import Affine
from rasterio.crs import CRS
from rasterio.transform import from_bounds

from geopeft_kit.geodesy import footprint_of, placed, to_degrees
from geopeft_kit.open_raster import UNLISTED, Tags, open_raster, tags_of


@dataclass
class Chip:
    """One chip on its way into a chip folder.

    Attributes:
        name: Unique; letters, digits, "_", "-" and "."; names its files.
        image: (C, H, W) array of stored values (reflectance = stored * scale +
            offset), or the path of a raster, which is copied as it is.
        mask: (H, W) array of class numbers or values, or the path of a raster.
        label: Class name or number; several of them for multilabel.
        region: What a held-out region is chosen by.
        split: "train", "val", "test" or a name of your own; None leaves it open.
        crs: Of the array; files bring their own.
        transform: Of the array, as rasterio's; or give `bounds`.
        bounds: (left, bottom, right, top) in `crs`.
        date: Day of the image, as a date or ISO text.
        image_after: The second date of a change pair, like `image`.
        date_after: Day of the second image.
        extra: More columns of the index; "scene" keeps the chips of one scene
            together when validation chips are drawn.
    """

    name: str
    image: np.ndarray | str | os.PathLike[str]
    mask: np.ndarray | str | os.PathLike[str] | None = None
    label: int | str | Sequence[int | str] | None = None
    region: str = "everywhere"
    split: str | None = None
    crs: str | CRS | None = None
    transform: Affine | None = None
    bounds: Sequence[float] | None = None
    date: dt.date | str | None = None
    image_after: np.ndarray | str | os.PathLike[str] | None = None
    date_after: dt.date | str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Outline:
    """Size and place of a raster."""

    height: int
    width: int
    crs: CRS | None
    transform: Affine | None


def outline_of(chip: Chip, height: int, width: int) -> Outline:
    """The place of an array, from its chip's transform or bounds."""
    transform = chip.transform
    if transform is None and chip.bounds is not None:
        transform = from_bounds(*chip.bounds, width, height)
    if (transform is None) != (chip.crs is None):
        given, lacking = ("crs", "transform or bounds")
        if chip.crs is None:
            given, lacking = lacking, given
        raise ValueError(
            f"chip {chip.name!r} has {given} but no {lacking}; give both, or neither."
        )
    crs = CRS.from_user_input(chip.crs) if chip.crs is not None else None
    return Outline(height, width, crs, transform)


def inspect(chip: str, path: Path) -> tuple[Tags, Outline, list[Path]]:
    """Tags and outline of a raster file, and the files that it consists of."""
    with rasterio.Env(**UNLISTED), open_raster(path, chip) as raster:
        crs = raster.crs if placed(raster.crs) else None
        outline = Outline(raster.height, raster.width, crs, raster.transform)
        return tags_of(raster), outline, [Path(name) for name in raster.files]


def check_same_size(name: str, what: str, found: Any, image: Any) -> None:
    """Refuse a raster of a chip that has another height or width than its image."""
    if (found.height, found.width) != (image.height, image.width):
        raise ValueError(
            f"chip {name!r}: {what} is {found.height} x {found.width} pixels, its "
            f"image {image.height} x {image.width}. Cut or warp both to the same grid."
        )


def footprints(outlines: Sequence[Outline]) -> list[Any]:
    """Polygons in longitude and latitude; None where a raster has no georeference."""
    found: list[Any] = [None] * len(outlines)
    groups: dict[str, list[int]] = {}
    for number, outline in enumerate(outlines):
        if outline.crs is not None and outline.transform is not None:
            groups.setdefault(outline.crs.to_wkt(), []).append(number)
    for wkt, members in groups.items():
        shapes = [
            footprint_of(o.transform or Affine.identity(), o.height, o.width)
            for o in (outlines[number] for number in members)
        ]
        moved = to_degrees(shapes, CRS.from_wkt(wkt))
        for number, shape in zip(members, moved, strict=True):
            found[number] = shape
    return found
