"""Sen1Floods11, hand-labelled -> a chip folder for segmentation: water or not.

    python data_scripts/sen1floods11.py --root data

Sentinel-2 L1C (13 bands) over floods in eleven places. The split is the official one as
the PEFT study uses it: 252 / 89 / 90 chips of ten places, and the 15 chips of Bolivia
apart, in a split of their own, as the unseen region. Evaluate there with
`gk.evaluate(model, data, split="bolivia")`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from archives import File
from command import main
from common import STUDY, Source, make, read_names
from pixels import first_of_each, read_mask, read_raster

from geopeft_kit.data import Chip

SOURCE = Source(
    name="sen1floods11",
    title="Sen1Floods11: 446 hand-labelled Sentinel-2 chips of 512 x 512 pixels",
    paper="Bonafilia et al. 2020, doi 10.1109/CVPRW50498.2020.00113",
    home="https://github.com/cloudtostreet/Sen1Floods11, bucket gs://sen1floods11",
    licence="its catalogue says 'proprietary'; public for research",
    download_mb=None,
    disk_mb=3300,
    steps="gsutil -m rsync -r gs://sen1floods11/v1.1 DIR/v1.1, and put the study's "
    f"four lists ({STUDY}/sen1floods11) into DIR; then --from DIR.",
    small="10 training, 4 validation and 4 test chips of each place, all of Bolivia",
    layout="the data set class of IBM/peft-geofm, src/peft_geofm/datasets",
)
URL = "https://storage.googleapis.com/sen1floods11"
HAND = "v1.1/data/flood_events/HandLabeled"
DATES = "v1.1/Sen1Floods11_Metadata.geojson"
# Split -> the study's list and its SHA-256, computed from the list.
LISTS = {
    "train": (
        "train_data.txt",
        "899ee084e400fefdbe139a52aa3d292072edea4c3695afcc5a5a0383af5ff69d",
    ),
    "val": (
        "valid_data.txt",
        "45eca7a5b701ac3e8f8b2fd5a52ab443cf6be0d3649116a867fc2c1fdbad1541",
    ),
    "test": (
        "test_data.txt",
        "b707770200485f909f8e0afcfb06b43cf9137ebca7b09460797a828effb9b42e",
    ),
    "bolivia": (
        "bolivia_data.txt",
        "6b8239d95214af1c9ecfb70dec058872e7dcf831591bff80ff4d61a643e06434",
    ),
}
SMALL = {"train": 10, "val": 4, "test": 4, "bolivia": 15}  # chips of each place
INFO = {
    "name": "Sen1Floods11",
    "task": "segmentation",
    "bands": "sentinel2_l1c",
    "classes": ["not water", "water"],
    "colours": ["#d8b365", "#2166ac"],
    "scale": 1e-4,
    "notes": "Upstream's -1 (no data, cloud) became 255. The date is that of the "
    "place's Sentinel-2 image in upstream's metadata, which calls Mekong Cambodia.",
}


def place_of(name: str) -> str:
    """The flood that a chip shows: "Spain" of "Spain_7370579"."""
    return name.partition("_")[0]


def choose(folder: Path, subset: str) -> Iterator[tuple[str, str]]:
    """(split, chip name) of the subset."""
    for split, (listed, _) in LISTS.items():
        names = read_names(folder / listed)
        if subset == "small":
            names = first_of_each(names, place_of, SMALL[split])
        yield from ((split, name) for name in names)


def files(folder: Path, subset: str) -> Iterator[File]:
    """The lists, the dates, and two files a chip."""
    for name, sha256 in LISTS.values():
        yield File(f"{STUDY}/sen1floods11/{name}", name, sha256=sha256)
    yield File(f"{URL}/{DATES}", DATES)
    for _, name in choose(folder, subset):
        for kind in ("S2Hand", "LabelHand"):
            path = f"{HAND}/{kind}/{name}_{kind}.tif"
            yield File(f"{URL}/{path}", path)


def file_of(folder: Path, name: str, kind: str) -> Path:
    """A file of a chip: in upstream's own folders, or right in the folder."""
    flat = folder / f"{name}_{kind}.tif"
    return flat if flat.is_file() else folder / HAND / kind / flat.name


def read_dates(folder: Path) -> dict[str, str]:
    """Date of the Sentinel-2 image of each place, where the metadata are there."""
    if not (folder / DATES).is_file():
        return {}
    table = json.loads((folder / DATES).read_text(encoding="utf-8"))
    rows = [feature["properties"] for feature in table["features"]]
    dates = {row["location"]: row["s2_date"] for row in rows}
    return {("Mekong" if k == "Cambodia" else k): v for k, v in dates.items()}


def read_chips(folder: Path, subset: str) -> Iterator[Chip]:
    """The chips of all splits."""
    dates = read_dates(folder)
    for split, name in choose(folder, subset):
        pixels, place = read_raster(file_of(folder, name, "S2Hand"))
        mask = file_of(folder, name, "LabelHand")
        yield Chip(
            name,
            pixels,
            read_mask(mask, {-1: 255, 0: 0, 1: 1}),
            region=place_of(name),
            split=split,
            date=dates.get(place_of(name)),
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
        source: Folder with the four lists and upstream's `v1.1`, or the chips' files
            themselves; None downloads.
        root: Where the chip folder is made.
        subset: "full" or "small".
        overwrite: Make it again where it stands.

    Returns:
        The chip folder.
    """
    needs = [name for name, _ in LISTS.values()]
    return make(SOURCE, source, root, INFO, read_chips, files, needs, subset, overwrite)


if __name__ == "__main__":
    main(SOURCE, convert)
