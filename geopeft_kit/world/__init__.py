"""The simulated land: scenes of invented regions, with all their labels.

An asset of its own: in the package, only `data.simulated` imports it. Taught in
`notebooks/00_quickstart.ipynb`.
"""

from geopeft_kit.world.regions import REGIONS, Region
from geopeft_kit.world.scene import (
    EVENTS,
    GENERATOR_VERSION,
    LAND_COVER_CLASSES,
    SHIFTS,
    Scene,
    simulate_scene,
)
from geopeft_kit.world.spectra import WORLD_BANDS
from geopeft_kit.world.terrain import PIXEL

__all__ = [
    "EVENTS",
    "GENERATOR_VERSION",
    "LAND_COVER_CLASSES",
    "PIXEL",
    "REGIONS",
    "SHIFTS",
    "WORLD_BANDS",
    "Region",
    "Scene",
    "simulate_scene",
]
