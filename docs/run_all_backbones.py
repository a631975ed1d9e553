"""Load every backbone at full size once, run it forward and backward, and note it.

    python docs/run_all_backbones.py
    python docs/run_all_backbones.py --only galileo_nano clay_v1

Weights are random: this shows that each network builds, gives four maps and lets
gradients through, and what that costs. Each runs in a process of its own, so that the
peak of one says nothing about the next. Writes docs/results/all_backbones.csv.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

import geopeft_kit as gk
from geopeft_kit.backbones import Backbone

TABLE = Path(__file__).parent / "results" / "all_backbones.csv"
LARGEST = 700e6  # parameters; gradients double the memory of the weights
COLUMNS = (
    "backbone",
    "parameters",
    "image",
    "maps",
    "load_s",
    "forward_s",
    "backward_s",
    "peak_gib",
    "result",
)


def first_maps(backbone: Backbone) -> tuple[list[torch.Tensor], int]:
    """The maps of a random image, and its side: small, or the card's where locked."""
    stride, own = max(backbone.strides), backbone.card.image_size
    small = max(4 * stride, 64 // stride * stride)
    try:
        return backbone(torch.rand(1, len(backbone.bands), small, small)), small
    except ValueError as error:
        if "locked" not in str(error):
            raise
        return backbone(torch.rand(1, len(backbone.bands), own, own)), own


def run_one(name: str) -> dict[str, object]:
    """Load one backbone, and run one image forward and backward.

    Raises:
        RuntimeError: if a map or a gradient is not finite, or no gradient arrives.
    """
    start = time.perf_counter()
    backbone = gk.load_backbone(name, weights=None)
    loaded = time.perf_counter()
    maps, side = first_maps(backbone)
    forward = time.perf_counter()
    torch.stack([one.square().mean() for one in maps]).sum().backward()
    backward = time.perf_counter()
    gradients = [p.grad for p in backbone.parameters() if p.grad is not None]
    if not gradients or not all(bool(t.isfinite().all()) for t in [*maps, *gradients]):
        raise RuntimeError(f"{name}: a map or a gradient is missing or not finite")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux
    return {
        "backbone": name,
        "parameters": backbone.card.parameters,
        "image": f"{len(backbone.bands)} x {side} x {side}",
        "maps": "; ".join(" x ".join(map(str, one.shape[1:])) for one in maps),
        "load_s": round(loaded - start, 1),
        "forward_s": round(forward - loaded, 2),
        "backward_s": round(backward - forward, 2),
        "peak_gib": round(peak / 2**20, 2),
        "result": "ok",
    }


def run_apart(name: str) -> dict[str, object]:
    """`run_one` in a new process; a failure becomes the result, in words."""
    command = [sys.executable, __file__, "--one", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    words = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
    return {"backbone": name, "result": f"failed: {words}"}


def run_all(names: list[str]) -> list[dict[str, object]]:
    """Run the named backbones one after the other; each has its row at once."""
    rows: list[dict[str, object]] = []
    sizes = {card.name: card.parameters for card in gk.list_backbones()}
    for name in names:
        if sizes[name] > LARGEST:
            why = f"skipped: {sizes[name] / 1e6:.0f} M parameters, above 700 M"
            rows.append({"backbone": name, "parameters": sizes[name], "result": why})
        else:
            rows.append(run_apart(name))
        print(*(rows[-1].get(column, "-") for column in COLUMNS), sep="  ", flush=True)
        write(rows[-1], list(sizes))
    return rows


def write(row: dict[str, object], order: list[str]) -> None:
    """Put one row into the table, in place of an older one of the same backbone."""
    rows: dict[str, dict[str, object]] = {}
    if TABLE.exists():
        with TABLE.open(encoding="utf-8", newline="") as file:
            rows = {str(old["backbone"]): dict(old) for old in csv.DictReader(file)}
    rows[str(row["backbone"])] = row
    part = TABLE.with_suffix(".part")
    with part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[name] for name in order if name in rows)
    os.replace(part, TABLE)


def main() -> int:
    """Run all, or those asked for; 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    known = [card.name for card in gk.list_backbones()]
    parser.add_argument("--only", nargs="+", choices=known, default=known, metavar="B")
    parser.add_argument("--one", choices=known, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run_one(options.one)))
        return 0
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, random weights")
    rows = run_all(options.only)
    print(f"wrote {TABLE}")
    return int(any(str(row["result"]).startswith("failed") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
