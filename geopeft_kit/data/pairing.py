"""Which mask belongs to which image: two folders, two lists, or a table.

Whatever the source, the result is a list of `Pair`. Anything that does not fit is
named, nothing is passed over. Taught in `notebooks/14_your_own_data.ipynb`.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

RASTERS = (".tif", ".tiff", ".png", ".jpg", ".jpeg", ".jp2", ".img")
TABLE_COLUMNS = ("image", "mask", "label", "region", "split", "date", "scene")

Files = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclass
class Pair:
    """An image with its target, both still on disk where the user has them.

    Attributes:
        name: Unique, and fit to name a file.
        image, mask: Paths.
        label: Class name or number.
        region: None leaves it to be found.
        split, date: As in `Chip`.
        extra: More columns of the index.
    """

    name: str
    image: Path
    mask: Path | None = None
    label: Any = None
    region: str | None = None
    split: str | None = None
    date: Any = None
    extra: dict[str, Any] = field(default_factory=dict)


def pair_files(
    images: Files, masks: Files, suffixes: tuple[str, str] = ("", "")
) -> list[Pair]:
    """Match images and masks by their stems.

    Args:
        images: A folder (searched with its sub-folders) or a list of files.
        masks: Likewise.
        suffixes: What to cut off the stems of images and of masks before they are
            compared, as ("_image", "_mask").

    Returns:
        Pairs by name. Files in sub-folders have the name of theirs as their region.

    Raises:
        FileNotFoundError: A folder or file is missing.
        ValueError: A stem stands twice, or files without a partner, by name.
    """
    found = _by_stem(images, suffixes[0], "image")
    partners = _by_stem(masks, suffixes[1], "mask")
    lonely = sorted(set(found) - set(partners))
    widowed = sorted(set(partners) - set(found))
    if lonely or widowed:
        raise ValueError(
            f"{len(lonely)} images have no mask{_some(lonely)} and {len(widowed)} "
            f"masks have no image{_some(widowed)}. They are matched by name without "
            f"ending.{_suffix_hint(found, partners)} Remove the others, or add what "
            "is missing."
        )
    return [
        Pair(safe_name(key), path, partners[key][0], region=region)
        for key, (path, region) in sorted(found.items())
    ]


def _by_stem(
    files: Files, suffix: str, what: str
) -> dict[str, tuple[Path, str | None]]:
    """Stem (with its sub-folder) -> path and sub-folder."""
    listed: list[tuple[Path, str | None]]
    if isinstance(files, str | os.PathLike):
        root = Path(files)
        if not root.is_dir():
            raise FileNotFoundError(
                f"there is no folder {root} of {what}s. Give a folder or a list."
            )
        listed = [
            (path, str(path.parent.relative_to(root)).replace(os.sep, "/"))
            for path in sorted(root.rglob("*"))
            if path.suffix.lower() in RASTERS and not path.name.startswith(".")
        ]
        if not listed:
            raise ValueError(
                f"{root} has no {what}s in it; looked for {', '.join(RASTERS)}."
            )
    else:
        listed = [(Path(path), None) for path in files]
        missing = [path for path, _ in listed if not path.is_file()]
        if missing:
            raise FileNotFoundError(f"there is no {what} {missing[0]}. Check the path.")
    result: dict[str, tuple[Path, str | None]] = {}
    for path, folder in listed:
        region = None if folder in (None, ".") else folder
        stem = path.stem.removesuffix(suffix)
        key = f"{region}/{stem}" if region else stem
        if key in result:
            raise ValueError(
                f"two {what}s are called {key!r}: {result[key][0]} and {path}. Rename "
                "one, or leave one out."
            )
        result[key] = path, region
    return result


def _some(names: Sequence[str]) -> str:
    dots = ", ..." if len(names) > 3 else ""
    return f" ({', '.join(map(repr, names[:3]))}{dots})" if names else ""


def _suffix_hint(images: dict[str, Any], masks: dict[str, Any]) -> str:
    """Proposes suffixes where cutting them off would make partners."""

    def shared_end(stems: list[str]) -> str:
        return os.path.commonprefix([stem[::-1] for stem in stems])[::-1]

    ends = shared_end(list(images)), shared_end(list(masks))
    cut = [
        {stem.removesuffix(end) for stem in stems}
        for stems, end in zip((images, masks), ends, strict=True)
    ]
    partners = cut[0] & cut[1] - {""}
    return f" Perhaps you want suffixes={ends!r}." if any(ends) and partners else ""


def safe_name(key: str) -> str:
    """A chip name that can name a file.

    Args:
        key: A stem, with its folder or without.

    Returns:
        The same with "_" for all but letters, digits, "_", "-" and ".".
    """
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", key)
    return name if re.match(r"[A-Za-z0-9_]", name) else f"_{name}"


def read_csv(path: Path) -> pd.DataFrame:
    """Read a CSV in UTF-8, with commas or semicolons.

    Args:
        path: The file.

    Returns:
        The table, texts as they are.

    Raises:
        ValueError: It is not UTF-8, or no table.
    """
    import pandas as pd

    try:
        with path.open(encoding="utf-8-sig") as file:
            head = file.readline()
        separator = ";" if head.count(";") > head.count(",") else ","
        return pd.read_csv(path, sep=separator, encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not in UTF-8 (byte {error.start} is no letter there). Save it "
            "again as 'CSV UTF-8', which spreadsheets offer."
        ) from error
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise ValueError(f"{path} is not readable as a table: {error}.") from error


def pair_table(source: str | os.PathLike[str] | pd.DataFrame) -> list[Pair]:
    """Pairs from a table with one row an image.

    Args:
        source: A CSV, whose paths count from its own folder, or a DataFrame, whose
            paths count from where Python runs. Columns: image; mask or label; and,
            where wanted, region, split, date and scene.

    Returns:
        Pairs in the order of the rows.

    Raises:
        FileNotFoundError: The table or a file of it is missing.
        ValueError: A column is missing, a cell is empty or no date, or two images
            have the same name.
    """
    import pandas as pd

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
        days = pd.to_datetime(table["date"], format="ISO8601", errors="coerce")
        wrong = (days.isna() & table["date"].notna()).to_numpy()
        if wrong.any():
            row = int(wrong.argmax())
            raise ValueError(
                f"{name}, row {row}: {columns['date'][row]!r} is no date. Write "
                "2024-05-31."
            )
        columns["date"] = [None if pd.isna(day) else day for day in days]
    pairs = []
    for row in range(len(table)):
        cell = {key: values[row] for key, values in columns.items()}
        pairs.append(_pair_of(cell, root, f"{name}, row {row}", pd.isna))
    return _named(pairs, name)


def _named(pairs: list[Pair], table: str) -> list[Pair]:
    """Names by stem; where stems repeat, with the folder before them."""
    for parts in (1, 2):
        for pair in pairs:
            pair.name = safe_name("/".join(pair.image.with_suffix("").parts[-parts:]))
        if len({pair.name for pair in pairs}) == len(pairs):
            return pairs
    rows = dict[str, int]()
    for row, pair in enumerate(pairs):
        if pair.name in rows:
            raise ValueError(
                f"{table}: rows {rows[pair.name]} and {row} both make a chip called "
                f"{pair.name!r}. Remove one, or rename its image."
            )
        rows[pair.name] = row
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
        f"stand beside them.{' ' + '; '.join(close) + '.' if close else ''}"
    )


def _pair_of(
    cell: dict[str, Any], root: Path, where: str, empty: Callable[[Any], Any]
) -> Pair:
    """One row of a table; an empty target leaves the image unlabelled."""
    cell = {
        key: None if not isinstance(v, list | tuple) and empty(v) else v
        for key, v in cell.items()
    }
    paths = {}
    for key in ("image", "mask"):
        value = cell.get(key)
        if value is None:
            continue
        paths[key] = root / str(value)
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
