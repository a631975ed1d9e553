"""Scores from counts: every chip is counted, and a score is computed from the sums.

The mean of the scores of batches is another number: it depends on how the data was cut
into batches, and rare classes distort it. Taught in notebooks 00 and 09.

`miou` and `f1` are macro means: each class counts alike, however rare. A class that
neither the truth nor the prediction holds is left out. A class that is predicted
somewhere but never true counts as 0, so that one wrong pixel of a class that a region
does not have costs that region a lot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.classification import (
    multiclass_confusion_matrix,
    multilabel_confusion_matrix,
)
from torchmetrics.functional.image import structural_similarity_index_measure

CLASS_TASKS = ("segmentation", "classification", "change")
VALUE_TASKS = ("regression", "super_resolution")
TASKS = (*CLASS_TASKS, "multilabel", *VALUE_TASKS)


class ChipCounts:
    """Turns outputs and targets of a task into counts, one array for each chip.

    A target of `ignore_index` carries no label. In regression NaN carries none either;
    pass None where the value can be a real one.
    """

    def __init__(
        self, task: str, num_classes: int, ignore_index: int | None = 255
    ) -> None:
        if task not in TASKS:
            raise ValueError(
                f"unknown task {task!r}. Choose one of: {', '.join(TASKS)}."
            )
        self.task, self.num_classes = task, num_classes
        self.ignore_index = ignore_index

    def __call__(self, output: Tensor, target: Tensor) -> np.ndarray:
        """Count a batch of B chips; outputs and targets as for `compute_loss`.

        Returns float64: (B, K, K) confusion matrices, truth by prediction; (B, K, 2, 2)
        for multilabel; (B, 3) pixels, absolute and squared errors for regression;
        (B, 4) values, squared errors, SSIM and 1 for super-resolution. Raises
        ValueError for shapes that do not fit, or a class number out of range.
        """
        prediction, target = self._predict(output.cpu()), target.cpu()
        if prediction.shape != target.shape:
            raise ValueError(
                f"predictions of shape {tuple(prediction.shape)} and targets of shape "
                f"{tuple(target.shape)} do not belong together: both have to be of one "
                "batch and one image size."
            )
        if self.task not in VALUE_TASKS:
            target = target.long()
            self._check_classes(target)
        chips = zip(prediction, target, strict=True)
        return np.stack([self._count(one, truth) for one, truth in chips])

    def _predict(self, output: Tensor) -> Tensor:
        """Logits -> class numbers or zeros and ones; values stay values."""
        if self.task == "regression":
            return output.squeeze(1)  # (B, H, W)
        if self.task == "super_resolution":
            return output
        if self.task == "multilabel":
            return (output > 0).long()  # a probability above one half
        return output.argmax(dim=1)

    def _count(self, prediction: Tensor, truth: Tensor) -> np.ndarray:
        """The counts of one chip."""
        if self.task == "regression":
            error = (prediction - truth).double()[self._valid(truth)]
            return np.array([error.numel(), error.abs().sum(), error.square().sum()])
        if self.task == "super_resolution":
            squared = (prediction - truth).double().square().sum()
            alike: Any = structural_similarity_index_measure(
                prediction[None], truth[None], data_range=1.0
            )
            return np.array([truth.numel(), squared, float(alike), 1.0])
        matrix = (
            multilabel_confusion_matrix
            if self.task == "multilabel"
            else multiclass_confusion_matrix
        )
        counts = matrix(
            prediction[None],
            truth[None],
            self.num_classes,
            ignore_index=self.ignore_index,
            validate_args=False,
        )
        return counts.double().numpy()

    def _valid(self, target: Tensor) -> Tensor:
        """Where the target carries a label."""
        valid = torch.isfinite(target)
        if self.ignore_index is not None:
            valid = valid & (target != self.ignore_index)
        return valid

    def _check_classes(self, target: Tensor) -> None:
        labels = target[self._valid(target)]
        classes = 2 if self.task == "multilabel" else self.num_classes
        if labels.numel() and (labels.min() < 0 or labels.max() >= classes):
            wrong = [v for v in labels.unique().tolist() if not 0 <= v < classes]
            raise ValueError(
                f"the target holds {wrong[:5]}; allowed are 0 to {classes - 1}, and "
                f"{self.ignore_index} for no label. Check num_classes and the ignore "
                "value of the data set."
            )


class RegionalMetrics:
    """Scores of everything and of each region; arguments as for `ChipCounts`."""

    def __init__(
        self, task: str, num_classes: int, ignore_index: int | None = 255
    ) -> None:
        self.task = task
        self.count = ChipCounts(task, num_classes, ignore_index)
        self.sums: dict[str, np.ndarray] = {}

    def update(self, output: Tensor, target: Tensor, regions: Sequence[str]) -> None:
        """Take in a batch of `ChipCounts`, with B region names."""
        counts = self.count(output, target)
        if len(regions) != len(counts):
            raise ValueError(
                f"{len(counts)} chips and {len(regions)} region names do not belong "
                "together."
            )
        for region, chip in zip(regions, counts, strict=True):
            self.sums[region] = self.sums.get(region, 0) + chip

    def compute(self) -> dict[str, Any]:
        """Scores so far: "overall", and "regions" by name; NaN without a label."""
        regions = {name: self._scores(self.sums[name]) for name in sorted(self.sums)}
        return {"overall": self._scores(sum(self.sums.values())), "regions": regions}

    def _scores(self, sums: Any) -> dict[str, float]:
        return {name: float(v) for name, v in scores_of(sums, self.task).items()}


def scores_of(sums: np.ndarray, task: str) -> dict[str, np.ndarray]:
    """Metric -> (...) scores, from summed counts (..., *) of `ChipCounts`.

    A class that nobody names is left out of the means. `psnr` (dB) and `ssim` take a
    reflectance of 1 as the range of values.
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
