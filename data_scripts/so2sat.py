"""So2Sat LCZ42 -> a chip folder for classification: local climate zones of 42 cities.

    python data_scripts/so2sat.py --from DIR --root data --version 3_culture_10

Sentinel-2 patches of 32 x 32 pixels, ten bands, 17 classes. Version 3_culture_10 holds
ten cities of other cultural zones back for testing: an unseen-region split; 3_block
cuts each city, 3_random mixes. The files (by FTP, tens of GB) have to be got by hand.
MD5s, names and layout: torchgeo's `So2Sat`. Needs h5py.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from archives import File
from command import main
from common import Source, make
from hdf5 import open_hdf5
from pixels import first_of_each

from geopeft_kit.data import Chip

SOURCE = Source(
    name="so2sat",
    title="So2Sat LCZ42: Sentinel-2 patches of 32 x 32 pixels, 10 bands, 17 classes",
    paper="Zhu et al. 2020, doi 10.1109/MGRS.2020.2964708",
    home="https://mediatum.ub.tum.de/1613658 (version 3), 1483140 (version 2)",
    licence="CC-BY-4.0 (its page; not verified here)",
    download_mb=0,
    disk_mb=8200,
    steps="For version 3_culture_10: wget -P culture_10 "
    "ftp://m1613658:m1613658@dataserv.ub.tum.de/culture_10/training.h5 (and "
    "testing.h5), a public account that torchgeo documents; then --from DIR.",
    small="100 training, 40 validation and 40 test patches of each class",
    layout="torchgeo 0.8.1, So2Sat",
)
VERSIONS = ("2", "3_random", "3_block", "3_culture_10")
SPLITS = {"train": "train", "validation": "val", "test": "test"}
SMALL = {"train": 100, "val": 40, "test": 40}
BLOCK = 4096  # patches read at a time


def files(folder: Path, subset: str, version: str) -> Iterator[File]:
    """Two or three HDF5 files, which have to be got by hand."""
    from torchgeo.datasets import So2Sat  # slow to import, so only here

    for split, name in So2Sat.filenames_by_version[version].items():
        yield File("", name, md5=So2Sat.md5s_by_version[version][split])


def read_chips(folder: Path, subset: str, version: str) -> Iterator[Chip]:
    """The patches of all splits."""
    from torchgeo.datasets import So2Sat

    for upstream, name in So2Sat.filenames_by_version[version].items():
        split = SPLITS[upstream]
        with open_hdf5(folder / name) as file:
            labels = file["label"][()].argmax(1)  # (N,), from one number a class
            rows = list(range(len(labels)))
            if subset == "small":
                rows = first_of_each(rows, labels.__getitem__, SMALL[split])
            for start in range(0, len(labels), BLOCK):
                images = None
                for row in (r for r in rows if start <= r < start + BLOCK):
                    if images is None:
                        images = file["sen2"][start : start + BLOCK]  # (n, H, W, C)
                    image = np.moveaxis(images[row - start], -1, 0)
                    yield Chip(
                        f"{split}_{row:06d}",
                        image.astype(np.float32),
                        label=int(labels[row]),
                        split=split,
                        region=f"{split}_cities",
                    )


def convert(
    source: Path | str | None,
    root: Path | str = "data",
    subset: str = "full",
    overwrite: bool = False,
    version: str = "3_culture_10",
) -> Path:
    """Make the chip folder.

    Args:
        source: Folder with the files of the version, as torchgeo names them.
        root: Where the chip folder is made.
        subset: "full" or "small".
        overwrite: Make it again where it stands.
        version: "2", "3_random", "3_block" or "3_culture_10".

    Returns:
        The chip folder.
    """
    from torchgeo.datasets import So2Sat

    if version not in VERSIONS:
        raise ValueError(f"version is {version!r}; allowed are {', '.join(VERSIONS)}.")
    info = {
        "name": f"So2Sat LCZ42, version {version}",
        "task": "classification",
        "bands": "sentinel2_10",
        "classes": So2Sat.classes,
        "notes": "Sentinel-2 values are reflectance as stored. The files do not say "
        "which city a patch lies in.",
    }
    needs = list(So2Sat.filenames_by_version[version].values())
    return make(
        SOURCE, source, root, info, read_chips, files, needs, subset, overwrite,
        f"so2sat_{version}", version=version,
    )  # fmt: skip


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--version", choices=VERSIONS, default="3_culture_10", help="which split"
    )


if __name__ == "__main__":
    main(SOURCE, convert, _options)
