"""A map of where the chips of each split lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from geopeft_kit.plots.colours import SPLIT_STYLES
from geopeft_kit.plots.drawing import new_panels, plain_text


def plot_split(index: Any, title: str = "", view: Sequence[float] | None = None) -> Any:
    """Where the chips of each split lie.

    Args:
        index: GeoDataFrame with footprints in degrees and the column `split`, as
            `ChipData.index`.
        title: Above the figure.
        view: West, south, east, north of a part to look at; by default all.

    Returns:
        The figure. Footprints too small to see carry a mark in their middle.
    """
    placed = index[index.geometry.notna()]
    if view is not None:
        placed = placed.cx[view[0] : view[2], view[1] : view[3]]
    if placed.empty:
        raise ValueError("No chip has a place here. Pass another view, or view=None.")
    figure, (axis,) = new_panels(1, side=4.6)
    west, south, east, north = view or placed.total_bounds
    for split, (colour, marker, size) in SPLIT_STYLES.items():
        rows = placed[placed["split"] == split]
        if rows.empty:
            continue
        rows.plot(ax=axis, facecolor=colour, edgecolor=colour, alpha=0.55, zorder=3)
        left, low, right, high = rows.bounds.to_numpy().T
        wide = (right - left).max() / (east - west or 1)
        tall = (high - low).max() / (north - south or 1)
        if max(wide, tall) < 0.02:
            middle = (left + right) / 2, (low + high) / 2
            axis.scatter(*middle, size, colour, marker=marker, zorder=4)
        axis.plot([], [], marker, color=colour, label=f"{split} ({len(rows)})")
    axis.set(xlabel="longitude (degrees)", ylabel="latitude (degrees)")
    if view is not None:
        axis.set(xlim=(west, east), ylim=(south, north))
    shape = 1 / np.cos(np.radians((south + north) / 2))
    axis.set_aspect(shape, adjustable="datalim" if view is None else "box")
    axis.ticklabel_format(useOffset=False)
    axis.locator_params(nbins=5)
    axis.tick_params(labelsize="small")
    axis.grid(color="0.92")
    axis.set_title(plain_text(title), fontsize="medium")
    figure.legend(frameon=False, fontsize="small", ncols=4, loc="outside lower center")
    return figure
