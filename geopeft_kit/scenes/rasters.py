"""Rasters by the window: reflectance in, GeoTIFF out, neither ever whole in memory.

`SceneReader` turns stored numbers of named bands into reflectance and marks missing
data. `RowWriter` writes a GeoTIFF from top to bottom, whole or not at all.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio.errors import RasterioError, RasterioIOError
from rasterio.windows import Window

from geopeft_kit.bands import resolve_bands
from geopeft_kit.files import remove_side_files
from geopeft_kit.open_raster import open_raster, tags_of
from geopeft_kit.pictures import Colours, class_colours, rgb_of

BLOCK = 256  # rows and columns of one block of the tiled GeoTIFF that is written


class SceneReader:
    """Windows of a raster as reflectance, and which of their pixels hold data.

    Args:
        source: Anything that rasterio opens.
        wanted: Bands that the model wants, in its order; None takes all as they are.
        bands: Names of the source's bands in its order; None reads its descriptions.
        scale: Reflectance per stored unit, one number or one a band of the source;
            None reads the raster's own.
        offset: Added after scaling, used together with `scale`.
        nodata: A stored value without data, beside what the source says itself.
        window: Side of the windows that will be read, row after row.

    Attributes:
        names: Of the bands that are read, in their order; None where one has none.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        wanted: Sequence[str] | None,
        bands: str | Sequence[str] | None = None,
        scale: float | Sequence[float] | None = None,
        offset: float | Sequence[float] = 0.0,
        nodata: float | None = None,
        window: int = 0,
    ) -> None:
        bands = resolve_bands(bands) if isinstance(bands, str) else bands
        self.nodata = nodata
        with ExitStack() as stack:
            self.raster = stack.enter_context(open_raster(source))
            tags_of(self.raster)  # refuses complex numbers
            # GDAL's own block cache would otherwise grow to a share of all memory.
            cache = rasterio.Env(GDAL_CACHEMAX=_cache_for(self.raster, window))
            stack.enter_context(cache)
            self.indexes = _band_indexes(self.raster, wanted, bands)
            self.names = list(wanted or bands or self.raster.descriptions)
            self.gain, self.offset = _scaling(self.raster, self.indexes, scale, offset)
            self._opened = stack.pop_all()
        self.scale_is_given = scale is not None
        self.height, self.width = self.raster.height, self.raster.width

    def read(self, row: int, col: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """A window of (C, size, size) float32 reflectance, and bool where it has data.

        Pixels outside the scene are mirrored; pixels without data are 0.
        """
        high, wide = min(size, self.height - row), min(size, self.width - col)
        box = Window(col, row, wide, high)
        try:
            stored = self.raster.read(self.indexes, window=box, out_dtype="float32")
            valid = self.raster.read_masks(self.indexes, window=box).all(axis=0)
        except RasterioIOError as error:
            raise RuntimeError(
                f"{self.raster.name} cannot be read at row {row}, column {col}: "
                f"{error}. The file may be truncated: copy or download it again."
            ) from error
        valid &= np.isfinite(stored).all(axis=0)
        if self.nodata is not None:
            valid &= (stored != np.float32(self.nodata)).all(axis=0)
        image = stored * self.gain + self.offset
        image[:, ~valid] = 0.0
        if not self.scale_is_given and image.max(initial=0) > 20:
            raise ValueError(
                f"{self.raster.name} holds values up to {image.max():g}: not "
                "reflectance. Pass scale=0.0001 if 10000 means 1.0, or scale=1 if "
                "the model was trained on the numbers as they are."
            )
        missing = ((0, size - high), (0, size - wide))
        return (
            np.pad(image, ((0, 0), *missing), mode="symmetric"),
            np.pad(valid, missing, constant_values=False),
        )

    def __enter__(self) -> SceneReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()


def _cache_for(raster: rasterio.DatasetReader, window: int) -> int:
    """Bytes that hold a row of windows of a file in strips, else 128 MB.

    Each strip would otherwise be decoded once for every window that it crosses.
    """
    height, width = raster.block_shapes[0]
    least = 128 * 1024**2
    if width < raster.width:
        return least
    pixel = sum(np.dtype(dtype).itemsize for dtype in raster.dtypes)
    rows = min(window + 2 * height, raster.height)
    return min(max(least, 5 * rows * width * pixel // 4), 2**31 - 1)


def _band_indexes(
    raster: rasterio.DatasetReader,
    wanted: Sequence[str] | None,
    bands: Sequence[str] | None,
) -> list[int]:
    """Numbers (from 1) of the raster's bands that the model wants, in its order."""
    if bands is not None and len(bands) != raster.count:
        raise ValueError(
            f"bands names {len(bands)} bands, but {raster.name} has {raster.count}. "
            "Name every band of the file, in its order."
        )
    if wanted is None:
        return list(raster.indexes)
    named = list(bands) if bands is not None else list(raster.descriptions)
    if not any(named):
        raise ValueError(
            f"The {raster.count} bands of {raster.name} have no descriptions, so which "
            "is which is not known. Pass bands=[...], their names in the file's order, "
            'for instance bands=["BLUE", "GREEN", "RED", ...].'
        )
    numbers = {_canonical(name): i for i, name in enumerate(named, start=1) if name}
    absent = [name for name in wanted if name not in numbers]
    if absent:
        raise ValueError(
            f"The model wants {', '.join(absent)}, which {raster.name} does not have. "
            f"It has {', '.join(numbers)}; the model wants {', '.join(wanted)}. Pass "
            "bands=[...] if they are named otherwise, or load the backbone with the "
            "bands that you have."
        )
    return [numbers[name] for name in wanted]


def _canonical(name: str) -> str:
    """The kit's name of a band; a name it does not know (a cloud mask) stays."""
    try:
        return resolve_bands([name])[0]
    except ValueError:
        return name


def _scaling(
    raster: rasterio.DatasetReader,
    indexes: Sequence[int],
    scale: float | Sequence[float] | None,
    offset: float | Sequence[float],
) -> tuple[np.ndarray, np.ndarray]:
    """Gain and offset per band, (C, 1, 1) each, stated and never guessed."""
    shape = (len(indexes), 1, 1)
    if scale is not None:
        wrong = {np.size(scale), np.size(offset)} - {1, raster.count}
        if wrong:
            raise ValueError(
                f"scale or offset has {wrong.pop()} numbers for the {raster.count} "
                f"bands of {raster.name}. Give one number for all, or one a band."
            )
        full = np.broadcast_arrays(scale, offset, np.zeros(raster.count))[:2]
        chosen = [each[np.array(indexes) - 1].reshape(shape) for each in full]
        return chosen[0].astype("f4"), chosen[1].astype("f4")
    if np.any(offset):
        raise ValueError(f"offset={offset} needs scale too: value * scale + offset.")
    first, *_ = indexes = [index - 1 for index in indexes]
    gains = np.array(raster.scales, np.float32)[indexes].reshape(shape)
    offsets = np.array(raster.offsets, np.float32)[indexes].reshape(shape)
    dtype = raster.dtypes[first]
    if np.issubdtype(dtype, np.integer) and (gains == 1).all():
        raise ValueError(
            f"{raster.name} holds {dtype} and does not state how they become "
            "reflectance. Pass scale=0.0001 if 10000 means 1.0 (Sentinel-2, "
            "HLS), scale=1/255 for 8-bit pictures, scale=1 if the model was trained "
            "on the numbers as they are."
        )
    return gains, offsets


class RowWriter:
    """A tiled GeoTIFF written from top to bottom; it appears whole or not at all.

    Rows are collected until they fill a row of blocks, so that no compressed block is
    ever written twice.

    Args:
        target: The file to write.
        profile: Width, height, count, dtype, nodata, transform, crs as rasterio's.
        names: Band descriptions.
        classes: Class names of a class map, kept as a tag.
        colours: One "#rrggbb" per class, kept as the colour table.
        folder: Of the unfinished file; by default that of the target.
    """

    def __init__(
        self,
        target: Path,
        profile: dict,
        names: Sequence[str] = (),
        classes: Sequence[str] | None = None,
        colours: Sequence[str] | None = None,
        folder: Path | None = None,
    ) -> None:
        self.target, self.profile = target, profile
        self.waiting: list[np.ndarray] = []
        self.row = 0
        handle, part = tempfile.mkstemp(
            prefix=f".{target.stem}.", suffix=".part.tif", dir=folder or target.parent
        )
        os.close(handle)
        self.part = Path(part)
        layout = {"tiled": True, "blockxsize": BLOCK, "blockysize": BLOCK}
        packing = {"driver": "GTiff", "compress": "deflate", "bigtiff": "if_safer"}
        try:
            self.raster = rasterio.open(self.part, "w", **layout, **packing, **profile)
        except BaseException:
            self.part.unlink(missing_ok=True)
            raise
        for number, name in enumerate(names, start=1):
            self.raster.set_band_description(number, name)
        write_classes(self.raster, classes, colours)

    def write(self, rows: np.ndarray) -> None:
        """Add the next rows, (count, n, width)."""
        self.waiting.append(rows)
        rows_waiting = sum(part.shape[1] for part in self.waiting)
        if rows_waiting >= BLOCK:
            self._flush(rows_waiting // BLOCK * BLOCK)

    def _flush(self, rows: int) -> None:
        waiting = np.concatenate(self.waiting, axis=1)
        box = Window(0, self.row, self.profile["width"], rows)
        with self._naming_the_disk():
            self.raster.write(waiting[:, :rows], window=box)
        self.row += rows
        self.waiting = [waiting[:, rows:]]

    def check(self) -> None:
        """Write the last rows, close the file, and read it back once.

        A full disk may show only when GDAL empties its cache, and a block that never
        arrived reads as nodata.
        """
        left = sum(part.shape[1] for part in self.waiting)
        if left:
            self._flush(left)
        with self._naming_the_disk():
            self.raster.close()
            check_whole(self.part)

    def publish(self) -> None:
        """Put the checked file in its place."""
        os.chmod(self.part, 0o644)  # a temporary file starts out private
        os.replace(self.part, self.target)
        remove_side_files(self.target)

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave nothing unfinished behind; a published file stays."""
        try:
            self.raster.close()
        except RasterioError:
            pass  # the file is thrown away; the first error is the one to show
        self.part.unlink(missing_ok=True)

    @contextmanager
    def _naming_the_disk(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RasterioError) as error:
            raise RuntimeError(
                f"{self.target} could not be written whole, and nothing is left of it: "
                f"{error}. Is the disk full? Free some space or choose another folder, "
                "then run again."
            ) from error


def check_whole(path: Path) -> None:
    """Read a GeoTIFF once; raise RasterioIOError if a block never arrived."""
    with rasterio.open(path) as written:
        for block, box in written.block_windows(1):
            if written.block_size(1, *block) <= 0:
                raise RasterioIOError(f"block {block} is missing")
            written.read(window=box)


# --- class names and colours of a class map -------------------------------------------


def write_classes(
    raster: Any, classes: Sequence[str] | None, colours: Sequence[str] | None
) -> None:
    """Keep class names and "#rrggbb" colours in an open GeoTIFF; None leaves them out.

    Names become the tag `classes`, colours the colour table.
    """
    if classes is not None:
        raster.update_tags(classes=json.dumps(list(classes)))
    if colours is not None:
        table = enumerate(rgb_of(colours).tolist())
        raster.write_colormap(1, {number: (*rgb, 255) for number, rgb in table})


def read_classes(path: str | os.PathLike[str]) -> tuple[Any, Colours | None]:
    """Class names and colours that a class map carries, None where it has none."""
    with open_raster(path) as raster:
        text = raster.tags().get("classes", "null")
        # Without a colour table the interpretation is "gray".
        table = raster.colorinterp[0].name == "palette"
        colours = raster.colormap(1) if table else None
    try:
        return json.loads(text), colours
    except (json.JSONDecodeError, RecursionError):
        return text, colours  # refused where it is used


def class_look(
    path: str | os.PathLike[str] | None,
    classes: Sequence[str] | None,
    colours: Colours | None,
    title: str,
) -> tuple[list[str], list[str]]:
    """Names and "#rrggbb" of each class: those given, else the file's.

    Without either, colours are the kit's own. `title` is for the error.
    """
    if path is not None and (classes is None or colours is None):
        stored = read_classes(path)
        classes = stored[0] if classes is None else classes
        colours = stored[1] if colours is None else colours
    if isinstance(classes, str) or not isinstance(classes, Sequence | None):
        raise ValueError(
            f"{path} has a tag classes that is not a list of names: "
            f"{str(classes)[:40]!r}. Pass classes=[...]."
        )
    if classes is None:
        raise ValueError(f"{title} needs classes=[...], the names of its classes.")
    names = [str(name) for name in classes]
    return names, class_colours(names, colours)
