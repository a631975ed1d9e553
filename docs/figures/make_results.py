"""Draw the figures of `docs/results.md` from the rows in `docs/results/`.

    python docs/figures/make_results.py

One figure per finding; each is a row of dots with the spread over seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

FIGURES = Path(__file__).resolve().parent
RESULTS = FIGURES.parent / "results"
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#767676"  # Okabe-Ito


def main() -> None:
    """Write one PNG per finding beside this script."""
    embedded_model()
    new_bands()
    decoder_start()
    continual()
    levers()
    terratorch()


def read(name: str) -> pd.DataFrame:
    """The rows of one file in `docs/results/`."""
    return pd.read_csv(RESULTS / f"{name}.csv")


def dots(
    axis: Axes, rows: pd.DataFrame, labels: Sequence[str], score: str, colour: str
) -> None:
    """Mean and standard deviation over seeds of each label, the first on top."""
    groups = rows.groupby("label")[score]
    means, spread = 100 * groups.mean(), 100 * groups.std()
    for place, label in enumerate(reversed(labels)):
        axis.errorbar(
            means[label], place, xerr=spread[label], color=colour, marker="o", capsize=3
        )
    axis.set_yticks(range(len(labels)), list(reversed(labels)))
    axis.margins(y=0.15)
    axis.grid(axis="x", alpha=0.3)


def save(figure: plt.Figure, name: str) -> None:
    """Write the picture and close it."""
    figure.savefig(FIGURES / f"results_{name}.png", dpi=110)
    plt.close(figure)


def ranking(
    name: str,
    rows: pd.DataFrame,
    title: str,
    height: float,
    labels: Sequence[str] | None = None,
) -> None:
    """A figure of test scores by label; by default all, in the order of the rows."""
    figure, axis = plt.subplots(figsize=(7, height), layout="constrained")
    dots(axis, rows, labels or list(dict.fromkeys(rows["label"])), "test", BLUE)
    axis.set_xlabel(title)
    save(figure, name)


def embedded_model() -> None:
    """Simulated burn scars in regions that were held out: what pretraining is worth."""
    rows = read("gates_runs").query("part == 'burn'")
    ranking("embedded_model", rows, "mIoU in unseen regions (%), five seeds", 2.2)


def new_bands() -> None:
    """Six bands in a network that was pretrained on three."""
    rows = read("methods_simulated").query("kind == 'score'")
    labels = [
        "RGB only: probe",
        "RGB only: LoRA",
        "DEFLECT-style",
        "SLR with patch embedding",
        "copied bands: probe",
        "copied bands: LoRA",
        "shared bands: probe",
        "shared bands: LoRA",
    ]
    title = "mIoU in the unseen savanna (%), five seeds"
    ranking("new_bands", rows, title, 3.2, labels)


def decoder_start() -> None:
    """The same decoders with two starts of their last layer."""
    rows = read("decoder_start").query(
        "task == 'flood' and rate == 0.001 and width != 256"
    )
    figure, axis = plt.subplots(figsize=(7, 2.4), layout="constrained")
    starts = {"0.01": (GREY, "deviation 0.01"), "2 / n": (BLUE, "deviation 2 / n")}
    for shift, (start, (colour, name)) in enumerate(starts.items()):
        chosen = rows[rows["start"] == start]
        for place, decoder in enumerate(("upernet", "unet", "fcn", "linear")):
            scores = 100 * chosen[chosen["decoder"] == decoder]["test"]
            axis.scatter(
                scores,
                [place + 0.2 * shift] * len(scores),
                color=colour,
                label=name if place == 0 else None,
            )
    axis.set_yticks(range(4), ["UPerNet", "UNet", "FCN", "linear"])
    axis.set_xlabel("mIoU in the unseen region (%), one dot a seed")
    axis.grid(axis="x", alpha=0.3)
    axis.set_ylim(-0.5, 3.5)
    axis.legend(loc="upper left")
    save(figure, "decoder_start")


def continual() -> None:
    """A probe after 64 steps of continual pretraining, against the teacher."""
    title = "accuracy on EuroSAT's unseen block (%), five seeds"
    ranking("continual", read("continual_objectives"), title, 2.8)


def levers() -> None:
    """What each lever of LoRA costs in time and saves in memory."""
    rows = read("levers").query("group == 'lora'").copy()
    columns = ["cpu_s", "activations_mib"]
    plain = rows[rows["lever"] == "plain"].set_index("seed")[columns]
    rows[columns] /= plain.loc[rows["seed"]].to_numpy()  # paired by seed
    ratios = rows.groupby("lever", sort=False)[columns].median()[::-1]
    figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
    axis.hlines(range(len(ratios)), ratios.min(axis=1), ratios.max(axis=1), "#cccccc")
    places, (time, kept) = range(len(ratios)), ratios.to_numpy().T
    axis.scatter(kept, places, color=GREEN, marker="s", label="activations")
    axis.scatter(time, places, color=ORANGE, marker="^", label="processor time")
    axis.set_yticks(places, list(ratios.index))
    axis.axvline(1, color=GREY, linewidth=1)
    axis.set_xlabel("ratio to plain LoRA")
    axis.margins(y=0.1)
    axis.grid(axis="x", alpha=0.3)
    axis.legend()
    save(figure, "levers")


def terratorch() -> None:
    """The same step in both systems: time and memory as ratios."""
    rows = read("step")
    # The plain path of each mode, and the lever that keeps least for the backward pass.
    rows = rows[rows["setting"].isin(["plain", "memory", "cached"])]
    names = [f"{mode}, {setting}" for mode, setting in rows[["mode", "setting"]].values]
    figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
    axis.errorbar(
        rows["time_ratio"],
        range(len(rows)),
        xerr=[
            rows["time_ratio"] - rows["time_low"],
            rows["time_high"] - rows["time_ratio"],
        ],
        color=ORANGE,
        marker="^",
        linestyle="",
        capsize=3,
        label="processor time",
    )
    axis.scatter(
        rows["saved_ratio"],
        range(len(rows)),
        color=GREEN,
        marker="s",
        label="kept for the backward pass",
    )
    axis.set_yticks(range(len(rows)), names)
    axis.axvline(1, color=GREY, linewidth=1)
    axis.set_xlabel("kit / TerraTorch")
    axis.grid(axis="x", alpha=0.3)
    axis.margins(y=0.1)
    axis.legend(loc="center left", bbox_to_anchor=(0.02, 0.55))
    save(figure, "terratorch")


if __name__ == "__main__":
    main()
