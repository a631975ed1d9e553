"""Arrays and files of chips -> the files of a chip folder, checked on the way.

`folder.write_chip_folder` uses this.
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rasterio.dtypes import in_dtype_range
from rasterio.errors import NotGeoreferencedWarning
from rasterio.io import MemoryFile

from geopeft_kit.data.chip import (
    Chip,
    Outline,
    check_same_size,
    inspect,
    outline_of,
)
from geopeft_kit.data.index import COLUMNS
from geopeft_kit.data.info import DatasetInfo, mask_value_message
from geopeft_kit.open_raster import Tags, check_alike

FOLDERS = {"image": "images", "image_after": "images_after", "mask": "masks"}
_NAME = re.compile(r"\w[\w.-]*")  # letters of any script


class ChipWriter:
    """Writes the files of one chip after another.

    Files that are in `folder` already stay where they are; new ones go into `part`
    until the folder is whole.
    """

    def __init__(self, folder: Path, part: Path, info: DatasetInfo) -> None:
        self.folder, self.part, self.info = folder, part, info
        self.outlines: list[Outline] = []
        self.first: tuple[Path, Tags] | None = None  # of the images that are files
        self.names: set[str] = set()

    def add(self, chip: Chip) -> dict[str, Any]:
        """Write the files of a chip; its row of the index."""
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
                return sorted(set(self.info.class_numbers(label)))
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
        row[column] = f"{FOLDERS[column]}/{chip.name}.tif"
        outline = outline or outline_of(chip, *array.shape[-2:])
        encoded = encode(array, outline, self.info, column == "mask")
        with self.new_file(row[column]) as path:
            path.write_bytes(encoded)
        height, width = array.shape[-2:]
        return Outline(height, width, outline.crs, outline.transform)

    def _copy(
        self, chip: Chip, column: str, source: Path, row: dict[str, Any]
    ) -> Outline:
        if not source.is_file():
            raise FileNotFoundError(
                f"chip {chip.name!r}: there is no file {source} for its {column}."
            )
        tags, outline, files = inspect(chip.name, source)
        if column != "mask" and tags.band_count != len(self.info.bands):
            raise ValueError(
                f"chip {chip.name!r}: {source} has {tags.band_count} bands, but the "
                f"data set names {len(self.info.bands)}: {', '.join(self.info.bands)}."
            )
        if column != "mask":
            self.first = self.first or (source, tags)
            check_alike(source, tags, *self.first)
        home = self.folder.resolve()
        if source.resolve().is_relative_to(home):
            row[column] = source.resolve().relative_to(home).as_posix()
        else:
            stem = f"{FOLDERS[column]}/{chip.name}"
            row[column] = f"{stem}{source.suffix}"
            for file in files:  # the raster, and .aux.xml, .msk, .hdr ... beside it
                end = file.name.removeprefix(source.stem)
                with self.new_file(f"{stem}{end}") as path:
                    shutil.copyfile(file, path)
        return outline

    @contextmanager
    def new_file(self, name: str) -> Iterator[Path]:
        """Where to write a file of the folder; an error on the way names it."""
        path = self.part / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield path
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror or error}; nothing of this data set is left half-"
                "written. Free some space or choose another folder, then run again. "
                "The file was",
                str(self.folder / name),
            ) from error


def check_image(name: str, array: np.ndarray, info: DatasetInfo) -> None:
    """Raise ValueError for an image of another shape, or with NaN not declared."""
    if array.ndim != 3 or array.shape[0] != len(info.bands):
        raise ValueError(
            f"chip {name!r}: the image has shape {array.shape}; expected "
            f"({len(info.bands)}, H, W), one channel for each of "
            f"{', '.join(info.bands)}."
        )
    if array.dtype.kind == "f" and not (
        info.nodata is not None and np.isnan(info.nodata)
    ):
        bad = int((~np.isfinite(array)).sum())
        if bad:
            raise ValueError(
                f"chip {name!r}: {bad} of {array.size} image values are NaN or "
                "infinite. Fill them, or set them to a number and declare it as nodata "
                "(nodata=float('nan') declares NaN itself)."
            )


def checked_mask(name: str, array: np.ndarray, info: DatasetInfo) -> np.ndarray:
    """A mask in the smallest type that holds it, its values checked."""
    if array.ndim != 2:
        raise ValueError(
            f"chip {name!r}: the mask has shape {array.shape}; expected (H, W)."
        )
    if info.task == "regression":
        return array.astype(np.float32)
    allowed = {*range(len(info.classes)), info.ignore_index}
    wrong = sorted(set(np.unique(array).tolist()) - allowed)
    if wrong:
        raise ValueError(mask_value_message(name, wrong, info))
    small = np.uint8 if max(allowed) < 256 and min(allowed) >= 0 else np.int16
    return array.astype(small)


def encode(
    array: np.ndarray, outline: Outline, info: DatasetInfo, is_mask: bool
) -> bytes:
    """A compressed GeoTIFF, in memory: writing bytes fails loudly on a full disk."""
    array = array[None] if is_mask else array  # (C, H, W)
    count, height, width = array.shape
    nodata = info.nodata
    if is_mask:
        nodata = np.nan if info.task == "regression" else info.ignore_index
    if nodata is not None and not in_dtype_range(nodata, array.dtype.name):
        nodata = None  # a value that this type cannot hold is not in the file either
    profile = {
        "driver": "GTiff", "count": count, "height": height, "width": width,
        "dtype": array.dtype.name, "nodata": nodata, "crs": outline.crs,
        "compress": "deflate", "zlevel": 6,
        "predictor": 3 if array.dtype.kind == "f" else 2,
        # By band, so that reading three of twelve bands costs three.
        "interleave": "band",
    }  # fmt: skip
    if outline.transform is not None:
        profile["transform"] = outline.transform
    if min(height, width) >= 512:
        profile |= {"tiled": True, "blockxsize": 256, "blockysize": 256}
    else:
        profile["blockysize"] = height
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with MemoryFile() as memory:
            with memory.open(**profile) as raster:
                raster.write(array)
                if not is_mask:
                    raster.descriptions = info.bands
                    raster.scales = np.broadcast_to(info.scale, count).tolist()
                    raster.offsets = np.broadcast_to(info.offset, count).tolist()
            return bytes(memory.getbuffer())
