"""The user's own data: what lies on the ground is in the mask; what is odd is named."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import rasterio
import shapely
import torch
from pyproj import Geod, Transformer
from rasterio.transform import from_origin

import geopeft_kit as gk
from geopeft_kit.data.own.regions import draw_regions
from geopeft_kit.data.own.scale_check import propose_scale, sample_values
from geopeft_kit.geodesy import metres_per_unit

HLS = ("BLUE", "GREEN", "RED", "NIR_NARROW", "SWIR_1", "SWIR_2")
UTM = "EPSG:32632"
CORNER = 500_000, 5_600_000  # of the scene, in UTM zone 32
STATED: dict[str, Any] = {"bands": HLS, "scale": 1e-4}
WET = STATED | {"classes": ["land", "water"]}


def write(path: Path, pixels: np.ndarray, **profile: Any) -> Path:
    pixels = pixels[None] if pixels.ndim == 2 else pixels
    path.parent.mkdir(parents=True, exist_ok=True)
    given = {"crs": UTM, "transform": from_origin(*CORNER, 10, 10), "driver": "GTiff"}
    shape = dict(zip(("count", "height", "width"), pixels.shape, strict=True))
    with rasterio.open(
        path, "w", dtype=pixels.dtype.name, **shape, **given | profile
    ) as file:
        file.write(pixels)
    return path


def pixels(seed: int = 0, bands: int = 6, height: int = 16, width: int = 16):
    rng = np.random.default_rng(seed)
    return rng.integers(1, 4000, (bands, height, width)).astype(np.uint16)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Two folders with eight images and masks, in two regions 20 km apart."""
    for number in range(8):
        region = ["north", "south"][number // 4]
        place = from_origin(
            CORNER[0] + 2000 * number, 5.6e6 - 5e3 * (number // 4), 10, 10
        )
        name = f"{region}/tile_{number}.tif"
        write(tmp_path / "images" / name, pixels(number), transform=place)
        mask = np.random.default_rng(number).integers(0, 2, (16, 16)).astype(np.uint8)
        write(tmp_path / "masks" / name, mask, transform=place)
    return tmp_path


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scene of 180 x 200 pixels whose first band counts the pixels."""
    values = pixels(3, height=180, width=200)
    values[0] = np.arange(180 * 200).reshape(180, 200) % 5000
    return write(tmp_path_factory.mktemp("scene") / "scene.tif", values)


def lonlat_polygons() -> gpd.GeoDataFrame:
    """Two triangles, drawn in degrees, that overlap; the later one is land."""
    to_degrees = Transformer.from_crs(UTM, "EPSG:4326", always_xy=True)
    x, y = CORNER

    def triangle(*corners: tuple[float, float]) -> shapely.Polygon:
        return shapely.Polygon(
            [to_degrees.transform(x + right, y - down) for right, down in corners]
        )

    wet = triangle((50, 50), (1900, 300), (400, 1700))
    dry = triangle((900, 100), (1950, 900), (700, 1100))
    return gpd.GeoDataFrame({"kind": ["water", "land"]}, geometry=[wet, dry], crs=4326)


def files_of(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


# ------------------------------------------------------------ folders, lists, tables


def test_two_folders_are_read_where_they_lie(pairs: Path) -> None:
    before = files_of(pairs)
    data = gk.ChipData.from_pairs(
        pairs / "images", pairs / "masks", test_regions=["south"], val_fraction=0.25,
        **WET,
    )  # fmt: skip
    assert files_of(pairs) == before, "in place means that nothing is written"
    assert data.regions == ["north", "south"]
    assert set(data.index.loc[data.index["split"] == "test", "region"]) == {"south"}
    sample = data.dataset("test")[0]
    np.testing.assert_allclose(sample["image"], pixels(4) * 1e-4, rtol=1e-6)
    mask = np.random.default_rng(4).integers(0, 2, (16, 16))
    assert torch.equal(sample["mask"], torch.tensor(mask))
    assert sample["chip"] == "south_tile_4"


def test_a_folder_that_is_written_holds_the_same(pairs: Path) -> None:
    given = WET | {"test_regions": ["south"]}
    images, masks = pairs / "images", pairs / "masks"
    here = gk.ChipData.from_pairs(images, masks, **given)
    there = gk.ChipData.from_pairs(images, masks, folder=pairs / "chips", **given)
    again = gk.ChipData(pairs / "chips", test_regions=["south"])
    for i in range(4):
        a, b, c = (data.dataset("test")[i] for data in (here, there, again))
        for key in ("image", "mask", "bounds", "lonlat"):
            assert torch.equal(a[key], b[key]) and torch.equal(b[key], c[key])
    assert not list(pairs.rglob("*.part"))


def test_lists_and_suffixes(pairs: Path) -> None:
    for mask in (pairs / "masks").rglob("*.tif"):
        mask.rename(mask.with_name(f"{mask.stem}_label.tif"))
    images = sorted((pairs / "images").rglob("*.tif"))
    masks = sorted((pairs / "masks").rglob("*.tif"))
    with pytest.raises(ValueError, match=r"8 images have no mask.*'_label'\)"):
        gk.ChipData.from_pairs(images, masks, **WET)
    data = gk.ChipData.from_pairs(
        images, masks, suffixes=("", "_label"), regions="folder", **WET
    )
    assert len(data.index) == 8
    assert data.test_regions in (["north"], ["south"])


def test_a_table_brings_regions_splits_and_dates(pairs: Path) -> None:
    files = sorted(
        p.relative_to(pairs / "images") for p in (pairs / "images").rglob("*.tif")
    )
    table = pd.DataFrame(
        {
            "image": [f"images/{f}" for f in files],
            "mask": [f"masks/{f}" for f in files],
            "region": ["a"] * 4 + ["b"] * 4,
            "split": ["train"] * 3 + ["val"] + ["test"] * 4,
            "date": "2024-03-01",
        }
    )
    table.to_csv(pairs / "list.csv", index=False, sep=";", encoding="utf-8-sig")
    data = gk.ChipData.from_pairs(pairs / "list.csv", split="index", **WET)
    assert data.index["split"].tolist() == table["split"].tolist()
    assert data.regions == ["a", "b"]
    assert data.dataset("test")[0]["date"].tolist() == [[2024, 60]]
    table["image"] = [str(pairs / name) for name in table["image"]]
    table["mask"] = [str(pairs / name) for name in table["mask"]]
    same = gk.ChipData.from_pairs(table, split="index", **WET)
    assert same.index["chip"].tolist() == data.index["chip"].tolist()


def test_a_table_of_labels_is_classification(pairs: Path) -> None:
    images = sorted((pairs / "images").rglob("*.tif"))
    table = pd.DataFrame({"image": images, "label": ["dry", "wet"] * 4})
    table["region"] = ["a", "b"] * 4
    with pytest.raises(ValueError, match=r"what are the classes\? Found are dry, wet"):
        gk.ChipData.from_pairs(table, **STATED)
    data = gk.ChipData.from_pairs(
        table, classes=["wet", "dry"], folder=pairs / "chips", **STATED
    )
    assert data.task == "classification"
    assert set(data.index["label"]) == {0, 1}
    assert data.index["label"].iloc[0] == 1


def test_masks_with_other_numbers_are_renumbered(pairs: Path) -> None:
    for path in (pairs / "masks").rglob("*.tif"):
        with rasterio.open(path, "r+") as file:
            file.write(np.where(file.read() == 1, 200, 7).astype(np.uint8))
    masks = {"images": pairs / "images", "masks": pairs / "masks"}
    with pytest.raises(ValueError, match="Found are 7, 200"):
        gk.ChipData.from_pairs(**masks, **STATED)
    given = STATED | {"classes": {7: "land", 200: "water"}}
    with pytest.raises(ValueError, match="writes new files: pass folder"):
        gk.ChipData.from_pairs(**masks, **given)
    data = gk.ChipData.from_pairs(
        **masks, **given, folder=pairs / "chips", test_regions=["south"]
    )
    expected = np.random.default_rng(4).integers(0, 2, (16, 16))
    assert torch.equal(data.dataset("test")[0]["mask"], torch.tensor(expected))
    with pytest.raises(
        ValueError, match="mask value 200 is outside the classes; allowed are 7, 9"
    ):
        gk.ChipData.from_pairs(
            **masks, **STATED, classes={7: "land", 9: "w"}, folder=pairs / "no"
        )
    assert not (pairs / "no").exists()


def spoil_type(pairs: Path) -> None:
    place = from_origin(CORNER[0] + 2000, 5.6e6, 10, 10)
    values = (pixels(1) * 1e-4).astype(np.float32)
    write(pairs / "images/north/tile_1.tif", values, transform=place)


def spoil_twin(pairs: Path) -> None:
    shutil.copy(pairs / "images/north/tile_1.tif", pairs / "images/north/tile_1.tiff")


def spoil_partner(pairs: Path) -> None:
    (pairs / "masks/north/tile_1.tif").unlink()


def spoil_end(pairs: Path) -> None:
    path = pairs / "images/north/tile_1.tif"
    path.write_bytes(path.read_bytes()[:700])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_type, "holds? float32 values|is float32"),
        (spoil_twin, "two images are called 'north/tile_1'"),
        (spoil_partner, r"1 images have no mask \('north/tile_1'\)"),
        (spoil_end, "tile_1.*cannot be read"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("folder", ["chips", None])
def test_what_does_not_fit_is_named_and_nothing_is_left(
    pairs: Path, spoil: Any, message: str, folder: str | None
) -> None:
    spoil(pairs)
    before = files_of(pairs)
    target = pairs / folder if folder else None
    with pytest.raises((ValueError, RuntimeError), match=message):
        gk.ChipData.from_pairs(pairs / "images", pairs / "masks", folder=target, **WET)
    assert files_of(pairs) == before


def test_chips_that_are_written_and_cannot_be_split_stay(pairs: Path) -> None:
    images, masks, chips = (pairs / name for name in ("images", "masks", "chips"))
    with pytest.raises(ValueError, match=r"nowhere.*open them with gk\.ChipData\(.*"):
        gk.ChipData.from_pairs(
            images, masks, folder=chips, test_regions=["nowhere"], **WET
        )
    assert gk.ChipData(chips, test_regions=["south"]).regions == ["north", "south"]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("Image,mask\na,b\n", "'Image' may be meant as 'image'"),
        ("image\na.tif\n", "one of mask and label"),
        ("image,label\n", "has no rows"),
        ("", "not readable as a table"),
        ("image,label\n,dry\n", "row 0: the cell of 'image' is empty"),
        ("image,label\nnowhere.tif,dry\n", "row 0: there is no image"),
        (
            "image,label,date\nx.tif,dry,31st of May\n",
            "row 0: '31st of May' is not a date",
        ),
        ("image,label\nx.tif,dry\nx.tif,wet\n", "rows 0 and 1 name the same image"),
    ],
)
def test_tables_that_cannot_be_right(tmp_path: Path, table: str, message: str) -> None:
    write(tmp_path / "x.tif", pixels())
    (tmp_path / "list.csv").write_text(table)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        gk.ChipData.from_pairs(tmp_path / "list.csv", **STATED, classes=["dry", "wet"])


def test_a_table_in_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_bytes("image,label\nHöhe.tif,dry\n".encode("latin-1"))
    with pytest.raises(ValueError, match="not in UTF-8.*CSV UTF-8"):
        gk.ChipData.from_pairs(tmp_path / "list.csv", **WET)


# ------------------------------------------------------------ asked, never assumed


@pytest.mark.parametrize(
    ("values", "scale", "offset"),
    [
        (np.uint16([100, 1500, 3900]), 1e-4, 0),
        (np.uint16([1100, 2500, 4900]), 1e-4, -0.1),
        (np.uint16([7500, 12000, 20000]), 2.75e-5, -0.2),
        (np.uint8([3, 100, 250]), 1 / 255, 0),
        (np.float32([0.01, 0.2, 0.6]), 1, 0),
        (np.float32([1, 20, 60]), 0.01, 0),
    ],
)
def test_the_scale_is_proposed_and_never_applied(
    tmp_path: Path, values: np.ndarray, scale: float, offset: float
) -> None:
    image = np.resize(values, (6, 16, 16)).astype(values.dtype)
    path = write(tmp_path / "images/a.tif", image)
    write(tmp_path / "masks/a.tif", np.zeros((16, 16), np.uint8))
    found = propose_scale(sample_values([path]))
    assert found[:2] == pytest.approx((scale, offset))
    with pytest.raises(ValueError, match=f"bands='hls'.*scale={scale:.6g}"):
        gk.ChipData.from_pairs(tmp_path / "images", tmp_path / "masks")


def test_names_and_scales_of_the_files_are_proposed_first(tmp_path: Path) -> None:
    path = write(tmp_path / "images/a.tif", pixels(bands=3))
    write(tmp_path / "masks/a.tif", np.zeros((16, 16), np.uint8))
    with rasterio.open(path, "r+") as file:
        file.descriptions = ("B8A", "B04", "B03")
        file.scales, file.offsets = [0.0002] * 3, [-0.1] * 3
    parts = (
        r"'NIR_NARROW', 'RED', 'GREEN'.*scale=0.0002, offset=-0.1.*say so themselves"
    )
    with pytest.raises(ValueError, match=parts):
        gk.ChipData.from_pairs(tmp_path / "images", tmp_path / "masks")


@pytest.mark.parametrize("scale", [1.0, 1e-8])
def test_a_scale_that_cannot_be_right_is_refused(pairs: Path, scale: float) -> None:
    given = WET | {"scale": scale}
    with pytest.raises(ValueError, match=r"median reflectance.*Perhaps scale=0.0001"):
        gk.ChipData.from_pairs(pairs / "images", pairs / "masks", **given)


def test_too_few_names(pairs: Path) -> None:
    given = WET | {"bands": "rgb"}
    with pytest.raises(ValueError, match="has 6 bands, but 3 are named"):
        gk.ChipData.from_pairs(pairs / "images", pairs / "masks", **given)


# ------------------------------------------------------------ a scene with polygons


@pytest.mark.parametrize("overlap", [0.3, pytest.param(0.0, marks=pytest.mark.slow)])
def test_each_pixel_has_the_class_of_the_polygon_at_its_centre(
    scene: Path, tmp_path: Path, overlap: float
) -> None:
    polygons = lonlat_polygons()
    # a random split sets no chip aside, as one by region does where chips touch
    data = _cut(scene, tmp_path, overlap, split="random")
    to_degrees = Transformer.from_crs(UTM, "EPSG:4326", always_xy=True)
    checked = 0
    for split in data.splits:
        for sample in data.dataset(split):
            left, _, _, top = sample["bounds"].tolist()
            row, column = np.mgrid[:32, :32] + 0.5
            lon, lat = to_degrees.transform(left + 10 * column, top - 10 * row)
            points = shapely.points(lon, lat)
            wet = shapely.contains(polygons.geometry[0], points)
            dry = shapely.contains(polygons.geometry[1], points)
            expected = np.where(dry, 0, np.where(wet, 1, 255))
            assert (sample["mask"].numpy() == expected).all()
            # and the image is the scene's own
            first = int(round((CORNER[1] - top) / 10)) * 200 + round(
                (left - CORNER[0]) / 10
            )
            assert round(sample["image"][0, 0, 0].item() * 1e4) == first % 5000
            checked += 1
    assert checked == len(data.index) > 10


def _cut(scene: Path, folder: Path, overlap: float = 0.0, **options: Any):
    given = WET | {"column": "kind", "size": 32, "block_m": 900} | options
    return gk.ChipData.from_pairs(
        scene, lonlat_polygons(), folder=folder / "chips", overlap=overlap, **given
    )


def test_later_polygons_win_and_background_is_a_choice(
    scene: Path, tmp_path: Path
) -> None:
    data = _cut(scene, tmp_path, background="land")
    assert all((data.dataset(s)[0]["mask"] != 255).all() for s in data.splits)
    # with land everywhere, no window is left out
    assert len(data.index) > len(_cut(scene, tmp_path / "b").index)


@pytest.mark.parametrize(
    "buffer_m", [233.0, pytest.param(100.0, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("crs", [UTM, "EPSG:4326", "EPSG:3857"])
def test_no_test_chip_is_within_the_buffer(
    tmp_path: Path, buffer_m: float, crs: str
) -> None:
    transform = {
        UTM: from_origin(*CORNER, 10, 10),
        "EPSG:4326": from_origin(9, 50.5, 1.4e-4, 0.9e-4),
        "EPSG:3857": from_origin(1e6, 6.5e6, 15, 15),
    }[crs]
    path = write(
        tmp_path / "s.tif", pixels(height=120, width=120), crs=crs, transform=transform
    )
    with rasterio.open(path) as file:
        everywhere = gpd.GeoDataFrame(geometry=[shapely.box(*file.bounds)], crs=crs)
    data = gk.ChipData.from_pairs(
        path, everywhere, folder=tmp_path / "c", buffer_m=buffer_m, block_m=500,
        size=16, overlap=0.5, val_fraction=0, bands=HLS, scale=1e-4, classes=["a"],
    )  # fmt: skip
    assert len(data.regions) == 4 or crs != UTM
    corners = data.index.geometry.map(lambda g: np.array(g.exterior.coords)[:4])
    by_split = {
        split: np.concatenate(corners[data.index["split"] == split].tolist())
        for split in ("train", "test")
    }
    a, b = by_split["test"], by_split["train"]
    pairs = np.repeat(a, len(b), axis=0), np.tile(b, (len(a), 1))
    metres = Geod(ellps="WGS84").inv(*pairs[0].T, *pairs[1].T)[2]
    assert metres.min() >= buffer_m * 0.999


def test_regions_of_polygons_and_several_scenes(scene: Path, tmp_path: Path) -> None:
    x, y = CORNER
    halves = gpd.GeoDataFrame(
        {"region": ["west", "east"]},
        geometry=[
            shapely.box(x, y - 1800, x + 1000, y),
            shapely.box(x + 1000, y - 1800, x + 2000, y),
        ],
        crs=UTM,
    ).to_crs(4326)
    alone = {"val_fraction": 0, "test_regions": ["east"]}
    data = _cut(scene, tmp_path, regions=halves, **alone)
    assert data.regions == ["east", "west"]
    for sample in data.dataset("test"):
        assert sample["bounds"][0] >= x + 1000 - 1
    place = from_origin(x + 50_000, y, 10, 10)
    other = write(tmp_path / "two.tif", pixels(height=64, width=64), transform=place)
    shapes = lonlat_polygons()
    more = gpd.GeoDataFrame(
        {"kind": ["water"]},
        geometry=[shapely.box(x + 50_000, y - 640, x + 50_640, y)],
        crs=UTM,
    )
    both = pd.concat([shapes.to_crs(UTM), more])
    data = gk.ChipData.from_pairs(
        [scene, other], both, folder=tmp_path / "both", column="kind", size=32,
        test_regions=["two"], val_fraction=0, **WET,
    )  # fmt: skip
    assert data.regions == ["scene", "two"]
    assert (data.index["region"] == "two").sum() == 4


def test_nodata_stays_out_and_empty_windows_are_left_out(tmp_path: Path) -> None:
    values = pixels(height=64, width=64)
    values[:, :, :40] = 0
    path = write(tmp_path / "s.tif", values, nodata=0)
    x, y = CORNER
    shapes = gpd.GeoDataFrame(geometry=[shapely.box(x, y - 640, x + 640, y)], crs=UTM)
    data = gk.ChipData.from_pairs(
        path, shapes, folder=tmp_path / "c", size=32, classes=["a"], **STATED,
        regions="scene", split="random",
    )  # fmt: skip
    assert len(data.index) == 2, "the two windows in the west hold no data"
    sample = data.dataset(data.splits[0])[0]
    assert (sample["mask"][:, :8] == 255).all() and (sample["mask"][:, 8:] == 0).all()


def test_a_bow_tie_is_two_triangles(tmp_path: Path) -> None:
    path = write(tmp_path / "s.tif", pixels(height=64, width=64))
    x, y = CORNER
    corners = [(x, y), (x + 640, y - 640), (x + 640, y), (x, y - 640)]
    tie = gpd.GeoSeries([shapely.Polygon(corners)], crs=UTM)
    data = gk.ChipData.from_pairs(
        path, tie, folder=tmp_path / "c", size=64, regions="scene", classes=["a"],
        split="random", **STATED,
    )  # fmt: skip
    mask = data.dataset(data.splits[0])[0]["mask"]
    assert mask[32, 3] == 0 and mask[32, 60] == 0
    assert mask[3, 32] == 255 and mask[60, 32] == 255


def test_a_folder_alone_is_not_enough(pairs: Path) -> None:
    with pytest.raises(ValueError, match="masks is missing"):
        gk.ChipData.from_pairs(pairs / "images", **WET)


# ------------------------------------------------------------ points


def some_points() -> gpd.GeoDataFrame:
    rng = np.random.default_rng(1)
    x = CORNER[0] + rng.uniform(0, 2000, 40)
    y = CORNER[1] - rng.uniform(0, 1800, 40)
    table = gpd.GeoDataFrame(
        {"crop": rng.choice(["maize", "rice"], 40), "biomass": rng.uniform(1, 9, 40)},
        geometry=gpd.points_from_xy(x, y),
        crs=UTM,
    )
    return table


def test_points_make_chips_around_them(scene: Path, tmp_path: Path) -> None:
    points = some_points()
    degrees = points.to_crs(4326).geometry
    pd.DataFrame({"lon": degrees.x, "lat": degrees.y, "crop": points["crop"]}).to_csv(
        tmp_path / "points.csv", index=False
    )
    data = gk.ChipData.from_pairs(
        scene, tmp_path / "points.csv", folder=tmp_path / "c", column="crop", size=16,
        task="classification", classes=["maize", "rice"], regions="scene",
        split="random", **STATED,
    )  # fmt: skip
    assert len(data.index) == 40
    for row in data.index.itertuples():
        number = int(row.chip.rsplit("_", 1)[1])
        assert data.classes[row.label] == points["crop"][number]
        assert row.geometry.buffer(1e-9).covers(degrees[number])


def test_points_make_sparse_masks_for_regression(scene: Path, tmp_path: Path) -> None:
    points = some_points()
    data = gk.ChipData.from_pairs(
        scene, points, folder=tmp_path / "c", column="biomass", size=32,
        task="regression", split="random", **STATED,
    )  # fmt: skip
    found = {}
    for split in data.splits:
        for sample in data.dataset(split):
            left, _, _, top = sample["bounds"].tolist()
            for row, column in torch.isfinite(sample["mask"]).nonzero().tolist():
                place = round(left / 10) + column, round(top / 10) - row
                found[place] = sample["mask"][row, column].item()
    expected = {}
    for point, value in zip(points.geometry, points["biomass"], strict=True):
        expected[int(point.x // 10), int(-(-point.y // 10))] = value
    assert found == pytest.approx(expected, rel=1e-6)


# ------------------------------------------------------------ what is refused


def _boxes(**columns: Any) -> gpd.GeoDataFrame:
    x, y = CORNER
    return gpd.GeoDataFrame(
        {"kind": ["land"], **columns},
        geometry=[shapely.box(x, y - 900, x + 900, y)],
        crs=UTM,
    )


def _outside() -> gpd.GeoDataFrame:
    points = some_points()
    points.loc[3, "geometry"] = shapely.Point(0, 0)
    return points.assign(kind="land")


def _with(geometry: Any) -> gpd.GeoDataFrame:
    return _boxes().set_geometry([geometry], crs=UTM)


@pytest.mark.parametrize(
    ("shapes", "changes", "message"),
    [
        (_boxes().set_crs(None, allow_override=True), {}, "shapes has no CRS"),
        (_boxes().iloc[:0], {}, "has no features"),
        (_with(None), {}, "1 of 1 rows have no geometry.*row 0"),
        (_with(shapely.Polygon()), {}, "1 of 1 rows have no geometry"),
        (_with(shapely.LineString([(0, 0), (1, 1)])), {}, "LineString.*allowed are"),
        (_boxes().translate(1e5).to_frame("geometry").assign(kind="land"), {},
         "no shape touches"),
        (_boxes(kind=["lava"]), {}, "row 0 of the shapes: label 'lava'"),
        (_boxes(), {"column": "sort"}, "no column 'sort'"),
        (_boxes(), {"column": None}, "which column"),
        (_outside(), {}, "1 of 40 points lie outside.*row 3"),
        (_boxes(), {"size": 500}, "no chip of 500 pixels fits"),
        (_boxes(), {"buffer_m": 5000.0}, "no chip of 32 pixels fits"),
        (_boxes(), {"overlap": 1.0}, "overlap is from 0 to below 1"),
        (_boxes(), {"background": "sea"}, "label 'sea' is none of"),
        (_boxes(), {"task": "classification"}, "takes points"),
        (_boxes(), {"regions": _boxes()}, "region or name has to say"),
        (_boxes(), {"folder": None}, "cutting chips writes new files"),
    ],
)  # fmt: skip
def test_shapes_that_cannot_be_used(
    scene: Path, tmp_path: Path, shapes: gpd.GeoDataFrame, changes: dict, message: str
) -> None:
    given = WET | {"column": "kind", "size": 32, "folder": tmp_path / "c"} | changes
    with pytest.raises(ValueError, match=message):
        gk.ChipData.from_pairs(scene, shapes, **given)
    assert not (tmp_path / "c").exists()


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_scenes_that_cannot_be_used(tmp_path: Path) -> None:
    given = WET | {"column": "kind", "folder": tmp_path / "c"}
    with pytest.raises(FileNotFoundError, match="no raster"):
        gk.ChipData.from_pairs(tmp_path / "no.tif", _boxes(), **given)
    bare = write(tmp_path / "bare.tif", pixels(), crs=None, transform=None)
    with pytest.raises(ValueError, match="has no CRS.*gdal_edit"):
        gk.ChipData.from_pairs(bare, _boxes(), **given)
    (tmp_path / "text.gpkg").write_text("no vector")
    good = write(tmp_path / "good.tif", pixels())
    with pytest.raises(ValueError, match="is not readable as shapes"):
        gk.ChipData.from_pairs(good, tmp_path / "text.gpkg", **given)
    assert not (tmp_path / "c").exists()


def test_regions_are_drawn_whole_and_never_all() -> None:
    names = ["a"] * 10 + ["b"] * 10 + ["c"] * 80
    for seed in range(20):
        drawn = draw_regions(names, 0.15, seed)
        assert 0 < len(drawn) < 3
        assert drawn == draw_regions(names, 0.15, seed)
    with pytest.raises(ValueError, match="lie in one region"):
        draw_regions(["a"] * 5)


def test_a_pixel_is_as_long_as_the_ground_says() -> None:
    crs = rasterio.crs.CRS.from_epsg(3857)
    metres = metres_per_unit(crs, from_origin(0, 8_399_737.9, 10, 10), 10, 10)
    assert metres == pytest.approx(5.0, rel=0.01)  # at 60 degrees north, half
