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
from geopeft_kit.pictures import OKABE_ITO, class_colours

if TYPE_CHECKING:
    import geopandas as gpd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEVELS = ("error", "warning", "note")
_SIGNS = {"error": "&#10006; error", "warning": "&#9888; warning", "note": "note"}


def sorted_splits(splits: Iterable[str]) -> list[str]:
    """Names of splits: train, val, test, then others.

    Args:
        splits: One a chip.

    Returns:
        Each name once.
    """
    first = ["train", "val", "test"]
    found = set(splits)
    return [s for s in first if s in found] + sorted(found - set(first))


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
        style = "text-align:left;vertical-align:top;white-space:normal"
        rows = []
        for finding in self.findings:
            names = list(finding.chips)
            some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            cells = [finding.check, finding.found, some, finding.next]
            text = [f"<td style='{style}'>{escape(str(cell))}</td>" for cell in cells]
            text.insert(1, f"<td style='{style}'>{_SIGNS[finding.level]}</td>")
            rows.append(f"<tr>{''.join(text)}</tr>")
        head = "".join(
            f"<th style='{style}'>{name}</th>"
            for name in ("check", "level", "found", "chips", "what to do next")
        )
        body = "".join(rows) or "<tr><td colspan='5'>nothing found</td></tr>"
        title = f"{self.info.name}: {len(self.chips)} chips"
        return (
            f"<table><caption>{escape(title)}</caption><thead><tr>{head}</tr></thead>"
            f"<tbody>{body}</tbody></table>"
        )

    def plot(self) -> Figure:
        """Bands, classes, nodata and the lie of the splits, in one figure.

        Returns:
            A figure with four panels.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9.5, 7), layout="constrained")
        axes = figure.subplots(2, 2)
        _plot_bands(axes[0, 0], self.bands)
        _plot_classes(axes[0, 1], self.classes, self.info)
        _plot_nodata(axes[1, 0], self.chips)
        _plot_places(axes[1, 1], self.index, self.chips)
        figure.suptitle(self.info.name.replace("$", r"\$"))
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
    axis.legend(frameon=False, fontsize="small")


def _plot_classes(axis: Axes, classes: pd.DataFrame, info: DatasetInfo) -> None:
    if classes.empty or not len(classes.columns):
        axis.text(0.5, 0.5, "no classes", ha="center", va="center")
        axis.set_axis_off()
        return
    colours = class_colours(list(classes.index), info.colours or None)
    left = np.zeros(len(classes.columns))
    for (name, shares), colour in zip(classes.iterrows(), colours, strict=True):
        label = str(name).replace("$", r"\$")
        axis.barh(
            list(classes.columns), shares, left=left, color=colour,
            edgecolor="0.3", linewidth=0.5, label=label,
        )  # fmt: skip
        left += shares.to_numpy()
    axis.invert_yaxis()
    unit = "pixels" if info.target == "mask" else "chips"
    axis.set(xlabel=f"share of the labelled {unit}", xlim=(0, 1))
    axis.legend(frameon=False, fontsize="small", ncols=3, loc="lower left",
                bbox_to_anchor=(0, 1))  # fmt: skip


def _plot_nodata(axis: Axes, chips: pd.DataFrame) -> None:
    steps = np.linspace(0, 1, 21).tolist()
    axis.hist(chips["nodata"].dropna(), steps, color="0.6", label="no data")
    if "labelled" in chips:
        axis.hist(
            1 - chips["labelled"].dropna(), steps, histtype="step",
            color=OKABE_ITO["vermillion"], linewidth=1.5, label="no label",
        )  # fmt: skip
    axis.set(xlabel="share of a chip's pixels", ylabel="chips", yscale="symlog")
    axis.legend(frameon=False, fontsize="small")


def _plot_places(axis: Axes, index: gpd.GeoDataFrame, chips: pd.DataFrame) -> None:
    placed = index.geometry.notna().to_numpy()
    if not placed.any():
        axis.text(0.5, 0.5, "no georeference", ha="center", va="center")
        axis.set_axis_off()
        return
    looks: dict[str, Any] = {"train": OKABE_ITO["blue"], "val": OKABE_ITO["orange"]}
    looks |= {"test": OKABE_ITO["vermillion"]}
    for split in sorted_splits(chips["split"]):
        shapes = index.geometry[placed & (chips["split"] == split).to_numpy()]
        if len(shapes):
            colour = looks.get(split, "0.7")
            shapes.plot(ax=axis, facecolor=colour, edgecolor="0.2", linewidth=0.3,
                        alpha=0.7, aspect=None)  # fmt: skip
            axis.plot([], [], "s", color=colour, label=split)
    axis.set(xlabel="longitude (degrees)", ylabel="latitude (degrees)")
    axis.legend(frameon=False, fontsize="small", ncols=4, loc="lower left",
                bbox_to_anchor=(0, 1))  # fmt: skip
