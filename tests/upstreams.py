"""Miniatures of upstream data sets, in their exact layout, and a server for them.

A builder writes what stands on the disk after download and unpacking; file names,
formats and sidecar lists are those that the script's `SOURCE.layout` documents. `mirror`
packs it into the archives that the script asks for and serves them on 127.0.0.1.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pandas as pd
import pytest
import rasterio
from hub_server import Site
from PIL import Image
from rasterio.transform import from_origin


@dataclass(frozen=True)
class Upstream:
    """One row of the table of data sets.

    Attributes:
        script: Name of the data script.
        build: Writes the unpacked miniature into a folder.
        counts: Chips of each split, as the builder made them.
        archives: Archive -> members of the folder that are in it.
        options: Of `convert`.
        batch: Shape of a batch of two, without the batch axis.
        small: Chips in the small subset.
        by_hand: Nothing can be fetched by a script.
    """

    script: str
    build: Callable[[Path], None]
    counts: Mapping[str, int]
    batch: tuple[int, ...]
    small: int
    archives: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    by_hand: bool = False

    @property
    def id(self) -> str:
        return "-".join([self.script, *map(str, self.options.values())])


@dataclass
class Mirror(Site):
    """Serves the files of a miniature at the paths of their real addresses."""

    files: dict[str, bytes] = field(default_factory=dict)

    def find(self, path: str) -> bytes | None:
        return self.files.get(path)


def mirror(
    site: Mirror, row: Upstream, module: ModuleType, home: Path,
    patch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Point a script at the mirror; checksums that it knows become the miniature's."""
    original = module.files

    def files(folder: Path, *arguments: Any, **options: Any) -> Iterator[Any]:
        for file in original(folder, *arguments, **options):
            split = urlsplit(file.url)
            path = f"/{split.netloc}{split.path}"
            content = pack(row, home, file.name)
            if content is not None:
                site.files[path] = content
            content = content or b""
            yield replace(
                file,
                url=site.root + path,
                md5=file.md5 and hashlib.md5(content).hexdigest(),
                sha256=file.sha256 and hashlib.sha256(content).hexdigest(),
            )

    patch.setattr(module, "files", files)


def pack(row: Upstream, home: Path, name: str) -> bytes | None:
    """A file as upstream serves it: plain, an archive, or half of one."""
    whole = name[:-2] if name.endswith((".gzaa", ".gzab")) else name
    if whole not in row.archives:
        path = home / name
        return path.read_bytes() if path.is_file() else None
    buffer = io.BytesIO()
    members = [home / member for member in row.archives[whole]]
    if whole.endswith(".zip"):
        with zipfile.ZipFile(buffer, "w") as file:
            for path in sorted(p for m in members for p in [m, *m.rglob("*")]):
                file.write(path, path.relative_to(home))
    else:
        with tarfile.open(fileobj=buffer, mode="w:gz") as file:
            for member in members:
                file.add(member, member.relative_to(home), filter=_undated)
    content = buffer.getvalue()
    # gzip notes the time; a mirror that answers twice has to answer the same
    content = content[:4] + bytes(4) + content[8:] if whole.endswith("gz") else content
    if whole == name:
        return content
    alone = f"{whole}ab" not in row.archives.get("parts", (f"{whole}ab",))
    half = len(content) if alone else len(content) // 2
    return content[:half] if name.endswith("aa") else content[half:]


def _undated(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.mtime = 0
    return member


# ---------------------------------------------------------------- pieces


def rng(*parts: object) -> np.random.Generator:
    """Random numbers that depend on a name."""
    return np.random.default_rng(list("/".join(map(str, parts)).encode()))


def stored(name: str, bands: int, size: int, high: int = 4000) -> np.ndarray:
    """(bands, size, size) uint16, different for each name."""
    return rng(name).integers(1, high, (bands, size, size)).astype(np.uint16)


def geotiff(
    path: Path, pixels: np.ndarray, x: float = 0.0, y: float = 0.0,
    pixel: float = 10.0, crs: str | None = "EPSG:32631",
) -> None:  # fmt: skip
    """Write a GeoTIFF whose upper left corner lies x, y east and south of a point."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = pixels if pixels.ndim == 3 else pixels[None]
    place = {"crs": crs, "transform": from_origin(4e5 + x, 5e6 - y, pixel, pixel)}
    if crs == "EPSG:4326":
        place["transform"] = from_origin(x, y, pixel, pixel)
    with rasterio.open(
        path, "w", driver="GTiff", count=pixels.shape[0], height=pixels.shape[1],
        width=pixels.shape[2], dtype=pixels.dtype.name, **(place if crs else {}),
    ) as raster:  # fmt: skip
        raster.write(pixels)


def picture(path: Path, size: int = 16, values: np.ndarray | None = None) -> None:
    """Write a PNG, JPEG or TIFF without a place: RGB noise, or the values given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if values is None:
        values = rng(path.name).integers(0, 255, (size, size, 3))
    Image.fromarray(values.astype(np.uint8)).save(path)


def lines(path: Path, names: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(names) + "\n")


# ---------------------------------------------------------------- the PEFT study


def sen1floods11(
    home: Path, lists: Mapping[str, list[str]] | None = None, size: int = 16
) -> None:
    lists = lists or {
        "train": [f"Ghana_{i}" for i in range(12)] + ["Mekong_1", "Mekong_2"],
        "valid": ["Ghana_20", "Mekong_21"],
        "test": ["Ghana_30", "Mekong_31"],
        "bolivia": ["Bolivia_1", "Bolivia_2"],
    }
    number = 0
    for split, names in lists.items():
        lines(home / f"{split}_data.txt", names)
        for name in names:
            number += 1
            hand = home / "v1.1/data/flood_events/HandLabeled"
            at = {"x": number * 0.1, "y": 5.0, "pixel": 9e-5, "crs": "EPSG:4326"}
            image = stored(name, 13, size).astype(np.int16)
            geotiff(hand / "S2Hand" / f"{name}_S2Hand.tif", image, **at)
            mask = rng(name, "mask").integers(-1, 2, (size, size)).astype(np.int16)
            geotiff(hand / "LabelHand" / f"{name}_LabelHand.tif", mask, **at)
    places = [
        ("Ghana", "2018-09-18"),
        ("Cambodia", "2018-08-05"),
        ("Bolivia", "2018-02-15"),
    ]
    features = [{"properties": {"location": p, "s2_date": d}} for p, d in places]
    text = json.dumps({"type": "FeatureCollection", "features": features})
    (home / "v1.1/Sen1Floods11_Metadata.geojson").write_text(text)


def hls_burn_scars(
    home: Path, lists: Mapping[str, list[str]] | None = None, size: int = 16
) -> None:
    lists = lists or {
        "train": [f"T10SEH.2018{190 + i}.v1" for i in range(6)],
        "val": ["T10TEK.2019275.v1", "T10TEL.2019275.v1"],
        "test": ["T11SKU.2020248.v1", "T11SKU.2020250.v1"],
    }
    for split, names in lists.items():
        lines(home / f"{split}_data.txt", names)
        for number, name in enumerate(names):
            part = home / ("validation" if number % 3 == 0 else "training")
            stem = f"subsetted_512x512_HLS.S30.{name}.4"
            at = {"x": (number + 1) * 2e4, "y": 1e5 * len(split), "pixel": 30}
            image = (stored(name, 6, size) * 1e-4).astype(np.float32)
            image[:, 0, 0] = np.nan
            geotiff(part / f"{stem}_merged.tif", image, **at)
            mask = rng(name, "mask").integers(-1, 2, (size, size)).astype(np.int16)
            geotiff(part / f"{stem}.mask.tif", mask, **at)


def bigearthnet(home: Path, lists: Mapping[str, list[str]] | None = None) -> None:
    tiles = {"34VER": "Finland", "33UUP": "Austria", "29UPU": "Ireland"}
    rows = []

    def name(tile: str, number: int) -> str:
        return f"S2A_MSIL2A_20170613T101031_N9999_R022_T{tile}_{number:02d}_71"

    wanted = lists or {
        "train": [name("34VER", i) for i in range(20)],
        "val": [name("34VER", i) for i in range(30, 32)],
        "test": [name("34VER", i) for i in range(40, 42)],
        "ood": [name("33UUP", 1), name("29UPU", 1)],
    }
    for split, names in wanted.items():
        lines(home / f"{split}.txt", names)
        for number, patch in enumerate(names):
            _patch(home, patch, number + 100 * len(rows))
            tile = patch.split("_T")[1][:5]
            rows.append(
                {
                    "patch_id": patch,
                    "labels": ["Arable land", "Mixed forest"],
                    "split": {"val": "validation", "ood": "test"}.get(split, split),
                    "country": tiles.get(tile, "Elsewhere"),
                    "s1_name": "S1A",
                }
            )
    pd.DataFrame(rows).to_parquet(home / "metadata.parquet")


def _patch(home: Path, patch: str, number: int) -> None:
    """One patch: a file a band at 10, 20 or 60 m, and its land-cover map."""
    tile = patch.rsplit("_", 2)[0]
    at = {"x": (number % 90) * 1300.0, "y": (number // 90) * 1300.0}
    for band in "01 02 03 04 05 06 07 08 8A 09 11 12".split():
        pixel = {"01": 60, "09": 60, "02": 10, "03": 10, "04": 10, "08": 10}.get(
            band, 20
        )
        path = home / "BigEarthNet-S2" / tile / patch / f"{patch}_B{band}.tif"
        geotiff(path, stored(f"{patch}{band}", 1, 120 // pixel), pixel=pixel, **at)
    codes = rng(patch).choice([111, 112, 211, 313, 142, 999], (12, 12))
    path = home / "Reference_Maps" / tile / patch / f"{patch}_reference_map.tif"
    geotiff(path, codes.astype(np.uint16), **at)


BEN = {
    "BigEarthNet-S2.tar.gz": ("BigEarthNet-S2",),
    "Reference_Maps.tar.gz": ("Reference_Maps",),
    "parts": ("BigEarthNet-S2.tar.gzab",),  # the maps come in one part
}

UPSTREAMS = [
    Upstream(
        "sen1floods11", sen1floods11, {"train": 14, "val": 2, "test": 2, "bolivia": 2},
        (13, 16, 16), 18,
    ),
    Upstream(
        "hls_burn_scars", hls_burn_scars, {"train": 6, "val": 2, "test": 2},
        (6, 16, 16), 10, {"hls_burn_scars.tar.gz": ("training", "validation")},
    ),
    Upstream(
        "bigearthnet", bigearthnet, {"train": 20, "val": 2, "test": 2, "ood": 2},
        (12, 12, 12), 6, BEN, {"reben_7k": True},
    ),
    Upstream(
        "bigearthnet", bigearthnet, {"train": 10, "val": 1, "test": 3},
        (12, 12, 12), 5, BEN, {"share": 0.5},
    ),
]  # fmt: skip
