"""A chip folder: one layout on disk for every data set, written whole or not at all.

    dataset/
      chips.parquet    GeoParquet, one row a chip: chip, split, region, geometry, ...
      dataset.json     name, task, bands, scale, classes, ..., sha256 of chips.parquet
      images/ masks/   GeoTIFF, or the original files where they have no georeference

`write_chip_folder` writes it, `read_chip_folder` reads and checks it. `dataset.json`
comes last: where it is, everything else is there. Taught in
`notebooks/14_your_own_data.ipynb`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from geopeft_kit.data.chip import Chip
from geopeft_kit.data.index import INDEX, check_index, make_index
from geopeft_kit.data.info import DatasetInfo
from geopeft_kit.data.writing import ChipWriter
from geopeft_kit.files import hash_of, whole_folder

if TYPE_CHECKING:
    import geopandas as gpd

FACTS = "dataset.json"


class InPlace(NamedTuple):
    """A data set whose index is in memory alone; its files are in `folder`."""

    folder: Path
    info: DatasetInfo
    index: gpd.GeoDataFrame


def write_chip_folder(
    folder: str | os.PathLike[str],
    chips: Iterable[Chip],
    info: DatasetInfo | Mapping[str, Any],
    overwrite: bool = False,
) -> Path:
    """Write chips as a chip folder.

    Everything goes to a temporary folder first and moves to its place at the end: where
    anything fails, the folder is as it was before.

    Args:
        folder: Made where it does not exist.
        chips: Read one at a time, so a generator never holds them all. Chips without
            mask and label are kept as unlabelled images.
        info: Facts of the data set; a mapping takes the names of `DatasetInfo`.
        overwrite: Replace the data set in `folder`.

    Returns:
        The folder.

    Raises:
        FileExistsError: The folder holds a data set and `overwrite` is False.
        ValueError: A chip does not fit the facts, or there are none; names the chip.
        OSError: A file could not be written (a full disk); names the file.
    """
    facts = info if isinstance(info, DatasetInfo) else DatasetInfo.from_dict(info)
    folder = Path(folder)
    if (folder / FACTS).exists() and not overwrite:
        raise FileExistsError(
            f"{folder} already holds a data set. Pass overwrite=True to replace it, or "
            "choose another folder."
        )
    new = not folder.is_dir() or not any(folder.iterdir())
    with whole_folder(folder, replace=False) if new else _added_to(folder) as part:
        writer = ChipWriter(folder, part, facts)
        rows = [writer.add(chip) for chip in chips]
        if not rows:
            raise ValueError(f"no chips to write into {folder}; pass at least one.")
        index = make_index(rows, writer.outlines, facts)
        with writer.new_file(INDEX) as path:
            index.to_parquet(path, index=False)
        with writer.new_file(FACTS) as path:
            path.write_text(facts.to_json(hash_of(part / INDEX)), encoding="utf-8")
    return folder


@contextmanager
def _added_to(folder: Path) -> Iterator[Path]:
    """A folder to fill, whose files join those of `folder` when all went well."""
    with tempfile.TemporaryDirectory(prefix=".chips.", dir=folder) as name:
        part = Path(name)
        yield part
        (folder / FACTS).unlink(missing_ok=True)  # in between it counts as unfinished
        new = [path.relative_to(part) for path in part.rglob("*") if path.is_file()]
        for file in sorted(new, key=lambda file: file.name == FACTS):  # the facts last
            (folder / file).parent.mkdir(exist_ok=True)
            os.replace(part / file, folder / file)


def index_chips(
    folder: str | os.PathLike[str], chips: Iterable[Chip], info: DatasetInfo
) -> InPlace:
    """Files that stay where they are, in `folder` or below it; nothing is written.

    Raises:
        ValueError: A chip does not fit the facts, or there are none.
    """
    folder = Path(folder)
    writer = ChipWriter(folder, folder, info)
    rows = [writer.add(chip) for chip in chips]
    if not rows:
        raise ValueError(f"no chips found in {folder}.")
    index = make_index(rows, writer.outlines, info)
    check_index(folder, index, info)
    return InPlace(folder, info, index)


def read_chip_folder(
    folder: str | os.PathLike[str],
) -> tuple[DatasetInfo, gpd.GeoDataFrame]:
    """Read a chip folder's facts and index, and check them against the files.

    Pixels are not read here; `ChipData` checks each image when it is first used.

    Args:
        folder: As `write_chip_folder` made it.

    Returns:
        The facts, and the index with one row a chip.

    Raises:
        FileNotFoundError: The folder, its index or a file of a chip is missing.
        ValueError: The index was altered after it was written, or holds rows that
            cannot be right.
    """
    import geopandas as gpd

    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}. Check the path.")
    for name in (FACTS, INDEX):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} has no {name}, so it is not a finished chip folder. Run the "
                "script that writes it again, or use write_chip_folder."
            )
    info, digest = DatasetInfo.read(folder / FACTS)
    found = hash_of(folder / INDEX)
    if found != digest:
        raise ValueError(
            f"{folder / INDEX} was altered after it was written: its sha256 is "
            f"{found[:12]}..., {FACTS} says {digest[:12]}.... Write the chip folder "
            "again; to change a split, use write_chip_folder(..., overwrite=True)."
        )
    try:
        index = gpd.read_parquet(folder / INDEX)
    except Exception as error:  # pyarrow's, shapely's and pyproj's have no common root
        raise ValueError(
            f"{folder / INDEX} is not readable as GeoParquet: {error}."
        ) from error
    check_index(folder, index, info)
    return info, index.reset_index(drop=True)
