"""What data scripts promise beyond layout: counts, nesting, and what values mean."""

from __future__ import annotations

import hashlib
import importlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import rasterio
import upstreams

from geopeft_kit.data import ChipData, read_chip_folder

SCRIPTS = Path(__file__).resolve().parent.parent / "data_scripts"


@pytest.fixture(scope="module", autouse=True)
def _path() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield


def test_few_shots_are_nested(tmp_path: Path) -> None:
    import phileo_bench

    upstreams.phileo_bench(tmp_path)
    chosen = {}
    for n in (5, 10, 20):
        chips = list(phileo_bench.read_chips(tmp_path, "full", "roads", n))
        train = [c.name for c in chips if c.split == "train"]
        assert len(train) == 3 * n, "n of each bucket that has data"
        assert sum(c.split == "val" for c in chips) == 3 * -(-n // 5)
        chosen[n] = set(train)
        assert {c.region for c in chips} == {"europe", "east-africa", "japan"}
    assert chosen[5] < chosen[10] < chosen[20]


def test_one_percent_lies_in_ten(tmp_path: Path) -> None:
    import bigearthnet

    table = pd.DataFrame(
        {
            "patch_id": [f"p{i:04d}" for i in range(1000)],
            "split": ["train", "validation"] * 500,
            "country": ["Finland"] * 600 + ["Austria"] * 400,
        }
    )
    table.to_parquet(tmp_path / "metadata.parquet")
    one, ten = (
        bigearthnet.choose(tmp_path, "full", False, share) for share in (0.01, 0.1)
    )
    assert set(one.index) < set(ten.index)
    assert (len(one), len(ten)) == (10, 100)
    assert ten.groupby(["split", "country"]).size().tolist() == [20, 30, 20, 30]


def test_scenes_that_train_are_nested(tmp_path: Path) -> None:
    from scenes import class_chips

    upstreams.aid(tmp_path)
    trained = [
        {
            chip.name
            for chip in class_chips(tmp_path / "AID", ["Airport", "Beach"], share)
            if chip.split == "train"
        }
        for share in (0.34, 0.67)
    ]
    assert trained[0] < trained[1]
    assert [len(names) for names in trained] == [2, 4]


def test_masks_and_dates_mean_what_upstream_says(tmp_path: Path) -> None:
    import sen1floods11

    upstreams.sen1floods11(tmp_path)
    chips = list(sen1floods11.read_chips(tmp_path, "full"))
    hand = tmp_path / "v1.1/data/flood_events/HandLabeled"
    for chip in chips[:3]:
        with rasterio.open(hand / f"LabelHand/{chip.name}_LabelHand.tif") as raster:
            truth = raster.read(1)
        assert np.array_equal(chip.mask == 255, truth == -1)
        assert np.array_equal(chip.mask == 1, truth == 1)
    dates = {chip.region: chip.date for chip in chips}
    assert dates["Ghana"] == "2018-09-18"
    assert dates["Mekong"] == "2018-08-05", "upstream calls it Cambodia"


def test_bands_come_in_the_order_that_is_named(tmp_path: Path) -> None:
    import mados
    import oscd

    upstreams.mados(tmp_path)
    chip = next(iter(mados.read_chips(tmp_path, "full")))
    red = f"MADOS/Scene_0/10/Scene_0_L2R_rhorc_665_{chip.name[-1]}.tif"
    with rasterio.open(tmp_path / red) as raster:
        truth = raster.read(1)
    assert np.array_equal(chip.image[mados.BANDS.index("B04")], truth)

    upstreams.oscd(tmp_path)
    chip = next(iter(oscd.read_chips(tmp_path, "full", None)))
    for date, image in ((1, chip.image), (2, chip.image_after)):
        folder = tmp_path / oscd.NEEDS[0] / chip.region / f"imgs_{date}_rect"
        with rasterio.open(folder / "B8A.tif") as raster:
            assert np.array_equal(image[8], raster.read(1))


@pytest.mark.slow
def test_majortom_asks_for_the_bytes_of_its_cells_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import majortom
    from hub_server import serve

    home = tmp_path / "home"
    with serve(upstreams.Mirror()) as site:
        upstreams.majortom(home, site.root)
        part = (home / "images/part_00001.parquet").read_bytes()
        site.files = {
            "/datasets/Major-TOM/Core-S2L2A/resolve/main/metadata.parquet":
            (home / "metadata.parquet").read_bytes(),
            "/images/part_00001.parquet": part,
        }  # fmt: skip
        monkeypatch.setenv("HF_ENDPOINT", site.root)
        with pq.ParquetFile(home / "images/part_00001.parquet") as file:
            rows = file.read().drop_columns("grid_cell").to_pylist()
        # megabytes of the largest cell, and a little more
        cell = max(sum(map(len, row.values())) for row in rows) * 1.001e-6
        folders = [
            majortom.convert(None, tmp_path / f"{n}", max_mb=n * cell, chip=16)
            for n in (1, 3, 9)
        ]
    names = [set(read_chip_folder(folder)[1]["chip"]) for folder in folders]
    assert [len(n) for n in names] == [4, 12, 20], "four chips a cell, five cells"
    assert names[0] < names[1] < names[2]
    index = read_chip_folder(folders[2])[1]
    assert "500U_5R" not in set(index["region"]), "it lies outside of the box"
    data = ChipData(folders[0])
    assert data.splits == ["unlabelled"]
    assert data.dataset("unlabelled")[0]["image"].shape == (12, 16, 16)
    local = majortom.convert(home, tmp_path / "local", chip=16)
    assert set(read_chip_folder(local)[1]["chip"]) == names[2]
    with pytest.raises(ValueError, match=r"no cell lies inside 100"):
        majortom.convert(home, tmp_path / "x", bbox=(100, 0, 101, 1))
    with pytest.raises(ValueError, match="west below east"):
        majortom.convert(home, tmp_path / "x", bbox=(7, 45, 5, 46))


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "folder", "counts"),
    [
        ("sen1floods11", "sen1floods11",
         {"train": 252, "val": 89, "test": 90, "bolivia": 15}),
        ("hls_burn_scars", "burn_scars", {"train": 524, "val": 160, "test": 120}),
    ],
)  # fmt: skip
def test_counts_are_the_published_ones(
    script: str, folder: str, counts: dict[str, int], real_data: Path, tmp_path: Path
) -> None:
    module, builder = importlib.import_module(script), getattr(upstreams, script)
    published = real_data / "peft_study/datasets_splits" / folder
    lists = {
        path.stem.removesuffix("_data"): path.read_text().split()
        for path in published.glob("*_data.txt")
    }
    builder(tmp_path / "home", lists, size=4)
    index = read_chip_folder(module.convert(tmp_path / "home", tmp_path))[1]
    assert index["split"].value_counts().to_dict() == counts
    for file in module.files(tmp_path / "home", "full"):
        if (published / file.name).is_file():
            content = (published / file.name).read_bytes()
            assert hashlib.sha256(content).hexdigest() == file.sha256


@pytest.mark.real
def test_reben_7k_has_the_studys_counts(real_data: Path, tmp_path: Path) -> None:
    import bigearthnet

    lists = real_data / "peft_study/datasets_splits/reBEN/reBEN_7k"
    names: dict[str, str] = {}
    for split, sha256 in bigearthnet.LISTS.items():
        content = (lists / f"{split}.txt").read_bytes()
        assert hashlib.sha256(content).hexdigest() == sha256
        (tmp_path / f"{split}.txt").write_bytes(content)
        names |= dict.fromkeys(content.decode().split(), split)
    table = pd.DataFrame({"patch_id": [*names], "split": "test", "country": "Finland"})
    table.to_parquet(tmp_path / "metadata.parquet")
    chosen = bigearthnet.choose(tmp_path, "full", True, 1.0)
    counts = {"train": 4690, "val": 946, "test": 945, "ood": 807}
    assert chosen["split"].value_counts().to_dict() == counts
    assert set(bigearthnet.choose(tmp_path, "small", True, 1.0).index) < set(names)


@pytest.mark.real
def test_the_real_chip_of_spain(real_data: Path, tmp_path: Path) -> None:
    import sen1floods11

    home = tmp_path / "home"
    shutil.copytree(real_data / "sen1floods11_spain", home)
    home.chmod(0o755)
    for split, (name, _) in sen1floods11.LISTS.items():
        upstreams.lines(home / name, ["Spain_7370579"] if split == "test" else [])
    data = ChipData(sen1floods11.convert(home, tmp_path), split="index", bands="hls")
    batch = next(iter(data.dataloader("test")))
    assert batch["image"].shape == (1, 6, 512, 512)
    assert 0 < float(batch["image"].mean()) < 0.5, "reflectance"
    assert set(batch["mask"].unique().tolist()) <= {0, 1, 255}
    lon, lat = batch["lonlat"][0].tolist()
    assert (-1 < lon < -0.5) and (37.5 < lat < 38.5), "in Spain"
    water, land = (batch["image"][0, 4][batch["mask"][0] == k].mean() for k in (1, 0))
    assert water < land, "water is darker than land in the short-wave infrared"
