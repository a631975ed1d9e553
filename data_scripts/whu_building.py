"""WHU building, aerial -> a chip folder for segmentation: roofs of Christchurch.

    python data_scripts/whu_building.py --root data

8,188 (4736 / 1036 / 2416) tiles of 512 x 512 pixels at 0.3 m, in upstream's split.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from archives import File
from command import main
from common import Source, make
from scenes import BRIGHTNESS, BRIGHTNESS_NOTE, mask_chips

from geopeft_kit.data import Chip

SOURCE = Source(
    name="whu_building",
    title="WHU building, aerial: 8,188 RGB tiles of 512 x 512 pixels at 0.3 m",
    paper="Ji, Wei and Lu 2019, doi 10.1109/TGRS.2018.2858817",
    home="http://gpcv.whu.edu.cn/data/building_dataset.html",
    licence="not stated; for research with citation",
    download_mb=None,
    disk_mb=8600,
    steps="Download 'The cropped aerial image tiles and raster labels' from "
    "http://gpcv.whu.edu.cn/data/building_dataset.html by hand, and unpack it.",
    small="60 / 20 / 20 tiles, in a seeded order",
    layout="datasets/whu/README.md of CAT-SAM (archive) and user guides (folders)",
)
FOLDER = "3. The cropped image tiles and raster labels"
ARCHIVE = "3. The cropped aerial image tiles and raster labels.zip"
SMALL = {"train": 60, "val": 20, "test": 20}
INFO = {
    "name": "WHU building (aerial)",
    "task": "segmentation",
    "classes": ["other", "building"],
    "colours": ["#d9d9d9", "#b2182b"],
    "notes": BRIGHTNESS_NOTE,
    **BRIGHTNESS,
}


def files(folder: Path, subset: str) -> Iterator[File]:
    """One archive; no checksum is published."""
    url = f"http://gpcv.whu.edu.cn/data/{ARCHIVE.replace(' ', '%20')}"
    yield File(url, ARCHIVE, unpack=True)


def read_chips(folder: Path, subset: str) -> Iterator[Chip]:
    """The tiles of all splits."""
    for split, few in SMALL.items():
        small = few if subset == "small" else None
        values = {0: 0, 1: 1, 255: 1}
        where = folder / FOLDER / split
        yield from mask_chips(where, ("image", "label"), values, split, small=small)


def convert(
    source: Path | str | None,
    root: Path | str = "data",
    subset: str = "full",
    overwrite: bool = False,
) -> Path:
    """Make the chip folder.

    Args:
        source: Folder with the archive, or with what it unpacks to; None downloads.
        root: Where the chip folder is made.
        subset: "full" or "small".
        overwrite: Make it again where it stands.

    Returns:
        The chip folder.
    """
    return make(
        SOURCE, source, root, INFO, read_chips, files, [FOLDER], subset, overwrite
    )


if __name__ == "__main__":
    main(SOURCE, convert)
