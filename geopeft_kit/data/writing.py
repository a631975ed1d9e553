"""The files of a chip folder, written one chip after another and taken back on error.

`folder.write_chip_folder` uses this; the index of what was written is made here too.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from geopeft_kit.data.chip import (
    Chip,
    Outline,
    check_same_size,
    footprints,
    inspect,
    outline_of,
)
from geopeft_kit.data.encoding import check_image, checked_mask, encode
from geopeft_kit.data.index_checks import COLUMNS
from geopeft_kit.data.info import DatasetInfo
from geopeft_kit.files import whole_file

if TYPE_CHECKING:
    import geopandas as gpd

FOLDERS = {"image": "images", "image_after": "images_after", "mask": "masks"}
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


class ChipWriter:
    """Writes the files of one chip after another, and can take them back."""

    def __init__(self, folder: Path, info: DatasetInfo) -> None:
        self.folder, self.info = folder, info
        self.written: list[Path] = []
        self.made = [p for p in (folder, *folder.parents) if not p.exists()]
        self.outlines: list[Outline] = []
        self.names: set[str] = set()

    def add(self, chip: Chip) -> dict[str, Any]:
        """Write the files of a chip; returns its row of the index."""
        self._check_name(chip)
        row: dict[str, Any] = {}
        outline = self._put(chip, "image", chip.image, row)
        if self.info.task == "change" and chip.image_after is None:
            raise ValueError(
                f"chip {chip.name!r} has no image_after; task 'change' needs both "
                "dates."
            )
        if chip.image_after is not None:
            after = self._put(chip, "image_after", chip.image_after, row)
            check_same_size(chip.name, "image_after", after, outline)
        if chip.mask is not None:
            mask = self._put(chip, "mask", chip.mask, row, outline)
            check_same_size(chip.name, "mask", mask, outline)
        self.outlines.append(outline)
        row |= {
            "chip": chip.name,
            "split": chip.split,
            "region": str(chip.region),
            "date": chip.date,
            "width": outline.width,
            "height": outline.height,
        }
        if chip.image_after is not None:
            row["date_after"] = chip.date_after
        if chip.label is not None:
            row["label"] = self._label(chip)
        taken = set(chip.extra) & {*COLUMNS, "label", "mask", "image_after"}
        if taken:
            raise ValueError(
                f"chip {chip.name!r}: extra may not hold {', '.join(sorted(taken))}; "
                "these columns have their own attribute."
            )
        return row | dict(chip.extra)

    def _check_name(self, chip: Chip) -> None:
        if not _NAME.fullmatch(chip.name):
            raise ValueError(
                f"chip name {chip.name!r} cannot name a file. Use letters, digits, "
                "'_', '-' and '.'."
            )
        if chip.name in self.names:
            raise ValueError(f"two chips are named {chip.name!r}; names are unique.")
        self.names.add(chip.name)

    def _label(self, chip: Chip) -> int | list[int]:
        label: Any = chip.label
        try:
            if self.info.task == "multilabel":
                return sorted({self.info.class_number(c) for c in label})
            return self.info.class_number(label)
        except (ValueError, TypeError) as error:
            raise ValueError(f"chip {chip.name!r}: {error}") from error

    def _put(
        self,
        chip: Chip,
        column: str,
        source: np.ndarray | str | os.PathLike[str],
        row: dict[str, Any],
        outline: Outline | None = None,
    ) -> Outline:
        """Write or copy one raster, note its place in `row`."""
        if isinstance(source, str | os.PathLike):
            return self._copy(chip, column, Path(source), row)
        array = np.asarray(source)
        if column == "mask":
            array = checked_mask(chip.name, array, self.info)
        else:
            check_image(chip.name, array, self.info)
        target = self.folder / FOLDERS[column] / f"{chip.name}.tif"
        outline = outline or outline_of(chip, *array.shape[-2:])
        encoded = encode(array, outline, self.info, column == "mask")
        with self.new_file(target) as part:
            part.write_bytes(encoded)
        row[column] = target.relative_to(self.folder).as_posix()
        height, width = array.shape[-2:]
        return Outline(height, width, outline.crs, outline.transform)

    def _copy(
        self, chip: Chip, column: str, source: Path, row: dict[str, Any]
    ) -> Outline:
        if not source.is_file():
            raise FileNotFoundError(
                f"chip {chip.name!r}: there is no file {source} for its {column}."
            )
        count, outline = inspect(source)
        if column != "mask" and count != len(self.info.bands):
            raise ValueError(
                f"chip {chip.name!r}: {source} has {count} bands, but the data set "
                f"names {len(self.info.bands)}: {', '.join(self.info.bands)}."
            )
        if source.resolve().is_relative_to(self.folder.resolve()):
            target = source.resolve().relative_to(self.folder.resolve())
        else:
            target = Path(FOLDERS[column]) / f"{chip.name}{source.suffix}"
            with self.new_file(self.folder / target) as part:
                shutil.copyfile(source, part)
        row[column] = target.as_posix()
        return outline

    @contextmanager
    def new_file(self, target: Path) -> Iterator[Path]:
        """A temporary path beside `target` that takes its place when all went well."""
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(target) as part:
                yield part
            self.written.append(target)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror or error}; nothing of this data set is left half-"
                "written. Free some space or choose another folder, then run again. "
                "The file was",
                str(target),
            ) from error

    def undo(self) -> None:
        """Remove what this call has written, and the folders that it made."""
        for path in reversed(self.written):
            path.unlink(missing_ok=True)
        folders = [self.folder / name for name in FOLDERS.values()]
        for path in (*folders, *self.made):
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def make_index(
    rows: list[dict[str, Any]], outlines: list[Outline], info: DatasetInfo
) -> gpd.GeoDataFrame:
    """The index: one row a chip, its footprint in EPSG:4326."""
    import geopandas as gpd
    import pandas as pd

    table = pd.DataFrame(rows)
    for name in ("date", "date_after"):
        if name in table:
            table[name] = pd.to_datetime(table[name], errors="raise")
    if info.target not in table:
        table[info.target] = None
    if info.task == "classification" and "label" in table:
        table["label"] = table["label"].astype("Int64")
    order = [c for c in (*COLUMNS, "image_after", "mask", "label") if c in table]
    table = table[[*order, *(c for c in table if c not in order)]]
    return gpd.GeoDataFrame(table, geometry=footprints(outlines), crs="EPSG:4326")
