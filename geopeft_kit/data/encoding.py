"""Arrays of a chip, checked and packed as GeoTIFF bytes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from rasterio.dtypes import in_dtype_range
from rasterio.errors import NotGeoreferencedWarning
from rasterio.io import MemoryFile

from geopeft_kit.data.chip import Outline
from geopeft_kit.data.info import DatasetInfo


def check_image(name: str, array: np.ndarray, info: DatasetInfo) -> None:
    """Raise ValueError for an image of another shape, or with NaN not declared."""
    if array.ndim != 3 or array.shape[0] != len(info.bands):
        raise ValueError(
            f"chip {name!r}: the image has shape {array.shape}; expected "
            f"({len(info.bands)}, H, W), one channel for each of "
            f"{', '.join(info.bands)}."
        )
    if array.dtype.kind == "f" and not (
        info.nodata is not None and np.isnan(info.nodata)
    ):
        bad = int((~np.isfinite(array)).sum())
        if bad:
            raise ValueError(
                f"chip {name!r}: {bad} of {array.size} image values are NaN or "
                "infinite. Fill them, or set them to a number and declare it as nodata "
                "(nodata=float('nan') declares NaN itself)."
            )


def checked_mask(name: str, array: np.ndarray, info: DatasetInfo) -> np.ndarray:
    """A mask in the smallest type that holds it, its values checked."""
    if array.ndim != 2:
        raise ValueError(
            f"chip {name!r}: the mask has shape {array.shape}; expected (H, W)."
        )
    if info.task == "regression":
        return array.astype(np.float32)
    allowed = {*range(len(info.classes)), info.ignore_index}
    wrong = sorted(set(np.unique(array).tolist()) - allowed)
    if wrong:
        raise ValueError(mask_value_message(name, wrong, info))
    small = np.uint8 if max(allowed) < 256 and min(allowed) >= 0 else np.int16
    return array.astype(small)


def mask_value_message(name: str, wrong: Sequence[float], info: DatasetInfo) -> str:
    """What is said about mask values outside the classes.

    Args:
        name: Of the chip.
        wrong: The values that are not allowed.
        info: Facts of the data set.

    Returns:
        One sentence with the allowed values, one with the next step.
    """
    return (
        f"chip {name!r}: mask value {', '.join(f'{v:g}' for v in wrong[:5])} is "
        f"outside the classes; allowed are 0-{len(info.classes) - 1} "
        f"({', '.join(info.classes)}) and {info.ignore_index} (no label). Correct the "
        "mask, or add the class to the data set."
    )


def encode(
    array: np.ndarray, outline: Outline, info: DatasetInfo, is_mask: bool
) -> bytes:
    """A compressed GeoTIFF, in memory: writing bytes fails loudly on a full disk."""
    array = array[None] if is_mask else array  # (C, H, W)
    count, height, width = array.shape
    nodata = info.nodata
    if is_mask:
        nodata = np.nan if info.task == "regression" else info.ignore_index
    if nodata is not None and not in_dtype_range(nodata, array.dtype.name):
        nodata = None  # a value that this type cannot hold is not in the file either
    profile = {
        "driver": "GTiff", "count": count, "height": height, "width": width,
        "dtype": array.dtype.name, "nodata": nodata, "crs": outline.crs,
        "compress": "deflate", "zlevel": 6,
        "predictor": 3 if array.dtype.kind == "f" else 2,
        # By band, so that reading three of twelve bands costs three.
        "interleave": "band",
    }  # fmt: skip
    if outline.transform is not None:
        profile["transform"] = outline.transform
    if min(height, width) >= 512:
        profile |= {"tiled": True, "blockxsize": 256, "blockysize": 256}
    else:
        profile["blockysize"] = height
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with MemoryFile() as memory:
            with memory.open(**profile) as raster:
                raster.write(array)
                if not is_mask:
                    raster.descriptions = info.bands
                    raster.scales = np.broadcast_to(info.scale, count).tolist()
                    raster.offsets = np.broadcast_to(info.offset, count).tolist()
            return bytes(memory.getbuffer())
