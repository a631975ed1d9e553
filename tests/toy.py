"""A toy data set that a few steps can learn: bright near infrared is class 1."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rasterio.transform import from_origin

import geopeft_kit as gk
from geopeft_kit.data.folder import Chip, write_chip_folder

BANDS = ("BLUE", "GREEN", "RED", "NIR_NARROW", "SWIR_1", "SWIR_2")
SPLITS = ["train"] * 4 + ["val"] + ["test"]


def toy_data(
    folder: Path,
    task: str = "segmentation",
    chips: int = 24,
    size: int = 32,
    batch_size: int = 4,
) -> gk.ChipData:
    """Chips whose lower part reflects near infrared; the border line is the lesson."""
    info = {
        "name": "Toy",
        "task": task,
        "bands": BANDS,
        "classes": () if task == "regression" else ("low", "high"),
        "scale": 1e-4,
    }
    if not (folder / "dataset.json").exists():
        write_chip_folder(folder, _chips(task, chips, size), info)
    return gk.ChipData(folder, split="index", batch_size=batch_size)


def _chips(task: str, chips: int, size: int) -> Iterator[Chip]:
    random = np.random.default_rng(0)
    for number in range(chips):
        image = random.uniform(500, 1500, (len(BANDS), size, size))
        border = int(random.integers(4, size - 4))
        truth = np.zeros((size, size), np.uint8)
        truth[border:] = 1
        image[3] += 2500.0 * truth
        target: dict = {"mask": truth}
        if task == "regression":
            target = {"mask": (image[3] * 1e-4).astype(np.float32)}
        if task == "classification":
            target = {"label": int(border < size // 2)}
        split = SPLITS[number % len(SPLITS)]
        yield Chip(
            name=f"chip_{number:03d}",
            image=image.astype(np.uint16),
            region="far" if split == "test" else "near",
            split=split,
            crs="EPSG:32633",
            transform=from_origin(500_000 + number * 2 * size * 10, 5e6, 10, 10),
            **target,
        )
