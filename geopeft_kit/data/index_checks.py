"""The index of a chip folder, checked before anything is read through it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from geopeft_kit.data.info import DatasetInfo

if TYPE_CHECKING:
    import geopandas as gpd

INDEX = "chips.parquet"
COLUMNS = ("chip", "split", "region", "geometry", "date", "image", "width", "height")
FILE_COLUMNS = ("image", "image_after", "mask")


def check_index(folder: Path, index: gpd.GeoDataFrame, info: DatasetInfo) -> None:
    """Raise where an index cannot be right; the text says what, and what to do.

    Args:
        folder: The chip folder.
        index: One row a chip.
        info: Facts of the data set.

    Raises:
        FileNotFoundError: A file of a chip is missing.
        ValueError: A column is missing, or a cell cannot be right.
    """
    needed = [*COLUMNS, info.target]
    if info.task == "change":
        needed.append("image_after")
    missing = [name for name in needed if name not in index]
    if missing:
        raise ValueError(
            f"{folder / INDEX} lacks the columns {', '.join(missing)}; task "
            f"{info.task!r} needs {', '.join(needed)}."
        )
    if index.empty:
        raise ValueError(f"{folder / INDEX} has no rows; write at least one chip.")
    twice = index["chip"][index["chip"].duplicated()].tolist()
    if twice:
        raise ValueError(f"{folder / INDEX}: chip {twice[0]!r} stands there twice.")
    for name in ("chip", "image", "region"):
        if index[name].isna().any():
            raise ValueError(f"{folder / INDEX}: column {name!r} has empty cells.")
    if index.crs is not None and index.crs.to_epsg() != 4326:
        raise ValueError(
            f"{folder / INDEX}: footprints are in {index.crs.to_string()}; expected "
            "EPSG:4326."
        )
    _check_cells(folder, index)
    _check_files(folder, index)
    _check_labels(folder, index, info)


def _check_cells(folder: Path, index: gpd.GeoDataFrame) -> None:
    """Names are text, sizes are whole numbers above 0, dates are dates."""
    import pandas as pd

    def refuse(name: str, value: object, wanted: str) -> None:
        raise ValueError(
            f"{folder / INDEX}: column {name!r} holds {str(value)[:40]!r}; expected "
            f"{wanted}. Write the chip folder again."
        )

    for name in ("chip", "region", "split", *FILE_COLUMNS):
        for value in index[name].dropna() if name in index else ():
            text = isinstance(value, str)
            if not text and (name in FILE_COLUMNS or not np.isscalar(value)):
                refuse(name, value, "text")
    for name in ("width", "height"):
        for value in index[name]:
            if not isinstance(value, int | np.integer) or value < 1:
                refuse(name, value, "a whole number above 0")
    for name in {"date", "date_after"} & set(index):
        try:
            pd.to_datetime(index[name])
        except (ValueError, TypeError) as error:
            refuse(name, error, "dates")


def _check_files(folder: Path, index: gpd.GeoDataFrame) -> None:
    """Every file exists and lies inside the folder."""
    names = [
        name
        for column in FILE_COLUMNS
        if column in index
        for name in index[column].dropna()
    ]
    outside = [n for n in names if Path(n).is_absolute() or ".." in Path(n).parts]
    if outside:
        raise ValueError(
            f"{folder / INDEX}: {outside[0]!r} points out of the folder; paths are "
            "relative to it and stay inside."
        )
    # One listing a folder: asking for 27,000 files one by one takes seconds.
    parents = {Path(name).parent for name in names}
    there = {
        (parent / entry.name).as_posix()
        for parent in parents
        if (folder / parent).is_dir()
        for entry in os.scandir(folder / parent)
    }
    missing = sorted({name for name in names if Path(name).as_posix() not in there})
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(set(names))} files of {folder} are missing, the "
            f"first is {missing[0]}. Copy them back, or write the chip folder again."
        )


def _check_labels(folder: Path, index: gpd.GeoDataFrame, info: DatasetInfo) -> None:
    if info.target != "label":
        return
    for chip, label in zip(index["chip"], index["label"], strict=True):
        numbers = label if isinstance(label, list | np.ndarray) else [label]
        for number in numbers:
            if number is None or number != number or str(number) == "<NA>":
                continue
            try:
                info.class_number(number)
            except (ValueError, TypeError) as error:
                raise ValueError(f"{folder / INDEX}: chip {chip!r}: {error}") from error
