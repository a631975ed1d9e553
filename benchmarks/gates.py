"""Does the embedded model earn its place? The gates that its weights have to pass.

    python benchmarks/gates.py --data DIR --out build/gates

Three tasks that are not the pretext: simulated burn scars and building sites ("change",
two dates), three regions for training and two unseen, with default learning rates; and
EuroSAT's longitude split, real pixels, from DIR/eurosat_rgb. Five seeds, differences
paired by seed with Student's 95 % interval. A gate is "met" where the whole interval is
on the right side of its limit, "mean only" where the mean alone is, else "not met".

A run that is there already is not made again; `--report` only writes the tables: the
gates, and all runs beside them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from probing import probe
from rows import Rows
from shared import RGB, open_eurosat, pixel_rows, setting, table

import geopeft_kit as gk
from geopeft_kit.comparison import half_width

IMAGES = 500  # labelled training images of EuroSAT
RANDOM = {"weights": None}  # the same architecture, drawn anew for each seed
CANDIDATES = (
    gk.Candidate("probe", "frozen"),
    gk.Candidate("LoRA", "lora", {"rank": 8}),
    gk.Candidate("full", "full"),
    gk.Candidate("random probe", "frozen", {}, RANDOM),
    gk.Candidate("random full", "full", {}, RANDOM, fresh_decoder=True),
)
Runs = dict[tuple[str, int], Callable[[], dict[str, Any]]]


@dataclass(frozen=True)
class Gate:
    """A limit on a score, or on a paired difference of scores.

    Attributes:
        what: In words.
        part: Which rows: "burn", "burn rgb", "change" or "eurosat".
        label: The candidate.
        reference: The candidate it is compared with; None for a score alone.
        split: Column of the score; "val" is in-region, "test" unseen.
        low: Least value.
        high: Largest value.
    """

    what: str
    part: str
    label: str
    reference: str | None
    split: str
    low: float
    high: float = float("inf")


def _simulated_gates(part: str) -> list[Gate]:
    return [
        Gate("probe above random probe", part, "probe", "random probe", "test", 0.05),
        Gate("the same, in-region", part, "probe", "random probe", "val", 0.05),
        Gate("LoRA above probe, unseen", part, "LoRA", "probe", "test", 0.03),
        Gate("LoRA within 0.02 of full, unseen", part, "LoRA", "full", "test", -0.02),
        Gate("LoRA above random full, unseen", part, "LoRA", "random full", "test", 0),
        Gate("full, in-region, 0.55 to 0.92", part, "full", None, "val", 0.55, 0.92),
    ]


GATES = [
    *_simulated_gates("burn"),
    *_simulated_gates("burn rgb"),
    *_simulated_gates("change"),
    Gate(
        "probe above pixel statistics, unseen block, real pixels",
        "eurosat",
        "probe",
        "pixel statistics",
        "test",
        0.0,
    ),
    Gate(
        "probe above random probe, unseen block, real pixels",
        "eurosat",
        "probe",
        "random probe",
        "test",
        0.0,
    ),
]


def main() -> None:
    """Make the runs that are missing and write the table of gates."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("build/gates"))
    parser.add_argument("--table", type=Path, default=Path("docs/results/gates.csv"))
    parser.add_argument("--weights", default="default", help="of geopeft_tiny")
    parser.add_argument("--rgb-weights", default="default", help="of geopeft_tiny_rgb")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=12, help="of simulated tasks")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--limit", type=float, default=9, help="minutes; then stop")
    parser.add_argument("--report", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    for name in [] if arguments.report else arguments.parts:
        rows = Rows(_file(arguments, name), ("label", "seed"))
        runs = PARTS[name](arguments)
        for cell in rows.missing(runs):
            if time.monotonic() - began > 60 * arguments.limit:
                raise SystemExit("time is up; call again to go on")
            rows.put(cell, [runs[cell]()])
    files = {name: _file(arguments, name) for name in PARTS}
    made = {name: pd.read_csv(path) for name, path in files.items() if path.exists()}
    checked = pd.DataFrame([check(g, made[g.part]) for g in GATES if g.part in made])
    checked.to_csv(arguments.table, index=False, float_format="%.4f")
    raw = pd.concat(made, names=["part"]).reset_index("part")
    columns = ["part", "label", "seed", "val", "test"]
    runs = arguments.table.with_stem(f"{arguments.table.stem}_runs")
    raw[columns].to_csv(runs, index=False, float_format="%.6g")
    print(table(checked.set_index("gate")))
    print(setting((time.monotonic() - began) / 60))


def simulated(arguments: argparse.Namespace, task: str, rgb: bool = False) -> Runs:
    """Burn scars, with the data of the quickstart, or building sites in such data."""
    data = gk.simulated_data(
        task,
        RGB if rgb else "hls",
        chips_per_region=24,
        train_regions=["temperate", "mediterranean", "boreal"],
        test_regions=["arid", "savanna"],
        val_fraction=0.3,
    )
    name = "geopeft_tiny_rgb" if rgb else "geopeft_tiny"
    weights = arguments.rgb_weights if rgb else arguments.weights

    def run(candidate: gk.Candidate, seed: int) -> dict[str, Any]:
        found = gk.compare(
            [candidate],
            data,
            name,
            {"weights": weights},
            seeds=[seed],
            epochs=arguments.epochs,
            progress=False,
        )
        return dict(found.rows.iloc[0])

    return {
        (candidate.label, seed): partial(run, candidate, seed)
        for seed in range(arguments.seeds)
        for candidate in CANDIDATES
    }


def eurosat(arguments: argparse.Namespace) -> Runs:
    """Probes on real pixels, and the rival without a network."""
    data = open_eurosat(arguments)

    def random_probe(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        backbone = gk.load_backbone("geopeft_tiny_rgb", weights=None)
        return probe(backbone, data, seed, IMAGES)

    def pretrained_probe(seed: int) -> dict[str, Any]:
        backbone = gk.load_backbone("geopeft_tiny_rgb", weights=arguments.rgb_weights)
        return probe(backbone, data, seed, IMAGES)

    def pixels(seed: int) -> dict[str, Any]:
        return dict(pixel_rows(data, [seed], IMAGES).iloc[0])

    rivals = {
        "probe": pretrained_probe,
        "random probe": random_probe,
        "pixel statistics": pixels,
    }
    return {
        (label, seed): partial(run, seed)
        for seed in range(arguments.seeds)
        for label, run in rivals.items()
    }


PARTS = {
    "burn": partial(simulated, task="burn"),
    "burn rgb": partial(simulated, task="burn", rgb=True),
    "change": partial(simulated, task="change"),
    "eurosat": eurosat,
}


def _file(arguments: argparse.Namespace, part: str) -> Path:
    return arguments.out / f"{part.replace(' ', '_')}.csv"


def check(gate: Gate, rows: pd.DataFrame) -> dict[str, object]:
    """One row of the table: value, its 95 % interval over seeds, limit, verdict."""
    scores = rows.pivot(index="seed", columns="label", values=gate.split)
    values = scores[gate.label]
    if gate.reference is not None:
        values = values - scores[gate.reference]
    values = values.dropna()
    mean = values.mean()
    half = half_width(values)
    inside = gate.low <= mean - half and mean + half <= gate.high
    mean_inside = gate.low <= mean <= gate.high
    return {
        "gate": gate.what,
        "part": gate.part,
        "score": round(scores[gate.label].mean(), 4),
        "value": round(mean, 4),
        "low": round(mean - half, 4),
        "high": round(mean + half, 4),
        "at least": gate.low,
        "at most": gate.high,
        "seeds": len(values),
        "verdict": "met" if inside else "mean only" if mean_inside else "not met",
    }


if __name__ == "__main__":
    main()
