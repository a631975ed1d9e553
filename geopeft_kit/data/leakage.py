"""Chips of different splits that touch, overlap or are too near, counted in metres."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    import geopandas as gpd

# Of latitude at the equator (WGS84), where it is shortest: a buffer in degrees comes
# out a little wide, never narrow.
METRES_PER_DEGREE = 110_574.0


def touching_chips(
    index: gpd.GeoDataFrame, split: pd.Series, buffer_m: float = 0.0
) -> pd.DataFrame:
    """Pairs of a test chip and a training or validation chip that touch.

    Args:
        index: Rows of a chip folder; rows without a place are passed over.
        split: Split of every row.
        buffer_m: Distance in metres that counts as touching, measured between
            bounding boxes, a little on the safe side.

    Returns:
        Columns `test`, `train` (chip names) and `overlap`, the shared part of the
        smaller footprint, 0-1.
    """
    import shapely

    placed = index.geometry.notna()
    test = index[placed & (split == "test")]
    rest = index[placed & split.isin(["train", "val"])]
    if test.empty or rest.empty:
        return pd.DataFrame({"test": [], "train": [], "overlap": []})
    a, b = _near_pairs(test, rest, buffer_m)
    first, second = test.geometry.to_numpy()[a], rest.geometry.to_numpy()[b]
    smaller = np.minimum(shapely.area(first), shapely.area(second))
    shared = shapely.area(shapely.intersection(first, second))
    return pd.DataFrame(
        {
            "test": test["chip"].to_numpy()[a],
            "train": rest["chip"].to_numpy()[b],
            "overlap": shared / np.where(smaller > 0, smaller, 1),
        }
    )


def _near_pairs(
    test: gpd.GeoDataFrame, rest: gpd.GeoDataFrame, buffer_m: float
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of pairs that touch or are within the buffer, also across 180°."""
    import shapely

    # A footprint across 180 degrees has two parts.
    shapes, owners = shapely.get_parts(test.geometry.to_numpy(), return_index=True)
    left, low, right, high = shapely.bounds(shapes).T
    if buffer_m:
        dy = buffer_m / METRES_PER_DEGREE
        polewards = np.minimum(np.maximum(np.abs(low), np.abs(high)) + dy, 89.9)
        dx = dy / np.cos(np.radians(polewards))
        left, low, right, high = left - dx, low - dy, right + dx, high + dy
        shapes = shapely.box(left, low, right, high)
    pairs = [rest.sindex.query(shapes, predicate="intersects")]
    for turn, beyond in ((-360, right >= 180), (360, left <= -180)):
        rows = np.flatnonzero(beyond)
        if len(rows):
            turned = shapely.box(left + turn, low, right + turn, high)[rows]
            a, b = rest.sindex.query(turned, predicate="intersects")
            pairs.append(np.stack([rows[a], b]))
    part, other = np.concatenate(pairs, axis=1)
    found = np.unique([owners[part], other], axis=1)
    return found[0], found[1]


def check_leakage(
    index: gpd.GeoDataFrame,
    split: pd.Series,
    buffer_m: float = 0.0,
    strict: bool = True,
    warn: bool = True,
) -> int:
    """Number of test chips that touch, or show the same ground as, training chips.

    A warning says so (with `warn`); more than 1 % of a shared footprint is an error
    where `strict`.
    """
    pairs = touching_chips(index, split, buffer_m)
    if pairs.empty:
        return 0
    same = pairs[pairs["overlap"] > 0.01]
    example = (same if len(same) else pairs).iloc[0]
    where = f"the first pair is {example['test']!r} and {example['train']!r}"
    if len(same) and strict:
        raise ValueError(
            f"{same['test'].nunique()} test chips show the same ground as training or "
            f"validation chips ({len(same)} pairs; {where}). Hold other regions out, "
            "or drop the chips that overlap."
        )
    if not warn:
        return len(pairs)
    what = "overlap" if len(same) else "touch"
    warnings.warn(
        f"{pairs['test'].nunique()} test chips {what} training or validation chips, "
        f"or are within {buffer_m:g} m of them ({len(pairs)} pairs; {where}). Scores "
        "there may be a little too good.",
        stacklevel=2,
    )
    return len(pairs)
