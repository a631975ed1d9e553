"""Scenes and maps as people have them: odd places, odd names, and files in the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pytest
import rasterio
import rasterio.shutil
import rasterio.warp
import shapely
import torch
from affine import Affine
from pyproj import Geod, Transformer
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.enums import Resampling
from rasterio.rpc import RPC
from rasterio.transform import from_origin

import geopeft_kit as gk
from geopeft_kit import geodesy
from geopeft_kit.data import Chip, ChipData, write_chip_folder
from geopeft_kit.data.leakage import touching_chips

RGB = ["RED", "GREEN", "BLUE"]


class Brighter(torch.nn.Module):
    """Class 1 where the first of three bands is above 0.1 of reflectance."""

    task = "segmentation"

    def __init__(self, turned: bool = False) -> None:
        super().__init__()
        self.turned = turned
        self.backbone = torch.nn.Module()
        self.backbone.bands = tuple(RGB)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        score = (image[:, :1] - 0.1) * (-100 if self.turned else 100)
        return torch.cat([-score, score], dim=1)


def write(path: Path, pixels: np.ndarray, **profile: Any) -> Path:
    place = {"crs": "EPSG:32633", "transform": from_origin(5e5, 5.6e6, 10, 10)}
    shape = dict(zip(("count", "height", "width"), pixels.shape, strict=True))
    given = {"driver": "GTiff", "dtype": pixels.dtype.name, **shape, **place, **profile}
    with rasterio.open(path, "w", **given) as file:
        file.write(pixels)
    return path


def scene(path: Path, size: int = 64, **profile: Any) -> Path:
    """Half of it is bright; 3 bands of 16 bits."""
    pixels = np.full((3, size, size), 500, np.uint16)
    pixels[:, :, size // 2 :] = 2000
    return write(path, pixels, **profile)


def predict(source: Any, target: Path, model: Any = None, **options: Any) -> np.ndarray:
    given = {"window": 32, "bands": RGB, "scale": 1e-4, "progress": False} | options
    gk.predict_scene(model or Brighter(), source, target, **given)
    with rasterio.open(target) as file:
        return file.read(1)


# --------------------------------------------------------------------- files in the way


@pytest.mark.parametrize("spelling", ["same", "dots", "link", "vrt", "probabilities"])
def test_the_input_is_never_written_onto(tmp_path: Path, spelling: str) -> None:
    name = "map_probabilities.tif" if spelling == "probabilities" else "scene.tif"
    source = scene(tmp_path / name)
    before, read, target = source.read_bytes(), source, source
    if spelling == "dots":
        target = Path(f"{tmp_path}/../{tmp_path.name}/scene.tif")
    elif spelling == "link":
        target = tmp_path / "link.tif"
        target.symlink_to(source)
    elif spelling == "vrt":
        read = tmp_path / "scene.vrt"
        rasterio.shutil.copy(source, read, driver="VRT")
    elif spelling == "probabilities":
        target = tmp_path / "map.tif"
    with pytest.raises(ValueError, match="is the input itself"):
        predict(read, target, probabilities=True)
    assert source.read_bytes() == before


def test_side_files_of_a_replaced_map_go(tmp_path: Path) -> None:
    source, target = scene(tmp_path / "scene.tif", 256), tmp_path / "map.tif"
    predict(source, target)
    with rasterio.Env(TIFF_USE_OVR=True), rasterio.open(target, "r+") as file:
        file.build_overviews([2, 4], Resampling.nearest)
    assert Path(f"{target}.ovr").exists()
    fine = predict(source, target, Brighter(turned=True))
    with rasterio.open(target) as file:
        coarse = file.read(1, out_shape=(64, 64))
    assert (coarse == fine[::4, ::4]).all()


# ------------------------------------------------------------ places without transform


def test_control_points_and_rpcs_are_handed_on(tmp_path: Path) -> None:
    points = [GroundControlPoint(r, c, 10 + c / 1e3, 50 - r / 1e3)
              for r in (0, 64) for c in (0, 64)]  # fmt: skip
    numbers = [1.0] + [0.0] * 19
    names = [f"{a}_{b}" for a in ("height", "lat", "long", "line", "samp")
             for b in ("off", "scale")]  # fmt: skip
    rpcs = RPC(
        **dict(zip(names, (0, 1, 50, 1, 10, 1, 32, 32, 32, 32), strict=True)),
        **{f"{a}_{b}_coeff": numbers for a in ("line", "samp") for b in ("num", "den")},
        err_bias=0, err_rand=0,
    )  # fmt: skip
    nowhere = {"crs": None, "transform": None}
    predict(scene(tmp_path / "g.tif", **nowhere | {"gcps": points, "crs": "EPSG:4326"}),
            tmp_path / "g_map.tif")  # fmt: skip
    predict(scene(tmp_path / "r.tif", **nowhere, rpcs=rpcs), tmp_path / "r_map.tif")
    with rasterio.open(tmp_path / "g_map.tif") as file:
        found, crs = file.gcps
        assert crs.to_epsg() == 4326
        place = lambda p: (p.row, p.col, p.x, p.y)  # noqa: E731
        assert list(map(place, found)) == list(map(place, points))
    with rasterio.open(tmp_path / "r_map.tif") as file:
        assert file.rpcs is not None and file.rpcs.line_off == 32


# --------------------------------------------------------------- what can be said of it


def test_arguments_are_those_of_from_pairs(tmp_path: Path) -> None:
    source, target = scene(tmp_path / "s.tif"), tmp_path / "map.tif"
    wanted = predict(source, target)
    assert wanted.mean() == 0.5
    assert (predict(source, target, bands="rgb") == wanted).all()
    # The dark half of the first band becomes bright; the other bands play no part.
    assert predict(source, target, scale=[1e-3, 1e-4, 1e-4]).mean() == 1
    assert predict(source, target, scale=[1e-4] * 3, offset=[-1.0, 0, 0]).mean() == 0
    with pytest.raises(ValueError, match="2 numbers for the 3 bands"):
        predict(source, target, scale=[1e-4, 1e-4])


def test_nodata_can_be_said(tmp_path: Path) -> None:
    pixels = np.full((3, 64, 64), 2000, np.uint16)
    pixels[:, :, :20] = 0
    source = write(tmp_path / "s.tif", pixels)
    found = predict(source, tmp_path / "map.tif", nodata=0)
    assert (found[:, :20] == 255).all() and (found[:, 20:] == 1).all()


def test_names_that_only_gdal_knows_are_read(tmp_path: Path) -> None:
    import zipfile

    source = scene(tmp_path / "s.tif")
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as file:
        file.write(source, "inside.tif")
    wanted = predict(source, tmp_path / "a.tif")
    for name in (f"GTIFF_DIR:1:{source}", f"/vsizip/{tmp_path}/s.zip/inside.tif"):
        assert (predict(name, tmp_path / "b.tif") == wanted).all()
    with pytest.raises(FileNotFoundError, match="no raster"):
        predict(tmp_path / "nowhere.tif", tmp_path / "b.tif")


def test_complex_scenes_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "slc.tif", np.ones((3, 64, 64), np.complex64))
    with pytest.raises(ValueError, match=r"complex.*amplitude"):
        predict(source, tmp_path / "map.tif", scale=1.0)


# ------------------------------------------------------------------ degrees, 180, poles

PLACES = {
    "usual": ("EPSG:32633", (15.0, 50.0)),
    "180 degrees": ("EPSG:32760", (180.0, -17.0)),
    "north pole": ("EPSG:3413", (0.0, 90.0)),
    "near a pole": ("EPSG:3031", (179.99, -89.0)),
}


def around(name: str, side: int, pixel: float = 10) -> tuple[str, Affine]:
    crs, lonlat = PLACES[name]
    to_crs = Transformer.from_crs("EPSG:4326", crs, always_xy=True)
    x, y = to_crs.transform(*lonlat)
    half = side * pixel / 2
    return crs, from_origin(round(x) - half, round(y) + half, pixel, pixel)


@pytest.mark.parametrize("name", PLACES)
def test_footprints_centres_and_areas(name: str) -> None:
    crs, transform = around(name, 100)
    shape = geodesy.footprint_of(transform, 100, 100)
    (found,) = geodesy.to_degrees([shape], CRS.from_string(crs))
    west, south, east, north = found.bounds
    assert -180 <= west < east <= 180 and -90 <= south < north <= 90
    ((lon, lat),) = geodesy.centres([found])
    distance = Geod(ellps="WGS84").inv(lon, lat, *PLACES[name][1])[2]
    assert distance < 30, "three pixels"
    plane = geodesy.equal_area(shapely.get_coordinates(found))
    area = gpd.GeoSeries([found], crs=4326).to_crs(plane).area.iloc[0]
    back = Transformer.from_crs(crs, "EPSG:4326", always_xy=True)
    true = abs(Geod(ellps="WGS84").geometry_area_perimeter(
        shapely.transform(shapely.segmentize(shape, 100), lambda xy: np.stack(
            back.transform(*xy.T), 1)))[0])  # fmt: skip
    if name != "north pole":  # geodesics through it are no border
        assert area == pytest.approx(true, rel=0.01)


@pytest.mark.parametrize("name", PLACES)
def test_exported_shapes_have_their_true_size_and_place(
    tmp_path: Path, name: str
) -> None:
    crs, transform = around(name, 64)
    numbers = np.zeros((1, 64, 64), np.uint8)
    numbers[0, 20:40, 10:60] = 1
    source = write(tmp_path / "map.tif", numbers, crs=crs, transform=transform,
                   nodata=255)  # fmt: skip
    written = gk.export_prediction(source, tmp_path, classes=["a", "b"])
    found = gpd.read_file(written["geojson"])
    areas = found.groupby("class")["area_m2"].sum()
    scale = geodesy.metres_per_unit(CRS.from_string(crs), transform, 64, 64) / 10
    assert areas["b"] == pytest.approx(1000 * 100 * scale**2, rel=0.01)
    if name != "north pole":
        widest = max(g.bounds[2] - g.bounds[0] for g in found.geometry.explode())
        assert widest < 1


def test_a_map_across_180_degrees_is_one_picture(tmp_path: Path) -> None:
    crs, transform = around("180 degrees", 64)
    numbers = np.zeros((64, 64), np.uint8)
    numbers[:, 32:] = 1
    layer = gk.MapLayer("m", gk.Raster(numbers, transform, crs), "classes",
                        classes=["a", "b"])  # fmt: skip
    shown = gk.show_map([layer])
    (picture,) = shown.drawing.layers[0].pictures
    (south, west), (north, east) = picture.bounds
    assert 0 < east - west < 1 and 0 < north - south < 1 and west < 180 < east
    degrees = Transformer.from_crs(crs, "EPSG:4326", always_xy=True)
    for column, wanted in ((2, "a"), (61, "b")):
        spot = degrees.transform(*transform @ (column + 0.5, 30.5))
        assert [r.text for r in shown.pixel(*spot)] == [wanted]


@pytest.mark.parametrize("name", ["180 degrees", "north pole"])
def test_chips_there_have_metadata_and_neighbours(tmp_path: Path, name: str) -> None:
    crs, transform = around(name, 32)
    chips = []
    for number in range(4):  # side by side, 320 m each, the second one far away
        shift = Affine.translation(32 * (number - 1) + 2000 * (number == 3), 0)
        pixels = np.random.default_rng(number).integers(1, 3000, (3, 32, 32))
        chips.append(Chip(f"c{number}", pixels.astype("u2"), np.zeros((32, 32), int),
                          split=["test", "train", "train", "train"][number], crs=crs,
                          transform=transform @ shift))  # fmt: skip
    facts = {"name": "Toy", "task": "segmentation", "bands": RGB, "scale": 1e-4,
             "classes": ["a", "b"]}  # fmt: skip
    folder = write_chip_folder(tmp_path / "chips", chips, facts)
    data = ChipData(folder, split="index")
    sample = next(s for s in data.dataset("train") if s["chip"] == "c1")
    distance = Geod(ellps="WGS84").inv(*sample["lonlat"].tolist(), *PLACES[name][1])[2]
    assert distance < 50
    near = touching_chips(data.index, data.index["split"], buffer_m=20)
    assert set(near["train"]) == {"c1"}, "the next chip, and none that is far away"


def test_polygons_across_180_degrees_are_burnt_on_both_sides(tmp_path: Path) -> None:
    crs, transform = around("180 degrees", 128)
    pixels = np.random.default_rng(0).integers(1, 3000, (3, 128, 128)).astype("u2")
    source = write(tmp_path / "scene.tif", pixels, crs=crs, transform=transform)
    _, south, _, north = rasterio.warp.transform_bounds(
        crs, "EPSG:4326", *rasterio.transform.array_bounds(128, 128, transform)
    )
    sides = [shapely.box(179, south, 180, north), shapely.box(-180, south, -179, north)]
    shapes = gpd.GeoDataFrame({"k": ["a", "b"]}, geometry=sides, crs=4326)
    ChipData.from_pairs(
        source, shapes, column="k", classes=["a", "b"], bands="rgb", scale=1e-4,
        folder=tmp_path / "chips", size=32, split="random",
    )  # fmt: skip
    masks = [rasterio.open(p).read(1) for p in (tmp_path / "chips/masks").glob("*")]
    for number in (0, 1):
        assert (np.stack(masks) == number).sum() > 0.4 * 128**2


@pytest.mark.parametrize("tiled", [False, True])
def test_strips_are_decoded_once_for_a_row_of_windows(
    tmp_path: Path, tiled: bool
) -> None:
    """The cache holds what a row of windows needs, where strips cross them all."""
    from geopeft_kit.scenes.rasters import SceneReader

    wide = np.zeros((3, 256, 40_000), np.float32)
    source = write(tmp_path / "wide.tif", wide, tiled=tiled, compress="deflate")
    with SceneReader(source, None, scale=1.0, window=256):
        cache = rasterio.env.getenv()["GDAL_CACHEMAX"]
    usual = 128 * 1024**2
    assert cache == usual if tiled else cache >= max(wide.nbytes, usual + 1)
