"""LEVIR-CD -> a chip folder for change detection: new and vanished buildings, Texas.

    python data_scripts/levir_cd.py --from DIR --root data --chip 256

637 pairs of Google Earth images, 1024 x 1024 at 0.5 m, in upstream's split (445 / 64 /
128). The files lie on a shared drive. MD5s and layout: torchgeo's `LEVIRCD`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from archives import File
from command import chip_option, main
from common import Source, make
from pixels import cut, first_of_each, read_mask, read_raster
from scenes import BRIGHTNESS, BRIGHTNESS_NOTE, pictures

from geopeft_kit.data import Chip

SOURCE = Source(
    name="levir_cd",
    title="LEVIR-CD: 637 pairs of RGB images of 1024 x 1024 pixels, building change",
    paper="Chen and Shi 2020, doi 10.3390/rs12101662",
    home="https://justchenhao.github.io/LEVIR",
    licence="CC-BY-NC-SA-4.0 by its page (not verified here); Google Earth images",
    download_mb=0,
    disk_mb=4700,
    steps="Download train.zip, val.zip and test.zip by hand from the drive that "
    "https://justchenhao.github.io/LEVIR links to, and pass --from DIR.",
    small="20 / 5 / 10 pairs, in a seeded order",
    layout="torchgeo 0.8.1, LEVIRCD",
)
SMALL = {"train": 20, "val": 5, "test": 10}
INFO = {
    "name": "LEVIR-CD",
    "task": "change",
    "classes": ["no change", "change"],
    "colours": ["#f7f7f7", "#d6604d"],
    "notes": BRIGHTNESS_NOTE,
    **BRIGHTNESS,
}


def files(folder: Path, subset: str, chip: int | None) -> Iterator[File]:
    """Three archives, which have to be got by hand."""
    from torchgeo.datasets import LEVIRCD  # slow to import, so only here

    for part in LEVIRCD.splits.values():
        yield File("", part["filename"], md5=part["md5"], unpack=True)


def read_chips(folder: Path, subset: str, chip: int | None) -> Iterator[Chip]:
    """The windows of all pairs; the split is the first part of a name."""
    paths = pictures(folder / "A")
    for split, few in SMALL.items():
        chosen = [p for p in paths if p.stem.startswith(split)]
        if subset == "small":
            chosen = first_of_each(chosen, None, few)
        for path in chosen:
            whole = Chip(
                path.stem,
                read_raster(path)[0][:3],
                read_mask(folder / "label" / path.name, {0: 0, 255: 1}),
                split=split,
                image_after=read_raster(folder / "B" / path.name)[0][:3],
            )
            yield from cut(whole, chip)


def convert(
    source: Path | str | None,
    root: Path | str = "data",
    subset: str = "full",
    overwrite: bool = False,
    chip: int | None = 256,
) -> Path:
    """Make the chip folder.

    Args:
        source: Folder with the three archives, or with `A`, `B` and `label`.
        root: Where the chip folder is made.
        subset: "full" or "small".
        overwrite: Make it again where it stands.
        chip: Side of the windows in pixels; None keeps images whole.

    Returns:
        The chip folder.
    """
    return make(
        SOURCE, source, root, INFO, read_chips, files, ["A", "B", "label"], subset,
        overwrite, chip=chip,
    )  # fmt: skip


if __name__ == "__main__":
    main(SOURCE, convert, chip_option(256))
