"""A large scene as a VRT over a few tiles, predicted in a process of its own.

    python tests/large_scene.py FOLDER WIDTH HEIGHT MODEL

prints the size, the seconds and the extra memory at the peak in MiB. MODEL is the name
of a backbone, or "cheap" for one matrix product per pixel. Run again after it was
stopped, it goes on.
"""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

import numpy as np
import rasterio
import torch
from rasterio.transform import from_origin

import geopeft_kit as gk
from geopeft_kit.bands import resolve_bands
from geopeft_kit.world import simulate_scene

TILE = 1024
REGIONS = ("temperate", "delta", "arid", "savanna")


def write_tiles(folder: Path) -> list[Path]:
    """Four tiles of simulated ground, six bands, uint16."""
    paths = []
    for number, region in enumerate(REGIONS):
        path = folder / f"{region}.tif"
        paths.append(path)
        if path.exists():
            continue
        scene = simulate_scene(region, seed=number, size=256, event="none")
        image = np.round(np.clip(scene.image, 0, 1) * 10_000).astype(np.uint16)
        half = np.concatenate([image, image[:, :, ::-1]], axis=2)
        half = np.concatenate([half, half[:, ::-1]], axis=1)
        with rasterio.open(
            path, "w", driver="GTiff", width=TILE, height=TILE, count=6, nodata=0,
            dtype="uint16", tiled=True, blockxsize=256, blockysize=256,
        ) as raster:  # fmt: skip
            raster.write(np.tile(half, (1, 2, 2)))
    return paths


def write_vrt(folder: Path, width: int, height: int) -> Path:
    """A VRT that lays the four tiles side by side until it is full."""
    tiles = write_tiles(folder)
    transform = from_origin(300_000, 4_900_000, 10, 10).to_gdal()
    bands = []
    for number, name in enumerate(resolve_bands("hls"), start=1):
        sources = "".join(
            f"<SimpleSource><SourceFilename relativeToVRT='1'>"
            f"{tiles[(row + column) % len(tiles)].name}</SourceFilename>"
            f"<SourceBand>{number}</SourceBand>"
            f"<SrcRect xOff='0' yOff='0' xSize='{TILE}' ySize='{TILE}'/>"
            f"<DstRect xOff='{column * TILE}' yOff='{row * TILE}' xSize='{TILE}' "
            f"ySize='{TILE}'/></SimpleSource>"
            for row in range(-(-height // TILE))
            for column in range(-(-width // TILE))
        )
        bands.append(
            f"<VRTRasterBand dataType='UInt16' band='{number}'>"
            f"<Description>{name}</Description><NoDataValue>0</NoDataValue>"
            f"<Scale>0.0001</Scale>{sources}</VRTRasterBand>"
        )
    path = folder / "scene.vrt"
    text = (
        f"<VRTDataset rasterXSize='{width}' rasterYSize='{height}'><SRS>EPSG:32631"
        f"</SRS><GeoTransform>{', '.join(map(str, transform))}</GeoTransform>"
        f"{''.join(bands)}</VRTDataset>"
    )
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return path


class Cheap(torch.nn.Module):
    """Two classes from one matrix product per pixel."""

    task = "segmentation"

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Conv2d(6, 2, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.layer(image)


def peak() -> float:
    """Highest resident memory of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(folder: Path, width: int, height: int, name: str) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    scene = write_vrt(folder, width, height)
    model, window = Cheap(), 512
    if name != "cheap":
        model, window = gk.build_model(gk.load_backbone(name), decoder="linear"), 128
    options = {"window": window, "overlap": 0.125, "progress": name != "cheap"}
    small = write_vrt_small(folder)
    gk.predict_scene(model, small, folder / "warm.tif", **options)  # libraries, caches
    before, start = peak(), time.monotonic()
    gk.predict_scene(model, scene, folder / "out.tif", resume=True, **options)
    seconds = time.monotonic() - start
    print(f"{width}x{height} {name}: {seconds:.0f} s, {peak() - before:.0f} MiB extra")


def write_vrt_small(folder: Path) -> Path:
    """One tile's worth of the same, to warm up with."""
    small = folder / "small"
    small.mkdir(exist_ok=True)
    return write_vrt(small, TILE // 2, TILE // 2)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:4]), sys.argv[4])
