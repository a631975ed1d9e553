"""What a backbone costs beside its parameters: FLOPs, memory and time by image size.

    python benchmarks/cost.py --out build/cost --minutes 8

FLOPs are counted by `torch.utils.flop_counter` on the `meta` device, which has shapes
and no numbers, so any size fits: two FLOPs a multiply-add, element-wise operations not
counted. So are the bytes that a training step keeps, without a fused attention. Time is
processor time: forward passes alone, batch 1, one thread, up to `--largest` pixels and
as long as a pass will stay below `--seconds`. Attention grows with the square of the
number of tokens, convolutions and scans with the number. The Geo-Aware U-Net is locked
to 128 px.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from shared import table, write_page
from torch.utils.flop_counter import FlopCounterMode

import geopeft_kit as gk
from geopeft_kit.backbones import Backbone, find_card
from geopeft_kit.training.tracker import count_saved_bytes

SIZES = (64, 128, 256, 512, 1024)
# label -> name, options, and whether small enough to be timed here
FAMILIES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "Geo-Aware U-Net 44M": ("phileo_unet_44m", {}, True),
    "Geo-Aware U-Net 200M": ("phileo_unet_200m", {}, False),
    "ViT-UPerNet 100M, patch 4": ("phileo_vit_100m", {"patch": 4}, True),
    "ViT-UPerNet 100M, patch 16": ("phileo_vit_100m", {"patch": 16}, True),
    "ViT-UPerNet 300M, patch 4": ("phileo_vit_300m", {"patch": 4}, False),
    "ViT-UPerNet 300M, patch 16": ("phileo_vit_300m", {"patch": 16}, False),
    "EfficientViM m1": ("timm:efficientvim_m1", {}, True),
    "MambaOut femto": ("timm:mambaout_femto", {}, True),
}


def main() -> None:
    """Count and measure until the time is up, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/cost"))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES))
    parser.add_argument("--largest", type=int, default=1024, help="pixels, timed")
    parser.add_argument("--seconds", type=float, default=20.0, help="one timed pass")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    began, rows = time.monotonic(), []
    for label in arguments.families:
        timed = FAMILIES[label][2]
        for size in arguments.sizes:
            row = count(label, size)
            if row is None:
                continue
            late = time.monotonic() - began > 60 * arguments.minutes
            if timed and size <= arguments.largest and not late:
                row |= measure(label, size)
                # four times the pixels cost up to sixteen times the time
                timed = 8 * row["ms"] / 1000 < arguments.seconds
            rows.append(row)
            pd.DataFrame(rows).to_csv(arguments.out / "cost.csv", index=False)
            print(row, flush=True)
    write_page(arguments.out / "cost.md", began, report(pd.DataFrame(rows)))


def load(label: str, size: int) -> Backbone | None:
    """The backbone, random weights, ten bands; None where it takes no such size."""
    name, options, _ = FAMILIES[label]
    if name.startswith("phileo_unet") and size != 128:
        return None
    if name.startswith("timm:"):
        options = options | {
            "bands": find_card("phileo_unet_44m").bands,
            "new_bands": "random",
        }
    return gk.load_backbone(name, weights=None, image_size=size, **options).eval()


def count(label: str, size: int) -> dict[str, Any] | None:
    """Parameters, FLOPs and kept activations of one image, by shapes alone."""
    with torch.device("meta"):
        backbone = load(label, size)
        if backbone is None:
            return None
        image = torch.empty(1, len(backbone.bands), size, size)
        counter = FlopCounterMode(display=False)
        with counter, count_saved_bytes(backbone) as saved:
            backbone(image)
    return {
        "label": label,
        "pixels": size,
        "parameters": sum(p.numel() for p in backbone.parameters()),
        "gflops": counter.get_total_flops() / 1e9,
        "activations_mib": sum(saved.values()) / 2**20,
    }


def measure(label: str, size: int) -> dict[str, float]:
    """Milliseconds of processor time of a forward pass, the best of three."""
    backbone = load(label, size)
    image = torch.rand(1, len(backbone.bands), size, size)
    times: list[float] = []
    with torch.inference_mode():
        while len(times) < 3 and sum(times) < 10:
            began = time.process_time()
            backbone(image)
            times.append(time.process_time() - began)
    return {"ms": 1000 * min(times)}


def report(rows: pd.DataFrame) -> str:
    """One table a quantity: families down, image sizes across."""
    parts = []
    for column, title in (
        ("gflops", "GFLOPs of a forward pass"),
        ("activations_mib", "MiB kept for the backward pass of one image"),
        ("ms", "ms of a forward pass on one CPU thread"),
    ):
        wide = rows.pivot(index="label", columns="pixels", values=column)
        parts += [f"### {title}", table(wide.reindex(rows["label"].unique()))]
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
