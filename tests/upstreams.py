"""Miniatures of upstream data sets, in their exact layout, and a server for them.

A builder writes what stands on the disk after download and unpacking; file names,
formats and sidecar lists are those that the script's `SOURCE.layout` documents.
`mirror` packs it into the archives that the script asks for, and serves them.
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
    gone: bool = False

    def find(self, path: str) -> bytes | None:
        return None if self.gone else self.files.get(path)


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
        "train": [name("34VER", i) for i in range(6)],
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


# ---------------------------------------------------------------- others

EUROSAT = (
    "AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture",
    "PermanentCrop", "Residential", "River", "SeaLake",
)  # fmt: skip


def eurosat(home: Path, rgb: bool = False) -> None:
    folder = "2750" if rgb else "ds/images/remote_sensing/otherDatasets/sentinel_2/tif"
    for number, split in enumerate(("train", "val", "test")):
        names = [f"{label}_{number}" for label in EUROSAT]
        # the lists name .jpg whatever the files are
        lines(home / f"eurosat-spatial-{split}.txt", [f"{n}.jpg" for n in names])
        for name in names:
            label = name.split("_")[0]
            if rgb:
                picture(home / folder / label / f"{name}.jpg")
            else:
                path = home / folder / label / f"{name}.tif"
                geotiff(path, stored(name, 13, 16), x=1e4 * number)


def eurosat_rgb(home: Path) -> None:
    eurosat(home, rgb=True)


def geobench(home: Path) -> None:
    """Samples as GEO-Bench's `write_sample_hdf5` writes them, pickled label and all."""
    import pickle

    h5py = pytest.importorskip("h5py")
    numbers = "01 02 03 04 05 06 07 08 08A 09 10 11 12".split()
    optical = [f"{n} - band" for n in numbers]
    cloudy = [f"{n} - band" for n in numbers if n != "10"] + ["Cloud Probability"]
    sets = {
        "m-cashew-plant": [f"{n}_2019-11-05" for n in cloudy],
        "m-SA-crop-type": cloudy,
        "m-brick-kiln": optical,
        "m-forestnet": [f"0{n} - band" for n in range(2, 8)],
        "m-eurosat": optical,
    }
    for name, bands in sets.items():
        partition: dict[str, list[str]] = {}
        for split, count in (("train", 3), ("valid", 1), ("test", 1)):
            samples = [f"{split}_{i}" for i in range(count)]
            if name == "m-forestnet":
                samples = [f"-1.25_{101 + i}.5_2015_01_0{i + 1}" for i in range(count)]
                samples = [s.replace("-1.25", f"-1.2{len(split)}") for s in samples]
            partition[split] = samples
            for number, sample in enumerate(samples):
                path = home / name / f"{sample}.hdf5"
                path.parent.mkdir(parents=True, exist_ok=True)
                with h5py.File(path, "w") as file:
                    for band in bands:
                        file.create_dataset(
                            band, data=stored(f"{sample}{band}", 1, 16)[0]
                        )
                    facts: dict[str, Any] = {"bands_order": bands}
                    if name in ("m-cashew-plant", "m-SA-crop-type"):
                        mask = rng(sample).integers(0, 7, (16, 16))
                        file.create_dataset("label", data=mask.astype(np.uint8))
                    else:
                        facts = {"label": number % 2, **facts}
                    file.attrs["pickle"] = str(pickle.dumps(facts))
        (home / name / "default_partition.json").write_text(json.dumps(partition))


def so2sat(home: Path) -> None:
    h5py = pytest.importorskip("h5py")
    (home / "culture_10").mkdir(parents=True)
    for name, count in (("training", 34), ("testing", 17)):
        with h5py.File(home / f"culture_10/{name}.h5", "w") as file:
            values = rng(name).random((count, 32, 32, 10)) * 0.4
            file.create_dataset("sen2", data=values)
            file.create_dataset("sen1", data=values[..., :8])
            file.create_dataset("label", data=np.eye(17)[np.arange(count) % 17])


def mados(home: Path) -> None:
    sizes = {
        "10": (492, 560, 665, 833),
        "20": (704, 740, 783, 865, 1614, 2202),
        "60": (443,),
    }
    for number, (split, count) in enumerate((("train", 3), ("val", 1), ("test", 1))):
        names = []
        for crop in range(1, count + 1):
            scene = f"Scene_{number}"
            names.append(f"{scene}_{crop}")
            at = {"x": 1e4 * number, "y": 1e3 * crop}
            for folder, waves in sizes.items():
                for wave in waves:
                    pixel = int(folder)
                    image = rng(scene, crop, wave).random(
                        (1, 240 // pixel, 240 // pixel)
                    )
                    path = home / "MADOS" / scene / folder
                    path = path / f"{scene}_L2R_rhorc_{wave}_{crop}.tif"
                    geotiff(path, (image * 0.2).astype(np.float32), pixel=pixel, **at)
            mask = rng(scene, crop).integers(0, 16, (24, 24)).astype(np.float32)
            path = home / "MADOS" / scene / "10" / f"{scene}_L2R_cl_{crop}.tif"
            geotiff(path, mask, **at)
        lines(home / f"MADOS/splits/{split}_X.txt", names)


UCM = (
    "agricultural airplane baseballdiamond beach buildings chaparral denseresidential "
    "forest freeway golfcourse harbor intersection mediumresidential mobilehomepark "
    "overpass parkinglot river runway sparseresidential storagetanks tenniscourt"
).split()


def uc_merced(home: Path) -> None:
    for label in UCM:
        for i in range(2):
            size = 255 if i == 0 else 256  # some of upstream's are off by a few pixels
            path = home / f"UCMerced_LandUse/Images/{label}/{label}{i:02d}.tif"
            picture(path, values=np.full((size, size, 3), 40 * i))


AID = (
    "Airport BareLand BaseballField Beach Bridge Center Church Commercial "
    "DenseResidential Desert Farmland Forest Industrial Meadow MediumResidential "
    "Mountain Park Parking Playground Pond Port RailwayStation Resort River School "
    "SparseResidential Square Stadium StorageTanks Viaduct"
).split()


def aid(home: Path) -> None:
    for label in AID:
        for i in range(1, 4):
            picture(home / f"AID/{label}/{label.lower()}_{i}.jpg")


def patternnet(home: Path) -> None:
    for label in ("airplane", "beach"):
        for i in range(3):
            picture(home / f"PatternNet/images/{label}/{label}{i:03d}.jpg", 256)


def levir_cd(home: Path) -> None:
    for split, count in (("train", 2), ("val", 1), ("test", 1)):
        for i in range(1, count + 1):
            name = f"{split}_{i}.png"
            picture(home / "A" / name, 32)
            picture(home / "B" / name, 32)
            picture(home / "label" / name, values=change_mask(name, 32))


def change_mask(name: str, size: int) -> np.ndarray:
    return 255 * rng(name, "mask").integers(0, 2, (size, size))


def dsifn(home: Path) -> None:
    for split, count in (("train", 3), ("val", 1), ("test", 2)):
        for i in range(count):
            picture(home / split / "t1" / f"{i}.jpg")
            picture(home / split / "t2" / f"{i}.jpg")
            picture(home / split / "mask" / f"{i}.png", values=change_mask(f"{i}", 16))


def oscd(home: Path) -> None:
    stem = "Onera Satellite Change Detection dataset - "
    bands = "B01 B02 B03 B04 B05 B06 B07 B08 B8A B09 B10 B11 B12".split()
    for split, cities in (
        ("Train", ["abudhabi", "aguasclaras"]),
        ("Test", ["chongqing"]),
    ):
        for city in cities:
            images = home / f"{stem}Images" / city
            for date in (1, 2):
                for band in bands:
                    path = images / f"imgs_{date}_rect" / f"{band}.tif"
                    geotiff(path, stored(f"{city}{date}{band}", 1, 40), crs=None)
            lines(images / "dates.txt", ["date_1: 20160120", "date_2: 20180328"])
            mask = home / f"{stem}{split} Labels" / city / "cm" / "cm.png"
            picture(mask, values=change_mask(city, 40))


def whu_building(home: Path) -> None:
    folder = home / "3. The cropped image tiles and raster labels"
    for split, count in (("train", 3), ("val", 1), ("test", 2)):
        for i in range(count):
            picture(folder / split / "image" / f"{i}.tif")
            picture(
                folder / split / "label" / f"{i}.tif", values=change_mask(f"{i}", 16)
            )


def loveda(home: Path) -> None:
    number = 0
    for split in ("Train", "Val"):
        for scene in ("Urban", "Rural"):
            for _ in range(2):
                folder, number = home / split / scene, number + 1
                picture(folder / "images_png" / f"{number}.png", 32)
                mask = rng(number).integers(0, 8, (32, 32))
                picture(folder / "masks_png" / f"{number}.png", values=mask)


def vaihingen(home: Path) -> None:
    from torchgeo.datasets import Vaihingen2D

    colours = np.array(Vaihingen2D.colormap)
    for name in (n for names in Vaihingen2D.splits.values() for n in names):
        picture(home / "top" / name, 36)
        picture(home / name, values=colours[rng(name).integers(0, 6, (36, 36))])


def potsdam(home: Path) -> None:
    from torchgeo.datasets import Potsdam2D

    colours = np.array([*Potsdam2D.colormap, (252, 255, 0)])  # the last is no class
    for name in (n for names in Potsdam2D.splits.values() for n in names):
        image = rng(name, "image").integers(0, 256, (36, 36, 4))
        picture(home / "4_Ortho_RGBIR" / f"{name}_RGBIR.tif", values=image)
        mask = colours[rng(name).integers(0, 7, (36, 36))]
        picture(home / f"{name}_label.tif", values=mask)


def spacenet2(home: Path) -> None:
    for aoi, city, x in ((3, "Paris", 2.3), (5, "Khartoum", 32.5)):
        for i in (1, 2, 10):
            for product, size, bands in (("PAN", 26, 1), ("MUL", 7, 8)):
                stem = f"AOI_{aoi}_{city}"
                path = home / f"{stem}_Train" / product / f"{product}_{stem}_img{i}.tif"
                geotiff(
                    path, stored(path.name, bands, size, 2047), x=x + i * 0.01, y=15,
                    pixel=1e-3 / size, crs="EPSG:4326",
                )  # fmt: skip


def phileo_bench(home: Path) -> None:
    codes = np.array([10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 100])
    for region in ("denmark-1", "europe", "uganda-1", "japan"):
        for split, count in (("train", 30), ("val", 4), ("test", 3)):
            stem = home / f"{region}_0_0_{split}"
            draw = rng(region, split)
            channels = 11 if region == "japan" else 10  # some carry the scene classes
            image = draw.integers(0, 4000, (count, 8, 8, channels))
            roads = draw.random((count, 8, 8, 1)) * 100
            cover = draw.choice(codes, (count, 8, 8, 1))
            stem.parent.mkdir(parents=True, exist_ok=True)
            np.save(f"{stem}_s2.npy", image.astype(np.uint16))
            np.save(f"{stem}_label_roads.npy", roads.astype(np.float32))
            np.save(f"{stem}_label_building.npy", roads[::-1].astype(np.float32))
            np.save(f"{stem}_label_lc.npy", cover.astype(np.uint8))


def majortom(home: Path, root: str = "https://hub.invalid", size: int = 32) -> None:
    """Metadata, and a parquet file with one row group a cell, a GeoTIFF a band."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    coarse = {"B01": 6, "B09": 6, "B02": 1, "B03": 1, "B04": 1, "B08": 1}
    bands = "B01 B02 B03 B04 B05 B06 B07 B08 B8A B09 B11 B12".split()
    tables, rows = [], []
    for number in range(6):
        cell = {"grid_cell": [f"500U_{number}R"]}
        for band in bands:
            step = coarse.get(band, 2)
            path = home / "scratch.tif"
            pixels = stored(f"{number}{band}", 1, size // step)
            geotiff(path, pixels, x=2e4 * number, pixel=10.0 * step)
            cell[band] = [path.read_bytes()]
            path.unlink()
        tables.append(pa.table(cell))
        for cloud in (80.0, 1.0 + number):  # two dates, the clear one comes later
            rows.append(
                {
                    "grid_cell": cell["grid_cell"][0],
                    "centre_lat": 45.5,
                    "centre_lon": 5.5 + number * (1 if number == 5 else 0.1),
                    "cloud_cover": cloud,
                    "timestamp": "2020-06-01 10:00:00",
                    "product_id": f"S2A_{number}_{cloud:g}",
                    "parquet_url": f"{root}/images/part_00001.parquet",
                    "parquet_row": number,
                }
            )
    (home / "images").mkdir(parents=True)
    path = home / "images/part_00001.parquet"
    with pq.ParquetWriter(path, tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table)
    pd.DataFrame(rows).to_parquet(home / "metadata.parquet")


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
        "bigearthnet", bigearthnet, {"train": 6, "val": 2, "test": 2, "ood": 2},
        (12, 12, 12), 5, BEN, {"reben_7k": True},
    ),
    Upstream(
        "bigearthnet", bigearthnet, {"train": 3, "val": 1, "test": 3},
        (12, 12, 12), 5, BEN, {"share": 0.5},
    ),
    Upstream(
        "eurosat", eurosat, {"train": 10, "val": 10, "test": 10}, (13, 16, 16), 30,
        {"EuroSATallBands.zip": ("ds",)},
    ),
    *(
        Upstream(
            "geobench", geobench, {"train": 3, "val": 1, "test": 1}, (bands, 16, 16), 3,
            options={"dataset": name}, by_hand=True,
        )
        for name, bands in (
            ("m-cashew-plant", 12), ("m-SA-crop-type", 12), ("m-brick-kiln", 10),
            ("m-forestnet", 6), ("m-eurosat", 13),
        )
    ),
    Upstream(
        "so2sat", so2sat, {"train": 34, "test": 17}, (10, 32, 32), 51, by_hand=True
    ),
    Upstream(
        "mados", mados, {"train": 3, "val": 1, "test": 1}, (11, 24, 24), 5,
        {"MADOS.zip": ("MADOS",)},
    ),
    Upstream(
        "uc_merced", uc_merced, {"train": 21, "test": 21}, (3, 256, 256), 42,
        {"UCMerced_LandUse.zip": ("UCMerced_LandUse",)},
    ),
    Upstream(
        "aid", aid, {"train": 30, "test": 60}, (3, 16, 16), 90,
        options={"train_share": 0.2}, by_hand=True,
    ),
    Upstream(
        "geopile", patternnet, {"train": 6}, (3, 256, 256), 6,
        {"PatternNet.zip": ("PatternNet",)}, {"part": "patternnet"},
    ),
    Upstream(
        "levir_cd", levir_cd, {"train": 8, "val": 4, "test": 4}, (3, 2, 16, 16), 16,
        {"train.zip": ("A", "B", "label"), "val.zip": (), "test.zip": ()},
        {"chip": 16}, by_hand=True,
    ),
    Upstream(
        "dsifn", dsifn, {"train": 3, "val": 1, "test": 2}, (3, 2, 16, 16), 6,
        by_hand=True,
    ),
    Upstream(
        "oscd", oscd, {"train": 8, "test": 4}, (13, 2, 16, 16), 6,
        {
            f"Onera Satellite Change Detection dataset - {part}.zip":
            (f"Onera Satellite Change Detection dataset - {part}",)
            for part in ("Images", "Train Labels", "Test Labels")
        },
        {"chip": 16},
    ),
    Upstream(
        "whu_building", whu_building, {"train": 3, "val": 1, "test": 2}, (3, 16, 16), 6,
        {
            "3. The cropped aerial image tiles and raster labels.zip":
            ("3. The cropped image tiles and raster labels",)
        },
    ),
    Upstream(
        "loveda", loveda, {"train": 16, "test": 16}, (3, 16, 16), 32,
        {"Train.zip": ("Train",), "Val.zip": ("Val",)}, {"chip": 16},
    ),
    Upstream(
        "vaihingen", vaihingen, {"train": 64, "test": 68}, (3, 16, 16), 132,
        options={"chip": 16}, by_hand=True,
    ),
    Upstream(
        "potsdam", potsdam, {"train": 96, "test": 56}, (4, 16, 16), 152,
        options={"chip": 16}, by_hand=True,
    ),
    Upstream(
        "spacenet2", spacenet2, {"train": 3, "test": 3}, (8, 26, 26), 6,
        {
            f"SN2_buildings_train_AOI_{city}.tar.gz": (f"AOI_{city}_Train",)
            for city in ("3_Paris", "5_Khartoum")
        },
        {"cities": ["Paris", "Khartoum"]},
    ),
    *(
        Upstream(
            "phileo_bench", phileo_bench, {"train": 60, "val": 12, "test": 12},
            (10, 8, 8), 48, options={"label": label, "n_shot": 20}, by_hand=True,
        )
        for label in ("roads", "lc")
    ),
]  # fmt: skip
