"""Few of many chips: nested draws, so that the small set is part of the large one."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    import geopandas as gpd


def nested_order(index: gpd.GeoDataFrame, seed: int) -> np.ndarray:
    """Positions (N,) of chips; every beginning of the order is a stratified subset.

    Strata are the labels where each chip has one, else the regions; each takes part in
    proportion to its size.
    """
    labelled = "label" in index and is_scalar(index["label"])
    strata: Sequence[Hashable] = index["label" if labelled else "region"].astype(str)
    rng = np.random.default_rng([seed, 2])
    by_name = np.argsort(index["chip"].to_numpy(dtype=str), kind="stable")
    shuffled = rng.permutation(by_name)
    codes = pd.factorize(strata, sort=True)[0][shuffled]
    rank = np.empty(len(codes))
    for code in np.unique(codes):
        members = np.flatnonzero(codes == code)
        rank[members] = (np.arange(len(members)) + 0.5) / len(members)
    return shuffled[np.argsort(rank, kind="stable")]


def n_shot(
    index: gpd.GeoDataFrame, n: int, seed: int, by: str = "region"
) -> np.ndarray:
    """Positions, sorted, of the first `n` chips of each bucket, nested for one seed.

    `by` is the column whose values are the buckets; one with fewer chips gives all it
    has. Source: PhilEO Bench counts its shots per region (Fibaek et al. 2024, arXiv
    2401.04464); nesting is ours, the bench draws each size anew.
    """
    if by not in index or not is_scalar(index[by]):
        choices = [name for name in ("region", "label") if name in index]
        raise ValueError(
            f"by is {by!r}, which does not put every chip into one bucket. Use a "
            f"column that does; the data has {', '.join(choices)}."
        )
    buckets = index[by].astype(str).to_numpy()
    chosen: list[np.ndarray] = []
    for bucket in np.unique(buckets):
        rows = np.flatnonzero(buckets == bucket)
        chosen.append(rows[nested_order(index.iloc[rows], seed)[:n]])
    return np.sort(np.concatenate(chosen))


def is_scalar(labels: pd.Series) -> bool:
    """Whether every row has one label, and not several or none."""
    return bool(labels.notna().all()) and not any(
        isinstance(label, list | np.ndarray) for label in labels
    )
