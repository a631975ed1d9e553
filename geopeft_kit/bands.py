"""Band names, wavelengths and sensor aliases: one vocabulary for data and backbones.

Band 5 is the red edge on Sentinel-2 and the near infrared on Landsat 8, so the kit
names bands and accepts the usual numbers as aliases.
Sources: Sentinel-2 MSI spectral responses (S2A, ESA COPE-GSEG-EOPG-TN-15-0007),
Landsat 8 OLI/TIRS band designations (USGS), HLS v2 user guide, table 3.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Band:
    """One spectral band or map layer.

    Attributes:
        name: The name used everywhere in the kit, as "RED_EDGE_1".
        title: The name for figures, as "Red edge 1".
        wavelength_um: Centre wavelength in micrometres; None where there is none.
        bandwidth_um: Full width at half maximum in micrometres, or None.
        kind: "optical" (reflectance), "thermal", "radar", "terrain" or "index".
        aliases: Other spellings. A prefix ("L30:") names the sensor where the number
            alone means Sentinel-2.
    """

    name: str
    title: str
    wavelength_um: float | None = None
    bandwidth_um: float | None = None
    kind: str = "optical"
    aliases: tuple[str, ...] = ()


_TABLE = (
    Band("COASTAL_AEROSOL", "Coastal aerosol", 0.4427, 0.020,
         aliases=("B1", "L30:B1", "coastal", "aerosol")),
    Band("BLUE", "Blue", 0.4927, 0.065, aliases=("B2", "L30:B2")),
    Band("GREEN", "Green", 0.5598, 0.035, aliases=("B3", "L30:B3")),
    Band("YELLOW", "Yellow", 0.6100, 0.020),
    Band("RED", "Red", 0.6646, 0.030, aliases=("B4", "L30:B4")),
    Band("RED_EDGE_1", "Red edge 1", 0.7041, 0.014, aliases=("B5", "RE1")),
    Band("RED_EDGE_2", "Red edge 2", 0.7405, 0.014, aliases=("B6", "RE2")),
    Band("RED_EDGE_3", "Red edge 3", 0.7828, 0.019, aliases=("B7", "RE3")),
    Band("NIR_BROAD", "Near infrared, broad", 0.8328, 0.105, aliases=("B8",)),
    Band("NIR_NARROW", "Near infrared, narrow", 0.8647, 0.021,
         aliases=("B8A", "L30:B5", "NIRn")),
    Band("WATER_VAPOUR", "Water vapour", 0.9451, 0.019,
         aliases=("B9", "water vapor")),
    Band("CIRRUS", "Cirrus", 1.3735, 0.029, aliases=("B10", "L30:B9")),
    Band("SWIR_1", "Short-wave infrared 1", 1.6137, 0.090,
         aliases=("B11", "L30:B6")),
    Band("SWIR_2", "Short-wave infrared 2", 2.2024, 0.174,
         aliases=("B12", "L30:B7")),
    Band("PAN", "Panchromatic", 0.5895, 0.173, aliases=("L30:B8",)),
    Band("TIR_1", "Thermal infrared 1", 10.895, 0.59, "thermal", ("L30:B10",)),
    Band("TIR_2", "Thermal infrared 2", 12.005, 1.01, "thermal", ("L30:B11",)),
    Band("VV", "Radar VV", kind="radar"),
    Band("VH", "Radar VH", kind="radar"),
    Band("HH", "Radar HH", kind="radar"),
    Band("HV", "Radar HV", kind="radar"),
    Band("ELEVATION", "Elevation", kind="terrain", aliases=("DEM",)),
    Band("SLOPE", "Slope", kind="terrain"),
    Band("HAND", "Height above nearest drainage", kind="terrain"),
    Band("NDVI", "NDVI", kind="index"),
)  # fmt: skip

BANDS: Mapping[str, Band] = MappingProxyType({band.name: band for band in _TABLE})

_L2A = (
    "COASTAL_AEROSOL", "BLUE", "GREEN", "RED", "RED_EDGE_1", "RED_EDGE_2",
    "RED_EDGE_3", "NIR_BROAD", "NIR_NARROW", "WATER_VAPOUR", "SWIR_1", "SWIR_2",
)  # fmt: skip

SENSORS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "rgb": ("RED", "GREEN", "BLUE"),
        "rgbn": ("RED", "GREEN", "BLUE", "NIR_BROAD"),
        "hls": ("BLUE", "GREEN", "RED", "NIR_NARROW", "SWIR_1", "SWIR_2"),
        "sentinel2_l2a": _L2A,
        "sentinel2_l1c": (*_L2A[:10], "CIRRUS", *_L2A[10:]),
        "sentinel2_10": (*_L2A[1:9], *_L2A[10:]),
        "sentinel1": ("VV", "VH"),
        "landsat8": ("COASTAL_AEROSOL", "BLUE", "GREEN", "RED", "NIR_NARROW",
                     "SWIR_1", "SWIR_2"),
        "naip": ("RED", "GREEN", "BLUE", "NIR_BROAD"),
    }
)  # fmt: skip

# Names that could mean two bands: refused with the choice, never guessed.
_AMBIGUOUS = {
    "NIR": ("NIR_BROAD", "NIR_NARROW"),
    "SWIR": ("SWIR_1", "SWIR_2"),
    "REDEDGE": ("RED_EDGE_1", "RED_EDGE_2", "RED_EDGE_3"),
}


def _key(name: str) -> str:
    """Spelling without case, blanks, underscores and leading zeros: b02 -> B2."""
    prefix, _, rest = name.upper().rpartition(":")
    rest = re.sub(r"[\s_-]", "", rest)
    rest = re.sub(r"^B0+(?=\d)", "B", rest)
    # Sentinel-2 numbers are what a bare number means; HLS S30 keeps them.
    prefix = "" if prefix.strip() in ("S2", "S30") else prefix.strip()
    return f"{prefix}:{rest}" if prefix else rest


_LOOKUP = {
    _key(spelling): band.name
    for band in _TABLE
    for spelling in (band.name, *band.aliases)
}
_SENSOR_LOOKUP = {name.upper(): bands for name, bands in SENSORS.items()}


def _resolve_one(name: str) -> str:
    if not isinstance(name, str):
        raise TypeError(
            f"a band is named by text, not {type(name).__name__} ({name!r}). Use names "
            "such as 'RED' or 'B04'."
        )
    key = _key(name)
    if key in _LOOKUP:
        return _LOOKUP[key]
    if key in _AMBIGUOUS:
        choice = " or ".join(_AMBIGUOUS[key])
        raise ValueError(f"band {name!r} could be {choice}; write the one you mean.")
    near = difflib.get_close_matches(key, _LOOKUP, n=1)
    hint = f" Did you mean {_LOOKUP[near[0]]!r}?" if near else ""
    raise ValueError(
        f"unknown band {name!r}.{hint} Allowed are {', '.join(BANDS)}, Sentinel-2 "
        f"numbers (B02, B8A), HLS Landsat numbers with their prefix (L30:B05), and as "
        f"a whole set {', '.join(SENSORS)}."
    )


def resolve_bands(bands: str | Sequence[str]) -> tuple[str, ...]:
    """Band names in the kit's own spelling.

    Args:
        bands: A sensor ("hls", "sentinel2_l2a"), one band, or several. Bands may be
            names in any case ("red"), Sentinel-2 numbers ("B2", "B02", "B8A") or HLS
            Landsat numbers with their prefix ("L30:B05").

    Returns:
        The names, in the order given.

    Raises:
        ValueError: A band is unknown, ambiguous ("NIR") or named twice, or there
            is none.
        TypeError: A band is not text.
    """
    if isinstance(bands, str):
        if bands.upper() in _SENSOR_LOOKUP:
            return _SENSOR_LOOKUP[bands.upper()]
        bands = (bands,)
    names = tuple(_resolve_one(name) for name in bands)
    if not names:
        raise ValueError("no bands given; name at least one, such as ('RED',).")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"bands named twice: {', '.join(twice)} (in {', '.join(map(str, bands))}). "
            "Name each band once."
        )
    return names


def band_indices(wanted: str | Sequence[str], available: Sequence[str]) -> list[int]:
    """Position of each wanted band among the available ones, from 0.

    Raises:
        ValueError: A band is unknown, or is not available.
    """
    names = resolve_bands(wanted)
    missing = [name for name in names if name not in available]
    if missing:
        raise ValueError(
            f"bands missing: {', '.join(missing)}. Available are "
            f"{', '.join(available)}; ask for a subset of these."
        )
    return [list(available).index(name) for name in names]


def wavelengths(bands: str | Sequence[str]) -> list[float]:
    """Centre wavelengths in micrometres, one per band, in the given order.

    Raises:
        ValueError: A band has no wavelength (radar, terrain, index) or is unknown.
    """
    values = []
    for name in resolve_bands(bands):
        value = BANDS[name].wavelength_um
        if value is None:
            raise ValueError(
                f"{name} has no wavelength: it is a {BANDS[name].kind} layer. Leave it "
                "out, or use a backbone that takes it by name."
            )
        values.append(value)
    return values
