"""The same small model pretrained on 1x, 4x and 16x of a corpus: what does size buy?

    python benchmarks/corpus_scale.py --out build/corpus_scale --minutes 8

Geo-aware pretraining on simulated scenes without "savanna", equal steps for every
corpus, so that only the variety differs; corpora are nested. Then the backbone is
frozen, and a linear decoder is trained on other simulated places: with all chips
("probe") and with few of each region ("few-shot"), scored in savanna. Size 0 is the
same network with random weights. A seed draws the corpus, the start, and the few chips.
Rows are written as they come and a rerun goes on. A demonstration: 2.7 million numbers,
seconds of pretraining, and simulated scenes say nothing about terabytes.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rows import Rows
from shared import table, write_page

import geopeft_kit as gk
from geopeft_kit.comparison import half_width

BACKBONE = "geopeft_tiny"  # its architecture, 2.7 million numbers, random weights
TASKS = {"burn": "miou"}
SMALL = {"size": 32, "scene_size": 128}  # pixels of chips and scenes
CORPUS_SEED = 7  # other places than those of the tasks


def main() -> None:
    """Pretrain and score until the time is up, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/corpus_scale"))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--factors", type=int, nargs="+", default=[0, 1, 4, 16])
    parser.add_argument("--unit", type=int, default=40, help="chips of the 1x corpus")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--shots", type=int, default=4, help="few-shot: per region")
    parser.add_argument("--chips", type=int, default=24, help="of a task, per region")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    rows = Rows(arguments.out / "corpus_scale.csv", ("factor", "seed"))
    corpus = open_corpus(max(arguments.factors) * arguments.unit)
    tasks = {
        name: gk.simulated_data(name, chips_per_region=arguments.chips, **SMALL)
        for name in TASKS
    }
    due = [(factor, seed) for seed in arguments.seeds for factor in arguments.factors]
    for cell in rows.missing(due, began + 60 * arguments.minutes):
        rows.put(cell, measure(*cell, corpus, tasks, arguments))
    page = arguments.out / "corpus_scale.md"
    write_page(page, began, f"{corpus!r}.", report(rows.read()))


def open_corpus(chips: int) -> gk.ChipData:
    """Clear simulated scenes of five regions; their labels are not read."""
    return gk.simulated_data(
        "land_cover",
        chips_per_region=-(-chips // 5),
        chips_per_scene=8,
        val_fraction=0,
        seed=CORPUS_SEED,
        shift={"cloud": -1.0},
        **SMALL,
    )


def measure(
    factor: int,
    seed: int,
    corpus: gk.ChipData,
    tasks: dict[str, gk.ChipData],
    arguments: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Pretrain once; one row for each task and number of labels."""
    torch.manual_seed(seed)
    backbone = gk.load_backbone(BACKBONE, corpus.bands, weights=None)
    began, facts = time.process_time(), {}
    chips = factor * arguments.unit
    if chips:
        part = corpus.subset(chips, seed)
        run = gk.pretrain_geo_aware(
            backbone, part, arguments.steps, batch_size=16, seed=seed
        )
        facts = run.history.tail(20).mean().drop("step").add_prefix("train_").to_dict()
    facts |= {"chips": chips, "pretraining_cpu_s": time.process_time() - began}
    gk.attach(backbone, "frozen")
    rows = []
    for task, score in TASKS.items():
        few = tasks[task].n_shot(arguments.shots, seed)
        for labels, data in (("probe", tasks[task]), ("few-shot", few)):
            torch.manual_seed(seed)
            model = gk.build_model(backbone, "linear", data.task, data.num_classes or 2)
            gk.fit(model, data, epochs=10, seed=seed, progress=False)
            found = gk.evaluate(model, data, "test")["overall"][score]
            shown = {"task": task, "labels": labels, "metric": score, "score": found}
            rows.append(facts | shown)
    return rows


def report(rows: pd.DataFrame) -> str:
    """Mean with its 95 % interval over seeds, and the paired gain over 1x."""
    parts = []
    for (task, labels), own in rows.groupby(["task", "labels"], sort=False):
        wide = own.pivot(index="seed", columns="factor", values="score")
        lines = {
            f"{factor}x": {
                "chips": int(own.loc[own["factor"] == factor, "chips"].iloc[0]),
                "seeds": int(wide[factor].count()),
                own["metric"].iloc[0]: interval(wide[factor]),
                "minus 1x": "-" if factor == 1 else interval(wide[factor] - wide[1]),
            }
            for factor in wide
        }
        parts += [f"### {task}, {labels}", table(pd.DataFrame(lines).T)]
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
