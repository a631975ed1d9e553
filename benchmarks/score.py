"""Does a model learn the same in the kit and in TerraTorch? Real pixels, equal steps.

    python benchmarks/score.py --data DIR --out build/score

Land cover on the five Sentinel-2 places of TerraMesh (DIR/terramesh): windows in the
west of each place for training, in its east for scoring. Both systems begin with the
same weights, see the same chips in the same order and take as many steps of AdamW at
the same rate, each in its own process and environment, with its own method, optimiser
and training step. The kit trains as it is, and with its settings for memory. A seed
draws weights and order. Classes are scored by one metric, on the windows of the east.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rows import Rows
from safetensors.torch import load_file, save_file
from shared import convert, table, write_page
from step import BLOCKS, SETTINGS
from terratorch_environment import make_environment
from torch import Tensor
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_jaccard_index,
)
from workers import Worker

import geopeft_kit as gk

SIDE, BATCH = 64, 8  # an even number of patches: odd grids differ in the UNets
LEVERS: dict[str, dict[str, Any]] = {"plain": {}, "memory": BLOCKS}


def main() -> None:
    """Train what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("build/score"))
    parser.add_argument("--backbone", default="prithvi_eo_v2_tiny_tl")
    parser.add_argument("--modes", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    began, python = time.monotonic(), make_environment()
    kit = Worker("step_kit.py", sys.executable, given.out / "kit.log")
    peer = Worker("step_terratorch.py", python, given.out / "terratorch.log")
    classes = write_chips(given)
    rows = Rows(given.out / "score.csv", ("mode", "seed"))
    cells = [(mode, seed) for mode in given.modes for seed in given.seeds]
    for mode, seed in rows.missing(cells):
        rows.put((mode, seed), measure(mode, seed, classes, given, kit, peer))
    kit.stop()
    peer.stop()
    write_page(given.out / "score.md", began, table(report(rows.read())))


def measure(
    mode: str,
    seed: int,
    classes: int,
    given: argparse.Namespace,
    kit: Worker,
    peer: Worker,
) -> list[dict[str, Any]]:
    """One row for each system and setting, all from the same start."""
    chips = given.out / f"chips_{seed}.st"
    model = {
        "mode": mode,
        "backbone": given.backbone,
        "size": SIDE,
        "batch": BATCH,
        "folder": str(given.out),
        "classes": classes,
    }
    peer.ask("build", seed=seed, **model)
    answers = {"TerraTorch": given.out / "terratorch.classes"}
    peer.ask("learn", chips=str(chips), answers=str(answers["TerraTorch"]))
    for name, levers in LEVERS.items():
        path = answers[f"kit, {name}"] = given.out / f"{name}.classes"
        kit.ask("build", setting=name, levers=levers, **model)
        kit.ask("learn", setting=name, chips=str(chips), answers=str(path))
    kit.ask("clear")
    wanted = load_file(chips)["unseen_mask"]
    found = {name: load_file(path)["classes"] for name, path in answers.items()}
    valid = wanted != 255
    return [
        {
            "system": name,
            **scores(guess, wanted, classes),
            "same class": float((guess == found["TerraTorch"])[valid].float().mean()),
        }
        for name, guess in found.items()
    ]


def scores(guess: Tensor, wanted: Tensor, classes: int) -> dict[str, float]:
    """Mean intersection over union of the classes that occur, and accuracy."""
    options: dict[str, Any] = {"num_classes": classes, "ignore_index": 255}
    accuracy = multiclass_accuracy(guess, wanted, average="micro", **options)
    miou = multiclass_jaccard_index(guess, wanted, **options)
    return {"miou": float(miou), "accuracy": float(accuracy)}


def report(rows: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds, and the largest difference of a seed to TerraTorch."""
    lines = {}
    for (mode, system), own in rows.groupby(["mode", "system"], sort=False):
        peer = rows[(rows["mode"] == mode) & (rows["system"] == "TerraTorch")]
        apart = own.set_index("seed")["miou"] - peer.set_index("seed")["miou"]
        lines[f"{mode}: {system}"] = {
            "seeds": len(own),
            "mIoU": round(own["miou"].mean(), 4),
            "accuracy": round(own["accuracy"].mean(), 4),
            "mIoU apart, at most": round(apart.abs().max(), 4),
            "pixels of the same class": round(own["same class"].mean(), 4),
        }
    return pd.DataFrame(lines).T.rename_axis("trained in")


def write_chips(given: argparse.Namespace) -> int:
    """Write chips and orders for both systems; returns the number of classes."""
    folder = given.out / "data" / "terramesh"
    if not folder.exists():
        folder = convert("terramesh", given, "--chip", str(SIDE), "--buffer", "16")
    data = gk.ChipData(folder, bands="hls", split="index")
    norm = gk.load_backbone(given.backbone, weights=None).card.normalisation
    parts = {}
    for split in ("train", "test"):
        chips = [data.dataset(split)[i] for i in range(len(data.dataset(split)))]
        image = torch.stack([chip["image"] for chip in chips])
        mean, std = (torch.tensor(v)[:, None, None] for v in (norm.mean, norm.std))
        parts[split] = (image * norm.scale - mean) / std
        parts[f"{split}_mask"] = torch.stack([chip["mask"] for chip in chips])
    for seed in given.seeds:
        draw = torch.Generator().manual_seed(seed)
        size = given.steps, BATCH
        order = torch.randint(len(parts["train"]), size, generator=draw)
        file = {
            "image": parts["train"],
            "mask": parts["train_mask"],
            "order": order,
            "unseen": parts["test"],
            "unseen_mask": parts["test_mask"],
        }
        save_file(file, given.out / f"chips_{seed}.st")
    return data.num_classes


if __name__ == "__main__":
    main()
