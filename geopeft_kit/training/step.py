"""One training step: features, output, loss.

`fit`, the memory estimate, the automatic batch size, the head start and `evaluate` all
run this code. Taught in notebook 02.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from geopeft_kit.data.batch import Batch
from geopeft_kit.methods.base import TrainingRule
from geopeft_kit.model import Model
from geopeft_kit.training.losses import huber, overlap_or_focal, own_loss

Loss = Callable[[Tensor, Tensor], Tensor]
"""Output of a model, target -> scalar."""

Replay = Callable[[Sequence[Tensor], tuple[int, int]], list[Tensor]]
"""What was cached of images, their (H, W) -> the model's features."""


def output_of(model: Model, batch: Batch, replay: Replay | None = None) -> Tensor:
    """Logits or values (B, ...) for a batch of images, or of their cached maps."""
    if batch.features is None:
        return model(batch.image, batch.meta)
    maps = batch.features if replay is None else replay(batch.features, batch.size)
    return model.from_features(maps, batch.size)


def step(
    model: Model,
    batch: Batch,
    loss: Loss,
    replay: Replay | None = None,
    rule: TrainingRule | None = None,
) -> Tensor:
    """The loss of one batch, with the penalty of a method that has one."""
    value = loss(output_of(model, batch, replay), batch.target)
    return value if rule is None else value + rule.penalty()


def rule_of(model: Model, total_steps: int = 1) -> TrainingRule | None:
    """What the active method does in training besides gradient steps, or None."""
    adapter: Any = model.backbone.adapter
    return None if adapter is None else adapter.training_rule(total_steps)


def make_loss(
    task: str,
    ignore_index: int = 255,
    loss: str | Loss = "auto",
    class_weights: Sequence[float] | None = None,
) -> Loss:
    """The loss of a task: `compute_loss`, or another of `losses` by name."""
    if task == "regression" and loss != "auto":
        return lambda output, target: make_loss("values", loss=loss)(
            output.squeeze(1), target
        )  # (B,H,W)
    if callable(loss):
        return partial(own_loss, loss=loss)
    if loss == "huber":
        return huber
    auto = partial(
        compute_loss, task=task, ignore_index=ignore_index, class_weights=class_weights
    )
    if loss == "auto":
        return auto
    other = partial(
        overlap_or_focal,
        loss=loss.removeprefix("ce+"),
        task=task,
        ignore=ignore_index,
        weights=class_weights,
    )
    if loss == "ce+dice":
        return lambda output, target: auto(output, target) + other(output, target)
    return other


def compute_loss(
    output: Tensor,
    target: Tensor,
    task: str,
    ignore_index: int = 255,
    class_weights: Sequence[float] | None = None,
) -> Tensor:
    """The loss of a task, averaged over the labelled samples or pixels.

    Args:
        output: (B,K,H,W) or (B,K) logits, (B,1,H,W) values for regression, (B,K,H,W)
            values for super-resolution.
        target: (B,H,W) or (B,) class numbers, (B,K) zeros and ones for multilabel,
            (B,H,W) values for regression (NaN where unknown), (B,K,H,W) for
            super-resolution.
        task: A task of `build_model`.
        ignore_index: Class number that carries no label.
        class_weights: A weight a class, in the mean; for multilabel of its ones.

    Returns:
        A scalar; 0 (with a gradient of 0) for a batch without a single label.

    Raises:
        ValueError: `task` is unknown, or the shapes of super-resolution differ.
    """
    if task == "regression":
        output = output.squeeze(1)  # (B,H,W)
        valid = target.isfinite()
        error = (output - target).where(valid, 0.0)
        return error.square().sum() / valid.sum().clamp(min=1)
    if task == "super_resolution":
        if output.shape != target.shape:  # it would be repeated to fit, silently
            raise ValueError(
                f"the model answers {tuple(output.shape[1:])} and the finer image is "
                f"{tuple(target.shape[1:])}: (bands, H, W). Build the model with "
                "num_classes=data.num_classes and factor=data.factor."
            )
        return F.mse_loss(output, target)
    weight = None if class_weights is None else output.new_tensor(class_weights)
    if task == "multilabel":
        return F.binary_cross_entropy_with_logits(
            output, target.to(output.dtype), pos_weight=weight
        )
    if task in ("segmentation", "change", "classification"):
        total = F.cross_entropy(
            output, target.long(), weight, ignore_index=ignore_index, reduction="sum"
        )
        known = target != ignore_index
        if weight is None or not known.any():
            return total / known.sum().clamp(min=1)
        return total / weight[target[known].long()].sum()
    raise ValueError(
        f"no loss for task {task!r}; the tasks are segmentation, change, "
        "classification, multilabel, regression and super_resolution."
    )
