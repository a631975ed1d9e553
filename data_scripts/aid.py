"""AID -> a chip folder for classification: 20 % or 50 % train (AID-28, AID-55).

    python data_scripts/aid.py --from DIR --root data --train-share 0.2

The images have to be got by hand. Which of them train is not published; ours are drawn
with a seed, and those of AID-28 are among those of AID-55.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from command import main
from common import Source, make
from scenes import BRIGHTNESS, BRIGHTNESS_NOTE, class_chips
from uc_merced import options

from geopeft_kit.data import Chip

SOURCE = Source(
    name="aid",
    title="AID: 10,000 aerial RGB images of 600 x 600 pixels in 30 classes",
    paper="Xia et al. 2017, doi 10.1109/TGRS.2017.2685945 (arXiv 1608.05167)",
    home="https://captain-whu.github.io/AID",
    licence="not stated; images from Google Earth, for research",
    download_mb=0,
    disk_mb=11000,
    steps="Follow the download link on https://captain-whu.github.io/AID (a shared "
    "drive) and unpack it, so that DIR holds AID/Airport/airport_1.jpg and so on.",
    small="20 training and 20 test images of each class",
    layout="isaaccorley/torchrs (datasets/aid.py) and aitlas: one folder a class",
)
CLASSES = (
    "Airport", "BareLand", "BaseballField", "Beach", "Bridge", "Center", "Church",
    "Commercial", "DenseResidential", "Desert", "Farmland", "Forest", "Industrial",
    "Meadow", "MediumResidential", "Mountain", "Park", "Parking", "Playground", "Pond",
    "Port", "RailwayStation", "Resort", "River", "School", "SparseResidential",
    "Square", "Stadium", "StorageTanks", "Viaduct",
)  # fmt: skip
INFO = {
    "name": "AID",
    "task": "classification",
    "classes": CLASSES,
    "notes": BRIGHTNESS_NOTE,
    **BRIGHTNESS,
}


def read_chips(folder: Path, subset: str, train_share: float) -> Iterator[Chip]:
    """The images of all classes."""
    small = 20 if subset == "small" else None
    yield from class_chips(folder / "AID", CLASSES, train_share, small)


def convert(
    source: Path | str | None,
    root: Path | str = "data",
    subset: str = "full",
    overwrite: bool = False,
    train_share: float = 0.5,
) -> Path:
    """Make the chip folder.

    Args:
        source: Folder with `AID`.
        root: Where the chip folder is made.
        subset: "full" or "small".
        overwrite: Make it again where it stands.
        train_share: 0.2 for AID-28, 0.5 for AID-55.

    Returns:
        The chip folder.
    """
    return make(
        SOURCE, source, root, INFO, read_chips, None, ["AID"], subset, overwrite,
        train_share=train_share,
    )  # fmt: skip


if __name__ == "__main__":
    main(SOURCE, convert, options)
