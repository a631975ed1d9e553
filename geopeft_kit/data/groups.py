"""Which chips belong together on Earth: regions, longitude blocks, countries, clusters.

A split holds whole groups out (see `splits`). What a group is decides what a score
says: a model that is tested on another country has to travel less far than one that
is tested on another longitude. Taught in `notebooks/09_unseen_regions.ipynb`.

Source:
    Groups by place instead of random folds: Roberts et al. 2017, "Cross-validation
    strategies for data with temporal, spatial, hierarchical, or phylogenetic
    structure", doi:10.1111/ecog.02881. Equal-count longitude blocks and k-means on
    the sphere are ours.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from geopeft_kit.geodesy import centres

if TYPE_CHECKING:
    import geopandas as gpd

GROUPS = ("longitude", "country", "cluster", "region")


def group_chips(
    index: gpd.GeoDataFrame, by: str, blocks: int = 5, seed: int = 0
) -> pd.Series:
    """Name the group of every chip.

    "region" is the column of that name. "longitude" makes `blocks` strips of equally
    many chips, "longitude_1" in the west. "country" is the column `country` where the
    index has one, else the region names up to the first comma or slash ("Bolivia/Beni"
    is Bolivia), and one line says so; the kit carries no map of countries. "cluster"
    makes `blocks` clusters of near chips, "cluster_1" in the west.

    Raises:
        ValueError: An unknown kind of group, chips without a place, or places that are
            too few for `blocks`.
    """
    if by not in GROUPS:
        raise ValueError(f"by is {by!r}; allowed are {', '.join(GROUPS)}.")
    if by == "region":
        return index["region"].astype(str)
    if by == "country":
        return _countries(index)
    lon, lat = _centres(index, by)
    if blocks < 2:
        raise ValueError(f"blocks is {blocks}; a split needs 2 groups or more.")
    east = _east_of_the_widest_gap(lon)
    if by == "longitude":
        edges = np.quantile(east, np.arange(1, blocks) / blocks)
        codes = np.searchsorted(edges, east, side="right")
    else:
        codes = _clusters(lon, lat, blocks, seed)
    found = np.unique(codes)
    if len(found) < 2:
        raise ValueError(
            f"split={by!r} found one group only: the {len(index)} chips are at too few "
            "places. Use split='region', or split='index'."
        )
    found = found[np.argsort([east[codes == code].mean() for code in found])]
    names = {code: f"{by}_{number}" for number, code in enumerate(found, start=1)}
    return pd.Series([names[code] for code in codes], index.index, dtype=object)


def _countries(index: gpd.GeoDataFrame) -> pd.Series:
    if "country" in index:
        unnamed = index[index["country"].isna()]
        if len(unnamed):
            raise ValueError(
                f"{len(unnamed)} chips have no country, the first is "
                f"{unnamed['chip'].iloc[0]!r}. Fill the column, or use split='region'."
            )
        return index["country"].astype(str)
    names = index["region"].astype(str).map(lambda n: re.split("[,/]", n)[0].strip())
    some = ", ".join(sorted(names.unique())[:6])
    print(
        f"split: the index has no column 'country'; the region names are used "
        f"({some}). Chips take a country from Chip(..., extra={{'country': ...}})."
    )
    return names


def _centres(index: gpd.GeoDataFrame, by: str) -> tuple[np.ndarray, np.ndarray]:
    """Longitude and latitude of the middle of each chip, degrees."""
    lost = index[index.geometry.isna()]
    if len(lost):
        raise ValueError(
            f"split={by!r} needs places, and {len(lost)} chips have none; the first "
            f"is {lost['chip'].iloc[0]!r}. Use split='region', or drop these chips."
        )
    lon, lat = centres(index.geometry.to_numpy()).T
    return lon, lat


def _east_of_the_widest_gap(lon: np.ndarray) -> np.ndarray:
    """Degrees east of the widest empty stretch, so that no group is cut at 180."""
    ring = np.sort(lon % 360)
    gaps = np.diff(ring, append=ring[0] + 360)
    start = ring[(int(np.argmax(gaps)) + 1) % len(ring)]
    return (lon - start) % 360


def _clusters(lon: np.ndarray, lat: np.ndarray, count: int, seed: int) -> np.ndarray:
    """k-means on the sphere's x, y, z, where no seam cuts a cluster."""
    from scipy.cluster.vq import kmeans2

    phi, lam = np.radians(lat), np.radians(lon)
    points = np.stack(
        [np.cos(phi) * np.cos(lam), np.cos(phi) * np.sin(lam), np.sin(phi)], axis=1
    )
    places = len(np.unique(points.round(9), axis=0))
    if places < count:
        raise ValueError(
            f"blocks is {count}, but the chips are at {places} places only. Take "
            f"blocks={max(2, places)} or fewer."
        )
    # Nearby chips differ in the fifth digit: centre and scale before squaring.
    points = points - points.mean(axis=0)
    points /= np.abs(points).max()
    return kmeans2(points, count, minit="++", seed=seed, iter=50)[1]
