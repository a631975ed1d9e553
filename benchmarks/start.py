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

import pandas as pd
import torch
from memory_estimate import random_data
from safetensors.torch import save_file
from shared import setting, table
from step_kit import same_model
from terratorch_environment import make_environment
from workers import ROOT, Worker, ratios

import geopeft_kit as gk

MIB = 2**20
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
    journal = given.out / "start.csv"
    rows = pd.read_csv(journal).to_dict("records") if journal.exists() else []
    seen = {row["what"] for row in rows}
    if not any(what.endswith("MiB") for what in seen):
        for what, sizes in file_sizes(given.backbone, given.out, python).items():
            found = ratios(*([size] for size in sizes))
            rows.append({"what": f"{what}, MiB", **found})
        pd.DataFrame(rows).to_csv(journal, index=False)
    for what, code in IMPORTS.items():
        if f"{what}, CPU s" not in seen:
            found = import_seconds(*code, python, given.turns)
            rows.append({"what": f"{what}, CPU s", **found})
            pd.DataFrame(rows).to_csv(journal, index=False)
    frame = pd.DataFrame(rows).set_index("what")
    shown = frame[["ours", "theirs", "ratio", "low", "high"]]
    shown.columns = ["kit", "TerraTorch", "ratio", "lowest", "highest"]
    page = table(shown) + "\n\n" + setting((time.monotonic() - began) / 60)
    (given.out / "start.md").write_text(page + "\n", encoding="utf-8")
    print(page)


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
