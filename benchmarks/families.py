"""Three families of networks from random weights, with few labels, on equal terms.

    python benchmarks/families.py --out build/families --minutes 8

PhilEO's question in small: its Geo-Aware U-Net, its ViT with patches of 16, a
state-space network (EfficientViM) and its control without a state (MambaOut) learn
simulated building density (delta unseen) or land cover (savanna unseen) with PhilEO's
ten bands. All begin from random weights and train in full: as many steps, the same
chips in the same order, the same rate, a linear decoder. Subsets of n chips a region
are nested. What a constant answer scores stands beside. No learning rate is searched,
and no weights were pretrained: this compares how fast shapes learn, not foundation
models.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rows import Rows
from shared import epochs_of, table, write_page

import geopeft_kit as gk

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "U-Net 44M": ("phileo_unet_44m", {}),
    "ViT 100M, patch 16": ("phileo_vit_100m", {"patch": 16}),
    "EfficientViM m1": ("timm:efficientvim_m1", {"new_bands": "random"}),
    "MambaOut femto": ("timm:mambaout_femto", {"new_bands": "random"}),
}
CONSTANT = "constant"
# task -> unseen region, headline score
TASKS = {"building_density": ("delta", "rmse"), "land_cover": ("savanna", "miou")}
SIDE = 128  # pixels of a chip; the U-Net is locked to it


def main() -> None:
    """Train what is missing until the time is up, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/families"))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--tasks", nargs="+", default=[*TASKS], choices=TASKS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shots", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--steps", type=int, default=40)
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    rows = Rows(given.out / "families.csv", ("task", "label", "n", "seed"))
    for task in given.tasks:
        data = open_task(task, max(given.shots))
        cells = [
            (task, label, n, seed)
            for seed in given.seeds
            for n in given.shots
            for label in (CONSTANT, *FAMILIES)
        ]
        for cell in rows.missing(cells, began + 60 * given.minutes):
            rows.put(cell, [measure(cell, data, given.steps)])
    write_page(given.out / "families.md", began, report(rows.read()))


def open_task(task: str, chips: int) -> gk.ChipData:
    """Simulated chips with PhilEO's bands; the unseen region is the test."""
    cards = {card.name: card for card in gk.list_backbones()}
    return gk.simulated_data(
        task,
        cards["phileo_unet_44m"].bands,
        chips_per_region=chips,
        size=SIDE,
        scene_size=SIDE,
        chips_per_scene=1,
        test_regions=[TASKS[task][0]],
        val_fraction=0,
        batch_size=4,
    )


def measure(
    cell: tuple[str, str, int, int], data: gk.ChipData, steps: int
) -> dict[str, Any]:
    """Train one cell and score it in the unseen region."""
    task, label, n, seed = cell
    few = data.n_shot(n, seed)
    began = time.process_time()
    model: torch.nn.Module = gk.baselines.Constant(few)
    if label != CONSTANT:
        model = train(label, few, steps, seed)
    metric = TASKS[task][1]
    score = gk.evaluate(model, data, "test")["overall"][metric]
    return {"metric": metric, "score": score, "cpu_s": time.process_time() - began}


def train(label: str, data: gk.ChipData, steps: int, seed: int) -> torch.nn.Module:
    """One family after `steps` steps from random weights."""
    name, options = FAMILIES[label]
    torch.manual_seed(seed)
    backbone = gk.load_backbone(
        name, bands=data.bands, weights=None, image_size=SIDE, **options
    )
    gk.attach(backbone, "full")
    model = gk.build_model(backbone, "linear", data.task, data.num_classes or 2)
    gk.fit(
        model,
        data,
        epochs_of(data, steps),
        head_start="none",
        seed=seed,
        progress=False,
    )
    return model


def report(rows: pd.DataFrame) -> str:
    """Score against n, mean and deviation over seeds, and the time of a run."""
    parts = []
    for task, own in rows.groupby("task", sort=False):
        spread = own.groupby(["label", "n"], sort=False)["score"].agg(["mean", "std"])
        text = spread.apply(lambda r: f"{r['mean']:.3f} ± {r['std']:.3f}", axis=1)
        lines = text.unstack("n").add_prefix(f"{own['metric'].iloc[0]}, n = ")
        by_label = own.groupby("label", sort=False)
        lines["seeds"] = by_label["seed"].nunique()
        lines["CPU s a run"] = by_label["cpu_s"].median().round(1)
        parts += [f"### {task}", table(lines)]
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
