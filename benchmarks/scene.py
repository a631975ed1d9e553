"""Whole scenes: `gk.predict_scene` against TerraTorch's tiled inference.

    python benchmarks/scene.py --out build/scene --sizes 1000 2000

One model on the same weights, windows of 224 pixels every 192, one thread, in turns as
in `step.py`. Reading the raster and writing the classes count on both sides. Memory is
the highest resident set of the process above what it held before.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import rasterio
from rasterio.transform import from_origin
from rows import Rows
from shared import table, write_page
from terratorch_environment import make_environment
from workers import Worker, ratios

import geopeft_kit as gk

WINDOW, STEP = 224, 192
PRECISIONS = ("32-true", "bf16-mixed")


def main() -> None:
    """Measure size by size, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/scene"))
    parser.add_argument("--backbone", default="prithvi_eo_v2_tiny_tl")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 2000])
    parser.add_argument("--batch", type=int, default=8, help="windows in a batch")
    parser.add_argument("--turns", type=int, default=7)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    began, python = time.monotonic(), make_environment()
    peer = Worker("scene_terratorch.py", python, given.out / "terratorch.log")
    kit = Worker("scene_kit.py", sys.executable, given.out / "kit.log")
    model = {"backbone": given.backbone, "size": WINDOW, "folder": str(given.out)}
    peer.ask("build", mode="frozen", batch=1, **model)
    kit.ask("build", **model)
    rows = Rows(given.out / "scene.csv", ("backbone", "size"))
    for size in given.sizes:
        found = measure(size, given.out, kit, peer, given.batch, given.turns)
        rows.put((given.backbone, size), found)
    kit.stop()
    peer.stop()
    write_page(given.out / "scene.md", began, report(rows.read()))


def measure(
    size: int,
    folder: Path,
    kit: Worker,
    peer: Worker,
    batch: int,
    turns: int,
) -> list[dict[str, Any]]:
    """One row for each precision of the kit, on a scene of one size."""
    source = write_scene(folder, size)
    job = {"source": str(source), "window": WINDOW, "step": STEP, "batch": batch}
    workers = {"peer": peer, **dict.fromkeys(PRECISIONS, kit)}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
    for turn in range(turns + 1):  # the first one warms up
        for name, worker in workers.items():
            target = str(folder / f"{name}.tif")
            taken = worker.ask("scene", target=target, setting=name, **job)
            found[name] += [taken] if turn or not turns else []
    seconds = {n: [taken["seconds"] for taken in turns] for n, turns in found.items()}
    mib = {n: max(taken["mib"] for taken in turns) for n, turns in found.items()}
    classes = {n: rasterio.open(folder / f"{n}.tif").read(1) for n in workers}
    return [
        {
            "precision": name,
            **speed(seconds[name], seconds["peer"]),
            "mib_kit": mib[name],
            "mib_terratorch": mib["peer"],
            "same_class": float((classes[name] == classes["peer"]).mean()),
        }
        for name in PRECISIONS
    ]


def speed(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """How many times the pixels of the peer the kit predicts in a CPU second."""
    found = ratios(theirs, ours)  # as many pixels in both, so their seconds over ours
    return {
        "seconds_kit": found["theirs"],
        "seconds_terratorch": found["ours"],
        **{f"speed_{name}": found[name] for name in ("ratio", "low", "high")},
        "turns": found["turns"],
    }


def write_scene(folder: Path, size: int) -> Path:
    """A raster of six bands: smooth random ground, uint16."""
    path = folder / f"scene_{size}.tif"
    if path.exists():
        return path
    random = np.random.default_rng(0)
    coarse = random.uniform(300, 4000, (6, size // 50 + 2, size // 50 + 2))
    ground = np.kron(coarse, np.ones((1, 50, 50)))[:, :size, :size]
    with rasterio.open(
        path, "w", driver="GTiff", width=size, height=size, count=6, dtype="uint16",
        crs="EPSG:32633", transform=from_origin(5e5, 5e6, 10, 10), tiled=True,
        compress="deflate",
    ) as raster:  # fmt: skip
        raster.descriptions = gk.bands.resolve_bands("hls")
        raster.scales = [1e-4] * 6
        raster.write((ground + random.normal(0, 50, ground.shape)).astype(np.uint16))
    return path


def report(rows: pd.DataFrame) -> str:
    """The rows as a table."""
    shown = pd.DataFrame(
        {
            "backbone": rows["backbone"],
            "side, px": rows["size"],
            "kit's precision": rows["precision"],
            "kit, px a CPU second": rows["size"] ** 2 / rows["seconds_kit"],
            "kit / TerraTorch, speed": [
                f"{row.speed_ratio:.2f} ({row.speed_low:.2f}, {row.speed_high:.2f})"
                for row in rows.itertuples()
            ],
            "memory, kit MiB": rows["mib_kit"],
            "memory, TerraTorch MiB": rows["mib_terratorch"],
            "same class": rows["same_class"],
        }
    )
    return table(shown.set_index("backbone"))


if __name__ == "__main__":
    main()
