"""Exports: other tools read back what was predicted, at its place."""

from __future__ import annotations

import json
import os

import geopandas as gpd
import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.features import rasterize
from rasterio.transform import from_origin
from test_inference import Net, predict_scene, reflectance, torch, write_scene

import geopeft_kit as gk

CLASSES = ["land", '<img src=x onerror="hack()">', "ice"]
COLOURS = ["#c9b37e", "#0072b2", "#ffffff"]


@pytest.fixture(scope="module")
def prediction(tmp_path_factory):
    """A class map in patches, with a corner without data."""
    folder = tmp_path_factory.mktemp("export")
    image = reflectance(80, 120)
    image = np.kron(image[:, ::8, ::8], np.ones((8, 8), np.float32))
    image[:, :16, :24] = -1
    source = write_scene(folder / "scene.tif", image, nodata=-1)
    torch.manual_seed(0)
    model = Net(torch.nn.Conv2d(3, 3, 1))
    return predict_scene(model, source, folder / "out.tif", window=32, classes=CLASSES,
                         colours=COLOURS, progress=False)  # fmt: skip


def test_the_cog_is_the_prediction_and_is_one(prediction, tmp_path):
    written = gk.export_prediction(prediction, tmp_path)
    with rasterio.open(prediction) as a, rasterio.open(written["cog"]) as b:
        assert (a.read() == b.read()).all()
        assert (a.transform, a.crs, a.nodata) == (b.transform, b.crs, b.nodata)
        layout = b.tags(ns="IMAGE_STRUCTURE")
        assert layout["LAYOUT"] == "COG"
        assert b.colormap(1)[1] == (0x00, 0x72, 0xB2, 255)
        assert json.loads(b.tags()["classes"]) == CLASSES


def test_a_large_cog_has_overviews_of_classes_not_of_means(tmp_path):
    numbers = np.zeros((1024, 1024), np.uint8)
    numbers[:, ::2] = 2  # means of 0 and 2 would be 1, which nobody predicted
    path = tmp_path / "big.tif"
    with rasterio.open(path, "w", driver="GTiff", count=1, height=1024, width=1024,
                       dtype="uint8", nodata=255, crs="EPSG:32630",
                       transform=from_origin(5e5, 4e6, 10, 10)) as raster:  # fmt: skip
        raster.write(numbers, 1)
    cog = gk.export_prediction(path, tmp_path, ["a", "b", "c"], smallest_m2=1e5)["cog"]
    with rasterio.open(cog) as raster:
        assert raster.overviews(1)
        thinned = raster.read(1, out_shape=(256, 256))
    assert set(np.unique(thinned)) <= {0, 2}


def test_polygons_in_degrees_draw_the_same_map(prediction, tmp_path):
    path = gk.export_prediction(prediction, tmp_path)["geojson"]
    table = gpd.read_file(path)
    assert table.crs == "EPSG:4326"
    west, south, east, north = table.total_bounds
    assert -180 <= west < east <= 180 and -90 <= south < north <= 90
    with rasterio.open(prediction) as raster:
        numbers, known = raster.read(1), raster.dataset_mask() > 0
        back = table.to_crs(raster.crs)
        shapes = list(zip(back.geometry, table["number"], strict=True))
        drawn = rasterize(shapes, numbers.shape, fill=255, transform=raster.transform)
    assert (drawn == numbers).mean() > 0.999
    assert (drawn[~known] == 255).all()
    assert table["area_m2"].sum() == pytest.approx(known.sum() * 100, rel=0.01)
    assert [CLASSES[n] for n in table["number"]] == table["class"].tolist()


def test_small_patches_can_be_left_out(prediction, tmp_path):
    path = gk.export_prediction(prediction, tmp_path, smallest_m2=20_000)["geojson"]
    areas = gpd.read_file(path)["area_m2"]
    assert len(areas) and areas.min() >= 20_000


def test_the_picture_has_the_colours_and_a_hole(prediction, tmp_path):
    path = gk.export_prediction(prediction, tmp_path)["png"]
    shown = np.asarray(Image.open(path).convert("RGBA"))
    with rasterio.open(prediction) as raster:
        numbers = raster.read(1)
    assert (shown[numbers == 255][:, 3] == 0).all()
    for number, colour in enumerate(COLOURS):
        there = shown[numbers == number]
        assert (there[:, :3] == list(bytes.fromhex(colour[1:]))).all()
        assert (there[:, 3] == 255).all()


def test_what_cannot_be_exported_is_said(prediction, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        gk.export_prediction(prediction, tmp_path / "nowhere")
    bare = write_scene(tmp_path / "bare.tif", np.zeros((1, 8, 8), np.uint8), ["class"])
    with pytest.raises(ValueError, match="needs classes"):
        gk.export_prediction(bare, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["bare.tif"]


def test_classes_beyond_the_names_and_damaged_files(tmp_path):
    source = tmp_path / "map.tif"
    pixels = np.zeros((1, 64, 64), np.uint8)
    pixels[0, 0, 0] = 7
    place = {"crs": "EPSG:32633", "transform": from_origin(5e5, 5e6, 10, 10)}
    with rasterio.open(source, "w", driver="GTiff", count=1, width=64, height=64,
                       dtype="uint8", compress="deflate", **place) as file:  # fmt: skip
        file.write(pixels)
    with pytest.raises(ValueError, match=r"holds class 7, but 2 classes are named"):
        gk.export_prediction(source, tmp_path, classes=["a", "b"])
    good = source.read_bytes()
    for at in range(8, 260, 14):  # in a child: GDAL may take the process with it
        damaged = bytearray(good)
        damaged[at] ^= 16
        source.write_bytes(damaged)
        child = os.fork()
        if child == 0:
            try:
                gk.export_prediction(source, tmp_path, classes=list("abcdefgh"))
            except (ValueError, OSError, RuntimeError):
                os._exit(0)
            except BaseException:
                os._exit(9)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert not os.WIFSIGNALED(status) and os.WEXITSTATUS(status) == 0, at
