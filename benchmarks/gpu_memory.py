"""The memory estimate against the peak of a GPU's allocator.

    make gpu

Prithvi-EO-2.0 300M with a UNet at 224 pixels, batch 8; random weights and random
pixels, because memory does not look at numbers. Rows of other cards stay in the table.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch
from memory_estimate import random_data
from rows import Rows
from shared import table

import geopeft_kit as gk

BACKBONE, DECODER, BATCH, SIZE = "prithvi_eo_v2_300", "unet", 8, 224
METHODS = ("lora", "full", "frozen", "vpt")
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
EPOCHS = 4  # of one step: the state of the optimiser is there from the second on


def main() -> None:
    """Measure what is missing for this card, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("PyTorch sees no GPU here, so there is nothing to measure.")
    card = torch.cuda.get_device_name()
    rows = Rows(arguments.out / "gpu_memory.csv", ("card", "method", "precision"))
    cells = [(card, method, p) for p in PRECISIONS for method in METHODS]
    with tempfile.TemporaryDirectory() as folder:
        for cell in rows.missing(cells):
            rows.put(cell, [measure(*cell[1:], Path(folder))])
    shown = rows.read().set_index(["card", "method", "precision"])
    (arguments.out / "gpu_memory.md").write_text(f"{table(shown)}\n")
    print(table(shown))


def measure(
    method: str, precision: str, folder: Path, backbone: str = BACKBONE,
    size: int = SIZE, batch: int = BATCH,
) -> dict[str, Any]:  # fmt: skip
    """One row: what was predicted for a run, and what the allocator saw."""
    row: dict[str, Any] = {"date": str(date.today()), "torch": torch.__version__}
    lacking = precision == "bf16-mixed" and gk.mixed_precision() != precision
    if lacking:
        return row | {"note": "not on this card: no bf16 in hardware"}
    torch.manual_seed(0)
    network = gk.load_backbone(backbone, weights=None)
    # attached before it is moved: a GPU must not hold what the run itself does not
    gk.attach(network, method)
    model = gk.build_model(network, DECODER)
    predicted = gk.estimate_memory(model, batch, size, precision)
    data = random_data(folder / f"chips_{batch}_{size}", batch, size)
    options = {"cache_features": False} if method == "frozen" else {}
    found = gk.fit(
        model, data, EPOCHS, head_start="none", precision=precision, progress=False,
        **options,
    ).resources  # fmt: skip
    del model, network
    gc.collect()  # before the next one is built
    return row | {
        "predicted MiB": round(predicted.total_mib, 1),
        "allocator MiB": round(found.peak_mib, 1),
        "predicted / allocator": round(predicted.total_mib / found.peak_mib, 3),
        "activations predicted MiB": round(predicted.activations_mib, 1),
        "activations measured MiB": round(found.activations_mib, 1),
        "ms a step": round(found.step_ms, 1),
        "note": "",
    }


if __name__ == "__main__":
    main()
