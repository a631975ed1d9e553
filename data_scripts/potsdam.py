"""ISPRS Potsdam -> a chip folder for segmentation: one city at 5 cm, 6 classes.

    python data_scripts/potsdam.py --from DIR --root data

38 image tiles of red, green, blue and infrared in upstream's split (24 train, 14 test),
cut into windows. The files need a registration. Lists, colours and layout: torchgeo's
`Potsdam2D`; its MD5 of the labels is cut short, so that archive is not compared.
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
    name="potsdam",
    title="ISPRS Potsdam: 38 tiles of red, green, blue and near infrared at 5 cm",
    paper="Rottensteiner et al. 2012, doi 10.5194/isprsannals-I-3-293-2012",
    home="https://www.isprs.org/education/benchmarks/UrbanSemLab",
    licence="by registration with the ISPRS, for research",
    download_mb=0,
    disk_mb=5500,
    steps="Register at https://www.isprs.org/education/benchmarks/UrbanSemLab, and put "
    "4_Ortho_RGBIR.zip and 5_Labels_all.zip into DIR.",
    small="5 windows of each tile",
    layout="torchgeo 0.8.1, Potsdam2D",
)


def files(folder: Path, subset: str, chip: int | None) -> Iterator[File]:
    """Two archives, which have to be got by hand."""
    from torchgeo.datasets import Potsdam2D  # slow to import, so only here

    images, labels = Potsdam2D.filenames
    yield File("", images, md5=Potsdam2D.md5s[0], unpack=True)
    yield File("", labels, unpack=True)


def read_chips(folder: Path, subset: str, chip: int | None) -> Iterator[Chip]:
    """The windows of all tiles."""
    from torchgeo.datasets import Potsdam2D

    for split, names in Potsdam2D.splits.items():
        for name in sorted(names):
            whole = Chip(
                name,
                read_raster(folder / Potsdam2D.image_root / f"{name}_RGBIR.tif")[0],
                read_colours(folder / f"{name}_label.tif", Potsdam2D.colormap, True),
                split=split,
                region=name.removeprefix("top_potsdam_"),
            )
            yield from cut_some(whole, chip, 5 if subset == "small" else None)


def convert(
    source: Path | str | None,
    root: Path | str = "data",
    subset: str = "full",
    overwrite: bool = False,
    chip: int | None = 512,
) -> Path:
    """Make the chip folder.

    Args:
        source: Folder with the two archives, or with what they hold.
        root: Where the chip folder is made.
        subset: "full" or "small".
        overwrite: Make it again where it stands.
        chip: Side of the windows in pixels.

    Returns:
        The chip folder.
    """
    from torchgeo.datasets import Potsdam2D

    info = {
        "name": "ISPRS Potsdam",
        "task": "segmentation",
        "bands": ("RED", "GREEN", "BLUE", "NIR_BROAD"),
        "classes": Potsdam2D.classes,
        "colours": [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in Potsdam2D.colormap],
        "scale": 1 / 255,
        "notes": "8-bit values became brightness 0-1 by / 255; it is no reflectance. "
        "Regions are tiles of one city. Pixels of a colour that is no class have no "
        "label. What does not fill a window is left out.",
    }
    needs = ["4_Ortho_RGBIR", "top_potsdam_2_10_label.tif"]
    return make(
        SOURCE, source, root, info, read_chips, files, needs, subset, overwrite,
        chip=chip,
    )  # fmt: skip


if __name__ == "__main__":
    main(SOURCE, convert, chip_option(512))
