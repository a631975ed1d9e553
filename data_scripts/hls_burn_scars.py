"""HLS Burn Scars -> a chip folder for segmentation: burnt or not, in the USA.

    python data_scripts/hls_burn_scars.py --root data

804 HLS chips in the PEFT study's split, 524 / 160 / 120, which replaces upstream's own
(train and validation only, and they overlap on the ground). It separates chips, not
tiles: 28 tiles of the Sentinel-2 grid have chips in both train and test.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from archives import File
from command import main
from common import STUDY, Source, make, read_names
from pixels import chip_name, first_of_each, read_mask, read_raster

from geopeft_kit.data import Chip
from geopeft_kit.download import hub_url

SOURCE = Source(
    name="hls_burn_scars",
    title="HLS Burn Scars: 804 chips of 512 x 512 pixels at 30 m, six bands",
    paper="Phillips et al. 2023, doi 10.57967/hf/0956",
    home="https://huggingface.co/datasets/ibm-nasa-geospatial/hls_burn_scars",
    licence="CC-BY-4.0 (stated by the data set's loading script)",
    download_mb=2646,
    disk_mb=5300,
    steps="Put hls_burn_scars.tar.gz, or what it unpacks to, and the study's lists "
    f"({STUDY}/burn_scars) into DIR; then --from DIR.",
    small="40 / 16 / 16 chips, in a seeded order",
    layout="the data set class of IBM/peft-geofm, src/peft_geofm/datasets",
)
REPO = "datasets/ibm-nasa-geospatial/hls_burn_scars"
REVISION = "1864285e25010d346a842e4f068b1a1d4248ed6d"
ARCHIVE = "hls_burn_scars.tar.gz"
LISTS = {  # split -> SHA-256, computed from the list
    "train": "f1dca5c488c7a7451f3aa82f20677c18b3b22a2d96b59d68215494e3dba6f393",
    "val": "50a98be7974a2fec73af62b5f54063d938bcfe93cd9802b90eb33eb78f4d7f3e",
    "test": "c61ddcb5a434da3f5e63edd7c87549af104c6cc69345876a8ed770844bab1788",
}
SMALL = {"train": 40, "val": 16, "test": 16}
INFO = {
    "name": "HLS Burn Scars",
    "task": "segmentation",
    "bands": "hls",
    "classes": ["not burnt", "burnt"],
    "colours": ["#80cdc1", "#a50026"],
    "notes": "Values are reflectance as they are; NaN became 0 as in the study. "
    "Upstream's -1 (missing) became 255. Regions are tiles of the Sentinel-2 grid; 28 "
    "tiles have chips in both train and test.",
}


def files(folder: Path, subset: str) -> Iterator[File]:
    """The three lists and the archive."""
    for split, sha256 in LISTS.items():
        name = f"{split}_data.txt"
        yield File(f"{STUDY}/burn_scars/{name}", name, sha256=sha256)
    yield File(hub_url(REPO, ARCHIVE, REVISION), ARCHIVE, unpack=True)


def read_chips(folder: Path, subset: str) -> Iterator[Chip]:
    """The chips of all splits; upstream's folders do not matter."""
    images = {
        path.name.split("HLS.S30.")[-1].removesuffix(".4_merged.tif"): path
        for part in ("training", "validation")
        for path in sorted((folder / part).glob("*_merged.tif"))
    }
    for split in LISTS:
        names = read_names(folder / f"{split}_data.txt")
        if subset == "small":
            names = first_of_each(names, None, SMALL[split])
        for name in names:
            if name not in images:
                raise FileNotFoundError(
                    f"{folder} holds no image of {name}, which the {split} list names. "
                    "Unpack the archive again."
                )
            tile, day, _ = name.split(".", 2)
            image, place = read_raster(images[name])
            mask = str(images[name]).replace("_merged.tif", ".mask.tif")
            yield Chip(
                chip_name(name),
                np.nan_to_num(image.astype(np.float32)),
                read_mask(Path(mask), {-1: 255, 0: 0, 1: 1}),
                region=tile,
                split=split,
                date=dt.datetime.strptime(day, "%Y%j").date(),
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
        source: Folder with the three lists, and the archive or `training` and
            `validation`; None downloads.
        root: Where the chip folder is made.
        subset: "full" or "small".
        overwrite: Make it again where it stands.

    Returns:
        The chip folder.
    """
    needs = ["training", "validation", *(f"{split}_data.txt" for split in LISTS)]
    return make(SOURCE, source, root, INFO, read_chips, files, needs, subset, overwrite)


if __name__ == "__main__":
    main(SOURCE, convert)
