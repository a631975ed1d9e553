"""From numbers to colours: bands to pictures, classes and features to colours.

Plain numpy, no plotting library. The figures (`plots`) and the maps (`maps`) share it,
so a scene looks the same in both. Taught in notebooks 00 and 01.

Source:
    Okabe and Ito 2008, "Color universal design", https://jfly.uni-koeln.de/color/.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .bands import resolve_bands

Colours = Sequence[str | Sequence[int]] | Mapping[Any, str | Sequence[int]]

OKABE_ITO = {
    "black": "#000000",
    "orange": "#e69f00",
    "sky": "#56b4e9",
    "green": "#009e73",
    "yellow": "#f0e442",
    "blue": "#0072b2",
    "vermillion": "#d55e00",
    "purple": "#cc79a7",
}

SHOWS: Mapping[str, tuple[str, ...]] = {
    "true": ("RED", "GREEN", "BLUE"),
    "false": ("NIR", "RED", "GREEN"),
    "swir": ("SWIR_2", "NIR", "RED"),
}
NIR = ("NIR_NARROW", "NIR_BROAD")


def class_colours(classes: Sequence[str], colours: Colours | None = None) -> list[str]:
    """One "#rrggbb" per class; by default Okabe and Ito's, in their order.

    `colours` is a list, or a dict by class name or number, of "#rrggbb" or three
    numbers from 0 to 255. Raises ValueError for a missing or malformed one.
    """
    if colours is None:
        own = [*list(OKABE_ITO.values())[1:], OKABE_ITO["black"]]
        if len(classes) > len(own):
            raise ValueError(
                f"{len(classes)} classes need {len(classes)} colours; only {len(own)} "
                "can be told apart safely. Pass colours=[...]."
            )
        return own[: len(classes)]
    given = list(colours) if isinstance(colours, Mapping) else range(len(colours))
    picked = []
    for number, name in enumerate(classes):
        keys = [key for key in (name, number, str(number)) if key in given]
        if not keys:
            raise ValueError(
                f"Class {name!r} (number {number}) has no colour. Given: "
                f"{', '.join(map(str, given))}. Pass one colour per class."
            )
        picked.append(_hex(colours[keys[0]]))  # type: ignore[index]
    return picked


def _hex(colour: str | Sequence[int]) -> str:
    text = str(colour).removeprefix("#").lower()
    if not isinstance(colour, str):
        text = bytes(int(v) for v in list(colour)[:3]).hex()
    if len(text) != 6 or set(text) - set("0123456789abcdef"):
        raise ValueError(
            f"{colour!r} is not a colour. Write '#rrggbb', for instance '#0072b2', or "
            "three numbers from 0 to 255."
        )
    return f"#{text}"


def rgb_of(colours: Sequence[str]) -> np.ndarray:
    """(K, 3) uint8 of K colours "#rrggbb"."""
    rows = [list(bytes.fromhex(colour.removeprefix("#"))) for colour in colours]
    return np.array(rows, np.uint8).reshape(-1, 3)


def png_url(png: bytes) -> str:
    """The bytes of a PNG file as a data URL, for pages that fetch nothing."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def picture_bands(
    bands: str | Sequence[str], show: str | Sequence[str] = "true"
) -> list[int]:
    """Positions of three bands: "true", "false" (NIR, red, green), "swir", or names.

    Raises ValueError if the image lacks one of them.
    """
    names = list(resolve_bands(bands))
    if isinstance(show, str) and show not in SHOWS:
        raise ValueError(
            f"show={show!r} is unknown. Allowed: {', '.join(SHOWS)}, or the names of "
            "three bands."
        )
    wanted = SHOWS[show] if isinstance(show, str) else resolve_bands(show)
    positions = []
    for band in wanted:
        found = [
            names.index(b) for b in (NIR if band == "NIR" else (band,)) if b in names
        ]
        if not found or len(wanted) != 3:
            raise ValueError(
                f"A picture of {', '.join(wanted)} cannot be made of the bands "
                f"{', '.join(names)}. Pass show= with three of them."
            )
        positions.append(found[0])
    return positions


def stretch_limits(
    images: Sequence[np.ndarray], percentiles: tuple[float, float] = (2, 98)
) -> np.ndarray:
    """Black and white point per channel, (2, C), shared by several images (C, H, W).

    NaN is ignored.
    """
    pixels = np.concatenate([np.reshape(im, (len(im), -1)) for im in images], axis=1)
    pixels = pixels[:, np.isfinite(pixels).all(axis=0)]
    if not pixels.size:
        return np.array([[0.0], [1.0]]).repeat(len(images[0]), axis=1)
    return np.percentile(
        pixels[:, :: max(1, pixels.shape[1] // 500_000)], percentiles, 1
    )


def stretch(image: np.ndarray, limits: np.ndarray | None = None) -> np.ndarray:
    """Reflectance (C, H, W) as a picture (H, W, C), 0 to 1; NaN becomes 0.

    `limits` (2, C) is from `stretch_limits`; by default of this image alone.
    """
    image = np.asarray(image, dtype=np.float32)
    low, high = stretch_limits([image]) if limits is None else limits
    span = np.maximum(high - low, 1e-6)
    scaled = (image - low[:, None, None]) / span[:, None, None]
    return np.nan_to_num(np.clip(scaled, 0, 1)).transpose(1, 2, 0)


def token_picture(features: Any) -> np.ndarray:
    """Feature maps (D, h, w) or (B, D, h, w) as colours (..., h, w, 3), 0 to 1.

    The colours are the first three principal components, on one scale for the whole
    batch. Similar features have similar colours; which colour is which has no meaning.
    """
    array = as_numpy(features).astype(np.float64)
    batch = array[None] if array.ndim == 3 else array
    if batch.ndim != 4:
        raise ValueError(f"Expected (D, h, w) or (B, D, h, w), got {array.shape}.")
    count, width, height, wide = batch.shape
    tokens = batch.transpose(0, 2, 3, 1).reshape(-1, width)  # (B*h*w, D)
    tokens = tokens - tokens.mean(axis=0)
    _, axes = np.linalg.eigh(tokens.T @ tokens)  # ascending
    parts = tokens @ axes[:, ::-1][:, :3]  # (B*h*w, 3)
    parts = np.pad(parts, ((0, 0), (0, 3 - parts.shape[1])))
    picture = stretch(parts.T[:, None, :])[0]  # (B*h*w, 3)
    picture = picture.reshape(count, height, wide, 3)
    return picture[0] if array.ndim == 3 else picture


def as_numpy(array: Any) -> np.ndarray:
    """A torch tensor on any device, or anything array-like, as numpy."""
    return np.asarray(array.detach().cpu() if hasattr(array, "detach") else array)
