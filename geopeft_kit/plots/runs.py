"""Figures of losses, memory, scores and regional gaps of methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from geopeft_kit.pictures import OKABE_ITO
from geopeft_kit.plots.colours import (
    CAUSE_COLOURS,
    METHOD_COLOURS,
    method_colour,
    method_marker,
)
from geopeft_kit.plots.drawing import new_panels, plain_text

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_history(
    histories: Mapping[str, pd.DataFrame], metric: str, loss: str = "loss"
) -> Figure:
    """Loss and score against epochs, one line per method.

    Args:
        histories: Method -> `run.history`, one row per epoch, column `epoch`.
        metric: Column of the score, for instance "val_miou".
        loss: Column of the loss.
    """
    figure, axes = new_panels(2, side=3.6)
    for method, history in histories.items():
        for axis, column in zip(axes, (loss, metric), strict=True):
            if column not in history:
                raise ValueError(
                    f"The history of {method!r} has no column {column!r}. It has "
                    f"{', '.join(map(str, history.columns))}."
                )
            known = history.dropna(subset=[column])
            axis.plot(known["epoch"], known[column], **_style(method), markersize=4)
    axes[0].set(xlabel="epoch", ylabel=loss.replace("_", " "))
    axes[1].set(xlabel="epoch", ylabel=metric.replace("_", " "))
    axes[1].legend(frameon=False, fontsize="small")
    return figure


def plot_resources(
    parts: Mapping[str, Mapping[str, float]],
    limits: Mapping[str, float] | None = None,
) -> Figure:
    """Memory of each run as one stacked bar.

    Args:
        parts: Run -> cause, of `CAUSE_COLOURS` -> bytes.
        limits: GPU -> its bytes: a line where it is near the bars, else a note below.
    """
    figure, (axis,) = new_panels(1, side=4.2)
    figure.set_size_inches(6.5, 0.9 + 0.4 * len(parts))
    names = list(dict.fromkeys(part for one in parts.values() for part in one))
    unknown = [name for name in names if name not in CAUSE_COLOURS]
    if unknown:
        raise ValueError(
            f"No colour is set for {', '.join(unknown)}. Known causes of memory: "
            f"{', '.join(CAUSE_COLOURS)}."
        )
    longest = max(sum(one.values()) for one in parts.values())
    unit, size, digits = ("GiB", 2**30, 1) if longest > 2**31 else ("MiB", 2**20, 0)
    left = np.zeros(len(parts))
    for name in names:
        width = np.array([one.get(name, 0) for one in parts.values()]) / size
        colour = CAUSE_COLOURS[name]
        axis.barh(list(parts), width, left=left, color=colour, label=plain_text(name))
        left += width
    for row, total in enumerate(left):
        axis.text(total, row, f" {total:,.{digits}f}", va="center", fontsize="small")
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set_xlabel(f"memory ({unit})")
    axis.legend(frameon=False, fontsize="small", ncols=len(names), loc="lower center",
                bbox_to_anchor=(0.5, 1.0))  # fmt: skip
    _draw_limits(axis, {n: byte / size for n, byte in (limits or {}).items()}, unit)
    return figure


def _draw_limits(axis: Axes, limits: Mapping[str, float], unit: str) -> None:
    """A line for each card that is near enough; the larger ones in words."""
    edge = 2.5 * axis.get_xlim()[1]
    near = {name: limit for name, limit in limits.items() if limit < edge}
    far = [f"{name} {limit:,.0f}" for name, limit in limits.items() if limit >= edge]
    for name, limit in near.items():
        axis.axvline(limit, color="0.3", linestyle="--", linewidth=1)
        axis.text(limit, 0.02, f" {name}", transform=axis.get_xaxis_transform(),
                  fontsize="small")  # fmt: skip
    if near:
        axis.set_xlim(right=1.15 * max(near.values()))
    if far:
        axis.set_xlabel(f"{axis.get_xlabel()}\nfarther right: {', '.join(far)} {unit}")


def plot_scores(scores: pd.DataFrame, metric: str = "miou") -> Figure:
    """Scores per region: a dot is the mean over seeds, a line their range.

    Args:
        scores: Long table with the columns method, region, seed and the metric.
        metric: Column to draw.
    """
    missing = {"method", "region", metric} - set(scores.columns)
    if missing:
        raise ValueError(
            f"The table has no column {', '.join(sorted(missing))}. It has "
            f"{', '.join(map(str, scores.columns))}."
        )
    regions, methods = list(scores["region"].unique()), list(scores["method"].unique())
    figure, (axis,) = new_panels(1, side=4.2)
    figure.set_size_inches(6.5, 0.9 + 0.22 * len(regions) * (len(methods) + 1))
    for shift, method in zip(
        np.linspace(-0.35, 0.35, len(methods)), methods, strict=True
    ):
        rows = scores[scores["method"] == method].groupby("region")[metric]
        table = rows.agg(["mean", "min", "max"]).reindex(regions)
        height = np.arange(len(regions)) + (shift if len(methods) > 1 else 0)
        spread = [table["mean"] - table["min"], table["max"] - table["mean"]]
        style = {**_style(method), "linestyle": "none", "elinewidth": 1.5}
        axis.errorbar(table["mean"], height, xerr=spread, markersize=5, **style)
    axis.set(xlabel=f"{metric} (dot: mean over seeds, line: lowest to highest)")
    _name_rows(axis, "region", regions)
    return figure


def plot_gap(gaps: pd.DataFrame) -> Figure:
    """Seen and unseen score of each method, with their intervals.

    Args:
        gaps: From `gk.region_gap`.
    """
    figure, (axis,) = new_panels(1, side=4.2)
    figure.set_size_inches(6.5, 1.2 + 0.45 * len(gaps))
    for height, row in enumerate(gaps.to_dict("records")):
        colour = METHOD_COLOURS.get(row["method"], OKABE_ITO["black"])
        axis.plot([row["seen"], row["unseen"]], [height] * 2, color=colour, alpha=0.4)
        for side, shift, face in (("seen", -0.1, "white"), ("unseen", 0.1, colour)):
            value = row[side]
            reach = [[value - row[f"{side}_low"]], [row[f"{side}_high"] - value]]
            style = {"marker": "o", "color": colour, "markerfacecolor": face}
            axis.errorbar(value, height + shift, xerr=reach, elinewidth=1.5, **style)
    axis.plot([], [], "o", color="0.3", markerfacecolor="white", label="seen regions")
    axis.plot([], [], "o", color="0.3", label="unseen regions")
    axis.set(xlabel=f"{gaps['metric'].iloc[0]} (line: bootstrap interval over chips)")
    _name_rows(axis, "method", gaps["method"])
    return figure


def _name_rows(axis: Axes, what: str, names: Sequence[str]) -> None:
    """One row per name, from the top down; the legend is outside."""
    axis.set_yticks(range(len(names)), [plain_text(name) for name in names])
    axis.invert_yaxis()
    axis.grid(axis="x", color="0.9")
    axis.set_axisbelow(True)
    axis.set_ylabel(what)
    axis.legend(
        frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1)
    )


def _style(method: str) -> dict[str, Any]:
    colour, marker = method_colour(method), method_marker(method)
    return {"color": colour, "marker": marker, "label": plain_text(method)}
