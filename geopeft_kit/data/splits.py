"""Which chips train, which choose, which judge: splits that do not leak.

Neighbouring chips look alike, so a random split scores memory as much as skill. Here
whole groups of chips (see `groups`) are held out, training chips that touch them or
are within a buffer are set aside, and validation chips are drawn scene by scene from
what is left. Sources: Ploton et al. 2020 (doi 10.1038/s41467-020-18321-y) on spatial
blocks, Roberts et al. 2017 (doi 10.1111/ecog.02881). Taught in
`notebooks/09_unseen_regions.ipynb`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from geopeft_kit.data.groups import GROUPS, group_chips
from geopeft_kit.data.leakage import check_leakage, touching_chips
from geopeft_kit.data.subsets import is_scalar, nested_order

if TYPE_CHECKING:
    import geopandas as gpd

SPLITS = (*GROUPS, "index", "random")


def sorted_splits(names: Iterable[str]) -> list[str]:
    """Each name once: train, val, test, then others."""
    first, found = ("train", "val", "test"), set(names)
    return [s for s in first if s in found] + sorted(found - set(first))


def resolve_split(
    index: gpd.GeoDataFrame,
    split: str = "region",
    test_regions: Sequence[str] | None = None,
    val_fraction: float = 0.2,
    seed: int = 0,
    buffer_m: float = 0.0,
    blocks: int = 5,
) -> pd.Series:
    """The split of every row: "train", "val", "test", "unused", or a name of the lists.

    "region", "longitude", "country" or "cluster" hold out the groups that
    `test_regions` names, see `group_chips`. Where it names none, "region" takes the
    folder's own lists and the others draw whole groups. "index" takes the folder's own
    lists as they are. "random" takes chips at random, neighbours and all; optimistic,
    so it has to be asked for.

    `val_fraction` is the share of the training chips that validates, drawn scene by
    scene; where test chips are drawn, about the same share of all chips tests. Chips
    nearer than `buffer_m` metres to a test chip are set aside ("unused"); where groups
    are held out, touching ones always are. `blocks` counts longitude blocks or
    clusters.

    Raises:
        ValueError: An unknown split or group, nothing left to train on, no split
            lists, or regions that show the same ground.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; allowed are {', '.join(SPLITS)}.")
    if not 0 <= val_fraction < 1 or not 0 <= buffer_m < float("inf"):
        raise ValueError(
            f"val_fraction is {val_fraction} and buffer_m is {buffer_m}; the first "
            "must be at least 0 and below 1, the second metres, 0 or more."
        )
    if split not in GROUPS and test_regions is not None:
        raise ValueError(
            f"test_regions go with split={' or '.join(map(repr, GROUPS))}, not with "
            f"split={split!r}. Leave one of the two out."
        )
    if split == "random":
        result = random_split(index, val_fraction, seed)
        return set_aside(index, result, buffer_m) if buffer_m else result
    own = split == "index" or (split == "region" and test_regions is None)
    if own:
        result = own_split(index)
        if split == "region" and not buffer_m:  # published lists stay as they are
            check_leakage(index, result, strict=False)
    else:
        groups = group_chips(index, split, blocks, seed)
        if test_regions is None:
            test_regions = draw_groups(groups, val_fraction, seed)
        result = hold_out(groups, test_regions)
        if split == "region":
            check_leakage(index, result, strict=True, warn=False)
    if buffer_m or not own:
        result = set_aside(index, result, buffer_m)
    if split != "index" and not (result == "val").any() and val_fraction:
        result = draw_validation(index, result, val_fraction, seed, buffer_m)
    return result


def own_split(index: gpd.GeoDataFrame) -> pd.Series:
    """The folder's own lists; rows that they leave open are "unused"."""
    if index["split"].isna().all():
        names = ", ".join(sorted(index["region"].unique()))
        raise ValueError(
            "the chip folder has no split lists of its own. Name the regions to hold "
            f"out, test_regions=[...], from {names}; or ask for split='random'."
        )
    return index["split"].fillna("unused").astype(object)


def draw_groups(groups: pd.Series, fraction: float, seed: int) -> list[str]:
    """Names, sorted, of whole groups with about a share of the chips; at least one."""
    names = groups.to_numpy(dtype=str)
    rng = np.random.default_rng([seed, 3])
    chosen = _choose_blocks(names, np.arange(len(names)), fraction, rng)
    if not len(chosen):
        raise ValueError(
            f"all chips are of one group, {names[0]!r}, so none can be held out. Use "
            "another split."
        )
    return sorted(np.unique(names[chosen]).tolist())


def hold_out(groups: pd.Series, test_regions: Sequence[str]) -> pd.Series:
    """Split of every row: "test" in the groups of `test_regions`, "train" elsewhere."""
    known = sorted(groups.unique())
    if isinstance(test_regions, str):
        test_regions = [test_regions]
    unknown = [name for name in test_regions if name not in known]
    if unknown or not list(test_regions):
        what = f"unknown test region {unknown[0]!r}" if unknown else "no test region"
        raise ValueError(f"{what}; the data has the regions {', '.join(known)}.")
    if set(test_regions) == set(known):
        raise ValueError(
            f"test_regions holds every region of the data ({', '.join(known)}), so "
            "nothing is left to train on. Hold fewer out."
        )
    inside = groups.isin(list(test_regions))
    return pd.Series(np.where(inside, "test", "train"), groups.index, dtype=object)


def set_aside(
    index: gpd.GeoDataFrame, split: pd.Series, buffer_m: float = 0.0
) -> pd.Series:
    """Mark training chips that touch a test chip or are within the buffer as "unused".

    A warning counts them. Rows without a place stay as they are.
    """
    near = set(touching_chips(index, split, buffer_m)["train"])
    if not near or split.eq("test").sum() == 0:
        return split
    result = split.mask(index["chip"].isin(near) & split.isin(["train", "val"]))
    result = result.fillna("unused").astype(object)
    reason = f"touch or are within {buffer_m:g} m of" if buffer_m else "touch"
    if not (result == "train").any():
        raise ValueError(
            f"all {len(near)} training chips {reason} test chips, so nothing is left "
            "to train on. Hold other regions out, or take a smaller buffer_m."
        )
    warnings.warn(
        f"{len(near)} training or validation chips {reason} test chips and are set "
        f"aside; {int((result == 'train').sum())} are left.",
        stacklevel=2,
    )
    return result


def random_split(index: gpd.GeoDataFrame, fraction: float, seed: int) -> pd.Series:
    """Chips at random, by class where they have one.

    A share tests, an equal one validates.
    """
    order = nested_order(index, seed)
    count = round(fraction * len(index))
    result = pd.Series("train", index.index, dtype=object)
    result.iloc[order[:count]] = "test"
    result.iloc[order[count : 2 * count]] = "val"
    return result


def draw_validation(
    index: gpd.GeoDataFrame,
    split: pd.Series,
    fraction: float,
    seed: int,
    buffer_m: float = 0.0,
) -> pd.Series:
    """Turn a share of the "train" rows into "val", scene by scene.

    Chips with the same `scene`, or whose footprints touch, stay together. The share is
    taken from each region, so that validation sees all of them. If all training chips
    are one scene, an area of it validates, see `validation_area`.
    """
    rows = np.flatnonzero((split == "train").to_numpy())
    train = index.iloc[rows]
    blocks = spatial_blocks(train)
    strata = train["region"].astype(str).to_numpy()
    single = len(np.unique(blocks)) == len(blocks)
    if single and "label" in train and is_scalar(train["label"]):
        strata = np.char.add(strata.astype(str), "/" + train["label"].astype(str))
    rng = np.random.default_rng([seed, 1])
    chosen = [
        _choose_blocks(blocks, np.flatnonzero(strata == s), fraction, rng)
        for s in np.unique(strata)
    ]
    val = np.concatenate(chosen) if chosen else np.empty(0, int)
    if not len(val):  # every region is one block: take whole blocks of all of them
        val = _choose_blocks(blocks, np.arange(len(blocks)), fraction, rng)
    if not len(val):
        return validation_area(index, split, fraction, seed, buffer_m)
    result = split.copy()
    result.iloc[rows[val]] = "val"
    return result


def validation_area(
    index: gpd.GeoDataFrame,
    split: pd.Series,
    fraction: float,
    seed: int,
    buffer_m: float = 0.0,
) -> pd.Series:
    """Turn one compact area of a single scene into "val".

    The area is one of 1 / `fraction` clusters of near chips. Training chips that touch
    it, or are within the buffer, are "unused"; a warning counts them.

    Raises:
        ValueError: Chips have no place, or no training chip would be left.
    """
    train = index[split == "train"]
    problem = ValueError(
        f"no validation chips can be drawn: the {len(train)} training chips touch each "
        "other or are one scene. Give the folder its own split lists and use "
        "split='index', pass val_fraction=0, or ask for split='random'."
    )
    areas = max(2, round(1 / fraction))
    if train.geometry.isna().any() or len(train) < 2 * areas:
        raise problem
    inside = group_chips(train, "cluster", areas, seed)
    inside = inside == draw_groups(inside, 1 / areas, seed)[0]
    held_out = pd.Series(np.where(inside, "test", "train"), train.index)
    near = train["chip"].isin(touching_chips(train, held_out, buffer_m)["train"])
    if (inside | near).all():
        raise problem
    warnings.warn(
        f"the training chips are one scene, so an area of it validates: {inside.sum()} "
        f"chips; {near.sum()} training chips that touch it or are within "
        f"{buffer_m:g} m are set aside, {(~(inside | near)).sum()} are left.",
        stacklevel=2,
    )
    result = split.copy()
    result[train.index[near]] = "unused"
    result[train.index[inside]] = "val"
    return result


def _choose_blocks(
    blocks: np.ndarray, members: np.ndarray, fraction: float, rng: np.random.Generator
) -> np.ndarray:
    """Members of whole blocks that make up about `fraction`; never all of them."""
    names, sizes = np.unique(blocks[members], return_counts=True)
    if len(names) < 2:
        return np.empty(0, int)
    order = rng.permutation(len(names))
    wanted, taken, chosen = fraction * len(members), 0, []
    for block in order[:-1]:
        if taken + sizes[block] <= wanted + sizes[block] / 2:
            chosen.append(names[block])
            taken += sizes[block]
    if not chosen:
        chosen = [names[np.argmin(sizes)]]
    return members[np.isin(blocks[members], chosen)]


def spatial_blocks(index: gpd.GeoDataFrame) -> np.ndarray:
    """Number (N,) of the block that each chip belongs to.

    Chips of one `scene` share theirs, else chips that touch do, else each chip is a
    block.
    """
    if "scene" in index and index["scene"].notna().all():
        return pd.factorize(index["scene"])[0]
    placed = np.flatnonzero(index.geometry.notna().to_numpy())
    blocks = np.arange(len(index))
    if len(placed) > 1:
        from scipy.sparse import coo_matrix
        from scipy.sparse.csgraph import connected_components

        shapes = index.geometry.iloc[placed]
        a, b = shapes.sindex.query(shapes.to_numpy(), predicate="intersects")
        graph = coo_matrix((np.ones(len(a)), (a, b)), (len(placed),) * 2)
        blocks[placed] = placed[connected_components(graph)[1]]
    return blocks
