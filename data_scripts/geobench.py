"""GEO-Bench 1.0 -> chip folders: one data set of the benchmark at a time.

    python data_scripts/geobench.py --from DIR --root data --dataset m-cashew-plant

Splits are GEO-Bench's `default` partition. Each sample is an HDF5 file, read by h5py;
labels that it pickles are read without loading the pickle. Two known faults of the
published files are put right: the bands of m-brick-kiln and of m-eurosat are not those
that the files name (issues 29 and 28 of its repository).
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from command import main
from common import Source, make
from hdf5 import open_hdf5, pickled_label
from pixels import chip_name, first_of_each

from geopeft_kit.bands import SENSORS
from geopeft_kit.data import Chip

SOURCE = Source(
    name="geobench",
    title="GEO-Bench 1.0: small benchmark sets for Earth monitoring",
    paper="Lacoste et al. 2023, arXiv 2306.03831",
    home="https://huggingface.co/datasets/recursix/geo-bench-1.0",
    licence="CC-BY-SA-4.0 (data set card); the parts have licences of their own",
    download_mb=0,
    disk_mb=10000,
    steps="Fetch it with GEO-Bench's own tool (pip install geobench; geobench-download)"
    " into $GEO_BENCH_DIR, and pass the folder that holds "
    "<dataset>/default_partition.json (classification_v1.0 or segmentation_v1.0) as "
    "--from DIR.",
    small="a tenth of each split",
    layout="ServiceNow/geo-bench (dataset.py, converters) and TerraTorch's m_* classes",
)


@dataclass(frozen=True)
class Part:
    """One data set of the benchmark.

    Attributes:
        bands: Of the files' bands in the order of their sorted names; None drops one.
        classes: In the order of their numbers.
        task: "segmentation" or "classification".
        scale: Reflectance of one stored unit.
        notes: Traps.
    """

    bands: tuple[str | None, ...]
    classes: tuple[str, ...]
    task: str = "classification"
    scale: float = 1e-4
    notes: str = ""


_L2A_CLOUD = (*SENSORS["sentinel2_l2a"], None)  # the last is the cloud probability
PARTS = {
    "m-cashew-plant": Part(
        _L2A_CLOUD,
        ("no data", "well-managed plantation", "poorly-managed plantation",
         "non-plantation", "residential", "background", "uncertain"),
        "segmentation",
        notes="Class 0 is 'no data' and counts as a class, as in the PEFT study.",
    ),
    "m-SA-crop-type": Part(
        _L2A_CLOUD,
        ("no data", "lucerne/medics", "planted pastures (perennial)", "fallow",
         "wine grapes", "weeds", "small grain grazing", "wheat", "canola", "rooibos"),
        "segmentation",
        scale=1 / 255,
        notes="Values reach about 100 to 255: 8 bits, taken as brightness by / 255; "
        "upstream does not say what they mean. Class 0 is 'no data' and counts.",
    ),
    "m-brick-kiln": Part(
        ("B01", "B02", "B03", "B04", "B05", "B07", "B8A", "B08", "B11", "B12",
         None, None, None),
        ("not a brick kiln", "brick kiln"),
        notes="The files name 13 Sentinel-2 bands; what they hold are these ten and "
        "three of a true-colour picture, which are left out (geo-bench issue 29).",
    ),
    "m-forestnet": Part(
        ("BLUE", "GREEN", "RED", "NIR_NARROW", "SWIR_1", "SWIR_2"),
        ("oil palm plantation", "timber plantation", "other large-scale plantations",
         "grassland shrubland", "small-scale agriculture",
         "small-scale mixed plantation", "small-scale oil palm plantation", "mining",
         "fish pond", "logging", "secondary forest", "other"),
        scale=1 / 255,
        notes="Landsat 8 as 8-bit pictures: brightness by / 255, no reflectance. The "
        "infrared bands are named by the files; upstream does not document them.",
    ),
    "m-eurosat": Part(
        ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B09", "B10", "B11",
         "B12", "B8A"),
        ("AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial",
         "Pasture", "PermanentCrop", "Residential", "River", "SeaLake"),
        notes="The files name B8A ninth; it stands last (geo-bench issue 28).",
    ),
}  # fmt: skip
SPLITS = {"train": "train", "valid": "val", "test": "test"}


def read_sample(
    path: Path, part: Part
) -> tuple[np.ndarray, np.ndarray | int, str | None]:
    """Image (C, H, W), mask (H, W) or label, and the date that the band names carry."""
    with open_hdf5(path) as file:
        names = sorted(key for key in file if key != "label")
        if len(names) != len(part.bands):
            raise ValueError(
                f"{path} holds {len(names)} bands; expected {len(part.bands)}."
            )
        kept = [n for n, band in zip(names, part.bands, strict=True) if band]
        image = np.stack([file[name][()] for name in kept])
        dates = re.search(r"\d{4}-\d{2}-\d{2}", names[0])
        if part.task == "segmentation":
            target: np.ndarray | int = file["label"][()]
        else:
            target = pickled_label(str(file.attrs["pickle"]), path)
    return image, target, dates.group() if dates else None


def read_chips(folder: Path, subset: str, dataset: str) -> Iterator[Chip]:
    """The samples of all splits, in the order of the partition."""
    part, home = PARTS[dataset], folder / dataset
    partition = json.loads((home / "default_partition.json").read_text("utf-8"))
    for split, name in SPLITS.items():
        names = partition[split]
        if subset == "small":
            names = first_of_each(names, None, lambda n: -(-n // 10))
        for sample in names:
            image, target, date = read_sample(home / f"{sample}.hdf5", part)
            found = re.fullmatch(r"-?[\d.]+_-?[\d.]+_(\d{4})_(\d{2})_(\d{2})", sample)
            segmented = part.task == "segmentation"
            yield Chip(
                chip_name(f"{split}_{sample}"),
                image,
                mask=target if segmented else None,
                label=None if segmented else target,
                split=name,
                date="-".join(found.groups()) if found else date,
            )


def convert(
    source: Path | str | None,
    root: Path | str = "data",
    subset: str = "full",
    overwrite: bool = False,
    dataset: str = "m-cashew-plant",
) -> Path:
    """Make the chip folder.

    Args:
        source: Folder that holds `<dataset>/default_partition.json`.
        root: Where the chip folder is made.
        subset: "full" or "small".
        overwrite: Make it again where it stands.
        dataset: One of `PARTS`.

    Returns:
        The chip folder.
    """
    if dataset not in PARTS:
        raise ValueError(f"dataset is {dataset!r}; allowed are {', '.join(PARTS)}.")
    part = PARTS[dataset]
    info = {
        "name": f"GEO-Bench {dataset}",
        "task": part.task,
        "bands": [band for band in part.bands if band],
        "classes": part.classes,
        "scale": part.scale,
        "notes": part.notes,
    }
    name = dataset.replace("-", "_").lower()
    return make(
        replace(SOURCE, name=name), source, root, info, read_chips, None,
        [f"{dataset}/default_partition.json"], subset, overwrite, dataset=dataset,
    )  # fmt: skip


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dataset", choices=PARTS, default="m-cashew-plant", help="which part"
    )


if __name__ == "__main__":
    main(SOURCE, convert, _options)
