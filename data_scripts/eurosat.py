"""EuroSAT, 13 bands, with its longitude split -> a chip folder for classification.

    python data_scripts/eurosat.py --root data

The same images, classes and lists as `eurosat_rgb.py`, with all bands of Sentinel-2 L1C
and with their place: 16,200 / 5,400 / 5,400, cut by longitude, so that the test images
are a region that training never saw. URLs, MD5s, layout and order of bands (B8A stands
last in the files): torchgeo's `EuroSATSpatial`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from archives import File
from command import main
from common import Source, make
from eurosat_rgb import CLASSES, SMALL, choose, read_lists
from pixels import read_raster

from geopeft_kit.data import Chip

SOURCE = Source(
    name="eurosat",
    title="EuroSAT: 27,000 Sentinel-2 images of 64 x 64 pixels, 13 bands, 10 classes",
    paper="Helber et al. 2019, doi 10.1109/JSTARS.2019.2918242 (arXiv 1709.00029)",
    home="https://github.com/phelber/EuroSAT, by the copy of torchgeo on Hugging Face",
    licence="MIT (stated by the data set's owner); contains Copernicus Sentinel data",
    download_mb=None,
    disk_mb=2900,
    small="100 / 40 / 40 images of each class",
    layout="torchgeo 0.8.1, EuroSATSpatial",
)
IMAGES = "ds/images/remote_sensing/otherDatasets/sentinel_2/tif"
INFO = {
    "name": "EuroSAT",
    "task": "classification",
    "bands": (
        "B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B09", "B10", "B11",
        "B12", "B8A",
    ),
    "classes": list(CLASSES),
    "colours": list(CLASSES.values()),
    "scale": 1e-4,
    "notes": "Regions are blocks of longitude: train_block, val_block, test_block.",
}  # fmt: skip


def files(folder: Path, subset: str) -> Iterator[File]:
    """The three lists and one archive."""
    from torchgeo.datasets import EuroSATSpatial as Upstream  # slow, so only here

    for split, name in Upstream.split_filenames.items():
        yield File(Upstream.url + name, name, md5=Upstream.split_md5s[split])
    name = Upstream.filename
    yield File(Upstream.url + name, name, md5=Upstream.md5, unpack=True)


def read_chips(folder: Path, subset: str) -> Iterator[Chip]:
    """The chips of all splits."""
    for split, names in read_lists(folder).items():
        for name in choose(names, SMALL[split]) if subset == "small" else names:
            label = name.rpartition("_")[0]
            image, place = read_raster(folder / IMAGES / label / f"{name}.tif")
            yield Chip(
                name,
                image,
                label=label,
                split=split,
                region=f"{split}_block",
                **place,
            )


def convert(
    source: Path | str | None,
    root: Path | str = "data",
    subset: str = "full",
    overwrite: bool = False,
) -> Path:
    """Make the chip folder.

    Args:
        source: Folder with the lists, and the archive or what it unpacks to; None
            downloads.
        root: Where the chip folder is made.
        subset: "full" or "small".
        overwrite: Make it again where it stands.

    Returns:
        The chip folder.
    """
    needs = [IMAGES, *(f"eurosat-spatial-{split}.txt" for split in SMALL)]
    return make(SOURCE, source, root, INFO, read_chips, files, needs, subset, overwrite)


if __name__ == "__main__":
    main(SOURCE, convert)
