"""The memory estimate against the tracker, cell by cell.

    python benchmarks/memory_estimate.py --out build/memory_estimate --minutes 20

Each cell predicts a run (`estimate_memory`), trains it for one step (`fit`) and writes
both down. Random weights and random pixels: memory does not look at numbers. The order
mixes the factors, so that a run that is cut short has seen all of them; rows are
written as they come and a rerun goes on.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from rasterio.transform import from_origin
from rows import Rows
from shared import table, write_page

import geopeft_kit as gk
from geopeft_kit.data import Chip, write_chip_folder

BANDS = ("BLUE", "GREEN", "RED", "NIR_NARROW", "SWIR_1", "SWIR_2")
BACKBONES = {
    "ViT-B": "prithvi_eo_v2_100_tl",
    "Swin-T": "timm:swin_tiny_patch4_window7_224",
    "ConvNeXt-T": "timm:convnext_tiny",
}
METHODS = ("full", "frozen", "lora", "vpt", "bias", "vit_adapter")
DECODERS = ("unet", "upernet", "linear")
BATCHES, SIZES = (2, 4), (64, 128)
CAUSES = ("weights", "gradients", "optimiser", "activations")
CELL = ("backbone", "method", "decoder", "batch", "size")


def main() -> None:
    """Measure cells until the time is up, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/memory_estimate"))
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    rows = Rows(arguments.out / "memory_estimate.csv", CELL)
    for cell in rows.missing(cells(), began + 60 * arguments.minutes):
        rows.put(cell, [measure(cell, arguments.out)])
    write_page(arguments.out / "memory_estimate.md", began, report(rows.read()))


def cells() -> list[tuple]:
    """All cells; each pass over backbones and methods meets all other factors."""
    pairs = [
        (backbone, method)
        for backbone, method in itertools.product(BACKBONES, METHODS)
        if backbone == "ViT-B" or method not in ("vpt", "vit_adapter")
    ]
    others = list(itertools.product(DECODERS, BATCHES, SIZES))
    return [
        (*pair, *others[(turn + 5 * number) % len(others)])
        for turn in range(len(others))
        for number, pair in enumerate(pairs)
    ]


def measure(cell: tuple, folder: Path) -> dict[str, float]:
    """Predict and train one cell; MiB for each cause, predicted and measured."""
    backbone, method, decoder, batch, size = cell
    torch.manual_seed(0)
    options = {"new_bands": "random"} if backbone != "ViT-B" else {}
    name, pixels = BACKBONES[backbone], max(size, 64)
    network = gk.load_backbone(name, BANDS, weights=None, image_size=pixels, **options)
    gk.attach(network, method)
    model = gk.build_model(network, decoder)
    began = time.process_time()
    predicted = gk.estimate_memory(model, batch, image_size=size)
    seconds = time.process_time() - began
    data = random_data(folder / f"chips_{batch}_{size}", batch, size)
    found = gk.fit(model, data, 1, head_start="none", progress=False).resources
    row = {"estimate_cpu_s": round(seconds, 2)}
    for cause in CAUSES:
        row[f"{cause}_predicted"] = getattr(predicted, f"{cause}_mib")
        row[f"{cause}_measured"] = getattr(found, f"{cause}_mib")
    return row


def random_data(folder: Path, batch: int, size: int) -> gk.ChipData:
    """One batch of random chips."""
    random = np.random.default_rng(0)
    if not (folder / "dataset.json").exists():
        chips = (
            Chip(
                name=f"chip_{number}",
                image=random.integers(0, 5000, (6, size, size), np.uint16),
                mask=random.integers(0, 2, (size, size), np.uint8),
                region="random",
                split="train",
                crs="EPSG:32633",
                transform=from_origin(5e5 + number * 20 * size, 5e6, 10, 10),
            )
            for number in range(batch)
        )
        info = {"name": "Random pixels", "task": "segmentation", "bands": BANDS}
        classes = ("low", "high")
        write_chip_folder(folder, chips, info | {"classes": classes, "scale": 1e-4})
    return gk.ChipData(folder, split="index", batch_size=batch)


def report(rows: pd.DataFrame) -> str:
    """Worst cell by cause, then activations of every cell."""
    worst = {
        cause: (rows[f"{cause}_predicted"] - rows[f"{cause}_measured"]).abs().max()
        for cause in CAUSES
    }
    shown = rows[[*CELL]].copy()
    shown["predicted MiB"] = rows["activations_predicted"]
    shown["measured MiB"] = rows["activations_measured"]
    shown["ratio"] = rows["activations_predicted"] / rows["activations_measured"]
    lines = [
        f"{len(rows)} of {len(cells())} cells. Largest difference in MiB: "
        + ", ".join(f"{cause} {value:.3f}" for cause, value in worst.items())
        + ". Activations:",
        table(shown.set_index([*CELL])),
    ]
    return "\n\n".join(lines)


if __name__ == "__main__":
    main()
