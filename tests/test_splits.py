"""Splits on random layouts: no test chip comes near a training chip."""

from __future__ import annotations

import contextlib
import warnings

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
from pyproj import Geod

import geopeft_kit as gk
from geopeft_kit.data.groups import group_chips
from geopeft_kit.data.leakage import touching_chips
from geopeft_kit.data.splits import resolve_split

SIDE = 640  # metres of a chip
EARTH = Geod(ellps="WGS84")


def layout(seed: int, lon: float = 12.0, lat: float = 48.0, spread: float = 0.4):
    """Chips in loose heaps around a place; some side by side, some on one another."""
    rng = np.random.default_rng(seed)
    heaps = rng.normal([lon, lat], spread, (6, 2))
    rows = []
    for number in range(60):
        heap = int(rng.integers(6))
        dx, dy = SIDE * rng.integers(-6, 7, 2) * rng.choice([1.0, 1.3])
        x, y, _ = EARTH.fwd(
            *heaps[heap], np.degrees(np.arctan2(dx, dy)), np.hypot(dx, dy)
        )
        east = EARTH.fwd(x, y, 90, SIDE / 2)[0] - x
        north = EARTH.fwd(x, y, 0, SIDE / 2)[1] - y
        wrapped = (x + 180) % 360 - 180
        shape = shapely.box(wrapped - east, y - north, wrapped + east, y + north)
        rows.append({"chip": f"c{number}", "region": f"r{heap}", "geometry": shape})
    index = gpd.GeoDataFrame(rows, crs="EPSG:4326")
    index["split"] = None
    return index


def distance(a: shapely.Geometry, b: shapely.Geometry) -> float:
    """Metres between two boxes, from the points of their outlines (an upper bound)."""

    def outline(shape):
        return np.array(shapely.segmentize(shape, 4e-3).exterior.coords)

    p, q = outline(a), outline(b)
    i, j = np.repeat(np.arange(len(p)), len(q)), np.tile(np.arange(len(q)), len(p))
    return float(EARTH.inv(p[i, 0], p[i, 1], q[j, 0], q[j, 1])[2].min())


def split_of(index, split: str, buffer_m: float, seed: int) -> pd.Series:
    regions = ["r1", "r4"] if split == "region" else None
    apart = index
    if split == "region":  # chips of two regions on the same ground are an error
        groups = np.where(index["region"].isin(["r1", "r4"]), "test", "train")
        pairs = touching_chips(index, pd.Series(groups, index.index))
        shared = pairs[pairs["overlap"] > 0.01]["train"]
        apart = index[~index["chip"].isin(shared)]
    with _quiet():
        return resolve_split(apart, split, regions, 0.25, seed, buffer_m, blocks=4)


@contextlib.contextmanager
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("split", ["region", "longitude", "country", "cluster"])
@pytest.mark.parametrize(
    "buffer_m",
    [700.0, *(pytest.param(b, marks=pytest.mark.slow) for b in (0.0, 3000.0))],
)
@pytest.mark.parametrize(("lon", "lat"), [(12, 48), (180, -17), (-60, 78)])
def test_no_test_chip_comes_near_another(split, buffer_m, lon, lat):
    for seed in range(1):
        index = layout(seed, lon, lat)
        try:
            result = split_of(index, split, buffer_m, seed)
        except ValueError as error:  # so dense that nothing is left: said, not hidden
            assert "nothing is left" in str(error)
            continue
        shapes = index.geometry.loc[result.index]
        test = shapes[result == "test"]
        others = shapes[result.isin(["train", "val"])]
        assert len(test) and (result == "train").any() and (result == "val").any()
        nearest = min(distance(a, b) for a in test for b in near(others, a, lon, lat))
        assert nearest > buffer_m
        assert nearest > 0.01, "a test chip touches a training chip"


def near(others, shape, lon, lat, count: int = 6):
    """The few of the others whose middles are nearest, by the same geodesic."""
    centres = shapely.centroid(others.to_numpy())
    x, y = shapely.get_coordinates(shape.centroid)[0]
    far = EARTH.inv(
        np.full(len(centres), x), np.full(len(centres), y),
        shapely.get_x(centres), shapely.get_y(centres),
    )[2]  # fmt: skip
    return others.to_numpy()[np.argsort(far)[:count]]


def test_the_buffer_takes_no_more_than_it_has_to():
    index = layout(3)
    with pytest.warns(UserWarning, match="set aside"):
        result = resolve_split(index, "longitude", None, 0.2, 0, 2000.0)
    test = index.geometry[result == "test"]
    for shape in index.geometry[result == "unused"]:
        closest = min(distance(shape, other) for other in near(test, shape, 12, 48))
        assert closest < 2000 * np.sqrt(2) * 1.02  # a corner of the buffered box


def test_a_random_split_has_neighbours_and_held_out_groups_have_none():
    index = layout(1)
    random = resolve_split(index, "random", val_fraction=0.2)
    assert len(touching_chips(index, random)) > 0
    for split in ("longitude", "cluster", "country"):
        with _quiet():
            assert touching_chips(index, resolve_split(index, split)).empty


def test_longitude_blocks_are_strips_of_equally_many_chips():
    index = layout(2, lon=179.9, spread=2.0)
    groups = group_chips(index, "longitude", blocks=3)
    middle = index.geometry.centroid.x % 360
    ends = [(middle[groups == g].min(), middle[groups == g].max()) for g in NAMES[:3]]
    assert all(a[1] < b[0] for a, b in zip(ends, ends[1:], strict=False)), ends
    assert groups.value_counts().between(19, 21).all()


NAMES = [f"longitude_{number}" for number in range(1, 6)]


def test_clusters_are_places_that_lie_together():
    heaps = [layout(0, lon, lat, spread=0.001) for lon, lat in PLACES]
    index = pd.concat(heaps, ignore_index=True)
    index["chip"] = [f"c{n}" for n in range(len(index))]
    groups = group_chips(index, "cluster", blocks=3)
    heap = pd.Series(np.repeat([0, 1, 2], len(heaps[0])))
    assert (groups.groupby(heap).nunique() == 1).all()
    assert groups.nunique() == 3
    assert (group_chips(index, "cluster", blocks=3) == groups).all()


PLACES = [(179.99, 10.0), (20.0, 50.0), (25.0, -30.0)]


def test_countries_come_from_their_column_or_from_region_names(capsys):
    index = layout(0)
    index["region"] = np.where(
        np.arange(len(index)) % 2, "Ghana/Volta", "Bolivia, Beni"
    )
    assert set(group_chips(index, "country")) == {"Ghana", "Bolivia"}
    assert "no column 'country'" in capsys.readouterr().out
    index["country"] = np.where(index["region"].str.startswith("G"), "GH", "BO")
    assert set(group_chips(index, "country")) == {"GH", "BO"}
    assert capsys.readouterr().out == ""
    index.loc[3, "country"] = None
    with pytest.raises(ValueError, match="1 chips have no country, the first is 'c3'"):
        group_chips(index, "country")


@pytest.mark.parametrize(("arguments", "text"), [
    ({"split": "longitud"}, "longitud.*longitude"),
    ({"split": "random", "test_regions": ["r1"]}, "Leave one"),
    ({"split": "longitude", "test_regions": ["r1"]}, "longitude_1, longitude_2"),
    ({"split": "longitude", "blocks": 1}, "2 groups"),
    ({"split": "cluster", "blocks": 500}, "blocks=.* or fewer"),
    ({"split": "longitude", "buffer_m": -1}, "buffer_m is -1"),
    ({"split": "longitude", "buffer_m": 1e6}, "nothing is left"),
    ({"split": "region"}, "no split lists"),
])  # fmt: skip
def test_bad_splits_say_what_to_do(arguments, text):
    with pytest.raises(ValueError, match=text):
        resolve_split(layout(0), **arguments)


def test_chips_without_a_place_cannot_be_cut_by_place():
    index = layout(0)
    index.loc[4, "geometry"] = None
    with pytest.raises(ValueError, match="1 chips have none; the first is 'c4'"):
        resolve_split(index, "cluster")


def test_the_figure_shows_every_split_and_its_count():
    index = layout(0)
    with _quiet():
        index["split"] = resolve_split(index, "longitude", None, 0.2, 0, 2000.0)
    figure = gk.plots.plot_split(index, "US$ & <b>", view=None)
    shown = {text.get_text() for text in figure.legends[0].get_texts()}
    counts = index["split"].value_counts()
    assert shown == {f"{name} ({count})" for name, count in counts.items()}
    with pytest.raises(ValueError, match="another view"):
        gk.plots.plot_split(index, view=(100, 0, 101, 1))
