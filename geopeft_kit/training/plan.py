"""The plan of a run: the arguments of `fit`, checked, with "auto" and None resolved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from geopeft_kit.data.batch import Batch
from geopeft_kit.data.chips import ChipData
from geopeft_kit.methods import list_methods
from geopeft_kit.model import Model
from geopeft_kit.training.checkpointing import checkpointed, parts_to_recompute
from geopeft_kit.training.frozen_precision import (
    check_frozen_precision,
    check_quantised,
    frozen_held_in,
)
from geopeft_kit.training.hardware import choose_precision, free_gib
from geopeft_kit.training.losses import check_loss, resolve_weights
from geopeft_kit.training.memory import MemoryEstimate, estimate_memory
from geopeft_kit.training.metrics import VALUE_TASKS
from geopeft_kit.training.optimisers import check_optimiser
from geopeft_kit.training.step import Loss, make_loss
from geopeft_kit.training.tracker import MIB, weight_bytes

DECODER_LEARNING_RATE = 1e-3
HEAD_STARTS = ("auto", "probe", "calibrate", "none")
SHARE = 0.9  # of free memory; the rest is left to others


@dataclass(frozen=True)
class Plan:
    """What a run does beyond its model and data; fields are arguments of `fit`.

    `free_mib` is what the device had free at the start.
    """

    epochs: int = 10
    learning_rate: float | None = None
    decoder_learning_rate: float | None = None
    weight_decay: float = 0.05
    loss: Any = "auto"
    class_weights: Any = None
    head_start: str = "auto"
    batch_size: Any = None
    accumulate: int = 1
    memory_gib: float | None = None
    cache_features: bool | None = None
    cache_prefix: bool = False
    checkpointing: str | None = None
    precision: Any = "auto"
    frozen_precision: str | None = None
    optimiser: str = "adamw"
    validate_every: int | None = None
    patience: int | None = None
    seed: int = 0
    ignore_index: int = 255
    free_mib: float = 0.0

    def resolved(
        self, model: Model, data: ChipData, device: torch.device, progress: bool = False
    ) -> Plan:
        """The plan with every choice made but an automatic batch size.

        Raises ValueError for what this model, this data or this machine cannot do. A
        default learning rate is printed with `progress`.
        """
        self._check(model, data)
        precision = choose_precision(self.precision, device, self.frozen_precision)
        check_frozen_precision(self.frozen_precision, precision)
        if self.frozen_precision == "nf4":
            check_quantised(model, device)
        if self.checkpointing:
            parts_to_recompute(model, self.checkpointing)
        check_optimiser(self.optimiser)
        frozen = not any(p.requires_grad for p in model.backbone.parameters())
        return replace(
            self,
            learning_rate=self._rate(model, frozen, progress),
            decoder_learning_rate=self.decoder_learning_rate or DECODER_LEARNING_RATE,
            class_weights=(
                None
                if self.class_weights is None
                else resolve_weights(self.class_weights, data, progress)
            ),
            head_start=resolve_head_start(model, self.head_start, data.one_size),
            batch_size=self.batch_size or data.batch_size,
            cache_features=self._caches(model, data, frozen),
            precision=precision,
            validate_every=self.validate_every or (1 if self.patience else None),
            ignore_index=data.ignore_index,
            free_mib=SHARE * free_gib(device) * 1024,
        )

    def _check(self, model: Model, data: ChipData) -> None:
        if self.epochs < 1:
            raise ValueError(f"epochs is {self.epochs}; it must be 1 or more.")
        if self.head_start not in HEAD_STARTS:
            raise ValueError(
                f"head_start is {self.head_start!r}; allowed are "
                f"{', '.join(HEAD_STARTS)}."
            )
        if model.task != data.task:
            raise ValueError(
                f"the model's task is {model.task!r} and the data's is {data.task!r}. "
                f"Build the model with build_model(..., task={data.task!r})."
            )
        check_loss(self.loss, self.class_weights, data.task)
        if self.patience and "val" not in data.splits:
            raise ValueError(
                f"patience={self.patience} needs a validation split; the data has "
                f"{', '.join(data.splits)}. Pass val_fraction to ChipData."
            )
        size = self.batch_size
        if size not in (None, "auto") and not (type(size) is int and size >= 1):
            raise ValueError(
                f"batch_size is {size!r}; it must be a whole number from 1, 'auto', or "
                "None for the data's own."
            )
        if not (type(self.accumulate) is int and self.accumulate >= 1):
            raise ValueError(
                f"accumulate is {self.accumulate!r}; it is a whole number of batches, "
                "1 or more."
            )
        if self.patience and not _has_labels(data):
            raise ValueError(
                f"patience={self.patience} looks at validation scores, and no chip of "
                "the validation split has a label. Label some, choose another "
                "val_fraction, or leave patience out."
            )
        if self.memory_gib is not None and not 0 < self.memory_gib < float("inf"):
            raise ValueError(f"memory_gib is {self.memory_gib}; it must be above 0.")

    def _rate(self, model: Model, frozen: bool, progress: bool) -> float:
        """The rate asked for, or the default of the method's card."""
        if self.learning_rate is not None:
            if not 0 < self.learning_rate < float("inf"):
                raise ValueError(
                    f"learning_rate is {self.learning_rate}; it must be above 0."
                )
            return self.learning_rate
        if frozen:
            return 0.0
        name = _method(model)
        card = next(card for card in list_methods() if card.name == name)
        rate = card.learning_rate or 0.0
        if progress:
            print(f"learning_rate {rate:g} (default of {name!r})")
        return rate

    def _caches(self, model: Model, data: ChipData, frozen: bool) -> bool:
        """Whether to cache features; None does where it changes nothing."""
        asked = self.cache_features
        if asked is None and not self.cache_prefix:
            return frozen and not data.augment and data.one_size
        if (asked or self.cache_prefix) and data.transforms is not None:
            raise ValueError(
                "cache_features and cache_prefix need images of a finite set, and the "
                "transforms of this data draw new ones every epoch. Build the data "
                "with augment=True (flips and quarter turns) or False."
            )
        if asked and not frozen:
            raise ValueError(
                "cache_features=True needs a frozen backbone, but "
                f"{_method(model)!r} trains inside it. Attach 'frozen', or leave "
                "cache_features at None."
            )
        return bool(asked)

    def make_loss(self, task: str) -> Loss:
        """The loss of this run."""
        return make_loss(task, self.ignore_index, self.loss, self.class_weights)

    def settings(self) -> dict[str, Any]:
        """The fields; a loss of the user's own by its name."""
        name = getattr(self.loss, "__name__", type(self.loss).__name__)
        return asdict(replace(self, loss=name if callable(self.loss) else self.loss))

    def room_mib(self, model: Model) -> float:
        """What the run may use, the model's own weights included."""
        if self.memory_gib is not None:
            return self.memory_gib * 1024
        return self.free_mib + weight_bytes(model) / MIB

    def estimate(self, model: Model, image_size: tuple[int, int]) -> MemoryEstimate:
        """The memory that the run will take."""
        return estimate_memory(
            model,
            self.batch_size,
            image_size,
            self.precision,
            self.checkpointing,
            self.frozen_precision,
            self.optimiser,
        )

    @contextmanager
    def levers(self, model: Model) -> Iterator[None]:
        """Hold frozen weights in fewer bits and recompute blocks, where asked for."""
        with ExitStack() as stack:
            if self.frozen_precision:
                stack.enter_context(frozen_held_in(model, self.frozen_precision))
            if self.checkpointing:
                stack.enter_context(checkpointed(model, self.checkpointing))
            yield


def _has_labels(data: ChipData) -> bool:
    """Whether the validation split has a label; reads up to the first one."""
    targets = (Batch.of(batch).target for batch in data.dataloader("val"))
    known = (t[t.isfinite()] for t in targets)
    if data.task in VALUE_TASKS:
        return any(len(values) for values in known)
    return any((values != data.ignore_index).any() for values in known)


def resolve_head_start(model: Model, how: str, one_size: bool = True) -> str:
    """What "auto" means for a model: "probe" or "calibrate"; other words stay.

    Features of images that are not of `one_size` cannot be kept for a probe.
    """
    if how != "auto":
        return how
    return "probe" if model.has_linear_head and one_size else "calibrate"


def _method(model: Model) -> str:
    """Key of the active method; a backbone without one trains in full."""
    adapter: Any = model.backbone.adapter
    return "full" if adapter is None else adapter.name
