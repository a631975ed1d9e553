"""A toy data set that a few steps can learn: bright near infrared is class 1."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rasterio.transform import from_origin

import geopeft_kit as gk
from geopeft_kit.data import Chip, write_chip_folder

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


def change_data(
    folder: Path, classes: int, chips: int = 12, size: int = 32
) -> gk.ChipData:
    """Pairs of three-band images; rectangles got brighter between the dates."""
    random = np.random.default_rng(0)
    names = [f"class {number}" for number in range(classes)]
    info = {
        "name": "Toy changes",
        "task": "change",
        "bands": ("RED", "GREEN", "BLUE"),
        "classes": names,
        "scale": 1e-4,
    }

    def pairs() -> Iterator[Chip]:
        for number in range(chips):
            before = random.uniform(500, 1500, (3, size, size))
            after = random.uniform(500, 1500, (3, size, size))
            mask = np.zeros((size, size), np.uint8)
            for label in range(1, classes):
                row = int(random.integers(0, size - 12))
                mask[row : row + 12, (label - 1) * 16 : label * 16] = label
            for label in range(1, classes):
                after[:, mask == label] += 2500 * label
            split = ("train", "train", "val", "test")[number % 4]
            yield Chip(
                name=f"chip_{number:03d}",
                image=before.astype(np.uint16),
                image_after=after.astype(np.uint16),
                mask=mask,
                region="far" if split == "test" else "near",
                split=split,
                crs="EPSG:32633",
                transform=from_origin(500_000 + number * 2 * size * 10, 5e6, 10, 10),
            )

    write_chip_folder(folder, pairs(), info)
    return gk.ChipData(folder, split="index", batch_size=3)
