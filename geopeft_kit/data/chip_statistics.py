"""What the chips of a data set are like: a row a chip, statistics of bands and classes.

`check_data` judges by these numbers.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
from affine import Affine
from rasterio.crs import CRS
from tqdm.auto import tqdm

from geopeft_kit.data.info import CLASS_TASKS, DatasetInfo
from geopeft_kit.data.own.scale_check import contradictions
from geopeft_kit.data.reading import ChipReader, Grid, StoredChip
from geopeft_kit.data.splits import sorted_splits
from geopeft_kit.geodesy import metres_per_unit

PIXELS = 500  # of each chip that take part in the statistics of bands


def read_facts(
    folder: Path, info: DatasetInfo, index: gpd.GeoDataFrame
) -> tuple[pd.DataFrame, np.ndarray]:
    """Read every chip once: one row a chip, and (C, N) stored values of some pixels.

    Raises:
        ValueError: No chip can be read.
    """
    reader = ChipReader(folder, info, range(len(info.bands)))
    rng = np.random.default_rng(0)
    rows, samples = [], []
    for row in tqdm(index.to_dict("records"), "reading", leave=False, disable=None):
        name = str(row["chip"])
        known = {
            "chip": name,
            "split": row["split"] if isinstance(row["split"], str) else "(none)",
            "region": str(row["region"]),
            "size": f"{row['height']} x {row['width']}",
            "label": row.get("label") if info.target == "label" else None,
        }
        files = [row.get(name) for name in ("image", "image_after", "mask")]
        image, after, mask = (f if isinstance(f, str) else None for f in files)
        try:
            stored = reader.read(
                name,
                str(image),
                after if info.task == "change" else None,
                mask if info.target == "mask" else None,
                (row["height"], row["width"]),
            )
        except (ValueError, RuntimeError) as error:
            rows.append(known | {"error": str(error)})
            continue
        facts, sample = _facts_of(stored, info, rng)
        said = contradictions(reader.asked[str(image)].tags, info)
        rows.append(known | facts | {"tags": "; ".join(said), "error": None})
        samples.append(sample)
    if not samples:
        raise ValueError(f"no chip of {folder} can be read. {rows[0]['error']}")
    return pd.DataFrame(rows), np.concatenate(samples, axis=1)


def _facts_of(
    stored: StoredChip, info: DatasetInfo, rng: np.random.Generator
) -> tuple[dict[str, Any], np.ndarray]:
    """What one chip is like, and (C, n) of its valid pixels."""
    image = stored.image
    if image.ndim == 4:  # both dates of a change pair side by side
        image = np.concatenate([image[:, 0], image[:, 1]], axis=-1)  # (C, H, 2W)
    valid = np.ones(image.shape[-2:], bool)
    if stored.invalid is not None:
        width = stored.invalid.shape[1]
        valid[:] = np.tile(~stored.invalid, (1, image.shape[-1] // width))
    values = image[:, valid]  # (C, n)
    chosen = rng.permutation(values.shape[1])[:PIXELS]
    facts = {
        "crs": stored.grid.crs or "(none)",
        "pixel": _pixel_size(stored.grid),
        "nodata": 1 - valid.mean(),
        "zeros": float((values == 0).all(axis=0).mean()) if values.size else 0.0,
        "constant": not values.size or bool((values == values[:, :1]).all()),
        "middle": float(np.median(values)) if values.size else np.nan,
        "pixels": hashlib.sha256(
            f"{image.dtype}{image.shape}".encode() + image.tobytes()
        ).hexdigest(),
    }
    if stored.mask is not None:
        mask = stored.mask
        if info.task in CLASS_TASKS:
            known = mask[mask != info.ignore_index]
            facts["counts"] = np.bincount(known, minlength=len(info.classes))
        else:
            known = mask[np.isfinite(mask)]
            facts["sentinel"] = _sentinel(known)
        facts["labelled"] = known.size / mask.size
    return facts, values[:, chosen]


@lru_cache(maxsize=100_000)
def _pixel_size(grid: Grid) -> float:
    """Metres along a side of a pixel, to two digits; NaN without a place."""
    if not grid.crs:
        return np.nan
    crs, transform = CRS.from_string(grid.crs), Affine(*grid.transform)
    return float(f"{metres_per_unit(crs, transform, grid.height, grid.width):.2g}")


def _sentinel(values: np.ndarray) -> float:
    """A value that is repeated far beyond all others, as -9999 is; NaN for none."""
    for end in (values.min(initial=np.inf), values.max(initial=-np.inf)):
        rest = values[values != end]
        if values.size - rest.size > 1 and rest.size:
            gap = np.abs(rest - end).min()
            if gap > 10 * max(np.ptp(rest), np.abs(rest).max()):
                return float(end)
    return np.nan


def bands_table(pixels: np.ndarray, info: DatasetInfo) -> pd.DataFrame:
    """Percentiles of each band, in reflectance."""
    count = len(info.bands)
    gains = np.broadcast_to(np.asarray(info.scale, float), count)[:, None]
    shifts = np.broadcast_to(np.asarray(info.offset, float), count)[:, None]
    if not pixels.size:
        pixels = np.full((count, 1), np.nan)
    steps = {"lowest": 0, "1 %": 1, "median": 50, "99 %": 99, "highest": 100}
    found = np.percentile(pixels * gains + shifts, list(steps.values()), axis=1)
    return pd.DataFrame(found.T, index=list(info.bands), columns=list(steps))


def classes_table(chips: pd.DataFrame, info: DatasetInfo) -> pd.DataFrame:
    """Share of each class in each split; empty for regression."""
    if info.task not in CLASS_TASKS:
        return pd.DataFrame()
    table = {}
    for split in sorted_splits(chips["split"]):
        group = chips[chips["split"] == split]
        counts = np.zeros(len(info.classes))
        if info.target == "mask":
            for each in group["counts"].dropna() if "counts" in group else []:
                counts += each
        else:
            for label in group["label"]:
                for number in np.atleast_1d(label):
                    if not pd.isna(number):
                        counts[int(number)] += 1
        if counts.sum():
            table[split] = counts / counts.sum()
    return pd.DataFrame(table, index=list(info.classes))
