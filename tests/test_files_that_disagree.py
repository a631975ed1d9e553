"""Files as people have them: what they say agrees, and what they hold is read right.

Each case is a kind of fault that was met in the field. Right is either the true
numbers, or a refusal that names the file.
"""

from __future__ import annotations

import unicodedata
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import rasterio
import rasterio.shutil
from affine import Affine
from rasterio.transform import from_bounds, from_origin

import geopeft_kit as gk
from geopeft_kit.data import Chip, read_chip_folder, write_chip_folder

UTM = "EPSG:32633"
RGB = ("RED", "GREEN", "BLUE")
STATED: dict[str, Any] = {"bands": "rgb", "scale": 1e-4, "split": "random"}
LANDS = STATED | {"classes": ["dry", "wet"]}
SIDE = 16


def place(number: int = 0, pixel: float = 10) -> Affine:
    return from_origin(500_000 + 10_000 * number, 5_600_000, pixel, pixel)


def stored(seed: int = 0, bands: int = 3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(200, 3000, (bands, SIDE, SIDE)).astype(np.uint16)


def halves(low: int = 0, high: int = 1) -> np.ndarray:
    mask = np.full((SIDE, SIDE), low, np.uint8)
    mask[:, SIDE // 2 :] = high
    return mask


def write(path: Path, pixels: np.ndarray, **profile: Any) -> Path:
    tags = {k: profile.pop(k) for k in ("descriptions", "scales", "offsets")
            if k in profile}  # fmt: skip
    pixels = pixels[None] if pixels.ndim == 2 else pixels
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = dict(zip(("count", "height", "width"), pixels.shape, strict=True))
    given = {"driver": "GTiff", "crs": UTM, "transform": place()}
    with rasterio.open(
        path, "w", dtype=pixels.dtype.name, **shape, **given | profile
    ) as file:
        file.write(pixels)
        for name, value in tags.items():
            setattr(file, name, value)
    return path


def pairs(root: Path, count: int = 4, images: Any = None, masks: Any = None) -> Path:
    """Images and masks; `images` and `masks` give arguments of `write` by number."""
    for number in range(count):
        for name, pixels, more in (
            ("images", stored(number), images),
            ("masks", halves(), masks),
        ):
            given = {"pixels": pixels, "transform": place(number)}
            given |= more(number) if more else {}
            write(root / name / f"{number}.tif", **given)
    return root


def read(root: Path, **stated: Any) -> gk.ChipData:
    return gk.ChipData.from_pairs(root / "images", root / "masks", **LANDS | stated)


# ------------------------------------------------------- what the files of one set say


@pytest.mark.parametrize(
    ("odd", "named"),
    [
        ({"scales": [1e-4] * 3, "offsets": [-0.1] * 3}, "scale, offset"),
        ({"descriptions": ("B02", "B03", "B04")}, "bands"),
        ({"nodata": 7}, "nodata"),
    ],
)
@pytest.mark.parametrize("folder", [None, "chips"])
def test_tags_that_disagree_are_refused_by_name(
    tmp_path: Path, odd: dict, named: str, folder: str | None
) -> None:
    usual = {"scales": [1e-4] * 3, "descriptions": ("B04", "B03", "B02"), "nodata": 0}
    # The last of many: also a file that no sample of the files meets.
    root = pairs(tmp_path, 20, images=lambda n: usual | (odd if n == 19 else {}))
    with pytest.raises(ValueError, match=rf"(?s)19\.tif.*{named}"):
        read(root, folder=folder and tmp_path / folder)


def test_files_that_say_nothing_agree_with_all(tmp_path: Path) -> None:
    said = {"scales": [1e-4] * 3, "nodata": 0, "descriptions": ("R", "G", "B")}
    root = pairs(tmp_path, images=lambda n: said if n % 2 else {})
    assert len(read(root).index) == 4


def test_a_statement_against_the_tags_gets_a_sentence(tmp_path: Path) -> None:
    tags = {"scales": [1e-4] * 3, "offsets": [-0.1] * 3, "nodata": 0}
    root = pairs(tmp_path, images=lambda n: tags)
    with pytest.warns(UserWarning, match=r"state \(scale, offset\) \(0.0001, -0.1\)"):
        data = read(root)
    with pytest.warns(UserWarning, match=r"nodata=0\.0, not 9"):
        read(root, offset=-0.1, facts={"nodata": 9})
    found = gk.check_data(data).table.set_index("check")
    assert "-0.1" in found.loc["tags", "found"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert "tags" not in gk.check_data(read(root, offset=-0.1)).table["check"]


def test_pixels_of_two_sizes_are_a_finding(tmp_path: Path) -> None:
    sizes = lambda n: {"transform": place(n, 60 if n % 2 else 10)}  # noqa: E731
    data = read(pairs(tmp_path, images=sizes, masks=sizes))
    table = gk.check_data(data).table.set_index("check")
    assert "10 m (2)" in table.loc["pixel sizes", "found"]
    assert "60 m (2)" in table.loc["pixel sizes", "found"]


def test_complex_pixels_are_refused(tmp_path: Path) -> None:
    slc = (stored(0, 2) * (1 + 2j)).astype(np.complex64)
    root = pairs(tmp_path, images=lambda n: {"pixels": slc})
    with pytest.raises(ValueError, match=r"complex.*amplitude"):
        read(root, bands="sentinel1", scale=1.0)
    with pytest.raises(ValueError, match=r"complex.*amplitude"):
        write_chip_folder(
            tmp_path / "new",
            [Chip("a", root / "images/0.tif", halves())],
            {"name": "SLC", "task": "segmentation", "bands": ["VV", "VH"],
             "classes": ["dry", "wet"]},
        )  # fmt: skip


# ---------------------------------------------------------------- one notion of "valid"


def masked_by(kind: str, path: Path, number: int) -> Path:
    """An image whose first four rows hold no data, said in one of several ways."""
    pixels = stored(number).astype(np.uint8)
    pixels[:, :4] = 0
    where = np.full((SIDE, SIDE), 255, np.uint8)
    where[:4] = 0
    given: dict[str, Any] = {"transform": place(number)}
    if kind == "tag":
        return write(path, pixels, nodata=0, **given)
    if kind in ("inside", "beside"):
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=kind == "inside"):
            write(path, pixels, **given)
            with rasterio.open(path, "r+") as file:
                file.write_mask(where)
        return path
    one = write(path.with_name(f"one_{number}.tiff"), pixels, nodata=0, **given)
    target = path.with_suffix({"PNG": ".png", "ENVI": ".img"}[kind])
    rasterio.shutil.copy(one, target, driver=kind)
    one.unlink()
    return target


@pytest.mark.parametrize("kind", ["tag", "inside", "beside", "PNG", "ENVI"])
@pytest.mark.parametrize("folder", [None, "chips"])
def test_every_way_to_say_no_data_is_heard(
    tmp_path: Path, kind: str, folder: str | None
) -> None:
    (tmp_path / "images").mkdir()
    for number in range(4):
        masked_by(kind, tmp_path / f"images/{number}.tif", number)
        write(tmp_path / f"masks/{number}.tif", halves(), transform=place(number))
    data = read(tmp_path, scale=1 / 255, folder=folder and tmp_path / folder)
    sample = data.dataset("train")[0]
    assert sample["crs"] == UTM, "the place, also of a side-car"
    assert (sample["mask"][:4] == 255).all() and (sample["mask"][4:] != 255).all()
    assert not sample["image"][:, :4].any() and sample["image"][:, 4:].any()
    assert data.index.geometry.notna().all()


def test_masks_say_no_label_by_tag_nan_alpha_or_none(tmp_path: Path) -> None:
    floats = halves().astype(np.float32)
    floats[0] = np.nan
    grey = np.stack([halves()] * 3 + [np.full((SIDE, SIDE), 255, np.uint8)])
    grey[3, 0] = 0
    ways = [
        {"pixels": np.where(np.arange(SIDE)[:, None] > 0, halves(), 9), "nodata": 9},
        {"pixels": floats},
        {"pixels": grey, "driver": "PNG"},
    ]
    for number, way in enumerate(ways):
        root = pairs(tmp_path / str(number), masks=lambda n, way=way: way)
        mask = read(root).dataset("train")[0]["mask"]
        assert (mask[0] == 255).all() and (mask[1:] == read_mask(root)[1:]).all()
    root = pairs(tmp_path / "dict", masks=lambda n: {"pixels": halves(3, 0)})
    data = read(root, classes={0: None, 3: "field"}, folder=tmp_path / "out")
    mask = data.dataset("train")[0]["mask"]
    assert (mask[:, 8:] == 255).all() and (mask[:, :8] == 0).all()
    assert data.classes == ["field"]


def read_mask(root: Path) -> Any:
    import torch

    return torch.from_numpy(halves()).long()


def test_a_regression_sentinel_is_found_and_can_be_said(tmp_path: Path) -> None:
    heights = np.random.default_rng(0).uniform(0, 30, (SIDE, SIDE)).astype(np.float32)
    heights[:4] = -9999
    heights[5, 5] = 255
    root = pairs(tmp_path, masks=lambda n: {"pixels": heights})
    given = {"task": "regression", "classes": None}
    found = gk.check_data(read(root, **given)).table.set_index("check")
    assert "-9999" in found.loc["targets", "found"]
    data = read(root, facts={"ignore_index": -9999}, **given)
    mask = data.dataset("train")[0]["mask"]
    assert mask[:4].isnan().all() and not mask[4:].isnan().any()
    assert mask[5, 5] == 255, "the default is a value like any other"
    assert "targets" not in set(gk.check_data(data).table["check"])


# ---------------------------------------------------------------------- one mask reader


@pytest.mark.parametrize("numbers", [None, {0: "a", 255: "b"}])
@pytest.mark.parametrize("kind", ["colours", "one_hot"])
def test_masks_of_several_bands_are_refused(
    tmp_path: Path, numbers: dict | None, kind: str
) -> None:
    mask = np.zeros((3, SIDE, SIDE), np.uint8)
    for number, colour in enumerate(((255, 255, 255), (0, 0, 255), (0, 255, 0))):
        mask[:, :, 5 * number : 5 * number + 6] = np.array(colour)[:, None, None]
    if kind == "one_hot":
        mask = np.eye(3, dtype=np.uint8)[halves()].transpose(2, 0, 1)
    root = pairs(tmp_path, masks=lambda n: {"pixels": mask})
    given = {"classes": numbers, "folder": tmp_path / "out"} if numbers else {}
    with pytest.raises(ValueError, match=r"masks.*has 3 bands; expected 1"):
        read(root, **given)


def test_told_numbers_go_through_the_same_checks(tmp_path: Path) -> None:
    told = {"classes": {1: "dry", 7: "wet"}, "folder": tmp_path / "out"}
    half = pairs(tmp_path / "half", masks=lambda n: {"pixels": halves() * 1.5})
    with pytest.raises(ValueError, match=r"mask value .*1\.5"):
        read(half, **told)
    moved = pairs(tmp_path / "far", masks=lambda n: {"transform": place(n + 1)})
    with pytest.raises(ValueError, match="pixels away"):
        read(moved, **told)
    beside = pairs(tmp_path / "beside", masks=lambda n: {"pixels": halves(1, 4)})
    with pytest.raises(ValueError, match=r"mask value 4 .* allowed are 1, 7 and 255"):
        read(beside, **told)


# -------------------------------------------------------------- grids and their systems


def turned(number: int) -> Affine:
    corner = Affine.translation(500_000 + 10_000 * number, 5_600_000)
    return corner @ Affine.rotation(30) @ Affine.scale(10, -10)


def test_rotated_chips_keep_their_place(tmp_path: Path) -> None:
    from pyproj import Transformer

    spin = lambda n: {"transform": turned(n)}  # noqa: E731
    data = read(pairs(tmp_path, images=spin, masks=spin))
    sample = data.dataset("train")[0]
    shown = gk.show_map(gk.chip_layers([sample], data.bands, data.classes)[1:2])
    degrees = Transformer.from_crs(UTM, "EPSG:4326", always_xy=True)
    own = Affine(*sample["transform"].tolist())
    assert own.almost_equals(turned(int(sample["chip"])))
    for row in range(0, SIDE, 3):
        for column in range(0, SIDE, 3):
            spot = degrees.transform(*own @ (column + 0.5, row + 0.5))
            wanted = ["dry", "wet"][int(sample["mask"][row, column])]
            assert [r.text for r in shown.pixel(*spot)] == [wanted]


@pytest.mark.parametrize("how", ["same box", "south up"])
def test_another_grid_of_the_same_box_is_refused(tmp_path: Path, how: str) -> None:
    def image(number: int) -> dict:
        at = turned(number) if how == "same box" else place(number)
        return {"transform": at}

    def mask(number: int) -> dict:
        write(tmp_path / "x.tif", halves(), **image(number))
        with rasterio.open(tmp_path / "x.tif") as file:
            left, low, right, high = file.bounds
        if how == "south up":
            low, high = high, low
        return {"transform": from_bounds(left, low, right, high, SIDE, SIDE)}

    with pytest.raises(ValueError, match="pixels away"):
        read(pairs(tmp_path, images=image, masks=mask))


@pytest.mark.parametrize("same", ["EPSG:32633+5773", "esri"])
def test_systems_are_compared_by_meaning(tmp_path: Path, same: str) -> None:
    if same == "esri":
        same = rasterio.CRS.from_epsg(32633).to_wkt(version="WKT1_ESRI")
    data = read(pairs(tmp_path, masks=lambda n: {"crs": same}))
    assert data.dataset("train")[0]["crs"] == UTM


LOCAL = 'LOCAL_CS["site",UNIT["metre",1]]'


def test_a_local_system_is_no_place_on_earth(tmp_path: Path) -> None:
    local = lambda n: {"crs": LOCAL}  # noqa: E731
    data = read(pairs(tmp_path, images=local, masks=local))
    assert data.index.geometry.isna().all()
    table = gk.check_data(data).table
    assert table["found"].str.contains("no georeference").any()
    with pytest.raises(ValueError, match=r"local CRS.*site"):
        import geopandas as gpd
        import shapely

        shapes = gpd.GeoDataFrame({"k": ["wet"]}, geometry=[shapely.box(0, 0, 1, 1)],
                                  crs=UTM)  # fmt: skip
        gk.ChipData.from_pairs(
            tmp_path / "images/0.tif", shapes, column="k", folder=tmp_path / "o",
            **LANDS,
        )  # fmt: skip


# ---------------------------------------------------------- tables and names as written


@pytest.mark.parametrize(
    "names",
    [
        ("地点", "村庄", "河流", "森林"),
        ("größe_1", "grüße_1", "x", "y"),
        ("a b", "a_b", "a-b", "a  b"),
    ],
)
@pytest.mark.parametrize("table", [False, True])
def test_names_of_any_script_stay_apart(
    tmp_path: Path, names: tuple, table: bool
) -> None:
    for number, name in enumerate(names):
        write(tmp_path / f"images/{name}.tif", stored(number), transform=place(number))
        # What a Mac packs: the same letters, other characters.
        other = unicodedata.normalize("NFD", name)
        write(tmp_path / f"masks/{other}.tif", halves(), transform=place(number))
    if table:
        rows = {"image": [f"images/{n}.tif" for n in names],
                "mask": [f"masks/{n}.tif" for n in names]}  # fmt: skip
        pd.DataFrame(rows).to_csv(tmp_path / "t.csv", index=False)
        data = gk.ChipData.from_pairs(
            tmp_path / "t.csv", folder=tmp_path / "o", **LANDS
        )
    else:
        data = read(tmp_path, folder=tmp_path / "o")
    assert data.index["chip"].is_unique and len(data.index) == 4
    again = read_chip_folder(tmp_path / "o")[1]
    images = {float(s["image"].mean()) for split in data.splits
              for s in data.dataset(split)}  # fmt: skip
    assert len(images) == 4 and len(again) == 4, "each its own pixels"


@pytest.mark.parametrize(
    "cell", ["wet; dry", "wet|dry", "['wet', 'dry']", "wet,dry", "1;0", "dry, old;wet"]
)
def test_several_labels_in_a_cell(tmp_path: Path, cell: str) -> None:
    classes = ["dry", "wet", "dry, old"]
    for number in range(2):
        write(tmp_path / f"{number}.tif", stored(number), transform=place(number))
    table = pd.DataFrame({"image": ["0.tif", "1.tif"], "label": [cell, "dry"],
                          "split": ["train", "test"]})  # fmt: skip
    table.to_csv(tmp_path / "t.csv", index=False)
    given = STATED | {"split": "index", "task": "multilabel", "classes": classes}
    data = gk.ChipData.from_pairs(tmp_path / "t.csv", **given)
    wanted = [0.0, 1.0, 1.0] if "old" in cell else [1.0, 1.0, 0.0]
    assert data.dataset("train")[0]["label"].tolist() == wanted


def test_dates_of_two_kinds(tmp_path: Path) -> None:
    days = ["2024-05-31", "2024-06-01T10:30:00Z", "2024-06-02 10:30", ""]
    for number in range(4):
        write(tmp_path / f"{number}.tif", stored(number), transform=place(number))
    table = {"image": [f"{n}.tif" for n in range(4)], "label": ["dry", "wet"] * 2}
    pd.DataFrame(table | {"date": days}).to_csv(tmp_path / "t.csv", index=False)
    data = gk.ChipData.from_pairs(tmp_path / "t.csv", **LANDS)
    assert data.index["date"].dt.strftime("%m-%d").tolist()[:3] == [
        "05-31", "06-01", "06-02",
    ]  # fmt: skip
    assert pd.isna(data.index["date"].iloc[3])


# ------------------------------------------------------- a data set that is not trusted


def vrt(source: str) -> str:
    bands = "".join(
        f'<VRTRasterBand dataType="UInt16" band="{n}"><SimpleSource><SourceFilename>'
        f"{source}</SourceFilename><SourceBand>{n}</SourceBand></SimpleSource>"
        "</VRTRasterBand>"
        for n in (1, 2, 3)
    )
    return f'<VRTDataset rasterXSize="{SIDE}" rasterYSize="{SIDE}">{bands}</VRTDataset>'


@pytest.fixture
def chips(tmp_path: Path) -> Path:
    facts = {"name": "Toy", "task": "segmentation", "bands": RGB,
             "classes": ["dry", "wet"], "scale": 1e-4}  # fmt: skip
    made = [
        Chip(f"c{n}", stored(n), halves(), split=["train", "test"][n % 2], crs=UTM,
             transform=place(n)) for n in range(4)
    ]  # fmt: skip
    return write_chip_folder(tmp_path / "chips", made, facts)


@pytest.mark.parametrize("kind", ["VRT", "VRT as mask", "link", "larger"])
def test_a_chip_is_a_picture_of_its_own_folder(chips: Path, kind: str) -> None:
    path = chips / "images/c0.tif"
    secret = write(chips.parent / "secret.tif", stored(9))
    if kind == "VRT":
        path.write_text(vrt(str(secret)))
    elif kind == "VRT as mask":
        Path(f"{path}.msk").write_text(vrt(str(secret)))
    elif kind == "link":
        path.unlink()
        path.symlink_to(secret)
    else:
        write(path, np.zeros((3, 48, 48), np.uint16))
    with pytest.raises(ValueError, match=r"c0"):
        gk.ChipData(chips, split="index").dataset("train")[0]


@pytest.mark.parametrize(
    ("decoder", "method"), [("linear", "lora"), ("unet", "frozen")]
)
def test_chips_of_two_sizes_train_one_by_one(
    tmp_path: Path, decoder: str, method: str
) -> None:
    def cut(number: int) -> dict:
        return {"pixels": stored(number, 3)[:, :, : 8 * (number % 2) + 8]}

    def mask(number: int) -> dict:
        return {"pixels": halves()[:, : 8 * (number % 2) + 8]}

    data = read(pairs(tmp_path, 6, images=cut, masks=mask), batch_size=1)
    assert not data.one_size
    backbone = gk.load_backbone("geopeft_tiny", bands="rgb", image_size=16)
    gk.attach(backbone, method)
    model = gk.build_model(backbone, decoder, num_classes=2)
    run = gk.fit(model, data, epochs=1, progress=False)
    assert run.history["loss"].notna().all()
    with pytest.raises(ValueError, match="several sizes"):
        gk.fit(model, data, epochs=1, progress=False, head_start="probe")
