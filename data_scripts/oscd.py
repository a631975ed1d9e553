"""OSCD -> a chip folder for change detection: 24 cities, Sentinel-2, 13 bands.

    python data_scripts/oscd.py --root data

Upstream's split: 14 cities train, 10 others test, so the test shows unseen regions.
Pairs are cut into windows. URLs, MD5s, names and order of bands: torchgeo's `OSCD`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from archives import File
from command import chip_option, main
from common import Source, make
from pixels import cut_some, read_mask, read_raster

from geopeft_kit.data import Chip

SOURCE = Source(
    name="oscd",
    title="OSCD: 24 pairs of Sentinel-2 L1C images with change of urban land",
    paper="Daudt et al. 2018, doi 10.1109/IGARSS.2018.8518015",
    home="https://rcdaudt.github.io/oscd",
    licence="CC-BY-NC-SA (its page; not verified here)",
    download_mb=None,
    disk_mb=500,
    steps="Put the three archives, or what they unpack to, into DIR.",
    small="2 windows of each city",
    layout="torchgeo 0.8.1, OSCD",
)
STEM = "Onera Satellite Change Detection dataset - "
NEEDS = [f"{STEM}{part}" for part in ("Images", "Train Labels", "Test Labels")]
INFO = {
    "name": "OSCD",
    "task": "change",
    "bands": "sentinel2_l1c",
    "classes": ["no change", "change"],
    "colours": ["#f7f7f7", "#d6604d"],
    "scale": 1e-4,
    "notes": "Windows at the right and lower border that do not fill a chip are left "
    "out. Images are registered pairs (imgs_1_rect, imgs_2_rect).",
}


def files(folder: Path, subset: str, chip: int | None) -> Iterator[File]:
    """Three archives."""
    from torchgeo.datasets import OSCD  # slow to import, so only here

    for name, url in OSCD.urls.items():
        yield File(url, name, md5=OSCD.md5s[name], unpack=True)


def stack(paths: list[str]) -> np.ndarray:
    """Bands of one date, (13, H, W)."""
    return np.concatenate([read_raster(Path(path))[0] for path in paths])


def read_chips(folder: Path, subset: str, chip: int | None) -> Iterator[Chip]:
    """The windows of all cities."""
    from torchgeo.datasets import OSCD

    for split in OSCD.splits:
        rows = sorted(OSCD(folder, split).files, key=lambda row: row["region"])
        for row in rows:
            city, (before, after) = row["region"], row["dates"]
            whole = Chip(
                city,
                stack(row["images1"]),
                read_mask(Path(row["mask"]), {0: 0, 1: 1, 255: 1}),
                region=city,
                split=split,
                date=before,
                image_after=stack(row["images2"]),
                date_after=after,
            )
            yield from cut_some(whole, chip, 2 if subset == "small" else None)


def convert(
    source: Path | str | None,
    root: Path | str = "data",
    subset: str = "full",
    overwrite: bool = False,
    chip: int | None = 96,
) -> Path:
    """Make the chip folder.

    Args:
        source: Folder with the archives or what they unpack to; None downloads.
        root: Where the chip folder is made.
        subset: "full" or "small".
        overwrite: Make it again where it stands.
        chip: Side of the windows in pixels.

    Returns:
        The chip folder.
    """
    return make(
        SOURCE, source, root, INFO, read_chips, files, NEEDS, subset, overwrite,
        chip=chip,
    )  # fmt: skip


if __name__ == "__main__":
    main(SOURCE, convert, chip_option(96))
