"""A linear probe for many backbones: features once, a regression solved for each seed.

The regression is logistic, solved to convergence, so there is no learning rate to
search; the penalty on its coefficients is chosen on "val". Seeds draw the training
images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import geopeft_kit as gk
from geopeft_kit.backbones.base import Backbone
from geopeft_kit.baselines import fit_logistic

PENALTIES = (1e-4, 1e-3, 1e-2)


def probe(
    backbone: Backbone,
    data: gk.ChipData,
    seeds: Sequence[int],
    chips: int,
    unseen: str = "test",
) -> list[dict[str, Any]]:
    """Accuracy of a linear probe on each split, one row a seed.

    Args:
        backbone: Its pooled features are read.
        data: Classification chips with train and val.
        seeds: Of the draw of training images.
        chips: Training images.
        unseen: The split that is held out to the end.
    """
    read = [split for split in ("train", "val", unseen) if split in data.splits]
    features = {split: pooled(backbone, data, split) for split in read}
    position = {row: i for i, row in enumerate(data.dataset("train").rows)}
    rows = []
    for seed in seeds:
        chosen = data.subset(chips, seed).dataset("train").rows
        drawn = [position[row] for row in chosen]
        rows.append({"seed": seed, **_scores(features, drawn, data.num_classes)})
    return rows


@torch.inference_mode()
def pooled(backbone: Backbone, data: gk.ChipData, split: str) -> tuple[Tensor, Tensor]:
    """Mean of the last map of every image, (N, D), and its label, (N,)."""
    model = gk.build_model(backbone, task=data.task, num_classes=data.num_classes)
    found = [
        (model.features(batch["image"])[0].flatten(1), batch["label"])
        for batch in data.dataloader(split)
    ]
    features, labels = map(torch.cat, zip(*found, strict=True))
    return features.clone(), labels.clone()


def _scores(
    features: dict[str, tuple[Tensor, Tensor]], drawn: list[int], classes: int
) -> dict[str, float]:
    """Solve the probe for each penalty, and score the one that is best on val."""
    table, labels = (part[drawn] for part in features["train"])
    mean, std = table.mean(0), table.std(0).clamp(min=1e-6)
    best: dict[str, float] = {"val": -1.0}
    for penalty in PENALTIES:
        layer = fit_logistic((table - mean) / std, labels, classes, penalty)
        scores = {"penalty": penalty}
        for split in features.keys() - {"train"}:
            inputs, truth = features[split]
            guess = layer((inputs - mean) / std).argmax(1)
            scores[split] = float((guess == truth).float().mean())
        best = max(best, scores, key=lambda row: row["val"])
    return best
