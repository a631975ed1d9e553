"""The user's own data: folders, a table, or a big raster with shapes -> chips.

`collect` finds out what was handed in, asks what it cannot know, and yields chips that
`write_chip_folder` writes, or that an index in memory points to where they lie. Used
through `ChipData.from_pairs`. Taught in `notebooks/14_your_own_data.ipynb`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rasterio

from geopeft_kit.bands import resolve_bands
from geopeft_kit.data import chipping, shapes
from geopeft_kit.data.asking import ask, check_scale, look_at
from geopeft_kit.data.chip import Chip
from geopeft_kit.data.chipping import Cutting
from geopeft_kit.data.info import CLASS_TASKS, MASK_TASKS, DatasetInfo
from geopeft_kit.data.pair_chips import pair_chips, read_mask
from geopeft_kit.data.pair_regions import place_pairs
from geopeft_kit.data.pairing import RASTERS, Pair, pair_files, pair_table
from geopeft_kit.data.vectors import is_vector, read_vector


@dataclass
class Request:
    """What the user has said; the attributes are those of `ChipData.from_pairs`."""

    images: Any
    masks: Any
    bands: str | Sequence[str] | None
    scale: float | Sequence[float] | None
    offset: float | Sequence[float]
    classes: Sequence[str] | Mapping[int, str] | None
    task: str | None
    column: str | None
    background: str | None
    suffixes: tuple[str, str]
    cutting: Cutting
    regions: Any
    name: str
    facts: Mapping[str, Any]
    in_place: bool

    @property
    def cuts(self) -> bool:
        """Whether chips have to be cut out of a scene."""
        return self.masks is not None and is_vector(self.masks)


class Collected(NamedTuple):
    """What was found.

    Attributes:
        info: Facts of the data set to be.
        chips: Its chips, read when they are asked for.
        files: That they are read from.
        spaced: Whether the buffer stands between regions already.
    """

    info: DatasetInfo
    chips: Iterator[Chip]
    files: list[Path]
    spaced: bool


def collect(request: Request) -> Collected:
    """Find the images and targets, and ask what cannot be known.

    Args:
        request: What the user has said.

    Returns:
        The facts of the data set and its chips.

    Raises:
        FileNotFoundError: Something is missing on disk.
        ValueError: Something does not fit, or has to be stated; says what.
    """
    renumbers = any(value != new for value, new in _numbers(request.classes).items())
    if request.in_place and (request.cuts or renumbers):
        what = "cutting chips" if request.cuts else "renumbering masks"
        raise ValueError(
            f"{what} writes new files: pass folder='my_chips', a folder to write."
        )
    if request.cuts:
        return _from_scenes(request)
    if request.masks is None:
        if (
            isinstance(request.images, str | os.PathLike)
            and Path(request.images).is_dir()
        ):
            raise ValueError(
                "masks is missing. Pass masks=, a folder or a list, matched by file "
                "name; or a table with the columns image and mask or label."
            )
        pairs = pair_table(request.images)
    else:
        pairs = pair_files(request.images, request.masks, request.suffixes)
    task = request.task or (
        "classification" if pairs[0].label is not None else "segmentation"
    )
    if task in ("classification", "multilabel") and any(p.mask for p in pairs):
        raise ValueError(
            f"task {task!r} needs labels, but these are masks. Pass a table with the "
            "columns image and label, or task='segmentation'."
        )
    if task in MASK_TASKS and not any(p.mask for p in pairs):
        raise ValueError(
            f"task {task!r} needs masks, but these are labels. Pass a table with the "
            "columns image and mask, or task='classification'."
        )
    info = _facts(request, task, [p.image for p in pairs], lambda: _found(pairs))
    spaced = place_pairs(pairs, request.regions, request.cutting)
    files = [path for pair in pairs for path in (pair.image, pair.mask) if path]
    chips = pair_chips(pairs, info, _numbers(request.classes))
    return Collected(info, chips, files, spaced)


def _numbers(classes: object) -> dict[int, int]:
    """Number in the user's masks -> number of the class; empty where they agree."""
    if not isinstance(classes, Mapping):
        return {}
    names = list(dict.fromkeys(classes.values()))
    return {value: names.index(name) for value, name in classes.items()}


def _facts(
    request: Request, task: str, images: Sequence[Path], found: Any
) -> DatasetInfo:
    """The facts; bands, scale and classes are asked for where they are missing."""
    facts = dict(request.facts)
    looks = look_at(images, facts.get("nodata"))
    ask(looks, request.bands, request.scale)
    bands = resolve_bands(request.bands or ())
    if looks.count != len(bands):
        raise ValueError(
            f"{images[0]} has {looks.count} bands, but {len(bands)} are named: "
            f"{', '.join(bands)}. Name every band of the files, in their order; "
            "ChipData(bands=...) chooses among them afterwards."
        )
    check_scale(looks, bands, request.scale, request.offset)
    classes = request.classes
    if task in CLASS_TASKS and not classes:
        raise ValueError(
            f"what are the classes? Found are {found()}. Pass classes=[...], their "
            "names in the order of their numbers from 0; or, with other numbers, a "
            "dict as {0: 'dry', 255: 'water'}."
        )
    if task not in CLASS_TASKS and classes:
        raise ValueError(f"task {task!r} has no classes; leave classes out.")
    if isinstance(classes, Mapping):
        classes = list(dict.fromkeys(classes.values()))
    if request.cuts:  # files that are kept bring their own
        facts.setdefault("nodata", looks.nodata)
    return DatasetInfo.from_dict(
        facts
        | {"name": request.name, "task": task, "bands": bands, "classes": classes or ()}
        | {"scale": request.scale, "offset": request.offset}
    )


def _found(pairs: Sequence[Pair]) -> str:
    """Labels, or mask values of up to eight masks, for a question."""
    values: set[Any] = {pair.label for pair in pairs if pair.label is not None}
    masks = [pair.mask for pair in pairs if pair.mask is not None]
    for mask in masks[:: max(1, len(masks) // 8)][:8]:
        values |= set(np.unique(read_mask(mask)).tolist())
    ordered = sorted(values, key=lambda value: (isinstance(value, str), value))
    shown = ", ".join(map(str, ordered[:20]))
    return f"{shown}{', ...' if len(values) > 20 else ''}"


def _from_scenes(request: Request) -> Collected:
    """Chips of one or several rasters, with polygons or points."""
    single = isinstance(request.images, str | os.PathLike)
    scenes = [Path(p) for p in ([request.images] if single else request.images)]
    scenes = [
        file
        for path in scenes
        for file in (
            sorted(f for f in path.iterdir() if f.suffix.lower() in RASTERS)
            if path.is_dir()
            else [path]
        )
    ]
    task = request.task or "segmentation"
    if task not in ("segmentation", "regression", "classification"):
        raise ValueError(
            f"task is {task!r}; shapes make segmentation, regression or, with points, "
            "classification."
        )
    for path in scenes:
        if not path.is_file():
            raise FileNotFoundError(f"there is no raster {path}. Check the path.")
    table = read_vector(request.masks, "shapes")
    if isinstance(request.classes, Mapping):
        raise ValueError("with shapes, classes is a list of names; see column.")

    def found() -> str:
        if request.column not in table:
            return f"the columns {', '.join(map(str, table))} (column=... names it)"
        return ", ".join(map(str, sorted(set(table[request.column]), key=str)[:20]))

    info = _facts(request, task, scenes, found)
    if "nodata" not in request.facts:
        _check_nodata(scenes)
    regions = request.regions
    if regions is None:
        regions = "scene" if len(scenes) > 1 else "blocks"
    cutting = replace(request.cutting, regions=regions)
    burnt = shapes.make_shapes(table, info, request.column, request.background)
    shapes.check_places(scenes, table, info)
    spaced = regions not in ("scene", "region") if isinstance(regions, str) else True
    chips = _scene_chips(scenes, burnt, info, cutting, request.column)
    return Collected(info, chips, scenes, spaced)


def _check_nodata(scenes: Sequence[Path]) -> None:
    """Refuse scenes whose files state different values as no data."""
    stated: dict[str, Path] = {}
    for path in scenes:
        with rasterio.open(path) as raster:
            stated.setdefault(str(raster.nodata), path)
    if len(stated) > 1:
        (one, a), (other, b), *_ = stated.items()
        raise ValueError(
            f"{a} states nodata={one}, {b} nodata={other}. Convert them alike, or say "
            "what holds for all: facts={'nodata': ...}."
        )


def _scene_chips(
    scenes: Sequence[Path],
    burnt: shapes.Shapes,
    info: DatasetInfo,
    cutting: Cutting,
    column: str | None,
) -> Iterator[Chip]:
    if info.task != "classification":
        for path in scenes:
            yield from chipping.scene_chips(path, burnt, info, cutting)
        return
    table = burnt.table
    if not set(table.geom_type) <= shapes.POINTS or column is None:
        raise ValueError(
            "task 'classification' takes points with a column of labels: column=... "
            "For polygons use task='segmentation'."
        )
    own = isinstance(cutting.regions, str) and cutting.regions == "region"
    if own and "region" not in table:
        raise ValueError("regions='region', but the points have no column region.")
    for path in scenes:
        yield from chipping.point_chips(path, table, info, cutting, own_regions=own)


def common_folder(files: Sequence[Path]) -> Path:
    """The deepest folder that holds all files.

    Args:
        files: At least one.

    Returns:
        Its path, symbolic links resolved.
    """
    return Path(os.path.commonpath([str(path.resolve().parent) for path in files]))
