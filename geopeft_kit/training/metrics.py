"""Scores, pooled over a data set: overall and for each region.

A score is computed from one confusion matrix (or one sum of errors) over all pixels or
samples. The mean of the scores of batches is another number: it depends on how the data
was cut into batches, and rare classes make it lie. Notebooks 00 and 09.

What the macro mean of `miou` and `f1` does: each class counts alike, however rare. A
class that neither the truth nor the prediction holds is left out. A class that is
predicted somewhere but never true counts, with 0. So one wrong pixel of a class that a
region does not have costs that region a lot, which is worth knowing for small regions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import (
    MeanAbsoluteError,
    MeanSquaredError,
    Metric,
    MetricCollection,
)
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassJaccardIndex,
    MultilabelAccuracy,
    MultilabelConfusionMatrix,
)
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

CLASS_TASKS = ("segmentation", "classification", "change")
VALUE_TASKS = ("regression", "super_resolution")
TASKS = (*CLASS_TASKS, "multilabel", *VALUE_TASKS)


def make_metrics(
    task: str, num_classes: int, ignore_index: int | None = 255
) -> MetricCollection:
    """The metrics of a task, to be updated with predictions and targets.

    `miou` and `f1` are macro means over classes (see the head of this file), `accuracy`
    is the share of all pixels, images or label decisions that are right, `rmse` and
    `mae` are over all pixels. `psnr` (dB, over all pixels) and `ssim` (mean of images)
    of super-resolution take a reflectance of 1 as the range of values.

    Args:
        task: "segmentation", "change", "classification", "multilabel", "regression" or
            "super_resolution".
        num_classes: classes (or labels) K; without effect for regression.
        ignore_index: target value that carries no label; regression takes care of it
            in `RegionalMetrics`.

    Returns:
        A collection with the keys `miou`, `f1`, `accuracy`, or `rmse`, `mae`, or
        `psnr`, `ssim`. Classes
        take class numbers, multilabel takes zeros and ones: never logits, because
        torchmetrics reads logits that happen to lie in 0-1 as probabilities.

    Raises:
        ValueError: unknown task.
    """
    # Arguments are checked once in `RegionalMetrics`, not by every metric again.
    common: dict[str, Any] = {"ignore_index": ignore_index, "validate_args": False}
    metrics: dict[str, Metric | MetricCollection]
    if task in CLASS_TASKS:
        metrics = {
            "miou": MulticlassJaccardIndex(num_classes, average="macro", **common),
            "f1": MulticlassF1Score(num_classes, average="macro", **common),
            "accuracy": MulticlassAccuracy(num_classes, average="micro", **common),
        }
    elif task == "multilabel":
        metrics = {
            "miou": LabelScore(num_classes, beta=False, **common),
            "f1": LabelScore(num_classes, beta=True, **common),
            "accuracy": MultilabelAccuracy(num_classes, average="micro", **common),
        }
    elif task == "regression":
        metrics = {"rmse": MeanSquaredError(squared=False), "mae": MeanAbsoluteError()}
    elif task == "super_resolution":
        metrics = {
            "psnr": PeakSignalNoiseRatio(data_range=1.0),
            "ssim": StructuralSimilarityIndexMeasure(data_range=1.0),
        }
    else:
        raise ValueError(f"unknown task {task!r}. Choose one of: {', '.join(TASKS)}.")
    return MetricCollection(metrics)


class LabelScore(MultilabelConfusionMatrix):
    """Macro IoU or F1 of a multilabel task, without the labels that do not occur.

    torchmetrics' own multilabel scores count such a label as 0, unlike its multiclass
    ones; a region without glaciers would lose points for every glacier it has not.

    Args:
        num_labels: labels K.
        beta: True for F1, False for intersection over union.
        **options: of `MultilabelConfusionMatrix`.
    """

    def __init__(self, num_labels: int, beta: bool, **options: Any) -> None:
        super().__init__(num_labels, **options)
        self.beta = beta

    def compute(self) -> Tensor:
        """Mean over the labels that the truth or the prediction holds."""
        counts = self.confmat.double()  # (K, 2, 2), truth x prediction
        hits, errors = counts[:, 1, 1], counts[:, 0, 1] + counts[:, 1, 0]
        weight = 2.0 if self.beta else 1.0
        scores = weight * hits / (weight * hits + errors)  # 0 / 0 where absent
        return scores.nanmean()


class RegionalMetrics:
    """One collection of metrics for everything and one for each region.

    Args:
        task: as for `make_metrics`.
        num_classes: classes K.
        ignore_index: target value that carries no label. In regression NaN carries
            none either; a value equal to `ignore_index` is left out as well, so give
            None where it can be a real one.

    Raises:
        ValueError: unknown task.
    """

    def __init__(
        self, task: str, num_classes: int, ignore_index: int | None = 255
    ) -> None:
        self.task, self.num_classes = task, num_classes
        self.ignore_index = ignore_index
        self._all = self._new()
        self._regions: dict[str, MetricCollection] = {}
        self._labelled: dict[str, int] = {}

    def update(self, output: Tensor, target: Tensor, regions: Sequence[str]) -> None:
        """Take in a batch.

        Args:
            output: (B, K, H, W) or (B, K) logits, or (B, 1, H, W) values; (B, K, H, W)
                values for super-resolution.
            target: (B, H, W) or (B,) class numbers, (B, K) zeros and ones, or
                (B, H, W) values with NaN where unknown; (B, K, H, W) for
                super-resolution.
            regions: B names.

        Raises:
            ValueError: shapes that do not fit, or a class number out of range.
        """
        prediction = self._predict(output)
        self._check(prediction, target, regions)
        if self.task not in VALUE_TASKS:
            target = target.long()
        valid = self._valid(target)
        for name in dict.fromkeys(regions):
            rows = torch.tensor([r == name for r in regions], device=target.device)
            chosen = (prediction[rows], target[rows])
            if self.task == "regression":
                chosen = (chosen[0][valid[rows]], chosen[1][valid[rows]])  # (N,)
            labelled = int(valid[rows].sum())
            self._labelled[name] = self._labelled.get(name, 0) + labelled
            if name not in self._regions:
                self._regions[name] = self._new()
            if labelled:  # a batch without labels would only cause warnings
                self._regions[name].to(target.device).update(*chosen)
                self._all.to(target.device).update(*chosen)

    def compute(self) -> dict[str, Any]:
        """Scores so far.

        Returns:
            `{"overall": {metric: value}, "regions": {name: {metric: value}}}`, names in
            alphabetical order; NaN where there was not one label.
        """
        regions = {
            name: self._scores(self._regions[name], self._labelled[name])
            for name in sorted(self._regions)
        }
        overall = self._scores(self._all, sum(self._labelled.values()))
        return {"overall": overall, "regions": regions}

    def _new(self) -> MetricCollection:
        return make_metrics(self.task, self.num_classes, self.ignore_index)

    def _scores(self, metrics: MetricCollection, labelled: int) -> dict[str, float]:
        if not labelled:
            return {str(name): float("nan") for name in metrics.keys()}
        return {name: float(value) for name, value in metrics.compute().items()}

    def _predict(self, output: Tensor) -> Tensor:
        """Logits -> class numbers or zeros and ones; values stay values."""
        if self.task == "regression":
            return output.squeeze(1)  # (B, H, W)
        if self.task == "super_resolution":
            return output
        if self.task == "multilabel":
            return (output > 0).long()  # a chance above one half
        return output.argmax(dim=1)

    def _valid(self, target: Tensor) -> Tensor:
        valid = torch.ones_like(target, dtype=torch.bool)
        if self.ignore_index is not None:
            valid = target != self.ignore_index
        if self.task == "regression":
            valid = valid & torch.isfinite(target)
        return valid

    def _check(
        self, prediction: Tensor, target: Tensor, regions: Sequence[str]
    ) -> None:
        if prediction.shape != target.shape or len(regions) != len(target):
            raise ValueError(
                f"predictions of shape {tuple(prediction.shape)}, targets of shape "
                f"{tuple(target.shape)} and {len(regions)} region names do not belong "
                "together: all have to be of one batch and one image size."
            )
        if self.task in VALUE_TASKS:
            return
        labels = target[self._valid(target)]
        classes = 2 if self.task == "multilabel" else self.num_classes
        if labels.numel() and (labels.min() < 0 or labels.max() >= classes):
            wrong = [v for v in labels.unique().tolist() if not 0 <= v < classes]
            raise ValueError(
                f"the target holds {wrong[:5]}; allowed are 0 to {classes - 1}, and "
                f"{self.ignore_index} for no label. Check num_classes and the ignore "
                "value of the data set."
            )
