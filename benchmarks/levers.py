"""What each lever of `fit` saves, and what it does to the score.

    python benchmarks/levers.py --out build/levers --minutes 20

Simulated floods, `geopeft_tiny`, the unseen region "savanna". Every lever trains the
same seeds as the plain run of its group, with all else equal; times are process CPU
time of one thread. Rows are written as they come and a rerun goes on.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rows import Rows
from shared import table, write_page

import geopeft_kit as gk

# group -> method and its options; lever -> arguments of fit
GROUPS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {}),
    "lora, last:2": ("lora", {"layers": "last:2"}),
    "frozen": ("frozen", {}),
    "frozen, augmented": ("frozen", {}),
}
LEVERS: dict[str, dict[str, dict[str, Any]]] = {
    "lora": {
        "plain": {},
        "checkpointing mlp": {"checkpointing": "mlp"},
        "checkpointing blocks": {"checkpointing": "blocks"},
        "bf16-mixed": {"precision": "bf16-mixed"},
        "frozen bf16": {"frozen_precision": "bf16"},
        "frozen bf16 + blocks": {"frozen_precision": "bf16", "checkpointing": "blocks"},
        "fused": {"optimiser": "fused"},
    },
    "lora, last:2": {"plain": {}, "cache_prefix": {"cache_prefix": True}},
    "frozen": {
        "plain": {"cache_features": False},
        "cache_features": {"cache_features": True},
    },
    "frozen, augmented": {
        "plain": {"cache_features": False},
        "cache_features": {"cache_features": True},
    },
}


def main() -> None:
    """Train cells until the time is up, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/levers"))
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--chips", type=int, default=32, help="training chips")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    rows = Rows(arguments.out / "levers.csv", ("group", "lever", "seed"))
    data = gk.simulated_data("flood", "hls", chips_per_region=24)
    due = cells(arguments.seeds)
    for cell in rows.missing(due, began + 60 * arguments.minutes):
        subset = data.subset(min(arguments.chips, len(data.dataset("train"))), cell[2])
        rows.put(cell, [measure(cell, subset, arguments.epochs)])
    notes = f"{data!r}, {arguments.chips} training chips, {arguments.epochs} epochs."
    write_page(arguments.out / "levers.md", began, notes, report(rows.read()))


def cells(seeds: list[int]) -> list[tuple[str, str, int]]:
    """Group, lever and seed; a whole seed before the next."""
    return [
        (group, lever, seed)
        for seed in seeds
        for group, levers in LEVERS.items()
        for lever in levers
    ]


def measure(
    cell: tuple[str, str, int], data: gk.ChipData, epochs: int
) -> dict[str, Any]:
    """Train one cell: score in the unseen region, memory, CPU seconds."""
    group, lever, seed = cell
    method, options = GROUPS[group]
    data.augment = group.endswith("augmented")
    torch.manual_seed(seed)
    backbone = gk.load_backbone("geopeft_tiny")
    gk.attach(backbone, method, **options)
    model = gk.build_model(backbone, "linear")
    began = time.process_time()
    run = gk.fit(
        model, data, epochs, seed=seed, head_start="calibrate", progress=False,
        **LEVERS[group][lever],
    )  # fmt: skip
    seconds = time.process_time() - began
    return {
        "miou": gk.evaluate(model, data, "test")["overall"]["miou"],
        "cpu_s": seconds,
        "step_ms": run.resources.step_ms,
        "weights_mib": run.resources.weights_mib,
        "optimiser_mib": run.resources.optimiser_mib,
        "activations_mib": run.resources.activations_mib,
    }


def report(rows: pd.DataFrame) -> str:
    """Mean over seeds; scores also as the difference to the plain run of the seed."""
    plain = rows[rows["lever"] == "plain"].set_index(["group", "seed"])
    at = pd.MultiIndex.from_frame(rows[["group", "seed"]])
    rows = rows.assign(
        difference=rows["miou"].to_numpy() - plain["miou"].reindex(at).to_numpy(),
        time=rows["cpu_s"].to_numpy() / plain["cpu_s"].reindex(at).to_numpy(),
        kept=rows["activations_mib"].to_numpy()
        / plain["activations_mib"].reindex(at).to_numpy(),
    )
    grouped = rows.groupby(["group", "lever"], sort=False)
    shown = pd.DataFrame(
        {
            "seeds": grouped.size(),
            "mIoU, unseen region": grouped["miou"].mean(),
            "difference to plain": grouped["difference"].mean(),
            "largest |difference|": grouped["difference"].agg(lambda d: d.abs().max()),
            "CPU time, ratio": grouped["time"].median(),
            "activations MiB": grouped["activations_mib"].mean(),
            "activations, ratio": grouped["kept"].mean(),
            "weights MiB": grouped["weights_mib"].mean(),
        }
    )
    return table(shown)


if __name__ == "__main__":
    main()
