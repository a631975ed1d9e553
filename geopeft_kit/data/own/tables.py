"""A table with one row an image: a CSV or a DataFrame, checked -> pairs."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
import pandas as pd

from geopeft_kit.data.index import dates_from
from geopeft_kit.data.own.pairs import Pair, unique_names

TABLE_COLUMNS = ("image", "mask", "label", "region", "split", "date", "scene")


def read_csv(path: Path) -> pd.DataFrame:
    """A CSV in UTF-8, with commas or semicolons; ValueError where it is none."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            head = file.readline()
        separator = ";" if head.count(";") > head.count(",") else ","
        return pd.read_csv(path, sep=separator, encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not in UTF-8 (byte {error.start} is not a letter). Save it "
            "again as 'CSV UTF-8', which spreadsheets offer."
        ) from error
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise ValueError(f"{path} is not readable as a table: {error}.") from error


def pair_table(source: str | os.PathLike[str] | pd.DataFrame) -> list[Pair]:
    """Pairs from a CSV or DataFrame with one row an image, in the order of the rows.

    Paths in a CSV count from its own folder, in a DataFrame from where Python runs.
    Columns: image; mask or label; and, where wanted, region, split, date and scene.

    Raises:
        FileNotFoundError: The table or a file of it is missing.
        ValueError: A column is missing, a cell is empty or no date, or two images
            have the same name.
    """
    if isinstance(source, pd.DataFrame):
        table, root, name = source, Path(), "the table"
    else:
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"there is no table {path}. Check the path.")
        table, root, name = read_csv(path), path.parent, str(path)
    _check_columns(table, name)
    if table.empty:
        raise ValueError(f"{name} has no rows.")
    columns = {c: table[c].tolist() for c in TABLE_COLUMNS if c in table}
    if "date" in columns:
        days = dates_from(table["date"], name)
        columns["date"] = [None if pd.isna(day) else day for day in days]
    pairs = []
    for row in range(len(table)):
        cell = {key: values[row] for key, values in columns.items()}
        pairs.append(_pair_of(cell, root, f"{name}, row {row}"))
    return _named(pairs, name)


def _named(pairs: list[Pair], table: str) -> list[Pair]:
    """Names by stem; where stems repeat, with the folder before them."""
    rows = dict[Path, int]()
    for row, pair in enumerate(pairs):
        if pair.image in rows:
            raise ValueError(
                f"{table}: rows {rows[pair.image]} and {row} name the same image, "
                f"{pair.image}. Remove one."
            )
        rows[pair.image] = row
    for parts in (1, 2):
        keys = ["/".join(p.image.with_suffix("").parts[-parts:]) for p in pairs]
        if len(set(keys)) == len(pairs):
            break
    for pair, name in zip(pairs, unique_names(keys), strict=True):
        pair.name = name
    return pairs


def _check_columns(table: pd.DataFrame, name: str) -> None:
    targets = [column for column in ("mask", "label") if column in table]
    if "image" in table and len(targets) == 1:
        return
    close = [
        f"{column!r} may be meant as {near[0]!r}"
        for column in map(str, table)
        if column not in TABLE_COLUMNS
        and (near := difflib.get_close_matches(column.lower(), TABLE_COLUMNS, 1, 0.75))
    ]
    raise ValueError(
        f"{name} has the columns {', '.join(map(str, table)) or '(none)'}; needed are "
        "image and one of mask and label, and region, split, date and scene may "
        f"be added.{' ' + '; '.join(close) + '.' if close else ''}"
    )


def _pair_of(cell: dict[str, Any], root: Path, where: str) -> Pair:
    """One row of a table; an empty target leaves the image unlabelled."""
    cell = {
        key: None if np.ndim(v) == 0 and pd.isna(v) else v for key, v in cell.items()
    }
    paths = {}
    for key in ("image", "mask"):
        value = cell.get(key)
        if value is None:
            continue
        # A name that a Mac wrote has other characters for the same letters.
        forms = [root / normalize(form, str(value)) for form in ("NFC", "NFD")]
        paths[key] = next(filter(Path.is_file, [root / str(value), *forms]), forms[0])
        if not paths[key].is_file():
            raise FileNotFoundError(f"{where}: there is no {key} {paths[key]}.")
    if "image" not in paths:
        raise ValueError(f"{where}: the cell of 'image' is empty.")
    return Pair(
        "",
        **paths,
        label=cell.get("label"),
        region=None if cell.get("region") is None else str(cell["region"]),
        split=None if cell.get("split") is None else str(cell["split"]),
        date=cell.get("date"),
        extra={"scene": cell["scene"]} if cell.get("scene") is not None else {},
    )
