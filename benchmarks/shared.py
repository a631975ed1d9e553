"""What the benchmark scripts share: chip folders, a rival without network, pages."""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch

import geopeft_kit as gk
from geopeft_kit.training.evaluate import HEADLINE

RGB = ("BLUE", "GREEN", "RED")
SCRIPTS = Path(__file__).resolve().parents[1] / "data_scripts"


def convert(name: str, arguments: argparse.Namespace, *options: str) -> Path:
    """Run a data script on what is on disk and return the chip folder."""
    source, root = arguments.data / name, arguments.out / "data"
    command = [sys.executable, str(SCRIPTS / f"{name}.py"), "--from", str(source)]
    subprocess.run([*command, "--root", str(root), *options], check=True)
    return root / name


def open_eurosat(arguments: argparse.Namespace) -> gk.ChipData:
    """EuroSAT's visible bands, split by longitude; converted where it is not yet."""
    folder = arguments.out / "data" / "eurosat_rgb"
    if not folder.exists():
        folder = convert("eurosat_rgb", arguments)
    return gk.ChipData(folder, RGB, split="index", batch_size=32)


def epochs_of(data: gk.ChipData, steps: int) -> int:
    """How many epochs come nearest to a number of steps, whatever the data's size."""
    return max(1, round(steps * data.batch_size / len(data.dataset("train"))))


def pixel_rows(
    data: gk.ChipData,
    seeds: Sequence[int],
    chips: int,
    label: str = "pixel statistics",
) -> pd.DataFrame:
    """Pixel statistics on the same subsets, as rows of the comparison."""
    score = HEADLINE[data.task][0]
    rows = []
    for seed in seeds:
        subset = data.subset(min(chips, len(data.dataset("train"))), seed)
        model = gk.baselines.PixelStatistics(subset, seed=seed)
        row = {"label": label, "method": "pixel_statistics", "seed": seed}
        for split in data.splits:
            if split != "train":
                row[split] = gk.evaluate(model, data, split)["overall"][score]
        rows.append(row)
    return pd.DataFrame(rows)


def search_table(searches: pd.DataFrame) -> pd.DataFrame:
    """One row a candidate: rate and score of each trial, the chosen one starred."""
    shown = {}
    for label, trials in searches.groupby("label", sort=False):
        shown[label] = {
            f"trial {number}": f"{trial.learning_rate:g}: {trial.val:.3f}"
            + (" *" if trial.chosen else "")
            for number, trial in enumerate(trials.itertuples(), start=1)
        }
        shown[label]["optimum at edge"] = "yes" if trials["at_edge"].any() else "no"
    return pd.DataFrame(shown).T


def table(frame: pd.DataFrame) -> str:
    """A frame as a Markdown table."""
    shown = frame.reset_index()
    cells = [[_cell(value) for value in row] for row in shown.itertuples(index=False)]
    rows = [list(map(str, shown.columns)), ["---"] * len(shown.columns), *cells]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _cell(value: object) -> str:
    if pd.isna(value):
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def setting(minutes: float) -> str:
    """Hardware, versions and time of this run."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"{time.strftime('%Y-%m-%d')}, {torch.get_num_threads()} CPU threads "
        f"({platform.machine()}), {gpu}, torch {torch.__version__.split('+')[0]}, "
        f"{minutes:.1f} minutes."
    )


def write_page(path: Path, began: float, *parts: str) -> None:
    """Write and print the parts of a report, and what it was measured on.

    Args:
        path: The Markdown file.
        began: `time.monotonic()` at the start of the run.
        parts: Paragraphs and tables.
    """
    page = "\n\n".join([*parts, setting((time.monotonic() - began) / 60)])
    path.write_text(page + "\n", encoding="utf-8")
    print(page, flush=True)
