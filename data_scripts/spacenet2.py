"""SpaceNet 2 -> a chip folder for super-resolution, as regression: 1.24 m to 0.31 m.

    python data_scripts/spacenet2.py --root data --cities Paris Khartoum

The image is the eight-band picture of WorldView-3 (1.24 m), resampled to the grid of
the panchromatic one (0.31 m, 650 x 650 pixels), which is the target: the network adds
the detail. GFM's own set-up for SpaceNet 2 is not known to us, so this is "-style". No
split is published; Khartoum tests here and is an unseen city. URLs, MD5s and layout:
torchgeo's `SpaceNet2`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from archives import File
from command import main
from common import Source, make
from pixels import first_of_each, read_raster

from geopeft_kit.data import Chip

SOURCE = Source(
    name="spacenet2",
    title="SpaceNet 2: WorldView-3 over four cities, 8 bands (1.24 m) and PAN (0.31 m)",
    paper="Van Etten, Lindenbaum and Bacastow 2018, arXiv 1807.01232",
    home="https://spacenet.ai/spacenet-buildings-dataset-v2",
    licence="CC-BY-SA-4.0 (SpaceNet's page; not verified here)",
    download_mb=None,
    disk_mb=82000,
    steps="Or fetch the tarballs of the cities that you want with the AWS client from "
    "s3://spacenet-dataset/spacenet/SN2_buildings/tarballs into DIR.",
    small="20 images of each city",
    layout="torchgeo 0.8.1, SpaceNet2 and SpaceNet",
)
CITIES = {"Vegas": 2, "Paris": 3, "Shanghai": 4, "Khartoum": 5}
BUCKET = "https://spacenet-dataset.s3.amazonaws.com/spacenet"
INFO = {
    "name": "SpaceNet 2 (super-resolution)",
    "task": "regression",
    "bands": (
        "COASTAL_AEROSOL", "BLUE", "GREEN", "YELLOW", "RED", "RED_EDGE_1", "NIR_BROAD",
        "NIR_NARROW",
    ),
    "scale": 1 / 2047,
    "notes": "Image: eight bands resampled (bilinear) to the grid of the panchromatic "
    "image, which is the target. Both are 11-bit numbers divided by 2047: brightness, "
    "no reflectance. Khartoum tests; the choice is ours, no split is published.",
}  # fmt: skip


def files(folder: Path, subset: str, cities: Sequence[str]) -> Iterator[File]:
    """One archive a city."""
    from torchgeo.datasets import SpaceNet2  # slow to import, so only here

    for city in cities:
        (name,) = SpaceNet2.tarballs["train"][CITIES[city]]
        (md5,) = SpaceNet2.md5s["train"][CITIES[city]]
        url = f"{BUCKET}/{SpaceNet2.dataset_id}/tarballs/{name}"
        yield File(url, name, md5=md5, unpack=True)


def numbered(folder: Path, city: str, product: str) -> dict[int, Path]:
    """Images of one product of a city by their number."""
    paths = folder.glob(f"**/AOI_{CITIES[city]}_*/{product}/*.tif")
    return {int(re.findall(r"_img(\d+)\.", p.name)[0]): p for p in sorted(paths)}


def read_chips(folder: Path, subset: str, cities: Sequence[str]) -> Iterator[Chip]:
    """The images of all cities that have both products."""
    for city in cities:
        sharp, coarse = (numbered(folder, city, name) for name in ("PAN", "MUL"))
        numbers = sorted(sharp.keys() & coarse.keys())
        if not numbers:
            raise FileNotFoundError(
                f"{folder} holds no AOI_{CITIES[city]}_*/PAN and MUL of {city}. Unpack "
                "its archive again, or name the --cities that are there."
            )
        if subset == "small":
            numbers = first_of_each(numbers, None, 20)
        for number in numbers:
            target, place = read_raster(sharp[number])
            size = target.shape[1:]
            yield Chip(
                f"{city}_{number:05d}",
                read_raster(coarse[number], size, "bilinear")[0],
                target[0].astype(np.float32) / 2047,
                region=city,
                split="test" if city == "Khartoum" else "train",
                **place,
            )


def convert(
    source: Path | str | None,
    root: Path | str = "data",
    subset: str = "full",
    overwrite: bool = False,
    cities: Sequence[str] = tuple(CITIES),
) -> Path:
    """Make the chip folder.

    Args:
        source: Folder with the archives of the cities or what they unpack to; None
            downloads.
        root: Where the chip folder is made.
        subset: "full" or "small".
        overwrite: Make it again where it stands.
        cities: Some of "Vegas", "Paris", "Shanghai", "Khartoum".

    Returns:
        The chip folder.
    """
    wrong = [city for city in cities if city not in CITIES]
    if wrong or not cities:
        raise ValueError(f"cities are {list(cities)}; allowed are {', '.join(CITIES)}.")
    from torchgeo.datasets import SpaceNet2

    tar = SpaceNet2.tarballs["train"]
    stems = [tar[CITIES[c]][0].removeprefix("SN2_buildings_train_") for c in cities]
    needs = [f"{stem.removesuffix('.tar.gz')}_Train" for stem in stems]
    described = replace(SOURCE, disk_mb=SOURCE.disk_mb / len(CITIES) * len(cities))
    return make(
        described, source, root, INFO, read_chips, files, needs, subset, overwrite,
        cities=list(cities),
    )  # fmt: skip


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cities",
        nargs="+",
        choices=CITIES,
        default=list(CITIES),
        help="which cities (default: all four)",
    )


if __name__ == "__main__":
    main(SOURCE, convert, _options)
