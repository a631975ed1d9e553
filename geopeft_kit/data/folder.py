"""A chip folder: one layout on disk for every data set, written whole or not at all.

    dataset/
      chips.parquet    GeoParquet, one row a chip: chip, split, region, geometry, ...
      dataset.json     name, task, bands, scale, classes, ..., sha256 of chips.parquet
      images/ masks/   GeoTIFF, or the original files where they have no georeference

`write_chip_folder` writes it, `read_chip_folder` reads and checks it. `dataset.json`
comes last: where it stands, everything else is there. Taught in
`notebooks/14_your_own_data.ipynb`.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import rasterio
from affine import Affine
from rasterio.crs import CRS
from rasterio.dtypes import in_dtype_range
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.io import MemoryFile
from rasterio.transform import array_bounds, from_bounds
from rasterio.warp import transform_geom

from geopeft_kit.data.info import DatasetInfo

if TYPE_CHECKING:
    import geopandas as gpd

INDEX, FACTS = "chips.parquet", "dataset.json"
COLUMNS = ("chip", "split", "region", "geometry", "date", "image", "width", "height")
FILE_COLUMNS = ("image", "image_after", "mask")
_FOLDERS = {"image": "images", "image_after": "images_after", "mask": "masks"}
# GDAL lists the whole folder at each open to find side files; with thousands of chips
# that costs more than reading. A chip's file stands alone.
ALONE = {"GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR"}
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


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


def write_chip_folder(
    folder: str | os.PathLike[str],
    chips: Iterable[Chip],
    info: DatasetInfo | Mapping[str, Any],
    overwrite: bool = False,
) -> Path:
    """Write chips as a chip folder.

    The index comes after all images and `dataset.json` comes last, each through a
    temporary file. Where anything fails, the files of this call are removed again.

    Args:
        folder: Made where it does not exist.
        chips: Read one at a time, so a generator never holds them all. Chips without
            mask and label are kept as unlabelled images.
        info: Facts of the data set; a mapping takes the names of `DatasetInfo`.
        overwrite: Replace a data set that stands in `folder`.

    Returns:
        The folder.

    Raises:
        FileExistsError: The folder holds a data set and `overwrite` is False.
        ValueError: A chip does not fit the facts, or there are none; names the chip.
        OSError: A file could not be written (a full disk); names the file.
    """
    facts = info if isinstance(info, DatasetInfo) else DatasetInfo.from_dict(info)
    folder = Path(folder)
    if (folder / FACTS).exists():
        if not overwrite:
            raise FileExistsError(
                f"{folder} already holds a data set. Pass overwrite=True to replace "
                "it, or choose another folder."
            )
        (folder / FACTS).unlink()  # from here on the old one counts as unfinished
    writer = _Writer(folder, facts)
    try:
        rows = [writer.add(chip) for chip in chips]
        if not rows:
            raise ValueError(f"no chips to write into {folder}; pass at least one.")
        index = _make_index(rows, writer.outlines, facts)
        with writer.new_file(folder / INDEX) as part:
            index.to_parquet(part, index=False)
        text = facts.to_json(_sha256(folder / INDEX))
        with writer.new_file(folder / FACTS) as part:
            part.write_text(text, encoding="utf-8")
    except BaseException:
        writer.undo()
        raise
    return folder


def index_chips(
    folder: str | os.PathLike[str],
    chips: Iterable[Chip],
    info: DatasetInfo,
) -> gpd.GeoDataFrame:
    """The index of files that stay where they are; nothing is written.

    Args:
        folder: Holds all files, in whatever sub-folders.
        chips: With paths of rasters in `folder`, no arrays.
        info: Facts of the data set.

    Returns:
        What `read_chip_folder` would return for them.

    Raises:
        ValueError: A chip does not fit the facts, or there are none.
    """
    writer = _Writer(Path(folder), info)
    rows = [writer.add(chip) for chip in chips]
    if not rows:
        raise ValueError(f"no chips found in {folder}.")
    index = _make_index(rows, writer.outlines, info)
    _check_index(Path(folder), index, info)
    return index


@dataclass
class _Outline:
    """Size and place of a raster."""

    height: int
    width: int
    crs: CRS | None
    transform: Affine | None


class _Writer:
    """Writes the files of one chip after another, and can take them back."""

    def __init__(self, folder: Path, info: DatasetInfo) -> None:
        self.folder, self.info = folder, info
        self.written: list[Path] = []
        self.made = [p for p in (folder, *folder.parents) if not p.exists()]
        self.outlines: list[_Outline] = []
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
            _same_size(chip.name, "image_after", after, outline)
        if chip.mask is not None:
            mask = self._put(chip, "mask", chip.mask, row, outline)
            _same_size(chip.name, "mask", mask, outline)
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
        outline: _Outline | None = None,
    ) -> _Outline:
        """Write or copy one raster, note its place in `row`."""
        if isinstance(source, str | os.PathLike):
            return self._copy(chip, column, Path(source), row)
        array = np.asarray(source)
        if column == "mask":
            array = _checked_mask(chip.name, array, self.info)
        else:
            _check_image(chip.name, array, self.info)
        target = self.folder / _FOLDERS[column] / f"{chip.name}.tif"
        outline = outline or _outline(chip, *array.shape[-2:])
        encoded = _encode(array, outline, self.info, column == "mask")
        with self.new_file(target) as part:
            part.write_bytes(encoded)
        row[column] = target.relative_to(self.folder).as_posix()
        height, width = array.shape[-2:]
        return _Outline(height, width, outline.crs, outline.transform)

    def _copy(
        self, chip: Chip, column: str, source: Path, row: dict[str, Any]
    ) -> _Outline:
        if not source.is_file():
            raise FileNotFoundError(
                f"chip {chip.name!r}: there is no file {source} for its {column}."
            )
        count, outline = _inspect(source)
        if column != "mask" and count != len(self.info.bands):
            raise ValueError(
                f"chip {chip.name!r}: {source} has {count} bands, but the data set "
                f"names {len(self.info.bands)}: {', '.join(self.info.bands)}."
            )
        if source.resolve().is_relative_to(self.folder.resolve()):
            target = source.resolve().relative_to(self.folder.resolve())
        else:
            target = Path(_FOLDERS[column]) / f"{chip.name}{source.suffix}"
            with self.new_file(self.folder / target) as part:
                shutil.copyfile(source, part)
        row[column] = target.as_posix()
        return outline

    @contextmanager
    def new_file(self, target: Path) -> Iterator[Path]:
        """A temporary path beside `target` that takes its place when all went well."""
        part: Path | None = None
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(
                prefix=".", suffix=".part", dir=target.parent
            )
            os.close(handle)
            part = Path(name)
            yield part
            part.chmod(0o666 & ~_umask())
            os.replace(part, target)
            self.written.append(target)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror or error}; nothing of this data set is left half-"
                "written. Free some space or choose another folder, then run again. "
                "The file was",
                str(target),
            ) from error
        finally:
            if part is not None:
                part.unlink(missing_ok=True)

    def undo(self) -> None:
        """Remove what this call has written, and the folders that it made."""
        for path in reversed(self.written):
            path.unlink(missing_ok=True)
        folders = [self.folder / name for name in _FOLDERS.values()]
        for path in (*folders, *self.made):
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def _umask() -> int:
    """The process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _outline(chip: Chip, height: int, width: int) -> _Outline:
    """Where an array lies, from its chip's transform or bounds."""
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
    return _Outline(height, width, crs, transform)


def _inspect(path: Path) -> tuple[int, _Outline]:
    """Band count and outline of a raster file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with rasterio.Env(**ALONE), rasterio.open(path) as raster:
                transform = raster.transform if raster.crs else None
                size = raster.height, raster.width
                return raster.count, _Outline(*size, raster.crs, transform)
    except RasterioError as error:
        raise ValueError(
            f"{path} cannot be read as a raster: {error}. Copy or download it again."
        ) from error


def _same_size(name: str, what: str, found: _Outline, image: _Outline) -> None:
    if (found.height, found.width) != (image.height, image.width):
        raise ValueError(
            f"chip {name!r}: {what} is {found.height} x {found.width} pixels, its "
            f"image {image.height} x {image.width}. Cut or warp both to the same grid."
        )


def _check_image(name: str, array: np.ndarray, info: DatasetInfo) -> None:
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


def _checked_mask(name: str, array: np.ndarray, info: DatasetInfo) -> np.ndarray:
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


def mask_value_message(name: str, wrong: Sequence[float], info: DatasetInfo) -> str:
    """What is said about mask values outside the classes.

    Args:
        name: Of the chip.
        wrong: The values that are not allowed.
        info: Facts of the data set.

    Returns:
        One sentence with the allowed values, one with the next step.
    """
    return (
        f"chip {name!r}: mask value {', '.join(f'{v:g}' for v in wrong[:5])} is "
        f"outside the classes; allowed are 0-{len(info.classes) - 1} "
        f"({', '.join(info.classes)}) and {info.ignore_index} (no label). Correct the "
        "mask, or add the class to the data set."
    )


def _encode(
    array: np.ndarray, outline: _Outline, info: DatasetInfo, is_mask: bool
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


def _make_index(
    rows: list[dict[str, Any]], outlines: list[_Outline], info: DatasetInfo
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


def footprints(outlines: Sequence[_Outline]) -> list[Any]:
    """Footprints of rasters as polygons in longitude and latitude.

    Args:
        outlines: Size and place of each raster.

    Returns:
        One polygon each; None where a raster has no georeference. A raster across the
        180th meridian gives two polygons in one.
    """
    from shapely.geometry import box, mapping, shape

    found: list[Any] = [None] * len(outlines)
    groups: dict[str, list[int]] = {}
    for number, outline in enumerate(outlines):
        if outline.crs is not None and outline.transform is not None:
            groups.setdefault(outline.crs.to_wkt(), []).append(number)
    for wkt, members in groups.items():
        boxes = []
        for number in members:
            o = outlines[number]
            boxes.append(mapping(box(*array_bounds(o.height, o.width, o.transform))))
        for number, geometry in zip(
            members, transform_geom(wkt, "EPSG:4326", boxes), strict=True
        ):
            found[number] = shape(geometry)
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
                f"{folder} has no {name}, so it is no finished chip folder. Run the "
                "script that writes it again, or use write_chip_folder."
            )
    info, digest = DatasetInfo.read(folder / FACTS)
    found = _sha256(folder / INDEX)
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
    _check_index(folder, index, info)
    return info, index.reset_index(drop=True)


def _check_index(folder: Path, index: gpd.GeoDataFrame, info: DatasetInfo) -> None:
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
