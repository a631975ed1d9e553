"""MADOS -> a chip folder for segmentation: marine debris, oil and 13 other classes.

    python data_scripts/mados.py --root data

2,803 Sentinel-2 patches of 240 x 240 pixels at 10 m, in upstream's own lists. Bands are
eleven of atmospherically corrected (Rayleigh) reflectance; the DEFLECT study is said to
use 13, of which we know nothing. Most pixels have no label.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from archives import File
from command import main
from common import Source, make, read_names
from pixels import first_of_each, read_mask, read_raster

from geopeft_kit.data import Chip

SOURCE = Source(
    name="mados",
    title="MADOS: marine debris and oil spills, Sentinel-2, 11 bands, 15 classes",
    paper="Kikaki et al. 2024, doi 10.1016/j.isprsjprs.2024.02.017",
    home="https://zenodo.org/records/10664073",
    licence="CC-BY-4.0 (its Zenodo record; not verified here)",
    download_mb=None,
    disk_mb=7200,
    steps="Put MADOS.zip, or what it unpacks to, into DIR.",
    small="40 / 20 / 20 patches, in a seeded order",
    layout="pangaea-bench, pangaea/datasets/mados.py and its configuration",
)
CLASSES = (
    "marine debris", "dense Sargassum", "sparse floating algae",
    "natural organic material", "ship", "oil spill", "marine water",
    "sediment-laden water", "foam", "turbid water", "shallow water", "waves and wakes",
    "oil platform", "jellyfish", "sea snot",
)  # fmt: skip
BANDS = (
    "B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12",
)  # fmt: skip
SMALL = {"train": 40, "val": 20, "test": 20}
INFO = {
    "name": "MADOS",
    "task": "segmentation",
    "bands": BANDS,
    "classes": CLASSES,
    "notes": "Upstream's 1-15 became 0-14, and 0 (no label) became 255. NaN became 0. "
    "Bands of 20 and 60 m were repeated to 10 m, as PANGAEA does.",
}


def files(folder: Path, subset: str) -> Iterator[File]:
    """One archive; no checksum is known here."""
    url = "https://zenodo.org/records/10664073/files/MADOS.zip?download=1"
    yield File(url, "MADOS.zip", unpack=True)


def wavelength(path: Path) -> int:
    """Of a band's file, in nanometres: 492 of Scene_0_L2R_rhorc_492_1.tif."""
    return int(path.stem.split("_")[-2])


def read_patch(folder: Path, name: str) -> Chip:
    """One patch, named as in the lists: Scene_0_12."""
    scene, _, number = name.rpartition("_")
    mask = folder / scene / "10" / f"{scene}_L2R_cl_{number}.tif"
    paths = (folder / scene).glob(f"*/{scene}_L2R_rhorc_*_{number}.tif")
    bands = sorted(paths, key=wavelength)
    if len(bands) != len(BANDS):
        raise FileNotFoundError(
            f"{folder / scene} holds {len(bands)} bands of patch {number}; expected "
            f"{len(BANDS)}. Unpack the archive again."
        )
    target = read_mask(mask, {0: 255} | {v: v - 1 for v in range(1, 16)})
    image = np.concatenate([read_raster(b, target.shape)[0] for b in bands])
    place = read_raster(mask)[1]
    image = np.nan_to_num(image.astype(np.float32))
    return Chip(name, image, target, region=scene, extra={"scene": scene}, **place)


def read_chips(folder: Path, subset: str) -> Iterator[Chip]:
    """The patches of all splits."""
    home = folder / "MADOS"
    for split, few in SMALL.items():
        names = read_names(home / "splits" / f"{split}_X.txt")
        if subset == "small":
            names = first_of_each(names, None, few)
        for name in names:
            chip = read_patch(home, name)
            chip.split = split
            yield chip


def convert(
    source: Path | str | None,
    root: Path | str = "data",
    subset: str = "full",
    overwrite: bool = False,
) -> Path:
    """Make the chip folder.

    Args:
        source: Folder with MADOS.zip or with `MADOS`; None downloads.
        root: Where the chip folder is made.
        subset: "full" or "small".
        overwrite: Make it again where it stands.

    Returns:
        The chip folder.
    """
    return make(
        SOURCE, source, root, INFO, read_chips, files, ["MADOS"], subset, overwrite
    )


if __name__ == "__main__":
    main(SOURCE, convert)
