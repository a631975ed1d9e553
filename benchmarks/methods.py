"""Every PEFT method that fits, on real pixels and real weights.

    python benchmarks/methods.py --data DIR --out build/methods

Three studies, each with as many learning-rate trials for every candidate:

- eurosat: Galileo nano's real weights, classification, an unseen longitude block.
- terramesh: twelve bands for a network that was pretrained on red, green and blue;
  windows of the same five places, which cannot support a claim about regions.
- simulated: six bands for the same network, floods, the simulated region "savanna"
  unseen.

Rows are written as they come and a rerun goes on; `--share 0/2` and `--share 1/2` in
two processes split the candidates. `--report` only writes the tables.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from paired import (
    Journal,
    Study,
    difference,
    final_rows,
    mark_searches,
)
from shared import RGB, convert, pixel_rows, search_table, table, write_page

import geopeft_kit as gk
from geopeft_kit.comparison import half_width
from geopeft_kit.training.plan import DECODER_LEARNING_RATE

# A trial is the default of the method's card times one of these.
FACTORS = (0.25, 1.0, 4.0, 16.0)
# Sizes other than the card's defaults, and why.
OPTIONS: dict[str, dict[str, Any]] = {
    "vpt": {"tokens": 16},  # 100 tokens would be more than the image's own 64
}
CARDS = {card.name: card for card in gk.list_methods()}


def main() -> None:
    """Run the studies that were asked for and write their tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("build/methods"))
    parser.add_argument("--studies", nargs="+", default=list(STUDIES), choices=STUDIES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--factors", type=float, nargs="+", default=FACTORS)
    parser.add_argument("--only", nargs="+", default=None, help="labels")
    parser.add_argument("--share", default="0/1", help="number/count of processes")
    parser.add_argument("--report", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.studies:
        began = time.monotonic()
        study, candidates, rivals, notes = STUDIES[name](arguments)
        number, count = map(int, arguments.share.split("/"))
        if not arguments.report:
            mine = [c for c in candidates if c.label in (arguments.only or [c.label])]
            study.run(mine[number::count], arguments.seeds)
            continue
        rows = report(study, candidates, rivals(arguments.seeds))
        page = arguments.out / f"{name}.md"
        write_page(page, began, f"### {name}", *notes, *rows)


Parts = tuple[Study, list[gk.Candidate], Callable[[Sequence[int]], pd.DataFrame], list]


def eurosat(arguments: argparse.Namespace) -> Parts:
    """Galileo nano and all methods that serve it."""
    folder = convert("eurosat_rgb", arguments, "--in-region", "0.2")
    data = gk.ChipData(folder, split="index", batch_size=16)
    weights = arguments.data / "galileo_nano" / "encoder.pt"
    options = {"bands": data.bands, "weights": weights}
    study = _study("eurosat", data, "galileo_nano", options, 3, 512, arguments)
    backbone = gk.load_backbone("galileo_nano", **options)
    candidates = [
        _candidate(name, name, OPTIONS.get(name, {}), arguments.factors)
        for name, card in CARDS.items()
        if card.supports(backbone)
    ]
    small = {"rank": 8, "targets": ("q", "v")}
    candidates.append(_candidate("lora q, v, rank 8", "lora", small, arguments.factors))
    refused = [
        f"{name}: {card.why_not(backbone)}"
        for name, card in CARDS.items()
        if not card.supports(backbone)
    ]
    notes = [f"{data!r}.", "Not served: " + "; ".join(refused or ["none"])]
    return study, candidates, lambda seeds: pixel_rows(data, seeds, 512), notes


def terramesh(arguments: argparse.Namespace) -> Parts:
    """Twelve bands, windows of five places, for the RGB network."""
    folder = convert("terramesh", arguments, "--chip", "32")
    data = gk.ChipData(folder, split="index", batch_size=8)
    seen = gk.ChipData(folder, bands=RGB, split="index", batch_size=8)
    return _rgb_study("terramesh", data, seen, 32, 8, arguments)


def simulated(arguments: argparse.Namespace) -> Parts:
    """Six bands, simulated floods, for the RGB network."""
    data = gk.simulated_data("flood", "hls", chips_per_region=48)
    seen = gk.simulated_data("flood", RGB, chips_per_region=48)
    return _rgb_study("simulated", data, seen, 64, 6, arguments)


def _rgb_study(
    name: str,
    data: gk.ChipData,
    seen: gk.ChipData,
    size: int,
    epochs: int,
    arguments: argparse.Namespace,
) -> Parts:
    """An RGB-pretrained network under images with more bands."""
    options = {"bands": data.bands, "image_size": size, "new_bands": "ignore"}
    study = _study(name, data, "geopeft_tiny_rgb", options, epochs, 96, arguments)
    copied, drawn = {"new_bands": "copy_nearest"}, {"new_bands": "random"}
    shared = {"new_bands": "share_nearest"}
    plan: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
        ("RGB only: probe", "frozen", {}, {}),
        ("RGB only: norm", "norm", {}, {}),
        ("RGB only: bias", "bias", {}, {}),
        ("RGB only: LoRA", "lora", {}, {}),
        ("RGB only: SLR", "slr", {}, {}),
        ("RGB only: full", "full", {}, {}),
        ("copied bands: probe", "frozen", {}, copied),
        ("copied bands: LoRA", "lora", {}, copied),
        ("copied bands: full", "full", {}, copied),
        ("shared bands: probe", "frozen", {}, shared),
        ("shared bands: LoRA", "lora", {}, shared),
        ("random bands: LoRA", "lora", {}, drawn),
        ("random bands: full", "full", {}, drawn),
        ("SLR with patch embedding", "slr", {"patch_embedding": True}, {}),
        ("DEFLECT-style", "deflect", {}, {}),
        ("DEFLECT-style, unbounded", "deflect", {"stage": "unbounded"}, {}),
        ("DEFLECT-style, attention", "deflect", {"stage": "attention"}, {}),
        ("DEFLECT-style, embedding alone", "deflect", {"stage": "embedding"}, {}),
    ]
    candidates = [
        _candidate(label, method, extra, arguments.factors, backbone)
        for label, method, extra, backbone in plan
        if method in CARDS
    ]

    def rivals(seeds: Sequence[int]) -> pd.DataFrame:
        pixels = [
            pixel_rows(seen, seeds, 96, "pixel statistics, RGB only"),
            pixel_rows(data, seeds, 96, "pixel statistics, all bands"),
        ]
        return pd.concat(pixels, ignore_index=True)

    return study, candidates, rivals, [f"{data!r}."]


STUDIES: dict[str, Callable[[argparse.Namespace], Parts]] = {
    "eurosat": eurosat,
    "terramesh": terramesh,
    "simulated": simulated,
}


def _study(
    name: str,
    data: gk.ChipData,
    backbone: str,
    options: dict[str, Any],
    epochs: int,
    chips: int,
    arguments: argparse.Namespace,
) -> Study:
    writer = int(arguments.share.split("/")[0])
    journal = Journal(arguments.out, name, writer)
    return Study(data, backbone, options, epochs, chips, journal)


def _candidate(
    label: str,
    method: str,
    options: dict[str, Any],
    factors: Sequence[float],
    backbone: dict[str, Any] | None = None,
) -> gk.Candidate:
    """A row, with its trials spread around the default of the method's card."""
    rate = CARDS[method].learning_rate or DECODER_LEARNING_RATE
    rates = [float(f"{rate * factor:.3g}") for factor in factors]
    return gk.Candidate(label, method, options, backbone or {}, learning_rates=rates)


def report(
    study: Study, candidates: Sequence[gk.Candidate], rivals: pd.DataFrame
) -> list[str]:
    """Scores and paired differences, then all learning-rate trials, as Markdown."""
    rows = study.journal.rows()
    searches = mark_searches(rows)
    finals = pd.concat([final_rows(rows), rivals], ignore_index=True)
    if study.data.task == "classification":
        draw(finals, "accuracy", study.journal.folder / f"{study.journal.study}.png")
    labels = [c.label for c in candidates] + list(rivals["label"].unique())
    trials = search_table(searches)
    trials = trials.loc[[label for label in labels if label in trials.index]]
    return [table(summary(finals, rows, labels)), table(trials)]


def summary(
    finals: pd.DataFrame, rows: pd.DataFrame, labels: Sequence[str]
) -> pd.DataFrame:
    """One row a candidate; a candidate without a score says what went wrong."""
    seen = "in_region" if finals["in_region"].notna().any() else "val"
    full = next(label for label in labels if label.endswith("full"))
    lora = next(label for label in labels if label.lower().endswith("lora"))
    lines = {}
    for label in labels:
        own = finals[finals["label"] == label]
        if own.empty:
            problems = rows.loc[rows["label"] == label, "problem"].dropna().unique()
            lines[label] = {"seeds": 0, "problem": "; ".join(problems) or "not run"}
            continue
        lines[label] = {
            "seeds": len(own),
            "trained in backbone": own["backbone_trainable"].iloc[0],
            "KiB": own["adapter_kib"].iloc[0],
            "ms a step": own["step_ms"].min(),
            f"seen ({seen})": spread(own[seen]),
            "unseen (test)": spread(own["test"]),
            "unseen, to full": difference(finals, label, full, "test"),
            "unseen, to LoRA": difference(finals, label, lora, "test"),
            "problem": "; ".join(own["problem"].dropna().unique()) or "-",
        }
    return pd.DataFrame(lines).T.rename_axis("label")


def draw(finals: pd.DataFrame, score: str, path: Path) -> None:
    """Unseen score against trained numbers, a point a method, beside full fine-tuning.

    Bars are 95 % intervals of the paired difference to full fine-tuning: seeds draw
    their own training chips, and that common part is not a difference of methods. A
    point with fewer than three seeds has no bar.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 5.6), layout="constrained")
    axis = figure.subplots()
    wide = finals.pivot(index="seed", columns="label", values="test")
    level = 100 * wide["full"].mean()
    axis.axhline(level, color="0.6", linewidth=0.8, zorder=0)
    first = finals.drop_duplicates("label").set_index("label")
    trained = first["backbone_trainable"]  # none for rivals without a network
    least = trained[trained > 0].min()
    for name in trained.dropna().sort_values().index:
        method = first.loc[name, "method"]
        gap = 100 * (wide[name] - wide["full"]).dropna()
        # an interval over two seeds would fill the whole picture
        half = half_width(gap) if len(gap) > 2 else float("nan")
        place = first.loc[name, "backbone_trainable"] or least / 3
        axis.errorbar(
            place,
            level + gap.mean(),
            yerr=half,
            color=gk.plots.method_colour(method),
            marker=gk.plots.method_marker(method),
            linestyle="none",
            elinewidth=1.2,
            label=name,
        )
    axis.set_xscale("log")
    axis.set_xlabel("numbers trained in the backbone (log; the probe trains none)")
    axis.set_ylabel(f"{score} on the unseen block (%)")
    axis.legend(bbox_to_anchor=(1.01, 1), loc="upper left", fontsize="small", ncols=1)
    figure.savefig(path, dpi=110)


def spread(scores: pd.Series) -> str:
    """Mean and standard deviation in percent."""
    if len(scores) < 2:
        return f"{100 * scores.mean():.1f}"
    return f"{100 * scores.mean():.1f} ± {100 * scores.std():.1f}"


if __name__ == "__main__":
    main()
