"""Scores of a model on a split: overall, by region, and how sure they are.

Scores are pooled over the data set: one confusion matrix (or one sum of squared errors)
over all pixels, never a mean of batch means.

A region with twenty chips has a score, but another twenty chips of it would have had
another one. The bootstrap draws the region's chips again, with replacement, a thousand
times, scores each draw, and reports the middle 95 %. Chips of one scene resemble each
other, so true intervals are wider; and another seed of the training is not covered.
Taught in notebooks 00 and 09.

Source: percentile bootstrap, Efron and Tibshirani 1993, "An Introduction to the
Bootstrap", chapter 13. Percentiles of the draws, not their standard error, which
shrinks with the number of draws.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from geopeft_kit.data.batch import Batch
from geopeft_kit.data.chips import ChipData
from geopeft_kit.data.torchgeo_data import AnyData, as_data
from geopeft_kit.model import Model
from geopeft_kit.training.hardware import choose_device
from geopeft_kit.training.metrics import (
    VALUE_TASKS,
    ChipCounts,
    RegionalMetrics,
    scores_of,
)
from geopeft_kit.training.step import output_of

# The score that model selection looks at, and whether more of it is better.
HEADLINE = {
    "segmentation": ("miou", True),
    "change": ("miou", True),
    "classification": ("accuracy", True),
    "multilabel": ("f1", True),
    "regression": ("rmse", False),
    "super_resolution": ("psnr", True),
}


def evaluate(
    model: Model,
    data: AnyData,
    split: str = "test",
    device: str | torch.device = "auto",
) -> dict[str, Any]:
    """Score a model on one split.

    Args:
        model: A trained model.
        data: The data set, of any kind that `fit` takes.
        split: "train", "val" or "test"; "test" is the unseen region by default.
        device: Where to compute.

    Returns:
        `{"overall": {metric: value}, "regions": {name: {metric: value}}}`, with
        `miou`, `f1` and `accuracy` for classes, `rmse` and `mae` for regression,
        `psnr` (dB) and `ssim` for super-resolution.

    Raises:
        ValueError: The split has no chips.
    """
    chips: ChipData = as_data(data, model.task, model.num_classes)
    ignored = _ignored_value(model, chips)
    metrics = RegionalMetrics(model.task, model.num_classes, ignored)
    for output, batch in outputs_of(model, chips, split, device):
        metrics.update(output, batch.target, batch.region)
    return metrics.compute()


def outputs_of(
    model: Model,
    data: ChipData,
    split: str = "test",
    device: str | torch.device = "auto",
) -> Iterator[tuple[Tensor, Batch]]:
    """Yield the output (B, ...) for every batch of a split, and the batch, on the CPU.

    The model is in the same mode afterwards.
    """
    device = choose_device(device)
    training = model.training
    model.to(device).eval()
    # weights held in bf16 (see frozen_precision.py) compute in bf16
    low = any(p.dtype == torch.bfloat16 for p in model.parameters())
    try:
        for loaded in data.dataloader(split):
            batch = Batch.of(loaded)
            with (  # not across the yield: it would leak out
                torch.inference_mode(),
                torch.autocast(device.type, torch.bfloat16, enabled=low),
            ):
                output = output_of(model, batch.to(device)).float().cpu()
            yield output, batch
    finally:
        model.train(training)


def score_regions(
    model: Model,
    data: ChipData,
    split: str = "test",
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    device: str | torch.device = "auto",
) -> pd.DataFrame:
    """Score each region of a split, with a bootstrap interval over its chips.

    Args:
        model: A trained model.
        data: The data set.
        split: "train", "val" or "test".
        resamples: Draws of the bootstrap.
        level: Share of the draws that the interval holds.
        seed: Of the draws.
        device: Where to compute.

    Returns:
        One row per region, "all regions" first: region, chips, and for each metric of
        `gk.evaluate` three columns as `miou`, `miou_low`, `miou_high`. An interval
        from a single chip is NaN.

    Raises:
        ValueError: The split has no chips, or `resamples` or `level` do not fit.
    """
    counts, regions = count_chips(model, data, split, device)
    rows = []
    for name in ["all regions", *np.unique(regions)]:
        chosen = counts if name == "all regions" else counts[regions == name]
        draws = resampled_scores(chosen, model.task, resamples, seed)
        row: dict[str, Any] = {"region": str(name), "chips": len(chosen)}
        for metric, value in scores_of(chosen.sum(axis=0), model.task).items():
            low, high = _interval(draws[metric], level, len(chosen))
            row |= {metric: float(value), f"{metric}_low": low, f"{metric}_high": high}
        rows.append(row)
    return pd.DataFrame(rows)


def region_gap(
    models: Mapping[str, Any],
    data: ChipData,
    metric: str | None = None,
    seen: str = "val",
    unseen: str = "test",
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    device: str | torch.device = "auto",
) -> pd.DataFrame:
    """How much worse each method is where it was not trained.

    Args:
        models: Name -> a trained model, or something whose `activate()` gives one, as
            `gk.compare(...).trained`.
        data: The data set they were trained on.
        metric: By default the headline metric of the task.
        seen: Split with other chips of the training regions.
        unseen: Split with regions that were held out.
        resamples: Draws of the bootstrap, over the chips of each split on its own.
        level: Share of the draws that an interval holds.
        seed: Of the draws.
        device: Where to compute.

    Returns:
        One row per method: method, seen, unseen, gap, and `_low`, `_high` of each. A
        positive gap means worse on unseen ground, for errors as for scores.

    Raises:
        ValueError: No models, an unknown metric, or a split without chips.
    """
    if not models:
        raise ValueError("models is empty; pass {'name': trained model, ...}.")
    rows = []
    for name, entry in models.items():
        model = entry.activate() if hasattr(entry, "activate") else entry
        headline, larger_is_better = HEADLINE[model.task]
        chosen = metric or headline
        sign = 1 if larger_is_better else -1
        point, draws, fewest = {}, {}, []
        for side, split in (("seen", seen), ("unseen", unseen)):
            counts, _ = count_chips(model, data, split, device)
            known = scores_of(counts.sum(axis=0), model.task)
            if chosen not in known:
                raise ValueError(
                    f"metric is {chosen!r}; task {model.task!r} has {', '.join(known)}."
                )
            point[side] = float(known[chosen])
            offset = 0 if side == "seen" else 1  # two independent sets of draws
            draws[side] = resampled_scores(
                counts, model.task, resamples, 2 * seed + offset
            )[chosen]
            fewest.append(len(counts))
        point["gap"] = sign * (point["seen"] - point["unseen"])
        draws["gap"] = sign * (draws["seen"] - draws["unseen"])
        row: dict[str, Any] = {"method": name, "metric": chosen}
        for side, value in point.items():
            low, high = _interval(draws[side], level, min(fewest))
            row |= {side: value, f"{side}_low": low, f"{side}_high": high}
        rows.append(row)
    return pd.DataFrame(rows)


def count_chips(
    model: Model, data: ChipData, split: str, device: str | torch.device = "auto"
) -> tuple[np.ndarray, np.ndarray]:
    """The counts of a split's N chips, see `ChipCounts`, and their region names."""
    count = ChipCounts(model.task, model.num_classes, _ignored_value(model, data))
    counts: list[np.ndarray] = []
    regions: list[str] = []
    for output, batch in outputs_of(model, data, split, device):
        counts += [*count(output, batch.target)]
        regions += batch.region
    return np.stack(counts), np.array(regions, dtype=str)


def resampled_scores(
    counts: np.ndarray, task: str, resamples: int = 1000, seed: int = 0
) -> dict[str, np.ndarray]:
    """Metric -> (R,) scores of chips drawn with replacement, R times.

    `counts` is from `count_chips`. Raises ValueError for fewer than two draws.
    """
    if resamples < 2:
        raise ValueError(f"resamples is {resamples}; it must be 2 or more (1000).")
    number = len(counts)
    rng = np.random.default_rng(seed)
    # How often each chip is drawn: a matrix product then sums all draws at once.
    times = rng.multinomial(number, np.full(number, 1 / number), size=resamples)
    sums = times @ counts.reshape(number, -1)  # (R, everything else)
    return scores_of(sums.reshape(resamples, *counts.shape[1:]), task)


def _ignored_value(model: Model, data: ChipData) -> int | None:
    """The target value without a label; none for values, where any number is real."""
    return None if model.task in VALUE_TASKS else data.ignore_index


def _interval(draws: np.ndarray, level: float, chips: int) -> tuple[float, float]:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; it is a share between 0 and 1 (0.95).")
    if chips < 2 or np.isnan(draws).all():
        return float("nan"), float("nan")
    edges = [50 * (1 - level), 50 * (1 + level)]
    low, high = np.nanpercentile(draws, edges)
    return float(low), float(high)
