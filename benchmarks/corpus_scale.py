"""The same small model pretrained on 1x, 4x and 16x of a corpus: what does size buy?

    python benchmarks/corpus_scale.py --out build/corpus_scale --minutes 8
    python benchmarks/corpus_scale.py --corpora real --data DIR --steps 1000

Geo-aware pretraining from random weights, equal steps for every corpus, so that only
the variety differs; corpora are nested. Then the backbone is frozen and probed, with
all labels ("probe") and with few ("few-shot"). Size 0 is the same network with random
weights. A seed draws the corpus, the start, and the few labels.

- simulated: scenes without "savanna"; burn scars on other places, scored in savanna.
- real: tiles of DIR/s2_global, 23 Sentinel-2 chips from all continents (image and place
  heads; no climate map is at hand); EuroSAT in DIR/eurosat_rgb, scored on its unseen
  block.

Rows are written as they come and a rerun goes on. A demonstration: 2.7 million numbers
and minutes of pretraining say nothing about terabytes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import rasterio
import torch
from probing import probe
from rasterio.windows import Window
from rows import Rows
from shared import RGB, open_eurosat, table, write_page

import geopeft_kit as gk
from geopeft_kit.backbones.base import Backbone
from geopeft_kit.comparison import half_width
from geopeft_kit.data import Chip, write_chip_folder

SIDE = 32  # pixels of a corpus chip
SMALL = {"size": SIDE, "scene_size": 128}
UNIT, LABELLED = 40, 24  # simulated chips: of the 1x corpus, of a task's region
CORPUS_SEED = 7  # other places than those of the tasks
BATCH = 16


@dataclass(frozen=True)
class Study:
    """A corpus, and what a network that was pretrained on it is probed on.

    Attributes:
        corpus: Its labels are not read.
        unit: Chips of the 1x corpus.
        backbone: Whose architecture is pretrained.
        weights: How much the heads count, as in `gk.pretrain_geo_aware`.
        task: Of the probe.
        metric: Of the probe.
        score: Backbone and seed -> labels ("probe", "few-shot") -> score.
    """

    corpus: gk.ChipData
    unit: int
    backbone: str
    weights: Mapping[str, float] | None
    task: str
    metric: str
    score: Callable[[Backbone, int], dict[str, float]]


def main() -> None:
    """Pretrain and score until the time is up, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of real data")
    parser.add_argument("--out", type=Path, default=Path("build/corpus_scale"))
    parser.add_argument("--corpora", nargs="+", default=["simulated"], choices=STUDIES)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--factors", type=int, nargs="+", default=[0, 1, 4, 16])
    parser.add_argument("--steps", type=int, nargs="+", default=[100])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    key = ("corpus", "steps", "factor", "seed")
    rows = Rows(arguments.out / "corpus_scale.csv", key)
    due = [
        (name, steps if factor else 0, factor, seed)
        for name in arguments.corpora
        for seed in arguments.seeds
        for steps in arguments.steps
        for factor in arguments.factors
    ]
    studies = {name: STUDIES[name](arguments) for name in arguments.corpora}
    for cell in rows.missing(due, began + 60 * arguments.minutes):
        rows.put(cell, measure(studies[cell[0]], *cell[1:]))
    page = arguments.out / "corpus_scale.md"
    write_page(page, began, report(rows.read()))


def simulated(arguments: argparse.Namespace) -> Study:
    """Clear simulated scenes of five regions; burn scars in the sixth."""
    corpus = gk.simulated_data(
        "land_cover",
        chips_per_region=-(-UNIT * max(arguments.factors) // 5),
        chips_per_scene=8,
        val_fraction=0,
        seed=CORPUS_SEED,
        shift={"cloud": -1.0},
        **SMALL,
    )
    task = gk.simulated_data("burn", chips_per_region=LABELLED, **SMALL)

    def score(backbone: Backbone, seed: int) -> dict[str, float]:
        gk.attach(backbone, "frozen")
        found = {}
        for labels, data in (("probe", task), ("few-shot", task.n_shot(4, seed))):
            torch.manual_seed(seed)
            model = gk.build_model(backbone, "linear", data.task, data.num_classes)
            gk.fit(model, data, epochs=10, seed=seed, progress=False)
            found[labels] = gk.evaluate(model, data, "test")["overall"]["miou"]
        return found

    return Study(corpus, UNIT, "geopeft_tiny", None, "burn", "miou", score)


def real(arguments: argparse.Namespace) -> Study:
    """All tiles of 23 real chips, 16 times as many as 1x has; EuroSAT, unseen block."""
    folder = arguments.out / "data" / "s2_global"
    if not folder.exists():
        sources = sorted((arguments.data / "s2_global").glob("*.tif"))
        chips = (chip for source in sources for chip in tiles(source))
        facts = {"name": "s2_global", "task": "segmentation", "classes": ("none",)}
        facts |= {"bands": RGB, "scale": 1e-4}  # no chip has a label
        write_chip_folder(folder, chips, facts)
    corpus = gk.ChipData(folder)
    data = open_eurosat(arguments).subset(400, split="test")

    def score(backbone: Backbone, seed: int) -> dict[str, float]:
        few = data.n_shot(5, seed, "label")
        return {
            "probe": probe(backbone, data, seed, 500)["test"],
            "few-shot": probe(backbone, few, seed, 50)["test"],
        }

    unit = len(corpus.dataset("unlabelled")) // 16
    weights = {"climate": 0.0}
    return Study(
        corpus, unit, "geopeft_tiny_rgb", weights, "eurosat", "accuracy", score
    )


def tiles(path: Path) -> Iterator[Chip]:
    """Blue, green and red of one twelve-band chip in tiles, each with its place."""
    with rasterio.open(path) as file:
        for row in range(0, file.height, SIDE):
            for column in range(0, file.width, SIDE):
                window = Window(column, row, SIDE, SIDE)
                yield Chip(
                    f"{path.stem}_{row}_{column}",
                    file.read([2, 3, 4], window=window),
                    region=path.stem,
                    crs=file.crs,
                    transform=file.window_transform(window),
                )


STUDIES = {"simulated": simulated, "real": real}


def measure(study: Study, steps: int, factor: int, seed: int) -> list[dict[str, Any]]:
    """Pretrain once; one row for each number of labels."""
    torch.manual_seed(seed)
    corpus = study.corpus
    backbone = gk.load_backbone(study.backbone, corpus.bands, weights=None)
    began, facts = time.process_time(), {}
    chips = factor * study.unit
    if chips:
        part = corpus.subset(chips, seed, split=corpus.splits[0])
        run = gk.pretrain_geo_aware(
            backbone, part, steps, BATCH, weights=study.weights, seed=seed
        )
        facts = run.history.tail(20).mean().drop("step").add_prefix("train_").to_dict()
    facts |= {"chips": chips, "pretraining_cpu_s": time.process_time() - began}
    facts |= {"task": study.task, "metric": study.metric}
    found = study.score(backbone, seed)
    return [facts | {"labels": name, "score": s} for name, s in found.items()]


def report(rows: pd.DataFrame) -> str:
    """Mean with its 95 % interval over seeds, and the paired gains over 0x and 1x."""
    parts, plain = [], rows[rows["factor"] == 0]
    trained = rows[rows["factor"] > 0]
    for names, own in trained.groupby(["corpus", "steps", "labels"], sort=False):
        corpus, steps, labels = names
        alike = (plain["corpus"] == corpus) & (plain["labels"] == labels)
        own = pd.concat([plain[alike], own])
        wide = own.pivot(index="seed", columns="factor", values="score")
        lines = {
            f"{factor}x": {
                "chips": int(own.loc[own["factor"] == factor, "chips"].iloc[0]),
                "seeds": int(wide[factor].count()),
                own["metric"].iloc[0]: interval(wide[factor]),
                "minus 0x": "-" if factor == 0 else interval(wide[factor] - wide[0]),
                "minus 1x": "-" if factor == 1 else interval(wide[factor] - wide[1]),
            }
            for factor in wide
        }
        title = f"### {corpus}, {steps} steps, {own['task'].iloc[0]}, {labels}"
        parts += [title, table(pd.DataFrame(lines).T)]
    return "\n\n".join(parts)


def interval(values: pd.Series) -> str:
    """Mean and Student's 95 % interval."""
    values = values.dropna()
    if len(values) < 2:
        return f"{values.mean():.3f}"
    mean, half = values.mean(), half_width(values)
    return f"{mean:.3f} [{mean - half:.3f}, {mean + half:.3f}]"


if __name__ == "__main__":
    main()
