"""How fast chips are read: the kit against a bare rasterio loop, as ratios.

    python benchmarks/loading.py --chips 200 --epochs 5

Writes chips of random numbers (six bands, 224 x 224, uint16, deflate),
then measures, alternating so that both meet the same machine:

- a bare loop over rasterio, which reads image and mask and does nothing else;
- the kit's loader without its memory: it also checks, scales and batches;
- the kit's loader on packed chips (`data.cache()`), and the memory of some epochs.

The times depend on the machine and on what else it does; the ratios much less.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import rasterio
import torch
from rasterio.transform import from_origin

import geopeft_kit as gk
from geopeft_kit.data import Chip, write_chip_folder

HLS = ("BLUE", "GREEN", "RED", "NIR_NARROW", "SWIR_1", "SWIR_2")


def make_chips(count: int, size: int) -> Iterator[Chip]:
    """Smooth random images, which compress about as well as real ones."""
    rng = np.random.default_rng(0)
    base = np.cumsum(rng.normal(0, 20, (6, size, size)), axis=-1) + 3000
    for number in range(count):
        noise = rng.normal(0, 60, base.shape)
        image = np.clip(base + noise, 1, 10_000).astype(np.uint16)
        mask = (image[0] > np.median(image[0])).astype(np.uint8)
        place = from_origin(3e5 + number * 5e3, 5e6, 10, 10)
        region = f"r{number % 4}"
        yield Chip(
            f"c{number}", image, mask, region=region, crs="EPSG:32632", transform=place
        )


def bare_loop(folder: Path, names: list[str]) -> None:
    """Open and read image and mask of each chip, and no more."""
    for name in names:
        for kind in ("images", "masks"):
            with rasterio.open(folder / kind / f"{name}.tif") as file:
                file.read()


def epoch(loader: torch.utils.data.DataLoader) -> None:
    """Take every batch."""
    for _ in loader:
        pass


def seconds(action: Callable[[], object]) -> tuple[float, float]:
    """Wall time and processor time of one call."""
    wall, processor = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - wall, time.process_time() - processor


def memory_mib() -> float:
    """Memory of this process alone; pages of a mapped file are the system's."""
    gc.collect()
    info = psutil.Process(os.getpid()).memory_info()
    return (info.rss - getattr(info, "shared", 0)) / 1024**2


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--chips", type=int, default=200)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--workers", type=int, default=0)
    given = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    print(f"{given.chips} chips of 6 x {given.size} x {given.size}, uint16")
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "chips"
        info = {"name": "Random", "task": "segmentation", "bands": HLS, "scale": 1e-4}
        info["classes"] = ["low", "high"]
        write_chip_folder(folder, make_chips(given.chips, given.size), info)
        options = {"split": "random", "val_fraction": 0.0, "cache": False}
        workers = {"num_workers": given.workers}
        data = gk.ChipData(folder, **options, **workers)
        names = data.index["chip"].tolist()
        loader = data.dataloader("train")
        bare_loop(folder, names)
        epoch(loader)  # both once, so that the files are in the system's memory
        ratios = []
        for _ in range(given.epochs):
            bare = seconds(lambda: bare_loop(folder, names))
            kit = seconds(lambda: epoch(loader))
            ratios.append([b / k for b, k in zip(bare, kit, strict=True)])
            print(f"bare {bare[0]:.2f} s ({bare[1]:.2f} s of processor time), ", end="")
            print(f"kit {kit[0]:.2f} s ({kit[1]:.2f} s)")
        wall, processor = (statistics.median(r) for r in zip(*ratios, strict=True))
        print(f"kit / bare loop: {wall:.2f} x the throughput in wall time,")
        print(f"{processor:.2f} x for the same processor time (medians)")
        packing = seconds(data.cache)[0]
        packed = data.dataloader("train", shuffle=True)
        epoch(packed)
        before = memory_mib()
        times = [seconds(lambda: epoch(packed)) for _ in range(given.epochs)]
        scale = 1000 / len(names)
        wall, processor = (scale * min(t) for t in zip(*times, strict=True))
        print(f"packing {packing:.2f} s; packed, 1,000 chips take {wall:.2f} s")
        print(f"({processor:.2f} s of processor time), best of {given.epochs} epochs")
        print(f"memory of the process: {before:.0f} MiB before these epochs,")
        print(f"{memory_mib():.0f} MiB after them")


if __name__ == "__main__":
    main()
