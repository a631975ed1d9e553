"""Date and place of an image in `meta`, checked in one place for every backbone.

A batch has ``date`` (B, T, 2): the year, and the day of the year counted from 0; and
``lonlat`` (B, 2): longitude and latitude of the chip's centre in degrees. Latitude
first is the usual mistake, so values out of range are refused.

Taught in notebook 07 (decoders and metadata).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

_YEARS, _DAYS = (1900, 2100), (0, 365)
_LONGITUDES, _LATITUDES = (-180, 180), (-90, 90)


def dates_of(
    meta: Mapping[str, Tensor] | None, image: Tensor, dates: int = 1
) -> Tensor | None:
    """Year and day of the year (B, T, 2) float32; None where `meta` has no date.

    The image is (B * T, ...). Raises ValueError for another shape or a value out of
    range.
    """
    if meta is None or meta.get("date") is None:
        return None
    wanted = (image.shape[0] // dates, dates, 2)
    words = f"(B, T, 2) with T={dates}: year, and day of the year counted from 0"
    _check("date", meta["date"], wanted, words, (_YEARS, _DAYS))
    return meta["date"].to(image.device, torch.float32)


def lonlat_of(
    meta: Mapping[str, Tensor] | None, image: Tensor, dates: int = 1
) -> Tensor | None:
    """Longitude and latitude (B, 2) float32 in degrees, likewise."""
    if meta is None or meta.get("lonlat") is None:
        return None
    wanted = (image.shape[0] // dates, 2)
    words = "(B, 2): longitude, then latitude, in degrees"
    _check("lonlat", meta["lonlat"], wanted, words, (_LONGITUDES, _LATITUDES))
    return meta["lonlat"].to(image.device, torch.float32)


def ground_size(resolution: float) -> float:
    """The ground size of a pixel in metres; ValueError if it is not above 0."""
    if type(resolution) not in (int, float) or not 0 < resolution < math.inf:
        raise ValueError(f"resolution={resolution!r}: metres per pixel, above 0")
    return float(resolution)


def _check(
    key: str,
    values: Tensor,
    shape: tuple[int, ...],
    words: str,
    ranges: Sequence[tuple[int, int]],
) -> None:
    if tuple(values.shape) != shape:
        raise ValueError(
            f"meta[{key!r}] has shape {tuple(values.shape)}, and these images need "
            f"{shape}, {words}"
        )
    if values.is_meta:  # shapes only, no numbers to look at
        return
    low, high = torch.tensor(ranges, device=values.device).unbind(1)  # (2,) each
    inside = (values >= low) & (values <= high)  # False for NaN too
    if not bool(inside.all()):
        wrong = values[~inside].flatten()[0].item()
        limits = ", ".join(f"{low} to {high}" for low, high in ranges)
        raise ValueError(
            f"meta[{key!r}] holds {wrong:g}; it is {words}, within {limits}. Leave it "
            "out where it is unknown"
        )
