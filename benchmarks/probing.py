"""A linear probe of whole images: features once, then a regression.

The regression is logistic, solved to convergence, so there is no learning rate to
search; the penalty on its coefficients is chosen on "val". The seed draws the training
images.
"""

from __future__ import annotations

import torch
from torch import Tensor

import geopeft_kit as gk
from geopeft_kit.backbones.base import Backbone
from geopeft_kit.baselines import fit_logistic

PENALTIES = (1e-4, 1e-3, 1e-2)
VAL = 200  # images that choose the penalty


def probe(
    backbone: Backbone, data: gk.ChipData, seed: int, chips: int
) -> dict[str, float]:
    """Accuracy of a linear probe on val and test, and its penalty.

    Args:
        backbone: Its pooled features are read.
        data: Classification chips with train, val and test.
        seed: Of the draw of training images.
        chips: Training images.
    """
    few = min(VAL, len(data.dataset("val")))
    drawn = data.subset(chips, seed).subset(few, split="val")
    features = {
        split: pooled(backbone, drawn, split) for split in ("train", "val", "test")
    }
    table, labels = features.pop("train")
    mean, std = table.mean(0), table.std(0).clamp(min=1e-6)
    best: dict[str, float] = {"val": -1.0}
    for penalty in PENALTIES:
        layer = fit_logistic((table - mean) / std, labels, data.num_classes, penalty)
        scores = {"penalty": penalty}
        for split, (inputs, truth) in features.items():
            guess = layer((inputs - mean) / std).argmax(1)
            scores[split] = float((guess == truth).float().mean())
        best = max(best, scores, key=lambda row: row["val"])
    return best


@torch.no_grad()
def pooled(backbone: Backbone, data: gk.ChipData, split: str) -> tuple[Tensor, Tensor]:
    """Mean of the last map of every image, (N, D), and its label, (N,)."""
    model = gk.build_model(backbone, task=data.task, num_classes=data.num_classes)
    found = [
        (model.features(batch["image"])[0].flatten(1), batch["label"])
        for batch in data.dataloader(split)
    ]
    features, labels = map(torch.cat, zip(*found, strict=True))
    return features, labels
