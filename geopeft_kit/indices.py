"""Spectral indices: normalised differences of two bands, by name.

Each is (a - b) / (a + b) of reflectance, between -1 and 1. Illumination, which
multiplies all bands alike, cancels out.

Sources: NDVI, Rouse et al. 1974; NDWI, McFeeters 1996, doi 10.1080/01431169608948714;
MNDWI, Xu 2006, doi 10.1080/01431160600589179; NDMI, Gao 1996 (there called NDWI),
doi 10.1016/S0034-4257(96)00067-3; NBR, Key & Benson 2006.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from geopeft_kit.bands import resolve_bands

_NIR = ("NIR_BROAD", "NIR_NARROW")

INDICES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = MappingProxyType(
    {
        "NDVI": (_NIR, ("RED",)),
        "NDWI": (("GREEN",), _NIR),
        "MNDWI": (("GREEN",), ("SWIR_1",)),
        "NDMI": (_NIR, ("SWIR_1",)),
        "NBR": (_NIR, ("SWIR_2",)),
    }
)
"""Index -> bands that can serve as a, and as b; the first available one is used."""

EPSILON = 1e-6


def index_bands(name: str, bands: str | Sequence[str]) -> tuple[str, str]:
    """Names of the bands a and b of an index, for an image with these bands.

    Raises ValueError where the index is unknown, or a band that it needs is missing.
    """
    if name not in INDICES:
        raise ValueError(f"no index {name!r}; there are {', '.join(INDICES)}.")
    there = resolve_bands(bands)
    found = []
    for wanted in INDICES[name]:
        match = [band for band in wanted if band in there]
        if not match:
            raise ValueError(
                f"{name} needs {' or '.join(wanted)}; the image has "
                f"{', '.join(there)}. Available are "
                f"{', '.join(available_indices(there)) or 'no indices'}."
            )
        found.append(match[0])
    return found[0], found[1]


def available_indices(bands: str | Sequence[str]) -> tuple[str, ...]:
    """Indices that can be computed from these bands, in table order."""
    there = set(resolve_bands(bands))
    return tuple(
        name
        for name, (first, second) in INDICES.items()
        if there & set(first) and there & set(second)
    )


def spectral_indices(
    image: Tensor, bands: str | Sequence[str], names: Sequence[str]
) -> Tensor:
    """Indices of every pixel.

    Args:
        image: (B, C, H, W) reflectance 0-1, not standardised.
        bands: Names of the C bands.
        names: K keys of `INDICES`.

    Returns:
        (B, K, H, W), (a - b) / (a + b + 1e-6) clipped to [-1, 1]. Where atmospheric
        correction left a negative sum, the sum counts as 0, so that no sign flips.

    Raises:
        ValueError: An unknown index, or a missing band.
    """
    there = list(resolve_bands(bands))
    pairs = [[there.index(b) for b in index_bands(name, there)] for name in names]
    first = image[:, [a for a, _ in pairs]]  # (B, K, H, W)
    second = image[:, [b for _, b in pairs]]
    ratio = (first - second) / ((first + second).clamp(min=0) + EPSILON)
    return torch.clamp(ratio, -1, 1)
