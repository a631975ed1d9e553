"""Rasters by the window: reflectance in, GeoTIFF out, neither ever whole in memory.

`SceneReader` turns stored numbers of named bands into reflectance and says where there
is data; `RowWriter` writes a GeoTIFF from top to bottom, whole or not at all. Both are
used by `inference` (notebooks 00 and 14).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import rasterio
from rasterio.errors import RasterioError, RasterioIOError
from rasterio.windows import Window

from .bands import resolve_bands
from .files import remove_side_files
from .open_raster import open_raster, tags_of

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
        self._stack = ExitStack()
        try:
            self.raster = self._stack.enter_context(open_raster(source))
            tags_of(self.raster)  # refuses complex numbers
            # GDAL's own block cache would otherwise grow to a share of all memory.
            cache = rasterio.Env(GDAL_CACHEMAX=_cache_for(self.raster, window))
            self._stack.enter_context(cache)
            self.indexes = _band_indexes(self.raster, wanted, bands)
            self.names = list(wanted or bands or self.raster.descriptions)
            self.gain, self.offset = _scaling(self.raster, self.indexes, scale, offset)
            self.stated = scale is not None
        except BaseException:
            self.close()
            raise
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
        if not self.stated and image.max(initial=0) > 20:
            raise ValueError(
                f"{self.raster.name} holds values up to {image.max():g}: no "
                "reflectance. Pass scale=0.0001 if 10000 stands for 1.0, or scale=1 if "
                "the model was trained on the numbers as they are."
            )
        missing = ((0, size - high), (0, size - wide))
        return (
            np.pad(image, ((0, 0), *missing), mode="symmetric"),
            np.pad(valid, missing, constant_values=False),
        )

    def close(self) -> None:
        """Close the raster."""
        self._stack.close()

    def __enter__(self) -> SceneReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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
    gains = np.array([raster.scales[i - 1] for i in indexes], np.float32).reshape(shape)
    offsets = np.array([raster.offsets[i - 1] for i in indexes], np.float32).reshape(
        shape
    )
    dtype = raster.dtypes[indexes[0] - 1]
    if np.issubdtype(dtype, np.integer) and (gains == 1).all():
        raise ValueError(
            f"{raster.name} holds {dtype} and does not say how they become "
            "reflectance. Pass scale=0.0001 if 10000 stands for 1.0 (Sentinel-2, "
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
        colours: One "#rrggbb" per class, for a colour table.
        tags: Metadata of the file.
        folder: Where it lies until it is whole; by default beside the target.
    """

    def __init__(
        self,
        target: Path,
        profile: dict,
        names: Sequence[str] = (),
        colours: Sequence[str] | None = None,
        tags: dict[str, str] | None = None,
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
        if colours is not None:
            table = {i: colour_to_rgba(colour) for i, colour in enumerate(colours)}
            self.raster.write_colormap(1, table)
        self.raster.update_tags(**(tags or {}))

    def write(self, rows: np.ndarray) -> None:
        """Add the next rows, (count, n, width)."""
        self.waiting.append(rows)
        held = sum(part.shape[1] for part in self.waiting)
        if held >= BLOCK:
            self._flush(held // BLOCK * BLOCK)

    def _flush(self, rows: int) -> None:
        held = np.concatenate(self.waiting, axis=1)
        box = Window(0, self.row, self.profile["width"], rows)
        with self._naming_the_disk():
            self.raster.write(held[:, :rows], window=box)
        self.row += rows
        self.waiting = [held[:, rows:]]

    def check(self) -> None:
        """Write the last rows, close the file, and read it back once.

        A full disk may show only when GDAL empties its cache, and a block that never
        arrived reads as nodata: what counts is what stands in the file.
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

    def discard(self) -> None:
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
    """Read a GeoTIFF once; raise RasterioIOError where a block never arrived."""
    with rasterio.open(path) as written:
        for block, box in written.block_windows(1):
            if written.block_size(1, *block) <= 0:
                raise RasterioIOError(f"block {block} is missing")
            written.read(window=box)


def colour_to_rgba(colour: str) -> tuple[int, int, int, int]:
    """Turn "#rrggbb" into four numbers from 0 to 255."""
    red, green, blue = bytes.fromhex(colour.removeprefix("#"))
    return red, green, blue, 255
