"""The settings of a run: what is allowed, and what `None` and "auto" mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from geopeft_kit.data.chips import ChipData
from geopeft_kit.methods import Adapter, list_methods
from geopeft_kit.model import Model
from geopeft_kit.training.checkpointing import parts_to_recompute
from geopeft_kit.training.frozen_precision import check_frozen_precision
from geopeft_kit.training.optimisers import check_optimiser
from geopeft_kit.training.quantised_weights import check_quantised

HEAD_STARTS = ("auto", "probe", "calibrate", "none")


def check_levers(model: Model, run: dict[str, Any], device: torch.device) -> None:
    """Errors for levers that this model or this machine does not have."""
    parts_to_recompute(model, run["checkpointing"])
    check_frozen_precision(run["frozen_precision"], run["precision"])
    if run["frozen_precision"] == "nf4":
        check_quantised(model, device)
    check_optimiser(run["optimiser"])


def check_run(
    model: Model,
    data: ChipData,
    epochs: int,
    head_start: str,
    folder: str | Path | None,
    resume: bool,
    patience: int | None,
) -> None:
    """Errors for arguments of `fit` that do not fit each other."""
    if epochs < 1:
        raise ValueError(f"epochs is {epochs}; it must be 1 or more.")
    if head_start not in HEAD_STARTS:
        raise ValueError(
            f"head_start is {head_start!r}; allowed are {', '.join(HEAD_STARTS)}."
        )
    if model.task != data.task:
        raise ValueError(
            f"the model's task is {model.task!r} and the data's is {data.task!r}. "
            f"Build the model with build_model(..., task={data.task!r})."
        )
    if patience and "val" not in data.splits:
        raise ValueError(
            f"patience={patience} needs a validation split; the data has "
            f"{', '.join(data.splits)}. Pass val_fraction to ChipData."
        )
    if resume and folder is None:
        raise ValueError("resume=True needs the folder of the run to go on with.")
    if resume and folder is not None and not (Path(folder) / "last.ckpt").exists():
        raise FileNotFoundError(
            f"{folder} holds no last.ckpt to resume from. Start with resume=False; a "
            "checkpoint is written after each epoch."
        )


def default_rate(
    model: Model, asked: float | None, frozen: bool, progress: bool
) -> float:
    """The rate asked for, or the default of the method's card, which is printed."""
    if asked is not None:
        if asked <= 0:
            raise ValueError(f"learning_rate is {asked}; it must be above 0.")
        return asked
    if frozen:
        return 0.0
    name = method(model)
    card = next(card for card in list_methods() if card.name == name)
    rate = card.learning_rate or 0.0
    if progress:
        print(f"learning_rate {rate:g} (default of {name!r})")
    return rate


def method(model: Model) -> str:
    """Key of the active method; a backbone without one trains in full."""
    adapter: Adapter | None = getattr(model.backbone, "adapter", None)
    return "full" if adapter is None else adapter.name


def resolve_cache(
    model: Model, data: ChipData, asked: bool | None, frozen: bool, prefix: bool
) -> bool:
    """Whether to cache features; None does where it changes nothing."""
    if asked is None and not prefix:
        return frozen and not data.augment and data.one_size
    if (asked or prefix) and data.transforms is not None:
        raise ValueError(
            "cache_features and cache_prefix need images of a finite set, and the "
            "transforms of this data draw new ones every epoch. Build the data with "
            "augment=True (flips and quarter turns) or False."
        )
    if asked is None:
        return False
    if asked and not frozen:
        raise ValueError(
            "cache_features=True needs a frozen backbone, but "
            f"{method(model)!r} trains inside it. Attach 'frozen', or leave "
            "cache_features at None."
        )
    return asked
