"""Reflectance of the simulated world's materials.

The six columns are typical magnitudes of the kind found in textbooks, chosen by hand;
they come from no named spectral library and must not be cited as measurements. The
other Sentinel-2 bands are interpolated: vegetation along a red-edge curve, water
along the fall of its spectrum behind red, everything else straight.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

WORLD_BANDS = (
    "COASTAL_AEROSOL", "BLUE", "GREEN", "RED", "RED_EDGE_1", "RED_EDGE_2",
    "RED_EDGE_3", "NIR_BROAD", "NIR_NARROW", "WATER_VAPOUR", "SWIR_1", "SWIR_2",
)  # fmt: skip
"""The bands that the simulated world can be seen in: Sentinel-2's twelve."""

WAVELENGTHS = np.array(
    [0.443, 0.49, 0.56, 0.665, 0.705, 0.74, 0.783, 0.842, 0.865, 0.945, 1.61, 2.19],
    np.float32,
)
"""Centre wavelengths of `WORLD_BANDS` in micrometres."""

PIXEL_SIZES = np.array([60, 10, 10, 10, 20, 20, 20, 10, 20, 60, 20, 20], np.float32)
"""Native pixel sizes of `WORLD_BANDS` in metres; they set the blur of each band."""

_RED_EDGE = {  # share of the way from RED to NIR_NARROW at the four bands between
    "vegetation": (0.17, 0.68, 0.90, 0.97),
    "mineral": (0.20, 0.38, 0.59, 0.88),
    "water": (0.10, 0.80, 0.85, 0.97),
}

#              kind         BLUE   GREEN  RED    NIR    SWIR_1 SWIR_2
_TABLE = {
    "water_clear": ("water", 0.034, 0.030, 0.017, 0.010, 0.006, 0.004),
    "water_turbid": ("water", 0.078, 0.105, 0.110, 0.065, 0.022, 0.013),
    "crop": ("vegetation", 0.034, 0.078, 0.040, 0.44, 0.21, 0.10),
    "grass": ("vegetation", 0.045, 0.082, 0.060, 0.33, 0.24, 0.13),
    "dry_grass": ("mineral", 0.085, 0.125, 0.165, 0.27, 0.35, 0.26),
    "broadleaf": ("vegetation", 0.022, 0.048, 0.026, 0.35, 0.16, 0.07),
    "conifer": ("vegetation", 0.018, 0.033, 0.021, 0.22, 0.10, 0.045),
    "shrub": ("vegetation", 0.045, 0.070, 0.070, 0.24, 0.22, 0.14),
    "wetland": ("vegetation", 0.038, 0.062, 0.062, 0.21, 0.13, 0.07),
    "scorched": ("mineral", 0.040, 0.055, 0.075, 0.14, 0.20, 0.155),
    "soil_dark": ("mineral", 0.058, 0.078, 0.098, 0.15, 0.20, 0.17),
    "soil_bright": ("mineral", 0.14, 0.195, 0.265, 0.34, 0.42, 0.37),
    "soil_red": ("mineral", 0.055, 0.095, 0.195, 0.28, 0.36, 0.30),
    "sand": ("mineral", 0.22, 0.30, 0.38, 0.45, 0.54, 0.50),
    "peat": ("mineral", 0.032, 0.040, 0.050, 0.085, 0.105, 0.085),
    "basalt": ("mineral", 0.050, 0.058, 0.064, 0.080, 0.105, 0.105),
    "asphalt": ("mineral", 0.095, 0.105, 0.115, 0.14, 0.165, 0.155),
    "roof_bright": ("mineral", 0.23, 0.25, 0.27, 0.30, 0.32, 0.30),
    "roof_tile": ("mineral", 0.10, 0.13, 0.21, 0.27, 0.33, 0.29),
    "roof_dark": ("mineral", 0.070, 0.075, 0.080, 0.10, 0.115, 0.115),
    "char": ("mineral", 0.040, 0.045, 0.053, 0.080, 0.165, 0.185),
    "ash": ("mineral", 0.14, 0.15, 0.16, 0.19, 0.24, 0.25),
    "snow": ("mineral", 0.86, 0.86, 0.83, 0.74, 0.12, 0.08),
    "cloud": ("mineral", 0.62, 0.62, 0.63, 0.66, 0.46, 0.36),
    "haze": ("mineral", 0.085, 0.052, 0.030, 0.014, 0.004, 0.002),
}


def _twelve(kind: str, six: tuple[float, ...]) -> np.ndarray:
    """Fill in the six Sentinel-2 bands that the table does not list."""
    blue, green, red, nir, swir_1, swir_2 = six
    coastal = max(blue + 0.5 * (blue - green), 0.6 * blue)
    between = [red + share * (nir - red) for share in _RED_EDGE[kind]]
    vapour = nir + 0.1 * (swir_1 - nir)
    row = [coastal, blue, green, red, *between, nir, vapour, swir_1, swir_2]
    values = np.array(row, np.float32)
    values.setflags(write=False)
    return values


SPECTRA: Mapping[str, np.ndarray] = MappingProxyType(
    {name: _twelve(kind, tuple(six)) for name, (kind, *six) in _TABLE.items()}
)
"""Reflectance (12,) of each material in the order of `WORLD_BANDS`; read-only."""
