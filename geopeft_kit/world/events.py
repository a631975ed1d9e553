"""What an event makes of the ground: flood, fire and construction.

Each changes the cover fractions as it would on the ground and hands back what the
label is made of.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from geopeft_kit.world.landscape import (
    BARE,
    BUILT_UP,
    CROPLAND,
    GRASSLAND,
    TREES,
    WATER,
    WETLAND,
    Land,
)
from geopeft_kit.world.noise import fractal_noise, hash_unit, quantile, smoothstep
from geopeft_kit.world.parcels import split_cells, square_cells
from geopeft_kit.world.surface import MATERIALS, Day, M

_HEIGHT = {  # metres of plant or house above the ground, to see over a flood
    "crop": 1.3,
    "grass": 0.5,
    "dry_grass": 0.6,
    "broadleaf": 14.0,
    "conifer": 14.0,
    "shrub": 2.0,
    "wetland": 1.5,
    "scorched": 8.0,
    "roof_bright": 5.0,
    "roof_tile": 5.0,
    "roof_dark": 5.0,
}


def flood(
    cover: np.ndarray, land: Land, day: Day, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Let the river rise over the low ground; changes `cover` (K, H, W) in place.

    Plants and houses stand out of the water in proportion to their height above it, so
    a flooded wood is mostly canopy to the satellite. Returns what is inundated (bool,
    without permanent water) and the depth in metres, (H, W).
    """
    terrain = land.terrain
    size = terrain.hand.shape[0]
    micro = (0.25 + 0.006 * land.region.relief) * fractal_noise(rng, size, 2.4)
    level = terrain.hand + np.where(terrain.water > 0.5, 0, micro)
    dry_land = level[terrain.water < 0.5]
    stage = quantile(dry_land, rng.uniform(0.10, 0.32)) if dry_land.size else 1.0
    depth = np.clip(stage - level, 0, 6)
    alpha = np.clip(depth / 0.08, 0, 1) * (terrain.water < 0.5)
    _submerge(cover, alpha, depth, day, land)
    # The ground just above the water line is soaked, not flooded.
    soaked = np.exp(-np.clip(level - stage, 0, None) / 0.5) * (depth <= 0)
    for name in ("soil_a", "soil_b", "sand"):
        moved = cover[M[name]] * 0.8 * soaked
        cover[M[name]] -= moved
        cover[M["mud"]] += moved
    return depth > 0.04, depth


def _submerge(
    cover: np.ndarray, alpha: np.ndarray, depth: np.ndarray, day: Day, land: Land
) -> None:
    """Replace whatever does not stand out of the water, in place."""
    flat = cover.reshape(len(MATERIALS), -1)
    where = np.flatnonzero(alpha > 0)
    alpha, depth = alpha.ravel()[where], depth.ravel()[where]
    part = flat[:, where]  # (K, n)
    before = part * alpha
    part *= 1 - alpha
    open_water = alpha.copy()
    for name, height in _HEIGHT.items():
        above = np.clip(1 - depth / height, 0, 1)
        kept = before[M[name]] * above * (0.55 + 0.45 * above)
        part[M[name]] += kept
        open_water -= kept
    muddy = max(day.turbidity, 0.35) + 0.15 * land.patch.ravel()[where] - 0.04 * depth
    muddy = np.clip(muddy, 0.05, 1)
    part[M["water_turbid"]] += open_water * muddy
    part[M["water_clear"]] += open_water * (1 - muddy)
    flat[:, where] = part


def burn(
    cover: np.ndarray, land: Land, rng: np.random.Generator, age: float = 0.0
) -> np.ndarray:
    """Burn a few patches of wood, scrub and grass in `cover`; severity 0-1, (H, W).

    `age` 0 is a fresh scar; towards 1 the char is gone and shrubs are back.
    """
    size = land.classes.shape[0]
    fuel = sum(
        cover[M[name]]
        for name in ("broadleaf", "conifer", "shrub", "grass", "dry_grass")
    )
    fuel = fuel * ~np.isin(land.classes, (WATER, CROPLAND, BUILT_UP, WETLAND))
    carries = ndimage.gaussian_filter(fuel, 2.5, truncate=2.5)  # sparks cross gaps
    shape = fractal_noise(rng, size, 3.5) + 0.10 * fractal_noise(rng, size, 1.9)
    shape += 0.3 * np.tanh(land.terrain.hand / (0.3 * land.region.relief) - 1)
    fraction = rng.uniform(0.10, 0.35) * (1 if age == 0 else 0.6)
    least = quantile(np.where(carries > 0.25, shape, -3), 1 - fraction)
    islands = smoothstep(fractal_noise(rng, size, 2.4, 2), 1.3, 1.8)
    severity = np.clip(2.2 * (shape - least) + 0.3, 0, 1) * (shape > least)
    severity *= (1 - islands) * smoothstep(carries, 0.15, 0.35) * (fuel > 0.05)
    severity *= np.clip(0.9 + 0.2 * land.patch, 0.3, 1.1)
    severity = np.clip(severity, 0, 1)
    _turn_to_char(cover, severity, land, age)
    return severity


def _turn_to_char(
    cover: np.ndarray, severity: np.ndarray, land: Land, age: float
) -> None:
    """Move plants to scorched canopy, char and ash; with age, to soil and shrubs."""
    grain = np.clip(0.12 + 0.10 * land.grain + 0.05 * land.stand, 0, 0.5)
    for name in ("broadleaf", "conifer", "shrub", "grass", "dry_grass"):
        low = name in ("grass", "dry_grass", "shrub")
        gone = np.clip(severity * (1.6 if low else 1.05), 0, 0.97)
        burnt = cover[M[name]] * gone
        cover[M[name]] -= burnt
        # A ground fire leaves a brown canopy; a crown fire leaves black stems.
        scorched = burnt * (0 if low else 1) * np.clip(1.1 - severity, 0.1, 0.9)
        black = burnt - scorched
        fresh = (1 - age) ** 2
        cover[M["scorched"]] += scorched * (1 - 0.7 * age)
        cover[M["char"]] += black * fresh * (1 - grain) * 0.85
        cover[M["ash"]] += black * fresh * grain * 0.85
        ground = black * (1 - 0.85 * fresh) + scorched * 0.7 * age
        back = np.clip(0.15 + 0.75 * age + 0.1 * land.patch, 0, 0.9) * (age > 0)
        cover[M["shrub"]] += ground * back * 0.6
        cover[M["dry_grass"]] += ground * back * 0.4
        cover[M["soil_a"]] += ground * (1 - back) * (1 - land.dark)
        cover[M["soil_dark"]] += ground * (1 - back) * land.dark


def construction(
    cover: np.ndarray, land: Land, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Build on a few fields of `cover`: halls, houses, or a bare building site.

    Returns the sites (bool) and the new roofs' cover (float32), both (H, W).
    """
    number = land.layout.parcels.number
    free = np.isin(land.classes, (CROPLAND, GRASSLAND, BARE, TREES))
    free &= (land.terrain.slope < 0.15) & (land.terrain.water < 0.1)
    salt = int(rng.integers(2**20))
    # New quarters lie together, and near the towns that grow.
    zone = fractal_noise(rng, land.classes.shape[0], 3.4, 20)
    zone = zone + 0.8 * smoothstep(land.town, 0.002, 0.05)
    chance = np.where(zone > quantile(zone, rng.uniform(0.80, 0.92)), 0.6, 0.02)
    sites = free & (hash_unit(number, salt) < chance) & (land.layout.edge > 0.6)
    sites = ndimage.binary_opening(sites, iterations=1)
    where = np.flatnonzero(sites)
    roofs = np.zeros(land.classes.shape, np.float32)
    if where.size == 0:
        return sites, roofs
    u, v = land.layout.u.ravel()[where], land.layout.v.ravel()[where]
    kind = hash_unit(number.ravel()[where], salt + 1)
    lots = square_cells(u, v, 14.0, salt + 2)
    small = split_cells(lots, u, v, 1.8, 5, 0.3, 1.3)
    hall, earth = kind < 0.4, kind > 0.75
    inset = np.where(hall, lots.edge(u, v) - 1.5, small.edge(u, v))
    occupied = np.where(hall, lots.unit(3) < 0.75, small.unit(3) < 0.6)
    roof = np.clip(inset + 0.45, 0, 1) * occupied * ~earth
    street = np.clip(1.0 - lots.edge(u, v), 0, 0.9) * (1 - roof)
    rest = 1 - roof - street
    bright = np.where(hall, 0.75, land.region.roofs[0])
    house = ~hall & ~earth
    mixture = {
        "roof_bright": roof * bright,
        "roof_tile": roof * (1 - bright) * ~hall,
        "roof_dark": roof * (1 - bright) * hall,
        "asphalt": street * np.where(earth, 0.2, 1) + rest * 0.5 * hall,
        "soil_a": rest * 0.4 * earth,
        "soil_b": street * 0.8 * earth + rest * np.where(hall, 0.5, 0.6),
        "grass": rest * 0.4 * house,
    }
    flat = cover.reshape(len(MATERIALS), -1)
    flat[:, where] = 0
    for name, share in mixture.items():
        flat[M[name], where] = share
    roofs.ravel()[where] = roof
    return sites, roofs
