"""The regions of the simulated world: invented places with real coordinates.

Each region differs in soil, vegetation, season, light, water, farming and air, so that
a region left out of training is a real shift. The positions only give the scenes a
valid UTM zone and a spot on the map; nothing of the real place is copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Region:
    """What makes one simulated region different from the others."""

    name: str  # as users type it
    climate: int  # number of the climate class
    lon: float  # invented south-west corner, degrees
    lat: float
    epsg: int  # UTM zone of that corner
    soils: Mapping[str, float]  # shares of the soil materials
    dark_soil: tuple[str, float]  # material of the dark patches, their share of land
    canopy: tuple[float, float, float]  # shares of broadleaf, conifer, shrub in trees
    trees: float  # this and the next four: shares of the land
    crops: float
    bare: float
    wetland: float
    lakes: float
    closure: float  # canopy cover inside the trees, 0-1
    dryness: float  # share of dry plants where no water is near, 0-1
    season: float  # stage of the growing season, 0 bare to 1 ripe
    relief: float  # height range in metres
    rivers: int  # number of river courses
    river_width: tuple[float, float]  # half width in pixels, lowest and highest
    turbidity: float  # sediment in the water, 0-1
    parcel: float  # side of a field in pixels
    hedges: float  # share of field borders with a row of trees
    pivots: float  # share of fields watered by a centre pivot
    towns: float  # mean number of settlements in a 256-pixel scene
    roofs: tuple[float, float, float]  # shares of bright, tile and dark roofs
    paved: float  # share of country roads with asphalt
    haze: float  # mean, 0-1
    cloud: float  # mean cover, 0-1
    sun_elevation: float  # degrees


# fmt: off
_NAMES = ("temperate", "mediterranean", "arid", "boreal", "delta", "savanna")
_TABLE: Mapping[str, tuple[Any, ...]] = {
    #              temperate  mediterr.     arid    boreal     delta   savanna
    "climate":       (       0,        1,        2,        3,        4,        5),
    "lon":           (     8.0,     -4.5,     44.0,     26.0,     89.5,     30.5),
    "lat":           (    48.5,     37.2,     27.0,     63.0,     22.8,    -13.5),
    "epsg":          (   32632,    32630,    32638,    32635,    32645,    32736),
    "soil_dark":     (     0.7,      0.2,      0.0,     0.95,      0.6,      0.1),
    "soil_bright":   (    0.25,      0.5,     0.55,     0.05,      0.2,      0.3),
    "soil_red":      (    0.05,      0.3,      0.1,      0.0,      0.2,      0.6),
    "sand":          (     0.0,      0.0,     0.35,      0.0,      0.0,      0.0),
    "dark_material": (  "peat", "basalt", "basalt",   "peat",   "peat", "basalt"),
    "dark_share":    (    0.05,     0.05,      0.1,     0.14,     0.06,     0.07),
    "broadleaf":     (    0.75,     0.25,     0.35,     0.18,      1.0,      0.7),
    "conifer":       (    0.25,     0.45,      0.0,     0.82,      0.0,      0.0),
    "shrub":         (     0.0,      0.3,     0.65,      0.0,      0.0,      0.3),
    "trees":         (    0.28,      0.3,     0.03,     0.74,     0.16,     0.22),
    "crops":         (     0.5,     0.32,      0.2,     0.05,     0.62,     0.18),
    "bare":          (    0.01,     0.07,     0.62,     0.01,     0.01,      0.1),
    "wetland":       (    0.01,      0.0,      0.0,     0.12,     0.07,     0.03),
    "lakes":         (    0.01,     0.01,      0.0,     0.09,     0.03,    0.005),
    "closure":       (    0.93,     0.72,     0.55,     0.85,     0.88,     0.55),
    "dryness":       (    0.15,     0.55,      0.8,      0.1,      0.1,     0.72),
    "season":        (    0.62,      0.4,      0.7,     0.55,     0.58,     0.36),
    "relief":        (      60,      180,      110,       70,        6,       40),
    "rivers":        (       1,        1,        1,        1,        3,        1),
    "river_narrow":  (     0.8,      0.7,      0.6,      0.5,      1.0,      0.6),
    "river_wide":    (     6.0,      4.0,      3.5,      2.5,     11.0,      5.0),
    "turbidity":     (    0.35,     0.25,      0.7,     0.05,      0.9,      0.8),
    "parcel":        (      17,       12,       30,       24,      8.5,      7.5),
    "hedges":        (    0.45,      0.2,      0.0,     0.15,     0.35,     0.15),
    "pivots":        (     0.0,      0.0,     0.75,      0.0,      0.0,      0.0),
    "towns":         (     1.6,      1.2,      0.7,      0.4,      2.4,      1.0),
    "roofs_bright":  (    0.25,      0.3,     0.75,      0.3,     0.45,     0.55),
    "roofs_tile":    (    0.55,     0.65,      0.1,     0.25,      0.3,     0.15),
    "roofs_dark":    (     0.2,     0.05,     0.15,     0.45,     0.25,      0.3),
    "paved":         (     0.8,      0.6,      0.5,      0.3,      0.4,     0.15),
    "haze":          (    0.25,      0.2,      0.3,     0.15,      0.7,     0.45),
    "cloud":         (    0.05,     0.03,     0.01,     0.06,      0.1,     0.04),
    "sun_elevation": (      48,       58,       60,       33,       55,       56),
}
# fmt: on

# Attributes that hold several rows of the table.
_SOILS = ("soil_dark", "soil_bright", "soil_red", "sand")
_GROUPS = {
    "dark_soil": ("dark_material", "dark_share"),
    "canopy": ("broadleaf", "conifer", "shrub"),
    "river_width": ("river_narrow", "river_wide"),
    "roofs": ("roofs_bright", "roofs_tile", "roofs_dark"),
}


def _region(number: int) -> Region:
    """The region of one column of the table."""
    column = {row: values[number] for row, values in _TABLE.items()}
    soils = MappingProxyType({name: column.pop(name) for name in _SOILS})
    groups: dict[str, Any] = {
        name: tuple(column.pop(row) for row in rows) for name, rows in _GROUPS.items()
    }
    return Region(name=_NAMES[number], soils=soils, **groups, **column)


REGIONS: Mapping[str, Region] = MappingProxyType(
    {name: _region(number) for number, name in enumerate(_NAMES)}
)
"""All regions of the simulated world by name."""
