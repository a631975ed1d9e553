"""Scores against the number of labels: n chips of each bucket, nested, five seeds.

    python benchmarks/few_shot.py --data DIR --out build/few_shot --minutes 8

Three simulated tasks of PhilEO Bench's kind (building and road density by regression,
land cover) with `geopeft_tiny`, buckets are regions, one region unseen. Its unlabelled
pretraining saw other places of "delta", and none of "savanna". Where DIR holds
`eurosat_rgb` and `galileo_nano`, also real EuroSAT with real weights, buckets are
classes, an unseen longitude block. A seed draws the chips, and the start of what is
random. Further backbones are rows of the simulated studies wherever their weights can
be had: `--backbones terramind_v1_base prithvi_eo_v2_300` downloads them, and
`galileo_nano=encoder.pt` reads a file. Every run takes the same
number of steps, whatever n is, at the method card's learning rate: nothing is searched.
Rows are written as they come and a rerun goes on.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rows import Rows
from shared import convert, epochs_of, table, write_page

import geopeft_kit as gk

# task -> region that is held out: savanna has too few towns to be told from a constant
SIMULATED = {
    "building_density": "delta",
    "road_density": "delta",
    "land_cover": "savanna",
}
SHOTS = {"simulated": (2, 8, 32), "eurosat": (2, 5, 10, 25, 50)}
RIVALS: dict[str, Callable[[gk.ChipData], torch.nn.Module]] = {
    "constant": gk.baselines.Constant,
    "pixel statistics": gk.baselines.PixelStatistics,
}


@dataclass(frozen=True)
class Study:
    """What one curve is drawn on."""

    data: gk.ChipData
    by: str
    shots: tuple[int, ...]
    backbone: str
    weights: Any = "default"


@dataclass(frozen=True)
class Plan:
    """What is trained.

    Attributes:
        method: Of fine-tuning.
        head_start: What the decoder starts from, as in `gk.fit`.
        pretrained: False draws the weights at random.
        backbone: None takes the study's.
        weights: Of that backbone, a name or a file.
    """

    method: str
    head_start: str = "auto"
    pretrained: bool = True
    backbone: str | None = None
    weights: str = "default"


METHODS = {
    "frozen": Plan("frozen"),
    "full": Plan("full"),
    "random weights, full": Plan("full", "none", pretrained=False),
}


def main() -> None:
    """Train cells until the time is up, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of real data")
    parser.add_argument("--out", type=Path, default=Path("build/few_shot"))
    parser.add_argument("--studies", nargs="+", default=[*SIMULATED, "eurosat"])
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--labels", nargs="+", default=[*METHODS, *RIVALS])
    parser.add_argument("--backbones", nargs="+", default=[], metavar="NAME[=FILE]")
    parser.add_argument("--shots", type=int, nargs="+", default=None)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--chips", type=int, default=48, help="simulated, per region")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    began, key = time.monotonic(), ("study", "label", "n", "seed")
    rows = Rows(arguments.out / "few_shot.csv", key)
    plans = METHODS | further(arguments.backbones)
    for name in arguments.studies:
        study = open_study(name, arguments)
        due = cells(name, study, arguments)
        for cell in rows.missing(due, began + 60 * arguments.minutes):
            rows.put(cell, [measure(cell, study, plans, arguments.steps)])
    write_page(arguments.out / "few_shot.md", began, report(rows.read()))


def further(backbones: Sequence[str]) -> dict[str, Plan]:
    """Label -> plan, frozen and full, for each backbone beside the study's own."""
    plans = {}
    for text in backbones:
        name, _, file = text.partition("=")
        for method in ("frozen", "full"):
            plan = Plan(method, backbone=name, weights=file or "default")
            plans[f"{name}, {method}"] = plan
    return plans


def open_study(name: str, arguments: argparse.Namespace) -> Study:
    """Data and backbone of a study."""
    if name == "eurosat":
        folder = convert("eurosat_rgb", arguments)
        data = gk.ChipData(folder, split="index", batch_size=16)
        weights = arguments.data / "galileo_nano" / "encoder.pt"
        shots = arguments.shots or SHOTS["eurosat"]
        return Study(data, "label", tuple(shots), "galileo_nano", weights)
    data = gk.simulated_data(
        name,
        chips_per_region=arguments.chips,
        size=32,
        scene_size=128,
        test_regions=[SIMULATED[name]],
        batch_size=8,
    )
    shots = arguments.shots or SHOTS["simulated"]
    return Study(data, "region", tuple(shots), "geopeft_tiny")


def cells(
    name: str, study: Study, arguments: argparse.Namespace
) -> list[tuple[str, str, int, int]]:
    """Study, label, n and seed; a whole seed before the next."""
    extra = [] if name == "eurosat" else further(arguments.backbones)
    labels = [
        label
        for label in (*arguments.labels, *extra)
        if label != "pixel statistics" or study.data.task != "regression"
    ]
    return [
        (name, label, n, seed)
        for seed in arguments.seeds
        for n in study.shots
        for label in labels
    ]


def measure(
    cell: tuple[str, str, int, int],
    study: Study,
    plans: Mapping[str, Plan],
    steps: int,
) -> dict[str, Any]:
    """Train one cell and score it where it was not trained."""
    _, label, n, seed = cell
    data = study.data.n_shot(n, seed, study.by)
    began = time.process_time()
    if label in RIVALS:
        model = RIVALS[label](data)
    else:
        model = train(plans[label], study, data, steps, seed)
    scores = gk.evaluate(model, data, "test")["overall"]
    return {
        "chips": len(data.dataset("train")),
        **scores,
        "cpu_s": time.process_time() - began,
    }


def train(
    plan: Plan, study: Study, data: gk.ChipData, steps: int, seed: int
) -> torch.nn.Module:
    """A model after the given number of steps on few chips."""
    torch.manual_seed(seed)
    weights = plan.weights if plan.backbone else study.weights
    backbone = gk.load_backbone(
        plan.backbone or study.backbone,
        bands=data.bands,
        weights=weights if plan.pretrained else None,
    )
    gk.attach(backbone, plan.method)
    model = gk.build_model(backbone, "linear", data.task, data.num_classes or 2)
    gk.fit(
        model,
        data,
        epochs_of(data, steps),
        head_start=plan.head_start,
        seed=seed,
        progress=False,
    )
    return model


def report(rows: pd.DataFrame) -> str:
    """One table for each study and score: mean and standard deviation over seeds."""
    parts = []
    for study, own in rows.groupby("study", sort=False):
        for score in ("rmse", "accuracy", "miou"):
            if score not in own or own[score].isna().all():
                continue
            spread = own.groupby(["label", "n"], sort=False)[score].agg(["mean", "std"])
            text = spread.apply(lambda r: f"{r['mean']:.3f} ± {r['std']:.3f}", axis=1)
            seeds = own.groupby(["label", "n"]).size().agg(["min", "max"]).tolist()
            parts.append(f"### {study}, {score}, seeds {seeds[0]} to {seeds[1]}")
            parts.append(table(text.unstack("n")))
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
