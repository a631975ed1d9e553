"""The public parts of GeoPile -> chip folders of pictures for pretraining.

    python data_scripts/geopile.py --root data --part patternnet

GFM's GeoPile has five parts. PatternNet and RESISC45 are fetched; MLRSNet and RSD46-WHU
have to be got by hand; its 300,000 NAIP images are published as a whole only on the
authors' shared drive (README of mmendiet/GFM), so they are not here. All pictures go to
the split "train", with their class as label.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from archives import File
from command import main
from common import Source, make
from scenes import BRIGHTNESS, BRIGHTNESS_NOTE, class_chips

from geopeft_kit.data import Chip

SOURCE = Source(
    name="geopile",
    title="GeoPile, public parts: PatternNet, RESISC45, MLRSNet, RSD46-WHU (RGB)",
    paper="Mendieta et al. 2023, arXiv 2302.04476; each part has a paper of its own",
    home="https://github.com/mmendiet/GFM",
    licence="each part's own; none is stated for most. Read them before you share",
    download_mb=None,
    disk_mb=6200,
    steps="MLRSNet: https://data.mendeley.com/datasets/7j9bv9vwsx, so that DIR holds "
    "MLRSNet/Images/<class>. RSD46-WHU: github.com/RSIA-LIESMARS-WHU/RSD46-WHU, so "
    "that DIR holds RSD46-WHU/<class>. Then --from DIR.",
    small="20 pictures of each class",
    layout="torchgeo 0.8.1, PatternNet and RESISC45; one folder a class for the others",
)
PARTS = {
    "patternnet": "PatternNet/images",
    "resisc45": "NWPU-RESISC45",
    "mlrsnet": "MLRSNet/Images",
    "rsd46_whu": "RSD46-WHU",
}


def files(folder: Path, subset: str, part: str) -> Iterator[File]:
    """One archive, for two of the parts."""
    from torchgeo.datasets import RESISC45, PatternNet  # slow to import, so only here

    known = {"patternnet": PatternNet, "resisc45": RESISC45}
    if part in known:
        upstream = known[part]
        yield File(upstream.url, upstream.filename, md5=upstream.md5, unpack=True)


def classes_of(folder: Path, part: str) -> list[str]:
    """The names of the folders, sorted."""
    return sorted(p.name for p in (folder / PARTS[part]).iterdir() if p.is_dir())


def read_chips(folder: Path, subset: str, part: str) -> Iterator[Chip]:
    """The pictures of all classes."""
    small = 20 if subset == "small" else None
    names = classes_of(folder, part)
    yield from class_chips(folder / PARTS[part], names, 1.0, small, size=256)


def convert(
    source: Path | str | None,
    root: Path | str = "data",
    subset: str = "full",
    overwrite: bool = False,
    part: str = "patternnet",
) -> Path:
    """Make the chip folder.

    Args:
        source: Folder with the part or its archive; None downloads.
        root: Where the chip folder is made.
        subset: "full" or "small".
        overwrite: Make it again where it stands.
        part: One of `PARTS`.

    Returns:
        The chip folder.
    """
    if part not in PARTS:
        raise ValueError(f"part is {part!r}; allowed are {', '.join(PARTS)}.")

    def info(folder: Path) -> dict[str, Any]:
        return {
            "name": f"GeoPile: {part}",
            "task": "classification",
            "classes": classes_of(folder, part),
            "notes": f"{BRIGHTNESS_NOTE}Other sizes were resampled to 256 x 256.",
            **BRIGHTNESS,
        }

    by_hand = part in ("mlrsnet", "rsd46_whu")
    described = replace(
        SOURCE, name=f"geopile_{part}", download_mb=0 if by_hand else None
    )
    return make(
        described, source, root, info, read_chips, files, [PARTS[part]], subset,
        overwrite, part=part,
    )  # fmt: skip


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--part", choices=PARTS, default="patternnet", help="which")


if __name__ == "__main__":
    main(SOURCE, convert, _options)
