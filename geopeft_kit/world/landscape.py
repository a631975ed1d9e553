"""The land of a simulated scene: fields, woods, moors, towns and roads.

What is built here does not change between two dates; `surface` dresses it for a day.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from geopeft_kit.world.noise import fractal_noise, quantile, smoothstep
from geopeft_kit.world.parcels import Layout, Parcels, split_cells, square_cells
from geopeft_kit.world.regions import Region
from geopeft_kit.world.settlements import buildings, roads_and_tracks, towns
from geopeft_kit.world.terrain import Terrain, build_terrain, sand_bars

WATER, TREES, GRASSLAND, CROPLAND, BARE, BUILT_UP, WETLAND = range(7)


@dataclass
class Land:
    """Everything on the ground that stays the same from one date to the next."""

    region: Region
    terrain: Terrain
    classes: np.ndarray  # uint8, see `LAND_COVER_CLASSES`
    layout: Layout
    closure: np.ndarray  # canopy cover 0-1
    hedge: np.ndarray
    clearing: np.ndarray  # 0 no clearing, else age of the clear-cut 0-1
    town: np.ndarray
    roofs: np.ndarray  # (3, H, W) bright, tile, dark
    streets: np.ndarray
    gardens: np.ndarray
    roads: np.ndarray
    tracks: np.ndarray
    bar: np.ndarray
    patch: np.ndarray  # medium noise, for plant vigour and soil
    grain: np.ndarray  # fine noise
    mix: np.ndarray  # 0-1, which of two soils
    dark: np.ndarray  # 0-1, share of peat or basalt in the soil
    stand: np.ndarray  # which of the region's trees


def build_land(region: Region, rng: np.random.Generator, size: int, salt: int) -> Land:
    """Lay out fields, trees, towns and roads on the terrain; no season, no weather."""
    terrain = build_terrain(region, rng, size)
    patch = fractal_noise(rng, size, 2.6)
    broad = fractal_noise(rng, size, 3.0)
    grain = fractal_noise(rng, size, 1.2, 1.2)
    stand = fractal_noise(rng, size, 2.4, 2)
    mix = np.clip(0.5 + 0.22 * fractal_noise(rng, size, 2.5), 0, 1)
    layout = _layout(region, rng, salt, broad)
    suits = broad + 0.4 * patch - 5 * terrain.slope + 0.9 * terrain.wet
    if region.pivots:
        crops, layout = _pivots(region, rng, salt, suits, layout)
    else:
        at_centre = _at_centre(suits, layout)
        crops = at_centre > quantile(at_centre, 1 - region.crops)
    dark = _dark_patches(region, rng, terrain)
    trees = _trees(region, rng, crops, grain, stand, terrain)
    town = towns(region, rng, size, terrain, patch)
    classes = _classes(region, rng, terrain, crops, trees, dark)
    roofs, streets, gardens = buildings(
        region, salt, layout, town, classes == CROPLAND, terrain
    )
    roads, tracks = roads_and_tracks(region, rng, salt, layout, terrain)
    bar = sand_bars(region, rng, size, terrain)
    hedge = _hedges(region, layout, terrain)
    built = (roofs.sum(0) + streets + 0.4 * gardens > 0.35) | (roads > 0.5)
    classes[built & (classes != WATER)] = BUILT_UP
    classes[(bar > 0.6) & (classes != WATER)] = BARE
    classes[(hedge > 0.7) & np.isin(classes, (CROPLAND, GRASSLAND))] = TREES
    return Land(
        region=region,
        terrain=terrain,
        classes=classes,
        layout=layout,
        closure=trees,
        hedge=hedge,
        clearing=_clearings(region, layout.parcels, trees),
        town=town,
        roofs=roofs,
        streets=streets,
        gardens=gardens,
        roads=roads,
        tracks=tracks,
        bar=bar,
        patch=patch,
        grain=grain,
        mix=mix,
        dark=dark,
        stand=stand,
    )


def _layout(
    region: Region, rng: np.random.Generator, salt: int, broad: np.ndarray
) -> Layout:
    """Districts with an angle each, blocks inside them, fields inside the blocks."""
    size = broad.shape[0]
    grid = np.arange(size, dtype=np.float32)
    y, x = np.broadcast_arrays(grid[:, None], grid[None, :])
    warp = fractal_noise(rng, size, 3.4, 10)
    district = square_cells(x + 16 * warp, y + 14 * broad, 120, salt + 40)
    spread = 0.15 if region.pivots else 1.0
    turn = (district.unit(5) - 0.5) * (math.pi / 2 * spread)
    turn += rng.uniform(-0.5, 0.5) * spread
    cosine, sine = np.cos(turn), np.sin(turn)
    bend = 1.2 if region.parcel > 10 else 2.2
    u = cosine * x + sine * y + bend * warp
    v = cosine * y - sine * x + bend * broad
    block = square_cells(u, v, region.parcel * 4, salt + 1)
    parcels = split_cells(block, u, v, region.parcel, 6, 0.7, 1.7)
    return Layout(u, v, turn, block, parcels, parcels.edge(u, v))


def _at_centre(field: np.ndarray, layout: Layout) -> np.ndarray:
    """The field's value at the centre of each pixel's parcel.

    A parcel is then all crop or all meadow, as on the ground.
    """
    parcels, last = layout.parcels, field.shape[0] - 1
    u = 0.5 * (parcels.left + parcels.right)
    v = 0.5 * (parcels.bottom + parcels.top)
    cosine, sine = np.cos(layout.turn), np.sin(layout.turn)
    column = np.clip(cosine * u - sine * v, 0, last).astype(np.int32)
    row = np.clip(sine * u + cosine * v, 0, last).astype(np.int32)
    return field[row, column]


def _pivots(
    region: Region,
    rng: np.random.Generator,
    salt: int,
    suits: np.ndarray,
    layout: Layout,
) -> tuple[np.ndarray, Layout]:
    """Round fields around wells, and small plots under palms along the river."""
    u, v = layout.u, layout.v
    side = float(rng.choice([36, 44, 56]))
    squares = square_cells(u, v, side, salt + 60)
    cu, cv = u - squares.left - side / 2, v - squares.bottom - side / 2
    radius = np.sqrt(cu * cu + cv * cv)
    # A square is irrigated as a whole: its mean suitability decides.
    number = np.unique(squares.number, return_inverse=True)[1].ravel()
    mean = np.bincount(number, suits.ravel()) / np.bincount(number)
    mean += rng.normal(0, 0.5, mean.size)
    least = np.quantile(mean, 1 - min(region.crops * 1.6 * region.pivots, 1))
    wells = (mean > least)[number].reshape(suits.shape) & (squares.unit(3) < 0.9)
    inside = wells & (radius < 0.475 * side)
    angle = np.arctan2(cv, cu) / (2 * math.pi) + 0.5
    second = (angle + squares.unit(8)) % 1 < 0.25 + 0.35 * squares.unit(9)
    split = second & (squares.unit(10) < 0.45)
    plots = ~wells & (suits > quantile(suits, 0.94))
    number = np.where(inside, squares.number + split, layout.parcels.number)
    parcels = replace(layout.parcels, number=number.astype(np.uint32))
    edge = np.where(inside, 0.475 * side - radius, layout.edge)
    return inside | plots, replace(layout, parcels=parcels, edge=edge)


def _dark_patches(
    region: Region, rng: np.random.Generator, terrain: Terrain
) -> np.ndarray:
    """Share of peat or basalt in the soil: dark, but neither wet nor burnt."""
    material, share = region.dark_soil
    field = fractal_noise(rng, terrain.hand.shape[0], 2.9)
    if material == "peat":
        field = field + 1.2 * terrain.wet
    least = quantile(field, 1 - share * rng.uniform(0.4, 2.0))
    return smoothstep(field, least - 0.1, least + 0.25)


def _trees(
    region: Region,
    rng: np.random.Generator,
    crops: np.ndarray,
    grain: np.ndarray,
    stand: np.ndarray,
    terrain: Terrain,
) -> np.ndarray:
    """Canopy cover: dense stands with soft, grainy edges, or scattered crowns."""
    share = region.trees / max(1 - region.crops, 0.2)
    suits = fractal_noise(rng, crops.shape[0], 3.0, 2.5) + 1.5 * terrain.slope
    if region.dryness > 0.3:
        suits = suits + 0.5 * terrain.wet
    free = np.where(crops, -9, suits)
    least = quantile(suits, 1 - min(share, 0.95))
    if region.closure > 0.65:
        cover = np.clip(0.5 + (free + 0.07 * grain - least) / 0.22, 0, 1)
    else:  # open woodland: single crowns fade out into the grass
        crowns = np.clip(0.5 + (free + 0.9 * grain - least) / 0.9, 0, 1)
        cover = crowns * np.clip(0.75 + 0.35 * grain, 0.1, 1.2)
    riparian = np.exp(-((terrain.stream / 2.5) ** 2))
    riparian *= np.clip(terrain.flow / 160, 0, 1)
    bank = np.exp(-((np.maximum(terrain.river - 1.5, 0) / 2.2) ** 2))
    bank *= np.clip(0.25 + 0.8 * stand, 0, 1)  # groups of trees, not a fence
    line = np.maximum(riparian, bank) * np.clip(0.75 + 0.5 * grain, 0, 1)
    humid = 0.85 if region.dryness < 0.7 else 0.6
    cover = np.maximum(cover * region.closure, line * humid * (region.trees > 0.02))
    # Woods that stand in water from time to time are more open.
    return np.clip(cover * (1 - 0.25 * terrain.wet), 0, 1) * (terrain.water < 0.5)


def _clearings(region: Region, parcels: Parcels, trees: np.ndarray) -> np.ndarray:
    """Age of clear-cuts (small is fresh), 0 where the forest was left alone."""
    felled = 0.15 if region.name == "boreal" else 0.03
    age = np.where(parcels.unit(71) < felled, 0.05 + 0.95 * parcels.unit(72), 0)
    return age * (trees > 0.25)


def _classes(
    region: Region,
    rng: np.random.Generator,
    terrain: Terrain,
    crops: np.ndarray,
    trees: np.ndarray,
    dark: np.ndarray,
) -> np.ndarray:
    """Land cover before towns and roads, uint8 (H, W)."""
    size = terrain.hand.shape[0]
    classes = np.full((size, size), GRASSLAND, np.uint8)
    stony = fractal_noise(rng, size, 2.8, 2) - 1.2 * terrain.wet + 3 * terrain.slope
    classes[stony > quantile(stony, 1 - region.bare)] = BARE
    classes[crops] = CROPLAND
    classes[trees > 0.35] = TREES
    if region.wetland > 0.005:
        boggy = terrain.wet + 0.8 * dark + 0.35 * fractal_noise(rng, size, 2.6)
        bog = boggy > quantile(boggy, 1 - region.wetland)
        classes[bog & ~crops & (trees < 0.6)] = WETLAND
    classes[terrain.water > 0.5] = WATER
    return classes


def _hedges(region: Region, layout: Layout, terrain: Terrain) -> np.ndarray:
    """Rows of trees on some field borders."""
    planted = layout.parcels.unit(61) < region.hedges
    return np.clip(1.0 - layout.edge, 0, 0.85) * planted * (terrain.water < 0.4)
