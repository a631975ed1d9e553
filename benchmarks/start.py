"""Import time and size of what is saved: the kit against TerraTorch.

    python benchmarks/start.py --out build/start

Imports are timed in fresh processes, in turns: the bare import, and the import of all
that a first training run needs. Files are written by the two systems' own classes after
one step of LoRA: what training resumes from, and what is handed on afterwards. Rows
are written as they come and a rerun goes on.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from memory_estimate import random_data
from rows import Rows
from safetensors.torch import save_file
from shared import table, write_page
from step_kit import same_model
from terratorch_environment import make_environment
from workers import ROOT, Worker, ratios

import geopeft_kit as gk

MIB = 2**20
FILES = ("to resume from", "to hand on")  # what `file_sizes` weighs
IMPORTS = {
    "bare import": ("import geopeft_kit", "import terratorch"),
    "all for a first run": (
        "import geopeft_kit as g; g.load_backbone, g.attach, g.build_model, g.fit, "
        "g.ChipData",
        "import terratorch.tasks, terratorch.datamodules, terratorch.models",
    ),
}


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/start"))
    parser.add_argument("--backbone", default="prithvi_eo_v2_100_tl")
    parser.add_argument("--turns", type=int, default=7)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    began, python = time.monotonic(), str(make_environment())
    rows = Rows(given.out / "start.csv", ("what",))
    if any(rows.missing((f"{what}, MiB",) for what in FILES)):
        for what, sizes in file_sizes(given.backbone, given.out, python).items():
            rows.put((f"{what}, MiB",), [ratios(*([size] for size in sizes))])
    imports = {(f"{what}, CPU s",): code for what, code in IMPORTS.items()}
    for cell in rows.missing(imports):
        rows.put(cell, [import_seconds(*imports[cell], python, given.turns)])
    shown = rows.read().set_index("what")[["ours", "theirs", "ratio", "low", "high"]]
    shown.columns = ["kit", "TerraTorch", "ratio", "lowest", "highest"]
    write_page(given.out / "start.md", began, table(shown))


def import_seconds(ours: str, theirs: str, python: str, turns: int) -> dict[str, float]:
    """CPU seconds of fresh processes that do nothing but import."""
    found: list[list[float]] = [[], []]
    for turn in range(turns + 1):  # the first one fills the system's file cache
        pairs = ((sys.executable, ours), (python, theirs))
        for kept, (interpreter, code) in zip(found, pairs, strict=True):
            seconds = cpu_seconds([interpreter, "-c", code])
            kept += [seconds] if turn else []
    return ratios(*found)


def cpu_seconds(command: list[str]) -> float:
    """CPU seconds of a process and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, cwd=ROOT, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def file_sizes(backbone: str, folder: Path, python: str) -> dict[str, Any]:
    """What -> MiB of the kit's and of TerraTorch's file, for LoRA with a UNet."""
    model = {"backbone": backbone, "size": 64, "batch": 2, "folder": str(folder)}
    peer = Worker("step_terratorch.py", python, folder / "terratorch.log")
    peer.ask("build", mode="lora", **model)
    theirs = peer.ask("checkpoints", folder=str(folder))
    peer.stop()
    ours = kit_sizes(backbone, folder)
    return {what: (ours[what], theirs[what]) for what in ours}


def kit_sizes(backbone: str, folder: Path) -> dict[str, float]:
    """MiB of what `fit` and `save` of the kit leave after a step."""
    torch.set_num_threads(1)
    model = same_model("lora", backbone, 64, folder / "lora.st")
    data = random_data(folder / "chips", 2, 64)
    gk.fit(model, data, 1, head_start="none", folder=folder / "run", progress=False)
    saved = model.backbone.adapter.save(folder / "adapter")
    decoder = {n: t.contiguous() for n, t in model.decoder.state_dict().items()}
    save_file(decoder, saved / "decoder.safetensors")
    handed_on = sum(file.stat().st_size for file in saved.iterdir())
    return {
        "to resume from": (folder / "run" / "last.ckpt").stat().st_size / MIB,
        "to hand on": handed_on / MIB,
    }


if __name__ == "__main__":
    main()
