"""How a step's time and memory grow with batch, image and model: kit and TerraTorch.

    python benchmarks/growth.py --out build/growth --axes batch image model

LoRA (r = 8 on q and v) with the UNet of `step.py`, one number changed at a time. Rows
are written as they come and a rerun goes on. `docs/figures/make_step_growth.py` draws
them.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from rows import Rows
from step import SETTINGS, measure
from terratorch_environment import make_environment
from workers import Worker

START = {"backbone": "prithvi_eo_v2_tiny_tl", "size": 224, "batch": 1}
# Axis -> what changes, its values, and what else differs from the start.
AXES: dict[str, tuple[str, list[Any], dict[str, Any]]] = {
    "batch": ("batch", [1, 2, 4, 8], {}),
    "image": ("size", [64, 128, 224, 448], {}),
    "model": (
        "backbone",
        ["prithvi_eo_v2_tiny_tl", "prithvi_eo_v2_100_tl", "prithvi_eo_v2_300_tl"],
        {"batch": 2},
    ),
}
SHOWN = ("plain", "memory")


def main() -> None:
    """Measure cell by cell until the time is up."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/growth"))
    parser.add_argument("--axes", nargs="+", default=list(AXES), choices=AXES)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--turns", type=int, default=3)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    began, python = time.monotonic(), make_environment()
    kit = Worker("step_kit.py", sys.executable, given.out / "kit.log")
    peer = Worker("step_terratorch.py", python, given.out / "terratorch.log")
    rows = Rows(given.out / "step_growth.csv", tuple(START))
    settings = {name: SETTINGS["lora"][name] for name in SHOWN}
    until = began + 60 * given.minutes
    for cell in rows.missing(cells(given.axes), until):
        model = dict(zip(START, cell, strict=True)) | {"folder": str(given.out)}
        turns = given.turns, until
        rows.put(cell, measure("lora", model, kit, peer, turns, settings))
    kit.stop()
    peer.stop()


def cells(axes: list[str]) -> list[tuple[Any, ...]]:
    """The start with one number changed, axis by axis, smallest first."""
    return [
        tuple({**START, **others, key: value}.values())
        for key, values, others in (AXES[axis] for axis in axes)
        for value in values
    ]


if __name__ == "__main__":
    main()
