"""The losses of `fit`, by name, and weights of classes.

A mean over pixels hardly sees a class with few of them. Overlap losses (dice, tversky)
and weights do. Sources: focal, Lin et al. 2017 (arXiv 1708.02002); dice, Milletari et
al. 2016 (arXiv 1606.04797); tversky, Salehi et al. 2017 (arXiv 1706.05721), whose 0.3
and 0.7 count a missed pixel more than a false one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from geopeft_kit.data.batch import Batch
from geopeft_kit.data.split_data import SplitData
from geopeft_kit.training.metrics import VALUE_TASKS

CLASS_LOSSES = ("auto", "focal", "dice", "ce+dice", "tversky")
VALUE_LOSSES = ("auto", "huber")
HUBER_DELTA = 0.1  # targets are shares or reflectance, from 0 to 1
CAP = 10.0  # of balanced weights


def check_loss(loss: Any, weights: Any, task: str) -> None:
    """ValueError for a loss or class weights that the task does not have."""
    allowed = VALUE_LOSSES if task in VALUE_TASKS else CLASS_LOSSES
    if not callable(loss) and loss not in allowed:
        raise ValueError(
            f"loss is {loss!r}; task {task!r} takes {', '.join(allowed)}, or a "
            "function of (logits, target) that returns a scalar."
        )
    if weights is not None and (callable(loss) or task in VALUE_TASKS):
        raise ValueError(
            f"class_weights need classes and a loss by name; the task is {task!r} and "
            f"the loss {loss!r}. Leave class_weights out."
        )


def own_loss(output: Tensor, target: Tensor, loss: Callable[..., Any]) -> Tensor:
    """The loss of a user's function; ValueError unless it is a finite scalar."""
    value = loss(output, target)
    if not isinstance(value, Tensor) or value.numel() != 1:
        shape = tuple(getattr(value, "shape", ()))
        raise ValueError(
            f"the loss returned a {type(value).__name__} of shape {shape}; it must "
            "return a tensor of one number, such as a mean."
        )
    if not value.isfinite():
        raise ValueError(
            f"the loss returned {float(value)}; check that it leaves out pixels "
            "without a label and divides by no zero."
        )
    return value.reshape(())


def overlap_or_focal(
    output: Tensor, target: Tensor, loss: str, task: str, ignore: int, weights: Any
) -> Tensor:
    """A loss of segmentation_models_pytorch: "focal", "dice" or "tversky".

    0 for a batch without a label; a class that is absent from a batch adds nothing to
    the overlap losses.
    """
    from segmentation_models_pytorch import losses

    several = task == "multilabel"
    options: dict[str, Any] = {"class_weights": weights}
    if not several:
        if not (target != ignore).any():
            return output.sum() * 0.0
        options["ignore_index"] = ignore
    mode = "multilabel" if several else "multiclass"
    if loss == "focal":
        return losses.FocalLoss(mode, **options)(output, target.long())
    if loss == "dice":
        return losses.DiceLoss(mode, **options)(output, target.long())
    return losses.TverskyLoss(mode, alpha=0.3, beta=0.7, **options)(
        output, target.long()
    )


def huber(output: Tensor, target: Tensor) -> Tensor:
    """The mean over known values; delta is 0.1."""
    known = target.isfinite()
    total = F.huber_loss(
        output[known], target[known], reduction="sum", delta=HUBER_DELTA
    )
    return total / known.sum().clamp(min=1)


def resolve_weights(
    weights: Sequence[float] | Mapping[str, float] | str,
    data: SplitData,
    progress: bool = False,
) -> list[float]:
    """One weight a class; "balanced" is counted on the training split and capped."""
    names = [str(n) for n in getattr(data, "classes", None) or range(data.num_classes)]
    if isinstance(weights, str):
        if weights != "balanced":
            raise ValueError(
                f"class_weights is {weights!r}; allowed are 'balanced', a list, or a "
                "dict by class name."
            )
        found = _balanced(data, names)
        if progress:
            parts = [f"{n} {w:.3g}" for n, w in zip(names, found, strict=True)]
            print(f"class_weights {', '.join(parts)} (balanced, at most {CAP:g})")
        return found
    if isinstance(weights, Mapping):
        unknown = sorted(set(weights) - set(names))
        if unknown:
            raise ValueError(
                f"class_weights names {unknown}; the classes are {', '.join(names)}."
            )
        weights = [weights.get(name, 1.0) for name in names]
    found = [float(weight) for weight in weights]
    if len(found) != data.num_classes or not all(0 < w < float("inf") for w in found):
        raise ValueError(
            f"class_weights is {found}; it takes {data.num_classes} numbers above 0, "
            f"one for each of {', '.join(names)}."
        )
    return found


def _balanced(data: SplitData, names: Sequence[str]) -> list[float]:
    """All pixels over the number of classes and a class's own pixels, at most `CAP`."""
    counts = torch.zeros(data.num_classes)
    total = 0
    for loaded in data.dataloader("train", augment=False):
        target = Batch.of(loaded).target
        if data.task == "multilabel":
            counts += target.sum(dim=0)
            total += 2 * len(target)  # each class is there or not
            continue
        known = target[target != data.ignore_index].long()
        counts += torch.bincount(known, minlength=data.num_classes)
        total += len(known)
    absent = [name for name, count in zip(names, counts, strict=True) if not count]
    if absent:
        warnings.warn(
            f"the training split holds nothing of {', '.join(absent)}; weight 1.",
            stacklevel=2,
        )
    classes = 2 if data.task == "multilabel" else data.num_classes
    balanced = (total / (classes * counts)).clamp(max=CAP)
    return balanced.where(counts > 0, 1.0).tolist()
