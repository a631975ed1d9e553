"""Draw the header of notebook 11 from the rows of `benchmarks/few_shot.py`.

    python docs/figures/make_few_shot.py

A line is drawn through the n that were run most often.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import geopeft_kit as gk

FIGURES = Path(__file__).resolve().parent
ROWS = FIGURES.parent / "results" / "few_shot.csv"
# label -> the method whose colour it wears
LINES = {
    "frozen": "frozen",
    "full": "full",
    "pixel statistics": "pixel_statistics",
}


def draw(axis: Axes, rows: pd.DataFrame, score: str, bucket: str) -> None:
    """Mean over seeds as lines, seeds as dots, and the constant answer."""
    # only the n that every line has
    counts = rows.groupby("n")["seed"].nunique()
    rows = rows[rows["n"].isin(counts[counts == counts.max()].index)]
    for label, method in LINES.items():
        own = rows[rows["label"] == label]
        if own.empty:
            continue
        colour, marker = gk.plots.method_colour(method), gk.plots.method_marker(method)
        axis.scatter(own["n"], own[score], color=colour, s=12, alpha=0.5)
        means = own.groupby("n")[score].mean()
        axis.plot(means, color=colour, marker=marker, label=label)
    constant = rows[rows["label"] == "constant"].groupby("n")[score].mean()
    axis.plot(constant, color="#0072b2", ls="--", label="constant")
    axis.set(xscale="log", xlabel=f"labelled chips of each {bucket}", ylim=0)
    axis.set_xticks(constant.index, constant.index)
    axis.set_xticks([], minor=True)
    axis.legend(frameon=False, fontsize="small")


def main() -> None:
    """Write the picture."""
    rows = pd.read_csv(ROWS)
    figure = Figure(figsize=(9, 3.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw(left, rows[rows["study"] == "building_density"], "rmse", "region")
    left.set(ylabel="RMSE", title="building density, simulated, delta unseen")
    draw(right, rows[rows["study"] == "eurosat"], "accuracy", "class")
    right.set(ylabel="accuracy", title="EuroSAT, real, an unseen longitude block")
    seeds = rows.groupby("study")["seed"].nunique()
    note = f"{seeds['building_density']} seeds left, {seeds['eurosat']} right"
    figure.supxlabel(f"small dots: {note}", fontsize="small")
    figure.savefig(FIGURES / "11_few_shot.png", dpi=85)


if __name__ == "__main__":
    main()
