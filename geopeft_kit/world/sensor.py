"""Light, air and camera: from cover fractions to what the satellite stores."""

from __future__ import annotations

import math
import zlib

import numpy as np
from scipy import ndimage

from geopeft_kit.world.landscape import CROPLAND, Land
from geopeft_kit.world.noise import fractal_noise, gradient, quantile, smoothstep
from geopeft_kit.world.spectra import PIXEL_SIZES, SPECTRA, WAVELENGTHS, WORLD_BANDS
from geopeft_kit.world.surface import MATERIALS, Day, M
from geopeft_kit.world.terrain import PIXEL


def endmembers(land: Land, day: Day, jitter: np.ndarray) -> np.ndarray:
    """Reflectance of every material in this scene, (K, 12) float32.

    `jitter` (K,) are small log factors, so that no two scenes have the same colours.
    """
    soils = land.region.soils
    names, shares = list(soils), np.array(list(soils.values()), np.float32)
    # Two soils per scene, on either side of the region's mean.
    weights = shares[None, :] * np.exp(
        0.6 * np.stack([jitter[:4] * 8, jitter[4:8] * 8])
    )
    weights /= weights.sum(1, keepdims=True)
    table = weights @ np.stack([SPECTRA[name] for name in names])  # (2, 12)
    table = table * np.array([[1.14], [0.86]], np.float32)
    dark = SPECTRA[land.region.dark_soil[0]]
    # Water in the pores darkens soil, most of all in the short-wave infrared.
    soaked = 0.60 - 0.27 * smoothstep(WAVELENGTHS, 0.8, 1.7)
    special = {
        "soil_a": table[0],
        "soil_b": table[1],
        "soil_dark": 0.8 * dark + 0.2 * table[0],
        "mud": table.mean(0) * soaked,
    }
    rows = []
    for number, name in enumerate(MATERIALS):
        row = special[name] if name in special else SPECTRA[name]
        factor = np.exp(jitter[number])
        if name in special or name == "sand":
            factor *= np.exp(day.soil_brightness)
        rows.append(row * factor)
    return np.stack(rows).astype(np.float32)


def texture(land: Land, cover: np.ndarray) -> None:
    """Make each material brighter or darker from place to place, in place."""
    grain, patch, stand = land.grain, land.patch, land.stand
    crowns = np.exp(0.13 * grain + 0.07 * stand)
    for name in ("broadleaf", "conifer", "scorched"):
        cover[M[name]] *= crowns
    soil = np.exp(0.07 * patch + 0.04 * grain)
    tilled = np.where(land.classes == CROPLAND, 1.0, 0.3 - 0.3 * land.region.dryness)
    tilled = tilled.astype(np.float32)
    soil = soil * (1 + 0.28 * tilled * (land.layout.parcels.unit(121) - 0.5))
    for name in ("soil_a", "soil_b", "soil_dark", "mud"):
        cover[M[name]] *= soil
    plants = np.exp(0.05 * grain + 0.04 * patch)
    plants = plants * (1 + 0.24 * tilled * (land.layout.parcels.unit(122) - 0.5))
    for name in ("crop", "grass", "dry_grass", "shrub", "wetland"):
        cover[M[name]] *= plants


def illumination(land: Land, cover: np.ndarray, day: Day) -> np.ndarray:
    """Direct sunlight on each pixel relative to flat ground, (H, W).

    Slopes are Lambertian; hills and forest edges cast shadows; water lies flat.
    """
    elevation, azimuth = math.radians(day.sun_elevation), math.radians(day.sun_azimuth)
    canopy = cover[M["broadleaf"]] + cover[M["conifer"]] + cover[M["scorched"]]
    trees = canopy * np.clip(11 + 2.5 * land.grain, 3, 20) * (1 - 0.5 * land.hedge)
    model = land.terrain.height + trees
    rows, columns = gradient(land.terrain.height + 0.22 * trees)
    rows, columns = rows / PIXEL, columns / PIXEL
    water = cover[M["water_clear"]] + cover[M["water_turbid"]]
    level = 1 - np.clip(water * 1.3, 0, 1)
    rows, columns = rows * level, columns * level
    # Row numbers grow southwards, the sun stands at (sin, cos) of its azimuth.
    east, north = math.sin(azimuth), math.cos(azimuth)
    slant = (-columns * east + rows * north) * math.cos(elevation) + math.sin(elevation)
    light = slant / (np.sqrt(1 + rows**2 + columns**2) * math.sin(elevation))
    shadow = np.zeros_like(light)
    for reach in (1, 2, 3, 5, 8, 12, 18, 26, 38):
        rise = reach * PIXEL * math.tan(elevation)
        moved = shifted(model, -reach * north, reach * east)
        shadow = np.maximum(shadow, np.clip((moved - rise - model) / 5, 0, 1))
    return np.clip(light, 0, 2.0) * (1 - 0.92 * shadow)


def shifted(field: np.ndarray, rows: float, columns: float) -> np.ndarray:
    """The field as seen `rows` down and `columns` to the right, edges repeated."""
    size = field.shape[0]
    grid = np.arange(size)
    row = np.clip(grid + round(rows), 0, size - 1)
    column = np.clip(grid + round(columns), 0, size - 1)
    return field[row[:, None], column[None, :]]


def clouds(
    rng: np.random.Generator, size: int, day: Day
) -> tuple[np.ndarray, np.ndarray]:
    """Opacity of clouds and darkness of their shadows, both (H, W), 0-1."""
    if day.cloud <= 0.005:
        return np.zeros((size, size), np.float32), np.zeros((size, size), np.float32)
    body = fractal_noise(rng, size, 3.2) + 0.12 * fractal_noise(rng, size, 1.8)
    least = quantile(body, 1 - day.cloud)
    opacity = np.clip(0.9 * (body - least), 0, 0.97) ** 1.15
    if rng.random() < 0.5:  # thin cirrus over a wide area
        veil = fractal_noise(rng, size, 3.0)
        opacity = np.maximum(opacity, np.clip(0.16 * (veil - 0.2), 0, 0.35))
    # The sky is periodic, so a shadow may come in over the edge.
    distance = rng.uniform(18, 60) / math.tan(math.radians(day.sun_elevation))
    azimuth = math.radians(day.sun_azimuth)
    rows, columns = distance * math.cos(azimuth), -distance * math.sin(azimuth)
    return opacity, np.roll(opacity, (round(rows), round(columns)), (0, 1))


def observe(
    land: Land,
    cover: np.ndarray,
    day: Day,
    bands: tuple[str, ...],
    rng: np.random.Generator,
    colours: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Photograph the scene; `cover` (K, H, W) is overwritten.

    `rng` is drawn from in the same way for all `bands`; `colours` (K,) are log factors
    of the materials. Returns the image (C, H, W) reflectance 0-1, direct light with all
    shadows and cloud opacity, both (H, W).
    """
    size = cover.shape[1]
    index = [WORLD_BANDS.index(name) for name in bands]
    opacity, dark = clouds(rng, size, day)
    air = np.clip(1 + 0.3 * fractal_noise(rng, size, 3.6, 20), 0.2, 2) * day.haze
    ripple = 1 + 0.25 * fractal_noise(rng, size, 1.5, 2)
    gain = np.exp(0.015 * rng.standard_normal(len(WORLD_BANDS))).astype(np.float32)
    noise_seed = int(rng.integers(2**32))
    light = illumination(land, cover, day) * (1 - 0.75 * dark)
    water = np.clip(cover[M["water_clear"]] + cover[M["water_turbid"]], 0, 1)
    glint = day.glint * water * ripple * np.clip(light, 0, 1)
    table = endmembers(land, day, colours)[:, index]  # (K, C)
    texture(land, cover)
    image = (table.T @ cover.reshape(len(MATERIALS), -1)).reshape(-1, size, size)
    sky = 0.05 + 0.17 * (0.49 / WAVELENGTHS) ** 1.6 * (1 + 0.5 * day.haze)
    for number, band in enumerate(index):
        plane = image[number]
        plane *= (1 - sky[band]) * light + sky[band]
        plane += glint
        plane *= 1 - 0.12 * air
        plane += air * SPECTRA["haze"][band]
        plane *= 1 - opacity
        plane += opacity * SPECTRA["cloud"][band]
        blur = {10: 0.5, 20: 0.9, 60: 2.4}[int(PIXEL_SIZES[band])]
        plane = ndimage.gaussian_filter(plane, blur, truncate=2.5, mode="nearest")
        grain = np.random.default_rng([noise_seed, zlib.crc32(bands[number].encode())])
        plane *= gain[band]
        plane += 0.0025 * grain.standard_normal(plane.shape, np.float32)
        np.clip(plane, 1e-4, 1, out=image[number])
    return image, light, opacity
