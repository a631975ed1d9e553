"""Three families of networks from random weights, with few labels, on equal terms.

    python benchmarks/families.py --out build/families --minutes 8

PhilEO's question in small: its Geo-Aware U-Net, its ViT with patches of 16, a
state-space network (EfficientViM) and its control without a state (MambaOut) learn
simulated building density in 128-pixel chips with PhilEO's ten bands. All begin from
random weights and train in full: as many steps, the same chips in the same order, the
same rate, a linear decoder. One region is unseen. Subsets of n chips a region are
nested. What a constant answer scores stands beside. No learning rate is searched, and
no weights were pretrained: this compares how fast shapes learn, not foundation models.
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


def main() -> None:
    """Train what is missing until the time is up, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/families"))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shots", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--steps", type=int, default=40)
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    cards = {card.name: card for card in gk.list_backbones()}
    data = gk.simulated_data(
        "building_density",
        cards["phileo_unet_44m"].bands,
        chips_per_region=max(given.shots),
        size=128,
        scene_size=128,
        chips_per_scene=1,
        test_regions=["delta"],  # it has towns
        val_fraction=0,
        batch_size=4,
    )
    rows = Rows(given.out / "families.csv", ("label", "n", "seed"))
    cells = [
        (label, n, seed)
        for seed in given.seeds
        for n in given.shots
        for label in (CONSTANT, *FAMILIES)
    ]
    for cell in rows.missing(cells, began + 60 * given.minutes):
        rows.put(cell, [measure(cell, data, given.steps)])
    write_page(given.out / "families.md", began, table(report(rows.read())))


def measure(
    cell: tuple[str, int, int], data: gk.ChipData, steps: int
) -> dict[str, Any]:
    """Train one cell and score it in the unseen region."""
    label, n, seed = cell
    few = data.n_shot(n, seed)
    began = time.process_time()
    model: torch.nn.Module = gk.baselines.Constant(few)
    if label != CONSTANT:
        model = train(label, few, steps, seed)
    rmse = gk.evaluate(model, data, "test")["overall"]["rmse"]
    return {"rmse": rmse, "cpu_s": time.process_time() - began}


def train(label: str, data: gk.ChipData, steps: int, seed: int) -> torch.nn.Module:
    """One family after `steps` steps from random weights."""
    name, options = FAMILIES[label]
    torch.manual_seed(seed)
    backbone = gk.load_backbone(
        name, bands=data.bands, weights=None, image_size=128, **options
    )
    gk.attach(backbone, "full")
    model = gk.build_model(backbone, "linear", data.task)
    gk.fit(
        model,
        data,
        epochs_of(data, steps),
        head_start="none",
        seed=seed,
        progress=False,
    )
    return model


def report(rows: pd.DataFrame) -> pd.DataFrame:
    """RMSE against n, mean and standard deviation over seeds, and the time of a run."""
    spread = rows.groupby(["label", "n"], sort=False)["rmse"].agg(["mean", "std"])
    text = spread.apply(lambda row: f"{row['mean']:.3f} ± {row['std']:.3f}", axis=1)
    lines = text.unstack("n").rename(columns=lambda n: f"RMSE, n = {n}")
    by_label = rows.groupby("label", sort=False)
    lines["seeds"] = by_label["seed"].nunique()
    lines["CPU s a run"] = by_label["cpu_s"].median().round(1)
    return lines


if __name__ == "__main__":
    main()
