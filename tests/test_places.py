"""Any place: windows of rasters and of a real STAC API become reflectance, by name."""

from __future__ import annotations

import socket

import numpy as np
import pytest
import rasterio
import rasterio.shutil
import torch
from rasterio.io import MemoryFile
from rasterio.transform import from_origin
from rasterio.warp import transform as to_crs
from rasterio.warp import transform_bounds
from stac_server import Catalogue, serve
from test_inference import BANDS, Net

import geopeft_kit as gk
from geopeft_kit.scenes.stac import fmask_hides

CRS, LEFT, TOP, SIDE = "EPSG:32631", 500_000, 4_900_020, 10
GRID = from_origin(LEFT, TOP, SIDE, SIDE)
BIG = 1024  # pixels of a scene


def numbers(seed: int, size: int = BIG) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 10_000, (size, size), np.uint16)


def write_cog(path, array, pixel=SIDE, nodata=0):
    profile = {"driver": "GTiff", "count": 1, "dtype": array.dtype, "nodata": nodata,
               "height": array.shape[0], "width": array.shape[1], "crs": CRS,
               "transform": from_origin(LEFT, TOP, pixel, pixel)}  # fmt: skip
    with MemoryFile() as memory:
        with memory.open(**profile) as raster:
            raster.write(array, 1)
        with memory.open() as raster:
            rasterio.shutil.copy(raster, path, driver="COG", blocksize=256)


def window_box(row, column, rows, columns, inset=0.25):
    """Degrees of a box that only just misses the outer pixels' outer edges."""
    west, north = LEFT + (column + inset) * SIDE, TOP - (row + inset) * SIDE
    east = LEFT + (column + columns - inset) * SIDE
    south = TOP - (row + rows - inset) * SIDE
    return transform_bounds(CRS, "EPSG:4326", west, south, east, north, densify_pts=2)


def item(name, url, clouds=0.0, part=1.0, day="2024-06-10", collection="sentinel-2-l2a",
         assets=None, **properties):  # fmt: skip
    """A STAC item whose footprint holds the western `part` of the scene."""
    east = LEFT + part * BIG * SIDE
    xs, ys = to_crs(CRS, "EPSG:4326", [LEFT, east, east, LEFT],
                    [TOP, TOP, TOP - BIG * SIDE, TOP - BIG * SIDE])  # fmt: skip
    ring = [list(pair) for pair in zip(xs, ys, strict=True)]
    return {
        "type": "Feature", "stac_version": "1.0.0", "id": name, "links": [],
        "collection": collection, "bbox": [min(xs), min(ys), max(xs), max(ys)],
        "geometry": {"type": "Polygon", "coordinates": [[*ring, ring[0]]]},
        "properties": {"datetime": f"{day}T10:00:00Z", "eo:cloud_cover": clouds,
                       **properties},
        "assets": {key: {"href": f"{url}/{file}", "roles": ["data"], **more}
                   for key, (file, more) in (assets or {}).items()},
    }  # fmt: skip


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for seed, name in enumerate(("blue", "green", "red")):
        write_cog(folder / f"{name}.tif", numbers(seed))
    half = numbers(9, BIG // 2)
    write_cog(folder / "swir.tif", half, pixel=2 * SIDE)
    clear = np.full((BIG // 2, BIG // 2), 4, np.uint8)
    clear[:20, 20:] = 9  # cloud over rows 0 to 39, from column 40 on
    write_cog(folder / "scl.tif", clear, pixel=2 * SIDE)
    fmask = np.full((BIG, BIG), 0b0110_0000, np.uint8)
    fmask[:8, :8] = 0b0000_0010
    fmask[8:16, :8] = 0b0010_0000  # water is not hidden
    write_cog(folder / "fmask.tif", fmask, nodata=255)
    write_cog(folder / "hls.tif", numbers(3).astype(np.int16), nodata=-9999)
    with serve(Catalogue(folder)) as held:
        yield held


STATED = {"raster:bands": [{"scale": 1e-4, "offset": -0.1, "nodata": 0}]}
EARTH_SEARCH = {
    "blue": ("blue.tif", STATED), "green": ("green.tif", STATED),
    "red": ("red.tif", STATED), "swir16": ("swir.tif", STATED),
    "scl": ("scl.tif", {}), "blue-jp2": ("missing.jp2", {}),
    "thumbnail": ("t.jpg", {"roles": ["thumbnail"]}),
}  # fmt: skip


def fetch(catalogue, tmp_path, bands=BANDS, box=None, **options):
    box = box or window_box(200, 300, 16, 24)
    path = gk.fetch_scene(box, tmp_path / "scene.tif", catalogue.url, bands, **options)
    with rasterio.open(path) as raster:
        return raster.read(), raster.profile, raster.descriptions, raster.tags()


def test_a_window_of_the_least_cloudy_scene_that_shows_the_box(catalogue, tmp_path):
    make = {"assets": EARTH_SEARCH, "earthsearch:boa_offset_applied": False}
    catalogue.items = [
        item("cloudy", catalogue.url, 80, **make),
        item("early", catalogue.url, 0, day="2023-06-10", **make),
        item("aside", catalogue.url, 0, part=0.3, **make),
        item("good", catalogue.url, 7, **make),
    ]
    catalogue.ranges, catalogue.sent = [], 0
    catalogue.searches.clear()
    image, profile, names, tags = fetch(catalogue, tmp_path)
    assert tags["scene"] == "good" and tags["cloud_cover"] == "7"
    assert len(catalogue.searches) == 2, "the second page was not asked for"
    assert names == BANDS
    expected = [numbers(s)[200:216, 300:324] * 1e-4 - 0.1 for s in range(3)]
    assert image == pytest.approx(np.stack(expected), abs=1e-6)
    assert profile["crs"] == CRS
    assert profile["transform"].c == LEFT + 300 * SIDE
    whole = sum(p.stat().st_size for p in catalogue.folder.glob("*.tif"))
    assert all(catalogue.ranges), "a file was asked for without a range"
    assert catalogue.sent < whole / 4, f"{catalogue.sent} of {whole} bytes were read"


@pytest.mark.parametrize(("asset", "properties", "offset"), [
    (STATED, {}, -0.1),
    (STATED, {"earthsearch:boa_offset_applied": True}, 0.0),
    (STATED, {"earthsearch:boa_offset_applied": False}, -0.1),
    ({}, {"s2:processing_baseline": "05.09"}, -0.1),
    ({}, {"s2:processing_baseline": "04.00"}, -0.1),
    ({}, {"s2:processing_baseline": "03.01"}, 0.0),
    ({"raster:scale": 2e-4, "raster:offset": -0.2}, {}, -0.2),
    ({"bands": [{"name": "B04", "raster:offset": -0.3}]}, {}, -0.3),
])  # fmt: skip
def test_the_offset_is_the_item_s_own(catalogue, tmp_path, asset, properties, offset):
    assets = {"B04": ("red.tif", asset), "SCL": ("scl.tif", {})}
    catalogue.items = [item("one", catalogue.url, assets=assets, **properties)]
    image, *_ = fetch(catalogue, tmp_path, ["RED"])
    scale = asset.get("raster:scale", 1e-4)
    expected = numbers(2)[200:216, 300:324] * scale + offset
    assert image[0] == pytest.approx(expected, abs=1e-6)


def test_clouds_are_masked_by_the_scene_s_own_band(catalogue, tmp_path):
    catalogue.items = [item("one", catalogue.url, assets=EARTH_SEARCH)]
    box = window_box(30, 30, 20, 20)
    image, *_ = fetch(catalogue, tmp_path, box=box)
    clouded = np.zeros((20, 20), bool)
    clouded[:10, 10:] = True
    assert (np.isnan(image) == clouded).all()
    image, *_ = fetch(catalogue, tmp_path, box=box, mask_clouds=False)
    assert np.isfinite(image).all()
    with pytest.raises(LookupError, match="no clear pixel in the box"):
        fetch(catalogue, tmp_path, box=window_box(2, 60, 10, 10))


@pytest.mark.parametrize(("name", "keys"), [
    ("HLS.S30.T31TCJ.2024", ("B04", "B8A")), ("HLS.L30.T31TCJ.2024", ("B04", "B05")),
])  # fmt: skip
def test_hls_by_its_own_names_and_fmask(catalogue, tmp_path, name, keys):
    assets = {keys[0]: ("hls.tif", {}), keys[1]: ("hls.tif", {}),
              "Fmask": ("fmask.tif", {})}  # fmt: skip
    catalogue.items = [item(name, catalogue.url, assets=assets, collection="HLSx30")]
    box = window_box(0, 0, 20, 20)
    image, *_ = fetch(
        catalogue, tmp_path, ["NIR_NARROW", "RED"], box, collection="HLSx30"
    )
    hidden = np.zeros((20, 20), bool)
    hidden[:8, :8] = True
    assert (np.isnan(image) == hidden).all()
    expected = numbers(3)[:20, :20] * 1e-4
    assert image[1][~hidden] == pytest.approx(expected[~hidden], abs=1e-6)


def test_fmask_bits():
    values = [0, 0b10, 0b100, 0b1000, 0b1_0000, 0b10_0000, 0b1100_0000, 255]
    hidden = [False, True, True, True, False, False, False, True]
    assert fmask_hides(np.array(values)).tolist() == hidden


def test_another_grid_is_warped_to(catalogue, tmp_path):
    """A coarse band lies on the fine grid; in degrees, values stay at their place."""
    catalogue.items = [item("one", catalogue.url, assets=EARTH_SEARCH)]
    image, *_ = fetch(catalogue, tmp_path, ["RED", "SWIR_1"])
    assert image.shape == (2, 16, 24)
    box = window_box(200, 300, 16, 24)
    image, profile, *_ = fetch(catalogue, tmp_path, ["RED"], box, crs="EPSG:4326",
                               resolution=2e-5)  # fmt: skip
    assert profile["crs"] == "EPSG:4326"
    rows, columns = np.mgrid[4:12, 6:18]
    east = LEFT + (300.5 + columns.ravel()) * SIDE
    north = TOP - (200.5 + rows.ravel()) * SIDE
    lon, lat = to_crs(CRS, "EPSG:4326", east.tolist(), north.tolist())
    places = [~profile["transform"] @ pair for pair in zip(lon, lat, strict=True)]
    found = [image[0, int(row), int(column)] for column, row in places]
    expected = numbers(2)[200 + rows.ravel(), 300 + columns.ravel()] * 1e-4 - 0.1
    assert np.corrcoef(found, expected)[0, 1] > 0.98


def test_a_local_raster_is_read_by_window(tmp_path):
    image = np.stack([numbers(s, 128) for s in range(3)])
    path = tmp_path / "local.tif"
    with rasterio.open(path, "w", driver="GTiff", count=3, height=128, width=128,
                       dtype="uint16", crs=CRS, nodata=0,
                       transform=GRID) as raster:  # fmt: skip
        raster.write(image)
        raster.descriptions, raster.scales = ("RED", "BLUE", "GREEN"), (1e-4,) * 3
    vrt = tmp_path / "local.vrt"
    rasterio.shutil.copy(path, vrt, driver="VRT")
    for source in (path, vrt):
        out = gk.fetch_scene(
            window_box(5, 9, 30, 20), tmp_path / "o.tif", source, BANDS
        )
        with rasterio.open(out) as raster:
            assert raster.descriptions == BANDS
            expected = image[[1, 2, 0], 5:35, 9:29] * 1e-4
            assert raster.read() == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match="no data in this box"):
        gk.fetch_scene(window_box(500, 500, 9, 9), tmp_path / "o.tif", path, BANDS)


def test_a_place_becomes_layers(catalogue, tmp_path):
    catalogue.items = [item("one", catalogue.url, assets=EARTH_SEARCH)]
    torch.manual_seed(0)
    model = Net(torch.nn.Conv2d(3, 2, 1))
    box = window_box(200, 300, 40, 60)
    for number in (1, 2):
        image, prediction, sure = gk.predict_place(
            box, model, catalogue.url, tmp_path, ["land", "water"], name="net"
        )
        assert prediction.name == f"net of box {number}"
    with rasterio.open(prediction.source) as raster:
        classes = raster.read(1)
    with rasterio.open(image.source) as raster, torch.no_grad():
        logits = model(torch.from_numpy(raster.read()[None]))[0]
    assert (classes == logits.argmax(0).numpy()).all()
    with rasterio.open(sure.source) as raster:
        highest = logits.softmax(0).amax(0).numpy()
        assert raster.read(1) == pytest.approx(highest, abs=1e-5)
    west, south, east, north = box
    scene = gk.show_map([image, prediction, sure])
    found = {r.layer: r for r in scene.pixel((west + east) / 2, (south + north) / 2)}
    assert sum(found["net of box 2"].values) == pytest.approx(1, abs=1e-5)
    assert len(found["image of box 2"].values) == 3


def test_without_a_network_one_sentence_says_so(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(RuntimeError, match="cannot be reached") as error:
        gk.fetch_scene((3, 44, 3.1, 44.1), tmp_path / "o.tif", url)
    assert str(error.value).count(". ") == 0 and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_had_is_said(catalogue, tmp_path):
    catalogue.items = [item("one", catalogue.url, assets=EARTH_SEARCH)]
    with pytest.raises(LookupError, match="has no NIR_NARROW; it has BLUE, GREEN, RED"):
        fetch(catalogue, tmp_path, ["RED", "NIR_NARROW"])
    with pytest.raises(LookupError, match="no scene of 'hls'"):
        fetch(catalogue, tmp_path, collection="hls")
    catalogue.items = [item("x", catalogue.url, assets={"red": ("red.tif", {})})]
    with pytest.raises(LookupError, match="neither SCL nor Fmask"):
        fetch(catalogue, tmp_path, ["RED"])
    catalogue.items[0]["collection"] = "other"
    with pytest.raises(LookupError, match="how its numbers become reflectance"):
        fetch(catalogue, tmp_path, ["RED"], collection="other")
    catalogue.items = [item("x", catalogue.url, assets={"red": ("gone.tif", {})})]
    with pytest.raises(
        RuntimeError, match="gone.tif cannot be read.*Check the network"
    ):
        fetch(catalogue, tmp_path, ["RED"], mask_clouds=False)
    assert not (tmp_path / "scene.tif").exists()


@pytest.mark.parametrize(("box", "text"), [
    ((3, 44, 2, 45), "west below east"), ((3, 44, 4), "west, south, east, north"),
    ((3, 44, 3.9, 44.9), "smaller box"),
])  # fmt: skip
def test_bad_boxes_say_what_to_do(tmp_path, box, text):
    path = tmp_path / "local.tif"
    write_cog(path, numbers(0, 64))
    with pytest.raises(ValueError, match=text):
        gk.fetch_scene(box, tmp_path / "o.tif", path)
    with pytest.raises(FileNotFoundError, match="no raster at .*nil.tif"):
        gk.fetch_scene((3, 44, 3.01, 44.01), tmp_path / "o.tif", tmp_path / "nil.tif")


@pytest.mark.parametrize("href", ["file://{0}", "{0}", "/vsistdin/", "<VRTDataset/>"])
def test_a_catalogue_cannot_name_files_of_this_machine(catalogue, tmp_path, href):
    catalogue.items = [item("one", catalogue.url, assets=EARTH_SEARCH)]
    secret = catalogue.folder / "red.tif"
    catalogue.items[0]["assets"]["red"]["href"] = href.format(secret)
    with pytest.raises(ValueError, match="only addresses that begin with https"):
        fetch(catalogue, tmp_path)


def test_nulls_of_catalogues_are_read_and_numbers_are_checked(catalogue, tmp_path):
    def one(**stated):
        usual = {"scale": 1e-4, "offset": -0.1, "nodata": 0}
        bands = {"raster:bands": [usual | stated]}
        found = item("one", catalogue.url, assets={"red": ("red.tif", bands)})
        found["properties"]["eo:cloud_cover"] = found["geometry"] = None
        catalogue.items = [found]
        return fetch(catalogue, tmp_path, ["RED"], mask_clouds=False)[0]

    wanted = numbers(2)[200:216, 300:324] * 1e-4 - 0.1
    for null in ("nodata", "scale"):
        assert one(**{null: None})[0] == pytest.approx(wanted, abs=1e-6)
    with pytest.raises(ValueError, match="not the side of a pixel"):
        fetch(catalogue, tmp_path, ["RED"], resolution=-10, mask_clouds=False)
    for scale in ("abc", 0, float("nan")):
        with pytest.raises(ValueError, match="the scene one states scale="):
            one(scale=scale)


def test_a_full_disk_leaves_the_old_scene(tmp_path):
    """A limit on the size of files, as a disk that fills up in the last block."""
    import os
    import resource

    source = tmp_path / "source.tif"
    profile = {"driver": "GTiff", "count": 1, "dtype": "uint16", "width": BIG,
               "height": BIG, "crs": CRS, "transform": GRID}  # fmt: skip
    with rasterio.open(source, "w", **profile) as raster:
        raster.write(numbers(1), 1)
        raster.descriptions, raster.scales = ("RED",), (1e-4,)
    target, box = tmp_path / "out.tif", window_box(100, 100, 300, 300)
    gk.fetch_scene(box, target, source, bands=["RED"])
    good = target.read_bytes()
    for less in (1, 4, 16):
        child = os.fork()
        if child == 0:
            limit = len(good) // 1024 * 1024 - less * 1024
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                gk.fetch_scene(box, target, source, bands=["RED"])
            except RuntimeError:
                os._exit(7)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status == 7, "no error was raised"
        assert target.read_bytes() == good
        assert sorted(tmp_path.iterdir()) == [target, source]
