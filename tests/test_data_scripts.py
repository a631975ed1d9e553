"""Data scripts: upstream layouts become chip folders, on miniatures and real files."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.transform import from_origin

from geopeft_kit.data import ChipData, read_chip_folder

SCRIPTS = Path(__file__).resolve().parent.parent / "data_scripts"


@pytest.fixture(scope="module", autouse=True)
def _path() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield


# ---------------------------------------------------------------- EuroSAT


@pytest.fixture
def eurosat(tmp_path: Path) -> Path:
    """A miniature in the layout of torchvision's EuroSAT.zip and torchgeo's lists."""
    import eurosat_rgb

    home = tmp_path / "upstream"
    for number, (split, count) in enumerate((("train", 5), ("val", 2), ("test", 2))):
        names = []
        for label in eurosat_rgb.CLASSES:
            (home / "2750" / label).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                name = f"{label}_{100 * number + i}.jpg"
                pixels = np.full((64, 64, 3), (10 + i, 60, 110), np.uint8)
                Image.fromarray(pixels).save(home / "2750" / label / name)
                names.append(name)
        (home / f"eurosat-spatial-{split}.txt").write_text("\n".join(names))
    return home


def test_eurosat_keeps_its_lists_and_its_files(eurosat: Path, tmp_path: Path) -> None:
    import eurosat_rgb

    folder = eurosat_rgb.convert(eurosat, tmp_path / "data")
    data = ChipData(folder, bands=["BLUE", "RED"], batch_size=4)
    counts = data.index["split"].value_counts().to_dict()
    assert counts == {"train": 50, "val": 20, "test": 20}
    assert data.index.groupby("split")["region"].nunique().max() == 1
    batch = next(iter(data.test_dataloader()))
    assert batch["image"].shape == (4, 2, 64, 64)
    # 110 / 255 * 0.275 in blue; JPEG moves values by a few of 255
    assert abs(float(batch["image"][0, 0].mean()) - 110 / 255 * 0.275) < 0.003
    for sample in data.dataset("val"):
        label = data.classes[sample["label"]]
        assert sample["chip"].startswith(label)
    source = (eurosat / "2750/Forest/Forest_0.jpg").read_bytes()
    assert (folder / "images/Forest_0.jpg").read_bytes() == source


def test_eurosat_in_region_and_nothing_to_do(
    eurosat: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    import eurosat_rgb

    folder = eurosat_rgb.convert(eurosat, tmp_path / "data", in_region=0.2)
    data = ChipData(folder)
    held = data.index[data.index["split"] == "in_region"]
    assert held["label"].value_counts().to_dict() == dict.fromkeys(range(10), 1)
    assert set(held["region"]) == {"train_block"}
    before = (folder / "dataset.json").stat().st_mtime_ns
    assert eurosat_rgb.convert(eurosat, tmp_path / "data", in_region=0.2) == folder
    assert "nothing to do" in capsys.readouterr().out
    assert (folder / "dataset.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"in_region.*overwrite"):
        eurosat_rgb.convert(eurosat, tmp_path / "data")


def test_eurosat_refuses_what_is_not_there(eurosat: Path, tmp_path: Path) -> None:
    import eurosat_rgb

    (eurosat / "2750/Forest/Forest_0.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"Forest_0\.jpg"):
        eurosat_rgb.convert(eurosat, tmp_path / "data")
    assert not (tmp_path / "data").exists()
    (eurosat / "eurosat-spatial-val.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"eurosat-spatial-val\.txt"):
        eurosat_rgb.convert(eurosat, tmp_path / "data")
    with pytest.raises(FileNotFoundError, match="2750"):
        eurosat_rgb.convert(tmp_path, tmp_path / "data")


@pytest.fixture
def hub(
    eurosat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A hub on this machine that serves the miniature; MD5s are the miniature's."""
    import eurosat_rgb

    site = tmp_path / "site"

    def put(name: str, revision: str, content: bytes) -> str:
        path = site / "datasets/torchgeo/eurosat/resolve" / revision / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return hashlib.md5(content).hexdigest()

    archive = tmp_path / "EuroSAT.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted((eurosat / "2750").rglob("*.jpg")):
            file.write(path, path.relative_to(eurosat))
    name, revision, _ = eurosat_rgb.IMAGES
    md5 = put(name, revision, archive.read_bytes())
    monkeypatch.setattr(eurosat_rgb, "IMAGES", (name, revision, md5))
    lists = {}
    for split in eurosat_rgb.LIST_MD5:
        name = f"eurosat-spatial-{split}.txt"
        content = (eurosat / name).read_bytes()
        lists[split] = put(name, eurosat_rgb.LIST_REVISION, content)
    monkeypatch.setattr(eurosat_rgb, "LIST_MD5", lists)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield site
    server.shutdown()
    server.server_close()
    thread.join()


def test_eurosat_downloads_once(hub: Path, tmp_path: Path) -> None:
    import eurosat_rgb

    folder = eurosat_rgb.convert(None, tmp_path / "data")
    assert len(read_chip_folder(folder)[1]) == 90
    (hub / "datasets").rename(hub / "gone")  # what was fetched is kept
    again = eurosat_rgb.convert(None, tmp_path / "data", overwrite=True)
    assert len(read_chip_folder(again)[1]) == 90


def test_a_download_with_another_md5_is_refused(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import eurosat_rgb

    name, revision, _ = eurosat_rgb.IMAGES
    monkeypatch.setattr(eurosat_rgb, "IMAGES", (name, revision, "0" * 32))
    with pytest.raises(RuntimeError, match=r"EuroSAT\.zip: MD5 is .*, expected 000"):
        eurosat_rgb.convert(None, tmp_path / "data")
    assert not (tmp_path / "data/downloads/eurosat_rgb/EuroSAT.zip").exists()
    assert not (tmp_path / "data/eurosat_rgb").exists()


# ---------------------------------------------------------------- Amazon forest


@pytest.fixture
def amazon(tmp_path: Path) -> Path:
    """Two upstream chips, west and east; one mask is too wide, as upstream's is."""
    home = tmp_path / "amazon"
    for part, x, wide in (("training", -60.0, 512), ("validation", -50.0, 515)):
        for kind in ("images", "masks"):
            (home / part / kind).mkdir(parents=True)
        truth = np.where(np.arange(wide) < wide / 2, 1, 2).astype(np.uint8)
        truth = np.tile(truth, (512, 1))  # forest in the west half
        Image.fromarray(truth).save(home / part / "masks" / "Amazon_1.tiff_2.png")
        pixels = np.zeros((3, 512, 512), np.uint8)
        pixels[:, :, :256] = 100
        with rasterio.open(
            home / part / "images" / "Amazon_1.tiff_2.tiff", "w", driver="GTiff",
            count=3, height=512, width=512, dtype="uint8", crs="EPSG:4326",
            transform=from_origin(x, -5, 9e-5, 9e-5),
        ) as raster:  # fmt: skip
            raster.write(pixels)
    return home


def test_amazon_windows_lie_at_their_place(amazon: Path, tmp_path: Path) -> None:
    import amazon_forest

    folder = amazon_forest.convert(amazon, tmp_path / "data", chip=128)
    data = ChipData(folder, test_regions=["east"], val_fraction=0)
    assert data.index["region"].value_counts().to_dict() == {"west": 16, "east": 16}
    assert data.index["scene"].nunique() == 2
    for sample in data.dataset("test"):
        forest = sample["image"][0] > 0
        agreement = (sample["mask"] == forest).float().mean()
        assert agreement > 0.98  # the wide mask was squeezed, not cut
        left, bottom, right, top = sample["bounds"].tolist()
        assert left >= -50.0 - 1e-9
        assert right <= -50.0 + 512 * 9e-5 + 1e-9
        assert (right - left) == pytest.approx(128 * 9e-5)
    total = data.index.geometry.area.sum()
    assert total == pytest.approx(2 * (512 * 9e-5) ** 2, rel=1e-6)  # no overlap
    assert data.index.geometry.union_all().area == pytest.approx(total, rel=1e-6)


def test_amazon_small_lies_in_full(amazon: Path, tmp_path: Path) -> None:
    import amazon_forest

    full = amazon_forest.convert(amazon, tmp_path / "data")
    small = amazon_forest.convert(amazon, tmp_path / "data", subset="small")
    names = [set(read_chip_folder(f)[1]["chip"]) for f in (small, full)]
    assert names[0] < names[1]
    assert (len(names[0]), len(names[1])) == (16, 128)


def test_amazon_needs_masks_and_says_how_to_get_files(
    amazon: Path, tmp_path: Path
) -> None:
    import amazon_forest

    with pytest.raises(FileNotFoundError, match=r"zenodo\.org/records/3233081"):
        amazon_forest.convert(None, tmp_path / "data")
    with pytest.raises(ValueError, match="100.*64, 128"):
        amazon_forest.convert(amazon, tmp_path / "data", chip=100)
    image = amazon / "training/images/Amazon_1.tiff_2.tiff"
    image.write_bytes(image.read_bytes()[:3000])
    with pytest.raises(RuntimeError, match=r"Amazon_1\.tiff_2\.tiff cannot be read"):
        amazon_forest.convert(amazon, tmp_path / "data")
    (amazon / "training/masks/Amazon_1.tiff_2.png").unlink()
    with pytest.raises(FileNotFoundError, match="no mask"):
        amazon_forest.convert(amazon, tmp_path / "data")
    assert not (tmp_path / "data").exists()


# ---------------------------------------------------------------- TerraMesh


def test_terramesh_strips_leave_gaps() -> None:
    from terramesh import strips

    found = list(strips(224, 32, 32).values())
    assert found == [(0, 96), (128, 160), (192, 224)]
    for size, buffer in ((32, 0), (16, 24), (48, 8)):
        found = list(strips(224, size, buffer).values())
        assert found[-1][1] <= 224
        assert all(
            b[0] - a[1] == buffer for a, b in zip(found, found[1:], strict=False)
        )
        assert all((b - a) % size == 0 and b > a for a, b in found)
    with pytest.raises(ValueError, match="do not fit"):
        strips(224, 100, 32)


# ---------------------------------------------------------------- command line


def test_a_failure_is_one_message_and_an_exit_status(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, str(SCRIPTS / "amazon_forest.py"), "--from", "nowhere"],
        capture_output=True, text=True, cwd=tmp_path,
        env={"PYTHONPATH": str(SCRIPTS.parent)},
    )  # fmt: skip
    assert run.returncode == 1
    assert "nowhere holds no training" in run.stderr
    assert "Traceback" not in run.stderr


# ---------------------------------------------------------------- real files


@pytest.mark.real
def test_real_eurosat(real_data: Path, tmp_path: Path) -> None:
    import eurosat_rgb

    folder = eurosat_rgb.convert(real_data / "eurosat_rgb", tmp_path, subset="small")
    data = ChipData(folder, batch_size=64)
    counts = data.index["split"].value_counts().to_dict()
    assert counts == {"train": 1000, "val": 400, "test": 400}
    assert data.index.groupby("split")["label"].nunique().tolist() == [10, 10, 10]
    means = [b["image"].mean((0, 2, 3)) for b in data.dataloader("train")]
    red, green, blue = np.mean([m.numpy() for m in means], 0)
    assert 0.05 < blue < 0.2
    assert 0.05 < red < 0.2
    assert 0.05 < green < 0.2


@pytest.mark.real
def test_real_amazon(real_data: Path, tmp_path: Path) -> None:
    import amazon_forest

    folder = amazon_forest.convert(
        real_data / "amazon_forest", tmp_path, chip=512, with_unlabelled=True
    )
    data = ChipData(folder, test_regions=["east"])
    assert data.index["split"].value_counts()["unlabelled"] == 15
    labelled = data.index[data.index["split"] != "unlabelled"]
    assert len(labelled) == 45
    assert set(labelled["region"]) == {"west", "east"}
    west, south, east, north = labelled.total_bounds
    assert (-73 < west < -72) and (-45 < east < -44) and -17 < south < north < 1
    batch = next(iter(data.test_dataloader()))
    assert set(batch["mask"].unique().tolist()) <= {0, 1}


@pytest.mark.real
def test_real_terramesh(real_data: Path, tmp_path: Path) -> None:
    import terramesh

    source = real_data / "terramesh"
    for sample, (_, image, mask) in terramesh.PLACES.items():
        for layer, expected in (("S2L2A", image), ("LULC", mask)):
            content = (source / layer / f"{sample}.tif").read_bytes()
            assert hashlib.sha256(content).hexdigest() == expected
    whole = ChipData(
        terramesh.convert(source, tmp_path / "whole"), test_regions=["denmark"]
    )
    assert len(whole.bands) == 12
    for split in whole.splits:
        for batch in whole.dataloader(split):
            assert batch["image"].shape[1:] == (12, 224, 224)
            assert 0 <= batch["image"].min()
            # every place has dark shadows or water once the offset is off
            assert batch["image"].amin((1, 2, 3)).max() < 0.03
    cut = ChipData(terramesh.convert(source, tmp_path / "cut", chip=32), split="index")
    counts = cut.index["split"].value_counts().to_dict()
    assert counts == {"train": 105, "val": 35, "test": 35}
    from geopeft_kit.data.leakage import touching_chips

    assert touching_chips(cut.index, cut.index["split"], buffer_m=250).empty
    assert len(touching_chips(cut.index, cut.index["split"], buffer_m=400))
