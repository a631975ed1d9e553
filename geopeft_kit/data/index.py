"""The index of a chip folder, one row a chip: made, checked, and as arrays."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from geopeft_kit.data.chip import Outline, footprints
from geopeft_kit.data.info import DatasetInfo
from geopeft_kit.geodesy import centres

if TYPE_CHECKING:
    import geopandas as gpd
    from torch import Tensor

INDEX = "chips.parquet"
COLUMNS = ("chip", "split", "region", "geometry", "date", "image", "width", "height")
FILE_COLUMNS = ("image", "image_after", "mask")


def make_index(
    rows: list[dict[str, Any]], outlines: list[Outline], info: DatasetInfo
) -> gpd.GeoDataFrame:
    """The index of rows as `ChipWriter.add` returns them, footprints in EPSG:4326."""
    import geopandas

    table = pd.DataFrame(rows)
    for name in ("date", "date_after"):
        if name in table:
            table[name] = dates_from(table[name], "the chips")
    if info.target not in table:
        table[info.target] = None
    if info.task == "classification" and "label" in table:
        table["label"] = table["label"].astype("Int64")
    order = [c for c in (*COLUMNS, "image_after", "mask", "label") if c in table]
    table = table[[*order, *(c for c in table if c not in order)]]
    return geopandas.GeoDataFrame(table, geometry=footprints(outlines), crs="EPSG:4326")


def dates_from(column: pd.Series, where: str) -> pd.Series:
    """Days and times without a zone, of dates or ISO text with or without one."""
    text = column.astype(object).where(column.notna(), None).map(str, "ignore")
    days = pd.to_datetime(text, format="ISO8601", errors="coerce", utc=True)
    wrong = (days.isna() & column.notna()).to_numpy()
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(
            f"{where}, row {row}: {column.iloc[row]!r} is not a date. Write 2024-05-31."
        )
    return days.dt.tz_localize(None)


def check_index(folder: Path, index: gpd.GeoDataFrame, info: DatasetInfo) -> None:
    """Refuse an index that cannot be right; says what, and what to do.

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
        raise ValueError(f"{folder / INDEX}: chip {twice[0]!r} is there twice.")
    for name in ("chip", "image", "region"):
        if index[name].isna().any():
            raise ValueError(f"{folder / INDEX}: column {name!r} has empty cells.")
    nowhere = index["chip"][index.geometry.notna() & index.geometry.is_empty]
    if len(nowhere):
        raise ValueError(
            f"{folder / INDEX}: the footprint of chip {nowhere.iloc[0]!r} is empty; "
            "write the chip folder again."
        )
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
    """Every file exists, inside the folder."""
    names = [
        name
        for column in FILE_COLUMNS
        if column in index
        for name in index[column].dropna()
    ]
    outside = [n for n in names if Path(n).is_absolute() or ".." in Path(n).parts]
    # One listing a folder: asking for 27,000 files one by one takes seconds.
    parents = {Path(name).parent for name in names} if not outside else set()
    there: dict[str, os.DirEntry] = {}
    home = folder.resolve()
    for parent in parents:
        if not (folder / parent).resolve().is_relative_to(home):
            outside.append(str(parent))
        elif (folder / parent).is_dir():
            for entry in os.scandir(folder / parent):
                there[(parent / entry.name).as_posix()] = entry
    outside += [
        name
        for name, entry in there.items()
        if entry.is_symlink() and not Path(entry).resolve().is_relative_to(home)
    ]
    if outside:
        raise ValueError(
            f"{folder / INDEX}: {outside[0]!r} points out of the folder; paths are "
            "relative to it and stay inside."
        )
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


def labels_of(
    index: gpd.GeoDataFrame, task: str, num_classes: int
) -> list[Tensor | None]:
    """Labels of all rows; None where a row has none, as with masks.

    () int64 for classification, (K,) float32 zeros and ones for multilabel.
    """
    import torch

    if task == "classification":
        return [
            None if label != label or label is None else torch.tensor(int(label))
            for label in index["label"].astype(float)
        ]
    if task == "multilabel":
        rows: list[Tensor | None] = []
        for label in index["label"]:
            if label is None:
                rows.append(None)
                continue
            hot = torch.zeros(num_classes)  # (K,)
            hot[[int(number) for number in label]] = 1.0
            rows.append(hot)
        return rows
    return [None] * len(index)


def dates_of(index: gpd.GeoDataFrame, pair: bool) -> np.ndarray:
    """(N, T, 2) float32: year, and day of the year counted from 0; NaN where unknown.

    `pair` is a change pair, which has two dates.
    """
    names = ["date", "date_after"] if pair else ["date"]
    found = np.full((len(index), len(names), 2), np.nan, np.float32)
    for step, name in enumerate(names):
        if name in index:
            days = pd.to_datetime(index[name])
            found[:, step, 0] = days.dt.year
            found[:, step, 1] = days.dt.day_of_year - 1
    return found


def lonlat_of(index: gpd.GeoDataFrame) -> np.ndarray:
    """Centres of the footprints, (N, 2) float32 degrees; NaN without a footprint."""
    return centres(index.geometry.to_numpy()).astype("f4")
