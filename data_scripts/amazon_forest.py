"""Amazon forest chips -> a chip folder for segmentation: forest or not, west or east.

    python data_scripts/amazon_forest.py --from DIR --root data

45 labelled Sentinel-2 chips of 512 x 512 pixels between 72.7 and 44.5 degrees west.
They are cut into windows that never cross a chip's border, and the regions "west" and
"east" are told apart at 53.5 degrees west, in a gap of about 100 km between chips.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from command import main
from common import Source, make
from pixels import cut_some, read_raster
from rasterio.transform import array_bounds

from geopeft_kit.data import Chip

SOURCE = Source(
    name="amazon_forest",
    title="Amazon forest: 45 labelled Sentinel-2 RGB chips of 512 x 512 pixels",
    paper="Bragagnolo, da Silva and Grzybowski 2019, Zenodo record 3233081",
    home="https://zenodo.org/records/3233081",
    licence="not verified; read the Zenodo record before you share anything",
    download_mb=0,
    disk_mb=40,
    steps="Download the record from https://zenodo.org/records/3233081 by hand, unpack "
    "it so that DIR holds training/images, training/masks, validation/images and "
    "validation/masks, and pass --from DIR.",
    small="8 windows of each upstream chip",
    layout="the unpacked Zenodo record",
)
FOLDERS = ("training", "validation")
CUT_LONGITUDE = -53.5
SIZES = (64, 128, 256, 512)
SMALL_WINDOWS = 8  # windows of each chip in the small subset
# As for EuroSAT: 8-bit pictures taken as reflectance 0-0.275 stretched to 0-255. The
# colours agree; it is not documented upstream.
SCALE = 2750 / 255 / 10000
INFO = {
    "name": "Amazon forest",
    "task": "segmentation",
    "bands": ("RED", "GREEN", "BLUE"),
    "classes": ["not forest", "forest"],
    "colours": ["#d8b365", "#1b7837"],
    "scale": SCALE,
    "notes": f"Region by longitude of the upstream chip, cut at {CUT_LONGITUDE}. "
    "Upstream masks (1 forest, 2 not forest) became 1 and 0; one, 515 pixels wide, was "
    "squeezed to 512. Stored 8-bit values become reflectance by x 2750 / 255 / 10000, "
    "which upstream does not document.",
}


def find_pairs(folder: Path) -> list[tuple[str, Path, Path]]:
    """(upstream folder, image, mask) of each labelled chip, sorted by name."""
    pairs = []
    for part in FOLDERS:
        for image in sorted((folder / part / "images").glob("*.tif*")):
            mask = folder / part / "masks" / f"{image.stem}.png"
            if not mask.is_file():
                raise FileNotFoundError(
                    f"{image} has no mask {mask}. Unpack the record again."
                )
            pairs.append((part, image, mask))
    if not pairs:
        raise FileNotFoundError(
            f"{folder} holds no images under {' or '.join(FOLDERS)}. {SOURCE.steps}"
        )
    return pairs


def read_mask(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """A mask with 0 not forest, 1 forest; upstream says 1 forest, 2 not forest.

    One upstream mask is 515 pixels wide. It is stretched (against its image, its
    borders drift from 0 pixels at the left to 3 at the right), so it is squeezed back
    by nearest neighbour.
    """
    mask = read_raster(path)[0][0]
    if max(abs(a - b) for a, b in zip(mask.shape, shape, strict=True)) > 5:
        raise ValueError(f"{path} is {mask.shape}, its image {shape}.")
    rows, columns = (
        ((np.arange(to) + 0.5) * of / to).astype(int)
        for of, to in zip(mask.shape, shape, strict=True)
    )
    mask = mask[np.ix_(rows, columns)]
    wrong = sorted(set(np.unique(mask).tolist()) - {1, 2})
    if wrong:
        raise ValueError(f"{path} holds {wrong}; expected 1 (forest), 2 (not forest).")
    return (mask == 1).astype(np.uint8)


def chips_of(
    image: Path, mask: Path | None, size: int, small: bool, **columns: str
) -> Iterator[Chip]:
    """The windows of one upstream chip."""
    scene = f"{columns['upstream']}_{image.name.replace('.tiff', '').replace('.', '_')}"
    pixels, place = read_raster(image)
    west, _, east, _ = array_bounds(*pixels.shape[1:], place["transform"])
    whole = Chip(
        scene,
        pixels,
        mask=None if mask is None else read_mask(mask, pixels.shape[1:]),
        region="west" if (west + east) / 2 < CUT_LONGITUDE else "east",
        extra=columns,
        **place,
    )
    # the same order whatever the subset, so that small lies in full
    yield from cut_some(whole, size, SMALL_WINDOWS if small else None)


def read_chips(
    folder: Path, subset: str, chip: int, with_unlabelled: bool
) -> Iterator[Chip]:
    """The windows of all upstream chips."""
    for part, image, mask in find_pairs(folder):
        yield from chips_of(image, mask, chip, subset == "small", upstream=part)
    if with_unlabelled:
        for image in sorted((folder / "test").glob("*.tif*")):
            yield from chips_of(image, None, chip, subset == "small", upstream="test")


def convert(
    source: Path | str | None,
    root: Path | str = "data",
    subset: str = "full",
    chip: int = 64,
    with_unlabelled: bool = False,
    overwrite: bool = False,
) -> Path:
    """Make the chip folder.

    Args:
        source: Folder with `training` and `validation`, each with images and masks.
        root: Where the chip folder is made.
        subset: "full", or "small": 8 windows of each upstream chip.
        chip: Side of a window in pixels: 64, 128, 256 or 512 (no cutting).
        with_unlabelled: Add the 15 upstream test chips, which have no masks, as
            images without labels.
        overwrite: Make it again where it stands.

    Returns:
        The chip folder.
    """
    if chip not in SIZES:
        raise ValueError(f"chip is {chip}; allowed are {', '.join(map(str, SIZES))}.")
    return make(
        SOURCE, source, root, INFO, read_chips, None, FOLDERS, subset, overwrite,
        chip=chip, with_unlabelled=with_unlabelled,
    )  # fmt: skip


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--chip",
        type=int,
        default=64,
        choices=SIZES,
        help="side of a window in pixels (default: 64)",
    )
    parser.add_argument(
        "--with-unlabelled",
        action="store_true",
        help="add the upstream test images, which have no masks",
    )


if __name__ == "__main__":
    main(SOURCE, convert, _options)
