"""How sure a regional score is, and how far seen and unseen regions lie apart.

A region with twenty chips has a score, but another twenty chips of it would have had
another one. The bootstrap asks how different: it draws the region's chips again, with
replacement, a thousand times, scores each draw, and reports the middle 95 %.

What it does not know: chips of one scene resemble each other, so true intervals are
wider than these; and it is about chips, not about training again with another seed.
Taught in `notebooks/09_unseen_regions.ipynb`.

Source:
    Percentile bootstrap: Efron and Tibshirani 1993, "An Introduction to the Bootstrap",
    chapter 13. Percentiles of the draws, not their standard error, which shrinks with
    the number of draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torchmetrics.functional.classification import (
    multiclass_confusion_matrix,
    multilabel_confusion_matrix,
)
from torchmetrics.functional.image import structural_similarity_index_measure

from geopeft_kit.data.chips import ChipData
from geopeft_kit.model import Model
from geopeft_kit.training.evaluate import HEADLINE, outputs_of
from geopeft_kit.training.task import batch_target


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
    """What each chip adds to the scores; sums of these give the pooled scores.

    Args:
        model: A trained model.
        data: The data set.
        split: Its split.
        device: Where to compute.

    Returns:
        (N, K, K) confusion matrices, truth by prediction; (N, K, 2, 2) for multilabel;
        (N, 3) pixels, absolute and squared errors for regression; (N, 4) values,
        squared errors, SSIM and 1 for super-resolution. And N region names.
    """
    counts: list[np.ndarray] = []
    regions: list[str] = []
    for output, batch in outputs_of(model, data, split, device):
        target = batch_target(batch)
        regions += list(batch["region"])
        for one, truth in zip(output, target, strict=True):
            counts.append(_count(one, truth, model, data.ignore_index))
    return np.stack(counts), np.array(regions, dtype=str)


def _count(output: Tensor, truth: Tensor, model: Model, ignored: Any) -> np.ndarray:
    """One chip: (K, H, W) or (K,) logits, or (1, H, W) values, and its truth."""
    if model.task == "regression":
        error = (output[0] - truth).double()
        error = error[torch.isfinite(truth)]
        return np.array([error.numel(), error.abs().sum(), error.square().sum()], float)
    if model.task == "super_resolution":
        error = (output - truth).double().square()
        alike: Any = structural_similarity_index_measure(
            output[None], truth[None], data_range=1.0
        )
        return np.array([error.numel(), error.sum(), float(alike), 1], float)
    if model.task == "multilabel":
        matrix = multilabel_confusion_matrix(
            (output > 0).long()[None], truth.long()[None], model.num_classes,
            ignore_index=ignored,
        )  # fmt: skip
    else:
        matrix = multiclass_confusion_matrix(
            output.argmax(dim=0)[None], truth.long()[None], model.num_classes,
            ignore_index=ignored,
        )  # fmt: skip
    return matrix.double().numpy()


def resampled_scores(
    counts: np.ndarray, task: str, resamples: int = 1000, seed: int = 0
) -> dict[str, np.ndarray]:
    """Scores of chips drawn with replacement.

    Args:
        counts: From `count_chips`, chips first.
        task: The model's task.
        resamples: Draws R.
        seed: Of the draws.

    Returns:
        Metric -> (R,) scores.

    Raises:
        ValueError: Fewer than two draws.
    """
    if resamples < 2:
        raise ValueError(f"resamples is {resamples}; it must be 2 or more (1000).")
    number = len(counts)
    rng = np.random.default_rng(seed)
    # How often each chip is drawn: a matrix product then sums all draws at once.
    times = rng.multinomial(number, np.full(number, 1 / number), size=resamples)
    sums = times @ counts.reshape(number, -1)  # (R, everything else)
    return scores_of(sums.reshape(resamples, *counts.shape[1:]), task)


def scores_of(sums: np.ndarray, task: str) -> dict[str, np.ndarray]:
    """Scores from summed counts, as `metrics` defines them.

    Args:
        sums: (..., K, K), (..., K, 2, 2), (..., 3) or (..., 4), see `count_chips`.
        task: The model's task.

    Returns:
        Metric -> (...) scores; a class that neither truth nor prediction holds is left
        out of the means.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        if task == "regression":
            pixels, absolute, squared = np.moveaxis(sums, -1, 0)
            return {"rmse": np.sqrt(squared / pixels), "mae": absolute / pixels}
        if task == "super_resolution":
            values, squared, alike, chips = np.moveaxis(sums, -1, 0)
            return {"psnr": 10 * np.log10(values / squared), "ssim": alike / chips}
        if task == "multilabel":
            hits = sums[..., 1, 1]
            false = sums[..., 0, 1] + sums[..., 1, 0]
            right = (hits + sums[..., 0, 0]).sum(axis=-1)
        else:
            hits = np.diagonal(sums, axis1=-2, axis2=-1)
            false = sums.sum(axis=-1) + sums.sum(axis=-2) - 2 * hits
            right = hits.sum(axis=-1)
        total = sums.reshape(*right.shape, -1).sum(axis=-1)
        present = np.where(hits + false > 0, 1.0, np.nan)
        classes = np.maximum(np.nansum(present, axis=-1), 1e-30)
        iou = np.nansum(hits / (hits + false) * present, axis=-1) / classes
        f1 = np.nansum(2 * hits / (2 * hits + false) * present, axis=-1) / classes
        empty = np.where(total > 0, 1.0, np.nan)
        return {"miou": iou * empty, "f1": f1 * empty, "accuracy": right / total}


def _interval(draws: np.ndarray, level: float, chips: int) -> tuple[float, float]:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; it is a share between 0 and 1 (0.95).")
    if chips < 2 or np.isnan(draws).all():
        return float("nan"), float("nan")
    edges = [50 * (1 - level), 50 * (1 + level)]
    low, high = np.nanpercentile(draws, edges)
    return float(low), float(high)
