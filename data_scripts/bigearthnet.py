"""BigEarthNet v2 (reBEN) -> chip folders: 1 % and 10 % of it, or reBEN-7k.

    python data_scripts/bigearthnet.py --root data --share 0.01
    python data_scripts/bigearthnet.py --root data --reben-7k

With `--share` the 19 labels of a patch are the target, as in GFM's experiments, and the
share is nested: the 1 % lie in the 10 %. With `--reben-7k` the land-cover map is the
target, in the PEFT study's lists: 4690 / 946 / 945 patches, and the 807 of Austria and
Ireland apart, in a split "ood", as unseen regions.

URLs, MD5s, file names and land-cover codes: torchgeo's `BigEarthNetV2`. The study
counts the same 19 classes in another order.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from archives import File
from command import main
from common import STUDY, Source, make, read_names
from pixels import first_of_each, read_raster, relabel

from geopeft_kit.data import Chip

SOURCE = Source(
    name="bigearthnet",
    title="BigEarthNet v2 (reBEN): Sentinel-2 patches of 120 x 120 pixels, 12 bands",
    paper="Clasen et al. 2024, arXiv 2407.03653",
    home="https://bigearth.net, by the copy of torchgeo on Hugging Face",
    licence="CDLA-Permissive-1.0 (the data set's own page; not verified here)",
    download_mb=None,
    disk_mb=190000,
    steps="Put BigEarthNet-S2, metadata.parquet and (for --reben-7k) Reference_Maps, "
    f"or their archives, into DIR, and the study's lists ({STUDY}/reBEN/reBEN_7k); "
    "then --from DIR. The archives need some 130 GB while they are unpacked.",
    small="a hundredth of each split and country (of reBEN-7k: a tenth)",
    layout="torchgeo 0.8.1, BigEarthNetV2",
)
# SHA-256 of the study's lists, computed from them.
LISTS = {
    "train": "74a32f633a67e33688d89c2b2518f1c3c483f32b891325d905cac69246da83d7",
    "val": "9aaf30c26a8df5b7705199739294f0ceedd1a073db2dbed0070715be9f974fe5",
    "test": "c0460af179f8ceb77a5ccf78d49fe0dd63d80d41197d1b40cdd99a70fc2f69fc",
    "ood": "c9964324e839eb4a1f89e86fecd59958d3490e2a15686b73966a423c47bc51cf",
}
BANDS = ("01", "02", "03", "04", "05", "06", "07", "08", "8A", "09", "11", "12")
SPLITS = {"train": "train", "validation": "val", "test": "test"}
# Land cover of CORINE that the 19 classes leave out.
UNLABELLED = (
    122, 123, 124, 131, 132, 133, 141, 142, 332, 334, 335, 423, 999,
)  # fmt: skip


def files(
    folder: Path, subset: str, reben_7k: bool = False, share: float = 0.01
) -> Iterator[File]:
    """The metadata, the images and, for reBEN-7k, the maps and the lists."""
    from torchgeo.datasets import BigEarthNetV2  # slow to import, so only here

    for key in ("metadata", "s2", *(["maps"] if reben_7k else [])):
        parts = BigEarthNetV2.metadata_locs[key]["files"]
        for number, (name, md5) in enumerate(parts.items(), 1):
            last = number == len(parts) and key != "metadata"
            earlier = tuple(parts)[:-1] if last else ()
            url = BigEarthNetV2.url.format(name)
            yield File(url, name, md5=md5, unpack=last, after=earlier)
    if reben_7k:
        for split, sha256 in LISTS.items():
            url = f"{STUDY}/reBEN/reBEN_7k/{split}.txt"
            yield File(url, f"{split}.txt", sha256=sha256)


def choose(folder: Path, subset: str, reben_7k: bool, share: float) -> pd.DataFrame:
    """The rows of the metadata that are wanted; `split` says where each belongs."""
    table = pd.read_parquet(folder / "metadata.parquet").set_index("patch_id")
    if reben_7k:
        split = pd.Series(
            {n: s for s in LISTS for n in read_names(folder / f"{s}.txt")}
        )
        missing = split.index.difference(table.index)
        if len(missing):
            raise ValueError(f"metadata.parquet has no patch {missing[0]!r}.")
        table = table.loc[split.index].assign(split=split)
        share = 0.1 if subset == "small" else 1.0
    else:
        table = table.assign(split=table["split"].map(SPLITS)).sort_index()
        share *= 0.01 if subset == "small" else 1.0
    groups = [*zip(table["split"], table["country"], strict=True)]
    rows = first_of_each(
        range(len(table)), groups.__getitem__, lambda n: round_up(n * share)
    )
    return table.iloc[rows]


def round_up(number: float) -> int:
    """The next whole number, unless rounding error alone is above one."""
    return int(np.ceil(number - 1e-9))


def patch_file(folder: Path, patch: str, rest: str) -> Path:
    """A file of a patch, in the folder of its tile."""
    return folder / patch.rsplit("_", 2)[0] / patch / f"{patch}_{rest}.tif"


def read_chips(
    folder: Path, subset: str, reben_7k: bool = False, share: float = 0.01
) -> Iterator[Chip]:
    """The patches; coarser bands are resampled to 120 pixels as torchgeo does."""
    from torchgeo.datasets import BigEarthNetV2

    codes = BigEarthNetV2.clc_codes | dict.fromkeys(UNLABELLED, 255)
    for patch, row in choose(folder, subset, reben_7k, share).iterrows():
        path = patch_file(folder / "BigEarthNet-S2", patch, "B02")
        blue, place = read_raster(path)
        bands = []
        for band in BANDS:
            file = path.with_name(f"{patch}_B{band}.tif")
            bands.append(read_raster(file, blue.shape[1:], "bilinear")[0])
        mask = None
        if reben_7k:
            path = patch_file(folder / "Reference_Maps", patch, "reference_map")
            mask = relabel(read_raster(path)[0][0], codes, str(path))
        yield Chip(
            patch,
            np.concatenate(bands),
            mask,
            None if reben_7k else list(row["labels"]),
            region=row["country"],
            split=row["split"],
            date=patch.split("_")[2][:8],
            **place,
        )


def convert(
    source: Path | str | None,
    root: Path | str = "data",
    subset: str = "full",
    overwrite: bool = False,
    reben_7k: bool = False,
    share: float = 0.01,
) -> Path:
    """Make the chip folder.

    Args:
        source: Folder with BigEarthNet-S2 and metadata.parquet, and for reBEN-7k
            Reference_Maps and the study's lists, or the archives; None downloads.
        root: Where the chip folder is made.
        subset: "full" or "small".
        overwrite: Make it again where it stands.
        reben_7k: The PEFT study's segmentation set, in place of a share.
        share: Part of each split and country that is taken.

    Returns:
        The chip folder.
    """
    from torchgeo.datasets import BigEarthNetV2

    if not 0 < share <= 1:
        raise ValueError(f"share is {share}; it must be above 0 and at most 1.")
    info = {
        "name": "reBEN-7k" if reben_7k else "BigEarthNet v2",
        "task": "segmentation" if reben_7k else "multilabel",
        "bands": "sentinel2_l2a",
        "classes": list(BigEarthNetV2.class_set),
        "colours": [BigEarthNetV2.clc_colors[c] for c in BigEarthNetV2.class_set],
        "scale": 1e-4,
        "notes": "Regions are countries. Bands of 20 and 60 m were resampled to 10 m, "
        "bilinear. Land cover outside the 19 classes became 255.",
    }
    needs = ["metadata.parquet", "BigEarthNet-S2"]
    if reben_7k:
        needs += ["Reference_Maps", *(f"{split}.txt" for split in LISTS)]
    name = "reben_7k" if reben_7k else f"bigearthnet_{100 * share:g}pct"
    described = replace(SOURCE, disk_mb=2700 if reben_7k else SOURCE.disk_mb * share)
    return make(
        described, source, root, info, read_chips, files, needs, subset, overwrite,
        name, reben_7k=reben_7k, share=share,
    )  # fmt: skip


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--reben-7k",
        action="store_true",
        help="the PEFT study's segmentation set (Austria and Ireland apart)",
    )
    parser.add_argument(
        "--share",
        type=float,
        default=0.01,
        help="part of each split and country, nested (default: 0.01)",
    )


if __name__ == "__main__":
    main(SOURCE, convert, _options)
