"""EuroSAT RGB with its longitude split -> a chip folder for classification.

    python data_scripts/eurosat_rgb.py --root data

The split lists cut Europe by longitude (60 / 20 / 20 %), so that the test images are a
region that training never saw. Class frequencies differ much between the blocks
(SeaLake: 6 % of train, 24 % of val), so part of any drop is label shift.

Layout and checksums: torchgeo's `EuroSATSpatial` (lists) and torchvision's `EuroSAT`
(images), which publish MD5s.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from archives import File
from command import main
from common import Source, make
from pixels import first_of_each

from geopeft_kit.data import Chip
from geopeft_kit.download import hub_url

SOURCE = Source(
    name="eurosat_rgb",
    title="EuroSAT RGB: 27,000 Sentinel-2 images of 64 x 64 pixels in 10 classes",
    paper="Helber et al. 2019, doi 10.1109/JSTARS.2019.2918242 (arXiv 1709.00029)",
    home="https://github.com/phelber/EuroSAT, by the copy of torchgeo on Hugging Face",
    licence="MIT (stated by the data set's owner); contains Copernicus Sentinel data",
    download_mb=94,
    disk_mb=130,
    small="100 / 40 / 40 images of each class",
    layout="torchgeo's EuroSATSpatial (lists), torchvision's EuroSAT (images)",
)
CLASSES = {
    "AnnualCrop": "#e8c547",
    "Forest": "#1b7837",
    "HerbaceousVegetation": "#a6d96a",
    "Highway": "#636363",
    "Industrial": "#b2182b",
    "Pasture": "#66bd63",
    "PermanentCrop": "#c27ba0",
    "Residential": "#f46d43",
    "River": "#4393c3",
    "SeaLake": "#2166ac",
}
# The list's own name comes first; a folder may also hold them as plain <split>.txt.
LISTS = {s: (f"eurosat-spatial-{s}.txt", f"{s}.txt") for s in ("train", "val", "test")}
SMALL = {"train": 100, "val": 40, "test": 40}  # images of each class
# 8-bit pictures are taken as reflectance 0-0.275 stretched to 0-255, as the upstream
# folder's name, 2750, suggests. An assumption: upstream does not document it.
SCALE = 2750 / 255 / 10000

REPO = "datasets/torchgeo/eurosat"
IMAGES = (
    "EuroSAT.zip",
    "c877bcd43f099cd0196738f714544e355477f3fd",
    "c8fa014336c82ac7804f0398fcb19387",
)
LIST_REVISION = "1ce6f1bfb56db63fd91b6ecc466ea67f2509774c"
LIST_MD5 = {
    "train": "7be3254be39f23ce4d4d144290c93292",
    "val": "acf392290050bb3df790dc8fc0ebf193",
    "test": "5ec1733f9c16116bf0aa2d921fc613ef",
}
INFO = {
    "name": "EuroSAT RGB",
    "task": "classification",
    "bands": ("RED", "GREEN", "BLUE"),
    "classes": list(CLASSES),
    "colours": list(CLASSES.values()),
    "scale": SCALE,
    "notes": "Regions are blocks of longitude: train_block, val_block, test_block. "
    "The images have no georeference. Stored 8-bit values become reflectance by "
    "x 2750 / 255 / 10000, an assumption that upstream does not document.",
}


def files(folder: Path, subset: str, in_region: float) -> Iterator[File]:
    """The three lists and the images."""
    for split, md5 in LIST_MD5.items():
        name = LISTS[split][0]
        yield File(hub_url(REPO, name, LIST_REVISION), name, md5=md5)
    name, revision, md5 = IMAGES
    yield File(hub_url(REPO, name, revision), name, md5=md5, unpack=True)


def read_lists(folder: Path) -> dict[str, list[str]]:
    """Image names of each split, sorted, without their suffix."""
    names = {}
    for split, files in LISTS.items():
        path = next((folder / f for f in files if (folder / f).is_file()), None)
        if path is None:
            raise FileNotFoundError(
                f"{folder} holds no {files[0]} (nor {files[1]}). Take the lists from "
                f"{SOURCE.home}, or run without --from to fetch them."
            )
        names[split] = sorted(Path(n).stem for n in path.read_text().split())
    return names


def choose(names: list[str], per_class: int, seed: int = 0) -> list[str]:
    """The first images of each class in a seeded order: smaller lies in larger."""
    chosen = first_of_each(names, lambda n: n.rpartition("_")[0], per_class, seed)
    return sorted(chosen)


def read_chips(folder: Path, subset: str, in_region: float) -> Iterator[Chip]:
    """The chips of all splits."""
    for split, names in read_lists(folder).items():
        unknown = {n.rpartition("_")[0] for n in names} - set(CLASSES)
        if unknown:
            raise ValueError(
                f"the {split} list names the class {sorted(unknown)[0]!r}; EuroSAT has "
                f"{', '.join(CLASSES)}."
            )
        if subset == "small":
            names = choose(names, SMALL[split])
        held = set()
        if split == "train" and in_region:
            per_class = round(in_region * len(names) / len(CLASSES))
            held = set(choose(names, per_class, seed=1))
        for name in names:
            label = name.rpartition("_")[0]
            yield Chip(
                name,
                folder / "2750" / label / f"{name}.jpg",
                label=label,
                split="in_region" if name in held else split,
                region=f"{split}_block",
            )


def convert(
    source: Path | str | None,
    root: Path | str = "data",
    subset: str = "full",
    in_region: float = 0.0,
    overwrite: bool = False,
) -> Path:
    """Make the chip folder.

    Args:
        source: Folder with `2750/<class>/<name>.jpg` and the lists; None downloads.
        root: Where the chip folder is made.
        subset: "full", or "small": 100 / 40 / 40 images of each class.
        in_region: Share of the training images, the same of each class, that is set
            apart as a split "in_region": unseen images of a seen region.
        overwrite: Make it again where it stands.

    Returns:
        The chip folder.
    """
    if not 0 <= in_region < 1:
        raise ValueError(
            f"in_region is {in_region}; it must be at least 0 and below 1."
        )
    return make(
        SOURCE, source, root, INFO, read_chips, files, ["2750"], subset, overwrite,
        in_region=in_region,
    )  # fmt: skip


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--in-region",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of train set apart as the split 'in_region'",
    )


if __name__ == "__main__":
    main(SOURCE, convert, _options)
