"""LoveDA -> a chip folder for segmentation: land cover of city and country, China.

    python data_scripts/loveda.py --root data

Images of 1024 x 1024 pixels at 0.3 m. Upstream's test set has no public masks, so its
validation set is the test here; regions are "urban" and "rural", and holding one of
them out (`test_regions=["rural"]`) is what the data set was made for. URLs, MD5s and
layout: torchgeo's `LoveDA`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from archives import File
from command import chip_option, main
from common import Source, make
from scenes import BRIGHTNESS, BRIGHTNESS_NOTE, mask_chips

from geopeft_kit.data import Chip

SOURCE = Source(
    name="loveda",
    title="LoveDA: 4,191 labelled RGB images of 1024 x 1024 pixels at 0.3 m, 7 classes",
    paper="Wang et al. 2021, arXiv 2110.08733",
    home="https://zenodo.org/records/5706578",
    licence="CC-BY-NC-SA-4.0 (its Zenodo record; not verified here)",
    download_mb=None,
    disk_mb=18000,
    small="10 images of each split and region",
    layout="torchgeo 0.8.1, LoveDA",
)
CLASSES = {
    "background": "#ffffff",
    "building": "#ff0000",
    "road": "#ffff00",
    "water": "#0000ff",
    "barren": "#9f81b7",
    "forest": "#00ff00",
    "agriculture": "#ffc380",
}
SPLITS = {"Train": "train", "Val": "test"}
INFO = {
    "name": "LoveDA",
    "task": "segmentation",
    "classes": list(CLASSES),
    "colours": list(CLASSES.values()),
    "notes": f"{BRIGHTNESS_NOTE}Upstream's 1-7 became 0-6, and 0 (no data) became 255. "
    "Upstream's validation set is the test here; its test set has no public masks.",
    **BRIGHTNESS,
}


def files(folder: Path, subset: str, chip: int | None) -> Iterator[File]:
    """Two archives; the third has no masks."""
    from torchgeo.datasets import LoveDA  # slow to import, so only here

    for split in SPLITS:
        part = LoveDA.info_dict[split.lower()]
        yield File(part["url"], part["filename"], md5=part["md5"], unpack=True)


def read_chips(folder: Path, subset: str, chip: int | None) -> Iterator[Chip]:
    """The windows of all images."""
    values = {0: 255} | {number: number - 1 for number in range(1, 8)}
    small = 10 if subset == "small" else None
    for where, split in SPLITS.items():
        for scene in ("Urban", "Rural"):
            yield from mask_chips(
                folder / where / scene,
                ("images_png", "masks_png"),
                values,
                split,
                scene.lower(),
                small,
                chip,
            )


def convert(
    source: Path | str | None,
    root: Path | str = "data",
    subset: str = "full",
    overwrite: bool = False,
    chip: int | None = 512,
) -> Path:
    """Make the chip folder.

    Args:
        source: Folder with `Train` and `Val`, or their archives; None downloads.
        root: Where the chip folder is made.
        subset: "full" or "small".
        overwrite: Make it again where it stands.
        chip: Side of the windows in pixels; None keeps images whole.

    Returns:
        The chip folder.
    """
    return make(
        SOURCE, source, root, INFO, read_chips, files, [*SPLITS], subset, overwrite,
        chip=chip,
    )  # fmt: skip


if __name__ == "__main__":
    main(SOURCE, convert, chip_option(512))
