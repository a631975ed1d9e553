"""Scores of a model on a split, overall and for each region.

Scores are pooled over the data set: one confusion matrix (or one sum of squared errors)
over all pixels, never a mean of batch means. Taught in notebooks 00 and 09.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from geopeft_kit.data.batch import Batch
from geopeft_kit.data.chips import ChipData
from geopeft_kit.data.torchgeo_data import AnyData, as_data
from geopeft_kit.model import Model
from geopeft_kit.training.hardware import choose_device
from geopeft_kit.training.metrics import VALUE_TASKS, RegionalMetrics
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
    ignored = ignored_value(model, chips)
    metrics = RegionalMetrics(model.task, model.num_classes, ignored)
    for output, batch in outputs_of(model, chips, split, device):
        metrics.update(output, batch.target, batch.region)
    return metrics.compute()


def ignored_value(model: Model, data: ChipData) -> int | None:
    """The target value without a label; none for values, where any number is real."""
    return None if model.task in VALUE_TASKS else data.ignore_index


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
