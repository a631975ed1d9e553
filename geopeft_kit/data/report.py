"""What `check_data` hands back: a table to read, and pictures to look at.

Taught in `notebooks/14_your_own_data.ipynb`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from geopeft_kit.data.info import DatasetInfo
from geopeft_kit.data.splits import sorted_splits
from geopeft_kit.pictures import OKABE_ITO, class_colours
from geopeft_kit.plots.colours import SPLIT_STYLES
from geopeft_kit.plots.drawing import new_panels, plain_text

if TYPE_CHECKING:
    import geopandas as gpd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEVELS = ("error", "warning", "note")
_SIGNS = {"error": "\u2716 error", "warning": "\u26a0 warning", "note": "note"}
_SMALL: dict[str, Any] = {"frameon": False, "fontsize": "small"}  # of a legend


@dataclass
class Finding:
    """One thing that was found.

    Attributes:
        check: What was looked at.
        level: "error" (scores would be wrong), "warning" or "note".
        found: What it is, in words and numbers.
        chips: Names of the chips concerned.
        next: What to do.
    """

    check: str
    level: str
    found: str
    chips: Iterable[str]
    next: str

    def __post_init__(self) -> None:
        self.chips = list(self.chips)


@dataclass
class DataReport:
    """Findings about a data set; shows itself as a table in a notebook.

    Attributes:
        info: Facts of the data set.
        findings: What was found, the worst first.
        bands: Reflectance of each band: lowest, 1 %, median, 99 %, highest.
        classes: Share of each class (rows) in each split (columns).
        chips: One row a chip: split, region, size, crs, nodata, labelled ...
        index: The index that was checked, with footprints.
    """

    info: DatasetInfo
    findings: list[Finding]
    bands: pd.DataFrame
    classes: pd.DataFrame
    chips: pd.DataFrame
    index: gpd.GeoDataFrame = field(repr=False)

    def __post_init__(self) -> None:
        self.findings = sorted(self.findings, key=lambda f: LEVELS.index(f.level))

    @property
    def ok(self) -> bool:
        """True where nothing worse than a note was found."""
        return all(finding.level == "note" for finding in self.findings)

    @property
    def table(self) -> pd.DataFrame:
        """Findings as a DataFrame: check, level, found, chips, next."""
        names = ["check", "level", "found", "chips", "next"]
        rows = [[getattr(f, name) for name in names] for f in self.findings]
        return pd.DataFrame(rows, columns=names)

    def __repr__(self) -> str:
        lines = [f"{self.info.name}: {len(self.chips)} chips"]
        for finding in self.findings:
            lines.append(f"  {finding.level}: {finding.check}: {finding.found}")
            lines.append(f"    next: {finding.next}")
        return "\n".join(lines if self.findings else [*lines, "  nothing found"])

    def _repr_html_(self) -> str:
        """The findings; every text is escaped, for it may come from a file."""
        title = f"{self.info.name}: {len(self.chips)} chips"
        shown = self.table.rename(columns={"next": "what to do next"})
        shown["level"] = shown["level"].map(_SIGNS)
        shown["chips"] = [
            ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            for names in shown["chips"]
        ]
        if shown.empty:
            title += ", nothing found"
        left = {"text-align": "left", "vertical-align": "top", "white-space": "normal"}
        styled = shown.style.hide(axis="index").format(escape="html")
        return styled.set_properties(**left).set_caption(escape(title)).to_html()

    def plot(self) -> Figure:
        """Bands, classes, nodata and the place of the splits, in one figure.

        Returns:
            A figure with four panels.
        """
        figure, axes = new_panels(4, columns=2, side=4.6)
        _plot_bands(axes[0], self.bands)
        _plot_classes(axes[1], self.classes, self.info)
        _plot_nodata(axes[2], self.chips)
        _plot_places(axes[3], self.index, self.chips)
        figure.suptitle(plain_text(self.info.name))
        return figure


def _plot_bands(axis: Axes, bands: pd.DataFrame) -> None:
    rows = np.arange(len(bands))
    axis.axvspan(0, 1, color="0.92", zorder=0)
    width = bands["99 %"] - bands["1 %"]
    axis.barh(rows, width, left=bands["1 %"], color=OKABE_ITO["blue"], height=0.6)
    axis.plot(bands["median"], rows, "k|", markersize=10, label="median")
    axis.set_yticks(rows, [name.replace("_", " ").lower() for name in bands.index])
    axis.invert_yaxis()
    axis.set(xlabel="reflectance, 1st to 99th percentile (grey: 0 to 1)")
    axis.legend(**_SMALL)


def _plot_classes(axis: Axes, classes: pd.DataFrame, info: DatasetInfo) -> None:
    if not classes.size:
        _say(axis, "no classes")
        return
    named = classes.rename(index=plain_text).T  # a row a split
    colours = class_colours(list(classes.index), info.colours or None)
    named.plot.barh(stacked=True, ax=axis, color=colours, edgecolor="0.3")
    axis.invert_yaxis()
    unit = "pixels" if info.target == "mask" else "chips"
    axis.set(xlabel=f"share of the labelled {unit}", xlim=(0, 1))
    axis.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1), **_SMALL)


def _plot_nodata(axis: Axes, chips: pd.DataFrame) -> None:
    steps = np.linspace(0, 1, 21).tolist()
    axis.hist(chips["nodata"].dropna(), steps, color="0.6", label="no data")
    if "labelled" in chips:
        unlabelled, colour = 1 - chips["labelled"].dropna(), OKABE_ITO["vermillion"]
        axis.hist(unlabelled, steps, histtype="step", color=colour, label="no label")
    axis.set(xlabel="share of a chip's pixels", ylabel="chips", yscale="symlog")
    axis.legend(**_SMALL)


def _plot_places(axis: Axes, index: gpd.GeoDataFrame, chips: pd.DataFrame) -> None:
    split = chips["split"].to_numpy()
    placed = index.geometry.notna().to_numpy()
    if not placed.any():
        _say(axis, "no georeference")
        return
    for name in sorted_splits(split[placed]):
        colour = SPLIT_STYLES[name][0] if name in SPLIT_STYLES else "0.7"
        shapes = index.geometry[placed & (split == name)]
        shapes.plot(ax=axis, color=colour, edgecolor="0.2", alpha=0.7, aspect=None)
        axis.plot([], [], "s", color=colour, label=name)
    axis.set(xlabel="longitude (degrees)", ylabel="latitude (degrees)")
    axis.legend(ncols=4, loc="lower left", bbox_to_anchor=(0, 1), **_SMALL)


def _say(axis: Axes, text: str) -> None:
    axis.text(0.5, 0.5, text, ha="center", va="center")
    axis.set_axis_off()
