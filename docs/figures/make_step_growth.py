"""Draw how a training step grows, from rows in `docs/results/`.

    python docs/figures/make_step_growth.py

LoRA, in rows of `benchmarks/growth.py` and of `benchmarks/step.py`.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

FIGURES = Path(__file__).resolve().parent
RESULTS = FIGURES.parent / "results"
MILLIONS = {"tiny": 5.6, "100": 86.2, "300": 303.9}  # parameters of the backbones
# What changes, its label, and what stays.
AXES = [
    ("batch", "images in a batch", {"size": 224, "millions": MILLIONS["tiny"]}),
    ("size", "side of an image (px)", {"batch": 1, "millions": MILLIONS["tiny"]}),
    (
        "millions",
        "parameters of the backbone (millions)",
        {"batch": 2, "size": 224},
    ),
]
# Label -> colour, marker; of the Okabe-Ito palette, as in the kit's own plots.
LINES = {
    "TerraTorch": ("#d55e00", "s"),
    "kit, plain": ("#0072b2", "o"),
    "kit, checkpointing='blocks'": ("#009e73", "^"),
}
SETTINGS = {"plain": "kit, plain", "memory": "kit, checkpointing='blocks'"}


def main() -> None:
    """Read the rows, write the picture."""
    tables = [pd.read_csv(RESULTS / f"{name}.csv") for name in ("step_growth", "step")]
    rows = pd.concat(tables).query("mode == 'lora'")
    rows["millions"] = [
        next(n for key, n in MILLIONS.items() if f"_{key}_" in name)
        for name in rows["backbone"]
    ]
    figure, axes = plt.subplots(2, 3, figsize=(11, 6), layout="constrained")
    for column, (key, label, fixed) in enumerate(AXES):
        chosen = rows[(rows[list(fixed)] == pd.Series(fixed)).all(axis=1)]
        chosen = chosen.sort_values(key)
        draw(axes[0, column], chosen, key, "time", "CPU time of a step (s)")
        draw(axes[1, column], chosen, key, "saved", "kept for the backward pass (MiB)")
        axes[1, column].set_xlabel(label)
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(names))
    figure.savefig(FIGURES / "step_growth.png", dpi=110)


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
