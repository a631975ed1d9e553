"""Pixels and names on their way into chips: reading, windows, and smaller subsets."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import rasterio
from rasterio.enums import Resampling
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.transform import from_bounds
from rasterio.windows import Window

from geopeft_kit.data import Chip

Item = TypeVar("Item")


def read_raster(
    path: Path, size: tuple[int, int] | None = None, resampling: str = "nearest"
) -> tuple[np.ndarray, dict[str, Any]]:
    """All bands of a raster, and where it lies.

    Args:
        path: Anything that rasterio opens.
        size: (height, width) to resample to while reading; None keeps its own.
        resampling: As rasterio names it.

    Returns:
        (C, H, W) values, and `crs` and `transform` by name; both None without a CRS.

    Raises:
        RuntimeError: The file cannot be read, being cut short for instance.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with rasterio.open(path) as raster:
                shape = None if size is None else (raster.count, *size)
                pixels = raster.read(out_shape=shape, resampling=Resampling[resampling])
                place = {"crs": raster.crs, "transform": raster.transform}
                if size is not None:
                    place["transform"] = from_bounds(*raster.bounds, size[1], size[0])
    except RasterioError as error:
        raise RuntimeError(
            f"{path} cannot be read: {error}. Copy or download it again."
        ) from error
    return pixels, place if place["crs"] else dict.fromkeys(place)


def read_mask(path: Path, values: dict[int, int], fill: int = 255) -> np.ndarray:
    """A one-band mask with its upstream values turned into class numbers.

    Args:
        path: Anything that rasterio opens.
        values: Upstream value -> class number; `fill` for no label.
        fill: Class number of "no label".

    Returns:
        (H, W) uint8.

    Raises:
        ValueError: The mask holds a value that is not in `values`.
    """
    mask = read_raster(path)[0][0]
    return relabel(mask, values, str(path), fill)


def read_colours(
    path: Path, colours: Sequence[tuple[int, int, int]], other: bool = False
) -> np.ndarray:
    """A mask that is painted in colours, as class numbers.

    Args:
        path: Anything that rasterio opens, with red, green and blue.
        colours: One per class, in the order of the numbers.
        other: Another colour is "no label" (255); by default it is refused.

    Returns:
        (H, W) uint8.

    Raises:
        ValueError: The mask holds another colour.
    """
    red, green, blue = read_raster(path)[0][:3].astype(int)
    code = red << 16 | green << 8 | blue  # (H, W)
    known = {r << 16 | g << 8 | b: number for number, (r, g, b) in enumerate(colours)}
    if other:
        code = np.where(np.isin(code, list(known)), code, -1)
        known[-1] = 255
    return relabel(code, known, str(path))


def relabel(
    mask: np.ndarray, values: dict[int, int], name: str, fill: int = 255
) -> np.ndarray:
    """Turn upstream values into class numbers.

    Args:
        mask: (H, W).
        values: Upstream value -> class number.
        name: For the message.
        fill: Class number where nothing matches, which is refused.

    Returns:
        (H, W) uint8.

    Raises:
        ValueError: The mask holds a value that is not in `values`.
    """
    wrong = sorted(set(np.unique(mask).tolist()) - set(values))
    if wrong:
        raise ValueError(
            f"{name} holds {', '.join(f'{v:g}' for v in wrong[:5])}; expected "
            f"{', '.join(map(str, values))}."
        )
    result = np.full(mask.shape, fill, np.uint8)
    for value, number in values.items():
        result[mask == value] = number
    return result


def windows(
    height: int, width: int, size: int, left: int = 0, right: int | None = None
) -> Iterator[tuple[int, int]]:
    """Corners of square windows that lie side by side inside a raster.

    Args:
        height: Of the raster.
        width: Of the raster.
        size: Of a window.
        left: First column to use.
        right: Column to stop before; None for the raster's width.

    Yields:
        (row, column) of the upper left corner.
    """
    right = width if right is None else right
    for row in range(0, height - size + 1, size):
        for column in range(left, right - size + 1, size):
            yield row, column


def cut(
    chip: Chip, size: int | None, left: int = 0, right: int | None = None
) -> Iterator[Chip]:
    """A chip as windows that lie side by side; what is left at the border is dropped.

    Args:
        chip: With arrays, not paths.
        size: Side of a window in pixels; None yields the chip whole.
        left: First column to use.
        right: Column to stop before; None for the chip's width.

    Yields:
        Chips named after the corner, which keep the whole one's name as their scene.
    """
    if size is None:
        yield chip
        return
    arrays = {
        name: np.asarray(value)
        for name in ("image", "image_after", "mask")
        if (value := getattr(chip, name)) is not None
    }
    for row, column in windows(*arrays["image"].shape[-2:], size, left, right):
        inside = np.s_[..., row : row + size, column : column + size]
        changes: dict[str, Any] = {name: a[inside] for name, a in arrays.items()}
        if chip.transform is not None:
            box = Window(column, row, size, size)
            changes["transform"] = rasterio.windows.transform(box, chip.transform)
        yield replace(
            chip,
            name=f"{chip.name}_{row:03d}_{column:03d}",
            extra={"scene": chip.name, **chip.extra},
            **changes,
        )


def first_of_each(
    items: Sequence[Item],
    group: Callable[[Item], Any] | None,
    count: int | Callable[[int], int],
    seed: int = 0,
) -> list[Item]:
    """Some items of each group, in a seeded order: the fewer lie in the more.

    Args:
        items: All of them, in an order that does not depend on the disk.
        group: Class, split or region of an item; None takes all as one group.
        count: How many of each group, or a function of the group's size.
        seed: Of the order.

    Returns:
        The chosen items, in the order of `items`.
    """
    members: dict[Any, list[int]] = {}
    for position in np.random.default_rng(seed).permutation(len(items)).tolist():
        key = group(items[position]) if group else None
        members.setdefault(key, []).append(position)
    chosen = [
        position
        for positions in members.values()
        for position in positions[: count(len(positions)) if callable(count) else count]
    ]
    return [items[position] for position in sorted(chosen)]


def chip_name(text: str) -> str:
    """A text as the name of a chip: other signs become "_"."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", text).lstrip(".-") or "_"


def cut_some(chip: Chip, size: int | None, count: int | None) -> list[Chip]:
    """All windows of one chip, see `cut`, or some of them in a seeded order.

    Args:
        chip: With arrays, not paths.
        size: Side of a window in pixels; None keeps the chip whole.
        count: How many windows at most; None keeps all.

    Returns:
        The windows, in the order of `cut`; the fewer lie in the more.
    """
    found = list(cut(chip, size))
    return found if count is None else first_of_each(found, None, count)
