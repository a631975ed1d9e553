"""`ChipData.from_pairs`: the user's own files and labels -> chips -> `ChipData`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from geopeft_kit.bands import resolve_bands
from geopeft_kit.data.chip import Chip
from geopeft_kit.data.folder import (
    InPlace,
    index_chips,
    read_chip_folder,
    write_chip_folder,
)
from geopeft_kit.data.info import CLASS_TASKS, MASK_TASKS, DatasetInfo
from geopeft_kit.data.own.pairs import found_targets, pair_chips, pair_files
from geopeft_kit.data.own.regions import Cutting, draw_regions, place_pairs
from geopeft_kit.data.own.scale_check import (
    check_scale,
    contradictions,
    require_bands_and_scale,
    sample_values,
)
from geopeft_kit.data.own.scenes import check_scenes, scene_chips, scene_files
from geopeft_kit.data.own.shapes import (
    check_places,
    is_vector,
    make_shapes,
    read_vector,
)
from geopeft_kit.data.own.tables import pair_table

Data = TypeVar("Data")


def from_pairs(
    cls: Callable[..., Data],
    images: Any,
    masks: Any = None,
    *,
    bands: str | Sequence[str] | None = None,
    scale: float | Sequence[float] | None = None,
    offset: float | Sequence[float] = 0.0,
    classes: Sequence[str] | Mapping[int, str] | None = None,
    task: str | None = None,
    folder: str | os.PathLike[str] | None = None,
    column: str | None = None,
    background: str | None = None,
    suffixes: tuple[str, str] = ("", ""),
    regions: Any = None,
    size: int = 224,
    overlap: float = 0.0,
    block_m: float | None = None,
    buffer_m: float = 0.0,
    test_regions: Sequence[str] | None = None,
    test_fraction: float = 0.2,
    name: str = "My data",
    facts: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Data:
    """Your own images and labels as chips.

    What the numbers mean is never assumed: without `bands`, `scale` or `classes`
    the error proposes what they may be.

    Args:
        images: A folder or a list of images; a CSV or DataFrame with the columns
            image, mask or label, and perhaps region, split, date, scene; or one or
            several big rasters.
        masks: A folder or a list of masks, matched by file name; None for a table;
            or polygons or points (GeoPackage, shapefile, GeoJSON, GeoDataFrame,
            CSV with lon and lat) on big rasters.
        bands: What each band of the files is, in order.
        scale: Reflectance of one stored unit, one number or one a band.
        offset: Added after scaling.
        classes: Names in the order of their numbers; or number in the masks ->
            name, None for no label, which needs `folder`. None for regression.
        task: As in `DatasetInfo`. None is "segmentation", or "classification" for
            a table with labels.
        folder: Chip folder to write, whole or not at all. None leaves masks and
            images where they are and writes nothing; shapes need a folder.
        column: Of the shapes: class or value.
        background: Class of ground that no shape covers; None leaves it unlabelled.
        suffixes: Cut off the file names of images and of masks to match them.
        regions: What can be held out: "blocks" (squares), "folder" (the image's),
            "region" (the column), "scene" (one a raster), or polygons with a
            column region. None takes a column or sub-folders where there are any,
            else scenes where there are several, else blocks.
        size: Side in pixels of the chips that are cut.
        overlap: Share of a chip that it has in common with the next one.
        block_m: Side of a block in metres; None takes a quarter of the scene.
        buffer_m: Distance in metres kept between blocks or polygons of regions.
        test_regions: Regions to hold out. None draws some, see `test_fraction`,
            unless the table has splits; `data.test_regions` says which.
        test_fraction: Share of the chips that the drawn regions have.
        name: Of the data set.
        facts: More attributes of `DatasetInfo`: nodata, colours, licence ...
        overwrite: Replace the data set in `folder`.
        **options: Of `ChipData`: batch_size, augment, seed ...

    Returns:
        The data. A folder opens again with `ChipData(folder, test_regions=...)`.

    Raises:
        FileNotFoundError: Something is missing on disk.
        ValueError: Something does not fit, or has to be stated; says what.
    """
    cutting = Cutting(size, overlap, regions, block_m, buffer_m)
    stated = Stated(bands, scale, offset, classes, task, name, facts or {})
    cuts = is_vector(masks)
    if folder is None and (cuts or stated.renumbers):
        what = "cutting chips" if cuts else "renumbering masks"
        raise ValueError(
            f"{what} writes new files: pass folder='my_chips', a folder to write."
        )
    if cuts:
        found = _from_scenes(images, masks, stated, cutting, column, background)
    else:
        found = _from_pairs(images, masks, stated, cutting, suffixes)
    source: Path | InPlace
    if folder is None:
        source = index_chips(common_folder(found.files), found.chips, found.info)
        index = source.index
    else:
        source = write_chip_folder(folder, found.chips, found.info, overwrite)
        index = read_chip_folder(source)[1]
    drawn = test_regions is None and options.get("split", "region") == "region"
    if drawn and index["split"].isna().all():
        seed = options.get("seed", 0)
        test_regions = draw_regions(index["region"], test_fraction, seed)
    # Regions with a buffer between them need no second, coarser look.
    options.setdefault("buffer_m", 0.0 if found.spaced else buffer_m)
    try:
        return cls(source, test_regions=test_regions, **options)
    except ValueError as error:
        if folder is None:
            raise
        raise ValueError(
            f"{error} The chips themselves are written: open them with "
            f"gk.ChipData({str(folder)!r}, test_regions=..., val_fraction=...)."
        ) from error


@dataclass(frozen=True)
class Stated:
    """What the user says about the numbers in the files; see `from_pairs`."""

    bands: str | Sequence[str] | None
    scale: float | Sequence[float] | None
    offset: float | Sequence[float]
    classes: Sequence[str] | Mapping[int, str] | None
    task: str | None
    name: str
    facts: Mapping[str, Any]

    @property
    def names(self) -> list[str]:
        """Names of the classes in the order of their numbers."""
        if not isinstance(self.classes, Mapping):
            return list(self.classes or ())
        named = (name for name in self.classes.values() if name is not None)
        return list(dict.fromkeys(named))

    @property
    def numbers(self) -> dict[int, int | None]:
        """Number in the user's masks -> number of the class; empty where they agree."""
        if not isinstance(self.classes, Mapping):
            return {}
        names = self.names
        return {
            value: None if name is None else names.index(name)
            for value, name in self.classes.items()
        }

    @property
    def renumbers(self) -> bool:
        """Whether masks have to be written anew."""
        return any(value != number for value, number in self.numbers.items())

    def info(
        self,
        task: str,
        images: Sequence[Path],
        found: Callable[[], str],
        keep_nodata: bool = False,
    ) -> DatasetInfo:
        """The facts; bands, scale and classes are asked for where they are missing.

        `found` says which classes there are; `keep_nodata` takes the files' own.
        """
        facts = dict(self.facts)
        stored = sample_values(images, facts.get("nodata"))
        require_bands_and_scale(stored, self.bands, self.scale)
        bands = resolve_bands(self.bands or ())
        if (count := stored.tags.band_count) != len(bands):
            raise ValueError(
                f"{images[0]} has {count} bands, but {len(bands)} are named: "
                f"{', '.join(bands)}. Name every band of the files, in their order; "
                "ChipData(bands=...) chooses among them afterwards."
            )
        check_scale(stored, bands, self.scale, self.offset)
        classes = self.names
        if task in CLASS_TASKS and not classes:
            raise ValueError(
                f"what are the classes? Found are {found()}. Pass classes=[...], their "
                "names in the order of their numbers from 0; or, with other numbers, a "
                "dict as {0: 'dry', 255: 'water'}."
            )
        if task not in CLASS_TASKS and classes:
            raise ValueError(f"task {task!r} has no classes; leave classes out.")
        if keep_nodata:
            facts.setdefault("nodata", stored.tags.nodata)
        info = DatasetInfo.from_dict(
            facts
            | {"name": self.name, "task": task, "bands": bands, "classes": classes}
            | {"scale": self.scale, "offset": self.offset}
        )
        for text in contradictions(stored.tags, info):
            warnings.warn(f"{text}. What you state is used.", stacklevel=5)
        return info


class Found(NamedTuple):
    """The chips to be, read when they are asked for."""

    info: DatasetInfo
    chips: Iterator[Chip]
    files: list[Path]  # that they are read from
    spaced: bool  # whether the buffer is between the regions already


def _from_pairs(
    images: Any,
    masks: Any,
    stated: Stated,
    cutting: Cutting,
    suffixes: tuple[str, str],
) -> Found:
    """Images that are chips already, with masks or labels."""
    if masks is not None:
        pairs = pair_files(images, masks, suffixes)
    elif isinstance(images, str | os.PathLike) and Path(images).is_dir():
        raise ValueError(
            "masks is missing. Pass masks=, a folder or a list, matched by file "
            "name; or a table with the columns image and mask or label."
        )
    else:
        pairs = pair_table(images)
    labelled = pairs[0].label is not None
    task = stated.task or ("classification" if labelled else "segmentation")
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
    info = stated.info(task, [p.image for p in pairs], lambda: found_targets(pairs))
    spaced = place_pairs(pairs, cutting)
    files = [path for pair in pairs for path in (pair.image, pair.mask) if path]
    return Found(info, pair_chips(pairs, info, stated.numbers), files, spaced)


def _from_scenes(
    images: Any,
    shapes: Any,
    stated: Stated,
    cutting: Cutting,
    column: str | None,
    background: str | None,
) -> Found:
    """Chips cut out of one or several rasters, with polygons or points."""
    task = stated.task or "segmentation"
    if task not in ("segmentation", "regression", "classification"):
        raise ValueError(
            f"task is {task!r}; shapes make segmentation, regression or, with points, "
            "classification."
        )
    scenes = scene_files(images)
    table = read_vector(shapes, "shapes")
    if isinstance(stated.classes, Mapping):
        raise ValueError("with shapes, classes is a list of names; see column.")

    def found() -> str:
        if column not in table:
            return f"the columns {', '.join(map(str, table))} (column=... names it)"
        return ", ".join(map(str, sorted(set(table[column]), key=str)[:20]))

    info = stated.info(task, scenes, found, keep_nodata=True)
    check_scenes(scenes, "nodata" in stated.facts)
    regions = cutting.regions
    if regions is None:
        regions = "scene" if len(scenes) > 1 else "blocks"
    burnt = make_shapes(table, info, column, background)
    check_places(scenes, table, info)
    spaced = regions not in ("scene", "region") if isinstance(regions, str) else True
    cutting = replace(cutting, regions=regions)
    chips = scene_chips(scenes, burnt, info, cutting, column)
    return Found(info, chips, scenes, spaced)


def common_folder(files: Sequence[Path]) -> Path:
    """The deepest folder that holds all files, symbolic links resolved."""
    return Path(os.path.commonpath([str(path.resolve().parent) for path in files]))
