"""A training step of the kit against TerraTorch's, on the same model and weights.

    python benchmarks/step.py --out build/step

Both run in long-lived processes with one thread and take turns, step by step. A step
is forward pass, loss, backward pass and AdamW; its time is the CPU time of the process.
Saved bytes are what autograd keeps between the two passes: unique storages, parameters
left out. Before anything is timed, both systems' outputs and gradients are compared on
the same weights, and each of the kit's settings with the kit's own plain path.

TerraTorch is installed by `terratorch_environment.py` where it is not there yet.
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
from shared import table, write_page
from terratorch_environment import make_environment
from workers import Worker, ratios

MIB = 2**20
BLOCKS = {"checkpointing": "blocks", "optimiser": "fused"}
BF16 = {"precision": "bf16-mixed", "optimiser": "fused"}
HELD = {"frozen_precision": "bf16", **BF16}
# mode -> setting -> arguments of fit. Every mode begins with the plain path.
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "full": {"plain": {}, "memory": BLOCKS, "memory, bf16": {**BLOCKS, **BF16}},
    "frozen": {
        "plain": {},
        "cached": {"cache_features": True, "optimiser": "fused"},
        "cached, bf16": {"cache_features": True, **BF16},
    },
    "lora": {
        "plain": {},
        "memory": BLOCKS,
        "memory, bf16": {**BLOCKS, **HELD},
        "speed, bf16": HELD,
    },
    "vpt": {"plain": {}, "memory": BLOCKS, "speed, bf16": HELD},
}
# Mode and first word of the setting -> highest time and saved bytes, kit / TerraTorch.
GOALS: dict[tuple[str, str], tuple[float, float | None]] = {
    ("frozen", "cached"): (0.25, None),
    ("lora", "memory"): (0.65, 0.30),
    ("lora", "speed"): (0.50, 0.75),
    ("vpt", "memory"): (0.50, 0.60),
    ("vpt", "speed"): (0.50, 0.60),
    ("full", "memory"): (0.80, 0.25),
}


def main() -> None:
    """Measure mode by mode, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/step"))
    parser.add_argument("--modes", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--backbone", default="prithvi_eo_v2_100_tl")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=60.0, help="then fewer turns")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    began, python = time.monotonic(), make_environment()
    kit = Worker("step_kit.py", sys.executable, given.out / "kit.log")
    peer = Worker("step_terratorch.py", python, given.out / "terratorch.log")
    model = {
        "backbone": given.backbone,
        "size": given.size,
        "batch": given.batch,
        "folder": str(given.out),
    }
    rows = Rows(given.out / "step.csv", ("mode",))
    for mode in given.modes:
        turns = given.turns, began + 60 * given.minutes
        rows.put((mode,), measure(mode, model, kit, peer, turns, SETTINGS[mode]))
    kit.stop()
    peer.stop()
    write_page(given.out / "step.md", began, report(rows.read()))


def measure(
    mode: str,
    model: dict[str, Any],
    kit: Worker,
    peer: Worker,
    turns: tuple[int, float],
    settings: dict[str, dict[str, Any]],
) -> list[dict[str, Any]]:
    """One row for each setting of a mode.

    Args:
        mode: Key of `SETTINGS`.
        model: Backbone, size, batch, and the folder for files.
        kit: Runs `step_kit.py`.
        peer: Runs `step_terratorch.py`.
        turns: How many, and the second on the clock after which it may be fewer.
        settings: Setting -> arguments of `fit`; the plain path first.
    """
    folder = Path(model["folder"])
    trained = peer.ask("build", mode=mode, **model)["trained"]
    for name, levers in settings.items():
        kit.ask("build", setting=name, mode=mode, levers=levers, **model)
    differences = compare(list(settings), folder, kit, peer)
    theirs = peer.ask("saved")["bytes"]
    ours = {name: kit.ask("saved", setting=name)["bytes"] for name in settings}
    times: dict[str, list[float]] = {name: [] for name in ["peer", *settings]}
    for turn in range(turns[0] + 1):  # the first one warms up
        if turn > 1 and time.monotonic() > turns[1]:
            break
        taken = {"peer": peer.ask("step")["seconds"]}
        taken |= {n: kit.ask("step", setting=n)["seconds"] for n in settings}
        for name, seconds in taken.items():
            times[name] += [seconds] if turn else []
    kit.ask("clear")
    return [
        {
            **{key: model[key] for key in ("backbone", "size", "batch")},
            "mode": mode,
            "setting": name,
            "trained": trained,
            **{f"time_{k}": v for k, v in ratios(times[name], times["peer"]).items()},
            "saved_ours": ours[name] / MIB,
            "saved_theirs": theirs / MIB,
            "saved_ratio": ours[name] / theirs,
            **differences[name],
        }
        for name in settings
    ]


def compare(
    settings: list[str], folder: Path, kit: Worker, peer: Worker
) -> dict[str, dict[str, float]]:
    """Relative differences: the plain path to TerraTorch, the others to the plain."""
    reference = folder / "terratorch.st"
    peer.ask("gradients", path=str(reference))
    found = {}
    for name in settings:
        path = folder / f"{name}.st"
        kit.ask("gradients", setting=name, path=str(path))
        found[name] = kit.ask("compare", one=str(reference), two=str(path))
        if name == settings[0]:
            reference = path
    return {
        name: {f"{what}_difference": value for what, value in row.items()}
        for name, row in found.items()
    }


def report(rows: pd.DataFrame) -> str:
    """The rows as a table, goals beside them."""
    lines = []
    for row in rows.itertuples():
        kind = row.setting.partition(",")[0]
        time_goal, saved_goal = GOALS.get((row.mode, kind), (None, None))
        lines.append(
            {
                "mode": row.mode,
                "setting of the kit": row.setting,
                "CPU s a step, kit / TerraTorch": f"{row.time_ours:.2f} / "
                f"{row.time_theirs:.2f}",
                "time, ratio (lowest, highest turn)": f"{row.time_ratio:.2f} "
                f"({row.time_low:.2f}, {row.time_high:.2f})",
                "goal": _goal(row.time_ratio, time_goal),
                "saved MiB, kit / TerraTorch": f"{row.saved_ours:.1f} / "
                f"{row.saved_theirs:.1f}",
                "saved, ratio": f"{row.saved_ratio:.2f}",
                "goal ": _goal(row.saved_ratio, saved_goal),
                "output differs by": f"{row.output_difference:.0e}",
                "gradients by": f"{row.gradients_difference:.0e}",
            }
        )
    return table(pd.DataFrame(lines).set_index("mode"))


def rates() -> str:
    """How fast this machine multiplies matrices: what bf16 can bring at most."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        one, two = torch.ones(394, 768, dtype=dtype), torch.ones(768, 3072, dtype=dtype)
        seconds = []
        for _ in range(20):
            began = time.process_time()
            torch.mm(one, two)
            seconds.append(time.process_time() - began)
        found[dtype] = 2 * 394 * 768 * 3072 / min(seconds) / 1e9
    return (
        f"One thread multiplies matrices at {found[torch.float32]:.0f} GFLOP/s in 32 "
        f"bits and {found[torch.bfloat16]:.0f} in bf16 (best of 20)."
    )


def _goal(value: float, goal: float | None) -> str:
    if goal is None:
        return "-"
    return f"<= {goal:.2f}, {'met' if value <= goal else 'missed'}"


if __name__ == "__main__":
    main()
