"""Draw how a training step grows, from `docs/results/step_growth.csv`.

    python docs/figures/make_step_growth.py

The rows are those of `benchmarks/growth.py`.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

FIGURES = Path(__file__).resolve().parent
MILLIONS = {"tiny": 5.4, "100": 86.2, "300": 304.0}  # parameters of the backbones
AXES = {
    "batch": ("batch", "images in a batch"),
    "image": ("size", "side of an image (px)"),
    "model": ("millions", "parameters of the backbone (millions)"),
}
# Label -> colour, marker; of the Okabe-Ito palette, as in the kit's own plots.
LINES = {
    "TerraTorch": ("#d55e00", "s"),
    "kit, plain": ("#0072b2", "o"),
    "kit, checkpointing='blocks'": ("#009e73", "^"),
}
SETTINGS = {"plain": "kit, plain", "memory": "kit, checkpointing='blocks'"}


def main() -> None:
    """Read the rows, write the picture."""
    rows = pd.read_csv(FIGURES.parent / "results" / "step_growth.csv")
    rows["millions"] = [
        next(n for key, n in MILLIONS.items() if f"_{key}_" in name)
        for name in rows["backbone"]
    ]
    figure, axes = plt.subplots(2, 3, figsize=(11, 6), layout="constrained")
    for column, (key, label) in enumerate(AXES.values()):
        chosen = along(rows, key)
        draw(axes[0, column], chosen, key, "time", "CPU time of a step (s)")
        draw(axes[1, column], chosen, key, "saved", "kept for the backward pass (MiB)")
        axes[1, column].set_xlabel(label)
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(names))
    figure.savefig(FIGURES / "step_growth.png", dpi=110)


def along(rows: pd.DataFrame, key: str) -> pd.DataFrame:
    """The rows in which only one number differs from the start, batch 1 at 224 px."""
    start = {"batch": 1, "size": 224, "millions": MILLIONS["tiny"]}
    others = [(rows[name] == value) for name, value in start.items() if name != key]
    return rows[others[0] & others[1]].sort_values(key)


def draw(axis: Axes, rows: pd.DataFrame, key: str, what: str, label: str) -> None:
    """One panel with logarithmic axes: proportional is a straight line of slope one."""
    parts = {name: rows[rows["setting"] == kind] for kind, name in SETTINGS.items()}
    lines = {"TerraTorch": (parts["kit, plain"], f"{what}_theirs")}
    lines |= {name: (part, f"{what}_ours") for name, part in parts.items()}
    for name, (part, column) in lines.items():
        colour, marker = LINES[name]
        axis.plot(part[key], part[column], color=colour, marker=marker, label=name)
    axis.set(xscale="log", yscale="log", ylabel=label)
    axis.set_xticks(sorted(set(rows[key])), [f"{n:g}" for n in sorted(set(rows[key]))])
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    axis.grid(alpha=0.3)


if __name__ == "__main__":
    main()
