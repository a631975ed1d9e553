"""What the numbers of a file mean is asked, with a proposal, and never assumed.

16-bit files mostly hold reflectance times 10,000, but not always: Landsat's collection
2 has a scale and an offset, Sentinel-2 an offset since baseline 04.00, pictures have
neither. A wrong guess trains without an error and scores badly, so a guess is only
ever a sentence. Sources: USGS, Landsat Collection 2 Level-2 (scale 0.0000275, offset
-0.2); ESA, Sentinel-2 processing baseline 04.00 (offset -1000 stored units, from 25
January 2022). Taught in `notebooks/14_your_own_data.ipynb`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio

from geopeft_kit.bands import BANDS, SENSORS
from geopeft_kit.data.info import DatasetInfo
from geopeft_kit.data.reading import invalid_pixels
from geopeft_kit.open_raster import (
    UNLISTED,
    Tags,
    check_alike,
    open_raster,
    tags_of,
)

FILES, SIDE = 8, 256  # files looked at, and pixels along a side of each
BRIGHT = 1.6  # reflectance above this is glint, cloud or a wrong scale


@dataclass(frozen=True)
class StoredValues:
    """A sample of what some files hold."""

    tags: Tags  # of the first file
    values: np.ndarray  # (C, N) stored values that are data


def sample_values(files: Sequence[Path], nodata: float | None = None) -> StoredValues:
    """A few pixels of up to eight of the files; `nodata` None takes the files' own.

    Raises:
        ValueError: A file is not a raster, or its tags disagree with the first's.
    """
    step = max(1, len(files) // FILES)
    found: list[StoredValues] = []
    for path in files[::step][:FILES]:
        seen = _sample_of(path, nodata)
        found.append(seen)
        check_alike(path, seen.tags, files[0], found[0].tags)
    values = np.concatenate([seen.values for seen in found], axis=1)
    return StoredValues(found[0].tags, values)


def _sample_of(path: Path, nodata: float | None) -> StoredValues:
    with rasterio.Env(**UNLISTED), open_raster(path, path.stem) as raster:
        tags = tags_of(raster)
        size = min(raster.height, SIDE), min(raster.width, SIDE)
        pixels = raster.read(out_shape=(raster.count, *size))
        empty = invalid_pixels(raster, pixels, nodata)
    good = np.isfinite(pixels).all(axis=0)  # (H, W)
    return StoredValues(tags, pixels[:, good if empty is None else good & ~empty])


def contradictions(tags: Tags, info: DatasetInfo) -> list[str]:
    """What the tags of a file say otherwise than the facts of its data set."""
    found = []
    stated = np.broadcast_arrays(info.scale, info.offset, info.bands)[:2]
    if tags.scaling is not None and not np.allclose(
        tags.scaling, np.stack(stated, axis=1).astype(float), rtol=1e-3
    ):
        found.append(
            f"the files state (scale, offset) {tags.scaling[0]}, the data set has "
            f"{info.scale}, {info.offset}"
        )
    if tags.bands is not None and tags.bands != info.bands:
        found.append(
            f"the files name the bands {', '.join(tags.bands)}, the data set "
            f"{', '.join(info.bands)}"
        )
    known = None not in (tags.nodata, info.nodata)
    if known and str(float(tags.nodata or 0)) != str(float(info.nodata or 0)):
        found.append(f"the files state nodata={tags.nodata}, not {info.nodata}")
    return found


def propose_bands(stored: StoredValues) -> str:
    """Which bands the files may hold, as the argument to pass."""
    if stored.tags.bands is not None:
        return f"bands={list(stored.tags.bands)}"
    count = stored.tags.band_count
    sensors = [name for name, bands in SENSORS.items() if len(bands) == count]
    if not sensors:
        return f"bands=[...], {count} names"
    return f"bands={sensors[0]!r} (they would be {', '.join(SENSORS[sensors[0]])})"


def propose_scale(stored: StoredValues) -> tuple[float, float, str]:
    """Scale and offset that would make reflectance of the stored values, and why."""
    if not stored.values.size:
        return 1e-4, 0.0, "there is no data to judge by"
    low, middle, high = np.percentile(stored.values, [1, 50, 99])
    dtype, scaling = stored.tags.dtype, stored.tags.scaling
    span = f"{dtype} from {low:.4g} to {high:.4g} (1st and 99th percentile)"
    if scaling is not None and len(set(scaling)) == 1:
        return *scaling[0], f"the files say so themselves; they hold {span}"
    if dtype == "uint8":
        return 1 / 255, 0.0, f"they hold {span}, as pictures do"
    if high <= BRIGHT:
        return 1.0, 0.0, f"they hold {span}, reflectance as it is"
    if high <= 100:
        return 0.01, 0.0, f"they hold {span}, like per cent"
    if dtype == "uint16" and low > 5000 and high < 50_000:
        return 2.75e-5, -0.2, f"they hold {span}, like Landsat's collection 2"
    if low >= 900 and middle > 1500:
        why = f"they hold {span}, like Sentinel-2 since baseline 04.00"
        return 1e-4, -0.1, f"{why}; offset=0 if the offset is taken off already"
    return 1e-4, 0.0, f"they hold {span}, so 10000 may mean reflectance 1"


def require_bands_and_scale(stored: StoredValues, bands: object, scale: object) -> None:
    """Raise ValueError where bands or scale are not stated, and propose them."""
    wanted = []
    if bands is None:
        wanted.append(f"{propose_bands(stored)}, in the order of the files")
    if scale is None:
        number, offset, why = propose_scale(stored)
        text = f"scale={number:.6g}" + (f", offset={offset:.6g}" if offset else "")
        wanted.append(f"{text}, since {why}")
    if wanted:
        raise ValueError(
            "what the stored numbers mean is never assumed. If it is right, pass "
            f"{'; and '.join(wanted)}. (reflectance = stored * scale + offset)"
        )


def check_scale(
    stored: StoredValues,
    bands: Sequence[str],
    scale: float | Sequence[float] | None,
    offset: float | Sequence[float],
) -> None:
    """Refuse a scale with which the optical bands hold no reflectance.

    Raises:
        ValueError: Half of the pixels are brighter than a white sheet many times over,
            or nearly all are black.
    """
    rows = [i for i, name in enumerate(bands) if BANDS[name].kind == "optical"]
    if not rows or not stored.values.size:
        return
    gains = np.broadcast_to(np.asarray(scale, float), len(bands))[rows, None]
    shifts = np.broadcast_to(np.asarray(offset, float), len(bands))[rows, None]
    values = stored.values[rows] * gains + shifts  # (C', N)
    middle, high = np.percentile(values, [50, 99])
    if -0.5 < middle < 5 and (high > 2e-3 or not stored.values.any()):
        return
    number, other, why = propose_scale(stored)
    raise ValueError(
        f"with scale={scale} and offset={offset} the images have a median reflectance "
        f"of {middle:.4g} and a 99th percentile of {high:.4g}; reflectance is from 0 "
        f"to 1. Perhaps scale={number:.6g}, offset={other:.6g}: {why}."
    )
