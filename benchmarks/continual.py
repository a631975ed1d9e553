"""Continual pretraining on real pixels, and what to pretrain on.

    python benchmarks/continual.py --data DIR --out build/continual

Studies with five seeds each, and the same number of crops for every row of one:

- objectives: `geopeft_tiny_rgb` is adapted to crops of 32 x 32 pixels out of unlabelled
  EuroSAT training images and of 23 Sentinel-2 chips from all continents (never
  EuroSAT's val or test block), with its own packaged weights as the teacher; then
  probed and fine-tuned on EuroSAT, scored on the unseen block. The packaged weights
  have seen the 23 chips before. `fine_tuning` trains in full what it has left.
- adaptation: the warm start again, five times as long, at lower rates, all weights or
  LoRA alone; the same crops and the same probe.
- corpora: `geopeft_tiny` from random weights by masked modelling alone, on as many
  simulated scenes of five regions (varied) as of one (narrow); then probed on simulated
  land cover of regions that only the varied corpus holds, and of one that neither does.

A run that is there is not made again, so a study may be cut at any time; `--report`
trains nothing, prints the tables and writes all runs to docs/results.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import rasterio
import torch
from methods import spread
from paired import difference
from probing import probe
from rows import Rows
from shared import open_eurosat, pixel_rows, setting, table
from torch import Tensor

import geopeft_kit as gk
from geopeft_kit.backbones.base import Backbone
from geopeft_kit.training.evaluate import HEADLINE

SIDE, BATCH = 32, 64  # small crops, so that five seeds take minutes
CHIPS, TESTED = 300, 400  # labelled images of EuroSAT: training, unseen block
# Label -> start ("random" or "warm"), weight of masked modelling, with a teacher or not
OBJECTIVES: dict[str, tuple[str, float, bool] | str] = {
    "random start, no pretraining": "random",
    "teacher as it is": "warm",
    "random start, masked only": ("random", 1.0, False),
    "random start, distillation only": ("random", 0.0, True),
    "random start, both": ("random", 1.0, True),
    "warm start, both": ("warm", 1.0, True),
}
# Label -> method, peak rate; none for the teacher as it is
ADAPTATIONS: dict[str, tuple[str, float] | None] = {
    "teacher as it is": None,
    "LoRA alone, rate 1e-3": ("lora", 1e-3),
    "LoRA alone, rate 1e-4": ("lora", 1e-4),
    "all weights, rate 1e-4": ("full", 1e-4),
}
LONG = 5  # times as many steps as in the other studies
CORPORA = {
    "no pretraining": None,
    "narrow: temperate": ("temperate",),
    "varied: five regions": (
        "temperate", "mediterranean", "arid", "boreal", "delta",
    ),
}  # fmt: skip
REFERENCES = {
    "objectives": "teacher as it is",
    "adaptation": "teacher as it is",
    "fine_tuning": "teacher as it is",
    "corpora": "narrow: temperate",
}
RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
TRAINED_ON, UNSEEN = ("temperate", "boreal"), ("arid", "delta", "savanna")


class Crops:
    """Random crops of images, flipped and turned; PyTorch's random state decides.

    Args:
        images: Each (C, H, W) reflectance, at least `SIDE` high and wide.
    """

    def __init__(self, images: Sequence[Tensor]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image = self.images[index]
        row, column = (
            int(torch.randint(side - SIDE + 1, ())) for side in image.shape[1:]
        )
        image = image[:, row : row + SIDE, column : column + SIDE]
        image = torch.rot90(image, int(torch.randint(4, ())), (1, 2))
        return {"image": image.flip(2) if torch.rand(()) < 0.5 else image}


def main() -> None:
    """Run what is missing of the studies that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("build/continual"))
    parser.add_argument("--studies", nargs="+", default=list(STUDIES), choices=STUDIES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=64, help="of a pretraining")
    parser.add_argument("--limit", type=float, default=9, help="minutes; then stop")
    parser.add_argument("--report", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    for name in arguments.studies:
        rows = Rows(arguments.out / f"{name}.csv", ("label", "seed"))
        if arguments.report:
            report(name, rows.read())
            continue
        runs = STUDIES[name](arguments)
        for cell in rows.missing(runs):
            if time.monotonic() - began > 60 * arguments.limit:
                raise SystemExit("time is up; call again to go on")
            rows.put(cell, [runs[cell]()])
    print(setting((time.monotonic() - began) / 60))


def report(name: str, rows: pd.DataFrame) -> None:
    """Print means, spreads and paired differences, and write the runs."""
    path = RESULTS / f"continual_{name}.csv"
    rows.to_csv(path, index=False, float_format="%.6g")
    reference = REFERENCES[name]
    lines = {}
    for label, own in rows.groupby("label", sort=False):
        lines[label] = {
            "seeds": len(own),
            "val": spread(own["val"]),
            "unseen": spread(own["test"]),
            f"unseen, to '{reference}'": difference(rows, label, reference, "test"),
        }
        if "minutes" in own and own["minutes"].notna().any():
            lines[label] |= {
                "minutes": own["minutes"].mean(),
                "activations MiB": own["activations MiB"].mean(),
                "energy Wh": own["energy Wh"].iloc[0],
            }
    print(f"### {name}\n\n{table(pd.DataFrame(lines).T.rename_axis('label'))}\n")


Runs = dict[tuple[str, int], Callable[[], dict[str, Any]]]


def objectives(arguments: argparse.Namespace) -> Runs:
    """For each objective and seed: pretraining, its cost, and the probe after it."""
    data, corpus = _real(arguments)

    def run(label: str, seed: int) -> dict[str, Any]:
        plan = OBJECTIVES[label]
        start = plan if isinstance(plan, str) else plan[0]
        backbone = _load("geopeft_tiny_rgb", start, seed)
        row: dict[str, Any] = {}
        if not isinstance(plan, str):
            teacher = None
            if plan[2]:
                teacher = gk.load_backbone("geopeft_tiny_rgb", image_size=SIDE)
            done = _pretrain(backbone, corpus, seed, arguments.steps, teacher, plan[1])
            row = done.cost() | dict(done.history.iloc[-1])
            done_path = _weights(arguments, label, seed)
            done_path.parent.mkdir(exist_ok=True)
            save(backbone, done_path)
        return row | probe(backbone, data, seed, CHIPS)

    def pixels(seed: int) -> dict[str, Any]:
        return dict(pixel_rows(data, [seed], CHIPS)[["val", "test"]].iloc[0])

    runs = _each(run, OBJECTIVES, arguments.seeds)
    return runs | {("pixel statistics", s): partial(pixels, s) for s in arguments.seeds}


def fine_tuning(arguments: argparse.Namespace) -> Runs:
    """Full fine-tuning of what `objectives` has left, on the same images."""
    data = _eurosat(arguments)

    def run(label: str, seed: int) -> dict[str, Any]:
        plan = OBJECTIVES[label]
        weights: Any = _weights(arguments, label, seed)
        if isinstance(plan, str):
            weights = None if plan == "random" else "default"
        torch.manual_seed(seed)
        backbone = gk.load_backbone("geopeft_tiny_rgb", weights=weights)
        gk.attach(backbone, "full")
        model = gk.build_model(backbone, task=data.task, num_classes=data.num_classes)
        small = data.subset(CHIPS, seed)
        fitted = gk.fit(
            model, small, epochs=3, learning_rate=3e-4, seed=seed, progress=False
        )
        row = {"val": fitted.metrics["overall"]["accuracy"]}
        return row | {"test": gk.evaluate(model, data, "test")["overall"]["accuracy"]}

    return _each(run, OBJECTIVES, arguments.seeds)


def adaptation(arguments: argparse.Namespace) -> Runs:
    """The packaged weights adapted for longer, gently: the probe before and after."""
    data, corpus = _real(arguments)
    steps = LONG * arguments.steps

    def run(label: str, seed: int) -> dict[str, Any]:
        backbone, row = _load("geopeft_tiny_rgb", "warm", seed), {}
        plan = ADAPTATIONS[label]
        if plan is not None:
            gk.attach(backbone, plan[0])
            teacher = gk.load_backbone("geopeft_tiny_rgb", image_size=SIDE)
            done = _pretrain(backbone, corpus, seed, steps, teacher, rate=plan[1])
            row = done.cost() | dict(done.history.iloc[-1])
        return row | probe(backbone, data, seed, CHIPS)

    return _each(run, ADAPTATIONS, arguments.seeds)


def corpora(arguments: argparse.Namespace) -> Runs:
    """One row for each corpus and seed: the probe on seen and unseen regions."""
    images = {label: simulated_images(r) for label, r in CORPORA.items() if r}
    data = gk.simulated_data(
        "land_cover",
        chips_per_region=24,
        train_regions=TRAINED_ON,
        test_regions=UNSEEN,
        val_fraction=0.3,
        seed=3,
    )
    score = HEADLINE[data.task][0]

    def run(label: str, seed: int) -> dict[str, Any]:
        backbone, row = _load("geopeft_tiny", "random", seed), {}
        if label in images:
            crops = Crops(images[label])
            done = _pretrain(backbone, crops, seed, arguments.steps)
            row = done.cost() | dict(done.history.iloc[-1])
        gk.attach(backbone, "frozen")
        model = gk.build_model(backbone, "linear", data.task, data.num_classes)
        fitted = gk.fit(model, data, epochs=4, seed=seed, progress=False)
        found = gk.evaluate(model, data, "test")
        row |= {"val": fitted.metrics["overall"][score]}
        row |= {"test": found["overall"][score]}
        return row | {f"region {k}": v[score] for k, v in found["regions"].items()}

    return _each(run, CORPORA, arguments.seeds)


STUDIES = {
    "objectives": objectives,
    "fine_tuning": fine_tuning,
    "adaptation": adaptation,
    "corpora": corpora,
}


def _each(run: Callable, labels: Iterable[str], seeds: Sequence[int]) -> Runs:
    """A run for each label and seed; a whole seed before the next."""
    return {
        (label, seed): partial(run, label, seed) for seed in seeds for label in labels
    }


def _load(name: str, start: str, seed: int) -> Backbone:
    torch.manual_seed(seed)
    return gk.load_backbone(name, weights=None if start == "random" else "default")


def _pretrain(
    backbone: Backbone,
    corpus: Crops,
    seed: int,
    steps: int,
    teacher: Backbone | None = None,
    masked: float = 1.0,
    rate: float = 1e-3,
) -> Any:
    return gk.pretrain(
        backbone,
        corpus,
        teacher,
        masked=masked,
        epochs=1,
        steps_per_epoch=steps,
        batch_size=BATCH,
        learning_rate=rate,
        seed=seed,
        progress=False,
    )


def _real(arguments: argparse.Namespace) -> tuple[gk.ChipData, Crops]:
    """EuroSAT to probe on, and the crops to adapt to."""
    data = _eurosat(arguments)
    chips = global_chips(arguments.data / "s2_global")
    return data, Crops(eurosat_images(data) + chips)


def _eurosat(arguments: argparse.Namespace) -> gk.ChipData:
    return open_eurosat(arguments).subset(TESTED, split="test")


def _weights(arguments: argparse.Namespace, label: str, seed: int) -> Path:
    return arguments.out / "weights" / f"{label}, {seed}.safetensors"


def save(backbone: Backbone, path: Path) -> None:
    """Keep a pretrained backbone for fine-tuning."""
    from geopeft_kit.pretraining import save_weights

    save_weights(backbone, path)


def eurosat_images(data: gk.ChipData) -> list[Tensor]:
    """The training images; val and test are never read here."""
    chips = data.dataset("train")
    return [chips[i]["image"] for i in range(len(chips))]


def global_chips(folder: Path) -> list[Tensor]:
    """Blue, green and red of the 23 chips, cut as large as EuroSAT's images."""
    parts = []
    for path in sorted(folder.glob("*.tif")):
        with rasterio.open(path) as file:
            image = torch.from_numpy(file.read([2, 3, 4]).astype(np.float32) / 10_000)
        tiles = image.unfold(1, 64, 64).unfold(2, 64, 64)  # (3, 4, 4, 64, 64)
        parts += list(tiles.flatten(1, 2).transpose(0, 1).contiguous())
    return parts


def simulated_images(regions: Sequence[str], scenes: int = 20) -> list[Tensor]:
    """`scenes` scenes in all, shared evenly by the regions, without any event."""
    from geopeft_kit.world import simulate_scene

    each = scenes // len(regions)
    return [
        torch.from_numpy(simulate_scene(region, seed, bands="hls", pair=False).image)
        for region in regions
        for seed in range(each)
    ]


if __name__ == "__main__":
    main()
