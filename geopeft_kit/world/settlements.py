"""Towns, farms and roads of a simulated scene."""

from __future__ import annotations

import math

import numpy as np

from geopeft_kit.world.noise import curve_distance, fractal_noise, hash_unit, smoothstep
from geopeft_kit.world.parcels import Layout, split_cells, square_cells
from geopeft_kit.world.regions import Region
from geopeft_kit.world.terrain import Terrain


def towns(
    region: Region,
    rng: np.random.Generator,
    size: int,
    terrain: Terrain,
    patch: np.ndarray,
) -> np.ndarray:
    """How urban each pixel is, 0-1; towns prefer flat ground near water."""
    grid = np.arange(size, dtype=np.float32)
    town = np.zeros((size, size), np.float32)
    for _ in range(rng.poisson(region.towns * (size / 256) ** 2)):
        spots = rng.integers(0, size, (2, 8))
        cost = 12 * terrain.slope[*spots] + 0.004 * np.abs(terrain.river[*spots])
        cost += 3 * (terrain.water[*spots] > 0.1) + (terrain.hand[*spots] < 1.0)
        row, column = spots[:, np.argmin(cost)]
        reach = math.exp(rng.normal(2.65, 0.5))
        away = (grid[:, None] - int(row)) ** 2 + (grid - int(column)) ** 2
        shape = away / reach**2 * np.exp(0.35 * patch)
        town = np.maximum(town, np.exp(-shape))
    flat = 1 - smoothstep(terrain.slope, 0.12, 0.3)
    return town * flat * (terrain.water < 0.2) * smoothstep(terrain.river, 0.5, 3)


def buildings(
    region: Region,
    salt: int,
    layout: Layout,
    town: np.ndarray,
    fields: np.ndarray,
    terrain: Terrain,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cover 0-1 of roofs (3, H, W: bright, tile, dark), streets and gardens (H, W).

    Fields are cut into blocks, blocks into lots. `town` (H, W) is how urban a pixel is,
    `fields` (H, W) bool where farms may stand.
    """
    size = town.shape[0]
    roofs = np.zeros((3, size, size), np.float32)
    streets, gardens = np.zeros((2, size, size), np.float32)
    parcels = layout.parcels
    middle = np.maximum(
        np.abs(layout.u - 0.5 * (parcels.left + parcels.right)),
        np.abs(layout.v - 0.5 * (parcels.bottom + parcels.top)),
    )
    farm = (parcels.unit(81) < 0.03) & (middle < 2.2) & fields
    where = np.flatnonzero(((town > 0.08) | farm) & (terrain.water < 0.2))
    if where.size == 0:
        return roofs, streets, gardens
    farm = farm.ravel()[where]
    urban = np.maximum(town.ravel()[where], 0.6 * farm)
    u, v = layout.u.ravel()[where], layout.v.ravel()[where]
    inner = parcels.at(where)
    if region.pivots:  # a round field has no sides to start from
        inner = square_cells(u, v, 36, salt + 90)
    blocks = split_cells(inner, u, v, 5.5, 6, 0.4, 1.5)
    lots = split_cells(blocks, u, v, 1.7, 5, 0.4, 1.4)
    built, use = blocks.unit(91) < 0.15 + 1.6 * urban, blocks.unit(92)
    halls, park = use < 0.14, use > 0.93
    number = np.where(halls, blocks.number, lots.number)
    inset = np.where(halls, blocks.edge(u, v) - 0.9, lots.edge(u, v))
    house = built & ~park & (hash_unit(number, 93) < 0.40 + 0.5 * urban)
    cover = np.clip(inset + 0.45, 0, 1) * house * (0.55 + 0.45 * hash_unit(number, 94))
    street = np.clip(0.85 - blocks.edge(u, v), 0, 0.75) * (urban > 0.12) * ~farm
    cover *= 1 - street
    roofs.reshape(3, -1)[_material(region, number, halls), where] = cover
    yards = 0.5 * (halls & built) * (1 - cover)
    streets.ravel()[where] = np.maximum(street, yards)
    gardens.ravel()[where] = (built & ~halls) * np.maximum(1 - cover - street, 0)
    return roofs, streets, gardens


def _material(region: Region, number: np.ndarray, halls: np.ndarray) -> np.ndarray:
    """Row of `roofs` that a house belongs to: bright, tile or dark."""
    chance = hash_unit(number, 95)
    bright = np.where(halls, 0.6, region.roofs[0])
    tile = bright + region.roofs[1]
    return np.where(chance < bright, 0, np.where(chance < tile, 1, 2))


def roads_and_tracks(
    region: Region,
    rng: np.random.Generator,
    salt: int,
    layout: Layout,
    terrain: Terrain,
) -> tuple[np.ndarray, np.ndarray]:
    """Cover 0-1 of asphalt and of dirt, both (H, W).

    Main roads cross the land, country roads run around blocks, tracks between fields.
    """
    main = _main_roads(rng, terrain)
    side, u, v = region.parcel * 4, layout.u, layout.v
    line_u, line_v = np.rint(u / side), np.rint(v / side)
    # One number for each side of a block, so that a road runs along all of it.
    lane = (line_u * 7919 + np.floor(v / side) * 104729).astype(np.int64)
    cross = (line_v * 15485863 + np.floor(u / side) * 32452843).astype(np.int64)
    to_u = np.where(hash_unit(lane, salt + 2) < 0.5, np.abs(u - line_u * side), 9)
    to_v = np.where(hash_unit(cross, salt + 3) < 0.5, np.abs(v - line_v * side), 9)
    country = np.clip(0.75 - np.minimum(to_u, to_v), 0, 0.6) * (terrain.water < 0.4)
    country *= 1 - smoothstep(terrain.slope, 0.15, 0.3)
    number = np.where(to_u < to_v, lane, cross)
    paved = hash_unit(number, salt + 4) < region.paved
    used = (layout.block.unit(44) < 0.6) & (terrain.water < 0.3)
    tracks = np.clip(0.55 - layout.edge, 0, 0.35) * used
    return np.maximum(main, country * paved), np.maximum(country * ~paved, tracks)


def _main_roads(rng: np.random.Generator, terrain: Terrain) -> np.ndarray:
    """Cover of one or two long, gently bending roads."""
    size = terrain.height.shape[0]
    grid = np.arange(size, dtype=np.float32) - size / 2
    roads = np.zeros((size, size), np.float32)
    for _ in range(rng.integers(1, 3)):
        angle = rng.uniform(0, np.pi)
        across = grid[:, None] * math.cos(angle) + grid * math.sin(angle)
        across -= rng.uniform(-100, 100)
        course = across + 14 * fractal_noise(rng, size, 4.4, 40)
        half = float(rng.choice([0.35, 0.45, 0.8]))
        away = np.abs(curve_distance(course))
        roads = np.maximum(roads, np.clip(half + 0.5 - away, 0, 1))
    return roads * (terrain.lake < 0.3)  # bridges cross rivers, not lakes
