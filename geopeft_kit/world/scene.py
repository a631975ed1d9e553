"""A simulated world: multispectral scenes of invented regions, with all labels.

The scenes look like satellite images and obey a little physics (relief, drainage,
linear mixing of spectra, sun and shadow, haze, the camera's blur), so that lessons and
tests need no download. They are not satellite images: nothing measured on them says
how a method works on Earth.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from rasterio.transform import Affine, array_bounds
from rasterio.warp import transform as reproject
from scipy import ndimage

from geopeft_kit.bands import resolve_bands
from geopeft_kit.world import landscape, sensor
from geopeft_kit.world.events import burn, construction, flood
from geopeft_kit.world.regions import REGIONS, Region
from geopeft_kit.world.spectra import WORLD_BANDS
from geopeft_kit.world.surface import MATERIALS, Day, M, surface
from geopeft_kit.world.terrain import PIXEL

GENERATOR_VERSION = 1
"""Raised whenever the same arguments give other pixels, so that caches are renewed."""

EVENTS = ("none", "flood", "burn", "construction")

LAND_COVER_CLASSES: Mapping[str, str] = {
    "water": "#2f6fd0",
    "trees": "#1f7a45",
    "grassland": "#9ec766",
    "cropland": "#e6c84a",
    "bare": "#b9a184",
    "built-up": "#d63a6a",
    "wetland": "#5fb3a1",
}
"""Land-cover classes in the order of their numbers, with their colours."""

SHIFTS: Mapping[str, str] = {
    "haze": "added to the optical thickness of the haze (0-1)",
    "cloud": "added to the cloud cover (0-1)",
    "season": "added to the stage of the growing season (0-1)",
    "dryness": "added to the share of dry plants (0-1)",
    "turbidity": "added to the sediment in the water (0-1)",
    "rain": "added to the wetness of open soil (0-1)",
    "soil_brightness": "natural logarithm of a factor on all soils",
    "sun_elevation": "degrees added to the height of the sun",
}
"""What `simulate_scene(shift=...)` can turn, and what it does."""

_PITCH = 6000.0  # metres between the south-west corners of two places of one region
_COLUMNS, _ROWS = 40, 60


@dataclass(frozen=True)
class Scene:
    """One simulated place at two dates.

    Attributes:
        labels: (H, W) maps of the date of `image`: "land_cover" uint8 counting into
            `LAND_COVER_CLASSES`; "flood" uint8, 1 for all water, permanent or not;
            "permanent_water" uint8; "burn" uint8, 1 for fresh scars only;
            "building_density" and "road_density" float32, covered share 0-1; "change"
            uint8, 1 where the event changed the ground between `before` and `image`.
        physical: (H, W) float32 maps of the date of `image`: shares "green", "dry",
            "canopy", "soil" (bare ground, charred or not), "impervious", "water", which
            add up to one; "shade" (missing direct light, 0-1); "cloud" and, with
            `before`, "cloud_before" (opacity, 0-1); "hand" (height above the nearest
            river, metres), "slope" (metres per metre), "depth" (of the flood, metres),
            "severity" (of the fire, 0-1).
        scalars: Numbers about the whole scene: "season", "dryness", "turbidity",
            "rain", "soil_brightness", "haze", "cloud", "sun_elevation",
            "sun_azimuth", "climate" (`Region.climate`), "lon", "lat" (of the
            centre, degrees), "day_of_year" (counted from 0, made up).
    """

    region: str
    seed: int
    event: str
    bands: tuple[str, ...]
    image: np.ndarray = field(repr=False)  # (C, H, W) reflectance 0-1, after the event
    before: np.ndarray | None = field(repr=False)  # earlier, under another sky
    labels: dict[str, np.ndarray] = field(repr=False)
    physical: dict[str, np.ndarray] = field(repr=False)
    scalars: dict[str, float] = field(repr=False)
    transform: Affine = field(repr=False)
    crs: str
    bounds: tuple[float, float, float, float]  # left, bottom, right, top, metres


def simulate_scene(
    region: str,
    seed: int,
    size: int = 256,
    bands: str | Sequence[str] = "hls",
    event: str = "none",
    shift: Mapping[str, float] | None = None,
    pair: bool = True,
) -> Scene:
    """Make one scene with all its labels.

    Args:
        region: Name out of `REGIONS`.
        seed: Number of the place, 0 or more. Places 0 to 2399 of a region do not
            overlap on the ground (up to 600 pixels a side).
        size: Side in pixels of 10 m, 64 or more.
        bands: Sensor or band names; anything out of `WORLD_BANDS`.
        event: "none", "flood", "burn" or "construction".
        shift: Turns the region's air, light or season; keys as in `SHIFTS`.
        pair: Also make `before`, which costs about a third more time.

    Returns:
        The scene. The same arguments give the same arrays on one machine.
    """
    _check(region, seed, size, event, shift)
    names = resolve_bands(bands)
    missing = [name for name in names if name not in WORLD_BANDS]
    if missing:
        raise ValueError(
            f"The simulated world has no band {missing[0]!r}; "
            f"it has {', '.join(WORLD_BANDS)}. Ask for bands out of these."
        )
    knobs = REGIONS[region]
    identity = [zlib.crc32(region.encode()), seed]
    place = np.random.default_rng([*identity, 1])
    colours = (0.06 * place.standard_normal(len(MATERIALS))).astype(np.float32)
    land = landscape.build_land(knobs, place, size, salt=int(place.integers(2**31)))
    today = _draw_day(knobs, np.random.default_rng([*identity, 2]), shift, event)
    sky = np.random.default_rng([*identity, 3])
    happening = np.random.default_rng([*identity, 4, EVENTS.index(event)])
    history = [*identity, 5]

    cover = surface(land, today)
    _old_scars(cover, land, history)
    labels, extra = _happen(cover, land, today, event, happening)
    physical = _physical(cover, land, extra)
    image, light, opacity = sensor.observe(land, cover, today, names, sky, colours)
    physical["shade"] = np.clip(1 - light, 0, 1) * (1 - physical["water"])
    physical["cloud"] = opacity
    before = None
    if pair:
        before, physical["cloud_before"] = _before(
            land, identity, knobs, shift, today, history, names, colours
        )
    transform, bounds, lon, lat = _georeference(knobs, seed, size)
    scalars = _scalars(knobs, today, lon, lat)
    return Scene(
        region=region,
        seed=seed,
        event=event,
        bands=names,
        image=image,
        before=before,
        labels=labels,
        physical=physical,
        scalars=scalars,
        transform=transform,
        crs=f"EPSG:{knobs.epsg}",
        bounds=bounds,
    )


def _check(
    region: str, seed: int, size: int, event: str, shift: Mapping[str, float] | None
) -> None:
    """Refuse arguments outside the world, with the allowed values."""
    if region not in REGIONS:
        raise ValueError(
            f"Unknown region {region!r}; choose from {', '.join(REGIONS)}."
        )
    if event not in EVENTS:
        raise ValueError(f"Unknown event {event!r}; choose from {', '.join(EVENTS)}.")
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must be 0 or more.")
    if size < 64:
        raise ValueError(f"size is {size} pixels; it must be 64 or more.")
    for key in shift or {}:
        if key not in SHIFTS:
            raise ValueError(f"Unknown shift {key!r}; choose from {', '.join(SHIFTS)}.")


def _draw_day(
    region: Region,
    rng: np.random.Generator,
    shift: Mapping[str, float] | None,
    event: str = "none",
    like: Day | None = None,
) -> Day:
    """Draw season, weather and light around the region's own, or around `like`."""
    turn = dict.fromkeys(SHIFTS, 0.0) | dict(shift or {})
    rainy = 0.6 if event == "flood" else 0.10
    cloudy = 1.8 if event == "flood" else 1.0
    season = region.season + turn["season"] + rng.uniform(-0.15, 0.15)
    dryness = region.dryness + turn["dryness"] + rng.uniform(-0.12, 0.12)
    soil = turn["soil_brightness"] + rng.normal(0, 0.10)
    turbidity = region.turbidity + turn["turbidity"] + rng.uniform(-0.2, 0.2)
    if like is not None:  # some weeks apart
        season = like.season + rng.uniform(-0.12, 0.12)
        dryness = like.dryness + rng.uniform(-0.08, 0.08)
        soil = like.soil_brightness
    rain = turn["rain"] + rainy * rng.uniform(0, 2) * (rng.random() < 0.6)
    elevation = region.sun_elevation + turn["sun_elevation"] + rng.uniform(-7, 7)
    cloud = region.cloud * rng.choice([0.0, 0.6, 2.2], p=[0.48, 0.32, 0.20]) * cloudy
    return Day(
        season=float(np.clip(season, 0, 1)),
        dryness=float(np.clip(dryness, 0, 1)),
        turbidity=float(np.clip(turbidity, 0, 1)),
        rain=float(np.clip(rain, 0, 1)),
        soil_brightness=float(soil),
        sun_elevation=float(np.clip(elevation, 15, 85)),
        sun_azimuth=float((145 if region.lat > 0 else 40) + rng.uniform(-15, 20)),
        haze=float(max(region.haze * rng.uniform(0.3, 1.6) + turn["haze"], 0.02)),
        cloud=float(np.clip(cloud + turn["cloud"], 0, 0.9)),
        glint=float(rng.choice([0.0, 0.012, 0.035], p=[0.5, 0.3, 0.2])),
        harvest=int(rng.integers(1, 1000)),
    )


def _old_scars(cover: np.ndarray, land: landscape.Land, history: list[int]) -> None:
    """In half of the places it burnt some years ago; that is no fresh scar."""
    rng = np.random.default_rng(history)
    if rng.random() < 0.5:
        burn(cover, land, rng, age=rng.uniform(0.35, 0.9))


def _happen(
    cover: np.ndarray,
    land: landscape.Land,
    day: Day,
    event: str,
    rng: np.random.Generator,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Let the event happen (in place); returns labels and the maps behind them."""
    shape = land.classes.shape
    nothing = np.zeros(shape, np.float32)
    permanent = land.terrain.water > 0.5
    water, burnt, change = permanent, nothing > 1, nothing > 1
    depth = severity = nothing
    classes, roofs = land.classes.copy(), land.roofs.sum(0)
    if event == "flood":
        inundated, depth = flood(cover, land, day, rng)
        change = inundated & ~permanent
        water = permanent | inundated
    elif event == "burn":
        severity = burn(cover, land, rng)
        burnt = change = severity > 0.25
    elif event == "construction":
        change, new = construction(cover, land, rng)
        classes[change] = landscape.BUILT_UP
        roofs = np.where(change, new, roofs)
    paved = np.maximum(land.roads, land.streets)
    labels = {
        "land_cover": classes,
        "flood": water.astype(np.uint8),
        "permanent_water": permanent.astype(np.uint8),
        "burn": burnt.astype(np.uint8),
        "building_density": _density(roofs),
        "road_density": _density(paved),
        "change": change.astype(np.uint8),
    }
    return labels, {"depth": depth, "severity": severity}


def _density(cover: np.ndarray) -> np.ndarray:
    """Covered share around each pixel, 0-1."""
    blurred = ndimage.gaussian_filter(cover, 1.0, truncate=2.5)
    return np.clip(blurred, 0, 1).astype(np.float32)


def _before(
    land: landscape.Land,
    identity: list[int],
    region: Region,
    shift: Mapping[str, float] | None,
    today: Day,
    history: list[int],
    bands: tuple[str, ...],
    colours: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """The same place some weeks earlier: image and cloud opacity."""
    rng = np.random.default_rng([*identity, 6])
    day = _draw_day(region, rng, shift, like=today)
    cover = surface(land, day)
    _old_scars(cover, land, history)
    image, _, opacity = sensor.observe(land, cover, day, bands, rng, colours)
    return image, opacity


def _physical(
    cover: np.ndarray, land: landscape.Land, extra: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Sums of fractions, and the shape of the ground."""
    groups = {
        "green": ("crop", "grass", "shrub", "wetland"),
        "dry": ("dry_grass", "scorched"),
        "canopy": ("broadleaf", "conifer"),
        "soil": ("soil_a", "soil_b", "soil_dark", "mud", "sand", "char", "ash"),
        "impervious": ("asphalt", "roof_bright", "roof_tile", "roof_dark"),
        "water": ("water_clear", "water_turbid"),
    }
    maps = {
        name: np.clip(sum(cover[M[member]] for member in members), 0, 1)
        for name, members in groups.items()
    }
    terrain = land.terrain
    return {**maps, "hand": terrain.hand, "slope": terrain.slope, **extra}


def _georeference(
    region: Region, seed: int, size: int
) -> tuple[Affine, tuple[float, float, float, float], float, float]:
    """Place the scene on a grid of its region; returns its centre in degrees too."""
    crs = f"EPSG:{region.epsg}"
    (east,), (north,) = reproject("EPSG:4326", crs, [region.lon], [region.lat])
    column, row = seed % _COLUMNS, seed // _COLUMNS % _ROWS
    left = round(east, -3) + column * _PITCH
    top = round(north, -3) + row * _PITCH + size * PIXEL
    transform = Affine(PIXEL, 0, left, 0, -PIXEL, top)
    bounds = array_bounds(size, size, transform)
    x, y = (bounds[0] + bounds[2]) / 2, (bounds[1] + bounds[3]) / 2
    (lon,), (lat,) = reproject(crs, "EPSG:4326", [x], [y])
    return transform, bounds, lon, lat


def _scalars(region: Region, day: Day, lon: float, lat: float) -> dict[str, float]:
    """Numbers about the whole scene."""
    keys = (*SHIFTS, "sun_azimuth")
    numbers = {key: float(getattr(day, key)) for key in keys}
    # The season's stage is what counts; a date is made up to go with it.
    start = 75 if region.lat > 0 else 255
    return {
        **numbers,
        "climate": float(region.climate),
        "lon": float(lon),
        "lat": float(lat),
        "day_of_year": float(int(start + 180 * day.season) % 365),
    }
