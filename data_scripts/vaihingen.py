"""ISPRS Vaihingen -> a chip folder for segmentation: one town at 9 cm, 6 classes.

    python data_scripts/vaihingen.py --from DIR --root data

33 image tiles of infrared, red and green in upstream's split (16 train, 17 test), cut
into windows. The files need a registration. MD5s, lists, colours and layout: torchgeo's
`Vaihingen2D`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from archives import File
from command import chip_option, main
from common import Source, make
from pixels import cut_some, read_colours, read_raster

from geopeft_kit.data import Chip

SOURCE = Source(
    name="vaihingen",
    title="ISPRS Vaihingen: 33 tiles of near infrared, red and green at 9 cm",
    paper="Rottensteiner et al. 2012, doi 10.5194/isprsannals-I-3-293-2012",
    home="https://www.isprs.org/education/benchmarks/UrbanSemLab",
    licence="by registration with the ISPRS, for research",
    download_mb=0,
    disk_mb=500,
    steps="Register at https://www.isprs.org/education/benchmarks/UrbanSemLab, and put "
    "ISPRS_semantic_labeling_Vaihingen.zip and "
    "ISPRS_semantic_labeling_Vaihingen_ground_truth_COMPLETE.zip into DIR.",
    small="5 windows of each tile",
    layout="torchgeo 0.8.1, Vaihingen2D",
)


def files(folder: Path, subset: str, chip: int | None) -> Iterator[File]:
    """Two archives, which have to be got by hand."""
    from torchgeo.datasets import Vaihingen2D  # slow to import, so only here

    for name, md5 in zip(Vaihingen2D.filenames, Vaihingen2D.md5s, strict=True):
        yield File("", name, md5=md5, unpack=True)


def read_chips(folder: Path, subset: str, chip: int | None) -> Iterator[Chip]:
    """The windows of all tiles."""
    from torchgeo.datasets import Vaihingen2D

    for split, names in Vaihingen2D.splits.items():
        for name in sorted(names):
            whole = Chip(
                Path(name).stem,
                read_raster(folder / Vaihingen2D.image_root / name)[0][:3],
                read_colours(folder / name, Vaihingen2D.colormap),
                split=split,
                region=Path(name).stem.rpartition("_")[2],
            )
            yield from cut_some(whole, chip, 5 if subset == "small" else None)


def convert(
    source: Path | str | None,
    root: Path | str = "data",
    subset: str = "full",
    overwrite: bool = False,
    chip: int | None = 256,
) -> Path:
    """Make the chip folder.

    Args:
        source: Folder with the two archives, or with `top` and the masks beside it.
        root: Where the chip folder is made.
        subset: "full" or "small".
        overwrite: Make it again where it stands.
        chip: Side of the windows in pixels.

    Returns:
        The chip folder.
    """
    from torchgeo.datasets import Vaihingen2D

    info = {
        "name": "ISPRS Vaihingen",
        "task": "segmentation",
        "bands": ("NIR_BROAD", "RED", "GREEN"),
        "classes": Vaihingen2D.classes,
        "colours": [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in Vaihingen2D.colormap],
        "scale": 1 / 255,
        "notes": "8-bit values became brightness 0-1 by / 255; it is no reflectance. "
        "Regions are tiles of one town. What does not fill a window is left out.",
    }
    needs = ["top", "top_mosaic_09cm_area1.tif"]
    return make(
        SOURCE, source, root, info, read_chips, files, needs, subset, overwrite,
        chip=chip,
    )  # fmt: skip


if __name__ == "__main__":
    main(SOURCE, convert, chip_option(256))
