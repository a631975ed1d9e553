"""What torchgeo says about its weights: statistics of pixels, and licences.

Cards must not import torchgeo, which takes seconds, so the numbers stand here; a test
holds them against torchgeo's own.

Source: torchgeo 0.8 (MIT), models/resnet.py: SSL4EO-S12's band statistics.
Taught in notebook 01 (load a geospatial foundation model).
"""

from __future__ import annotations

from geopeft_kit.backbones.card import Normalisation
from geopeft_kit.bands import BANDS, SENSORS

LICENCE = "not stated by torchgeo: see the source"
SENTINEL2 = SENSORS["sentinel2_l1c"]  # all 13, cirrus included
SENTINEL1 = SENSORS["sentinel1"]
DECIBEL = " Radar is read in decibel, not as reflectance."

# Reflectance x 10000, in the order of SENTINEL2.
S2_MEAN = (
    1612.9, 1397.6, 1322.3, 1373.1, 1561.0, 2108.4, 2390.7,
    2318.7, 2581.0, 837.7, 22.0, 2195.2, 1537.4,
)  # fmt: skip
S2_STD = (
    791.0, 854.3, 878.7, 1144.9, 1127.5, 1164.2, 1276.0,
    1249.5, 1345.9, 577.5, 47.5, 1340.0, 1142.9,
)  # fmt: skip
S2_STATISTICS = Normalisation(1e4, S2_MEAN, S2_STD)
S2_TEN_THOUSAND = Normalisation(1e4, (0.0,) * 13, (1e4,) * 13)
# Decibel: VV, VH.
S1_STATISTICS = Normalisation(1.0, (-12.59, -20.26), (5.26, 5.91))


def beyond_sentinel2(radar: tuple[str, ...]) -> dict[str, tuple[float, float]]:
    """Band -> (mean, standard deviation) of bands that are read by wavelength only.

    A reflectance takes the statistics of the Sentinel-2 band nearest in wavelength,
    radar those of Sentinel-1 (HH as VV, HV as VH); a temperature is passed on as it is.
    """
    scale = S2_STATISTICS.scale
    found = {}
    for band in BANDS.values():
        if band.name in SENTINEL2 or band.wavelength_um is None:
            continue
        if band.kind == "thermal":
            found[band.name] = (0.0, scale)
            continue
        gaps = [abs(_wavelength(b) - band.wavelength_um) for b in SENTINEL2]
        nearest = gaps.index(min(gaps))
        found[band.name] = (S2_MEAN[nearest], S2_STD[nearest])
    for name in radar:
        place = 0 if name in ("VV", "HH") else 1
        mean, std = S1_STATISTICS.mean[place], S1_STATISTICS.std[place]
        found[name] = (mean * scale, std * scale)
    return found


def _wavelength(name: str) -> float:
    value = BANDS[name].wavelength_um
    assert value is not None  # all of Sentinel-2's bands have one
    return value
