"""What covers each pixel on one day, and what an event makes of it.

A pixel is a set of fractions of `MATERIALS` that add up to one. The season, the rain
and the drought of a `Day` decide about them; flood, fire and construction change them
as they would on the ground, and hand back the label.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from geopeft_kit.world.landscape import (
    BARE,
    CROPLAND,
    WETLAND,
    Land,
)
from geopeft_kit.world.noise import hash_unit, smoothstep

MATERIALS = (
    "water_clear", "water_turbid", "crop", "grass", "dry_grass", "broadleaf",
    "conifer", "shrub", "wetland", "scorched", "soil_a", "soil_b", "soil_dark",
    "mud", "sand", "asphalt", "roof_bright", "roof_tile", "roof_dark", "char", "ash",
)  # fmt: skip
"""Order of the fraction maps; `soil_*` and `mud` are mixed from the region's soils."""

M = {name: number for number, name in enumerate(MATERIALS)}


@dataclass(frozen=True)
class Day:
    """Season, weather and light of one image."""

    season: float  # stage of the growing season, 0-1
    dryness: float  # share of dry plants away from water, 0-1
    turbidity: float  # sediment in the water, 0-1
    rain: float  # wetness of open soil after rain, 0-1
    soil_brightness: float  # natural logarithm of the factor on all soils
    sun_elevation: float  # degrees
    sun_azimuth: float  # degrees, clockwise from north
    haze: float  # optical thickness, 0-1 and above
    cloud: float  # cover, 0-1
    glint: float  # of the sun on water, reflectance
    harvest: int  # salt of the fields harvested since the other date


def lay_over(
    cover: np.ndarray, alpha: np.ndarray, materials: Mapping[str, np.ndarray | float]
) -> None:
    """Cover the share `alpha` (H, W) of each pixel with something else, in place.

    `cover` is (K, H, W); the shares in `materials` add up to one.
    """
    flat = cover.reshape(len(MATERIALS), -1)
    alpha = alpha.ravel()
    where = np.flatnonzero(alpha > 0)
    alpha = alpha[where]
    flat[:, where] *= 1 - alpha
    for name, share in materials.items():
        if isinstance(share, np.ndarray):
            share = share.ravel()[where]
        flat[M[name], where] += alpha * share


def surface(land: Land, day: Day) -> np.ndarray:
    """Fractions of `MATERIALS` on one day, before any event: (K, H, W), sum one."""
    cover = np.zeros((len(MATERIALS), *land.classes.shape), np.float32)
    _open_land(cover, land, day)
    _fields(cover, land, day)
    _wetlands(cover, land, day)
    _woods(cover, land, day)
    _built(cover, land, day)
    _waters(cover, land, day)
    return cover


def _add_soil(
    cover: np.ndarray, land: Land, day: Day, share: np.ndarray, where: Any = ...
) -> None:
    """Add bare ground: two soils, dark patches, and mud where it is wet."""
    mix, dark = land.mix[where], land.dark[where]
    wet = np.clip(
        0.75 * day.rain * (0.6 + 0.4 * mix) + 0.35 * land.terrain.wet[where], 0, 0.9
    )
    cover[M["mud"]][where] += share * wet
    rest = share * (1 - wet)
    cover[M["soil_dark"]][where] += rest * dark
    rest = rest * (1 - dark)
    cover[M["soil_a"]][where] += rest * mix
    cover[M["soil_b"]][where] += rest * (1 - mix)


def _open_land(cover: np.ndarray, land: Land, day: Day) -> None:
    """Meadow, steppe and bare ground."""
    wet, bare = land.terrain.wet, land.classes == BARE
    arid = max(land.region.dryness - 0.5, 0) * 1.6
    vigour = 0.16 * land.patch + 0.10 * land.grain
    plants = np.clip(0.92 - arid + 0.5 * wet + vigour, 0.03, 1)
    plants = np.where(bare, 0.12 * plants, plants)
    fresh = 0.35 + 0.9 * day.season - 1.1 * day.dryness + 0.7 * wet + vigour
    fresh = np.clip(fresh, 0.03, 1) * plants
    shrubs = np.clip(0.25 * day.dryness + 0.2 * land.grain + 0.15 * land.stand, 0, 0.5)
    cover[M["shrub"]] += plants * shrubs
    cover[M["grass"]] += fresh * (1 - shrubs)
    cover[M["dry_grass"]] += (plants - fresh) * (1 - shrubs)
    _add_soil(cover, land, day, 1 - plants)


def _fields(cover: np.ndarray, land: Land, day: Day) -> None:
    """Crops: every field has its own stage, soil and rows."""
    where = np.flatnonzero(land.classes.ravel() == CROPLAND)
    if where.size == 0:
        return
    flat = cover.reshape(len(MATERIALS), -1)
    number = land.layout.parcels.number.ravel()[where]
    kind = hash_unit(number, 101)
    stage = day.season + 0.9 * (hash_unit(number, 111) - 0.5)
    stage += 0.05 * land.patch.ravel()[where]
    green = smoothstep(stage, 0.12, 0.5)
    ripe = smoothstep(stage, 0.75, 1.05)
    ripe = np.maximum(ripe, 0.9 * (hash_unit(number, 112) < 0.55 * day.dryness))
    # Since the other date some fields were cut or ploughed.
    cut = hash_unit(number, 1000 + day.harvest) < 0.12
    ploughed = (kind < 0.16) | (cut & (kind > 0.6))
    stubble = cut & ~ploughed
    green, ripe = np.where(ploughed, 0.03, green), np.where(ploughed, 0.2, ripe)
    green, ripe = np.where(stubble, 0.75, green), np.where(stubble, 0.95, ripe)
    rows = np.sin((land.layout.v.ravel()[where]) * (0.9 + hash_unit(number, 113)))
    vigour = 1 + 0.09 * land.patch.ravel()[where] + 0.05 * land.grain.ravel()[where]
    plants = np.clip(green * 0.96 * vigour + 0.03 * rows, 0, 1)
    orchard = (kind > 0.55) & (kind < 0.85) & (land.region.name == "mediterranean")
    trees = np.where(orchard, 0.30 + 0.14 * rows + 0.08 * land.grain.ravel()[where], 0)
    plants = np.where(orchard, 0.25 * plants, plants)
    flat[:, where] = 0
    flat[M["broadleaf"], where] = trees.clip(0, 1)
    left = 1 - trees.clip(0, 1)
    meadow = (kind > 0.85) & ~cut
    flat[M["crop"], where] = np.where(meadow, 0, plants * (1 - ripe)) * left
    flat[M["grass"], where] = np.where(meadow, plants * (1 - 0.6 * ripe), 0) * left
    flat[M["dry_grass"], where] = (
        np.where(meadow, plants * 0.6 * ripe, plants * ripe) * left
    )
    rows_columns = np.unravel_index(where, land.classes.shape)
    _add_soil(cover, land, day, (1 - plants) * left, rows_columns)


def _wetlands(cover: np.ndarray, land: Land, day: Day) -> None:
    """Bog and marsh: dark plants, peat, small pools."""
    bog = (land.classes == WETLAND).astype(np.float32)
    if not bog.any():
        return
    pools = np.clip(0.12 * land.grain + 0.10 * land.stand - 0.08, 0, 0.4)
    moss = np.clip(0.75 + 0.1 * land.patch, 0.4, 0.95) * (1 - pools)
    dry = 0.35 * np.clip(0.5 - day.season + 0.3 * day.dryness + 0.2 * land.stand, 0, 1)
    materials = {
        "water_clear": pools,
        "wetland": moss * (1 - dry),
        "dry_grass": moss * dry,
        "soil_dark": 1 - pools - moss,
    }
    lay_over(cover, bog, materials)


def _woods(cover: np.ndarray, land: Land, day: Day) -> None:
    """Canopy over whatever grows below, clear-cuts and hedges."""
    fresh = land.clearing > 0
    canopy = land.closure * np.where(fresh, np.maximum(land.clearing - 0.45, 0), 1)
    broad, conifer, shrub = _tree_shares(land)
    trees = {"broadleaf": broad, "conifer": conifer, "shrub": shrub}
    if fresh.any():
        young = np.clip(1.6 * land.clearing + 0.1 * land.grain, 0, 0.85)
        debris = 0.6 * (1 - young)
        regrowth = {"dry_grass": debris, "shrub": 0.6 * young, "grass": 0.4 * young}
        soil = 1 - debris - young
        lay_over(cover, fresh * 1.0, {**regrowth, "soil_a": soil})
    leaf = 0.55 + 0.45 * smoothstep(day.season, 0.05, 0.35)
    lay_over(cover, np.maximum(canopy, land.hedge) * leaf, trees)


def _tree_shares(land: Land) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which tree grows where: stands, not salt and pepper."""
    _, conifer, shrub = land.region.canopy
    bushes = np.clip(shrub + 0.25 * land.stand * (0 < shrub), 0, 1)
    if not conifer:
        return 1 - bushes, np.zeros_like(bushes), bushes
    least = 1.3 * (1 - 2 * conifer)
    needles = smoothstep(land.stand + 0.4 * land.patch, least - 0.5, least + 0.5)
    return (1 - bushes) * (1 - needles), (1 - bushes) * needles, bushes


def _built(cover: np.ndarray, land: Land, day: Day) -> None:
    """Gardens, streets, roofs, roads and tracks."""
    lush = min(max(0.9 - 0.9 * day.dryness, 0.1), 0.9)
    dirt = 0.35 + 0.45 * land.region.dryness
    planted: dict[str, np.ndarray | float] = {
        "grass": (1 - dirt) * lush * 0.6,
        "dry_grass": (1 - dirt) * (1 - lush),
        "broadleaf": (1 - dirt) * lush * 0.4,
        "soil_a": dirt * 0.5,
        "asphalt": dirt * 0.5,
    }
    lay_over(cover, land.gardens, planted)
    paved = 1.0 if land.region.paved > 0.3 else 0.5
    lay_over(cover, land.streets, {"asphalt": paved, "soil_b": 1 - paved})
    lay_over(cover, land.tracks, {"soil_a": 0.5, "soil_b": 0.5})
    roofs = land.roofs.sum(0)
    safe = np.maximum(roofs, 1e-6)
    bright, tile, dark = land.roofs / safe
    lay_over(
        cover, roofs, {"roof_bright": bright, "roof_tile": tile, "roof_dark": dark}
    )
    cover[M["soil_a"]] += roofs * (1 - bright - tile - dark)
    lay_over(cover, land.roads * (land.terrain.water < 0.5), {"asphalt": 1.0})


def _waters(cover: np.ndarray, land: Land, day: Day) -> None:
    """Rivers, lakes and brooks, sand bars, and bridges on top."""
    terrain = land.terrain
    lay_over(cover, land.bar, {"sand": 0.35, "soil_a": 0.35, "mud": 0.3})
    muddy = day.turbidity + 0.12 * land.patch - 0.35 * terrain.lake
    shallow = (
        np.exp(-((np.maximum(-terrain.river, 0) / 1.5) ** 2)) * 0.10 * day.turbidity
    )
    shallow *= terrain.lake < 0.5
    muddy = np.clip(muddy, 0.02, 1) * (1 - shallow)
    water = terrain.water
    if land.region.dryness > 0.7:  # late in the dry season the bed runs thin
        water = water * np.clip(0.75 + 0.25 * land.patch, 0.3, 1)
    clear = 1 - shallow - muddy
    lay_over(
        cover, water, {"water_clear": clear, "water_turbid": muddy, "sand": shallow}
    )
    bridge = land.roads * (terrain.water >= 0.5)
    lay_over(cover, 0.85 * bridge, {"asphalt": 1.0})
