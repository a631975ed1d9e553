"""The regions of the simulated world: invented places with real coordinates.

Each region differs in soil, vegetation, season, light, water, farming and air, so that
a region left out of training is a real shift. The positions only give the scenes a
valid UTM zone and a spot on the map; nothing of the real place is copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Region:
    """What makes one simulated region different from the others.

    Attributes:
        name: Key, as users type it.
        title: For figures.
        climate: Number of the climate class.
        lon, lat: Invented south-west corner in degrees.
        epsg: UTM zone of that corner.
        soils: Shares of the soil materials.
        dark_soil: Material of the dark patches (peat, basalt) and their share of land.
        canopy: Shares of broadleaf, conifer and shrub in the tree layer.
        trees, crops, bare, wetland, lakes: Shares of the land.
        closure: Canopy cover inside the trees, 0-1.
        dryness: Share of dry plants where no water is near, 0-1.
        season: Stage of the growing season, 0 bare to 1 ripe.
        relief: Height range in metres.
        rivers: Number of river courses.
        river_width: Half width in pixels, lowest and highest.
        turbidity: Sediment in the water, 0-1.
        parcel: Side of a field in pixels.
        hedges: Share of field borders with a row of trees.
        pivots: Share of fields watered by a centre pivot.
        towns: Mean number of settlements in a 256-pixel scene.
        roofs: Shares of bright, tile and dark roofs.
        paved: Share of country roads with asphalt.
        haze, cloud: Mean haze (0-1) and mean cloud cover (0-1).
        sun_elevation: Degrees.
    """

    name: str
    title: str
    climate: int
    lon: float
    lat: float
    epsg: int
    soils: Mapping[str, float]
    dark_soil: tuple[str, float]
    canopy: tuple[float, float, float]
    trees: float
    crops: float
    bare: float
    wetland: float
    lakes: float
    closure: float
    dryness: float
    season: float
    relief: float
    rivers: int
    river_width: tuple[float, float]
    turbidity: float
    parcel: float
    hedges: float
    pivots: float
    towns: float
    roofs: tuple[float, float, float]
    paved: float
    haze: float
    cloud: float
    sun_elevation: float


def _soils(dark: float, bright: float, red: float, sand: float) -> Mapping[str, float]:
    shares = {
        "soil_dark": dark,
        "soil_bright": bright,
        "soil_red": red,
        "sand": sand,
    }
    return MappingProxyType(shares)


_REGIONS = (
    Region(
        name="temperate",
        title="Temperate farmland",
        climate=0,
        lon=8.0,
        lat=48.5,
        epsg=32632,
        soils=_soils(0.70, 0.25, 0.05, 0.0),
        dark_soil=("peat", 0.05),
        canopy=(0.75, 0.25, 0.0),
        trees=0.28,
        crops=0.50,
        bare=0.01,
        wetland=0.01,
        lakes=0.01,
        closure=0.93,
        dryness=0.15,
        season=0.62,
        relief=60,
        rivers=1,
        river_width=(0.8, 6.0),
        turbidity=0.35,
        parcel=17,
        hedges=0.45,
        pivots=0.0,
        towns=1.6,
        roofs=(0.25, 0.55, 0.20),
        paved=0.8,
        haze=0.25,
        cloud=0.05,
        sun_elevation=48,
    ),
    Region(
        name="mediterranean",
        title="Mediterranean hills",
        climate=1,
        lon=-4.5,
        lat=37.2,
        epsg=32630,
        soils=_soils(0.2, 0.5, 0.3, 0.0),
        dark_soil=("basalt", 0.05),
        canopy=(0.25, 0.45, 0.30),
        trees=0.30,
        crops=0.32,
        bare=0.07,
        wetland=0.0,
        lakes=0.01,
        closure=0.72,
        dryness=0.55,
        season=0.40,
        relief=180,
        rivers=1,
        river_width=(0.7, 4.0),
        turbidity=0.25,
        parcel=12,
        hedges=0.2,
        pivots=0.0,
        towns=1.2,
        roofs=(0.30, 0.65, 0.05),
        paved=0.6,
        haze=0.20,
        cloud=0.03,
        sun_elevation=58,
    ),
    Region(
        name="arid",
        title="Arid plain",
        climate=2,
        lon=44.0,
        lat=27.0,
        epsg=32638,
        soils=_soils(0.0, 0.55, 0.10, 0.35),
        dark_soil=("basalt", 0.10),
        canopy=(0.35, 0.0, 0.65),
        trees=0.03,
        crops=0.20,
        bare=0.62,
        wetland=0.0,
        lakes=0.0,
        closure=0.55,
        dryness=0.80,
        season=0.70,
        relief=110,
        rivers=1,
        river_width=(0.6, 3.5),
        turbidity=0.70,
        parcel=30,
        hedges=0.0,
        pivots=0.75,
        towns=0.7,
        roofs=(0.75, 0.10, 0.15),
        paved=0.5,
        haze=0.30,
        cloud=0.01,
        sun_elevation=60,
    ),
    Region(
        name="boreal",
        title="Boreal forest and bog",
        climate=3,
        lon=26.0,
        lat=63.0,
        epsg=32635,
        soils=_soils(0.95, 0.05, 0.0, 0.0),
        dark_soil=("peat", 0.14),
        canopy=(0.18, 0.82, 0.0),
        trees=0.74,
        crops=0.05,
        bare=0.01,
        wetland=0.12,
        lakes=0.09,
        closure=0.85,
        dryness=0.10,
        season=0.55,
        relief=70,
        rivers=1,
        river_width=(0.5, 2.5),
        turbidity=0.05,
        parcel=24,
        hedges=0.15,
        pivots=0.0,
        towns=0.4,
        roofs=(0.30, 0.25, 0.45),
        paved=0.3,
        haze=0.15,
        cloud=0.06,
        sun_elevation=33,
    ),
    Region(
        name="delta",
        title="River delta",
        climate=4,
        lon=89.5,
        lat=22.8,
        epsg=32645,
        soils=_soils(0.6, 0.2, 0.2, 0.0),
        dark_soil=("peat", 0.06),
        canopy=(1.0, 0.0, 0.0),
        trees=0.16,
        crops=0.62,
        bare=0.01,
        wetland=0.07,
        lakes=0.03,
        closure=0.88,
        dryness=0.10,
        season=0.58,
        relief=6,
        rivers=3,
        river_width=(1.0, 11.0),
        turbidity=0.90,
        parcel=8.5,
        hedges=0.35,
        pivots=0.0,
        towns=2.4,
        roofs=(0.45, 0.30, 0.25),
        paved=0.4,
        haze=0.70,
        cloud=0.10,
        sun_elevation=55,
    ),
    Region(
        name="savanna",
        title="Savanna",
        climate=5,
        lon=30.5,
        lat=-13.5,
        epsg=32736,
        soils=_soils(0.1, 0.3, 0.6, 0.0),
        dark_soil=("basalt", 0.07),
        canopy=(0.7, 0.0, 0.3),
        trees=0.22,
        crops=0.18,
        bare=0.10,
        wetland=0.03,
        lakes=0.005,
        closure=0.55,
        dryness=0.72,
        season=0.36,
        relief=40,
        rivers=1,
        river_width=(0.6, 5.0),
        turbidity=0.80,
        parcel=7.5,
        hedges=0.15,
        pivots=0.0,
        towns=1.0,
        roofs=(0.55, 0.15, 0.30),
        paved=0.15,
        haze=0.45,
        cloud=0.04,
        sun_elevation=56,
    ),
)

REGIONS: Mapping[str, Region] = MappingProxyType({r.name: r for r in _REGIONS})
"""All regions of the simulated world by name."""
