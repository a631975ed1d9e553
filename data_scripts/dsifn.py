"""DSIFN-CD -> a chip folder for change detection: six cities in China.

    python data_scripts/dsifn.py --from DIR --root data

3600 / 340 / 48 pairs of Google Earth images of 512 x 512 pixels. Training pairs are
394 pairs of five cities and their augmented copies; Xi'an alone is the test, an unseen
region. GFM reports 3490 / 48, which are not the published counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from command import main
from common import Source, make
from scenes import BRIGHTNESS, BRIGHTNESS_NOTE, mask_chips

from geopeft_kit.data import Chip

SOURCE = Source(
    name="dsifn",
    title="DSIFN-CD: 3,988 pairs of RGB images of 512 x 512 pixels, land-cover change",
    paper="Zhang et al. 2020, doi 10.1016/j.isprsjprs.2020.06.003",
    home="https://github.com/GeoZcx/A-deeply-supervised-image-fusion-network-for-"
    "change-detection-in-remote-sensing-images, folder dataset",
    licence="not stated; Google Earth images, for research with citation",
    download_mb=0,
    disk_mb=7300,
    steps="Download it from the shared drive that the folder 'dataset' of its "
    "repository links to, and unpack it, so that DIR holds train, val and test, each "
    "with t1, t2 and mask.",
    small="40 / 10 / 12 pairs, in a seeded order",
    layout="GeoZcx's dataset/README.md (counts) and MDENet's path.py (folders t1, t2)",
)
SMALL = {"train": 40, "val": 10, "test": 12}
REGIONS = {"train": "five_cities", "val": "five_cities", "test": "xian"}
INFO = {
    "name": "DSIFN-CD",
    "task": "change",
    "classes": ["no change", "change"],
    "colours": ["#f7f7f7", "#d6604d"],
    "notes": f"{BRIGHTNESS_NOTE}Training pairs include augmented copies, as published.",
    **BRIGHTNESS,
}


def read_chips(folder: Path, subset: str) -> Iterator[Chip]:
    """The pairs of all splits."""
    for split, region in REGIONS.items():
        yield from mask_chips(
            folder / split,
            ("t1", "t2", "mask"),
            {0: 0, 1: 1, 255: 1},
            split,
            region,
            SMALL[split] if subset == "small" else None,
        )


def convert(
    source: Path | str | None,
    root: Path | str = "data",
    subset: str = "full",
    overwrite: bool = False,
) -> Path:
    """Make the chip folder.

    Args:
        source: Folder with `train`, `val` and `test`.
        root: Where the chip folder is made.
        subset: "full" or "small".
        overwrite: Make it again where it stands.

    Returns:
        The chip folder.
    """
    return make(
        SOURCE, source, root, INFO, read_chips, None, [*REGIONS], subset, overwrite
    )


if __name__ == "__main__":
    main(SOURCE, convert)
