"""PhilEO Bench -> chip folders: roads, buildings or land cover, with few labels.

    python data_scripts/phileo_bench.py --from DIR --root data --label roads --n-shot 50

Sentinel-2, ten bands, 128 x 128 pixels, from 20 places in six buckets of regions.
`--n-shot n` takes n training and a fifth of that validation patches of each bucket, as
the bench does, but nested: the 50 lie in the 100. The test set is upstream's, whole but
for `--subset small`. The bench drops most training patches with hardly any road or
building and keeps them in the test; we keep all.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from command import main
from common import Source, make
from pixels import chip_name, first_of_each, relabel

from geopeft_kit.data import Chip

SOURCE = Source(
    name="phileo_bench",
    title="PhilEO Bench: roads, buildings and land cover from Sentinel-2, 10 bands",
    paper="Fibaek et al. 2024, arXiv 2401.04464",
    home="https://huggingface.co/datasets/PhilEO-community/PhilEO-downstream",
    licence="MIT (data set card)",
    download_mb=0,
    disk_mb=400000,
    steps="Download data/downstream_dataset_patches_npzip.* (a zip split into parts, "
    "which Python cannot read), join and unpack it (zip -s 0 <name>.zip --out all.zip; "
    "unzip all.zip), so that DIR holds <region>..._train_s2.npy, "
    "..._train_label_roads.npy and so on.",
    small="as --n-shot 10, and 20 test patches of each bucket",
    layout="91097luke/phileo-bench, utils/data_protocol.py, utils/load_data.py, README",
)
BUCKETS = {
    "europe": ("europe", "denmark-1", "denmark-2"),
    "east-africa": (
        "east-africa", "tanzania-1", "tanzania-2", "tanzania-3", "tanzania-4",
        "tanzania-5", "uganda-1",
    ),
    "northwest-africa": (
        "eq-guinea", "ghana-1", "egypt-1", "isreal-1", "isreal-2", "nigeria", "senegal",
    ),
    "north-america": ("north-america",),
    "south-america": ("south-america",),
    "japan": ("japan",),
}  # fmt: skip
LABELS = ("roads", "building", "lc")
LAND_COVER = {
    "tree cover": "#006400", "shrubland": "#ffbb22", "grassland": "#ffff4c",
    "cropland": "#f096ff", "built-up": "#fa0000", "bare or sparse": "#b4b4b4",
    "snow or ice": "#f0f0f0", "permanent water": "#0064c8", "wetland": "#0096a0",
    "mangroves": "#00cf75", "moss": "#fae6a0",
}  # fmt: skip
CODES = dict(zip((10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 100), range(11), strict=True))
BANDS = ("B02", "B03", "B04", "B08", "B05", "B06", "B07", "B8A", "B11", "B12")


def opened(path: Path) -> np.ndarray:
    """An array on the disk, (N, H, W, C), read only where it is looked at."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise RuntimeError(
            f"{path} cannot be read: {error}. Unpack it again."
        ) from error
    if array.ndim != 4:
        raise ValueError(f"{path} has the shape {array.shape}; expected (N, H, W, C).")
    return array


def patches(folder: Path, bucket: str, split: str) -> list[tuple[Path, int]]:
    """(file, position) of every patch of a bucket."""
    paths = [
        path
        for region in BUCKETS[bucket]
        for path in sorted(folder.glob(f"{region}*{split}_s2.npy"))
    ]
    return [(path, i) for path in paths for i in range(len(opened(path)))]


def count_of(split: str, subset: str, n_shot: int | None) -> int | None:
    """Patches of each bucket, None for all."""
    if subset == "small":
        n_shot = min(n_shot or 10, 10)
    if split == "test":
        return 20 if subset == "small" else None
    if n_shot is None:
        return None
    return n_shot if split == "train" else math.ceil(0.2 * n_shot)


def read_chips(
    folder: Path, subset: str, label: str, n_shot: int | None
) -> Iterator[Chip]:
    """The patches of all buckets."""
    for bucket in BUCKETS:
        for split in ("train", "val", "test"):
            chosen = patches(folder, bucket, split)
            count = count_of(split, subset, n_shot)
            if count is not None:
                chosen = first_of_each(chosen, None, count)
            for path, position in chosen:
                yield read_patch(path, position, label, split, bucket)


def read_patch(path: Path, position: int, label: str, split: str, bucket: str) -> Chip:
    """One patch; a first channel with the scene classification is left out."""
    image = np.moveaxis(opened(path)[position], -1, 0)
    if len(image) not in (10, 11):
        raise ValueError(f"{path} has {len(image)} channels; expected 10 or 11.")
    truth = path.with_name(path.name.replace("_s2.npy", f"_label_{label}.npy"))
    mask = np.asarray(opened(truth)[position][..., 0])
    if label == "lc":
        mask = relabel(mask, CODES, str(truth))
    else:
        mask = mask.astype(np.float32) / 100
    name = chip_name(f"{path.name.removesuffix('_s2.npy')}_{position:05d}")
    tile = path.name.rsplit(f"_{split}", 1)[0]
    return Chip(
        name, image[-10:], mask, region=bucket, split=split, extra={"scene": tile}
    )


def convert(
    source: Path | str | None,
    root: Path | str = "data",
    subset: str = "full",
    overwrite: bool = False,
    label: str = "roads",
    n_shot: int | None = None,
) -> Path:
    """Make the chip folder.

    Args:
        source: Folder with the .npy files.
        root: Where the chip folder is made.
        subset: "full" or "small".
        overwrite: Make it again where it stands.
        label: "roads" or "building" (share of a pixel, 0-1), or "lc" (land cover).
        n_shot: Training patches of each bucket; None takes all.

    Returns:
        The chip folder.
    """
    if label not in LABELS:
        raise ValueError(f"label is {label!r}; allowed are {', '.join(LABELS)}.")
    if n_shot is not None and n_shot < 1:
        raise ValueError(f"n_shot is {n_shot}; it must be 1 or more.")
    info = {
        "name": f"PhilEO Bench, {label}",
        "task": "segmentation" if label == "lc" else "regression",
        "bands": BANDS,
        "classes": list(LAND_COVER) if label == "lc" else (),
        "colours": list(LAND_COVER.values()) if label == "lc" else (),
        "scale": 1e-4,
        "notes": "Shares of roads and buildings were divided by 100. Regions are the "
        "bench's buckets. Patches have no georeference.",
    }
    name = f"phileo_{label}" + (f"_{n_shot}_shot" if n_shot else "")
    needs: list[str] = []
    if source is not None and not any(Path(source).glob("*_s2.npy")):
        needs = ["*_s2.npy"]  # not there: says how to get them
    return make(
        SOURCE, source, root, info, read_chips, None, needs, subset, overwrite, name,
        label=label, n_shot=n_shot,
    )  # fmt: skip


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--label", choices=LABELS, default="roads", help="which label")
    parser.add_argument(
        "--n-shot",
        type=int,
        default=None,
        metavar="N",
        help="training patches of each bucket, nested (default: all)",
    )


if __name__ == "__main__":
    main(SOURCE, convert, _options)
