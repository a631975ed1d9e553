"""MajorTOM Core-S2L2A -> unlabelled chips for pretraining: a place, and so many bytes.

    python data_scripts/majortom.py --root data --bbox 5 45 7 46 --max-mb 500

The whole is 23 TB; a parquet file of 4 GB holds some 500 cells, one a row group, and a
row group is fetched alone by asking the server for its bytes. Cells inside the box come
in a seeded order, so that a smaller `--max-mb` is the start of a larger one. Each cell
(1068 x 1068 pixels at 10 m, 12 bands) is cut into chips.
"""

from __future__ import annotations

import argparse
import io
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import rasterio
from archives import File
from command import main
from common import Source, make
from pixels import chip_name, cut
from rasterio.enums import Resampling
from rasterio.errors import RasterioError
from rasterio.io import MemoryFile

from geopeft_kit.data import Chip
from geopeft_kit.download import ATTEMPTS, TIMEOUT_S, hub_url

SOURCE = Source(
    name="majortom",
    title="MajorTOM Core-S2L2A: Sentinel-2 L2A over the whole Earth, 12 bands",
    paper="Francis and Czerkawski 2024, arXiv 2402.12095",
    home="https://huggingface.co/datasets/Major-TOM/Core-S2L2A",
    licence="CC-BY-SA-4.0 (data set card); contains Copernicus Sentinel data",
    download_mb=None,
    disk_mb=500,
    steps="Or put metadata.parquet and the images/part_*.parquet that you have into "
    "DIR; then --from DIR.",
    small="as --max-mb 100",
    layout="the Major-TOM helper functions (metadata columns, one row a row group)",
)
BANDS = (
    "B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12",
)  # fmt: skip
COLUMNS = ["grid_cell", "centre_lat", "centre_lon", "cloud_cover", "timestamp",
           "product_id", "parquet_url", "parquet_row"]  # fmt: skip
INFO = {
    "name": "MajorTOM Core-S2L2A (a part)",
    "task": "regression",  # there are no labels, and this task needs no classes
    "bands": "sentinel2_l2a",
    "scale": 1e-4,
    "notes": "Unlabelled, for pretraining. Bands of 20 and 60 m were resampled "
    "(bilinear) to 10 m. Values are as MajorTOM stores them: the "
    "offset of 1000 that products carry since baseline 04.00 is not taken off.",
}


def files(folder: Path, subset: str, **_: object) -> Iterator[File]:
    """The metadata; images are fetched row by row while they are converted."""
    url = hub_url("datasets/Major-TOM/Core-S2L2A", "metadata.parquet")
    yield File(url, "metadata.parquet")


class Remote(io.RawIOBase):
    """A file on a server, of which only the bytes asked for are fetched."""

    def __init__(self, url: str) -> None:
        self.url, self.at = url, 0
        with self._ask("bytes=0-0") as answer:
            self.size = int(answer.headers["Content-Range"].rpartition("/")[2])

    def _ask(self, wanted: str) -> io.BufferedIOBase:
        headers = {"Range": wanted, "User-Agent": "geopeft_kit"}
        request = urllib.request.Request(self.url, headers=headers)
        for attempt in range(ATTEMPTS):
            try:
                answer = urllib.request.urlopen(request, timeout=TIMEOUT_S)
                if answer.status == 206:
                    return answer
                raise RuntimeError(
                    f"{self.url} does not answer with parts of a file (status "
                    f"{answer.status}); download it whole and use --from."
                )
            except OSError as error:
                if attempt + 1 == ATTEMPTS:
                    raise RuntimeError(
                        f"{self.url} could not be read in {ATTEMPTS} tries ({error}). "
                        "Run again later."
                    ) from error
                time.sleep(2**attempt)
        raise AssertionError("unreachable")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {0: 0, 1: self.at, 2: self.size}[whence]
        return self.at

    def read(self, size: int = -1) -> bytes:
        end = self.size if size < 0 else min(self.at + size, self.size)
        if end <= self.at:
            return b""
        with self._ask(f"bytes={self.at}-{end - 1}") as answer:
            content = answer.read()
        self.at += len(content)
        return content


def choose(folder: Path, bbox: Sequence[float], max_cloud: float) -> pd.DataFrame:
    """The cells inside the box, the clearest date of each, in a seeded order."""
    west, south, east, north = bbox
    table = pq.read_table(folder / "metadata.parquet", columns=COLUMNS).to_pandas()
    inside = table["centre_lon"].between(west, east)
    inside &= table["centre_lat"].between(south, north)
    found = table[inside & (table["cloud_cover"] <= max_cloud)]
    found = found.sort_values(["cloud_cover", "product_id"]).drop_duplicates(
        "grid_cell"
    )
    if found.empty:
        raise ValueError(
            f"no cell lies inside {west} {south} {east} {north} with at most "
            f"{max_cloud} % of cloud. Choose a larger --bbox or --max-cloud."
        )
    found = found.sort_values("grid_cell")
    return found.iloc[np.random.default_rng(0).permutation(len(found))]


def read_cell(content: dict[str, bytes], name: str) -> Chip:
    """The bands of a cell, each a GeoTIFF of its own, on the 10 m grid."""
    try:
        with MemoryFile(content["B02"]) as memory, memory.open() as raster:
            shape, crs, transform = raster.shape, raster.crs, raster.transform
        bands = []
        for band in BANDS:
            with MemoryFile(content[band]) as memory, memory.open() as raster:
                bands.append(
                    raster.read(1, out_shape=shape, resampling=Resampling.bilinear)
                )
    except RasterioError as error:
        raise RuntimeError(f"a band of cell {name} cannot be read: {error}.") from error
    return Chip(name, np.stack(bands), crs=crs, transform=transform)


def read_chips(
    folder: Path,
    subset: str,
    bbox: Sequence[float],
    max_mb: float,
    max_cloud: float,
    chip: int,
) -> Iterator[Chip]:
    """The chips of one cell after another, until the bytes are used up."""
    left = min(max_mb, 100 if subset == "small" else max_mb) * 1e6
    for row in choose(folder, bbox, max_cloud).itertuples():
        local = folder / "images" / Path(urlsplit(row.parquet_url).path).name
        source = pa.OSFile(str(local)) if local.is_file() else Remote(row.parquet_url)
        with pq.ParquetFile(source) as file:
            group = file.read_row_group(row.parquet_row, columns=list(BANDS))
        content = {band: group[band][0].as_py() for band in BANDS}
        left -= sum(map(len, content.values()))
        if left < 0:
            return
        cell = read_cell(content, chip_name(row.grid_cell))
        cell.region, cell.split = chip_name(row.grid_cell), "train"
        cell.date = pd.Timestamp(row.timestamp).date()
        yield from cut(cell, chip)


def convert(
    source: Path | str | None,
    root: Path | str = "data",
    subset: str = "full",
    overwrite: bool = False,
    bbox: Sequence[float] = (5.0, 45.0, 7.0, 46.0),
    max_mb: float = 500,
    max_cloud: float = 10,
    chip: int = 224,
) -> Path:
    """Make the chip folder.

    Args:
        source: Folder with `metadata.parquet`, and the parquet files of `images` as
            far as they are there; the others are asked for row by row. None downloads.
        root: Where the chip folder is made.
        subset: "full" or "small".
        overwrite: Make it again where it stands.
        bbox: West, south, east, north in degrees.
        max_mb: Most megabytes of images to fetch.
        max_cloud: Most cloud cover in percent.
        chip: Side of a chip in pixels.

    Returns:
        The chip folder.
    """
    west, south, east, north = bbox
    if not (-180 <= west < east <= 180 and -90 <= south < north <= 90):
        raise ValueError(
            f"bbox is {tuple(bbox)}; give west south east north in degrees, west below "
            "east and south below north."
        )
    with rasterio.Env(GDAL_PAM_ENABLED="NO"):
        return make(
            SOURCE, source, root, INFO, read_chips, files, ["metadata.parquet"], subset,
            overwrite, bbox=list(bbox), max_mb=max_mb, max_cloud=max_cloud, chip=chip,
        )  # fmt: skip


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--bbox",
        nargs=4,
        type=float,
        default=[5.0, 45.0, 7.0, 46.0],
        metavar=("W", "S", "E", "N"),
        help="the place, in degrees (default: 5 45 7 46)",
    )
    parser.add_argument(
        "--max-mb", type=float, default=500, help="most megabytes (default: 500)"
    )
    parser.add_argument(
        "--max-cloud", type=float, default=10, help="most cloud in %% (default: 10)"
    )
    parser.add_argument(
        "--chip", type=int, default=224, help="side of a chip (default: 224)"
    )


if __name__ == "__main__":
    main(SOURCE, convert, _options)
