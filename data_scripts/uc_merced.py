"""UC Merced -> a chip folder for classification: half trains, half tests (UCM-55).

    python data_scripts/uc_merced.py --root data

UPetu's UCM-55 trains on half of each class and tests on the other; which half, it does
not publish, so ours is drawn with a seed. The chips of neighbouring places may stand on
both sides: a random split, as the literature uses it. URL, MD5 and layout: torchgeo.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from archives import File
from command import main
from common import Source, make
from scenes import BRIGHTNESS, BRIGHTNESS_NOTE, class_chips

from geopeft_kit.data import Chip

SOURCE = Source(
    name="uc_merced",
    title="UC Merced Land Use: 2,100 aerial RGB images of 256 x 256 pixels, 21 classes",
    paper="Yang and Newsam 2010, doi 10.1145/1869790.1869829",
    home="http://weegee.vision.ucmerced.edu/datasets/landuse.html, by torchgeo's copy",
    licence="public domain (USGS National Map imagery; stated by its authors)",
    download_mb=None,
    disk_mb=420,
    small="20 training and 20 test images of each class",
    layout="torchgeo 0.8.1, UCMerced",
)
CLASSES = (
    "agricultural", "airplane", "baseballdiamond", "beach", "buildings", "chaparral",
    "denseresidential", "forest", "freeway", "golfcourse", "harbor", "intersection",
    "mediumresidential", "mobilehomepark", "overpass", "parkinglot", "river", "runway",
    "sparseresidential", "storagetanks", "tenniscourt",
)  # fmt: skip
INFO = {
    "name": "UC Merced",
    "task": "classification",
    "classes": CLASSES,
    "notes": f"{BRIGHTNESS_NOTE}Images of another size were resampled to 256 x 256.",
    **BRIGHTNESS,
}


def files(folder: Path, subset: str, train_share: float = 0.5) -> Iterator[File]:
    """One archive."""
    from torchgeo.datasets import UCMerced  # slow to import, so only here

    name = UCMerced.filename
    yield File(UCMerced.url + name, name, md5=UCMerced.md5, unpack=True)


def read_chips(folder: Path, subset: str, train_share: float = 0.5) -> Iterator[Chip]:
    """The images of all classes."""
    small = 20 if subset == "small" else None
    images = folder / "UCMerced_LandUse/Images"
    yield from class_chips(images, CLASSES, train_share, small, size=256)


def convert(
    source: Path | str | None,
    root: Path | str = "data",
    subset: str = "full",
    overwrite: bool = False,
    train_share: float = 0.5,
) -> Path:
    """Make the chip folder.

    Args:
        source: Folder with `UCMerced_LandUse` or its archive; None downloads.
        root: Where the chip folder is made.
        subset: "full" or "small".
        overwrite: Make it again where it stands.
        train_share: Part of each class that trains; the training images of a smaller
            share are among those of a larger one.

    Returns:
        The chip folder.
    """
    return make(
        SOURCE, source, root, INFO, read_chips, files, ["UCMerced_LandUse/Images"],
        subset, overwrite, train_share=train_share,
    )  # fmt: skip


def options(parser: argparse.ArgumentParser) -> None:
    """Add the share that trains."""
    parser.add_argument(
        "--train-share",
        type=float,
        default=0.5,
        help="part of each class that trains; the rest tests (default: 0.5)",
    )


if __name__ == "__main__":
    main(SOURCE, convert, options)
