"""TerraMesh samples -> a chip folder: Sentinel-2 L2A (12 bands) and land cover.

    python data_scripts/terramesh.py --root data [--chip 32 --buffer 32]

Five places in five countries, 224 x 224 pixels at 10 m. Whole chips are for
multispectral input and maps; with `--chip`, windows are cut inside each place and split
from left to right, with a gap between train, val and test. Five places cannot support
a claim about unseen regions: do not rank methods by country.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from archives import File
from command import main
from common import Source, make
from pixels import cut, read_raster

from geopeft_kit.data import Chip

SOURCE = Source(
    name="terramesh",
    title="TerraMesh samples: five places, Sentinel-2 L2A and land cover at 10 m",
    paper="Blumenstiel et al. 2025, arXiv 2504.11172",
    home="https://github.com/IBM/terramind, folder examples",
    licence="CC-BY-SA-4.0 (data set card of TerraMesh): attribute, and share alike",
    download_mb=6,
    disk_mb=3,
    small="the same as full: there are five chips",
    layout="the folder examples of IBM/terramind",
)
URL = (
    "https://raw.githubusercontent.com/IBM/terramind/"
    "8090b5cf93fa3d292729f3ef3b28d3c2a2b36d58/examples"
)
# Sample -> place, SHA-256 of its S2L2A file, SHA-256 of its LULC file.
PLACES = {
    "282D_485L_3_3": (
        "brazil",
        "40cf54f662894a42c205876162e796275bfdf614b61905517826ee1b6f7e0d65",
        "70a0419f577f1985109672e62988a0731ac4849b8c0a95888e86947f34107484",
    ),
    "38D_378R_2_3": (
        "tanzania",
        "c31f749d89c5bec772204aa1d0436a490b1a14ead7a152b66884fc247055acdc",
        "851557ab2378629dc2969e0654e11016b86aca325de356f46ebf3e2d8f3ca136",
    ),
    "433D_629L_3_1": (
        "chile",
        "b8a74c697b07aed11bfe4328329ee7390f246d390d99172485d63d6f04863dd7",
        "1572be0b14a2c219040b1acf7a6aa81ca9a9b497448d425146d484ad024bb0c6",
    ),
    "609U_541L_3_0": (
        "canada",
        "8a7a222ddf4f64faa8859bd2ac8d22841475f7296045450f3de46b65244a712d",
        "237c6395ed646195e51895fbbbd656bb2751c181e4067e93274f93f7cead90a2",
    ),
    "637U_59R_1_3": (
        "denmark",
        "10f6b77cae3a9810266ebaf2233eecd8948670da2d8bc12de7a85fc1c229678d",
        "bcc7286222fea58784e6ca9ccf49f4e5a6cb9db1fd450d0e1d89624d539b2ead",
    ),
}
# Values of this sample carry the +1000 of Sentinel-2's processing baseline 04.00, which
# the others do not: its darkest pixel is 969, and every band's first percentile is
# above 1100, over water and forest too. Taken off here, so that one scale fits all.
CARRIES_1000 = ("433D_629L_3_1",)
# ESRI land cover, from value 1 on; 0 means no data.
CLASSES = {
    "water": "#1a5bab",
    "trees": "#358221",
    "flooded vegetation": "#87d19e",
    "crops": "#ffdb5c",
    "built": "#ed022a",
    "bare": "#ede9e4",
    "snow or ice": "#f2faff",
    "cloud": "#c8c8c8",
    "rangeland": "#c6ad8d",
}
SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}  # of the width that the gaps leave


INFO = {
    "name": "TerraMesh samples",
    "task": "segmentation",
    "bands": "sentinel2_l2a",
    "classes": list(CLASSES),
    "colours": list(CLASSES.values()),
    "scale": 1e-4,
    "notes": "Land cover 1-9 became 0-8, and 0 became 255 (no label). 1000 was taken "
    f"off {', '.join(CARRIES_1000)} (Chile), which carries the offset of processing "
    "baseline 04.00. Canada's land cover is one class.",
}


def files(
    folder: Path, subset: str, chip: int | None, buffer: int | None
) -> Iterator[File]:
    """Two files a place; their SHA-256 were computed from them."""
    for sample, (_, image, mask) in PLACES.items():
        for layer, sha256 in (("S2L2A", image), ("LULC", mask)):
            name = f"{layer}/{sample}.tif"
            yield File(f"{URL}/{name}", name, sha256=sha256)


def read_pair(folder: Path, sample: str) -> tuple[np.ndarray, np.ndarray, dict]:
    """Image (12, H, W), mask (H, W) from 0 with 255 for none, and the georeference."""
    image, place = read_raster(folder / "S2L2A" / f"{sample}.tif")
    cover = read_raster(folder / "LULC" / f"{sample}.tif")[0][0]
    if cover.shape != image.shape[1:]:
        raise ValueError(
            f"{sample}: land cover is {cover.shape}, the image "
            f"{image.shape[1:]} pixels."
        )
    if sample in CARRIES_1000:
        image = np.maximum(image - 1000, 0)
    mask = np.where(cover == 0, 255, cover.astype(np.int16) - 1)
    return image.astype(np.uint16), mask, place


def strips(width: int, size: int, buffer: int) -> dict[str, tuple[int, int]]:
    """First and last column of train, val and test, with gaps of `buffer` between.

    Args:
        width: Of the chip in pixels.
        size: Of a window.
        buffer: Width of a gap in pixels.

    Returns:
        Split -> (left, right), each wide enough for a window.
    """
    left, found = 0, {}
    usable = width - 2 * buffer
    for split, share in SHARES.items():
        wide = max(size, int(share * usable) // size * size)
        found[split] = (left, left + wide)
        left += wide + buffer
    if left - buffer > width:
        raise ValueError(
            f"windows of {size} pixels with gaps of {buffer} do not fit three times "
            f"into {width} pixels. Choose a smaller --chip or --buffer."
        )
    return found


def read_chips(
    folder: Path, subset: str, chip: int | None, buffer: int | None
) -> Iterator[Chip]:
    """Whole chips, or the windows of each."""
    there = sorted(p.stem for p in (folder / "S2L2A").glob("*.tif"))
    unknown = [name for name in there if name not in PLACES]
    if unknown or not there:
        what = f"{unknown[0]!r}, which is no sample" if unknown else "no images"
        raise ValueError(
            f"{folder / 'S2L2A'} holds {what}; known are {', '.join(PLACES)}."
        )
    for sample in there:
        image, mask, place = read_pair(folder, sample)
        scene = {"scene": sample}
        whole = Chip(
            sample, image, mask, region=PLACES[sample][0], extra=scene, **place
        )
        if chip is None:
            yield whole
            continue
        spans = strips(mask.shape[1], chip, buffer or 0)
        for split, span in spans.items():
            whole.split = split
            yield from cut(whole, chip, *span)


def convert(
    source: Path | str | None,
    root: Path | str = "data",
    subset: str = "full",
    chip: int | None = None,
    buffer: int = 32,
    overwrite: bool = False,
) -> Path:
    """Make the chip folder.

    Args:
        source: Folder with S2L2A and LULC; None downloads.
        root: Where the chip folder is made.
        subset: "full" or "small", the same here: there are five chips.
        chip: Side of the windows to cut in pixels; None keeps the chips whole.
        buffer: Gap in pixels between train, val and test inside a chip.
        overwrite: Make it again where it stands.

    Returns:
        The chip folder.
    """
    if chip is not None and (chip < 8 or buffer < 0):
        raise ValueError(
            f"chip is {chip} and buffer {buffer}; chip must be 8 or more, "
            "buffer 0 or more."
        )
    return make(
        SOURCE, source, root, INFO, read_chips, files, ["S2L2A", "LULC"], subset,
        overwrite, chip=chip, buffer=buffer if chip else None,
    )  # fmt: skip


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--chip",
        type=int,
        default=None,
        metavar="PIXELS",
        help="cut windows of this side (default: whole chips)",
    )
    parser.add_argument(
        "--buffer",
        type=int,
        default=32,
        metavar="PIXELS",
        help="gap between train, val and test windows (default: 32)",
    )


if __name__ == "__main__":
    main(SOURCE, convert, _options)
