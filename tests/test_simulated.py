"""The simulated world: always the same, physical, shifted by region, not trivial."""

from __future__ import annotations

import numpy as np
import pytest
import rasterio
import torch
from rasterio.transform import array_bounds

from geopeft_kit.bands import resolve_bands
from geopeft_kit.data import simulated
from geopeft_kit.world import (
    EVENTS,
    LAND_COVER_CLASSES,
    REGIONS,
    Scene,
    simulate_scene,
)

HLS = resolve_bands("hls")
NUMBER = {name: number for number, name in enumerate(LAND_COVER_CLASSES)}
LABELS = {
    "land_cover": (np.uint8, len(LAND_COVER_CLASSES) - 1),
    "flood": (np.uint8, 1),
    "permanent_water": (np.uint8, 1),
    "burn": (np.uint8, 1),
    "building_density": (np.float32, 1),
    "road_density": (np.float32, 1),
    "change": (np.uint8, 1),
}

# Of a flooded scene: mean of the six bands, shares of water and of trees, mean height
# above the river. Not a hash: another FFT or processor may change the last digit.
FINGERPRINTS = {
    "temperate": (0.1282, 0.1362, 0.1250, 0.2096, 0.1436, 0.0967, 0.5349, 0.2493, 8.63),
    "mediterranean": (
        0.0768, 0.0903, 0.1021, 0.1936, 0.1849, 0.1325, 0.3067, 0.2712, 41.92,
    ),
    "arid": (0.1064, 0.1406, 0.1715, 0.2271, 0.2343, 0.1997, 0.3298, 0.0941, 22.68),
    "boreal": (0.0678, 0.0803, 0.0642, 0.2278, 0.1434, 0.0842, 0.3071, 0.6825, 9.581),
    "delta": (0.2255, 0.2182, 0.2031, 0.2943, 0.1952, 0.1440, 0.2808, 0.1365, 0.9181),
    "savanna": (0.1239, 0.1331, 0.1478, 0.1958, 0.1980, 0.1515, 0.4810, 0.1378, 7.773),
}  # fmt: skip


def band(scene: Scene, name: str) -> np.ndarray:
    return scene.image[scene.bands.index(name)]


def index(scene: Scene, a: str, b: str) -> np.ndarray:
    return (band(scene, a) - band(scene, b)) / (band(scene, a) + band(scene, b))


@pytest.fixture(scope="module")
def scenes() -> dict[str, list[Scene]]:
    """Three places of every region, cloudless, without an event."""
    clear = {"cloud": -1.0}
    return {
        name: [simulate_scene(name, seed, 192, shift=clear) for seed in range(3)]
        for name in REGIONS
    }


def pooled(scenes: list[Scene], values) -> np.ndarray:
    return np.concatenate([np.asarray(values(scene)).ravel() for scene in scenes])


@pytest.mark.parametrize("name", REGIONS)
def test_the_pixels_are_those_of_this_version(name: str) -> None:
    """Where this fails, raise GENERATOR_VERSION: every cache and lesson is another."""
    scene = simulate_scene(name, 7, 96, event="flood", pair=False)
    trees = scene.labels["land_cover"] == NUMBER["trees"]
    fields = scene.labels["flood"], trees, scene.physical["hand"]
    found = [*scene.image.mean((1, 2)), *(field.mean() for field in fields)]
    assert found == pytest.approx(FINGERPRINTS[name], rel=1e-3)


@pytest.mark.parametrize("name", REGIONS)
def test_shapes_types_and_ranges(scenes: dict[str, list[Scene]], name: str) -> None:
    for scene in scenes[name]:
        for image in (scene.image, scene.before):
            assert image is not None
            assert image.shape == (6, 192, 192)
            assert image.dtype == np.float32
            assert 0 < image.min() and image.max() <= 1
            assert image.std((1, 2)).min() > 0.003  # no band is flat
        assert scene.labels.keys() == LABELS.keys()
        for key, (kind, highest) in LABELS.items():
            assert scene.labels[key].dtype == kind, key
            assert scene.labels[key].shape == (192, 192)
            assert 0 <= scene.labels[key].min() and scene.labels[key].max() <= highest
        for key, field in scene.physical.items():
            assert field.dtype == np.float32, key
            assert field.shape == (192, 192)
            assert np.isfinite(field).all() and field.min() >= 0, key
        shares = sum(
            scene.physical[key]
            for key in ("green", "dry", "canopy", "soil", "impervious", "water")
        )
        np.testing.assert_allclose(shares, 1, atol=0.02)
        assert not scene.labels["change"].any() and not scene.labels["burn"].any()
        water = scene.labels["permanent_water"]
        np.testing.assert_array_equal(scene.labels["flood"], water)
    assert len(set(pooled(scenes[name], lambda s: s.labels["land_cover"]))) >= 5


@pytest.mark.parametrize("event", EVENTS)
def test_same_arguments_same_arrays(event: str) -> None:
    first, second = (simulate_scene("delta", 11, 96, event=event) for _ in range(2))
    np.testing.assert_array_equal(first.image, second.image)
    np.testing.assert_array_equal(first.before, second.before)
    for group in ("labels", "physical"):
        for key, field in getattr(first, group).items():
            np.testing.assert_array_equal(field, getattr(second, group)[key])
    assert first.scalars == second.scalars
    alone = simulate_scene("delta", 11, 96, event=event, pair=False)
    assert alone.before is None
    np.testing.assert_array_equal(first.image, alone.image)
    for other in (("delta", 12), ("boreal", 11)):
        image = simulate_scene(*other, 96, event=event, pair=False).image
        assert abs(np.corrcoef(image[3].ravel(), first.image[3].ravel())[0, 1]) < 0.6


def test_the_same_scene_in_any_bands() -> None:
    six = simulate_scene("savanna", 3, 96, event="burn")
    twelve = simulate_scene("savanna", 3, 96, bands="sentinel2_l2a", event="burn")
    rgb = simulate_scene("savanna", 3, 96, bands=["RED", "GREEN", "BLUE"], event="burn")
    picked = [twelve.bands.index(name) for name in six.bands]
    np.testing.assert_allclose(twelve.image[picked], six.image, atol=1e-5)
    np.testing.assert_allclose(twelve.before[picked], six.before, atol=1e-5)
    np.testing.assert_allclose(rgb.image, six.image[[2, 1, 0]], atol=1e-5)
    np.testing.assert_array_equal(six.labels["burn"], twelve.labels["burn"])


@pytest.mark.parametrize("name", REGIONS)
def test_materials_look_as_they_should(scenes, name: str) -> None:
    """Water is dark and lies low, plants are green, roads are sealed and thin."""
    group = scenes[name]
    nir = pooled(group, lambda s: band(s, "NIR_NARROW"))
    water = pooled(group, lambda s: s.physical["water"])
    assert np.median(nir[water > 0.9]) < 0.6 * np.median(nir[water < 0.05])
    hand = pooled(group, lambda s: s.physical["hand"])
    wet = pooled(group, lambda s: s.labels["permanent_water"]) > 0
    assert np.median(hand[wet]) < np.median(hand[~wet])
    ndvi = pooled(group, lambda s: index(s, "NIR_NARROW", "RED"))
    plants = pooled(group, lambda s: s.physical["green"] + s.physical["canopy"])
    soil = pooled(group, lambda s: s.physical["soil"] + s.physical["impervious"])
    assert np.median(ndvi[plants > 0.7]) > np.median(ndvi[soil > 0.7]) + 0.15
    roads = pooled(group, lambda s: s.labels["road_density"])
    sealed = pooled(group, lambda s: s.physical["impervious"])
    assert sealed[roads > 0.4].mean() > 5 * sealed[roads < 0.05].mean()
    assert 0.001 < roads.mean() < 0.1


@pytest.mark.parametrize("name", REGIONS)
def test_flood_fills_the_low_ground(name: str) -> None:
    scene = simulate_scene(name, 21, 128, event="flood")
    flood, permanent = scene.labels["flood"] > 0, scene.labels["permanent_water"] > 0
    assert (flood | ~permanent).all()  # permanent water is water
    new = flood & ~permanent
    assert 0.03 < new.mean() < 0.5
    np.testing.assert_array_equal(scene.labels["change"] > 0, new)
    hand = scene.physical["hand"]
    assert np.median(hand[new]) < np.median(hand[~flood])
    assert (scene.physical["depth"][new] > 0).all()
    assert (scene.physical["water"][~flood] < 0.8).all()


@pytest.mark.parametrize("name", REGIONS)
def test_only_plants_burn(name: str) -> None:
    scene = simulate_scene(name, 22, 128, event="burn")
    twin = simulate_scene(name, 22, 128, event="none")
    burnt = scene.labels["burn"] > 0
    assert 0.02 < burnt.mean() < 0.45
    before = sum(twin.physical[key] for key in ("green", "dry", "canopy"))
    assert (before[burnt] > 0.04).all() and before[burnt].mean() > 0.3
    for name in ("water", "cropland", "built-up", "wetland"):
        assert not (burnt & (twin.labels["land_cover"] == NUMBER[name])).any()
    np.testing.assert_array_equal(scene.labels["change"], scene.labels["burn"])
    living = scene.physical["green"] + scene.physical["canopy"]
    assert living[burnt].mean() < 0.6 * (before - twin.physical["dry"])[burnt].mean()


def test_construction_adds_buildings_where_it_says() -> None:
    found = 0
    for seed in range(3):
        scene = simulate_scene("delta", seed, 192, event="construction")
        twin = simulate_scene("delta", seed, 192, event="none")
        built = scene.labels["change"] > 0
        found += built.sum()
        classes = np.unique(scene.labels["land_cover"][built])
        assert set(classes) <= {NUMBER["built-up"]}
        np.testing.assert_array_equal(
            scene.labels["land_cover"][~built], twin.labels["land_cover"][~built]
        )
        gain = scene.labels["building_density"] - twin.labels["building_density"]
        assert gain[built].mean() > 5 * abs(gain[~built].mean())
        np.testing.assert_array_equal(scene.before, twin.before)
    assert found > 300


def test_places_have_true_coordinates_and_do_not_overlap(scenes) -> None:
    for name, group in scenes.items():
        taken = []
        for scene in group:
            assert scene.crs == f"EPSG:{REGIONS[name].epsg}"
            assert scene.transform.a == 10 and scene.transform.e == -10
            assert array_bounds(192, 192, scene.transform) == scene.bounds
            left, bottom, right, top = scene.bounds
            (lon,), (lat,) = rasterio.warp.transform(
                scene.crs, "EPSG:4326", [(left + right) / 2], [(bottom + top) / 2]
            )
            assert lon == pytest.approx(scene.scalars["lon"])
            assert lat == pytest.approx(scene.scalars["lat"])
            zone = REGIONS[name].epsg % 100
            assert abs(lon - (6 * zone - 183)) < 4
            assert (lat > 0) == (REGIONS[name].epsg // 100 == 326)
            for other in taken:
                assert right <= other[0] or left >= other[2]
            taken.append(scene.bounds)


@pytest.mark.parametrize(
    ("key", "amount", "rises"),
    [("haze", 1.0, "BLUE"), ("soil_brightness", 0.4, "SWIR_1"), ("cloud", 0.5, "BLUE")],
)
def test_shift_turns_the_dial(key: str, amount: float, rises: str) -> None:
    plain = simulate_scene("arid", 4, 96, shift={"cloud": -1.0}, pair=False)
    shift = {"cloud": -1.0} | {key: amount}
    turned = simulate_scene("arid", 4, 96, shift=shift, pair=False)
    assert band(turned, rises).mean() > 1.05 * band(plain, rises).mean()
    np.testing.assert_array_equal(
        plain.labels["permanent_water"], turned.labels["permanent_water"]
    )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"region": "lunar"}, "lunar.*temperate"),
        ({"event": "quake"}, "quake.*construction"),
        ({"shift": {"fog": 1}}, "fog.*haze"),
        ({"size": 32}, "32.*64"),
        ({"seed": -1}, "-1"),
        ({"bands": ["VV"]}, "VV.*BLUE"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        simulate_scene(**({"region": "arid", "seed": 0, "size": 64} | arguments))


def best_threshold(values: np.ndarray, truth: np.ndarray) -> float:
    """Class IoU of the best single threshold on these very pixels."""
    scores = []
    for threshold in np.linspace(-0.7, 0.7, 57):
        said = values > threshold
        scores.append((said & truth).sum() / max((said | truth).sum(), 1))
    return max(scores)


@pytest.mark.parametrize(
    ("event", "bands", "sign", "ceiling", "floor"),
    [
        ("flood", ("GREEN", "SWIR_1"), 1, 0.90, 0.5),
        ("burn", ("NIR_NARROW", "SWIR_2"), -1, 0.75, 0.3),
    ],
)
def test_one_index_threshold_does_not_solve_it(
    event: str, bands: tuple[str, str], sign: int, ceiling: float, floor: float
) -> None:
    """In at least half of the regions; yet the index knows something everywhere."""
    scores = {}
    for name in REGIONS:
        group = [
            simulate_scene(name, seed, 128, event=event, pair=False)
            for seed in range(40, 44)
        ]
        values = pooled(group, lambda s: sign * index(s, *bands))
        truth = pooled(group, lambda s, e=event: s.labels[e] > 0)
        seen = pooled(group, lambda s: s.physical["cloud"] < 0.6)
        scores[name] = best_threshold(values[seen], truth[seen])
    assert sum(score < ceiling for score in scores.values()) >= 3, scores
    assert min(scores.values()) > floor, scores


# Chip folders of simulated scenes.


def tiny_data(**options):
    small = {
        "chips_per_region": 4,
        "chips_per_scene": 2,
        "size": 32,
        "scene_size": 64,
        "train_regions": ["temperate", "delta"],
        "test_regions": ["savanna"],
        "batch_size": 2,
    }
    return simulated.simulated_data(**(small | options))


@pytest.mark.parametrize(
    ("task", "kind"),
    [
        ("flood", "segmentation"),
        ("burn", "segmentation"),
        ("land_cover", "segmentation"),
        ("building_density", "regression"),
        ("road_density", "regression"),
        ("change", "change"),
    ],
)
def test_simulated_data_of_every_task(task: str, kind: str) -> None:
    data = tiny_data(task=task)
    assert data.simulated is True and data.name.startswith("Simulated")
    assert data.task == kind and data.info.licence.startswith("CC0")
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].dtype == torch.float32
    assert 0 < batch["image"].min() and batch["image"].max() <= 1
    dates = (2,) if kind == "change" else ()
    assert batch["image"].shape == (2, 6, *dates, 32, 32)
    assert batch["mask"].shape == (2, 32, 32)
    if kind == "regression":
        assert data.classes is None and batch["mask"].is_floating_point()
        assert 0 <= batch["mask"].min() and batch["mask"].max() <= 1
    else:
        assert data.classes and len(data.colours) == len(data.classes)
        values = set(batch["mask"].unique().tolist())
        assert values <= {*range(data.num_classes), data.ignore_index}


def test_test_region_is_held_out_and_scenes_stay_together() -> None:
    data = tiny_data(task="flood", val_fraction=0.3)
    index = data.index
    assert set(index.region[index.split == "test"]) == {"savanna"}
    assert set(index.region[index.split != "test"]) == {"temperate", "delta"}
    assert {"train", "val"} <= set(index.split)
    assert (index.groupby("scene").split.nunique() == 1).all()
    assert (index.groupby("region").size() == 4).all()
    whole = tiny_data(task="flood", size=64, chips_per_region=2).index
    assert (whole.width == 64).all() and whole.scene.nunique() == len(whole)


def test_second_call_reads_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    first = tiny_data(task="burn", seed=3)
    other = tiny_data(task="burn", seed=4)
    assert other.folder != first.folder
    assert not set(other.index.scene) & set(first.index.scene)

    def no_scene(*_: object, **__: object) -> None:
        raise AssertionError("a scene was made although the data is in the cache")

    monkeypatch.setattr(simulated, "simulate_scene", no_scene)
    again = tiny_data(task="burn", seed=3, batch_size=4)
    assert again.folder == first.folder
    # Which regions are held out does not change the pixels.
    swapped = tiny_data(
        task="burn", seed=3, train_regions=["savanna", "delta"],
        test_regions=["temperate"],
    )  # fmt: skip
    assert swapped.folder == first.folder


def test_stored_pixels_are_the_scene(tmp_path) -> None:
    """Quantised to 16 bits, in place on the ground, cut at the right spot."""
    data = tiny_data(task="land_cover", folder=tmp_path / "world")
    row = data.index.iloc[0]
    seed = int(row.scene.rpartition("_")[2])
    top, left = (int(number) for number in row.chip.split("_")[-2:])
    scene = simulate_scene(row.region, seed, 64, pair=False)
    with rasterio.open(data.folder / row.image) as raster:
        assert raster.dtypes[0] == "uint16" and raster.crs.to_string() == scene.crs
        stored = raster.read() * 1e-4
        corner = raster.transform @ (0, 0)
    window = np.s_[..., top : top + 32, left : left + 32]
    np.testing.assert_allclose(stored, scene.image[window], atol=0.51e-4)
    assert corner == pytest.approx((scene.bounds[0] + 10 * left,
                                    scene.bounds[3] - 10 * top))  # fmt: skip
    with rasterio.open(data.folder / row["mask"]) as raster:
        mask = raster.read(1)
    seen = mask != 255
    np.testing.assert_array_equal(mask[seen], scene.labels["land_cover"][window][seen])


def test_failure_leaves_nothing(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = simulated.simulate_scene, []

    def breaks(*arguments: object, **options: object):
        calls.append(arguments)
        if len(calls) == 3:
            raise RuntimeError("power cut")
        return real(*arguments, **options)

    monkeypatch.setattr(simulated, "simulate_scene", breaks)
    with pytest.raises(RuntimeError, match="power cut"):
        tiny_data(task="flood", folder=tmp_path / "world")
    assert list(tmp_path.iterdir()) == []


def test_folder_of_something_else_is_refused(tmp_path) -> None:
    tiny_data(task="flood", folder=tmp_path / "world")
    with pytest.raises(FileExistsError, match="other arguments"):
        tiny_data(task="burn", folder=tmp_path / "world")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        tiny_data(task="flood", folder=tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"task": "roads"}, "roads.*flood"),
        ({"test_regions": ["moon"]}, "moon.*savanna"),
        ({"test_regions": "savanna"}, r"\['savanna'\]"),
        ({"test_regions": ["delta"]}, "delta.*held out"),
        ({"test_regions": []}, "at least one"),
        ({"size": 128}, "128.*64"),
        ({"chips_per_region": 0}, "0.*1 or more"),
        ({"shift": {"fog": 1.0}}, "fog.*haze"),
    ],
)
def test_wrong_options_are_named(options: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        tiny_data(**options)
